"""The worker, the same in every pool: it reads, stylizes, commits and publishes units."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING

from smsbatch.data.index import read_index
from smsbatch.data.reader import Reader, public
from smsbatch.data.sample import Entry, Outcome, Sample, Unit
from smsbatch.data.sources import load_sample
from smsbatch.errors import RequestError, SampleError
from smsbatch.manifest import Dataset
from smsbatch.runs.plan import Estimate
from smsbatch.runs.records import Commit
from smsbatch.runs.run import Run
from smsbatch.runs.status import Progress

if TYPE_CHECKING:
    from smsbatch.workers.stylizer import Stylizer

_READERS = 16  # threads that wait for a store or a web server


class Cancelled(Exception):
    """The worker was asked to drop its units in flight."""


def require_version(driver_version: str, who: str) -> None:
    """Refuse to work for a driver of another version of smsbatch, whose manifest would not fit.

    Raises:
        RequestError: it is of another version; names both.
    """
    ours = version("smsbatch")
    if driver_version != ours:
        told = f"{who} has smsbatch {ours}, the driver has {driver_version}"
        raise RequestError(f"{told}; install the same version on every node")


@dataclass(frozen=True)
class WorkItem:
    """A unit to compute: in generation 0 all samples, in a later one those that failed with one of the `codes`."""

    unit: Unit
    generation: int = 0
    codes: Collection[str] = ()


class Worker:
    """Loads the models once in `setup`, then processes any number of units.

    `process` may be called from several threads at once: one computes, while the others read and decode the next units
    or encode and commit the previous ones. There is no other prefetching between units, and none is needed.

    Args:
        device: "cuda" or "cpu"; None is CUDA if this process sees a GPU. In an actor, "cuda" is the GPU that Ray has
            reserved for it: Ray sets CUDA_VISIBLE_DEVICES, so that the process sees no other.
    """

    def __init__(self, manifest: Dataset, name: str, device: str | None = None) -> None:
        self.manifest, self.name, self._device = manifest, f"{socket.gethostname()}-{name}", device
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="smsbatch-read")
        self._showing = threading.Lock()
        self._cancelled = threading.Event()
        self._stylizer: Stylizer | None = None
        self.run: Run | None = None  # set by a pool in the driver's process
        self._progress = Progress(self.name, None)

    def setup(self, driver_version: str = "") -> None:
        """Load the models. Not in the constructor, because Ray would report its errors as a death.

        Raises:
            RequestError: the driver is of another version of smsbatch.
        """
        if driver_version:
            require_version(driver_version, f"worker {self.name}")
        # Loads torch, which a driver that feeds remote workers does not need.
        from smsbatch.workers.stylizer import Stylizer

        self._stylizer = Stylizer(self.manifest, self._device)

    def progress(self) -> Progress:
        idle_fraction = self._stylizer.idle_fraction if self._stylizer is not None else None
        now = replace(self._progress, idle_fraction=idle_fraction)
        return now if now.unit else replace(now, seen=time.time())

    def cancel(self) -> None:
        """Make `process` raise Cancelled at its next step; what is committed stays."""
        self._cancelled.set()

    def process(self, item: WorkItem, lost: Collection[int] = (), deaths: int = 0) -> Commit:
        """Stylize and commit a unit, and publish its shard if that was the last one missing.

        Args:
            lost: index rows that killed their workers; they become failed rows without being read.
            deaths: number of workers that died while processing this item.

        Returns:
            The unit's commit, which is another worker's if that was faster. If only the driver may commit, it has yet
            to decide the returned one.
        """
        unit, run = item.unit, self._run
        # In generation 0 a unit is rarely committed already, and one request shows that.
        newest = run.ledger.committed(unit.id) if item.generation or run.ledger.is_committed(unit.id) else None
        if newest is not None and newest.generation >= item.generation:
            return newest
        started = perf_counter()
        outcomes = self._outcomes(item, range(unit.start, unit.stop), lost, deaths)
        seconds = perf_counter() - started + (newest.seconds if newest is not None else 0.0)  # of all generations
        commit = run.ledger.attempt(unit, outcomes, worker=self.name, seconds=seconds, generation=item.generation)
        if not run.store.has_create_only_put:
            return commit
        commit = run.ledger.decide(commit)
        run.ledger.publish(unit.shard, run.shards[unit.shard])  # None while another unit is missing
        return commit

    def probe(self, item: WorkItem, rows: range) -> None:
        """Stylize some rows of a unit and discard the results, to test whether they kill the worker."""
        self._outcomes(item, rows)

    def estimate_cost(self, entries: Sequence[Entry]) -> Estimate:
        """Stylize some samples, discard the results and return the cost.

        Raises:
            SampleError: none of them could be stylized; it is the error of the first.
        """
        started = perf_counter()
        outcomes = self._stylize(None, list(self._readers.map(self._reading(), entries)))
        seconds = perf_counter() - started
        pictures = [outcome.image for outcome in outcomes if outcome.image is not None]
        if not pictures:
            first = outcomes[0]
            raise SampleError(str(first.error_code), f"{first.key}: {first.error_message}")
        assert self._stylizer is not None
        return Estimate(
            images=len(pictures),
            seconds_per_image=seconds / len(pictures),
            bytes_per_image=sum(map(len, pictures)) / len(pictures),
            device=self._stylizer.engine.device.type,
        )

    def _outcomes(self, item: WorkItem, rows: range, lost: Collection[int] = (), deaths: int = 0) -> list[Outcome]:
        """The outcomes of some rows of a unit; in a later generation, most are taken over from the previous one."""
        known = self._known(item)
        kept = {row for row in rows if row in known and known[row].error_code not in item.codes}
        read: dict[int, Sample | Outcome] = {row: known[row] for row in kept}
        entries = dict(zip(rows, read_index(self._run.index, rows.start, rows.stop), strict=True))
        read |= {row: self._lost(entry) for row, entry in entries.items() if row in lost and row not in kept}
        todo = {row: entry for row, entry in entries.items() if row not in read}
        read |= zip(todo, self._readers.map(self._reading(), todo.values()), strict=True)
        outcomes = self._stylize(item, [read[row] for row in rows])
        return [
            outcome
            if row in kept
            else replace(outcome, attempts=(known[row].attempts if row in known else 0) + deaths + 1)
            for row, outcome in zip(rows, outcomes, strict=True)
        ]

    def _known(self, item: WorkItem) -> dict[int, Outcome]:
        """The outcomes of a unit in the previous generation, by row; none in generation 0."""
        ledger = self._run.ledger
        newest = ledger.committed(item.unit.id) if item.generation else None
        if newest is None:
            return {}
        return dict(zip(range(item.unit.start, item.unit.stop), ledger.outcomes(newest), strict=True))

    def _stylize(self, item: WorkItem | None, read: Sequence[Sample | Outcome]) -> list[Outcome]:
        samples = [one for one in read if isinstance(one, Sample)]
        assert self._stylizer is not None, "setup() first"
        stylized = iter(self._stylizer.stylize(samples, partial(self._show, item, len(samples))))
        with self._showing:
            if self._progress.unit == _name(item):  # else the next unit is being computed already
                self._progress = Progress(self.name, None)
        return [next(stylized) if isinstance(one, Sample) else one for one in read]

    def _show(self, item: WorkItem | None, samples: int, done: int, batch: int, step: int) -> None:
        self._check()
        assert self._stylizer is not None
        unit, generation, steps = _name(item), item.generation if item else 0, self._stylizer.engine.steps
        shown = Progress(self.name, unit, done, samples, batch, step, steps, generation, time.time())
        with self._showing:
            if self._progress.unit == unit and self._progress.images_done > shown.images_done:
                shown = replace(self._progress, seen=shown.seen)  # a batch was restarted with fewer samples
            self._progress = shown

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def _reading(self) -> partial[Sample | Outcome]:
        """A function that reads an entry; all threads share its reader."""
        return partial(self._read, Reader.of(self.manifest.source, self.manifest.storage, self.manifest.output.path))

    def _read(self, reader: Reader, entry: Entry) -> Sample | Outcome:
        self._check()
        try:
            return load_sample(entry, self.manifest.source, reader, self.manifest.seed)
        except SampleError as error:
            return failed(entry, error.code, str(error))

    def _lost(self, entry: Entry) -> Outcome:
        message = f"its worker died {self.manifest.compute.retries + 1} times, and again on this sample alone"
        return failed(entry, "worker_lost", message)

    @property
    def _run(self) -> Run:
        if self.run is None:
            self.run = Run.open(self.manifest)  # only when a unit needs it: the plan is written by then
        return self.run


def _name(item: WorkItem | None) -> str:
    return "probe" if item is None else item.unit.name


def failed(entry: Entry, code: str, message: str) -> Outcome:
    """The outcome of a sample that could not be read."""
    url = public(entry.url)
    return Outcome(entry.key, url, error_code=code, error_message=message, original_key=entry.original_key)
