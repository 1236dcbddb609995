"""Snapshots of a run's ledger, read in as few requests as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from smsbatch.data.index import OBJECTS, SAMPLES, UNITS, StoredFile, index_size, read_objects
from smsbatch.data.sample import Unit
from smsbatch.errors import StorageError
from smsbatch.manifest import Manifest
from smsbatch.runs.layout import ATTEMPTS, COMMITS, PUBLISHED, is_reported
from smsbatch.runs.records import PARSE_ERRORS, Commit, Published, commit_file, parse_commit_file, published_file
from smsbatch.runs.run import Run
from smsbatch.text import one_line

Remedy = Literal["restore", "plan", "commit", "publish", "recompute", "aside", "report"]
_DO: dict[Remedy, str] = {
    "restore": "repair restores it from the other one",
    "plan": "repair writes it again, samples and objects from the source",
    "commit": "repair makes it again from its attempt, or else computes its unit again",
    "publish": "repair publishes its shard again",
    "recompute": "repair computes its unit again",
    "aside": "repair moves it aside",
    "report": "repair writes it again",
}


class Snapshot:
    """The progress of a run according to its ledger; `renew` reads only what is new.

    The record of a published shard replaces its commits. Commits never change, so none is read twice.

    Attributes:
        allowed: the failure budget, from the given manifest or else from the run's.
        generations: the newest generation of each committed unit.
        records: records of the shards that are published from the newest commits.
        commits: the newest commits of the units of all other shards.

    Raises:
        RequestError: there is no run.
    """

    def __init__(self, where: str | Manifest) -> None:
        self.run = Run.open(where)
        self.store = self.run.store
        self.generations: dict[int, int] = {}
        self.records: dict[int, Published] = {}
        self.commits: dict[int, Commit] = {}
        self.allowed = where.errors if isinstance(where, Manifest) else self.run.errors
        self._ledger = self.run.ledger
        self.renew()

    @property
    def units(self) -> Mapping[int, Unit]:
        """The units by id; empty before they are planned."""
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
        """The newest commits of a shard's units, in order; those that the record replaced are read now."""
        units = self.shards[shard]
        unread = {unit.id: nth for unit in units if (nth := self.generations.get(unit.id)) is not None}
        known = self.commits | self._ledger.commits({id: nth for id, nth in unread.items() if id not in self.commits})
        return [known[unit.id] for unit in units if unit.id in known]

    def worst(self) -> Commit | None:
        """The commit with the largest share of failures; None if the records rule out that a unit is over budget."""
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
        """Read the unknown records of complete shards; keep those that were made from the newest commits.

        In generation 0 no other commits exist. In a later one the record may lag behind, so its attempts are compared.
        """
        names = {
            published_file(shard): shard
            for shard, units in self.shards.items()
            if shard not in self.records and all(unit.id in self.generations for unit in units)
        }
        found = {names[name]: Published.parse(data) for name, data in self.store.read_all(names).items()}
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


@dataclass(frozen=True, slots=True)
class Problem:
    """A damaged, missing or foreign file.

    Attributes:
        place: its path below the output.
        what: the fault.
        remedy: the action of `repair`: `publish` its shard again, `recompute` its unit, ...
        unit, shard: the unit and shard that it belongs to, if any.
    """

    place: str
    what: str
    remedy: Remedy
    unit: int | None = None
    shard: int | None = None

    @property
    def do(self) -> str:
        return _DO[self.remedy]

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.do}"


