"""The progress of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any, TypeGuard

from smsbatch.data.sample import Unit
from smsbatch.manifest import Errors
from smsbatch.runs.heartbeat import Driver
from smsbatch.runs.records import Commit


@dataclass(frozen=True)
class Progress:
    """The progress of a worker: `done` of `samples` of its unit, `step` of `steps` of a batch of `batch` samples.

    `seen` is the time of this report, in seconds since 1970 by the worker's clock; it grows old if a step hangs.
    `idle_fraction` is the share of the time from the first to the last batch in which the device was idle.
    """

    worker: str
    unit: str | None
    done: int = 0
    samples: int = 0
    batch: int = 0
    step: int = 0
    steps: int = 0
    generation: int = 0
    seen: float | None = None
    idle_fraction: float | None = None

    @property
    def images_done(self) -> float:
        """Work done in the present unit, in images: finished ones, and the fraction done of the current batch."""
        return self.done + (self.batch * self.step / self.steps if self.steps else 0.0)


@dataclass(frozen=True)
class DriverStatus:
    """What a driver tells in its heartbeat."""

    rate: float | None
    samples_retried: int
    workers: tuple[Progress, ...]

    @classmethod
    def parse(cls, beat: Mapping[str, Any]) -> DriverStatus:
        """What is told in the expected types; all else is left out, because a heartbeat must not stop a reader."""
        rate, retried, workers = beat.get("rate"), beat.get("samples_retried"), beat.get("workers")
        found = (_progress(worker) for worker in workers) if isinstance(workers, list) else ()
        return cls(
            float(rate) if _is_number(rate) else None,
            int(retried) if _is_number(retried) else 0,
            tuple(worker for worker in found if worker is not None),
        )


def _progress(values: object) -> Progress | None:
    try:
        found = Progress(**values)  # type: ignore[arg-type]
    except TypeError:
        return None
    numbers = (found.done, found.samples, found.batch, found.step, found.steps, found.generation)
    optional = (number for number in (found.seen, found.idle_fraction) if number is not None)
    texts = isinstance(found.worker, str) and isinstance(found.unit, str | None)
    return found if texts and all(map(_is_number, (*numbers, *optional))) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < 1e300  # neither NaN nor too long for a float


@dataclass(frozen=True)
class Status:
    """The progress of a run.

    Attributes:
        samples_under_way: work done in units that are not committed, in images.
        samples_retried: failed samples that are being retried; they count as failed meanwhile.
        errors: failed samples by error code.
        workers: progress of each worker, in `smsbatch status` as of the last heartbeat.
        drivers: drivers that have a heartbeat; that of a killed driver stays until the next driver removes it.
        rate: images per second since the drivers at work began, None before their first unit.
        heartbeat_age_s: age of the newest heartbeat of any driver; None without one, and in the driver itself.
        note: why no work is being done, and what to do; '' while work is being done and when all is well.
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

    @property
    def works(self) -> bool:
        """True if work is left or in progress."""
        return self.units_done < self.units or bool(self.workers)

    def beat(self) -> dict[str, Any]:
        """The fields that a heartbeat carries."""
        return {
            "rate": self.rate,
            "samples_under_way": self.samples_under_way,
            "samples_retried": self.samples_retried,
            "workers": [asdict(worker) for worker in self.workers],
        }

    def to_dict(self) -> dict[str, Any]:
        ages = {"workers": [asdict(worker) | {"seen_age_s": age_s(worker)} for worker in self.workers]}
        return asdict(self) | ages | {"failed": self.failed, "remaining_s": self.remaining_s}


def age_s(worker: Progress) -> float | None:
    """Seconds since the last report of a worker; None if there was none."""
    return None if worker.seen is None else max(0.0, time.time() - worker.seen)


class RunTally:
    """The driver's running count of commits and failures."""

    def __init__(self, name: str, units: Iterable[Unit], commits: Mapping[int, Commit]) -> None:
        self.name = name
        self.units = {unit.id: unit for unit in units}
        self.samples = sum(map(len, self.units.values()))
        self.commits: dict[int, Commit] = {}
        self.samples_done = 0
        self.errors: Counter[str] = Counter()
        self.worst: Commit | None = None  # the commit with the largest share of failures
        self._fresh, self._began = 0, 0.0
        self._retried: dict[int, int] = {}
        for commit in commits.values():
            self.add(commit)
        self._fresh = 0  # earlier commits do not count for the rate

    def add(self, commit: Commit) -> None:
        """Count a commit; it replaces the one of the unit's previous generation."""
        before = self.commits.get(commit.unit)
        if before is None:
            self.samples_done += commit.samples
            self._fresh += commit.samples
        else:
            self.errors -= Counter(before.errors)
            if commit.generation > before.generation:  # only the retried samples were computed
                self._fresh += self._retried.pop(commit.unit, before.failed)
        self.errors += Counter(commit.errors)
        self.commits[commit.unit] = commit
        if self.worst is not None and self.worst.unit == commit.unit:
            self.worst = max(self.commits.values(), key=_share_failed)
        elif self.worst is None or _share_failed(commit) > _share_failed(self.worst):
            self.worst = commit

    def retry(self, unit: int, samples: int) -> None:
        """Note that `samples` failed samples of a unit will be retried."""
        self._retried[unit] = samples

    @property
    def failed(self) -> int:
        return self.errors.total()

    def _generation(self, unit: int) -> int:
        return self.commits[unit].generation if unit in self.commits else -1

    def status(self, workers: Iterable[Progress] = (), finished: bool = False) -> Status:
        workers = at_work(workers, self._generation)
        under_way = sum(worker.images_done for worker in workers)
        fresh = self._fresh + under_way
        if not self._began and any(worker.unit for worker in workers):
            self._began = monotonic()  # only now, so that loading the models does not lower the rate
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


def at_work(workers: Iterable[Progress], generation: Callable[[int], int]) -> tuple[Progress, ...]:
    """The workers, idle where the unit of their last report has been committed since."""
    return tuple(
        replace(Progress(worker.worker, None), seen=worker.seen)
        if worker.unit and worker.unit.isdigit() and generation(int(worker.unit)) >= worker.generation
        else worker
        for worker in workers
    )


def over_budget(errors: Errors, failed: int, samples: int, codes: Mapping[str, int], worst: Commit | None) -> str:
    """A clause that names the exceeded failure budget; '' if none is exceeded."""
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
