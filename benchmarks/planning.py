"""The cost of planning: seconds and peak memory of the driver for synthetic sources of 10^4 to 10^7 samples.

    python benchmarks/planning.py [--sizes 10000 100000 1000000 10000000]

Only the scan is synthetic: two processes make up the entries of tars with 1,000 samples each (a jpg and a txt of some
bytes), as a backend's scans would return them; no tar is read. The rest is as in a run: the entries become tables, the
tables one index whose keys are proven unique, the samples units, and all three files of the plan are stored on the
local disk. Every size is measured in a process of its own; memory is the sum of the peaks of that process and of the
two that scan. On a machine with other work use the CPU seconds: on two cores, `seconds` is at least half of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import pyarrow as pa

from smsbatch.data.index import Part, to_table
from smsbatch.data.indexing import build_index
from smsbatch.data.sample import Entry, Span
from smsbatch.runs.plan_files import cut, write_plan
from smsbatch.storage.store import Store

SIZES = (10**4, 10**5, 10**6, 10**7)
SAMPLES_PER_TAR, SAMPLES_PER_SHARD, SAMPLES_PER_UNIT = 1000, 1000, 64
PROCESSES = 2


class Measured(NamedTuple):
    """`cpu` is seconds of all processes; `memory` and `stored` are bytes: the peak of all, and the plan's files."""

    samples: int
    seconds: float
    cpu: float
    memory: int
    stored: int


def tar(number: int) -> Part:
    return Part("webdataset", f"s3://bucket/some/dataset/train/{number:05d}.tar", 10**8, f"{number:032x}-12")


def scanned(number: int) -> pa.Table:
    """The index of a made-up tar."""
    _, url, _, etag = tar(number)
    entries = []
    for row in range(SAMPLES_PER_TAR):
        offset, length = row * 102_400 + 512, 90_000 + (row * 7919 + number) % 10_000
        fields = {"jpg": Span(url, offset, length, etag), "txt": Span(url, offset + 101_376, 60 + row % 50, etag)}
        entries.append(Entry(f"{number:05d}{row:04d}", "jpg", fields))
    return to_table(entries)


def measure(samples: int) -> Measured:
    """Plan `samples` samples, a multiple of a tar's."""
    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(PROCESSES) as scans:
        store, path = Store(Path(folder, "run")), Path(folder, "samples.parquet")
        tars = range(samples // SAMPLES_PER_TAR)
        # As many at a time as a backend would submit, so that results do not pile up in memory.
        tables = (table for some in batches(tars) for table in scans.map(scanned, some, chunksize=8))
        built = build_index(path, tables, None)
        assert built.samples == samples
        units = list(cut(built.samples, SAMPLES_PER_UNIT, SAMPLES_PER_SHARD))
        write_plan(store, [tar(number) for number in tars], path, units)
        seconds = perf_counter() - began
        stored = sum(store.size(name) or 0 for name in store.list("plan"))
    own, scanning = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, scanning))
    return Measured(samples, seconds, cpu, (own.ru_maxrss + PROCESSES * scanning.ru_maxrss) * 1024, stored)


def batches(numbers: range, size: int = 512) -> list[range]:
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="samples, multiples of 1,000")
    sizes = parser.parse_args().sizes
    print(f"{platform.machine()}, Python {platform.python_version()}, pyarrow {pa.__version__}")
    print("   samples  seconds  seconds per million  CPU seconds  peak memory, MB  plan, MB")
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            samples, seconds, cpu, memory, stored = process.submit(measure, size).result()
        rate = seconds / samples * 1e6
        print(f"{samples:10,}  {seconds:7.1f}  {rate:19.1f}  {cpu:11.1f}  {memory / 1e6:15,.0f}  {stored / 1e6:8,.1f}")


if __name__ == "__main__":
    main()
