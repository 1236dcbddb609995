"""What looks after a run's storage beside `verify`: `repair` and `gc`, neither of which loses a proof by surprise.

`repair` publishes again what has its attempts and computes again what has not. A commit that counts no longer is moved
aside, to `_smsbatch/superseded/`, so that its unit is undone; strangers go to `_smsbatch/foreign/`. `gc` is the only
one that deletes, and says what. Neither starts while a driver is at work.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from smsbatch.data.ledger import Ledger
from smsbatch.data.records import ATTEMPTS, GENERATIONS
from smsbatch.data.store import TEMPORARY, Store
from smsbatch.errors import RequestError
from smsbatch.execution.drive import run as drive
from smsbatch.execution.generators import digests
from smsbatch.execution.record import check_request, inputs_changed, store_of
from smsbatch.execution.report import SUCCESS, write_report
from smsbatch.execution.standing import Problem, recorded
from smsbatch.execution.status import DEAD_AFTER_S, HEARTBEATS, Status, drivers
from smsbatch.execution.verification import Audit, Verification
from smsbatch.manifest import Errors, Manifest

__all__ = ["Collected", "Heap", "Repaired", "gc", "repair"]

SUPERSEDED = "_smsbatch/superseded"
FOREIGN = "_smsbatch/foreign"
_YOUNG_S = 3600.0  # what is younger may be somebody's work in hand
_THREADS = 16
_WHEN_IDLE = "collect then, or use --force if it is dead"


# ------------------------------------------------------------------------------------------------------------- repair


@dataclass(frozen=True)
class Repaired:
    """What was wrong, what was done about it, a line each, and what is there now (None of a dry run)."""

    before: Verification
    done: tuple[str, ...]
    after: Verification | None

    @property
    def ok(self) -> bool:
        return (self.after or self.before).ok

    def to_dict(self) -> dict[str, Any]:
        after = None if self.after is None else self.after.to_dict()
        return {"before": self.before.to_dict(), "done": list(self.done), "after": after, "ok": self.ok}


@dataclass(frozen=True)
class _Work:
    """What is to be done about a set of problems."""

    plan: bool
    report: bool
    recompute: tuple[int, ...]  # units
    publish: tuple[int, ...]  # shards of which no unit is computed again
    aside: tuple[str, ...]

    @property
    def lines(self) -> Iterator[str]:
        yield from (f"move {place} aside" for place in self.aside)
        if self.plan:
            yield "plan again from the source"
        yield from (f"compute unit {unit:06d} again" for unit in self.recompute)
        yield from (f"publish shard {shard:06d} again" for shard in self.publish)
        if self.report:
            yield "write the report again"


def repair(
    where: str | Manifest,
    progress: Callable[[Status], None] = lambda status: None,
    *,
    full: bool = False,
    dry_run: bool = False,
    allow_drift: Collection[str] = (),
) -> Repaired:
    """Make a run whole again, as far as `verify` finds something wrong with it.

    Args:
        progress: called while units are computed again.
        full: look for what is wrong as `verify --full` does, at every byte.
        dry_run: only say what would be done.
        allow_drift: as of `run`, where something must be computed again.

    Raises:
        RequestError: no run stands there, a driver is at work on it, or what must be computed again has changed.
        StorageError: it cannot be read or written.
        RunError: computing an unfinished run, too many samples failed.
    """
    store = store_of(where)
    audit = Audit(store)
    before = audit.verify(full)
    if before.ok:
        return Repaired(before, (), None if dry_run else before)
    shards = {problem.shard for problem in before.problems if problem.shard is not None}
    # Whether an attempt can serve is known from its bytes alone.
    known = before if full else audit.verify(True, only=sorted(shards))
    work = _work(audit, known.problems)
    if dry_run:
        return Repaired(before, tuple(work.lines), None)
    _refuse_while_at_work(store, "repair it then")
    manifest = where if isinstance(where, Manifest) else recorded(store, audit.run)
    if work.plan or work.recompute:  # what cannot be computed must not be moved aside
        check_request(store, audit.run, manifest, digests(manifest), allow_drift, note=False)
        if not work.plan:
            inputs_changed(store, manifest, allow_drift, note=False)
    _do(audit, work, manifest, progress, allow_drift)
    touched = None if work.plan else sorted(shards)
    return Repaired(before, tuple(work.lines), Audit(store).verify(True, only=touched))


def _work(audit: Audit, problems: Iterable[Problem]) -> _Work:
    recompute: set[int] = set()
    publish: set[int] = set()
    aside: set[str] = set()
    plan = report = False
    for problem in problems:
        match problem.remedy:
            case "plan":
                plan = True
            case "report":
                report = True
            case "aside":
                aside.add(problem.place)
            case "recompute" if problem.unit is not None:
                recompute.add(problem.unit)
            case "recompute" if problem.shard is not None:
                recompute |= {unit.id for unit in audit.shards[problem.shard]}
            case "publish" if problem.shard is not None:
                publish.add(problem.shard)
    for unit in recompute:
        aside |= set(audit.commit_files.get(unit, ()))
        publish.discard(audit.by_id[unit].shard)
    if plan:
        aside |= set(audit.store.list("plan"))
    return _Work(plan, report, tuple(sorted(recompute)), tuple(sorted(publish)), tuple(sorted(aside)))


def _do(
    audit: Audit,
    work: _Work,
    manifest: Manifest,
    progress: Callable[[Status], None],
    allow_drift: Collection[str],
) -> None:
    store, stamp = audit.store, f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    for place in work.aside:
        ours = place.startswith(("_smsbatch/", "plan/"))
        store.copy(place, f"{SUPERSEDED if ours else FOREIGN}/{stamp}/{place.removeprefix('_smsbatch/')}")
        store.delete(place)
    ledger = Ledger(store, metrics=audit.run["manifest"]["metrics"])
    for shard in work.publish:
        ledger.publish(shard, audit.shards[shard], again=True)
    if work.plan or work.recompute:
        succeeded, finished = store.exists(SUCCESS), len(audit.commits) == len(audit.units)
        # What failed in a finished run has been judged then, and is no reason to leave it in pieces now.
        errors = Errors(max_failed_fraction=1, max_failed_fraction_per_unit=1) if finished else manifest.errors
        drive(manifest.model_copy(update={"errors": errors}), progress, allow_drift=allow_drift)
        if finished and not succeeded:
            store.delete(SUCCESS)
    elif audit.reported or work.report:
        write_report(store)  # its list of files has their digests


def _refuse_while_at_work(store: Store, advice: str) -> None:
    alive = [driver for driver in drivers(store) if driver.alive]
    if alive:
        raise RequestError(
            f"{store.url}: a driver, {alive[0].name}, is at work (seen {alive[0].age_s:.0f} s ago); let it finish or "
            f"stop it, and {advice}; one that was killed counts as dead after {DEAD_AFTER_S:.0f} s"
        )


# ----------------------------------------------------------------------------------------------------------------- gc


@dataclass(frozen=True)
class Heap:
    """Objects of one kind that nothing needs, and their bytes."""

    kind: str
    objects: int
    bytes: int


@dataclass(frozen=True)
class Collected:
    """What `gc` removed, or would remove in a dry run."""

    heaps: tuple[Heap, ...]
    dry_run: bool

    @property
    def objects(self) -> int:
        return sum(heap.objects for heap in self.heaps)

    @property
    def bytes(self) -> int:
        return sum(heap.bytes for heap in self.heaps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"objects": self.objects, "bytes": self.bytes}


def gc(where: str | Manifest, *, dry_run: bool = False, attempts: bool = False, force: bool = False) -> Collected:
    """Remove what no result and no proof needs any more.

    Args:
        dry_run: only say what would go.
        attempts: also the attempts of published shards. `repair` can then only compute such units again, and
            `run --retry-failed` refuses them.
        force: even while a driver seems to be at work.

    Raises:
        RequestError: no run stands there, a driver is at work, or a record is damaged.
        StorageError: something cannot be listed or deleted.
    """
    store = store_of(where)
    # Before and after: a commit that comes between two of our looks would make its attempt look lost.
    if not force:
        _refuse_while_at_work(store, _WHEN_IDLE)
    audit = Audit(store)
    if audit.damaged:
        first = next(iter(audit.damaged.values()))
        raise RequestError(f"{store.locate(first.place)}: {first.what}; run `smsbatch repair` first, then gc")
    if not force:
        _refuse_while_at_work(store, _WHEN_IDLE)
    heaps = {kind: files for kind, files in _rubbish(audit, attempts) if files}
    if not dry_run:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="smsbatch-gc") as threads:
            for files in heaps.values():
                list(threads.map(store.delete, files))
    found = (Heap(kind, len(files), sum(files.values())) for kind, files in heaps.items())
    return Collected(tuple(found), dry_run)


def _rubbish(audit: Audit, attempts: bool) -> Iterator[tuple[str, dict[str, int]]]:
    store = audit.store
    generations = store.sizes(GENERATIONS)
    numbers = (
        list(audit.shards) if attempts else sorted({_shard_of(path) for path in generations} & audit.shards.keys())
    )
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="smsbatch-gc") as threads:
        found = threads.map(lambda shard: audit.look(shard, full=False), numbers)
        whole = {shard for shard, seen in zip(numbers, found, strict=True) if seen.whole and not seen.stale}
    lost: dict[str, int] = {}
    spare: dict[str, int] = {}
    for path, size in audit.sizes.items():
        number, _, name = path.removeprefix(f"{ATTEMPTS}/").partition("/")
        if not path.startswith(f"{ATTEMPTS}/") or not number.isdigit() or int(number) not in audit.by_id:
            continue
        commit = audit.commits.get(int(number))
        if commit is None or name.partition(".")[0] != commit.attempt:
            lost[path] = size  # unless it is young: the next generation's, say, which is not decided yet
        elif attempts and audit.by_id[commit.unit].shard in whole:
            spare[path] = size
    yield "attempts that lost", _old(store, lost)
    yield "attempts of published shards", spare
    yield "older generations", {path: size for path, size in generations.items() if _shard_of(path) in whole}
    yield "superseded records", store.sizes(SUPERSEDED)
    yield "temporary files", _old(store, store.sizes(TEMPORARY))
    dead = {f"{HEARTBEATS}/{driver.name}.json" for driver in drivers(store) if not driver.alive}
    yield "heartbeats of the dead", {path: size for path, size in store.sizes(HEARTBEATS).items() if path in dead}


def _shard_of(path: str) -> int:
    number = path.rpartition("/")[2].partition(".")[0]
    return int(number) if number.isdigit() else -1


def _old(store: Store, files: dict[str, int]) -> dict[str, int]:
    """Those that cannot be somebody's work in hand."""

    def age_s(path: str) -> float:
        return (datetime.now(UTC) - store.modified(path)).total_seconds()

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="smsbatch-gc") as threads:
        ages = zip(files.items(), threads.map(age_s, files), strict=True)
        return {path: size for (path, size), age in ages if age > _YOUNG_S}
