"""The cost of an image by batch, iterations, resolution and threads, relative to one case, side by side in one run.

    python benchmarks/cost.py
    python benchmarks/cost.py --device cuda --model sd15 --batches 1 2 4 8 16 --sides 384 512 768 --iterations 10 20 40

Measured are VAE encoding, the loop and VAE decoding, in our engine with the preset `released`. One factor varies at a
time from the base case, batch 4 and the first of each other list; on the CPU, each batch also runs on 1 and 2 threads.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import torch
from common import arguments, engine, header, interleaved, pictures, seconds, stylize, table

from smsbatch.manifest import Objective


class Case(NamedTuple):
    batch: int
    steps: int
    side: int
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--iterations", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--sides", type=int, nargs="+", help="pixels; half, once and twice the model's own")
    options = arguments(parser)
    sides = options.sides or [options.side, options.side // 2, options.side * 2]
    base = Case(4, options.iterations[0], sides[0], options.threads)

    prior, style = engine(options)
    cases = dict.fromkeys(
        [base]
        + [base._replace(batch=batch) for batch in options.batches]
        + [base._replace(steps=steps) for steps in options.iterations]
        + [base._replace(side=side) for side in sides]
    )
    if options.device == "cpu":
        cases |= dict.fromkeys(
            base._replace(batch=batch, threads=threads) for threads in (1, 2) for batch in options.batches
        )

    def measure(case: Case) -> float:
        torch.set_num_threads(case.threads)
        images = pictures(case.batch, case.side, options.device)
        return seconds(partial(stylize, prior, style, images, Objective(steps=case.steps)), options.device)

    for case in cases if options.compile or options.device == "cuda" else [base]:
        measure(case._replace(steps=2))  # kernels are chosen, graphs compiled
    best = interleaved({case: partial(measure, case) for case in cases}, options.rounds)
    reference = best[base] / base.batch
    rows = [
        [
            f"{value / case.batch / reference:.2f}",
            *map(str, case),
            f"{value / case.batch:.3f}",
            f"{value / case.batch / case.steps:.4f}",
        ]
        for case, value in best.items()
    ]
    columns = ["cost", "batch", "steps", "px", "threads", "seconds per image", "seconds per image and step"]
    print(header(options), table(columns, rows), sep="\n")


if __name__ == "__main__":
    main()
