"""How far a run is: counted by its driver, and from storage alone by anybody.

A driver that is at work says so every few seconds, under `_smsbatch/heartbeats/`, and takes it back when it leaves in
order. What it says is for the eyes, but that it says it is obeyed: `repair` and `gc` do not start beside it, a second
driver works in another order, and on a store without create-only put it is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, overload

from smsbatch.data.records import Commit
from smsbatch.data.sample import Unit
from smsbatch.data.store import Store
from smsbatch.execution.look import Look
from smsbatch.execution.record import trains
from smsbatch.execution.report import is_reported
from smsbatch.execution.training_status import TrainingStatus, training_status
from smsbatch.execution.worker import Progress
from smsbatch.manifest import Distill, Errors, Manifest

__all__ = ["Driver", "Status", "Tally", "drivers", "over_budget", "process_table", "status"]

HEARTBEATS = "_smsbatch/heartbeats"
BEAT_S = 10.0
DEAD_AFTER_S = 6 * BEAT_S


@dataclass(frozen=True)
class Driver:
    """A driver by its last sign of life, `age_s` seconds ago.

    Attributes:
        processes: whose table of processes it is in, as `process_table` says it of ours.
    """

    name: str
    age_s: float
    processes: str = ""

    @property
    def alive(self) -> bool:
        return self.age_s < DEAD_AFTER_S and not self._gone

    @property
    def _gone(self) -> bool:
        """Whether it was a process beside ours that is no more, so that one need not wait for it to look dead."""
        process = self.name.split("-")[-2] if self.name.count("-") >= 2 else ""
        if not self.processes or self.processes != process_table() or not process.isdigit():
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is somebody else's
        return False


def process_table() -> str:
    """A name of the table that this process is numbered in: another on each machine, in each container and after each
    boot. '' where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        samples_under_way: images' worth of work done in units that are not committed.
        samples_retried: failed samples that are being tried again, and counted among the failed ones meanwhile.
        errors: failed samples by error code.
        workers: what each worker does now; of `status`, what it did at the last heartbeat.
        drivers: those whose heartbeats are there; one that was killed stays until the next driver cleans up.
        rate: images per second since the drivers at work began, None before their first unit.
        heartbeat_age_s: seconds since the last sign of life of any driver; None without one, and when it asks itself.
        note: why nothing goes on, and what to do; '' while something does, and when all is well.
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
    samples_retried: int = 0
    note: str = ""

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the present rate."""
        left = max(0.0, self.samples - self.samples_done + self.samples_retried - self.samples_under_way)
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
        self.worst: Commit | None = None  # of all, the one of which most samples failed
        self._shards: dict[int, list[Unit]] = {}
        for unit in self.units.values():
            self._shards.setdefault(unit.shard, []).append(unit)
        self._fresh, self._began = 0, 0.0
        self._retried: dict[int, int] = {}
        for commit in commits.values():
            self.add(commit)
        self._fresh = 0  # what was there before says nothing about the rate

    def add(self, commit: Commit) -> None:
        """Count a commit; of a unit's several generations the last one counts."""
        before = self.commits.get(commit.unit)
        if before is None:
            self.samples_done += commit.samples
            self._fresh += commit.samples
        else:
            self.errors -= Counter(before.errors)
            if commit.generation > before.generation:  # the others are what they were
                self._fresh += self._retried.pop(commit.unit, before.failed)
        self.errors += Counter(commit.errors)
        self.commits[commit.unit] = commit
        if self.worst is not None and self.worst.unit == commit.unit:
            self.worst = max(self.commits.values(), key=_share_failed)
        elif self.worst is None or _share_failed(commit) > _share_failed(self.worst):
            self.worst = commit

    def retry(self, unit: int, samples: int) -> None:
        """So many failed samples of a unit are to be tried again."""
        self._retried[unit] = samples

    @property
    def failed(self) -> int:
        return self.errors.total()

    @property
    def shards(self) -> Iterable[int]:
        return self._shards

    def shard(self, number: int) -> list[Unit]:
        """The units of a shard, in order."""
        return self._shards[number]

    def _generation(self, unit: int) -> int:
        return self.commits[unit].generation if unit in self.commits else -1

    def status(self, workers: Iterable[Progress] = (), finished: bool = False) -> Status:
        workers = _at_work(workers, self._generation)
        under_way = sum(worker.worth for worker in workers)
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
            samples_retried=sum(self._retried.values()),
        )


def _share_failed(commit: Commit) -> float:
    return commit.failed / commit.samples


