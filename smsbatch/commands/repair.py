"""`repair`: publish damaged shards again from their attempts, and compute units again whose attempts are gone.

No record is lost: a commit that no longer holds is moved to `_smsbatch/superseded/`, and made again from its attempt,
or else its unit is computed again. Foreign files are moved to `_smsbatch/foreign/`. `repair` does not start while a
driver is at work.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from smsbatch.commands.plan import PLANNERS, restore_plan
from smsbatch.commands.run import run as run_manifest
from smsbatch.commands.verify import Verification, Verifier
from smsbatch.errors import StorageError
from smsbatch.manifest import Errors, Manifest
from smsbatch.report.write import write_report
from smsbatch.runs.drift import check_unchanged, inputs_changed
from smsbatch.runs.heartbeat import require_idle
from smsbatch.runs.layout import COPY, FOREIGN, RUN, SUCCESS, SUPERSEDED
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.rebuild import rebuild
from smsbatch.runs.records import Commit, Published, commit_file, dump_record, parse_commit_file
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

    restore: tuple[str, ...]  # run.json or its copy
    plan: tuple[str, ...]
    report: bool
    commits: tuple[Commit, ...]  # made again from their attempts
    recompute: tuple[int, ...]  # units
    publish: tuple[int, ...]  # shards without a unit in `recompute`
    aside: tuple[str, ...]

    @property
    def lines(self) -> Iterator[str]:
        yield from (f"restore {place} from {COPY if place == RUN else RUN}" for place in self.restore)
        yield from (f"move {place} aside" for place in self.aside)
        yield from (f"write {place} again" for place in self.plan)
        yield from (f"make the commit of unit {one.unit:06d} again from its attempt" for one in self.commits)
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
        RequestError: there is no run, a driver is at work on it, or units must be computed or samples located again
            but manifest, weights or inputs have changed.
        StorageError: the run cannot be read or written.
        RunError: too many samples of an unfinished run failed.
    """
    run = Run.open(where, damaged=True)
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
    for place in work.restore:
        store.put(place, dump_record(run.about))
    if work.plan or work.recompute:
        manifest = run.fill(manifest)
    if work.plan:
        restore_plan(manifest, run, work.plan)
        run.renew()
    if work.recompute:  # checked first: commits must not be moved aside if their units cannot be computed
        check_unchanged(run, manifest, PLANNERS[manifest.makes].digests(manifest), allow_drift, note=False)
        inputs_changed(run, manifest, allow_drift, note=False)
    _do(verifier, work, manifest, progress, allow_drift)
    touched = None if full or work.plan else sorted(shards)
    after = Verifier(Run.open(store)).verify(True, only=touched)
    if any(problem.remedy == "report" for problem in after.problems):
        write_report(Run.open(store))
        after = Verifier(Run.open(store)).verify(True, only=touched)
    return Repaired(before, tuple(work.lines), after)


def _work(verifier: Verifier, problems: Sequence[Problem]) -> _Work:
    recompute: set[int] = set()
    publish: set[int] = set()
    aside: set[str] = set()
    lost: set[tuple[int, int]] = set()  # units and generations of commits
    for problem in problems:
        match problem.remedy:
            case "aside":
                aside.add(problem.place)
            case "commit" if (named := parse_commit_file(problem.place)) is not None:
                lost.add(named)
            case "recompute" if problem.unit is not None:
                recompute.add(problem.unit)
            case "recompute" if problem.shard is not None:
                recompute |= {unit.id for unit in verifier.shards[problem.shard]}
            case "publish" if problem.shard is not None:
                publish.add(problem.shard)
    commits = _rebuilt(verifier, {named for named in lost if named[0] not in recompute})
    recompute |= {unit for unit, _ in lost} - {commit.unit for commit in commits}
    publish |= {verifier.by_id[commit.unit].shard for commit in commits} - verifier.records.keys()
    for unit in recompute:
        aside |= set(verifier.commit_files.get(unit, ()))
        publish.discard(verifier.by_id[unit].shard)
    for commit in commits:
        aside |= {commit_file(commit.unit, commit.generation)} & set(verifier.commit_files.get(commit.unit, ()))
    return _Work(
        restore=tuple(problem.place for problem in problems if problem.remedy == "restore"),
        plan=tuple(dict.fromkeys(problem.place for problem in problems if problem.remedy == "plan")),
        report=any(problem.remedy == "report" for problem in problems),
        commits=tuple(commits),
        recompute=tuple(sorted(recompute)),
        publish=tuple(sorted(publish)),
        aside=tuple(sorted(aside)),
    )


def _rebuilt(verifier: Verifier, lost: Collection[tuple[int, int]]) -> list[Commit]:
    """The lost commits that can be made again from their attempts: of a unit all or none.

    If the record of the shard names an attempt, the commits of the shard must give exactly this record.
    """
    newest, made = dict(verifier.commits), list[Commit]()
    for unit, lost_of_unit in groupby(sorted(lost), lambda named: named[0]):
        shard, ledger = verifier.by_id[unit].shard, verifier.run.ledger
        units, record = verifier.shards[shard], verifier.records.get(shard)
        again: list[Commit | None] = []
        is_newest = False
        for _, generation in lost_of_unit:
            is_newest = unit not in verifier.commits or verifier.commits[unit].generation < generation
            named = record.attempts[[one.id for one in units].index(unit)] if record and is_newest else None
            again.append(rebuild(ledger, unit, generation, named))
            if again[-1] is not None and is_newest:
                newest[unit] = again[-1]
        if None in again or (
            record and is_newest and not _gives(ledger, record, [newest.get(one.id) for one in units])
        ):
            newest.pop(unit, None)
        else:
            made += filter(None, again)
    return made


def _gives(ledger: Ledger, record: Published, commits: Sequence[Commit | None]) -> bool:
    """True unless publishing these commits would give another record; that of an incomplete shard gives none."""
    known = [commit for commit in commits if commit is not None]
    try:
        return len(known) < len(commits) or ledger.makes(record, known)
    except StorageError:  # the attempt of another unit is gone
        return False


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
    for commit in work.commits:
        store.create(commit_file(commit.unit, commit.generation), commit.to_json())
    for shard in work.publish:
        verifier.run.ledger.publish(shard, verifier.shards[shard], again=True)
    if work.recompute:
        succeeded = store.exists(SUCCESS)
        finished = verifier.reported or len(verifier.commits) == len(verifier.units)
        # The failures of a finished run have been judged before, so they must not stop its repair.
        errors = Errors(max_failed_fraction=1, max_failed_fraction_per_unit=1) if finished else manifest.errors
        run_manifest(manifest.model_copy(update={"errors": errors}), progress, allow_drift=allow_drift)
        if finished and not succeeded:
            store.delete(SUCCESS)
    if store.size(SUCCESS):
        store.put(SUCCESS, b"")
