"""A run from its manifest to its report: plan, deal units to a pool, publish shards, report.

Started again it goes on where the commits end, and with nothing left to do it says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from time import monotonic
from typing import Any

from smsbatch.data.index import UNITS, read_units
from smsbatch.data.ledger import Commit, Ledger
from smsbatch.data.sample import Unit
from smsbatch.data.store import Store
from smsbatch.errors import RequestError, RunError
from smsbatch.execution.plan import establish, read_run
from smsbatch.execution.pool import POOLS, Pool
from smsbatch.execution.report import SUCCESS, Report, is_reported, summarize, write_report
from smsbatch.execution.worker import Progress
from smsbatch.manifest import Manifest

__all__ = ["Status", "run", "status"]

HEARTBEAT = "_smsbatch/heartbeat.json"
_HEARTBEAT_S = 10.0


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        samples_under_way: images' worth of work done in units that are not committed.
        errors: failed samples by error code.
        workers: what each worker does now; of `status`, what it did at the last heartbeat.
        rate: images per second since this driver began, None before its first unit.
        heartbeat_age_s: seconds since the driver's last sign of life; None without one, and while it is asked itself.
    """

    name: str
    units: int
    units_done: int
    samples: int
    samples_done: int
    samples_under_way: float
    errors: Mapping[str, int]
    finished: bool
    workers: tuple[Progress, ...] = ()
    rate: float | None = None
    heartbeat_age_s: float | None = None

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at the present rate."""
        left = max(0.0, self.samples - self.samples_done - self.samples_under_way)
        return left / self.rate if self.rate else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"failed": self.failed, "remaining_s": self.remaining_s}


class _Tally:
    """The driver's own count of a run, kept as commits come in."""

    def __init__(self, name: str, units: Iterable[Unit], commits: Mapping[int, Commit]) -> None:
        self.name = name
        self.units = {unit.id: unit for unit in units}
        self.samples = sum(map(len, self.units.values()))
        self.done: set[int] = set()
        self.samples_done = 0
        self.errors: Counter[str] = Counter()
        for commit in commits.values():
            self.add(commit)
        self._before, self._began = self.samples_done, 0.0

    def add(self, commit: Commit) -> None:
        self.done.add(commit.unit)
        self.samples_done += commit.samples
        self.errors.update(commit.errors)

    def status(self, workers: Iterable[Progress] = (), finished: bool = False) -> Status:
        # What a worker said last may be of a unit whose commit has come since.
        workers = tuple(
            Progress(worker.worker, None) if worker.unit and int(worker.unit) in self.done else worker
            for worker in workers
        )
        under_way = sum(map(_worth, workers))
        fresh = self.samples_done - self._before + under_way
        if not self._began and any(worker.unit for worker in workers):
            self._began = monotonic()  # the rate is that of the work, not of loading the models
        return Status(
            name=self.name,
            units=len(self.units),
            units_done=len(self.done),
            samples=self.samples,
            samples_done=self.samples_done,
            samples_under_way=under_way,
            errors=dict(self.errors),
            finished=finished,
            workers=workers,
            rate=fresh / (monotonic() - self._began) if fresh and self._began else None,
        )


def _worth(worker: Progress) -> float:
    """Images' worth of work in a unit that is not finished: whole ones, and the steps of the batch in hand."""
    if worker.unit is None:
        return 0.0
    return worker.done + (worker.batch * worker.step / worker.steps if worker.steps else 0.0)


def run(
    manifest: Manifest,
    progress: Callable[[Status], None] = lambda status: None,
) -> Report:
    """Plan if there is no plan, do what is not done, publish, report.

    Args:
        progress: called a few times a second.

    Raises:
        RequestError: the manifest, source or weights are wrong, or not those of the run at `output.path`.
        StorageError: the output cannot be read or written; what is committed is kept.
        RunError: more samples failed than `errors.max_failed_fraction`; everything is written nevertheless.
    """
    pool = POOLS[manifest.compute.pool](manifest)
    store = Store(manifest.output.path)
    plan = establish(manifest, store)
    ledger = Ledger(store, metrics=manifest.metrics)
    shards = {shard: list(units) for shard, units in groupby(plan.units, lambda unit: unit.shard)}
    tally = _Tally(manifest.name, plan.units, ledger.commits())
    todo = [unit for unit in plan.units if unit.id not in tally.done]

    progress(tally.status())
    if todo:
        _work(pool, store, ledger, tally, shards, todo, progress)
    for shard, units in shards.items():
        ledger.publish(shard, units)
    report = write_report(store) if todo or not is_reported(store) else summarize(store)
    progress(tally.status(finished=True))
    allowed = manifest.errors.max_failed_fraction
    if report.failed > allowed * report.planned:
        raise RunError(
            f"{report.failed} of {report.planned} samples failed, more than errors.max_failed_fraction ({allowed:g}) "
            f"allows; everything is written, see {store.locate('report.html')}; raise the limit if that is good enough"
        )
    store.create(SUCCESS, b"")
    return report


def _work(
    pool: Pool,
    store: Store,
    ledger: Ledger,
    tally: _Tally,
    shards: Mapping[int, list[Unit]],
    todo: Collection[Unit],
    progress: Callable[[Status], None],
) -> None:
    missing = {shard: {unit.id for unit in units} - tally.done for shard, units in shards.items()}
    next_heartbeat = 0.0
    with pool, ExitStack() as at_the_end:
        at_the_end.callback(store.delete, HEARTBEAT)  # whoever leaves in order is no longer at work
        for commit in pool.work(todo):
            if commit is not None:
                tally.add(commit)
                shard = tally.units[commit.unit].shard
                missing[shard].discard(commit.unit)
                if not missing[shard]:
                    ledger.publish(shard, shards[shard])
            now = tally.status(pool.progress())
            progress(now)
            if monotonic() >= next_heartbeat:
                beat = now.to_dict() | {"time": datetime.now(UTC).isoformat()}
                store.put(HEARTBEAT, json.dumps(beat).encode())
                next_heartbeat = monotonic() + _HEARTBEAT_S


def status(output: str) -> Status:
    """How far the run at a path or URL is, from what is stored there alone.

    Raises:
        RequestError: no run stands there.
    """
    store = Store(output)
    recorded = read_run(store)
    if recorded is None:
        raise RequestError(f"{store.url}: no run here (no run.json); `smsbatch run` starts one")
    units = read_units(store) if store.exists(UNITS) else []
    tally = _Tally(recorded["name"], units, Ledger(store).commits())
    counted = tally.status(finished=is_reported(store) and len(tally.done) == len(units))
    if counted.finished or not store.exists(HEARTBEAT):
        return counted
    beat = json.loads(store.read(HEARTBEAT))
    age_s = (datetime.now(UTC) - datetime.fromisoformat(beat["time"])).total_seconds()
    if age_s > 6 * _HEARTBEAT_S:  # nobody is at work: what was in hand then is lost, and there is no rate
        return replace(counted, heartbeat_age_s=age_s)
    return replace(
        counted,
        rate=beat["rate"],
        samples_under_way=beat["samples_under_way"],
        workers=tuple(Progress(**worker) for worker in beat["workers"]),
        heartbeat_age_s=age_s,
    )
