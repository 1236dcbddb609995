"""How far a run is: counted by its driver, and from storage alone by anybody.

A driver that is at work says so every few seconds, under `_smsbatch/heartbeats/`, and takes it back when it leaves in
order. What it says is for the eyes: nothing is decided by it but the order in which a second driver works.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any

from smsbatch.data.index import UNITS, read_units
from smsbatch.data.ledger import Commit, Ledger
from smsbatch.data.sample import Unit
from smsbatch.data.store import Store
from smsbatch.errors import RequestError
from smsbatch.execution.record import read_run, store_of
from smsbatch.execution.report import is_reported
from smsbatch.execution.worker import Progress
from smsbatch.manifest import Manifest

__all__ = ["Driver", "Heart", "Status", "Tally", "drivers", "status"]

HEARTBEATS = "_smsbatch/heartbeats"
BEAT_S = 10.0
DEAD_AFTER_S = 6 * BEAT_S


@dataclass(frozen=True)
class Driver:
    """A driver by its last sign of life, `age_s` seconds ago."""

    name: str
    age_s: float

    @property
    def alive(self) -> bool:
        return self.age_s < DEAD_AFTER_S


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        samples_under_way: images' worth of work done in units that are not committed.
        errors: failed samples by error code.
        workers: what each worker does now; of `status`, what it did at the last heartbeat.
        drivers: those whose heartbeats are there; one that was killed stays until the next driver cleans up.
        rate: images per second since the drivers at work began, None before their first unit.
        heartbeat_age_s: seconds since the last sign of life of any driver; None without one, and when it asks itself.
    """

    name: str
    units: int
    units_done: int
    samples: int
    samples_done: int
    samples_under_way: float
    errors: Mapping[str, int]
    finished: bool
    workers: tuple[Progress, ...] = ()
    drivers: tuple[Driver, ...] = ()
    rate: float | None = None
    heartbeat_age_s: float | None = None

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the present rate."""
        left = max(0.0, self.samples - self.samples_done - self.samples_under_way)
        return left / self.rate if self.rate else None

    def to_dict(self) -> dict[str, Any]:
        ages = {"workers": [asdict(worker) | {"seen_age_s": age_s(worker)} for worker in self.workers]}
        return asdict(self) | ages | {"failed": self.failed, "remaining_s": self.remaining_s}


def age_s(worker: Progress) -> float | None:
    """Seconds since a worker was last heard of; None if it never was."""
    return None if worker.seen is None else max(0.0, time.time() - worker.seen)


class Tally:
    """The driver's own count of a run, kept as commits come in."""

    def __init__(self, name: str, units: Iterable[Unit], commits: Mapping[int, Commit]) -> None:
        self.name = name
        self.units = {unit.id: unit for unit in units}
        self.samples = sum(map(len, self.units.values()))
        self.commits: dict[int, Commit] = {}
        self.samples_done = 0
        self.errors: Counter[str] = Counter()
        self._fresh, self._began = 0, 0.0
        for commit in commits.values():
            self.add(commit)
        self._fresh = 0  # what was there before says nothing about the rate

    def add(self, commit: Commit) -> None:
        """Count a commit; of a unit's several generations the last one counts."""
        before = self.commits.get(commit.unit)
        if before is None:
            self.samples_done += commit.samples
        else:
            self.errors -= Counter(before.errors)
        self.errors += Counter(commit.errors)
        self.commits[commit.unit] = commit
        self._fresh += commit.samples

    @property
    def failed(self) -> int:
        return self.errors.total()

    def status(self, workers: Iterable[Progress] = (), finished: bool = False) -> Status:
        # What a worker said last may be of a unit whose commit has come since.
        workers = tuple(
            replace(Progress(worker.worker, None), seen=worker.seen)
            if worker.unit and worker.unit.isdigit() and int(worker.unit) in self.commits
            else worker
            for worker in workers
        )
        under_way = sum(map(_worth, workers))
        fresh = self._fresh + under_way
        if not self._began and any(worker.unit for worker in workers):
            self._began = monotonic()  # the rate is that of the work, not of loading the models
        return Status(
            name=self.name,
            units=len(self.units),
            units_done=len(self.commits),
            samples=self.samples,
            samples_done=self.samples_done,
            samples_under_way=under_way,
            errors=dict(self.errors),
            finished=finished,
            workers=workers,
            rate=fresh / (monotonic() - self._began) if fresh and self._began else None,
        )


def _worth(worker: Progress) -> float:
    """Images' worth of work in a unit that is not finished: whole ones, and the steps of the batch in hand."""
    if worker.unit is None:
        return 0.0
    return worker.done + (worker.batch * worker.step / worker.steps if worker.steps else 0.0)


class Heart:
    """A driver's sign of life, renewed by `beat` and taken back by `stop`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._path = f"{HEARTBEATS}/{self.name}.json"
        self._next = 0.0

    def beat(self, now: Status) -> None:
        if monotonic() >= self._next:
            beat = {
                "time": time.time(),
                "rate": now.rate,
                "samples_under_way": now.samples_under_way,
                "workers": [asdict(worker) for worker in now.workers],
            }
            self._store.put(self._path, json.dumps(beat).encode())
            self._next = monotonic() + BEAT_S

    def stop(self) -> None:
        self._store.delete(self._path)


def drivers(store: Store, bury: bool = False) -> list[Driver]:
    """The drivers whose heartbeats are there; those of the dead are removed if asked."""
    found = []
    for path, beat in _beats(store).items():
        driver = Driver(path.rpartition("/")[2].removesuffix(".json"), time.time() - beat["time"])
        if bury and not driver.alive:
            store.delete(path)
        else:
            found.append(driver)
    return found


def _beats(store: Store) -> dict[str, dict[str, Any]]:
    return {path: json.loads(beat) for path, beat in store.read_all(store.list(HEARTBEATS)).items()}


def status(where: str | Manifest) -> Status:
    """How far a run is, from what is stored alone; of a manifest, or of an output path or URL.

    Raises:
        RequestError: no run stands there.
    """
    store = store_of(where)
    recorded = read_run(store)
    if recorded is None:
        raise RequestError(f"{store.url}: no run here (no run.json); `smsbatch run` starts one")
    units = read_units(store) if store.exists(UNITS) else []
    tally = Tally(recorded["name"], units, Ledger(store).commits())
    counted = tally.status(finished=is_reported(store) and len(tally.commits) == len(units))
    beats = _beats(store)
    if counted.finished or not beats:
        return counted
    ages = {path: time.time() - beat["time"] for path, beat in beats.items()}
    known = tuple(Driver(path.rpartition("/")[2].removesuffix(".json"), age) for path, age in ages.items())
    # Of those who are not at work any more, what was in hand is lost, and there is no rate.
    alive = [beat for path, beat in beats.items() if ages[path] < DEAD_AFTER_S]
    workers = tuple(Progress(**worker) for beat in alive for worker in beat["workers"])
    return replace(
        tally.status(workers),
        drivers=known,
        rate=sum(beat["rate"] or 0.0 for beat in alive) or None,
        heartbeat_age_s=min(ages.values()),
    )