class StrictSnapshot:
    """The plan, newest commits, records and file sizes of a run, all read once, with the faults found in them.

    Attributes:
        commits: the newest commit of each unit.
        attempts: the attempts that the commits of all generations name, by unit.
        commit_files: the commit files of all generations, by unit.
        records: the records of published shards.
        damaged: the problems with unreadable or inconsistent files of plan and ledger, by path.

    Raises:
        RequestError: the run makes no dataset.
    """

    def __init__(self, run: Run) -> None:
        self.run, store = run, run.store
        self.store = store
        run.require_dataset()
        self.damaged: dict[str, Problem] = {}
        self.units = self._plan()
        self.shards = {shard: list(units) for shard, units in groupby(self.units, lambda unit: unit.shard)}
        self.by_id = {unit.id: unit for unit in self.units}
        self.attempts: dict[int, set[str]] = {}
        self.commits, self.commit_files = self._commits()
        self.records = self._records()
        self.sizes = store.sizes("shards") | store.sizes("metrics") | store.sizes(ATTEMPTS)
        self.reported = is_reported(store)

    def _plan(self) -> list[Unit]:
        """The units by `run.json`, noting damage of the plan; none if they are not planned yet."""
        if not self.run.is_planned and not self.store.list(COMMITS):
            return []
        units, samples = self.run.planned_units, self.run.about["planned"]["samples"]
        for place, read, expected in (
            (UNITS, lambda: self.run.units, units),
            (SAMPLES, lambda: index_size(StoredFile(self.store, SAMPLES)), samples),
            (OBJECTS, lambda: read_objects(StoredFile(self.store, OBJECTS)) and None, None),
        ):
            if place not in self.run.plan_files:
                self._note(place, "is gone", "plan")
                continue
            try:
                if read() != expected:
                    self._note(place, "is not what run.json says", "plan")
            except StorageError as error:
                self._note(place, f"cannot be read ({one_line(error)})", "plan")
        return units

    def _note(self, place: str, what: str, remedy: Remedy, unit: int | None = None, shard: int | None = None) -> None:
        self.damaged[place] = Problem(place, what, remedy, unit, shard)

    def _commits(self) -> tuple[dict[int, Commit], dict[int, list[str]]]:
        newest: dict[int, Commit] = {}
        files: dict[int, list[str]] = {}
        for name, data in self.store.read_all(self.store.list(COMMITS)).items():
            unit, generation = parse_commit_file(name) or (-1, 0)
            if unit not in self.by_id:
                if self.units:
                    self._note(name, "is of no unit of the plan", "aside")
                continue
            files.setdefault(unit, []).append(name)
            try:
                commit = Commit.from_json(data)
                wrong = _miscounted(commit, self.by_id[unit], generation) or self._lacks_digest(commit, data)
            except PARSE_ERRORS as error:
                wrong = f"is no record of this version ({one_line(error)})"
            if wrong:
                self._note(name, wrong, "commit", unit, self.by_id[unit].shard)
                continue
            self.attempts.setdefault(unit, set()).add(commit.attempt)
            if unit not in newest or newest[unit].generation < generation:
                newest[unit] = commit
        for unit, commit in newest.items():
            for place in {commit_file(unit, nth) for nth in range(commit.generation)} - set(files[unit]):
                self._note(place, "is gone", "commit", unit, self.by_id[unit].shard)
        return newest, files

    def _records(self) -> dict[int, Published]:
        records: dict[int, Published] = {}
        for name, data in self.store.read_all(self.store.list(PUBLISHED)).items():
            number = name.rpartition("/")[2].removesuffix(".json")
            shard = int(number) if number.isdigit() else -1
            if shard not in self.shards:
                if self.units:
                    self._note(name, "is of no shard of the plan", "aside")
                continue
            record = Published.parse(data)
            if record is None:
                self._note(name, "is no record of this version", "publish", shard=shard)
            elif record.shard != shard:
                self._note(name, f"is the record of shard {record.shard:06d}", "publish", shard=shard)
            elif wrong := self._lacks_digest(record, data):
                self._note(name, wrong, "publish", shard=shard)
            else:
                records[shard] = record
        return records

    def _lacks_digest(self, record: Commit | Published, data: bytes) -> str:
        return "lacks its digest" if self.run.has_digests and record.to_json() != data else ""


def _miscounted(commit: Commit, unit: Unit, generation: int) -> str:
    if (commit.unit, commit.generation) != (unit.id, generation):
        return f"is the commit of unit {commit.unit:06d}, generation {commit.generation}"
    if commit.samples != len(unit) or commit.samples != commit.succeeded + commit.failed:
        return f"counts {commit.succeeded} + {commit.failed} samples, but {len(unit)} are planned"
    return ""
