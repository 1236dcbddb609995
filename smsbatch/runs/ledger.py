"""The ledger of a run: attempts, commits, publication.

    1. attempt   A process builds a unit's tar and Parquet on local disk, syncs, re-reads and counts them, and stores
                 them as `_smsbatch/attempts/<unit>/<attempt>.{tar,parquet}`, names that no other attempt ever has.
    2. decide    It creates `_smsbatch/commits/<unit>.json`, which succeeds for one attempt only, the winner. The commit
                 has the digests of both files, so files of different attempts are never mistaken for a pair. A retry
                 of failed samples decides `<unit>.g1.json`, then `.g2.json`: the newest generation counts.
    3. publish   When all units of a shard are committed, any process may assemble `shards/` and `metrics/` from the
                 newest commits. The commits determine the bytes, so publishing twice or concurrently is harmless. Final
                 names are created, never overwritten: an older publication is copied to `_smsbatch/generations/<n>/`,
                 its record and then its files are deleted, and the new files and last their record are created.

A run resumes from the list of commits and from nothing else. A process may die between any two steps, several may work
on the same unit, and one that was thought dead may wake up and finish.

So if a record in `_smsbatch/published/` names the newest attempts, its files are those it describes, or missing. A
publisher that wakes up after a newer one finds its names taken. If it dies right then, it can at most have deleted one
file or record of the newer one: the shard is then not published, and the next run publishes it again. Bytes that
something else changed, in files of the same length, are found only by reading them: `verify --full`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from smsbatch.data import shards
from smsbatch.data.sample import Outcome, Unit
from smsbatch.errors import StorageError
from smsbatch.runs import attempts
from smsbatch.runs.layout import COMMITS, GENERATIONS, PUBLISHED
from smsbatch.runs.records import (
    KINDS,
    PARSE_ERRORS,
    Commit,
    FileDigest,
    Published,
    attempt_file,
    commit_file,
    new_attempt,
    parse_commit_file,
    published_file,
)
from smsbatch.storage.scratch import scratch_folder
from smsbatch.storage.store import Store, storage_errors

_OWN = 1024  # commits of its own that a process remembers


class Ledger:
    """The ledger of the run in `store`; `metrics` names the columns of every row in addition to the fixed ones.

    Files are built in `scratch`, a local folder (default: the system's temporary one), and always removed from it.
    In a store without create-only put, only the driver decides and publishes; other processes only attempt.
    """

    def __init__(self, store: Store, scratch: Path | None = None, metrics: Sequence[str] = ()) -> None:
        self.store = store
        self.scratch = scratch
        self.metrics = tuple(metrics)
        self._own: dict[int, Commit] = {}  # commits of this process in shards that it has not published

    # --- attempt, decide ---

    def attempt(
        self,
        unit: Unit,
        outcomes: Sequence[Outcome],
        *,
        worker: str,
        seconds: float,
        generation: int = 0,
        attempt: str | None = None,
    ) -> Commit:
        """Store a finished unit, one outcome per planned sample in plan order. The result is not decided yet."""
        if len(outcomes) != len(unit):
            raise ValueError(f"unit {unit.name} has {len(unit)} samples, not {len(outcomes)}")
        attempt = attempt or new_attempt()
        with self.workshop() as folder:
            commit, built = attempts.build(
                folder,
                unit,
                outcomes,
                self.metrics,
                attempt=attempt,
                worker=worker,
                seconds=seconds,
                generation=generation,
            )
            for kind, path in built.items():
                name = attempt_file(unit.id, attempt, kind)
                if not self.store.create(name, path):
                    raise StorageError(f"{self.store.locate(name)} exists; an attempt's name must be new")
        return commit

    def decide(self, commit: Commit) -> Commit:
        """Commit an attempt if it is the first of its generation; returns the winner.

        Raises:
            StorageError: the attempt's files or the commit of the previous generation are gone.
        """
        newest = self.committed(commit.unit) if commit.generation else None
        while newest is None or newest.generation < commit.generation:
            if commit.generation > (0 if newest is None else newest.generation + 1):
                before = self.store.locate(commit_file(commit.unit, commit.generation - 1))
                raise StorageError(f"{before} is gone; run again to recompute the unit")
            lost = [
                name
                for kind in KINDS  # `gc` may have removed them if this process was suspended for days
                if self.store.size(name := attempt_file(commit.unit, commit.attempt, kind)) != commit.files[kind].bytes
            ]
            if not lost and self.store.create(commit_file(commit.unit, commit.generation), commit.to_json()):
                self._own[commit.unit] = commit
                for unit in list(self._own)[:-_OWN]:  # of shards that other workers publish
                    self._own.pop(unit, None)
                return commit
            newest = self.committed(commit.unit)
            if lost and (newest is None or newest.generation < commit.generation):
                raise StorageError(f"{self.store.locate(lost[0])} is gone or cut; run again to recompute the unit")
        return newest

    # --- what is committed ---

    def committed(self, unit: int) -> Commit | None:
        """The newest commit of a unit; None if it has none."""
        return self._newest([unit]).get(unit)

    def is_committed(self, unit: int) -> bool:
        """True if a unit has a commit; takes one request."""
        return self.store.exists(commit_file(unit, 0))

    def done(self) -> set[int]:
        """The ids of all units that have a commit, by one listing of names.

        A power loss may leave a commit that is empty or cut. It is counted here; `commits` and `publish` read it and
        raise a StorageError that names it, so that its unit is never published.
        """
        return set(self.generations())

    def commits(self, generations: Mapping[int, int] | None = None) -> dict[int, Commit]:
        """The newest commits of all committed units, or the commits of `generations`, by unit id, in order.

        Raises:
            StorageError: one is damaged.
        """
        wanted = self.generations() if generations is None else generations
        names = {commit_file(unit, generation): unit for unit, generation in sorted(wanted.items())}
        found = self.store.read_all(list(names))
        return {unit: self._parse(name, found[name]) for name, unit in names.items() if name in found}

    def outcomes(self, commit: Commit) -> list[Outcome]:
        """The committed outcomes, read from the attempt's files, whose digests are checked.

        Writing them again gives the same tar, and the same rows except for generation, attempt and worker.

        Raises:
            StorageError: the files have changed, or `gc` has removed them.
        """
        lost = f"samples of unit {commit.unit:06d} cannot be tried again alone, only in a run at another output.path"
        with self.workshop() as folder:
            return shards.read_outcomes(*(self._fetch(commit, kind, folder, lost) for kind in KINDS))

    def makes(self, record: Published, commits: Sequence[Commit]) -> bool:
        """True if publishing these commits gives exactly this record, and so the files that it describes."""
        with self.workshop() as folder:
            return self._assemble(record.shard, commits, folder)[0] == record

    # --- publish ---

    def publish(self, shard: int, units: Sequence[Unit], *, again: bool = False) -> Published | None:
        """Assemble a shard from the newest commits of its units; None if a unit has no commit.

        A shard that is already published from the newest commits is left alone, unless `again` is set: then its bytes
        are compared too, and wrong ones replaced.
        """
        units = sorted(units, key=lambda unit: unit.start)
        # Commits of this process need not be read. If they are no longer the newest, `_superseded` finds out.
        own = {unit.id: commit for unit in units if (commit := self._own.get(unit.id)) is not None}
        while True:
            commits = self._current(units, own)
            if commits is None:
                return None
            done = self.published(shard)
            if done is not None and own and not done.made_of(commits):
                own = {}  # newer commits may have been published
                continue
            if done is not None and done.made_of(commits) and not again:
                break
            with self.workshop() as folder:
                record, built = self._assemble(shard, commits, folder)

                def overtaken(built_from: Sequence[Commit] = commits) -> bool:
                    return self._current(units) != built_from

                if self._replace(done, record, built, folder, overtaken) and not self._superseded(commits):
                    done = record
                    break
            again, own = False, {}
        for unit in units:
            self._own.pop(unit.id, None)
        return done

    def _assemble(self, shard: int, commits: Sequence[Commit], folder: Path) -> tuple[Published, dict[str, Path]]:
        built = {kind: folder / f"shard.{kind}" for kind in KINDS}
        shards.concat_tars([self._fetch(commit, "tar", folder) for commit in commits], built["tar"])
        tables = [self._fetch(commit, "parquet", folder) for commit in commits]
        shards.concat_rows(tables, built["parquet"], shards.digest(built["tar"]))
        samples = sum(commit.samples for commit in commits)
        attempts.recount(built, samples)
        errors = sum((Counter(commit.errors) for commit in commits), Counter[str]())
        record = Published(
            shard=shard,
            generation=max(commit.generation for commit in commits),
            attempts=[commit.attempt for commit in commits],
            samples=samples,
            succeeded=sum(commit.succeeded for commit in commits),
            failed=sum(commit.failed for commit in commits),
            errors=dict(sorted(errors.items())),
            seconds=sum(commit.seconds for commit in commits),
            files={kind: FileDigest.of(path) for kind, path in built.items()},
        )
        return record, built

    def _replace(
        self,
        old: Published | None,
        new: Published,
        built: Mapping[str, Path],
        folder: Path,
        overtaken: Callable[[], bool],
    ) -> bool:
        """Create the built files and record under the final names; False if newer commits have overtaken them.

        A create never overwrites, and each delete lies between two checks for newer commits. So a publisher that wakes
        up late cannot put an older file next to a newer record. If it deletes a newer file or record, a later check, at
        the latest the one at the end of `publish`, detects it, and `publish` starts over.
        """
        record = published_file(new.shard)
        if old is not None and old.generation != new.generation and not self._keep(old, folder, overtaken):
            return False
        existing = self.store.read_all([record])
        if existing and existing[record] != new.to_json():
            if overtaken():
                return False
            self.store.delete(record)  # before its files, so that no record names missing files
        return all(self._store_exactly(name, built[kind], folder, overtaken) for kind, name in new.paths.items()) and (
            self._store_exactly(record, new.to_json(), folder, overtaken)
        )

    def _store_exactly(self, name: str, source: bytes | Path, folder: Path, overtaken: Callable[[], bool]) -> bool:
        """Store exactly these bytes under a final name, replacing others; False if newer commits have come in."""
        while not (self.store.create(name, source) or self._holds(name, FileDigest.of(source), folder / "there")):
            if overtaken():
                return False
            self.store.delete(name)
            if overtaken():
                return False
        return True

    def _keep(self, old: Published, folder: Path, overtaken: Callable[[], bool]) -> bool:
        """Copy a publication to `_smsbatch/generations`, its record last; a damaged one is not kept.

        The copy passes through this machine, because a copy on the server would not check the bytes and would overwrite
        the good copy of a faster publisher.
        """
        aside = f"{GENERATIONS}/{old.generation}"
        record = f"{aside}/published/{old.shard:06d}.json"
        kept = {name: folder / f"old.{kind}" for kind, name in old.paths.items()}
        if self.store.exists(record):
            return True
        if not all(self._holds(name, old.files[kind], kept[name]) for kind, name in old.paths.items()):
            return True
        return all(self._store_exactly(f"{aside}/{name}", path, folder, overtaken) for name, path in kept.items()) and (
            self._store_exactly(record, old.to_json(), folder, overtaken)
        )

    def published(self, shard: int) -> Published | None:
        """The record of a published shard; None if it is missing, or a file is missing or has another length."""
        name = published_file(shard)
        record = Published.parse(self.store.read_all([name]).get(name))
        if record is None:
            return None
        sizes = {path: self.store.size(path) for path in record.paths.values()}
        return record if record.is_there(sizes) else None

    def publications(self) -> dict[int, Published]:
        """`published` of all published shards, by number, in order, from three listings and parallel reads.

        A record that is empty, cut or of another version counts as none: publishing again replaces it.
        """
        found = self.store.read_all(self.store.list(PUBLISHED))
        sizes = self.store.sizes("shards") | self.store.sizes("metrics")
        records = [record for _, data in sorted(found.items()) if (record := Published.parse(data)) is not None]
        return {record.shard: record for record in records if record.is_there(sizes)}

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder in scratch, removed at the end."""
        with (
            storage_errors("build a shard's files in", self.scratch or tempfile.gettempdir()),
            scratch_folder("unit", self.scratch) as folder,
        ):
            yield Path(folder)

    def generations(self) -> dict[int, int]:
        """The newest generation of each unit that has a commit, from one listing."""
        newest: dict[int, int] = {}
        for path in self.store.list(COMMITS):
            named = parse_commit_file(path)
            if named is not None:
                unit, generation = named
                newest[unit] = max(generation, newest.get(unit, 0))
        return newest

    def _newest(self, units: Iterable[int]) -> dict[int, Commit]:
        """The newest commits of some units, by reading successive names: a listing would return those of all units."""
        found: dict[int, Commit] = {}
        asked, generation = list(units), 0
        while asked:
            names = {commit_file(unit, nth): unit for nth in (generation, generation + 1) for unit in asked}
            read = self.store.read_all(list(names))
            found |= {unit: self._parse(name, read[name]) for name, unit in names.items() if name in read}
            asked = [unit for unit in asked if commit_file(unit, generation + 1) in read]
            generation += 2
        return found

    def _superseded(self, commits: Sequence[Commit]) -> bool:
        """True if one of these commits has a successor; a commit that was moved aside meanwhile is not noticed."""
        return bool(self.store.read_all(commit_file(commit.unit, commit.generation + 1) for commit in commits))

    def _current(self, units: Sequence[Unit], known: Mapping[int, Commit] | None = None) -> list[Commit] | None:
        """The newest commits of all these units; None if one has none, which is nearly always one of the last.

        Args:
            known: commits that are taken as the newest without a request.
        """
        newest = dict(known or {})
        ids = [unit.id for unit in units if unit.id not in newest]
        if ids and not self.is_committed(ids[-1]):
            return None
        read: dict[int, Commit] = {}
        while len(read) < len(ids):  # from the last one backwards, in batches that double
            asked = ids[max(0, len(ids) - 2 * len(read) - 1) : len(ids) - len(read)]
            found = self._newest(asked)
            if len(found) < len(asked):
                return None
            read |= found
        newest |= read
        return [newest[unit.id] for unit in units]

    def _fetch(self, commit: Commit, kind: str, folder: Path, if_gone: str = "") -> Path:
        """Copy a committed file to `folder` and check its digest; `if_gone` is the advice if it is missing."""
        name = attempt_file(commit.unit, commit.attempt, kind)
        target = folder / f"{commit.unit:06d}.{kind}"
        if self._holds(name, commit.files[kind], target):
            return target
        place = self.store.locate(name)
        if self.store.exists(name):
            raise StorageError(f"{place} is not what was committed; {self._repair}")
        raise StorageError(f"{place} is gone, deleted or collected by `gc --attempts`; {if_gone or self._repair}")

    def _holds(self, name: str, expected: FileDigest, target: Path) -> bool:
        """Copy `name` to `target`; True if it exists and its digest is `expected`."""
        try:
            self.store.fetch(name, target)
        except StorageError:
            if self.store.exists(name):
                raise
            return False  # another publisher has just deleted it in order to replace it
        return FileDigest.of(target) == expected

    def _parse(self, name: str, data: bytes) -> Commit:
        try:
            return Commit.from_json(data)
        except PARSE_ERRORS as error:
            wrong = f"is empty, cut or of another version ({error})"
            raise StorageError(f"{self.store.locate(name)} {wrong}; {self._repair}") from error

    @property
    def _repair(self) -> str:
        return f"run `smsbatch repair {self.store.url}`"
