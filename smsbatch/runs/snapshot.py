"""What is known of a run from its ledger, read once and in as few requests as that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from smsbatch.data.index import OBJECTS, SAMPLES, UNITS, StoredFile, index_size, read_objects
from smsbatch.data.sample import Unit
from smsbatch.errors import StorageError
from smsbatch.manifest import Errors, Manifest
from smsbatch.runs.layout import ATTEMPTS, COMMITS, PUBLISHED, is_reported
from smsbatch.runs.records import PARSE_ERRORS, Commit, Published, parse_commit_file, published_file
from smsbatch.runs.run import Run
from smsbatch.text import one_line

Remedy = Literal["plan", "publish", "recompute", "aside", "report"]
_DO: dict[Remedy, str] = {
    "plan": "repair plans again from the source",
    "publish": "repair publishes its shard again",
    "recompute": "repair computes its unit again",
    "aside": "repair moves it aside",
    "report": "repair writes it again",
}


class Snapshot:
    """What the ledger of a run says, from as little as that takes: `renew` reads only what has come since.

    Where a shard is published its record is enough. Commits are never changed, so none is read twice.

    Attributes:
        allowed: the failures that the run may have, by the manifest if one was given.
        generations: the newest generation of each unit that is done.
        records: of the shards that are published from the newest commits.
        commits: the newest ones of the units of all other shards.

    Raises:
        RequestError: no run stands there.
    """

    def __init__(self, where: str | Manifest) -> None:
        self.run = Run.open(where)
        self.store = self.run.store
        self.generations: dict[int, int] = {}
        self.records: dict[int, Published] = {}
        self.commits: dict[int, Commit] = {}
        planned = Errors.model_validate(self.run.about["manifest"]["errors"])
        self.allowed = where.errors if isinstance(where, Manifest) else planned
        self._ledger = self.run.ledger
        self.renew()

    @property
    def units(self) -> Mapping[int, Unit]:
        """The units by id; none before they are planned."""
        return self.run.by_id if self.run.makes == "dataset" and self.run.is_planned else {}

    @property
    def shards(self) -> Mapping[int, list[Unit]]:
        return self.run.shards if self.units else {}

    def renew(self) -> None:
        if not self.run.is_planned:
            self.run.renew()
        units = self.units
        listed = {unit: nth for unit, nth in self._ledger.generations().items() if unit in units}
        for changed in listed.keys() | self.generations.keys():
            if listed.get(changed) != self.generations.get(changed):
                self.commits.pop(changed, None)
                self.records.pop(self.units[changed].shard, None)
        self.generations = listed
        self._read_records()
        rest = {unit: nth for unit, nth in listed.items() if self.units[unit].shard not in self.records}
        self.commits |= self._ledger.commits({unit: nth for unit, nth in rest.items() if unit not in self.commits})
        for gone in rest.keys() - self.commits.keys():  # moved aside since they were listed
            del self.generations[gone]

    def commits_of(self, shard: int) -> list[Commit]:
        """The newest commits of a shard's units, in order, read if its record was enough so far."""
        units = self.shards[shard]
        unread = {unit.id: nth for unit in units if (nth := self.generations.get(unit.id)) is not None}
        known = self.commits | self._ledger.commits({id: nth for id, nth in unread.items() if id not in self.commits})
        return [known[unit.id] for unit in units if unit.id in known]

    def worst(self) -> Commit | None:
        """The commit with the largest share of failures; None if by the records none is over its budget."""
        limit = self.allowed.max_failed_fraction_per_unit
        if limit >= 1:
            return None
        suspects = [
            shard
            for shard, record in self.records.items()
            if any(record.failed > limit * len(unit) for unit in self.shards[shard])
        ]
        commits = [*self.commits.values(), *(commit for shard in suspects for commit in self.commits_of(shard))]
        return max(commits, key=lambda commit: commit.failed / commit.samples, default=None)

    def _read_records(self) -> None:
        """Those of complete shards that are not known, if they are of the newest commits.

        Of a first generation a shard's record has no choice. Of a later one it may lag behind, which the attempts tell.
        """
        names = {
            published_file(shard): shard
            for shard, units in self.shards.items()
            if shard not in self.records and all(unit.id in self.generations for unit in units)
        }
        found = {names[name]: _legible(data) for name, data in self.store.read_all(names).items()}
        later = {
            unit.id: self.generations[unit.id]
            for shard, record in found.items()
            if record is not None
            for unit in self.shards[shard]
            if self.generations[unit.id] and unit.id not in self.commits
        }
        self.commits |= self._ledger.commits(later)
        for shard, record in found.items():
            if record is not None and self._newest(record, shard):
                self.records[shard] = record
                for unit in self.shards[shard]:
                    self.commits.pop(unit.id, None)

    def _newest(self, record: Published, shard: int) -> bool:
        units = self.shards[shard]
        if (record.shard, record.samples, len(record.attempts)) != (shard, sum(map(len, units)), len(units)):
            return False
        if record.generation != max(self.generations[unit.id] for unit in units):
            return False
        return all(
            self.commits[unit.id].attempt == attempt if unit.id in self.commits else self.generations[unit.id] == 0
            for unit, attempt in zip(units, record.attempts, strict=True)
        )


