"""What is done, and the proof of it: attempts, commits, publication.

    1. attempt   a unit's tar and Parquet are built whole on local disk, synced, read again and counted, then put under
                 `_smsbatch/attempts/<unit>/<attempt>.{tar,parquet}`, names that no other attempt ever has
    2. decide    `_smsbatch/commits/<unit>.json` is created, which succeeds for one attempt only, the winner; it has the
                 digests of both files, so a tar and a Parquet of different attempts are never taken for a pair
    3. publish   when all units of a shard are committed anyone may assemble `shards/` and `metrics/` from the winners;
                 the bytes follow from the commits, so doing it twice or at once is harmless; `_smsbatch/published/`
                 notes it last

Resume is: list the commits. Nothing else counts, whatever else lies about. A process may die between any two steps,
several may work on the same unit, and one that was thought dead may wake and finish.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar

from smsbatch.data import shards
from smsbatch.data.sample import Outcome, Unit
from smsbatch.data.store import Store, storage_errors
from smsbatch.errors import StorageError

__all__ = ["Commit", "FileProof", "Ledger", "Published", "new_attempt"]

ATTEMPTS = "_smsbatch/attempts"
COMMITS = "_smsbatch/commits"
PUBLISHED = "_smsbatch/published"
KINDS = ("tar", "parquet")


def new_attempt() -> str:
    """A name that no other attempt has, anywhere: a restarted process cannot know which numbers are taken."""
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True, slots=True)
class FileProof:
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileProof:
        return cls(shards.digest(path), path.stat().st_size)


class _Record:
    """JSON and back, for the two records below."""

    __slots__ = ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values = json.loads(data)
        return cls(**values | {"files": {kind: FileProof(**proof) for kind, proof in values["files"].items()}})


Record = TypeVar("Record", bound=_Record)


@dataclass(frozen=True, slots=True)
class Commit(_Record):
    """The record of the attempt that won a unit; samples == succeeded + failed, `errors` counts the failed by code."""

    unit: int
    attempt: str
    worker: str
    samples: int
    succeeded: int
    failed: int
    errors: Mapping[str, int]
    seconds: float
    finished: str  # UTC, ISO 8601
    files: Mapping[str, FileProof]  # tar, parquet


@dataclass(frozen=True, slots=True)
class Published(_Record):
    """The record of a published shard: the attempts it is made of and its two files, paths relative to the store."""

    shard: int
    attempts: Sequence[str]
    samples: int
    succeeded: int
    failed: int
    files: Mapping[str, FileProof]

    @property
    def tar(self) -> str:
        return f"shards/{self.shard:06d}.tar"

    @property
    def parquet(self) -> str:
        return f"metrics/{self.shard:06d}.parquet"


class Ledger:
    """The ledger of the run in `store`; `metrics` names the columns that every row has beside the fixed ones.

    Files are built in `scratch`, a local folder (default: the system's temporary one), and removed from it in any case.
    """

    def __init__(self, store: Store, scratch: Path | None = None, metrics: Sequence[str] = ()) -> None:
        self.store = store
        self.scratch = scratch
        self.metrics = tuple(metrics)

    def commit(
        self, unit: Unit, outcomes: Sequence[Outcome], *, worker: str, seconds: float, attempt: str | None = None
    ) -> Commit:
        """Record a finished unit, an outcome per planned sample in plan order; returns the winner's commit."""
        if len(outcomes) != len(unit):
            raise ValueError(f"unit {unit.name} has {len(unit)} samples, not {len(outcomes)}")
        winner = self.committed(unit.id)
        if winner is not None:
            return winner
        attempt = attempt or new_attempt()
        with self._workshop() as folder:
            built = {kind: folder / f"unit.{kind}" for kind in KINDS}
            shards.write_tar(built["tar"], outcomes)
            shards.write_rows(
                built["parquet"],
                outcomes,
                unit=unit,
                attempt=attempt,
                worker=worker,
                metrics=self.metrics,
                tar_sha256=shards.digest(built["tar"]),
            )
            _recount(built, len(unit))
            for kind, path in built.items():
                name = _attempt_file(unit.id, attempt, kind)
                if not self.store.create(name, path):
                    raise StorageError(f"{self.store.locate(name)} exists; an attempt's name must be new")
            files = {kind: FileProof.of(path) for kind, path in built.items()}
        errors = Counter(outcome.error_code for outcome in outcomes if outcome.error_code is not None)
        commit = Commit(
            unit=unit.id,
            attempt=attempt,
            worker=worker,
            samples=len(outcomes),
            succeeded=len(outcomes) - errors.total(),
            failed=errors.total(),
            errors=dict(sorted(errors.items())),
            seconds=seconds,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
        )
        name = _commit_file(unit.id)
        return commit if self.store.create(name, commit.to_json()) else self._read(Commit, name)

    def committed(self, unit: int) -> Commit | None:
        """The commit of a unit, None while it has none."""
        name = _commit_file(unit)
        return self._read(Commit, name) if self.store.exists(name) else None

    def commits(self) -> dict[int, Commit]:
        """All units that are done, by unit id, in order."""
        found = [self._read(Commit, name) for name in self.store.list(COMMITS)]
        return {commit.unit: commit for commit in sorted(found, key=lambda commit: commit.unit)}

    def publish(self, shard: int, units: Sequence[Unit]) -> Published | None:
        """Assemble a shard from the winners of its units; None while one is not committed, no work if it is done."""
        commits = []
        for unit in sorted(units, key=lambda unit: unit.start):
            commit = self.committed(unit.id)
            if commit is None:
                return None
            commits.append(commit)
        attempts = [commit.attempt for commit in commits]
        done = self.published(shard)
        if done is not None and done.attempts == attempts:
            return done
        with self._workshop() as folder:
            tars, tables = ([self._fetch(commit, kind, folder) for commit in commits] for kind in KINDS)
            built = {kind: folder / f"shard.{kind}" for kind in KINDS}
            shards.concat_tars(tars, built["tar"])
            shards.concat_rows(tables, built["parquet"], shards.digest(built["tar"]))
            _recount(built, sum(map(len, units)))
            record = Published(
                shard=shard,
                attempts=attempts,
                samples=sum(commit.samples for commit in commits),
                succeeded=sum(commit.succeeded for commit in commits),
                failed=sum(commit.failed for commit in commits),
                files={kind: FileProof.of(path) for kind, path in built.items()},
            )
            self.store.put(record.tar, built["tar"])
            self.store.put(record.parquet, built["parquet"])
        self.store.put(_published_file(shard), record.to_json())  # last: it says that the two are there
        return record

    def published(self, shard: int) -> Published | None:
        """The record of a shard, if it is published and both its files are there, as long as they were."""
        name = _published_file(shard)
        if not self.store.exists(name):
            return None
        record = self._read(Published, name)
        sizes = {"tar": self.store.size(record.tar), "parquet": self.store.size(record.parquet)}
        return record if all(record.files[kind].bytes == sizes[kind] for kind in KINDS) else None

    @contextmanager
    def _workshop(self) -> Iterator[Path]:
        with storage_errors("build a shard's files in", self.scratch or tempfile.gettempdir()):
            if self.scratch is not None:
                self.scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="smsbatch-", dir=self.scratch) as folder:
                yield Path(folder)

    def _fetch(self, commit: Commit, kind: str, folder: Path) -> Path:
        """A winner's file, proven to be the one that was committed."""
        name, proof = _attempt_file(commit.unit, commit.attempt, kind), commit.files[kind]
        target = folder / f"{commit.unit:06d}.{kind}"
        if self.store.size(name) == proof.bytes:
            self.store.fetch(name, target)
            if FileProof.of(target) == proof:
                return target
        commit_file = self.store.locate(_commit_file(commit.unit))
        raise StorageError(f"{self.store.locate(name)} is not what was committed; delete {commit_file} and run again")

    def _read(self, kind: type[Record], name: str) -> Record:
        try:
            return kind.from_json(self.store.read(name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self.store.locate(name)} is no record of this version ({error}); move it away"
            ) from error


def _recount(built: Mapping[str, Path], samples: int) -> None:
    """Read both files again: a row for every sample, and in the tar, in the same order, just those that succeeded."""
    rows = shards.read_rows(built["parquet"])
    keys = [row["key"] for row in rows]
    if len(keys) != samples or len(set(keys)) != samples:
        raise ValueError(f"{samples} samples are planned, there are rows of {len(set(keys))}, {len(keys)} in all")
    if shards.check_tar(built["tar"]) != [row["key"] for row in rows if row["status"] == "success"]:
        raise StorageError(
            f"{built['tar']} and {built['parquet']} do not hold the same samples; check the disk and run again"
        )


def _attempt_file(unit: int, attempt: str, kind: str) -> str:
    return f"{ATTEMPTS}/{unit:06d}/{attempt}.{kind}"


def _commit_file(unit: int) -> str:
    return f"{COMMITS}/{unit:06d}.json"


def _published_file(shard: int) -> str:
    return f"{PUBLISHED}/{shard:06d}.json"
