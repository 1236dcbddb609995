"""Run a manifest: plan, give units to a pool, publish shards, report. A second call resumes from the commits."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from smsbatch.cluster.ray_pool import pool_of
from smsbatch.commands.failures import common_reason
from smsbatch.commands.plan import establish, relocate
from smsbatch.commands.run_training import train
from smsbatch.errors import ERROR_CODES, RequestError, RunError, StorageError
from smsbatch.manifest import Manifest
from smsbatch.report.model import Report
from smsbatch.report.write import summarize, write_report
from smsbatch.runs.deleted import ends_if_deleted
from smsbatch.runs.drift import check_allowed, inputs_changed
from smsbatch.runs.heartbeat import Heartbeat, other_drivers, refuse
from smsbatch.runs.layout import INDEX, SUCCESS, is_reported
from smsbatch.runs.records import Published
from smsbatch.runs.run import Run
from smsbatch.runs.status import RunTally, Status, over_budget
from smsbatch.storage.store import Store
from smsbatch.training.result import Distilled
from smsbatch.workers.pool import Pool
from smsbatch.workers.worker import WorkItem


def run(
    manifest: Manifest,
    progress: Callable[[Any], None] = lambda now: None,
    *,
    retry_failed: bool = False,
    codes: Collection[str] = (),
    allow_drift: Collection[str] = (),
) -> Report | Distilled:
    """Plan unless there is a plan, compute what is left, publish, report; a `distill` manifest is trained instead.

    In the main thread, a training that gets SIGINT or SIGTERM finishes its step, writes a checkpoint and raises
    KeyboardInterrupt; a second signal raises it at once.

    Args:
        progress: called a few times a second with a Status, or for a training with a TrainingProgress.
        retry_failed: also retry failed samples, and publish their shards as a new generation.
        codes: retry only samples that failed with one of these error codes.
        allow_drift: keys of the manifest, `environment`, `weights` or `inputs` that may have changed since the plan.
            The change is noted with the run, which still follows its plan.

    Raises:
        RequestError: the manifest, source, weights or codes are invalid, or differ from those of the run at
            `output.path`; or another driver is at work on a run that permits only one.
        StorageError: the output cannot be read or written; all commits are kept.
        RunError: more samples failed than `errors` allows; a training diverged, or its workers kept dying.
    """
    manifest.hide()
    check_allowed(manifest, allow_drift)
    return RUNNERS[manifest.makes](manifest, progress, retry_failed=retry_failed, codes=codes, allow_drift=allow_drift)


def make_dataset(
    manifest: Any,
    progress: Callable[[Status], None],
    *,
    retry_failed: bool,
    codes: Collection[str],
    allow_drift: Collection[str],
) -> Report:
    """`run` of a task that makes a dataset."""
    _check_codes(codes, retry_failed)
    with pool_of(manifest) as pool, ends_if_deleted(establish(manifest, pool, allow_drift)) as run:
        store = run.store
        tally = RunTally(manifest.name, run.units, {} if run.is_new else run.ledger.commits())
        todo = _again(tally, codes) if retry_failed else []
        undone = [WorkItem(unit) for unit in run.units if unit.id not in tally.commits]
        if undone and not todo:
            _check_budget(manifest, store, tally)
        todo += undone
        progress(tally.status())
        if todo:
            if inputs_changed(run, manifest, allow_drift):
                relocate(manifest, run, pool)
            with Heartbeat(store, tally.status().beat()) as heartbeat:
                todo = _beside_others(todo, store, heartbeat)
                if not run.is_new:
                    for name in (SUCCESS, INDEX):  # both are outdated now; the report is written again at the end
                        store.delete(name)
                _work(manifest, pool, run, tally, todo, heartbeat, progress)
                published = _publish(run, tally)
                report = write_report(run, tally.commits, published)
        else:
            published = _publish(run, tally)
            # With --allow-drift there may be a new note, which the report must list.
            reported = published is not None and is_reported(store) and not allow_drift
            report = (summarize if reported else write_report)(run, tally.commits, published)
        progress(tally.status(finished=True))
        try:
            _check_budget(manifest, store, tally)
        except RunError:
            store.delete(SUCCESS)
            raise
        store.create(SUCCESS, b"")
        return report


RUNNERS: dict[str, Callable[..., Report | Distilled]] = {"dataset": make_dataset, "generator": train}
"""By the result of a task."""


def _check_codes(codes: Collection[str], retry_failed: bool) -> None:
    if codes and not retry_failed:
        raise RequestError("codes: they select what to retry, so they need --retry-failed")
    unknown = [code for code in codes if code not in ERROR_CODES]
    if unknown:
        raise RequestError(f"--code {unknown[0]}: no such error code; there are {', '.join(ERROR_CODES)}")


def _again(tally: RunTally, codes: Collection[str]) -> list[WorkItem]:
    """The units with failed samples, each as a work item of its next generation."""
    items = []
    for commit in tally.commits.values():
        wanted = {code for code in commit.errors if not codes or code in codes}
        if wanted:
            items.append(WorkItem(tally.units[commit.unit], commit.generation + 1, tuple(sorted(wanted))))
            tally.retry(commit.unit, sum(commit.errors[code] for code in wanted))
    if codes and not items:
        there = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common()) or "none at all"
        raise RequestError(f"--code {', '.join(codes)}: no sample failed with it; there are: {there}")
    return items


def _beside_others(todo: list[WorkItem], store: Store, heartbeat: Heartbeat) -> list[WorkItem]:
    """The items, in another order if another driver is at work. That driver can already see our heartbeat.

    Raises:
        RequestError: another driver is at work, and the store permits only one.
    """
    others = other_drivers(store, heartbeat)
    if others and not store.has_create_only_put:
        refuse(store, others[0], "this store has no create-only put, so that two cannot share a run; stop one")
    return _shuffled(todo, heartbeat.name) if others else todo


def _work(
    manifest: Manifest,
    pool: Pool,
    run: Run,
    tally: RunTally,
    todo: Sequence[WorkItem],
    heartbeat: Heartbeat,
    progress: Callable[[Status], None],
) -> None:
    retried = {item.unit.id for item in todo if item.generation}
    for commit in pool.work(run, todo):
        if commit is not None:
            if not run.store.has_create_only_put:
                commit = run.ledger.decide(commit)
            tally.add(commit)
            retried.discard(commit.unit)
            if not run.store.has_create_only_put:
                shard = run.by_id[commit.unit].shard
                run.ledger.publish(shard, run.shards[shard])
            if not retried and len(tally.commits) < len(tally.units):  # pending retries may bring it back under budget
                _check_budget(manifest, run.store, tally)
        now = tally.status(pool.progress())
        heartbeat.now = now.beat()
        progress(now)


def _shuffled(todo: Sequence[WorkItem], seed: str) -> list[WorkItem]:
    """Shards in random order, each from its end, so that two drivers rarely compute the same unit."""
    shards = [list(items)[::-1] for _, items in groupby(todo, lambda item: item.unit.shard)]
    random.Random(seed).shuffle(shards)
    return [item for items in shards for item in items]


def _check_budget(manifest: Manifest, store: Store, tally: RunTally) -> None:
    """Stop a run that has exceeded its failure budget, in all or in one unit: going on would only cost more."""
    over = over_budget(manifest.errors, tally.failed, tally.samples, tally.errors, tally.worst)
    if over:
        left = len(tally.units) - len(tally.commits)
        state = f"stopped, {left} of {len(tally.units)} units are not done" if left else "everything is written"
        with suppress(StorageError):  # of the rows, which may be gone; the budget is over anyway
            over = "; ".join(filter(None, (over, common_reason(manifest))))
        raise RunError(
            f"{over}; {state}; `smsbatch errors {store.url}` lists them; fix the cause and run with --retry-failed "
            "(and with --allow-drift inputs, if it was in the source), or raise the limit"
        )


def _publish(run: Run, tally: RunTally) -> dict[int, Published] | None:
    """Publish the shards that no worker has published: another driver had the last unit, or files are gone.

    Returns:
        The records of all shards; None if one was missing or outdated.
    """
    published = run.ledger.publications()
    missing = [
        shard
        for shard, units in run.shards.items()
        if shard not in published or not published[shard].made_of(tally.commits[unit.id] for unit in units)
    ]
    for shard in missing:
        run.ledger.publish(shard, run.shards[shard])
    return None if missing else published
