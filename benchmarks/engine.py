"""Our engine against a plain loop, which is the authors' script, at equal arithmetic, side by side.

    python benchmarks/engine.py                        # the embedded model on the CPU
    python benchmarks/engine.py --check                # only that both loops compute the same
    python benchmarks/engine.py --model sd15 --count   # only the FLOPs; nothing is computed

On an H100, Stable Diffusion 1.5's architecture at 512 px (random weights, made on the device, no file is read):

    python benchmarks/engine.py --device cuda --model sd15 --check
    python benchmarks/engine.py --device cuda --model sd15 --precision bf16
    python benchmarks/engine.py --device cuda --model sd15 --precision bf16 --channels-last
    python benchmarks/engine.py --device cuda --model sd15 --precision bf16 --channels-last --compile

Both use the preset `released`, with guidance 4.5 on both scores. `--steps` iterations are measured, and images
per hour are of runs of 500: 3600 / (encoding and decoding + 500 x seconds per iteration), without loading and
compiling.

The floor is the arithmetic without waste, 7 sample-forwards and 1 sample-backward an iteration, as torch counts it,
at the speed of a large matrix product of the same precision and threads, measured in the same run; on an H100 also at
the 989 TFLOP/s of its data sheet. "Of the floor" is floor / time, of the loop alone. Peak memory is measured in a
process of its own for every row: the allocator's on CUDA; on Linux the resident memory beyond that of the imports.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from common import (
    PROMPTS,
    Parts,
    arguments,
    engine,
    finish,
    flops,
    header,
    interleaved,
    measured_peak,
    nominal_peak,
    parts,
    pictures,
    prior_of,
    seconds,
    style_deltas,
    table,
)
from plain_loop import PlainLoop
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.objectives import OBJECTIVES, Matching
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.scores import ScoreModels
from smsbatch.manifest import Objective

RUN = 500  # iterations of the released constants
TOLERANCE = 1e-3  # of the gradient's norm, fp32: guidance multiplies the rounding of two nearly equal predictions


class Plain:
    """The plain loop, for one image."""

    name, batch = "plain loop", 1

    def __init__(self, options: argparse.Namespace, model: Parts | None = None) -> None:
        model = model or parts(options.model, options.device)
        self.prior, self.images = prior_of(model), pictures(1, options.side, options.device)
        self.plain = PlainLoop(model, style_deltas(options.model, model.unet))
        self.z_src = self.prior.encode(self.images)
        self.texts = [self.prior.embed([prompt]) for prompt in (PROMPTS.target, PROMPTS.edit, "")]

    def loop(self, steps: int) -> Tensor:
        return self.plain(self.z_src, *self.texts, seed=0, steps=steps)


class Engine:
    """Our loop, for a batch."""

    name = "engine"

    def __init__(self, options: argparse.Namespace, batch: int, priors: tuple[Prior, Prior] | None = None) -> None:
        self.prior, self.style = priors or engine(options)
        self.batch, self.images = batch, pictures(batch, options.side, options.device)
        self.z_src = self.prior.encode(self.images)

    def loop(self, steps: int) -> Tensor:
        prompts, seeds, config = [PROMPTS] * self.batch, range(self.batch), Objective(steps=steps)
        return optimize(self.prior, self.style, self.z_src, prompts, seeds, config).z


def around(case: Plain | Engine) -> None:
    """The work on images outside the loop; decoding goes one at a time, as in the package."""
    for z in case.prior.encode(case.images):
        case.prior.decode(z[None], (case.images.shape[-2], case.images.shape[-1]))


def difference(model: Parts, options: argparse.Namespace, steps: int = 4) -> list[float]:
    """The difference of the two loops' gradients, relative to their norm, in each of the first iterations of a run.

    Both run in fp32 and eagerly, from the same seed. The first step's learning rate is zero; later gradients depend on
    the previous ones and on the LoRA's training.
    """
    exact = argparse.Namespace(**{**vars(options), "precision": "fp32", "channels_last": False, "compile": False})
    gradients: dict[str, list[Tensor]] = {"plain loop": [], "engine": []}

    class Recording(Matching):
        def gradient(self, *arguments: object) -> tuple[Tensor, Tensor]:
            gradient, loss = super().gradient(*arguments)
            gradients["engine"].append(gradient)
            return gradient, loss

    plain, ours = Plain(exact, model), Engine(exact, 1, engine(exact, model))
    plain.plain(plain.z_src, *plain.texts, 0, steps, trace=lambda gradient, _: gradients["plain loop"].append(gradient))
    with patch.dict(OBJECTIVES, sms=Recording):
        ours.loop(steps)
    return [
        float((mine - theirs).norm() / theirs.norm())
        for mine, theirs in zip(gradients["engine"], gradients["plain loop"], strict=True)
    ]


def peak_memory(options: argparse.Namespace, batch: int | None) -> int | None:
    """The peak memory of one row in bytes, without building its models; None if the system does not report it."""
    torch.set_num_threads(options.threads)
    before = _resident("VmRSS")
    case = Plain(options) if batch is None else Engine(options, batch)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif before is not None:
        Path("/proc/self/clear_refs").write_text("5")
    case.loop(2)
    around(case)
    finish(options.device)
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    highest = _resident("VmHWM")
    return None if highest is None or before is None else highest - before


def _resident(which: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), None)


def in_a_process_of_its_own(options: argparse.Namespace, batch: int | None) -> int | None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_memory, options, batch).result()


def count(options: argparse.Namespace) -> tuple[int, int]:
    """FLOPs of one iteration for one image, (plain loop, ours), counted on torch's meta device: nothing is computed.

    The plain loop has in addition the unused half of its training step, as costly as the used one.
    """
    on_meta = argparse.Namespace(**{**vars(options), "device": "meta", "precision": "fp32", "compile": False})
    case, config = Engine(on_meta, 1), Objective()
    fake = FakeScore(case.prior, config.fake, [torch.Generator()])
    scores = ScoreModels(case.prior, case.style, fake, [PROMPTS])
    objective = OBJECTIVES[config.name](config, case.prior.schedule, case.z_src)
    t, eps = torch.tensor([101]).to("meta"), torch.empty_like(case.z_src)
    for model, words in product(("style", "real"), ("target", "edit", "null")):
        scores.text(model, words)  # embedded once in a run, not in every iteration

    def gradient() -> None:
        with torch.no_grad():
            objective.gradient(case.z_src, t, eps, scores)

    asked = flops(gradient)
    trained = flops(lambda: fake.train_step(case.z_src, t, eps, scores.text("fake", "target")))
    return asked + 2 * trained, asked + trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--steps", type=int, default=10, help="iterations measured")
    parser.add_argument("--check", action="store_true", help="only check that both loops compute the same gradients")
    parser.add_argument("--count", action="store_true", help="only count the FLOPs; nothing is computed")
    options = arguments(parser)
    print(header(options))
    plain_work, floor = count(options)
    work = (
        f"An image of {RUN} iterations: plain loop {plain_work * RUN / 1e12:.4g} TFLOP, "
        f"ours {floor * RUN / 1e12:.4g} TFLOP ({plain_work / floor:.3f} times fewer)."
    )
    if options.count:
        print(work)
        return
    if options.check:
        torch.backends.cudnn.allow_tf32 = False
        apart = difference(parts(options.model, options.device), options)
        print("gradients apart, relative to their norm:", ", ".join(f"{value:.1e}" for value in apart))
        assert max(apart) < TOLERANCE, f"the loops differ by more than {TOLERANCE}"
        return

    memory = {batch: in_a_process_of_its_own(options, batch) for batch in (None, *options.batches)}
    model = parts(options.model, options.device)
    plain = Plain(options, model)
    peak, nominal = measured_peak(options.device, options.precision), nominal_peak(options.device, options.precision)
    priors = engine(options, model)
    cases = {None: plain} | {batch: Engine(options, batch, priors) for batch in options.batches}
    for case in cases.values():
        case.loop(2)  # kernels are chosen, graphs compiled
        around(case)
    loops = interleaved(
        {key: partial(seconds, partial(case.loop, options.steps), options.device) for key, case in cases.items()},
        options.rounds,
    )
    rest = interleaved(
        {key: partial(seconds, partial(around, case), options.device) for key, case in cases.items()}, options.rounds
    )

    rates, rows = {}, []
    for key, case in cases.items():
        iteration = loops[key] / options.steps / case.batch
        rates[key] = 3600 / (rest[key] / case.batch + RUN * iteration)
        used = memory[key]
        row = [
            f"{rates[key] / rates[None]:.2f}",
            f"{floor / peak / iteration:.0%}",
            *([f"{floor / nominal / iteration:.0%}"] if nominal else []),
            case.name,
            str(case.batch),
            f"{rates[key]:.1f}",
            f"{iteration * 1e3:.1f}",
            "" if used is None else f"{used / 1e9:.2f} GB",
        ]
        rows.append(row)
    against = ["of the floor", *(["of the floor, data sheet"] if nominal else [])]
    columns = [
        "x plain loop",
        *against,
        "loop",
        "batch",
        "images per hour",
        "ms per image's step",
        "peak memory",
    ]
    print(table(columns, rows))
    print(f"\n{work} Measured peak {peak / 1e12:.3g} TFLOP/s.")


if __name__ == "__main__":
    main()
