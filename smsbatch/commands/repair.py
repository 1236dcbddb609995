"""`repair`: publish damaged shards again from their attempts, and compute units again whose attempts are gone.

No record is lost: a commit that no longer holds is moved to `_smsbatch/superseded/`, so that its unit is computed
again, and foreign files to `_smsbatch/foreign/`. `repair` does not start while a driver is at work.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from smsbatch.commands.plan import PLANNERS
from smsbatch.commands.run import run as run_manifest
from smsbatch.commands.verify import Verification, Verifier
from smsbatch.manifest import Errors, Manifest
from smsbatch.report.write import write_report
from smsbatch.runs.drift import check_unchanged, inputs_changed
from smsbatch.runs.heartbeat import require_idle
from smsbatch.runs.layout import FOREIGN, SUCCESS, SUPERSEDED
from smsbatch.runs.run import Run
from smsbatch.runs.snapshot import Problem
from smsbatch.runs.status import Status


@dataclass(frozen=True)
class Repaired:
    """The state before, a line for each action, and the state after (None for a dry run)."""

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
    """The actions that solve a set of problems."""

    plan: bool
    report: bool
    recompute: tuple[int, ...]  # units
    publish: tuple[int, ...]  # shards without a unit in `recompute`
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
    """Repair the problems that `verify` finds in a run.

    Args:
        progress: called while units are computed again.
        full: check every byte, as `verify --full` does.
        dry_run: only list the actions.
        allow_drift: as for `run`, if units must be computed again.

    Raises:
        RequestError: there is no run, a driver is at work on it, or units must be computed again but manifest, weights
            or inputs have changed.
        StorageError: the run cannot be read or written.
        RunError: too many samples of an unfinished run failed.
    """
    run = Run.open(where)
    verifier, store = Verifier(run), run.store
    before = verifier.verify(full)
    if before.ok:
        return Repaired(before, (), None if dry_run else before)
    shards = {problem.shard for problem in before.problems if problem.shard is not None}
    # Only its bytes show whether an attempt is intact.
    known = before if full else verifier.verify(True, only=sorted(shards))
    work = _work(verifier, known.problems)
    if dry_run:
        return Repaired(before, tuple(work.lines), None)
    require_idle(store, "then repair the run")
    manifest = where if isinstance(where, Manifest) else run.manifest_here
    if work.plan or work.recompute:  # checked first: commits must not be moved aside if their units cannot be computed
        manifest = run.fill(manifest)
        check_unchanged(run, manifest, PLANNERS[manifest.makes].digests(manifest), allow_drift, note=False)
        if not work.plan:
            inputs_changed(run, manifest, allow_drift, note=False)
    _do(verifier, work, manifest, progress, allow_drift)
    touched = None if work.plan else sorted(shards)
    return Repaired(before, tuple(work.lines), Verifier(Run.open(store)).verify(True, only=touched))


def _work(verifier: Verifier, problems: Iterable[Problem]) -> _Work:
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
                recompute |= {unit.id for unit in verifier.shards[problem.shard]}
            case "publish" if problem.shard is not None:
                publish.add(problem.shard)
    for unit in recompute:
        aside |= set(verifier.commit_files.get(unit, ()))
        publish.discard(verifier.by_id[unit].shard)
    if plan:
        aside |= set(verifier.store.list("plan"))
    return _Work(plan, report, tuple(sorted(recompute)), tuple(sorted(publish)), tuple(sorted(aside)))


def _do(
    verifier: Verifier,
    work: _Work,
    manifest: Manifest,
    progress: Callable[[Status], None],
    allow_drift: Collection[str],
) -> None:
    store, stamp = verifier.store, f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    for place in work.aside:
        ours = place.startswith(("_smsbatch/", "plan/"))
        store.copy(place, f"{SUPERSEDED if ours else FOREIGN}/{stamp}/{place.removeprefix('_smsbatch/')}")
        store.delete(place)
    for shard in work.publish:
        verifier.run.ledger.publish(shard, verifier.shards[shard], again=True)
    if work.plan or work.recompute:
        succeeded, finished = store.exists(SUCCESS), len(verifier.commits) == len(verifier.units)
        # The failures of a finished run have been judged before, so they must not stop its repair.
        errors = Errors(max_failed_fraction=1, max_failed_fraction_per_unit=1) if finished else manifest.errors
        run_manifest(manifest.model_copy(update={"errors": errors}), progress, allow_drift=allow_drift)
        if finished and not succeeded:
            store.delete(SUCCESS)
    elif verifier.reported or work.report:
        write_report(verifier.run)  # index.json has the digests of the repaired files
