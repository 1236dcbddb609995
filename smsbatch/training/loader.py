"""What a generator is trained on: an endless shuffled stream of squares, cut into steps and shared out among workers.

A *position* counts the pictures of a training, `step * images_per_step + i`. Which sample stands there, how it is
cropped and by what it is replaced if it fails depends on the run's seed, the position and the index alone: neither on
how many workers there are nor on where one of them starts. Each reads and decodes only its own positions, in threads,
a few steps ahead.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from smsbatch.data import pixels
from smsbatch.data.index import StoredFile, from_table, read_index_table
from smsbatch.data.reader import Reader
from smsbatch.data.sample import Entry
from smsbatch.data.sources import load_sample
from smsbatch.errors import RunError, SampleError
from smsbatch.manifest import Distill

__all__ = ["Batch", "SampleOrder", "TrainingLoader", "position_seed"]

# Rows that are read together, the groups of the index: another number is another order. Rows that are shuffled together
# are a pool: enough for those of one tar not to meet, few enough for every worker to hold their entries (21 MB, of tars
# with three fields a sample). Smaller sources are shuffled as a whole.
GROUP_ROWS = 8192
SHUFFLE_ROWS = 8 * GROUP_ROWS
TRIES = 16  # samples in a row that cannot be had before the source as a whole is not to be trusted
THREADS = 8  # they wait for storage, or decode without Python's lock
AHEAD = 16  # pictures that wait decoded, at least; and two steps


def position_seed(run_seed: int, position: int) -> int:
    """The seed of all that is random about a position, 63 bits of SHA-256 over it and the run's seed."""
    return _hashed(f"{run_seed}:position:{position}")


def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _draws(seed: int, number: int) -> NDArray[np.uint64]:
    """Raw bits: what numpy makes of them may change from version to version, and a resumed run must find the same."""
    return np.random.PCG64(seed).random_raw(number)


class ShuffleBlock(NamedTuple):
    """Rows of the index that stand at the positions from `start`, in their order; `groups` are where they lie."""

    start: int
    rows: NDArray[np.int64]
    groups: list[int]


