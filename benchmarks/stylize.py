"""The waiting time of the device in `task: stylize`: a whole run against its parts alone, in one process, in turn.

    python benchmarks/stylize.py
    python benchmarks/stylize.py --device cuda --precision fp16 --width 64 --blocks 9 --side 512 --images 4096 \\
        --cores 16

Parts: the generator on decoded tensors in memory, forward only; decoding and fitting; encoding; each with all the
threads to itself. Run: `sb.run` in this process without metrics, from the first byte read to the last unit committed;
planning, loading the model and the report are left out. On the CPU all share the processors, so the run is compared to
the three parts one after the other; on a GPU to the generator alone. `idle_fraction` is the part of the time between
its first and its last batch in which the device had nothing to do. The sources are the embedded photographs, repeated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, arguments, device_name, interleaved, seconds, table

import smsbatch as sb
from smsbatch import tiny
from smsbatch.data import pixels
from smsbatch.generator.network import Generator
from smsbatch.manifest import Stylize
from smsbatch.runs.status import Status

FORWARD, DECODE, ENCODE, RUN, MEASURED = "forward", "decode", "encode", "run", "run with lpips"
QUALITY = 95


class Bench:
    """The pictures, the generator and a folder to run in; `cases` are the measurements, in seconds for all pictures.

    Attributes:
        idle_fraction: of the last run of each kind.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, threads: int) -> None:
        self.options, self.folder, self.threads = options, folder, threads
        self.idle_fraction: dict[str, float] = {}
        photos = sorted(Path(tiny.resolve("tiny:photos")).glob("*.jpg"))
        self.files = [photos[number % len(photos)].read_bytes() for number in range(options.images)]
        (folder / "photos").mkdir(exist_ok=True)
        for number, data in enumerate(self.files):
            (folder / "photos" / f"{number:06d}.jpg").write_bytes(data)
        torch.manual_seed(0)
        generator = Generator(options.width, options.blocks, about={"style": "none"})
        generator.save(folder / "generator")
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.generator = generator.requires_grad_(False).eval().to(options.device, DTYPES[options.precision])
        self.generator.to(memory_format=layout)
        self.forward = torch.compile(self.generator, dynamic=False) if options.compile else self.generator
        self.decoded = [self.decode(data) for data in self.files]
        images = torch.stack([torch.from_numpy(picture) for picture in self.decoded]).permute(0, 3, 1, 2).float() / 255
        self.batches = [
            batch.contiguous(memory_format=layout) for batch in images.to(options.device).split(options.batch)
        ]

    def decode(self, data: bytes) -> Any:
        return pixels.fit(pixels.decode(data), self.options.side, "center_crop")

    def encode(self, picture: Any) -> bytes:
        return pixels.encode(picture, "webp", QUALITY)

    @property
    def cases(self) -> dict[str, Callable[[], float]]:
        return {
            FORWARD: self._forward,
            DECODE: partial(self._mapped, self.decode, self.files),
            ENCODE: partial(self._mapped, self.encode, self.decoded),
            RUN: partial(self._run, RUN, ()),
            MEASURED: partial(self._run, MEASURED, ("lpips",)),
        }

    @torch.no_grad()
    def _forward(self) -> float:
        torch.set_num_threads(self.threads)

        def work() -> None:
            for batch in self.batches:
                self.forward(batch)

        return seconds(work, self.options.device)

    def _mapped(self, function: Callable[[Any], Any], items: list[Any]) -> float:
        with ThreadPoolExecutor(self.threads) as pool:
            return seconds(lambda: list(pool.map(function, items)), "cpu")

    def _run(self, name: str, metrics: tuple[str, ...]) -> float:
        options = self.options
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            manifest = Stylize.model_validate(
                {
                    "task": "stylize",
                    "name": "benchmark",
                    "generator": str(self.folder / "generator"),
                    "source": {"format": "folder", "urls": str(self.folder / "photos")},
                    "image": {"resolution": options.side, "fit": "center_crop"},
                    "output": {"path": f"{out}/out", "quality": QUALITY},
                    "metrics": metrics,
                    "compute": {
                        "pool": "local",
                        "threads": self.threads,
                        "batch_size": options.batch,
                        "precision": options.precision,
                        "channels_last": options.channels_last,
                        "compile": options.compile,
                    },
                }
            )

            def look(status: Status) -> None:
                for worker in status.workers:
                    if worker.idle_fraction is not None:
                        self.idle_fraction[name] = worker.idle_fraction

            return sb.run(manifest, look).wall_seconds


def measure(options: argparse.Namespace, threads: int) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="smsbatch-benchmark-") as folder:
        bench = Bench(options, Path(folder), threads)
        for warm in bench.cases.values() if options.device == "cuda" or options.compile else []:
            warm()
        best = interleaved(bench.cases, options.rounds)
    parts = best[FORWARD] if options.device == "cuda" else best[FORWARD] + best[DECODE] + best[ENCODE]
    rates = [f"{options.images / best[case]:.1f}" for case in (FORWARD, DECODE, ENCODE, RUN)]
    return [
        str(threads),
        *rates,
        f"{parts / best[RUN]:.2f}",
        f"{100 * bench.idle_fraction[RUN]:.1f} %" if RUN in bench.idle_fraction else "-",
        f"{options.images / best[MEASURED]:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="threads of torch, decoding and encoding")
    options = arguments(parser)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run takes a GPU where there is one
    against = "the generator alone" if options.device == "cuda" else "the three parts one after the other"
    print(
        f"{device_name(options.device)}, torch {torch.__version__}; generator of width {options.width} and "
        f"{options.blocks} blocks, {options.precision}, {options.images} images of {options.side} px in batches of "
        f"{options.batch}; best of {options.rounds} interleaved rounds; images per second; the run against {against}"
    )
    columns = ["threads", FORWARD, DECODE, ENCODE, RUN, "run / parts", "device waited", MEASURED]
    print(table(columns, [measure(options, threads) for threads in options.cores]))


if __name__ == "__main__":
    main()
