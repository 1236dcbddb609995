"""One training step of the generator, ours against the naive step, side by side, and where its time goes.

    python benchmarks/distill.py                        # the embedded model on the CPU
    python benchmarks/distill.py --model sd15 --count   # only the FLOPs; nothing is computed
    python benchmarks/distill.py --device cuda --model sd15 --precision bf16 --channels-last

A step of one picture with B pairs of timestep and noise, preset `released`, guidance 4.5 on both scores. The naive step
repeats the picture B times first, as the paper's text reads: generator and VAE see it B times, and each score is a call
of a UNet of its own. Ours runs generator and VAE once per picture, and asks fake and real in one call; scores and fake
training have the same rows. Draws differ, so results do; `tests/training/test_distiller.py` compares gradients.

The second table measures each part alone, forward and, where there is one, backward, at the rows it has in a step with
the largest B. FLOPs are torch's count of matrix products and convolutions, per row times rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import NamedTuple
from unittest.mock import patch

import torch
from common import PROMPTS, arguments, engine, flops, header, interleaved, pictures, seconds, table
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.scores import Ask, ScoreModels
from smsbatch.generator.network import Generator
from smsbatch.manifest import Distill, Manifest
from smsbatch.training import distiller as distill
from smsbatch.training.distiller import Distiller


class OneByOne(ScoreModels):
    """Every score model in a call of its own."""

    def __call__(self, t: Tensor, *asked: Ask) -> list[Tensor]:
        called = super().__call__
        return [e for _, asks in groupby(asked, lambda ask: ask.model) for e in called(t, *asks)]


class Step:
    """Training steps of one picture."""

    def __init__(self, options: argparse.Namespace, priors: tuple[Prior, Prior], repeats: int, naive: bool) -> None:
        self.rows, self.naive = (repeats if naive else 1), naive
        self.distiller = Distiller(*priors, manifest(options, repeats=1 if naive else repeats))
        self.images = pictures(1, options.side, options.device).repeat(self.rows, 1, 1, 1)

    def __call__(self) -> dict[str, Tensor]:
        with patch.object(distill, "ScoreModels", OneByOne if self.naive else ScoreModels):
            return self.distiller.train_step(self.images, [PROMPTS] * self.rows, range(self.rows))


class Part(NamedTuple):
    """A part of a step: a call with a number of rows, and the rows of each of its calls, in our and the naive step."""

    name: str
    call: Callable[[int], object]
    ours: Sequence[int]
    naive: Sequence[int]


def manifest(options: argparse.Namespace, repeats: int) -> Distill:
    training = {"width": options.width, "blocks": options.blocks, "warmup_steps": 0, "repeats": repeats}
    found = Manifest.model_validate(
        {
            "task": "distill",
            "name": "benchmark",
            "source": {"format": "folder", "urls": "none"},
            "model": "none",
            "style": {"prompt": "oil painting style"},
            "distill": training | {"images_per_step": 1},
            "output": {"path": "none"},
            "compute": {"pool": "local", "channels_last": options.channels_last},
        }
    )
    assert isinstance(found, Distill)
    return found


def parts(options: argparse.Namespace, priors: tuple[Prior, Prior], repeats: int) -> list[Part]:
    prior, style = priors
    generator = Generator.initialized(options.width, options.blocks, 0).to(prior.device)
    if options.channels_last:
        generator.to(memory_format=torch.channels_last)
    config = manifest(options, repeats).objective.fake
    fake = FakeScore(prior, config, [torch.Generator().manual_seed(0)])
    picture = pictures(1, options.side, options.device)
    z, text = prior.encode(picture), prior.embed([PROMPTS.target])
    half = prior.dtype == torch.bfloat16
    autocast = partial(torch.autocast, options.device, torch.bfloat16) if half else nullcontext

    def repeated(x: Tensor, rows: int) -> Tensor:
        return x.repeat(rows, *[1] * (x.ndim - 1))

    def generated(rows: int) -> None:
        with autocast():
            made = generator(repeated(picture, rows))
        made.backward(torch.ones_like(made))

    def encoded(rows: int, gradient: bool) -> None:
        images = repeated(picture, rows).requires_grad_(gradient)
        with autocast():
            found = prior.encode(images)
        if gradient:
            found.backward(torch.ones_like(found))

    def asked(rows: int, model: Prior, faked: float = 0.0) -> None:
        t, adapter = torch.full((rows,), 101, device=prior.device), fake.adapter(int(rows * faked)) if faked else None
        with torch.no_grad():
            model.noise(repeated(z, rows), t, repeated(text, rows), adapter)

    def learned(rows: int) -> None:
        t, eps = torch.full((rows,), 101, device=prior.device), torch.ones_like(repeated(z, rows))
        fake.add_gradient(fake.predict(repeated(z, rows), t, eps, repeated(text, rows)), t, eps, 1 / rows)

    guided = 2 * repeats
    return [
        Part("generator", generated, [1], [repeats]),
        Part("VAE, of the result", partial(encoded, gradient=True), [1], [repeats]),
        Part("VAE, of the source", partial(encoded, gradient=False), [1], [repeats]),
        Part("style score", partial(asked, model=style), [guided], [guided]),
        Part("fake and real score", partial(asked, model=prior, faked=0.5), [2 * guided], [guided, guided]),
        Part("fake score's training", learned, [repeats], [repeats]),
    ]


def counted(options: argparse.Namespace, repeats: int) -> list[tuple[str, int, int]]:
    """(part, FLOPs of our step, of the naive step), counted on torch's meta device."""
    on_meta = argparse.Namespace(**{**vars(options), "device": "meta", "precision": "fp32", "compile": False})
    found = []
    for part in parts(on_meta, engine(on_meta), repeats):
        row = flops(partial(part.call, 2)) // 2
        found.append((part.name, row * sum(part.ours), row * sum(part.naive)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 2, 4], help="B")
    parser.add_argument("--width", type=int, help="of the generator; 64, with tiny 16")
    parser.add_argument("--blocks", type=int, help="of the generator; 9, with tiny 3")
    parser.add_argument("--count", action="store_true", help="only count the FLOPs; nothing is computed")
    options = arguments(parser)
    options.width = options.width or (64 if options.model == "sd15" else 16)
    options.blocks = options.blocks or (9 if options.model == "sd15" else 3)
    print(header(options), f"generator of width {options.width} with {options.blocks} blocks", sep="; ")
    largest = max(options.repeats)
    work = {repeats: counted(options, repeats) for repeats in options.repeats}
    totals = {repeats: [sum(of_one[i] for of_one in found) for i in (1, 2)] for repeats, found in work.items()}
    if options.count:
        rows = [
            [f"{naive / ours:.2f}", str(repeats), f"{ours / 1e12:.4g}", f"{naive / 1e12:.4g}"]
            for repeats, (ours, naive) in totals.items()
        ]
        print(table(["naive / ours", "B", "TFLOP a step", "TFLOP, naive"], rows))
        rows = [
            [name, f"{ours / totals[largest][0]:.1%}", f"{ours / 1e12:.4g}", f"{naive / 1e12:.4g}"]
            for name, ours, naive in work[largest]
        ]
        print("", table([f"B = {largest}", "share", "TFLOP a step", "TFLOP, naive"], rows), sep="\n")
        return

    priors = engine(options)
    steps = {(b, naive): Step(options, priors, b, naive) for b in options.repeats for naive in (True, False)}
    for step in steps.values():
        step()  # kernels are chosen, graphs compiled
    best = interleaved({key: partial(seconds, step, options.device) for key, step in steps.items()}, options.rounds)
    rows = [
        [
            f"{best[b, True] / best[b, False]:.2f}",
            str(b),
            f"{best[b, False] * 1e3:.0f}",
            f"{best[b, True] * 1e3:.0f}",
            f"{totals[b][1] / totals[b][0]:.2f}",
        ]
        for b in options.repeats
    ]
    print(table(["x naive step", "B", "ms a step", "ms, naive", "x by FLOPs"], rows))

    measured = parts(options, priors, largest)

    def calls(part: Part, naive: bool) -> None:
        for rows in part.naive if naive else part.ours:
            part.call(rows)

    cases = {(part.name, naive): partial(calls, part, naive) for part in measured for naive in (False, True)}
    for case in cases.values():
        case()
    spent = interleaved({key: partial(seconds, case, options.device) for key, case in cases.items()}, options.rounds)
    rows = [
        [
            f"{spent[name, False] / best[largest, False]:.1%}",
            name,
            f"{spent[name, False] * 1e3:.0f}",
            f"{spent[name, True] * 1e3:.0f}",
            f"{ours / totals[largest][0]:.1%}",
        ]
        for name, ours, _ in work[largest]
    ]
    rest = [best[largest, naive] - sum(spent[part.name, naive] for part in measured) for naive in (False, True)]
    rows.append([f"{rest[0] / best[largest, False]:.1%}", "the rest", *(f"{value * 1e3:.0f}" for value in rest), ""])
    columns = ["share of our step", f"part, B = {largest}", "ms", "ms, naive", "share of the FLOPs"]
    print("", table(columns, rows), sep="\n")


if __name__ == "__main__":
    main()
