"""`status`: the progress of a run, from its storage alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from smsbatch.manifest import Manifest
from smsbatch.runs.checkpoints import latest
from smsbatch.runs.heartbeat import DEAD_AFTER_S, Driver, driver_name, drivers, read_beats
from smsbatch.runs.layout import SUCCESS, is_reported
from smsbatch.runs.snapshot import Snapshot
from smsbatch.runs.status import DriverStatus, Status, at_work, over_budget
from smsbatch.training.log import TrainingProgress, read_progress


def status(where: str | Manifest | Snapshot) -> Status | TrainingStatus:
    """The progress of the run at a manifest, an output path or URL, or in a snapshot, from its storage alone.

    Raises:
        RequestError: there is no run.
    """
    snapshot = where if isinstance(where, Snapshot) else Snapshot(where)
    return STATUSES[snapshot.run.makes](snapshot)


def dataset_status(snapshot: Snapshot) -> Status:
    """`status` of a run that makes a dataset."""
    errors: Counter[str] = Counter()
    for counted in (
        *(record.errors for record in snapshot.records.values()),
        *(commit.errors for commit in snapshot.commits.values()),
    ):
        errors.update(counted)
    beats = read_beats(snapshot.store)
    ages = {path: beat["age_s"] for path, beat in beats.items()}
    # The uncommitted work of dead drivers is lost, and they have no rate.
    alive = [DriverStatus.parse(beat) for path, beat in beats.items() if ages[path] < DEAD_AFTER_S]
    workers = at_work(
        (worker for driver in alive for worker in driver.workers),
        lambda unit: snapshot.generations.get(unit, -1),
    )
    done = bool(snapshot.units) and len(snapshot.generations) == len(snapshot.units)
    now = Status(
        name=snapshot.run.name,
        units=len(snapshot.units),
        units_done=len(snapshot.generations),
        samples=sum(map(len, snapshot.units.values())),
        samples_done=sum(len(snapshot.units[unit]) for unit in snapshot.generations),
        samples_under_way=sum(worker.images_done for worker in workers),
        errors=dict(errors),
        finished=done and len(snapshot.records) == len(snapshot.shards) and is_reported(snapshot.store),
    )
    note = "" if alive else _note(snapshot, now)
    if now.finished or not beats:
        return replace(now, note=note)
    return replace(
        now,
        workers=workers,
        drivers=tuple(Driver(driver_name(path), age) for path, age in ages.items()),
        rate=sum(driver.rate or 0.0 for driver in alive) or None,
        heartbeat_age_s=min(ages.values()),
        samples_retried=max((driver.samples_retried for driver in alive), default=0),
        note=note,
    )


def _note(snapshot: Snapshot, now: Status) -> str:
    """The note on a run without a living driver."""
    over = over_budget(snapshot.allowed, now.failed, now.samples, now.errors, snapshot.worst())
    if over:
        state = "finished" if now.finished else "stopped"
        return f"{state}, but {over}; fix the cause and run with --retry-failed, or raise the limit"
    if now.finished:
        return ""
    if not now.units:
        return "it has no plan yet; if no driver is planning it, run `smsbatch run`"
    if now.units_done < now.units:
        return "no driver is at work on it; `smsbatch run` continues it"
    return "no driver is at work on it, and shards or the report are missing; `smsbatch run` writes them"


@dataclass(frozen=True)
class TrainingStatus:
    """The progress of a training, read from storage or reported by the training itself.

    Attributes:
        step: number of finished steps, of `steps` including the warm-up.
        phase: "warm-up" or "distillation".
        steps_per_second, images_per_second: over the last minute; None while no driver is at work.
        losses: the losses that were logged last.
        failed: how often a sample could not be read and another one took its place.
        age_s: seconds since the last progress report; None if there is none.
        checkpoint: step of the newest checkpoint, from which a killed training resumes; None if there is none, or if
            the training itself reports.
        checkpoint_age_s: age of that checkpoint.
        finished: the generator is stored; if the training itself reports, all steps are done.
        note: why no work is being done, and what to do; '' while work is being done and when all is well.
    """

    name: str
    step: int
    steps: int
    phase: str
    steps_per_second: float | None = None
    images_per_second: float | None = None
    losses: Mapping[str, float | None] | None = None
    failed: int = 0
    age_s: float | None = None
    checkpoint: int | None = None
    checkpoint_age_s: float | None = None
    finished: bool = False
    note: str = ""

    @classmethod
    def of(cls, name: str, now: TrainingProgress) -> TrainingStatus:
        """The status from the progress that a training reports."""
        return cls(
            name,
            now.step,
            now.steps,
            now.phase,
            now.steps_per_second,
            now.images_per_second,
            now.losses,
            now.failed,
            max(0.0, time.time() - now.time),
            finished=now.step == now.steps,
        )

    @property
    def works(self) -> bool:
        return self.step < self.steps

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the present rate."""
        return (self.steps - self.step) / self.steps_per_second if self.steps_per_second else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"remaining_s": self.remaining_s}


def training_status(snapshot: Snapshot) -> TrainingStatus:
    """`status` of a run that makes a generator."""
    run, store = snapshot.run, snapshot.store
    manifest: Any = run.manifest
    training, alive = manifest.distill, any(driver.alive for driver in drivers(store))
    now, checkpoint, finished = read_progress(store), latest(store), store.exists(SUCCESS)
    saved = checkpoint.step if checkpoint else 0
    age_s = None if now is None else max(0.0, time.time() - now.time)
    at_work = not finished and alive
    step = now.step if now is not None and at_work else max(saved, training.all_steps if finished else 0)
    if at_work or finished:
        note = ""
    elif now is None and checkpoint is None:
        note = "no driver is at work on it; `smsbatch run` begins"
    else:
        note = f"no driver is at work on it; `smsbatch run` continues it from step {saved:,}"
    return TrainingStatus(
        name=run.name,
        step=step,
        steps=training.all_steps,
        phase=training.phase(step),
        steps_per_second=now.steps_per_second if now and at_work else None,
        images_per_second=now.images_per_second if now and at_work else None,
        losses=now.losses if now else None,
        failed=now.failed if now else 0,
        age_s=age_s,
        checkpoint=checkpoint.step if checkpoint else None,
        checkpoint_age_s=_age_s(checkpoint.time) if checkpoint else None,
        finished=finished,
        note=note,
    )


STATUSES: dict[str, Callable[[Snapshot], Status | TrainingStatus]] = {
    "dataset": dataset_status,
    "generator": training_status,
}
"""By the result of a task."""


def _age_s(moment: str) -> float:
    return max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())
