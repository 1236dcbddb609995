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
    told = json.loads(files["generator.json"])
    made, training, manifest = told["about"], told["about"]["training"], run["manifest"]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in training["losses"].items())
    rows = {
        "style": f"`{_plain(made['style'])}`" + (f", LoRA {_code(made['lora'])}" if made["lora"] else ""),
        "model": f"{_code([made['model']])}, objective `{manifest['objective']['name']}`",
        "generator": f"{told['parameters']:,} parameters: width {told['width']}, {told['blocks']} blocks",
        "trained on": f"{training['samples']:,} pictures, {made['resolution']} x {made['resolution']} pixels",
        "training": f"{training['steps']:,} steps, {training['images']:,} pictures, {training['seconds']:.0f} s",
        "last losses": losses or "-",
        "manifest": f"`{made['manifest_sha256']}`, smsbatch {run['smsbatch']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
license: other  # yours to state, see below
library_name: smsbatch
pipeline_tag: image-to-image
tags: [smsbatch, style-transfer]
---

# {_plain(run["name"])}

A style distilled into one feed-forward network: a picture of any size goes in, the stylized one comes out, in a single
pass. Made by [smsbatch](https://arxiv.org/abs/2503.07601).

| | |
|---|---|
{table}

## Use

A whole dataset, by `smsbatch run stylize.yaml`:

```yaml
task: stylize
name: stylized
generator: .  # this folder, or its URL
source: {{format: folder, urls: photos}}
output: {{path: stylized}}
```

A picture, in Python:

```python
import torch
import smsbatch as sb

generator = sb.Generator.load(".")
images = torch.rand(1, 3, 512, 512)  # RGB in [0, 1], any height and width from 16
results = generator(images)
```

It was trained on {made["resolution"]} x {made["resolution"]} pixels, and works best at about that size.

## Licence

That of the model, the style and the training pictures; smsbatch does not know it.
"""


def _name(path: str) -> str:
    """The last part of a local path, whose folders are private; any other name unchanged."""
    return PurePosixPath(path).name if path.startswith(("/", "~", ".")) else path


def _code(names: list[str]) -> str:
    return ", ".join(f"`{_plain(name)}`" for name in names)


def _plain(text: str) -> str:
    """The text on one line, without the characters of Markdown's code and tables."""
    return " ".join("".join(" " if letter in "`|" else letter for letter in text).split())
