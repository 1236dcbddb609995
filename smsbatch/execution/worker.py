"""What happens to a unit, in any pool: read, stylize, commit."""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

from smsbatch.data.index import read_index
from smsbatch.data.ledger import Commit, Ledger
from smsbatch.data.sample import Entry, Outcome, Sample, Unit
from smsbatch.data.sources import load_sample
from smsbatch.data.store import Store
from smsbatch.errors import SampleError
from smsbatch.manifest import Manifest

if TYPE_CHECKING:
    from smsbatch.execution.stylizer import Stylizer

__all__ = ["Cancelled", "Progress", "Worker"]


class Cancelled(Exception):
    """The worker was told to drop what it has in hand."""


@dataclass(frozen=True)
class Progress:
    """Where a worker is: `done` of `samples` in its unit, `step` of `steps` of the `batch` it computes now."""

    worker: str
    unit: str | None
    done: int = 0
    samples: int = 0
    batch: int = 0
    step: int = 0
    steps: int = 0


class Worker:
    """Models loaded once by `setup`, then any number of units.

    `process` may be called from two threads at once: one computes, the other reads the next unit or commits the last.
    That is all the prefetching there is, and all that is needed.
    """

    def __init__(self, manifest: Manifest, name: str, device: str | None = None) -> None:
        self.manifest, self.name, self._device = manifest, f"{socket.gethostname()}-{name}", device
        self._store = Store(manifest.output.path)
        self._ledger = Ledger(self._store, metrics=manifest.metrics)
        self._stylizer: Stylizer | None = None
        self._compute = threading.Lock()
        self._cancelled = threading.Event()
        self._progress = Progress(self.name, None)

    def setup(self) -> None:
        """Load the models. Apart from the constructor, so that a pool sees its errors as errors and not as a death."""
        from smsbatch.execution.stylizer import (
            Stylizer,
        )  # loads torch, which a driver that feeds workers elsewhere needs not

        self._stylizer = Stylizer(self.manifest, self._device)

    def progress(self) -> Progress:
        return self._progress

    def cancel(self) -> None:
        """Make `process` raise Cancelled at its next step; what is committed stays."""
        self._cancelled.set()

    def process(self, unit: Unit, lost: Collection[int] = ()) -> Commit:
        """Stylize and commit a unit.

        Args:
            lost: index rows that killed their workers; they become failed rows without being touched.

        Returns:
            The commit that stands, which is another worker's if that was faster.
        """
        done = self._ledger.committed(unit.id)
        if done is not None:
            return done
        started = perf_counter()
        outcomes = self._outcomes(unit, range(unit.start, unit.stop), lost)
        return self._ledger.commit(unit, outcomes, worker=self.name, seconds=perf_counter() - started)

    def probe(self, unit: Unit, rows: range) -> None:
        """Do the work on some rows of a unit and throw it away: to see whether they kill the worker."""
        self._outcomes(unit, rows, ())

    def _outcomes(self, unit: Unit, rows: range, lost: Collection[int]) -> list[Outcome]:
        entries = read_index(self._store, rows.start, rows.stop)
        read = {
            row: self._lost(entry) if row in lost else self._read(entry)
            for row, entry in zip(rows, entries, strict=True)
        }
        samples = [item for item in read.values() if isinstance(item, Sample)]
        assert self._stylizer is not None, "setup() first"
        with self._compute:
            self._show(unit, len(samples), 0, 0, 0)
            stylized = iter(self._stylizer.stylize(samples, partial(self._show, unit, len(samples))))
            self._progress = Progress(self.name, None)
        return [next(stylized) if isinstance(item, Sample) else item for item in read.values()]

    def _show(self, unit: Unit, samples: int, done: int, batch: int, step: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._progress = Progress(self.name, unit.name, done, samples, batch, step, self.manifest.objective.steps)

    def _read(self, entry: Entry) -> Sample | Outcome:
        try:
            return load_sample(entry, self.manifest.source.images, self.manifest.source.caption)
        except SampleError as error:
            return Outcome(entry.key, entry.url, error_code=error.code, error_message=str(error))

    def _lost(self, entry: Entry) -> Outcome:
        message = f"its worker died {self.manifest.compute.retries + 1} times, and again on this sample alone"
        return Outcome(entry.key, entry.url, error_code="worker_lost", error_message=message)