class SampleOrder:
    """Positions to rows of the index: epoch after epoch, each of which has every row once.

    A pure function of both arguments, with the cost of a pool for any position. In every epoch blocks of rows are
    permuted, and a few of them that follow each other are shuffled together.
    """

    def __init__(self, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError("no samples to put in order")
        self.samples, self.seed = samples, seed
        self._last: ShuffleBlock | None = None

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows at positions [start, stop)."""
        found: list[int] = []
        while start < stop:
            shuffle_block = self.shuffle_block(start)
            found += shuffle_block.rows[start - shuffle_block.start : stop - shuffle_block.start].tolist()
            start = shuffle_block.start + len(shuffle_block.rows)
        return found

    def shuffle_block(self, position: int) -> ShuffleBlock:
        """The pool that has this position."""
        last = self._last
        if last is None or not last.start <= position < last.start + len(last.rows):
            self._last = last = self._shuffled(*divmod(position, self.samples))
        return last

    def _shuffled(self, epoch: int, place: int) -> ShuffleBlock:
        groups = self._permutation(f"epoch:{epoch}", -(-self.samples // GROUP_ROWS))
        sizes = np.minimum(GROUP_ROWS, self.samples - groups * GROUP_ROWS)
        ends = np.cumsum(sizes)  # only one of the blocks is shorter, but nobody knows where it is
        first = (
            int(np.searchsorted(ends, place, side="right"))
            // (SHUFFLE_ROWS // GROUP_ROWS)
            * (SHUFFLE_ROWS // GROUP_ROWS)
        )
        chosen = slice(first, first + SHUFFLE_ROWS // GROUP_ROWS)
        ordered = np.add.outer(groups[chosen] * GROUP_ROWS, np.arange(GROUP_ROWS)).ravel()
        ordered = ordered[ordered < self.samples]
        start = epoch * self.samples + int(ends[first] - sizes[first])
        return ShuffleBlock(
            start, ordered[self._permutation(f"epoch:{epoch}:{first}", len(ordered))], groups[chosen].tolist()
        )

    def _permutation(self, name: str, length: int) -> NDArray[np.int64]:
        return np.argsort(_draws(_hashed(f"{self.seed}:{name}"), length), kind="stable")


@dataclass(frozen=True)
class Batch:
    """A worker's pictures of one step.

    Attributes:
        images: [n, resolution, resolution, 3] uint8.
        rows: of the index; those of substitutes where samples failed.
        seeds: `position_seed` the positions.
        failed: key, error code and message of the samples that could not be had, and were replaced by others.
    """

    step: int
    images: pixels.Pixels
    captions: list[str]
    keys: list[str]
    rows: list[int]
    seeds: list[int]
    failed: list[tuple[str, str, str]]


class _Opened(NamedTuple):
    """A pool and its entries, as tables by block."""

    shuffle_block: ShuffleBlock
    groups: dict[int, Future[Any]]

    def entry(self, row: int) -> Entry:
        return from_table(self.groups[row // GROUP_ROWS].result().slice(row % GROUP_ROWS, 1))[0]


class _Picture(NamedTuple):
    """What stands at one position in the end."""

    square: pixels.Pixels
    caption: str
    key: str
    row: int
    seed: int
    failed: list[tuple[str, str, str]]


class TrainingLoader:
    """The batches of worker `rank` of `workers`, from `first_step` to the last one of `manifest.distill`.

    A context manager: reading stops when it is left. In memory are one pool's entries, two at its end, and the pictures
    ahead.

    Raises, while it is iterated:
        RunError: so many samples in a row failed that there is nothing to train on.
        StorageError: the index or the source's store cannot be read.
    """

    def __init__(
        self,
        manifest: Distill,
        index: StoredFile | Path,
        samples: int,
        rank: int = 0,
        workers: int = 1,
        first_step: int = 0,
    ) -> None:
        images = manifest.distill.images_per_step
        if images % workers:
            raise ValueError(f"{images} images of a step cannot be divided among {workers} workers")
        self._manifest, self._index, self._first_step = manifest, index, first_step
        self._own = range(rank * images // workers, (rank + 1) * images // workers)
        self._reader = Reader(manifest.storage, manifest.source.max_bytes)
        self._order = SampleOrder(samples, manifest.seed)
        self._opened: _Opened | None = None
        self._closed = threading.Event()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="smsbatch-feed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # Not waited for: one that hangs on a dead server would hold up a worker that is asked to leave.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        ahead = max(2, -(-AHEAD // len(self._own)))
        waiting: deque[tuple[int, list[Future[_Picture]]]] = deque()
        for step in range(self._first_step, self._manifest.distill.all_steps):
            waiting.append((step, [self._begin(step * self._manifest.distill.images_per_step + i) for i in self._own]))
            if len(waiting) > ahead:
                yield _batch(*waiting.popleft())
        while waiting:
            yield _batch(*waiting.popleft())

    def _begin(self, position: int) -> Future[_Picture]:
        shuffle_block = self._order.shuffle_block(position)
        if self._opened is None or self._opened.shuffle_block.start != shuffle_block.start:
            # Before the pictures that wait for them: a thread that waits leaves the reading to an earlier one.
            known = self._opened.groups if self._opened else {}
            groups = {
                group: known.get(group) or self._threads.submit(self._read, group) for group in shuffle_block.groups
            }
            self._opened = _Opened(shuffle_block, groups)
        return self._threads.submit(self._picture, position, self._opened)

    def _read(self, group: int) -> Any:
        return read_index_table(self._index, group * GROUP_ROWS, (group + 1) * GROUP_ROWS)

    def _picture(self, position: int, opened: _Opened) -> _Picture:
        seed, (start, rows, _) = position_seed(self._manifest.seed, position), opened.shuffle_block
        failed: list[tuple[str, str, str]] = []
        while len(failed) < TRIES:
            if self._closed.is_set():
                raise CancelledError
            substitute = _hashed(f"{seed}:substitute:{len(failed)}") % len(rows)
            row = int(rows[substitute if failed else position - start])
            entry = opened.entry(row)
            try:
                sample = load_sample(entry, self._manifest.source, self._reader)
                return _Picture(self._square(sample.image, seed), sample.caption, entry.key, row, seed, failed)
            except SampleError as error:
                failed.append((entry.key, error.code, str(error)))
        key, code, message = failed[-1]
        raise RunError(f"{TRIES} samples in a row failed, the last was {key} ({code}: {message}); check source.urls")

    def _square(self, data: bytes, seed: int) -> pixels.Pixels:
        image = self._manifest.image
        zoom, x, y, flip = (_draws(seed, 4) / 2.0**64).tolist()
        picture = pixels.decode(data, min_side=image.min_side, max_pixels=image.max_pixels)
        return pixels.crop(picture, image.resolution, 1 + (image.zoom - 1) * zoom, x, y, image.flip and flip < 0.5)


def _batch(step: int, begun: list[Future[_Picture]]) -> Batch:
    pictures = [picture.result() for picture in begun]
    return Batch(
        step,
        np.stack([picture.square for picture in pictures]),
        [picture.caption for picture in pictures],
        [picture.key for picture in pictures],
        [picture.row for picture in pictures],
        [picture.seed for picture in pictures],
        [failure for picture in pictures for failure in picture.failed],
    )
