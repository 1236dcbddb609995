"""What is known of a run from its ledger, read once and in as few requests as that takes."""

from __future__ import annotations

from smsbatch.data.index import UNITS, read_units
from smsbatch.data.ledger import Ledger
from smsbatch.data.records import ILLEGIBLE, Commit, Published, published_file
from smsbatch.data.sample import Unit
from smsbatch.execution.record import store_of, the_run
from smsbatch.manifest import Errors, Manifest

__all__ = ["Look"]


class Look:
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
        self.store = store_of(where)
        self.run = the_run(self.store)
        self.units: dict[int, Unit] = {}
        self.shards: dict[int, list[Unit]] = {}
        self.generations: dict[int, int] = {}
        self.records: dict[int, Published] = {}
        self.commits: dict[int, Commit] = {}
        recorded = Errors.model_validate(self.run["manifest"]["errors"])
        self.allowed = where.errors if isinstance(where, Manifest) else recorded
        self._ledger = Ledger(self.store)
        self.renew()

    def renew(self) -> None:
        if not self.units and self.store.exists(UNITS):
            self.units = {unit.id: unit for unit in read_units(self.store)}
            for unit in self.units.values():
                self.shards.setdefault(unit.shard, []).append(unit)
        listed = {unit: nth for unit, nth in self._ledger.generations().items() if unit in self.units}
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
    except ILLEGIBLE:
        return None  # all it says follows from the commits
