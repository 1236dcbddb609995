"""What batching and threads are worth: seconds per step and image of the optimization loop, side by side in one run.

    python benchmarks/batching.py [--steps 8] [--side 128]

Every row is measured in turn, `ROUNDS` times over, and the best round counts: the machine's other work only ever adds.
"""

from __future__ import annotations

import argparse
import platform
from time import perf_counter

import torch

from smsbatch.diffusion.lora import read_style_lora
from smsbatch.diffusion.objectives import Texts
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.prior import Prior
from smsbatch.manifest import Objective

ROUNDS = 3
BATCHES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="pixels of the square images")
    arguments = parser.parse_args()

    prior = Prior.load("tiny")
    style = prior.with_deltas(read_style_lora("tiny:styles/oil.safetensors", prior.layers()))
    config = Objective(steps=arguments.steps)

    def seconds(batch: int, threads: int) -> float:
        """Seconds per step and image."""
        torch.set_num_threads(threads)
        images = torch.rand(batch, 3, arguments.side, arguments.side, generator=torch.Generator().manual_seed(0))
        texts = Texts(*(prior.embed([prompt] * batch) for prompt in ("oil painting style", "Turn into oil", "")))
        z = prior.encode(images)
        began = perf_counter()
        optimize(prior, style, z, texts, list(range(batch)), config)
        return (perf_counter() - began) / batch / arguments.steps

    cases = [(batch, threads) for threads in (1, 2) for batch in BATCHES]
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(ROUNDS):
        for case in cases:
            best[case] = min(best[case], seconds(*case))

    reference = best[1, 1]
    print(f"{platform.machine()}, torch {torch.__version__}, {arguments.side} px, {arguments.steps} steps")
    print("ratio  batch  threads  seconds per step and image")
    for (batch, threads), value in best.items():
        print(f"{reference / value:5.2f}  {batch:5}  {threads:7}  {value:.4f}")


if __name__ == "__main__":
    main()