def _at_work(workers: Iterable[Progress], generation: Callable[[int], int]) -> tuple[Progress, ...]:
    """The workers as they are: what one said last may be of a unit whose commit has come since."""
    return tuple(
        replace(Progress(worker.worker, None), seen=worker.seen)
        if worker.unit and worker.unit.isdigit() and generation(int(worker.unit)) >= worker.generation
        else worker
        for worker in workers
    )


def drivers(store: Store, bury: bool = False) -> list[Driver]:
    """The drivers whose heartbeats are there; those of the dead are removed if asked."""
    found = []
    for path, beat in _beats(store).items():
        driver = Driver(_driver(path), time.time() - beat["time"], beat.get("processes", ""))
        if bury and not driver.alive:
            store.delete(path)
        else:
            found.append(driver)
    return found


def _beats(store: Store) -> dict[str, dict[str, Any]]:
    beats = {}
    for path, beat in store.read_all(store.list(HEARTBEATS)).items():
        with suppress(ValueError):  # a torn one is as good as none
            beats[path] = json.loads(beat)
    return beats


def over_budget(errors: Errors, failed: int, samples: int, codes: Mapping[str, int], worst: Commit | None) -> str:
    """What of a run is over its budget of failures, as a clause; '' if nothing is."""
    if failed > errors.max_failed_fraction * samples:
        told = ", ".join(f"{count} {code}" for code, count in Counter(codes).most_common())
        limit = f"errors.max_failed_fraction ({errors.max_failed_fraction:g})"
        return f"{failed} of {samples} samples failed ({told}), more than {limit} allows"
    if worst is not None and worst.failed > errors.max_failed_fraction_per_unit * worst.samples:
        limit = f"errors.max_failed_fraction_per_unit ({errors.max_failed_fraction_per_unit:g})"
        return (
            f"{worst.failed} of the {worst.samples} samples of unit {worst.unit:06d} failed, more than {limit} allows"
        )
    return ""


@overload
def status(where: Distill) -> TrainingStatus: ...
@overload
def status(where: str | Manifest | Look) -> Status | TrainingStatus: ...
def status(where: str | Manifest | Look) -> Status | TrainingStatus:
    """How far a run is, from what is stored alone; of a manifest, an output path or URL, or as it was looked at.

    Raises:
        RequestError: no run stands there.
    """
    look = where if isinstance(where, Look) else Look(where)
    if trains(look.run):
        return training_status(look.store, look.run, any(driver.alive for driver in drivers(look.store)))
    errors: Counter[str] = Counter()
    for counted in (
        *(record.errors for record in look.records.values()),
        *(commit.errors for commit in look.commits.values()),
    ):
        errors.update(counted)
    beats = _beats(look.store)
    ages = {path: time.time() - beat["time"] for path, beat in beats.items()}
    # Of those who are not at work any more, what was in hand is lost, and there is no rate.
    alive = [beat for path, beat in beats.items() if ages[path] < DEAD_AFTER_S]
    workers = _at_work(
        (Progress(**worker) for beat in alive for worker in beat["workers"]),
        lambda unit: look.generations.get(unit, -1),
    )
    done = bool(look.units) and len(look.generations) == len(look.units)
    now = Status(
        name=look.run["name"],
        units=len(look.units),
        units_done=len(look.generations),
        samples=sum(map(len, look.units.values())),
        samples_done=sum(len(look.units[unit]) for unit in look.generations),
        samples_under_way=sum(worker.worth for worker in workers),
        errors=dict(errors),
        finished=done and len(look.records) == len(look.shards) and is_reported(look.store),
    )
    note = "" if alive else _note(look, now)
    if now.finished or not beats:
        return replace(now, note=note)
    return replace(
        now,
        workers=workers,
        drivers=tuple(Driver(_driver(path), age) for path, age in ages.items()),
        rate=sum(beat["rate"] or 0.0 for beat in alive) or None,
        heartbeat_age_s=min(ages.values()),
        samples_retried=max((beat.get("samples_retried", 0) for beat in alive), default=0),
        note=note,
    )


def _note(look: Look, now: Status) -> str:
    """Of a run that nobody works on."""
    over = over_budget(look.allowed, now.failed, now.samples, now.errors, look.worst())
    if over:
        state = "finished" if now.finished else "stopped"
        return f"{state}, but {over}; mend the cause and run with --retry-failed, or raise the limit"
    if now.finished:
        return ""
    if not now.units:
        return "it has no plan yet; if nobody is planning it, `smsbatch run` does"
    if now.units_done < now.units:
        return "nobody is at work on it; `smsbatch run` goes on"
    return "nobody is at work on it, and shards or the report are missing; `smsbatch run` writes them"


def _driver(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")
