"""What a run's storage claims, read once: the ground that `verify`, `repair` and `gc` stand on.

A claim that cannot be read, or cannot be true, is a `Problem`, and is believed by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from smsbatch.data.index import OBJECTS, SAMPLES, UNITS, index_size, read_objects, read_units
from smsbatch.data.records import (
    ATTEMPTS,
    COMMITS,
    ILLEGIBLE,
    PUBLISHED,
    Commit,
    Published,
    parse_commit_file,
)
from smsbatch.data.sample import Unit
from smsbatch.data.store import Store
from smsbatch.errors import RequestError, StorageError
from smsbatch.execution.record import check_dataset, manifest_of, the_run
from smsbatch.execution.report import is_reported
from smsbatch.manifest import Manifest, Storage

__all__ = ["Problem", "Remedy", "Standing", "of_output", "one_line", "recorded"]

Remedy = Literal["plan", "publish", "recompute", "aside", "report"]
_DO: dict[Remedy, str] = {
    "plan": "repair plans again from the source",
    "publish": "repair publishes its shard again",
    "recompute": "repair computes its unit again",
    "aside": "repair moves it aside",
    "report": "repair writes it again",
}


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


class Standing:
    """What a run's storage claims, read once: its plan, its newest commits, its records and the sizes of its files.

    Attributes:
        commits: by unit, of the newest generation.
        commit_files: of all generations, by unit.
        records: of published shards.
        damaged: records that cannot be read, and why.

    Raises:
        RequestError: no run stands there, or one that makes no dataset.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.run = store, the_run(store)
        check_dataset(store, self.run)
        self.damaged: dict[str, Problem] = {}
        self.units = self._plan()
        self.shards = {shard: list(units) for shard, units in groupby(self.units, lambda unit: unit.shard)}
        self.by_id = {unit.id: unit for unit in self.units}
        self.commits, self.commit_files = self._commits()
        self.records = self._records()
        self.sizes = store.sizes("shards") | store.sizes("metrics") | store.sizes(ATTEMPTS)
        self.reported = is_reported(store)

    def _plan(self) -> list[Unit]:
        """The units; none when they are not planned yet, or when the plan cannot be trusted."""
        begun = bool(self.store.list(COMMITS))
        planned = self.run["planned"]
        if not self.store.exists(UNITS):
            if begun:
                self.damaged[UNITS] = Problem(UNITS, "is gone", "plan")
            return []
        place = UNITS
        try:
            units = read_units(self.store)
            place = SAMPLES
            samples = index_size(self.store)
            place = OBJECTS
            read_objects(self.store)
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
            except ILLEGIBLE as error:
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
            except ILLEGIBLE as error:
                what = f"is no record of this version ({one_line(error)})"
                self.damaged[name] = Problem(name, what, "publish", shard=shard)
                continue
            if record.shard != shard:
                what = f"is the record of shard {record.shard:06d}"
                self.damaged[name] = Problem(name, what, "publish", shard=shard)
            else:
                records[shard] = record
        return records


def of_output(output: str, options: Mapping[str, str]) -> Manifest:
    """The manifest of the run at a path or URL that is reached with these options of `storage`.

    Raises:
        RequestError: an option is unknown or wrong, or no run stands there.
    """
    try:
        storage = Storage.model_validate(options)
    except ValueError as error:
        named = "; ".join(f"storage.{name}={value}" for name, value in options.items())
        raise RequestError(f"--set {named}: not understood; `smsbatch schema` has the keys of storage") from error
    store = Store(output, storage)
    return recorded(store, the_run(store)).model_copy(update={"storage": storage})


def recorded(store: Store, run: Mapping[str, Any]) -> Manifest:
    """The manifest of a run, wherever its output has been moved since."""
    manifest = manifest_of(run)
    return manifest.model_copy(update={"output": manifest.output.model_copy(update={"path": store.url})})


def _miscounted(commit: Commit, unit: Unit, generation: int) -> str:
    if (commit.unit, commit.generation) != (unit.id, generation):
        return f"is the commit of unit {commit.unit:06d}, generation {commit.generation}"
    if commit.samples != len(unit) or commit.samples != commit.succeeded + commit.failed:
        return f"counts {commit.succeeded} + {commit.failed} samples, planned are {len(unit)}"
    return ""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
