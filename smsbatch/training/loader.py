"""The training data: an endless shuffled stream of square crops, cut into steps and divided among the workers.

A *position* counts the pictures of a training, `step * images_per_step + i`. The sample at a position, its
crop and its substitute if it fails depend on the run's seed, the position and the index alone, neither on the number of
workers nor on the first step. Each worker reads and decodes only its own positions, in threads, a few steps ahead.
"""

from __future__ import annotations

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
from smsbatch.data.sample import Entry, cleaned, hashed_seed
from smsbatch.data.sources import load_sample
from smsbatch.errors import RunError, SampleError
from smsbatch.manifest import Distill

# A group of the index is read together: another size gives another order. The groups of a shuffle block are shuffled
# together: enough rows to spread those of one tar, few enough for every worker to hold their entries (21 MB for tars
# with three fields a sample). Smaller sources are shuffled as a whole.
GROUP_ROWS = 8192
SHUFFLE_ROWS = 8 * GROUP_ROWS
TRIES = 16  # failed samples in a row after which the whole source counts as unusable
THREADS = 8  # they wait for storage, or decode without the GIL
AHEAD = 16  # decoded pictures to hold ready, at least; and at least two steps


def position_seed(run_seed: int, position: int) -> int:
    """The seed of everything random at a position: 63 bits of SHA-256 over the run's seed and the position."""
    return hashed_seed(f"{run_seed}:position:{position}")


def _draws(seed: int, number: int) -> NDArray[np.uint64]:
    """Raw bits: numpy's distributions may change from version to version, and a resumed run must draw the same."""
    return np.random.PCG64(seed).random_raw(number)


class ShuffleBlock(NamedTuple):
    """The index rows at the positions from `start` on, in order; `groups` are the groups that hold them."""

    start: int
    rows: NDArray[np.int64]
    groups: list[int]


class SampleOrder:
    """Maps positions to rows of the index: epoch after epoch, each with every row once.

    A pure function of both arguments; any position costs one shuffle block. Every epoch permutes the groups of rows
    and shuffles the rows of a few consecutive groups together.
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
        """The shuffle block of this position."""
        last = self._last
        if last is None or not last.start <= position < last.start + len(last.rows):
            self._last = last = self._shuffled(*divmod(position, self.samples))
        return last

    def _shuffled(self, epoch: int, place: int) -> ShuffleBlock:
        groups = self._permutation(f"epoch:{epoch}", -(-self.samples // GROUP_ROWS))
        sizes = np.minimum(GROUP_ROWS, self.samples - groups * GROUP_ROWS)
        ends = np.cumsum(sizes)  # one group may be shorter, at any place
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
        return np.argsort(_draws(hashed_seed(f"{self.seed}:{name}"), length), kind="stable")


@dataclass(frozen=True)
class Batch:
    """A worker's pictures of one step.

    Attributes:
        images: [n, resolution, resolution, 3] uint8.
        rows: of the index; a substitute's where a sample failed.
        seeds: `position_seed` of the positions.
        failed: key, error code and message of the samples that failed and were replaced.
    """

    step: int
    images: pixels.Pixels
    captions: list[str]
    keys: list[str]
    rows: list[int]
    seeds: list[int]
    failed: list[tuple[str, str, str]]


class _Opened(NamedTuple):
    """A shuffle block and its entries, as tables by group."""

    shuffle_block: ShuffleBlock
    groups: dict[int, Future[Any]]

    def entry(self, row: int) -> Entry:
        return from_table(self.groups[row // GROUP_ROWS].result().slice(row % GROUP_ROWS, 1))[0]


class _Picture(NamedTuple):
    """The picture at one position, after any substitution."""

    square: pixels.Pixels
    caption: str
    key: str
    row: int
    seed: int
    failed: list[tuple[str, str, str]]


class TrainingLoader:
    """The batches of worker `rank` of `workers`, from `first_step` to the last one of `manifest.distill`.

    A context manager: reading stops when it is left. In memory are one shuffle block's entries, two at its end, and the
    pictures ahead.

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
        self._reader = Reader.of(manifest.source, manifest.storage, manifest.output.path)
        self._order = SampleOrder(samples, manifest.seed)
        self._opened: _Opened | None = None
        self._closed = threading.Event()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="smsbatch-loader")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # Without waiting: a thread that hangs on a dead server would hold up a worker that is asked to leave.
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
            # Submitted before the pictures that wait for them, so that waiting pictures never block the reads.
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
            substitute = hashed_seed(f"{seed}:substitute:{len(failed)}") % len(rows)
            row = int(rows[substitute if failed else position - start])
            entry = opened.entry(row)
            try:
                sample = load_sample(entry, self._manifest.source, self._reader, self._manifest.seed)
                return _Picture(self._square(sample.image, seed), sample.caption, entry.key, row, seed, failed)
            except SampleError as error:
                failed.append((entry.key, error.code, cleaned(str(error))))
        key, code, message = failed[-1]
        raise RunError(f"{TRIES} samples in a row failed, the last was {key} ({code}: {message}); check source.urls")

    def _square(self, data: bytes, seed: int) -> pixels.Pixels:
        image = self._manifest.image
        zoom, x, y, flip = (_draws(seed, 4) / 2.0**64).tolist()
        with pixels.decoded(data, min_side=image.min_side, max_pixels=image.max_pixels) as picture:
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
