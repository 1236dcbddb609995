"""A run from its manifest to its report: plan, deal units to a pool, publish shards, report.

Started again it goes on where the commits end, and with nothing left to do it says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from smsbatch.data.index import UNITS, read_units
from smsbatch.data.ledger import Commit, Ledger
from smsbatch.data.sample import Unit
from smsbatch.data.store import Store
from smsbatch.errors import RequestError, RunError
from smsbatch.execution.plan import establish, read_run
from smsbatch.execution.pool import POOLS
from smsbatch.execution.report import Report, is_reported, summarize, write_report
from smsbatch.execution.worker import Progress
from smsbatch.manifest import Manifest

__all__ = ["Status", "run", "status"]

HEARTBEAT = "_smsbatch/heartbeat.json"
_HEARTBEAT_S = 10.0


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
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
        """Seconds left at the present rate, counting what is already done of the units in hand."""
        return (self.samples - self.samples_done) / self.rate if self.rate else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"failed": self.failed, "remaining_s": self.remaining_s}


@dataclass
class _Tally:
    """The driver's own count of a run."""

    units: Mapping[int, Unit]
    commits: dict[int, Commit]
    began: float = field(default_factory=monotonic)
    done_before: int = 0

    def __post_init__(self) -> None:
        self.done_before = sum(commit.samples for commit in self.commits.values())

    def status(self, name: str, workers: Iterable[Progress], finished: bool = False) -> Status:
        workers = tuple(workers)
        done = sum(commit.samples for commit in self.commits.values())
        under_way = sum(_worth(worker) for worker in workers)
        fresh = done - self.done_before + under_way
        errors = sum((Counter(commit.errors) for commit in self.commits.values()), Counter[str]())
        return Status(
            name=name,
            units=len(self.units),
            units_done=len(self.commits),
            samples=sum(map(len, self.units.values())),
            samples_done=done,
            errors=dict(errors),
            finished=finished,
            workers=workers,
            rate=fresh / (monotonic() - self.began) if fresh else None,
        )


def _worth(worker: Progress) -> float:
    """Images' worth of work in a unit that is not finished: whole ones, and the steps of the batch in hand."""
    if worker.unit is None:
        return 0.0
    rest = min(worker.batch, worker.samples - worker.done)
    return worker.done + (rest * worker.step / worker.steps if worker.steps else 0.0)


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
    store = Store(manifest.output.path)
    plan = establish(manifest, store)
    ledger = Ledger(store, metrics=manifest.metrics)
    shards: dict[int, list[Unit]] = {}
    for unit in plan.units:
        shards.setdefault(unit.shard, []).append(unit)
    tally = _Tally({unit.id: unit for unit in plan.units}, ledger.commits())
    todo = [unit for unit in plan.units if unit.id not in tally.commits]

    progress(tally.status(manifest.name, ()))
    if todo:
        _work(manifest, store, ledger, tally, shards, todo, progress)
    for shard, units in shards.items():
        ledger.publish(shard, units)
    report = write_report(store) if todo or not is_reported(store) else summarize(store)
    progress(tally.status(manifest.name, (), finished=True))
    allowed = manifest.errors.max_failed_fraction
    if report.failed > allowed * report.planned:
        raise RunError(
            f"{report.failed} of {report.planned} samples failed, more than errors.max_failed_fraction ({allowed:g}) "
            f"allows; everything is written, see {store.locate('report.html')}"
        )
    return report


def _work(
    manifest: Manifest,
    store: Store,
    ledger: Ledger,
    tally: _Tally,
    shards: Mapping[int, list[Unit]],
    todo: Collection[Unit],
    progress: Callable[[Status], None],
) -> None:
    next_heartbeat = 0.0
    with POOLS[manifest.compute.pool](manifest) as pool:
        tally.began = monotonic()
        for commit in pool.work(todo):
            if commit is not None:
                tally.commits[commit.unit] = commit
                units = shards[tally.units[commit.unit].shard]
                if all(unit.id in tally.commits for unit in units):
                    ledger.publish(units[0].shard, units)
            now = tally.status(manifest.name, pool.progress())
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
    tally = _Tally({unit.id: unit for unit in units}, Ledger(store).commits())
    beat = json.loads(store.read(HEARTBEAT)) if store.exists(HEARTBEAT) else None
    counted = tally.status(recorded["name"], (), finished=is_reported(store))
    if beat is None or counted.finished:
        return counted
    return replace(
        counted,
        rate=beat["rate"],
        workers=tuple(Progress(**worker) for worker in beat["workers"]),
        heartbeat_age_s=(datetime.now(UTC) - datetime.fromisoformat(beat["time"])).total_seconds(),
    )
