"""The checkpoints from which a training resumes, in `_smsbatch/checkpoints/` of its run.

A writer first stores the whole state as `<step>-<id>.safetensors`, a unique name. Then it creates `<step>.json`, a
record of that file's name, length and digest; this succeeds for one writer only. A checkpoint is a record whose file
matches it; any other file there is a leftover. A process may die between any two steps.
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

LEFTOVER_S = 3600  # a younger file without a record is kept, because its record may be about to be written

_RECORD = re.compile(rf"{CHECKPOINTS}/(\d{{8,}})\.json")
_FILE = re.compile(rf"{CHECKPOINTS}/(\d{{8,}})-\w+\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The record of the state after `step` steps, in `file`; `about` holds what the writer adds."""

    step: int
    file: str
    sha256: str
    bytes: int
    time: str  # UTC, ISO 8601
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restored:
    """The newest intact checkpoint with its bytes, and a line for each newer one that is damaged."""

    checkpoint: Checkpoint | None
    data: bytes
    notices: list[str]


def write(store: Store, step: int, data: bytes, about: Mapping[str, Any] | None = None) -> Checkpoint:
    """Store the state after `step` steps.

    Returns this checkpoint, or the one that another writer stored first; a damaged one is replaced.

    Raises:
        StorageError: it cannot be stored. Earlier checkpoints are unchanged.
    """
    name, expected = f"{CHECKPOINTS}/{step:08d}-{new_attempt()}.safetensors", FileDigest.of(data)
    store.put(name, data)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    ours = Checkpoint(step, name, expected.sha256, expected.bytes, now, dict(about or {}))
    record, content = f"{CHECKPOINTS}/{step:08d}.json", json.dumps(asdict(ours), indent=1).encode()
    if store.create(record, content):
        return ours
    try:
        existing = _parse(store, record)
        read(store, existing)
    except StorageError:
        store.put(record, content)
        return ours
    store.delete(name)
    return existing


def latest(store: Store) -> Checkpoint | None:
    """The newest checkpoint whose file has the recorded length; the file is not read. None if there is none."""
    return next(_newest_first(store, store.sizes(CHECKPOINTS), []), None)


def read(store: Store, checkpoint: Checkpoint) -> bytes:
    """The state of a checkpoint.

    Raises:
        StorageError: it cannot be read, or its digest is not the recorded one.
    """
    data = store.read(checkpoint.file)
    if hashlib.sha256(data).hexdigest() != checkpoint.sha256:
        raise StorageError(f"{store.locate(checkpoint.file)} is not what was written")
    return data


def restore(store: Store) -> Restored:
    """Read the newest checkpoint whose digest matches its record."""
    notices: list[str] = []
    for found in _newest_first(store, store.sizes(CHECKPOINTS), notices):
        try:
            return Restored(found, read(store, found), notices)
        except StorageError as error:
            notices.append(f"{error}; an older checkpoint is taken")
    return Restored(None, b"", notices)


def prune(store: Store, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and files that got no record within an hour."""
    sizes = store.sizes(CHECKPOINTS)
    kept = list(islice(_newest_first(store, sizes, []), keep))
    oldest = kept[-1].step if len(kept) == keep else 0
    named = set()
    for step, record in _records(sizes):
        if step < oldest:
            store.delete(record)  # before its file, so that no record names a missing file
            continue
        with suppress(StorageError):  # a damaged record names no file
            named.add(_parse(store, record).file)
    now = time.time()
    for match in filter(None, map(_FILE.fullmatch, sizes)):
        path, step = match[0], int(match[1])
        if step < oldest or (path not in named and now - store.modified(path).timestamp() > LEFTOVER_S):
            store.delete(path)


def _newest_first(store: Store, sizes: Mapping[str, int], notices: list[str]) -> Iterator[Checkpoint]:
    """The checkpoints whose files have the recorded length; `notices` gets a line for each of the others."""
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
