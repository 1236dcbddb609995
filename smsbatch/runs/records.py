"""The records of the ledger and the names they are stored under: what was committed, what was published.

A record is JSON, written whole and read whole; `from_json` raises what is in ILLEGIBLE for anything else.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from smsbatch.data.shards import digest
from smsbatch.runs.layout import ATTEMPTS, COMMITS, PUBLISHED

KINDS = ("tar", "parquet")

PARSE_ERRORS = (ValueError, KeyError, TypeError, AttributeError)

_COMMIT_FILE = re.compile(rf"{COMMITS}/(\d{{6,}})(?:\.g([1-9]\d*))?\.json")


Content = bytes | Path  # the proof below has a field `bytes`, which hides the type


def new_attempt() -> str:
    """A name that no other attempt has, anywhere: a restarted process cannot know which numbers are taken."""
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True, slots=True)
class FileDigest:
    sha256: str
    bytes: int

    @classmethod
    def of(cls, source: Content) -> FileDigest:
        if isinstance(source, bytes):
            return cls(hashlib.sha256(source).hexdigest(), len(source))
        return cls(digest(source), source.stat().st_size)


class _Record:
    """JSON and back, for the two records below."""

    __slots__ = ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values = json.loads(data)
        return cls(**values | {"files": {kind: FileDigest(**proof) for kind, proof in values["files"].items()}})


@dataclass(frozen=True, slots=True)
class Commit(_Record):
    """The record of the attempt that won a unit; samples == succeeded + failed, `errors` counts the failed by code.

    `generation` is 0, and one more each time the unit's failed samples were computed again.
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
    """The record of a published shard: the attempts it is made of and its two files, paths relative to the store.

    It follows from the commits: `generation` is the highest among its units, the counts and seconds are their sums.
    What a publication of a higher generation replaces is kept; while a generation is in the making, units of it coming
    in one after another, its earlier states are not.
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
        """The record, None where there is none that this version reads: all that it says follows from the commits."""
        try:
            return None if data is None else cls.from_json(data)
        except PARSE_ERRORS:
            return None

    @property
    def tar(self) -> str:
        return f"shards/{self.shard:06d}.tar"

    @property
    def parquet(self) -> str:
        return f"metrics/{self.shard:06d}.parquet"

    @property
    def paths(self) -> dict[str, str]:
        return {"tar": self.tar, "parquet": self.parquet}

    def is_there(self, sizes: Mapping[str, int | None]) -> bool:
        """Whether both files are among these sizes, as long as they were."""
        return all(sizes.get(path) == self.files[kind].bytes for kind, path in self.paths.items())

    def made_of(self, commits: Iterable[Commit]) -> bool:
        """Whether these, in plan order, are the commits of the shard."""
        return list(self.attempts) == [commit.attempt for commit in commits]


def attempt_file(unit: int, attempt: str, kind: str) -> str:
    return f"{ATTEMPTS}/{unit:06d}/{attempt}.{kind}"


def commit_file(unit: int, generation: int) -> str:
    return f"{COMMITS}/{unit:06d}{f'.g{generation}' if generation else ''}.json"


def parse_commit_file(path: str) -> tuple[int, int] | None:
    """(unit, generation) of a commit's path; None for any other's."""
    match = _COMMIT_FILE.fullmatch(path)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def published_file(shard: int) -> str:
    return f"{PUBLISHED}/{shard:06d}.json"
