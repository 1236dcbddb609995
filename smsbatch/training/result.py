"""The result of a distill run: the generator's description, its card, and the figures of the training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from smsbatch.errors import StorageError
from smsbatch.manifest import Training
from smsbatch.runs.layout import SUCCESS
from smsbatch.runs.records import PARSE_ERRORS
from smsbatch.runs.run import Run
from smsbatch.text import render_template

GENERATOR = "generator/generator.json"


@dataclass(frozen=True)
class Distilled:
    """A finished training.

    Attributes:
        samples: different pictures of the source.
        steps: including the warm-up.
        seconds: of all attempts, without steps that were repeated later.
        losses: means over the last steps.
        failed: how often a sample failed and another one took its place.
        generator: the run's folder or URL, for `generator:` of a `stylize` manifest.
        resumed_from: the step at which this call resumed; None if it did nothing.
    """

    name: str
    samples: int
    steps: int
    images: int
    seconds: float
    images_per_second: float
    losses: Mapping[str, float]
    failed: int
    generator: str
    parameters: int
    notices: tuple[str, ...] = ()
    resumed_from: int | None = None

    @classmethod
    def of(cls, run: Run, resumed_from: int | None = None, notices: Iterable[str] = ()) -> Distilled:
        """The finished training in a store; this call's `notices` follow those of the plan.

        Raises:
            StorageError: the generator's file is gone or damaged.
        """
        try:
            told = json.loads(run.store.read(GENERATOR))
            training, parameters = told["about"]["training"], told["parameters"]
            return cls(
                name=run.name,
                generator=run.store.url,
                parameters=parameters,
                notices=(*run.about["notices"], *notices),
                resumed_from=resumed_from,
                **training,
            )
        except PARSE_ERRORS as error:
            where = run.store.locate(GENERATOR)
            raise StorageError(f"{where} is damaged; delete it and {SUCCESS}, and run again") from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_generator(run: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A generator's `about`, from the run's record and its last checkpoint's `about` alone, so always the same."""
    manifest, planned = run["manifest"], run["planned"]
    training, style = Training.model_validate(manifest["distill"]), manifest["style"]
    steps, seconds = training.all_steps, checkpoint["seconds"]
    images = steps * training.images_per_step
    return {
        "name": run["name"],
        "style": style["prompt"],
        "lora": [_name(lora) for lora in style["lora"]],
        "model": _name(manifest["model"]["path"]),
        "manifest_sha256": run["manifest_sha256"],
        "resolution": manifest["image"]["resolution"],
        "steps": steps,
        "training": {
            "samples": planned["samples"],
            "steps": steps,
            "images": images,
            "seconds": seconds,
            "images_per_second": images / seconds if seconds else 0.0,
            "losses": checkpoint["losses"],
            "failed": checkpoint["failed"],
        },
    }


def model_card(run: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """`README.md` of a generator, so that a copied folder explains itself."""
    config = json.loads(files["generator.json"])
    return render_template("training/card.md.jinja", run=run, training=config["about"]["training"], **config)


def _name(path: str) -> str:
    """The last part of a local path, whose folders are private; any other name unchanged."""
    return PurePosixPath(path).name if path.startswith(("/", "~", ".")) else path
