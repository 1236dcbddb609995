"""How far a training is, from its storage alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from smsbatch.data.store import Store
from smsbatch.execution.checkpoints import latest
from smsbatch.execution.record import manifest_of
from smsbatch.execution.report import SUCCESS
from smsbatch.execution.training_log import TrainingProgress, read_progress
from smsbatch.manifest import Distill

__all__ = ["TrainingStatus", "training_status"]

QUIET_S = 60.0  # without a step or a word of its driver: nobody is at work on it


@dataclass(frozen=True)
class TrainingStatus:
    """How far a training is.

    Attributes:
        step: finished ones, of `steps` with those of the warm-up.
        phase: "warm-up" or "distillation".
        steps_per_second, images_per_second: over the last minute; None while nobody is at work.
        losses: the last ones that were logged.
        failed: samples that could not be had, each time that another one had to take their place.
        age_s: seconds since the last step was heard of; None before there was one.
        checkpoint: the step of the newest checkpoint, which a killed training goes on from; None without one, and while
            it tells of itself.
        checkpoint_age_s: seconds since it was taken.
        finished: the generator is there; of one that tells of itself, all steps are done.
        note: why nothing goes on, and what to do; '' while something does, and when all is well.
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
        """Of a training that tells of itself."""
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
    def remaining_s(self) -> float | None:
        """Seconds left at the present rate."""
        return (self.steps - self.step) / self.steps_per_second if self.steps_per_second else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"remaining_s": self.remaining_s}


def training_status(store: Store, run: Mapping[str, Any], alive: bool) -> TrainingStatus:
    """What `run.json`, the newest checkpoint and the training's own words say; `alive`: a driver is at work."""
    manifest = manifest_of(run)
    assert isinstance(manifest, Distill)
    training = manifest.distill
    now, checkpoint, finished = read_progress(store), latest(store), store.exists(SUCCESS)
    saved = checkpoint.step if checkpoint else 0
    age_s = None if now is None else max(0.0, time.time() - now.time)
    at_work = not finished and alive
    step = now.step if now is not None and at_work else max(saved, training.all_steps if finished else 0)
    if at_work or finished:
        note = ""
    elif now is None and checkpoint is None:
        note = "nobody is at work on it; `smsbatch run` begins"
    else:
        note = f"nobody is at work on it; `smsbatch run` goes on from step {saved:,}"
    return TrainingStatus(
        name=run["name"],
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


def _age_s(moment: str) -> float:
    return max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())
