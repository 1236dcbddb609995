"""The manifest itself: the keys of every task, and those that each of the three tasks adds.

`Manifest.model_validate` returns the class of the task that the data names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, TypeAdapter, field_validator, model_validator

from smsbatch.manifest.base import FILLED, PLACEHOLDER, Section
from smsbatch.manifest.objective import Objective, ScoreObjective
from smsbatch.manifest.sections import (
    HOUSEKEEPING,
    Compute,
    Crops,
    Destination,
    Errors,
    Image,
    Model,
    Output,
    Pictures,
    Source,
    Storage,
    Style,
    Tiles,
    Training,
)
from smsbatch.text import hide


class Manifest(Section):
    """One job.

    Attributes:
        makes: what a run of the task leaves, a "dataset" or a "generator".
    """

    makes: ClassVar[Literal["dataset", "generator"]]
    task: str
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, in its report and dataset card."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the run; the seed of a sample is a hash of this and its key."""
    source: Source
    image: Pictures
    output: Destination
    compute: Compute = Compute()
    storage: Storage = Storage()
    errors: Errors = Errors()

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_task(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        if cls is not Manifest or not isinstance(data, Mapping):
            return handler(data)
        task = data.get("task", "optimize")
        if not isinstance(task, str) or task not in TASKS:
            raise ValueError(f"task: {task!r} is none of {', '.join(TASKS)}")
        return TASKS[task].model_validate(data)

    _environment: dict[str, str] = PrivateAttr(default_factory=dict)  # values of `${NAME}`, by name
    _written: Any = PrivateAttr(default=None)  # as `dump`, of the manifest as it is written

    @classmethod
    def filled(cls, written: Manifest, plain: Mapping[str, Any], environment: Mapping[str, str]) -> Self:
        """The manifest of `plain`, in which the environment is filled in; it remembers how it was `written`."""
        manifest = cls.model_validate(plain, context=FILLED)
        text = str(recorded := written.model_dump(mode="json"))
        manifest._environment = {name: value for name, value in environment.items() if f"${{{name}}}" in text}
        manifest._written = recorded if manifest._environment else None
        hide(manifest._environment)
        return manifest

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        hide(self._environment)  # in a worker, too

    def hide(self) -> None:
        """Have rows and messages of this process show the values of this manifest's environment, and no other's, as
        `${NAME}`; called when a verb begins to work with it."""
        hide(self._environment, alone=True)

    def dump(self) -> dict[str, Any]:
        """The resolved manifest as plain data, every default written out, to be recorded.

        A text that came from the environment is `${NAME}`; a number or choice that did is recorded as it is.
        """
        plain: dict[str, Any] = _as_written(self.model_dump(mode="json"), self._written, self._environment)
        return plain

    def fill(self, text: str) -> str:
        """A text of the run's rows, with the values of the environment."""
        return str(fill(text, self._environment))

    @property
    def environment(self) -> dict[str, str]:
        """SHA-256 of `NAME=value` for each `${NAME}` in `dump`, by name."""
        return {
            name: hashlib.sha256(f"{name}={value}".encode()).hexdigest() for name, value in self._environment.items()
        }

    def absolute(self) -> Self:
        """The same job with absolute local paths, for a process with another working folder."""
        return self.model_copy(update={"output": self.output.model_copy(update={"path": _absolute(self.output.path)})})

    @property
    def identity(self) -> str:
        """`identity_of` this manifest."""
        return identity_of(self.dump())


class Styled(Manifest):
    """A task that uses the scores of a model and a style."""

    model: Model
    style: Style
    objective: ScoreObjective = ScoreObjective()

    def absolute(self) -> Self:
        style = {
            "lora": tuple(map(_absolute, self.style.lora)),
            "model": self.style.model and _located(self.style.model),
        }
        update = {"model": _located(self.model), "style": self.style.model_copy(update=style)}
        return super().absolute().model_copy(update=update)

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _some_style(self) -> Self:
        prompt = self.objective.prompt
        if not self.style.lora and self.style.model is None and not any(word in prompt for word in ("{style}", "${")):
            raise ValueError("style.lora is empty and objective.prompt has no {style}: nothing says what the style is")
        return self


class Dataset(Manifest):
    """A task that makes a dataset: shards, and a row for every sample."""

    makes = "dataset"
    image: Image = Image()
    output: Output
    metrics: tuple[Literal["lpips"], ...] = ("lpips",)
    """Metrics of every sample, computed at the result's size; one column each."""


class Optimize(Dataset, Styled):
    """Optimizes every image on its own, by the scores."""

    task: Literal["optimize"] = "optimize"
    """`optimize`: optimize every image on its own."""
    objective: Objective = Objective()


class Distill(Styled):
    """Distills the style into a generator."""

    makes = "generator"
    task: Literal["distill"]
    """`distill`: train a generator on the images."""
    image: Crops = Crops()
    distill: Training = Training()

    @field_validator("compute")
    @classmethod
    def _wide_enough(cls, value: Compute) -> Compute:
        if value.precision == "fp16":
            raise ValueError("precision: fp16 has too small a range to train in; take bf16")
        if value.gpus_per_worker not in ("auto", 0, 1):
            raise ValueError("gpus_per_worker: a worker trains on one GPU; set it to 1, or to 0 for CPUs")
        return value

    @field_validator("errors")
    @classmethod
    def _of_no_units(cls, value: Errors) -> Errors:
        if "max_failed_fraction_per_unit" in value.model_fields_set and value.max_failed_fraction_per_unit < 1:
            raise ValueError("max_failed_fraction_per_unit: a training has no units; set max_failed_fraction")
        return value

    @field_validator("objective")
    @classmethod
    def _of_a_training(cls, value: ScoreObjective) -> ScoreObjective:
        if value.preset == "fast":
            raise ValueError("preset: fast exists only for optimize; a training is made cheaper by relevance_grid: 1")
        return value

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        workers, images = self.compute.workers, self.distill.images_per_step
        if self.compute.pool == "ray" and isinstance(workers, int) and images % workers:
            raise ValueError(f"distill.images_per_step ({images}) cannot be divided among {workers} workers")
        return self


class Stylize(Dataset):
    """Stylizes every image in one pass of a generator."""

    task: Literal["stylize"]
    """`stylize`: pass every image once through a generator."""
    generator: str = Field(min_length=1)
    """Its location: the output of a `distill` run, or a folder with its two files; on disk or in an object store."""
    tiles: Tiles = Tiles()

    def absolute(self) -> Self:
        return super().absolute().model_copy(update={"generator": _absolute(self.generator)})


TASKS: dict[str, type[Manifest]] = {"optimize": Optimize, "distill": Distill, "stylize": Stylize}


def fill(plain: Any, environment: Mapping[str, str]) -> Any:
    """Plain data with the values of `${NAME}` in all texts; unknown names stay."""
    if isinstance(plain, dict):
        return {key: fill(value, environment) for key, value in plain.items()}
    if isinstance(plain, list):
        return [fill(value, environment) for value in plain]
    if not isinstance(plain, str):
        return plain
    return PLACEHOLDER.sub(lambda match: environment.get(match[1], match[0]), plain)


def _as_written(plain: Any, written: Any, environment: Mapping[str, str]) -> Any:
    """`plain`, with each text as in `written` if that is the same text once it is filled in."""
    if isinstance(plain, dict) and isinstance(written, dict):
        return {key: _as_written(value, written.get(key), environment) for key, value in plain.items()}
    if isinstance(plain, list) and isinstance(written, list) and len(plain) == len(written):
        return [_as_written(*pair, environment) for pair in zip(plain, written, strict=True)]
    return written if isinstance(written, str) and fill(written, environment) == plain else plain


def identity_of(plain: Mapping[str, Any]) -> str:
    """SHA-256 of all keys of a dumped manifest that results depend on: without output path, storage, compute and error
    limits.

    It fills in no defaults, so that a manifest in `run.json` keeps its identity in later versions.
    """
    kept = {key: value for key, value in plain.items() if key not in ("errors", "storage")}
    kept["compute"] = plain.get("compute", {}).get("precision")
    for section, left_out in (("output", ("path",)), ("distill", HOUSEKEEPING)):
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON Schema of manifests, of all tasks."""
    any_task: Any = reduce(or_, TASKS.values())
    return TypeAdapter(any_task).json_schema()


def _located(model: Model) -> Model:
    """The model with absolute paths for what exists here; anything else is a hub id."""
    paths = {"path": model.path, "config": model.config}
    return model.model_copy(
        update={name: _absolute(path) for name, path in paths.items() if path and Path(path).exists()}
    )


def _absolute(path: str) -> str:
    is_local = "://" not in path and not path.startswith("tiny:")
    return str(Path(path).expanduser().absolute()) if is_local else path
