"""What feeds workers: the base of every pool, and `LocalPool`, one worker in this process. `cluster/` has `RayPool`.

A pool is a context manager. `work` yields a commit for every item, in the order they finish, and None now and then so
that the caller can look at `progress`. A worker has several units in flight: one that it computes, others that it reads
or commits. An exception out of a worker that is not its death (a full disk, say) ends the run. Workers are started by
the first call that needs them, so that a pool with nothing to do costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from itertools import islice

from smsbatch.data.sample import Entry
from smsbatch.engines.table import ENGINES
from smsbatch.manifest import Dataset, Manifest
from smsbatch.parallel import Item, Result, started_ahead
from smsbatch.runs.plan import Estimate
from smsbatch.runs.records import Commit
from smsbatch.runs.run import Run
from smsbatch.runs.status import Progress
from smsbatch.workers.worker import Worker, WorkItem

TICK_S = 0.25
_THREADS = 16  # for what mostly waits


class Pool(AbstractContextManager["Pool"], ABC):
    """Made before anything is planned, so that a pool that cannot be is refused."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.units_in_flight = ENGINES[manifest.task].units_in_flight if manifest.task in ENGINES else 0

    @abstractmethod
    def work(self, run: Run, items: Iterable[WorkItem]) -> Iterator[Commit | None]:
        """Do all items of a run; leaving the iterator early, or the pool's context, drops what is in hand."""

    @abstractmethod
    def progress(self) -> list[Progress]:
        """What every worker does now."""

    @abstractmethod
    def estimate_cost(self, entries: Sequence[Entry]) -> Estimate:
        """What samples cost on one worker; SampleError if none could be stylized."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result, None, None]:
        """The function of every item, in their order, several at a time; without models. Closed, it starts no more."""
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="smsbatch-map")
        try:
            futures = started_ahead((threads.submit(function, item) for item in items), 2 * _THREADS)
            yield from (future.result() for future in futures)
        finally:
            threads.shutdown(cancel_futures=True)


class LocalPool(Pool):
    """One worker in this process."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._threads = ThreadPoolExecutor(max(1, self.units_in_flight), thread_name_prefix="smsbatch")
        self._worker: Worker | None = None

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.cancel()
        self._threads.shutdown(cancel_futures=True)

    def work(self, run: Run, items: Iterable[WorkItem]) -> Iterator[Commit | None]:
        worker = self._ready()
        worker.run = run
        remaining = iter(items)
        running: set[Future[Commit]] = set()
        while True:
            for item in islice(remaining, self.units_in_flight - len(running)):
                running.add(self._threads.submit(worker.process, item))
            if not running:
                return
            finished, running = wait(running, timeout=TICK_S, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
            yield None

    def progress(self) -> list[Progress]:
        return [] if self._worker is None else [self._worker.progress()]

    def estimate_cost(self, entries: Sequence[Entry]) -> Estimate:
        return self._ready().estimate_cost(entries)

    def _ready(self) -> Worker:
        if self._worker is None:
            assert isinstance(self.manifest, Dataset), "a task that makes rows"
            worker = Worker(self.manifest, "local")
            worker.setup()
            self._worker = worker
        return self._worker
