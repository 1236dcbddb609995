"""Plans: the amount of work that a run will do, and its cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from smsbatch.data.captions import Contents
from smsbatch.data.sample import Unit
from smsbatch.generator.config import parameter_count
from smsbatch.manifest import Dataset, Distill
from smsbatch.text import count


@dataclass(frozen=True)
class Plan:
    """The plan of a run that makes a dataset. `str(plan)` is a one-line summary.

    Attributes:
        bytes_in: total size of all fields of all samples, without a table's pictures, whose sizes are not requested.
        samples_done: committed samples of an existing run.
        samples_per_unit: the size of every unit except the last of a shard; 0 for an existing run.
        steps: iterations per image; None for a generator, which needs one pass.
        estimate: the result of a probe, if one was made.
        price_per_gpu_hour: in any currency.
    """

    manifest: Dataset
    samples: int
    units: tuple[Unit, ...]
    notices: tuple[str, ...] = ()
    bytes_in: int = 0
    contents: Contents = field(default_factory=Contents)
    samples_done: int = 0
    samples_per_unit: int = 0
    steps: int | None = None
    estimate: Estimate | None = None
    price_per_gpu_hour: float | None = None

    @property
    def shards(self) -> int:
        return self.units[-1].shard + 1

    @property
    def done(self) -> bool:
        return self.samples_done == self.samples

    @property
    def seconds_per_image(self) -> float | None:
        """Seconds that one worker takes per image."""
        return self.estimate.seconds_per_image if self.estimate else None

    @property
    def bytes_out(self) -> int | None:
        """Estimated size of all stylized pictures."""
        return round(self.estimate.bytes_per_image * self.samples) if self.estimate else None

    @property
    def gpu_hours(self) -> float | None:
        """Estimated GPU hours of the remaining samples; a worker without a GPU counts as one GPU."""
        share = self.manifest.compute.gpus_per_worker
        gpus = 1.0 if share == "auto" else share or 1.0
        left = self.samples - self.samples_done
        return gpus * left * self.estimate.seconds_per_image / 3600 if self.estimate else None

    @property
    def cost(self) -> float | None:
        hours, price = self.gpu_hours, self.price_per_gpu_hour
        return None if hours is None or price is None else hours * price

    def __str__(self) -> str:
        counts = ((self.shards, "shard"), (len(self.units), "unit"), (self.samples, "image"))
        return ", ".join(count(number, word) for number, word in counts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.manifest.name,
            "output": self.manifest.output.path,
            "shards": self.shards,
            "units": len(self.units),
            "samples": self.samples,
            "samples_done": self.samples_done,
            "steps": self.steps,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds_per_image": self.seconds_per_image,
            "device": self.estimate.device if self.estimate else None,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "contents": asdict(self.contents),
            "notices": list(self.notices),
        }


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a `distill` run. `str(plan)` is a one-line summary.

    Attributes:
        bytes_in: total size of all fields of all samples, as far as known.
        steps_done: steps of an existing run, by its last checkpoint.
    """

    manifest: Distill
    samples: int
    notices: tuple[str, ...] = ()
    bytes_in: int = 0
    contents: Contents = field(default_factory=Contents)
    steps_done: int = 0

    @property
    def done(self) -> bool:
        return self.steps_done == self.manifest.distill.all_steps

    @property
    def epochs(self) -> float:
        """How often every picture is seen."""
        training = self.manifest.distill
        return training.all_steps * training.images_per_step / self.samples

    @property
    def parameters(self) -> int:
        """Number of parameters of the generator."""
        return parameter_count(self.manifest.distill.width, self.manifest.distill.blocks)

    @property
    def workers(self) -> int | str:
        """`auto` stands for the number of GPUs in the cluster, which a plan does not know."""
        compute = self.manifest.compute
        return 1 if compute.pool == "local" else compute.workers

    def __str__(self) -> str:
        training = self.manifest.distill
        pictures = f"{training.images_per_step:,} of {self.samples:,} images each"
        return f"{training.warmup_steps:,} steps of warm-up and {training.steps:,} of distillation, {pictures}"

    def to_dict(self) -> dict[str, Any]:
        training = self.manifest.distill
        return {
            "name": self.manifest.name,
            "output": self.manifest.output.path,
            "samples": self.samples,
            "steps": training.all_steps,
            "warmup_steps": training.warmup_steps,
            "steps_done": self.steps_done,
            "images_per_step": training.images_per_step,
            "repeats": training.repeats,
            "epochs": self.epochs,
            "parameters": self.parameters,
            "workers": self.workers,
            "bytes_in": self.bytes_in,
            "contents": asdict(self.contents),
            "notices": list(self.notices),
        }


@dataclass(frozen=True)
class Estimate:
    """The cost of a sample, measured on a few: seconds of one worker, bytes of the stylized picture."""

    images: int
    seconds_per_image: float
    bytes_per_image: float
    device: str
