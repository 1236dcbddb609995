"""Pools feed workers: the base class, and `LocalPool`, one worker in this process. `cluster/` has `RayPool`.

A pool is a context manager. `work` yields the commit of every item in the order of completion, and None now and then so
that the caller can look at `progress`. A worker has several units in flight: it computes one, and reads or commits the
others. An exception that a worker raises (a full disk, for example) ends the run; its death need not. The first call
that needs workers starts them, so that a pool with nothing to do costs nothing.
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
from smsbatch.parallel import Item, Result, map_ahead
from smsbatch.runs.plan import Estimate
from smsbatch.runs.records import Commit
from smsbatch.runs.run import Run
from smsbatch.runs.status import Progress
from smsbatch.workers.worker import Worker, WorkItem

TICK_S = 0.25
_THREADS = 16  # more than cores, because `map` mostly waits for storage


class Pool(AbstractContextManager["Pool"], ABC):
    """Gives work items to workers. It is made before the run is planned, so that an unusable pool is refused first."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.units_in_flight = ENGINES[manifest.task].units_in_flight if manifest.task in ENGINES else 0

    @abstractmethod
    def work(self, run: Run, items: Iterable[WorkItem]) -> Iterator[Commit | None]:
        """Do all items of a run. Leaving the iterator early, or the pool's context, drops the units in flight."""

    @abstractmethod
    def progress(self) -> list[Progress]:
        """The last known progress of every worker."""

    @abstractmethod
    def estimate_cost(self, entries: Sequence[Entry]) -> Estimate:
        """Measure the cost of samples on one worker; raises SampleError if none could be stylized."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result, None, None]:
        """Yield the function's result for every item, in their order, several in parallel, without loading models.

        Closing the generator starts no further items.
        """
        yield from map_ahead(function, items, _THREADS)


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
