"""The ledger's records of commits and publications, and the names under which they are stored.

A record is JSON that ends with the SHA-256 of the rest, so that any change of its bytes is found wherever it is read:
`from_json` raises one of PARSE_ERRORS. Records of versions before 0.2 have no digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from smsbatch.data.shards import digest
from smsbatch.runs.layout import ATTEMPTS, COMMITS, PUBLISHED
from smsbatch.storage.store import Store, storage_errors

KINDS = ("tar", "parquet")

PARSE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DIGEST = "sha256"  # the last key of a record

_COMMIT_FILE = re.compile(rf"{COMMITS}/(\d{{6,}})(?:\.g([1-9]\d*))?\.json")

_CHUNK = 16 << 20

Content = bytes | Path  # named here because `FileDigest` has a field `bytes`, which hides the type


def new_attempt() -> str:
    """A random unique name: a restarted process cannot know which numbers are taken."""
    return uuid.uuid4().hex[:12]


def dump_record(values: Mapping[str, Any]) -> bytes:
    """JSON of the values and, as its last key, the SHA-256 of the JSON without that key, which may be there already."""
    plain = {key: value for key, value in values.items() if key != DIGEST}
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return json.dumps(plain | {DIGEST: digest}, indent=1).encode()


def load_record(data: bytes) -> dict[str, Any]:
    """The values of a record, with its digest if it has one.

    Raises:
        ValueError, TypeError, RecursionError: it is no JSON object, or not what `dump_record` wrote.
    """
    values = json.loads(data)
    if not isinstance(values, dict):
        raise TypeError("it is no JSON object")
    if DIGEST in values and dump_record(values) != data:
        raise ValueError("its SHA-256 differs")
    return values


@dataclass(frozen=True, slots=True)
class FileDigest:
    sha256: str
    bytes: int

    @classmethod
    def of(cls, source: Content) -> FileDigest:
        if isinstance(source, bytes):
            return cls(hashlib.sha256(source).hexdigest(), len(source))
        return cls(digest(source), source.stat().st_size)

    @classmethod
    def stored(cls, store: Store, path: str) -> FileDigest:
        """That of an object, which is read as a stream."""
        found, size = hashlib.sha256(), 0
        with store.open_read(path) as file, storage_errors("read", store.locate(path)):
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                size += len(chunk)
        return cls(found.hexdigest(), size)


_IS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "str": lambda value: isinstance(value, str),
    "float": lambda value: isinstance(value, int | float) and abs(value) < 1e300,
    "Sequence[str]": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "Mapping[str, int]": lambda value: all(type(count) is int for count in value.values()),
    "Mapping[str, FileDigest]": lambda value: all(type(value[kind]["bytes"]) is int for kind in KINDS),
}
"""Checks of the fields of records in JSON, by their types."""


class _Record:
    """Conversion to and from JSON."""

    __slots__ = ()

    def to_json(self) -> bytes:
        return dump_record(asdict(self))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values = load_record(data)
        values.pop(DIGEST, None)
        record = cls(**values | {"files": {kind: FileDigest(**values["files"][kind]) for kind in KINDS}})
        for one in fields(cls):  # type: ignore[arg-type]
            if not _IS[str(one.type)](values[one.name]):
                raise TypeError(f"its {one.name} is no {one.type}")
        if isinstance(record, Commit):
            datetime.fromisoformat(record.finished)
        return record


@dataclass(frozen=True, slots=True)
class Commit(_Record):
    """The record of the attempt that won a unit; samples == succeeded + failed, `errors` counts failures by code.

    `generation` starts at 0 and grows by one with each retry of the unit's failed samples.
    """

    unit: int
    generation: int
    attempt: str
    worker: str
    samples: int
    succeeded: int
    failed: int
    errors: Mapping[str, int]
    seconds: float
    finished: str  # UTC, ISO 8601
    files: Mapping[str, FileDigest]  # tar, parquet


@dataclass(frozen=True, slots=True)
class Published(_Record):
    """The record of a published shard: its attempts and its two files, with paths relative to the store.

    The commits determine it: `generation` is the highest among its units, counts and seconds are their sums. A
    publication that one of a higher generation replaces is kept. While units of a generation are still being committed,
    its earlier states are not kept.
    """

    shard: int
    generation: int
    attempts: Sequence[str]
    samples: int
    succeeded: int
    failed: int
    errors: Mapping[str, int]
    seconds: float
    files: Mapping[str, FileDigest]

    @classmethod
    def parse(cls, data: bytes | None) -> Published | None:
        """The record; None if it is missing or unreadable, since it can be rebuilt from the commits."""
        try:
            return None if data is None else cls.from_json(data)
        except PARSE_ERRORS:
            return None

    @property
    def tar(self) -> str:
        return result_file(self.shard, "tar")

    @property
    def parquet(self) -> str:
        return result_file(self.shard, "parquet")

    @property
    def paths(self) -> dict[str, str]:
        return {"tar": self.tar, "parquet": self.parquet}

    def is_there(self, sizes: Mapping[str, int | None]) -> bool:
        """True if both files are in `sizes` with the recorded length."""
        return all(sizes.get(path) == self.files[kind].bytes for kind, path in self.paths.items())

    def made_of(self, commits: Iterable[Commit]) -> bool:
        """True if the shard was assembled from these commits, which are in plan order."""
        return list(self.attempts) == [commit.attempt for commit in commits]


def result_file(shard: int, kind: str) -> str:
    return f"{'shards' if kind == 'tar' else 'metrics'}/{shard:06d}.{kind}"


def attempt_file(unit: int, attempt: str, kind: str) -> str:
    return f"{ATTEMPTS}/{unit:06d}/{attempt}.{kind}"


def commit_file(unit: int, generation: int) -> str:
    return f"{COMMITS}/{unit:06d}{f'.g{generation}' if generation else ''}.json"


def parse_commit_file(path: str) -> tuple[int, int] | None:
    """(unit, generation) of a commit's path; None for any other path."""
    match = _COMMIT_FILE.fullmatch(path)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def published_file(shard: int) -> str:
    return f"{PUBLISHED}/{shard:06d}.json"
