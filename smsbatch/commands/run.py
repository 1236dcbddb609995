"""A run from its manifest to its end: plan, then deal units to a pool, publish shards and report.

Started again it goes on where the commits end, and with nothing left to do it says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

from smsbatch.cluster.ray_pool import pool_of
from smsbatch.commands.plan import establish, relocate
from smsbatch.commands.run_training import train
from smsbatch.errors import ERROR_CODES, RequestError, RunError
from smsbatch.manifest import Errors, Manifest
from smsbatch.report.model import Report
from smsbatch.report.write import summarize, write_report
from smsbatch.runs.drift import check_allowed, inputs_changed
from smsbatch.runs.heartbeat import Heartbeat, other_drivers
from smsbatch.runs.layout import INDEX, SUCCESS, is_reported
from smsbatch.runs.records import Published
from smsbatch.runs.run import Run
from smsbatch.runs.status import RunTally, Status
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
    """Plan if there is no plan, do what is not done, publish, report; of a `distill` manifest, train.

    A training that gets SIGINT or SIGTERM, where this is called in the main thread, finishes its step and writes a
    checkpoint, then comes a KeyboardInterrupt; by a second one at once.

    Args:
        progress: called with a Status, of a training with a TrainingProgress, a few times a second.
        retry_failed: try failed samples again too, and publish their shards as a new generation.
        codes: only those that failed with one of these error codes.
        allow_drift: keys of the manifest, `weights` or `inputs` that may have changed since the plan; noted with the
            run, whose plan is obeyed nevertheless.

    Raises:
        RequestError: the manifest, source, weights or codes are wrong, or not those of the run at `output.path`;
            or another driver is at work on it, where two cannot be.
        StorageError: the output cannot be read or written; what is committed is kept.
        RunError: more samples failed than `errors` allows; a training diverged, or its workers kept dying.
    """
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
    with pool_of(manifest) as pool:
        run = establish(manifest, pool, allow_drift)
        store = run.store
        tally = RunTally(manifest.name, run.units, {} if run.is_new else run.ledger.commits())
        todo = _again(tally, codes) if retry_failed else []
        undone = [WorkItem(unit) for unit in run.units if unit.id not in tally.commits]
        if undone and not todo:
            _check_budget(manifest.errors, store, tally)
        todo += undone
        progress(tally.status())
        if todo:
            if inputs_changed(run, manifest, allow_drift):
                relocate(manifest, run, pool)
            with Heartbeat(store, tally.status().beat()) as heart:
                todo = _beside_others(todo, store, heart)
                if not run.is_new:
                    for name in (SUCCESS, INDEX):  # neither will be true; the report is written again at the end
                        store.delete(name)
                _work(manifest, pool, run, tally, todo, heart, progress)
                published = _publish(run, tally)
                report = write_report(run, tally.commits, published)
        else:
            published = _publish(run, tally)
            told = published is not None and is_reported(store) and not allow_drift  # which the report tells, too
            report = (summarize if told else write_report)(run, tally.commits, published)
    progress(tally.status(finished=True))
    try:
        _check_budget(manifest.errors, store, tally)
    except RunError:
        store.delete(SUCCESS)
        raise
    store.create(SUCCESS, b"")
    return report


RUNNERS: dict[str, Callable[..., Report | Distilled]] = {"dataset": make_dataset, "generator": train}
"""By what a task makes."""


def _check_codes(codes: Collection[str], retry_failed: bool) -> None:
    if codes and not retry_failed:
        raise RequestError("codes: they say what to retry, so they need --retry-failed")
    unknown = [code for code in codes if code not in ERROR_CODES]
    if unknown:
        raise RequestError(f"--code {unknown[0]}: no such error code; there are {', '.join(ERROR_CODES)}")


def _again(tally: RunTally, codes: Collection[str]) -> list[WorkItem]:
    """What is to be tried again: units with failed samples, each as its next generation."""
    items = []
    for commit in tally.commits.values():
        wanted = {code for code in commit.errors if not codes or code in codes}
        if wanted:
            items.append(WorkItem(tally.units[commit.unit], commit.generation + 1, tuple(sorted(wanted))))
            tally.retry(commit.unit, sum(commit.errors[code] for code in wanted))
    if codes and not items:
        there = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common()) or "none at all"
        raise RequestError(f"--code {', '.join(codes)}: no sample failed so; there are: {there}")
    return items


def _beside_others(todo: list[WorkItem], store: Store, heart: Heartbeat) -> list[WorkItem]:
    """What to do in which order, since another driver may be at work; ours can be seen already by the other.

    Raises:
        RequestError: one is, on a store where two must not be.
    """
    others = other_drivers(store, heart)
    if not others:
        return todo
    if not store.has_create_only_put:
        raise RequestError(
            f"{store.url}: another driver, {others[0].name}, is at work (seen {others[0].age_s:.0f} s ago), and this "
            "store has no create-only put, so that two cannot share a run; stop one, or try again in a minute"
        )
    return _shuffled(todo, heart.name)


def _work(
    manifest: Manifest,
    pool: Pool,
    run: Run,
    tally: RunTally,
    todo: Sequence[WorkItem],
    heart: Heartbeat,
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
            if not retried and len(tally.commits) < len(tally.units):  # while it mends, it may still be over
                _check_budget(manifest.errors, run.store, tally)
        now = tally.status(pool.progress())
        heart.now = now.beat()
        progress(now)


def _shuffled(todo: Sequence[WorkItem], seed: str) -> list[WorkItem]:
    """Another order than the driver has who is at work, shards by lot and each from its end: two meet seldom."""
    shards = [list(items)[::-1] for _, items in groupby(todo, lambda item: item.unit.shard)]
    random.Random(seed).shuffle(shards)
    return [item for items in shards for item in items]


def _check_budget(errors: Errors, store: Store, tally: RunTally) -> None:
    """Stop a run that can no longer end well, or in which one unit failed as a whole: it would only cost more."""
    left = len(tally.units) - len(tally.commits)
    state = f"stopped, {left} of {len(tally.units)} units are not done" if left else "everything is written"
    codes = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common())
    advice = (
        f"`smsbatch errors {store.url}` lists them; mend the cause and run with --retry-failed (and with --allow-drift "
        "inputs, if it was in the source), or raise the limit"
    )
    if tally.failed > errors.max_failed_fraction * tally.samples:
        raise RunError(
            f"{tally.failed} of {tally.samples} samples failed ({codes}), more than errors.max_failed_fraction "
            f"({errors.max_failed_fraction:g}) allows; {state}; {advice}"
        )
    worst = tally.worst
    if worst is not None and worst.failed > errors.max_failed_fraction_per_unit * worst.samples:
        raise RunError(
            f"{worst.failed} of the {worst.samples} samples of unit {worst.unit:06d} failed, more than "
            f"errors.max_failed_fraction_per_unit ({errors.max_failed_fraction_per_unit:g}) allows; {state}; {advice}"
        )


def _publish(run: Run, tally: RunTally) -> dict[int, Published] | None:
    """Publish what no worker has: shards whose last unit was another's, or whose files are gone.

    Returns:
        The records of all shards, None if any was missing.
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