def _legible(data: bytes) -> Published | None:
    try:
        return Published.from_json(data)
    except PARSE_ERRORS:
        return None  # all it says follows from the commits


@dataclass(frozen=True, slots=True)
class Problem:
    """One file that is not what it must be.

    Attributes:
        place: its path below the output.
        what: what is wrong with it.
        remedy: what `repair` does about it: `publish` its shard again, `recompute` its unit, ...
        unit, shard: whose it is, None if it is nobody's.
    """

    place: str
    what: str
    remedy: Remedy
    unit: int | None = None
    shard: int | None = None

    @property
    def do(self) -> str:
        """What the user does about it."""
        return _DO[self.remedy]

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.do}"


class StrictSnapshot:
    """What a run's storage claims, read once: its plan, its newest commits, its records and the sizes of its files.

    Attributes:
        commits: by unit, of the newest generation.
        commit_files: of all generations, by unit.
        records: of published shards.
        damaged: records that cannot be read, and why.

    Raises:
        RequestError: no run stands there, or one that makes no dataset.
    """

    def __init__(self, run: Run) -> None:
        self.run, store = run, run.store
        self.store = store
        run.require_dataset()
        self.damaged: dict[str, Problem] = {}
        self.units = self._plan()
        self.shards = run.shards if self.units else {}
        self.by_id = run.by_id if self.units else {}
        self.commits, self.commit_files = self._commits()
        self.records = self._records()
        self.sizes = store.sizes("shards") | store.sizes("metrics") | store.sizes(ATTEMPTS)
        self.reported = is_reported(store)

    def _plan(self) -> list[Unit]:
        """The units; none when they are not planned yet, or when the plan cannot be trusted."""
        begun = bool(self.store.list(COMMITS))
        planned = self.run.about["planned"]
        if not self.run.is_planned:
            if begun:
                self.damaged[UNITS] = Problem(UNITS, "is gone", "plan")
            return []
        place = UNITS
        try:
            units = self.run.units
            place = SAMPLES
            samples = index_size(StoredFile(self.store, SAMPLES))
            place = OBJECTS
            read_objects(self.run.objects)
        except (StorageError, OSError, ValueError) as error:  # the latter two are Arrow's, of what is no Parquet
            self.damaged[place] = Problem(place, f"cannot be read ({one_line(error)})", "plan")
            return []
        if (len(units), samples) != (planned["units"], planned["samples"]):
            what = f"{len(units)} units and {samples} samples, planned were {planned['units']} and {planned['samples']}"
            self.damaged[UNITS] = Problem(UNITS, what, "plan")
            return []
        return units

    def _commits(self) -> tuple[dict[int, Commit], dict[int, list[str]]]:
        newest: dict[int, Commit] = {}
        files: dict[int, list[str]] = {}
        for name, data in self.store.read_all(self.store.list(COMMITS)).items():
            unit, generation = parse_commit_file(name) or (-1, 0)
            if unit not in self.by_id:
                if self.units:
                    self.damaged[name] = Problem(name, "is of no unit of the plan", "aside")
                continue
            files.setdefault(unit, []).append(name)
            shard = self.by_id[unit].shard
            try:
                commit = Commit.from_json(data)
            except PARSE_ERRORS as error:
                what = f"is no record of this version ({one_line(error)})"
                self.damaged[name] = Problem(name, what, "recompute", unit, shard)
                continue
            wrong = _miscounted(commit, self.by_id[unit], generation)
            if wrong:
                self.damaged[name] = Problem(name, wrong, "recompute", unit, shard)
            elif unit not in newest or newest[unit].generation < generation:
                newest[unit] = commit
        return newest, files

    def _records(self) -> dict[int, Published]:
        records: dict[int, Published] = {}
        for name, data in self.store.read_all(self.store.list(PUBLISHED)).items():
            number = name.rpartition("/")[2].removesuffix(".json")
            if not number.isdigit() or int(number) not in self.shards:
                if self.units:
                    self.damaged[name] = Problem(name, "is of no shard of the plan", "aside")
                continue
            shard = int(number)
            try:
                record = Published.from_json(data)
            except PARSE_ERRORS as error:
                what = f"is no record of this version ({one_line(error)})"
                self.damaged[name] = Problem(name, what, "publish", shard=shard)
                continue
            if record.shard != shard:
                what = f"is the record of shard {record.shard:06d}"
                self.damaged[name] = Problem(name, what, "publish", shard=shard)
            else:
                records[shard] = record
        return records


def _miscounted(commit: Commit, unit: Unit, generation: int) -> str:
    if (commit.unit, commit.generation) != (unit.id, generation):
        return f"is the commit of unit {commit.unit:06d}, generation {commit.generation}"
    if commit.samples != len(unit) or commit.samples != commit.succeeded + commit.failed:
        return f"counts {commit.succeeded} + {commit.failed} samples, planned are {len(unit)}"
    return ""
