"""The states a training can go on from, in `_smsbatch/checkpoints/` of its run.

`<step>-<id>.safetensors` is stored first, whole, under a name that nobody else has; then `<step>.json` is created, a
record of that file's name, length and digest, which succeeds for one writer only. A checkpoint is one that has a record
and whose file is as the record says: whatever else lies there is a leftover. Any process may die between any two steps.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from smsbatch.errors import StorageError
from smsbatch.runs.layout import CHECKPOINTS
from smsbatch.runs.records import PARSE_ERRORS, FileDigest, new_attempt
from smsbatch.storage.store import Store

LEFTOVER_S = 3600  # a file without a record may be one whose record is being written

_RECORD = re.compile(rf"{CHECKPOINTS}/(\d{{8,}})\.json")
_FILE = re.compile(rf"{CHECKPOINTS}/(\d{{8,}})-\w+\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A record: after how many steps the state was taken, where it lies, and what its writer says `about` it."""

    step: int
    file: str
    sha256: str
    bytes: int
    time: str  # UTC, ISO 8601
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restored:
    """The newest checkpoint that is whole, with its bytes, and a line for each newer one that is not."""

    checkpoint: Checkpoint | None
    data: bytes
    notices: list[str]


def write(store: Store, step: int, data: bytes, about: Mapping[str, Any] | None = None) -> Checkpoint:
    """Store the state after `step` steps; returns the checkpoint that stands: this one, or that of who was first.

    A damaged one does not stand, but is replaced.

    Raises:
        StorageError: it cannot be stored. The earlier ones are as they were.
    """
    name, proof = f"{CHECKPOINTS}/{step:08d}-{new_attempt()}.safetensors", FileDigest.of(data)
    store.put(name, data)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    ours = Checkpoint(step, name, proof.sha256, proof.bytes, now, dict(about or {}))
    record, content = f"{CHECKPOINTS}/{step:08d}.json", json.dumps(asdict(ours), indent=1).encode()
    if store.create(record, content):
        return ours
    try:
        standing = _parse(store, record)
        read(store, standing)
    except StorageError:
        store.put(record, content)
        return ours
    store.delete(name)
    return standing


def latest(store: Store) -> Checkpoint | None:
    """The newest checkpoint whose file is there and as long as it should be; it is not read. None if there is none."""
    return next(_newest_first(store, store.sizes(CHECKPOINTS), []), None)


def read(store: Store, checkpoint: Checkpoint) -> bytes:
    """The state of a checkpoint.

    Raises:
        StorageError: it cannot be read, or is not what was written.
    """
    data = store.read(checkpoint.file)
    if hashlib.sha256(data).hexdigest() != checkpoint.sha256:
        raise StorageError(f"{store.locate(checkpoint.file)} is not what was written")
    return data


def restore(store: Store) -> Restored:
    """What to go on from: the newest checkpoint that is whole, to the last byte."""
    notices: list[str] = []
    for found in _newest_first(store, store.sizes(CHECKPOINTS), notices):
        try:
            return Restored(found, read(store, found), notices)
        except StorageError as error:
            notices.append(f"{error}; an older checkpoint is taken")
    return Restored(None, b"", notices)


def prune(store: Store, keep: int) -> None:
    """Remove what is older than the newest `keep` checkpoints, and files that got no record within an hour."""
    sizes = store.sizes(CHECKPOINTS)
    kept = list(islice(_newest_first(store, sizes, []), keep))
    oldest = kept[-1].step if len(kept) == keep else 0
    named = set()
    for step, record in _records(sizes):
        if step < oldest:
            store.delete(record)  # before its file, so that no record promises what is gone
            continue
        with suppress(StorageError):  # names nothing
            named.add(_parse(store, record).file)
    now = time.time()
    for match in filter(None, map(_FILE.fullmatch, sizes)):
        path, step = match[0], int(match[1])
        if step < oldest or (path not in named and now - store.modified(path).timestamp() > LEFTOVER_S):
            store.delete(path)


def _newest_first(store: Store, sizes: Mapping[str, int], notices: list[str]) -> Iterator[Checkpoint]:
    """The checkpoints among these objects whose files are as long as they should be; of the others a line each."""
    for _, record in _records(sizes):
        try:
            found = _parse(store, record)
        except StorageError as error:
            notices.append(f"{error}; an older checkpoint is taken")
            continue
        size = sizes.get(found.file)
        if size == found.bytes:
            yield found
        else:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {found.bytes:,}"
            notices.append(f"{store.locate(found.file)} {what}; an older checkpoint is taken")


def _records(sizes: Iterable[str]) -> list[tuple[int, str]]:
    """(step, path) of all records among these paths, the newest first."""
    return sorted(((int(match[1]), match[0]) for match in map(_RECORD.fullmatch, sizes) if match), reverse=True)


def _parse(store: Store, record: str) -> Checkpoint:
    try:
        return Checkpoint(**json.loads(store.read(record)))
    except PARSE_ERRORS as error:
        raise StorageError(f"{store.locate(record)} is not a checkpoint's record") from error
