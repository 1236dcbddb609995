"""The time of an image, percentages first: by phase of our engine, and by kind of operator.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --device cuda --model sd15 --batch 8

Clocks around the package's own functions time the phases, each without the phases inside it; on CUDA they wait for the
device at every boundary, which prevents overlap. `--steps` iterations of the preset `released` are measured and scaled
to 500, and added to the costs once per image. Operators are those of torch's profiler in the loop alone: self time, of
the device on CUDA. If the device's time is well below the loop's, the loop waits for Python.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from common import PROMPTS, arguments, engine, finish, header, pictures, seconds, table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from smsbatch.diffusion import objectives
from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.spectrum import SpectralPenalty
from smsbatch.manifest import Objective
from smsbatch.metrics import METRICS

RUN = 500
MADE, REST = "fake score, made", "draws, noising and the rest"
KINDS = {  # an operator is of the first kind with a word in the operator's name
    "attention": ("attention", "fmha", "flash"),
    "convolution": ("conv", "cudnn", "xdnn", "implicit_gemm", "wgrad", "dgrad", "fprop"),
    "matrix product": ("mm", "gemm", "addmm", "linear", "cutlass", "nvjet", "dot"),
    "normalization": ("norm",),
    "optimizer": ("foreach", "multi_tensor", "adam"),
    "copies and memory": ("copy", "cat", "clone", "empty", "fill", "zero", "memcpy", "memset", "contiguous", "resize"),
}


class Clock:
    """Seconds by phase; an outer phase excludes the phases nested in it."""

    def __init__(self, device: str) -> None:
        self.spent: Counter[str] = Counter()
        self._device, self._open, self._since = device, [REST], perf_counter()

    def _turn(self) -> None:
        finish(self._device)
        now = perf_counter()
        self.spent[self._open[-1]] += now - self._since
        self._since = now

    def around(self, phase: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._turn()
            self._open.append(phase if isinstance(phase, str) else phase(*arguments))
            try:
                return function(*arguments, **keywords)
            finally:
                self._turn()
                self._open.pop()

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    options = arguments(parser)
    prior, style = engine(options)
    images = pictures(options.batch, options.side, options.device)
    lpips = METRICS["lpips"]()
    prompts, seeds = [PROMPTS] * options.batch, range(options.batch)

    def loop(steps: int) -> torch.Tensor:
        return optimize(prior, style, prior.encode(images), prompts, seeds, Objective(steps=steps)).z

    def once() -> None:
        z = prior.encode(images)
        prior.embed([PROMPTS.target, PROMPTS.edit, ""])
        lpips(images, torch.cat([prior.decode(row[None], (options.side, options.side)) for row in z]))

    def scores(called: Prior, *_: Any) -> str:
        if called is style:
            return "style score, forward"
        return "fake score's training, forward" if torch.is_grad_enabled() else "fake and real score, forward"

    places: list[tuple[Any, str, str | Callable[..., str]]] = [
        (Prior, "noise", scores),
        (FakeScore, "__init__", MADE),
        (FakeScore, "learn", "fake score's training, backward"),
        (torch.optim.AdamW, "step", "optimizers"),
        (SpectralPenalty, "gradient", "spectral term"),
        (objectives, "relevance_map", "relevance map, without its scores"),
        (Prior, "embed", "text encoder"),
        (Prior, "encode", "VAE, encoding"),
        (Prior, "decode", "VAE, decoding"),
        (type(lpips), "__call__", "LPIPS"),
    ]
    loop(2), once()
    spent: Counter[str] = Counter()
    for _ in range(options.rounds):
        for work, times in ((partial(loop, options.steps), RUN / options.steps), (once, 1)):
            with ExitStack() as patched:
                clock = Clock(options.device)
                for owner, name, phase in places:
                    patched.enter_context(patch.object(owner, name, clock.around(phase, getattr(owner, name))))
                work()
                clock._turn()
            elsewhere = {"text encoder", "VAE, encoding"} if work is not once else {REST}
            for phase, value in clock.spent.items():
                if phase not in elsewhere:
                    spent[phase] += value * (1 if phase == MADE else times)
    total = sum(spent.values())
    rows = [
        [f"{value / total:.1%}", phase, f"{value / options.rounds / options.batch:.3f}"]
        for phase, value in spent.most_common()
    ]
    print(header(options), table(["share", "phase", f"seconds per image of {RUN} iterations"], rows), sep="\n")
    print()
    print(operators(loop, options))


def operators(loop: Callable[[int], Any], options: argparse.Namespace) -> str:
    """The table by kind of operator."""
    cuda = options.device == "cuda"
    alone = seconds(partial(loop, options.steps), options.device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        loop(options.steps)
        finish(options.device)
    kinds: Counter[str] = Counter()
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time is already in the operator that launched it
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        kind = next(
            (kind for kind, words in KINDS.items() if any(word in name for word in words)), "element by element"
        )
        kinds[kind] += time / 1e6
    total = sum(kinds.values())
    rows = [[f"{value / total:.1%}", kind] for kind, value in kinds.most_common()]
    note = f"\n\nOperators {total:.2f} s; the loop without the profiler {alone:.2f} s."
    return table(["share", "operators"], rows) + note


if __name__ == "__main__":
    main()
