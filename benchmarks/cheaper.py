"""The opt-in modes: the time that each saves, and its cost in LPIPS to the source and in style distance.

    python benchmarks/cheaper.py [--photos 13]

The embedded model with the constants of manifests/demo.yaml stylizes its held-out photographs, central squares of 128
px, one at a time; every setting stylizes a photograph before the next photograph, so that all are measured side by
side. Quality is measured on the stored eight-bit results: LPIPS as the mean over the photographs, style distance
(`metrics/style.py`) for the whole set. `preset: fast` keeps the demo's constants, and scales its iterations and its
learning rate by the preset's ratios to the released ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import arguments, header, table
from torch import Tensor

import smsbatch as sb
from smsbatch import tiny
from smsbatch.manifest import Objective
from smsbatch.metrics.style import StyleReference, style_distance

DEMO = Path(__file__).parent.parent / "manifests" / "demo.yaml"
REFERENCE = "tiny:styles/oil.reference.safetensors"
FULL = "full"


def settings(demo: Objective) -> dict[str, list[str]]:
    """Overrides by name; the others are compared with the first."""
    fast, released = Objective(preset="fast"), Objective()

    def steps(part: float) -> str:
        return f"objective.steps={round(demo.steps * part)}"

    def rate(times: float) -> str:
        return f"objective.learning_rate={times * demo.learning_rate}"

    both = [f"objective.relevance_grid={fast.relevance_grid}", f"objective.fake.trains_on={fast.fake.trains_on}"]
    return {
        FULL: [],
        "relevance_grid: 16": ["objective.relevance_grid=16"],
        "relevance_grid: 8": ["objective.relevance_grid=8"],
        "relevance_grid: 2": ["objective.relevance_grid=2"],
        "fake.trains_on: forward": ["objective.fake.trains_on=forward"],
        "3/4 of the steps": [steps(3 / 4)],
        "1/2 of the steps": [steps(1 / 2)],
        "1/3 of the steps": [steps(1 / 3)],
        "1/2 of the steps, twice the rate": [steps(1 / 2), rate(2)],
        "stall: 0.02": ["objective.stall=0.02"],
        "stall: 0.04": ["objective.stall=0.04"],
        "relevance_grid: 16, trains_on: forward": both,
        "preset: fast": [
            *both,
            steps(fast.steps / released.steps),
            rate(fast.learning_rate / released.learning_rate),
        ],
        "1/2 of the steps, twice the rate, and both": [*both, steps(1 / 2), rate(2)],
        "guidance 2 on both": ["objective.guidance=2", "objective.fake_guidance=2"],
        "guidance 2 on the teacher only": ["objective.guidance=2"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=13)
    parser.add_argument("--steps", type=int, help="iterations of the full setting, instead of the demo's")
    options = arguments(parser)
    if options.model != "tiny":
        parser.error("quality needs a trained model: --model tiny")
    common = ["image.fit=center_crop", f"image.resolution={options.side}", "compute.threads=auto"]
    common += [f"compute.precision={options.precision}", *([f"objective.steps={options.steps}"] * bool(options.steps))]
    demo = sb.load(str(DEMO), common)
    stylizers = {
        name: sb.Stylizer(sb.load(str(DEMO), [*common, *overrides]), options.device)
        for name, overrides in settings(demo.objective).items()
    }
    torch.set_num_threads(options.threads)
    photos = sorted(Path(tiny.resolve("tiny:photos")).glob("*.jpg"))[: options.photos]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in stylizers}
    results: dict[str, list[Tensor]] = {name: [] for name in stylizers}
    for photo in photos:
        caption = photo.with_suffix(".txt").read_text().strip()
        for name, stylizer in stylizers.items():
            picture, row = stylizer(photo, caption, photo.stem)
            rows[name].append(row)
            results[name].append(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)

    reference = StyleReference.load(tiny.resolve(REFERENCE))
    style = {name: style_distance(images, reference) for name, images in results.items()}
    mean = {
        name: {key: sum(row[key] for row in of_one) / len(photos) for key in ("seconds", "steps", "lpips")}
        for name, of_one in rows.items()
    }
    full = mean[FULL]
    lines = [
        [
            f"{found['seconds'] / full['seconds']:.2f}",
            f"{found['lpips']:.3f} ({found['lpips'] - full['lpips']:+.3f})",
            f"{style[name]:.3f} ({style[name] - style[FULL]:+.3f})",
            name,
            f"{found['steps']:.0f}",
            f"{found['seconds']:.2f}",
        ]
        for name, found in mean.items()
    ]
    print(header(options) + f"; {len(photos)} photographs")
    columns = ["time", "LPIPS", "style distance", "setting", "steps", "seconds per image"]
    print(table(columns, lines))


if __name__ == "__main__":
    main()
