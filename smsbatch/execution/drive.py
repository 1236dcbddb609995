"""A run from its manifest to its report: plan, deal units to a pool, publish shards, report.

Started again it goes on where the commits end, and with nothing left to do it says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from itertools import groupby

from smsbatch.data.ledger import Commit, Ledger
from smsbatch.data.sample import Unit
from smsbatch.data.store import Store
from smsbatch.errors import RequestError, RunError
from smsbatch.execution.plan import establish, relocate
from smsbatch.execution.pool import Pool, pool_of
from smsbatch.execution.record import inputs_changed, store_of
from smsbatch.execution.report import SUCCESS, Report, is_reported, summarize, write_report
from smsbatch.execution.status import Heart, Status, Tally, drivers
from smsbatch.execution.worker import Task
from smsbatch.manifest import Errors, Manifest

__all__ = ["run"]


def run(
    manifest: Manifest,
    progress: Callable[[Status], None] = lambda status: None,
    *,
    retry_failed: bool = False,
    codes: Collection[str] = (),
    allow_drift: Collection[str] = (),
) -> Report:
    """Plan if there is no plan, do what is not done, publish, report.

    Args:
        progress: called a few times a second.
        retry_failed: try failed samples again too, and publish their shards as a new generation.
        codes: only those that failed with one of these error codes.
        allow_drift: keys of the manifest, `weights` or `inputs` that may have changed since the plan; noted with the
            run, whose plan is obeyed nevertheless.

    Raises:
        RequestError: the manifest, source or weights are wrong, or not those of the run at `output.path`.
        StorageError: the output cannot be read or written; what is committed is kept.
        RunError: more samples failed than `errors` allows.
    """
    if codes and not retry_failed:
        raise RequestError("codes: they say what to retry, so they need --retry-failed")
    with pool_of(manifest) as pool:
        store = store_of(manifest)
        plan = establish(manifest, store, pool, allow_drift)
        ledger = Ledger(store, metrics=manifest.metrics)
        tally = Tally(manifest.name, plan.units, ledger.commits())
        todo = [Task(unit) for unit in plan.units if unit.id not in tally.commits]
        if retry_failed:
            todo += _again(tally, codes)
        progress(tally.status())
        if todo:
            if inputs_changed(store, manifest, allow_drift):
                relocate(manifest, store, pool)
            if not retry_failed:
                _check_budget(manifest.errors, store, tally)
            _work(manifest, pool, store, ledger, tally, todo, progress, retry_failed)
    changed = _publish(ledger, tally)
    report = write_report(store) if todo or changed or not is_reported(store) else summarize(store)
    progress(tally.status(finished=True))
    allowed = manifest.errors.max_failed_fraction
    if report.failed > allowed * report.planned:
        raise RunError(
            f"{report.failed} of {report.planned} samples failed, more than errors.max_failed_fraction ({allowed:g}) "
            f"allows; everything is written, see {store.locate('report.html')}; raise the limit if that is good "
            "enough, or mend the cause and run with --retry-failed"
        )
    store.create(SUCCESS, b"")
    return report


def _again(tally: Tally, codes: Collection[str]) -> list[Task]:
    """What is to be tried again: units with failed samples, each as its next generation."""
    tasks = []
    for commit in tally.commits.values():
        wanted = {code for code in commit.errors if not codes or code in codes}
        if wanted:
            tasks.append(Task(tally.units[commit.unit], commit.generation + 1, tuple(sorted(wanted))))
    return tasks


def _work(
    manifest: Manifest,
    pool: Pool,
    store: Store,
    ledger: Ledger,
    tally: Tally,
    todo: Sequence[Task],
    progress: Callable[[Status], None],
    retry_failed: bool,
) -> None:
    heart = Heart(store)
    others = [driver for driver in drivers(store, bury=True) if driver.alive]
    if others and not store.conditional:
        raise RequestError(
            f"{store.url}: another driver, {others[0].name}, is at work (seen {others[0].age_s:.0f} s ago), and this "
            "store has no create-only put, so that two cannot share a run; stop one, or try again in a minute"
        )
    if others:
        todo = _shuffled(todo, heart.name)
    with ExitStack() as at_the_end:
        at_the_end.callback(heart.stop)  # whoever leaves in order is no longer at work
        heart.beat(tally.status())
        for commit in pool.work(todo):
            if commit is not None:
                if not store.conditional:
                    commit = ledger.decide(commit)
                tally.add(commit)
                if len(tally.commits) < len(tally.units) and not retry_failed:
                    _check_budget(manifest.errors, store, tally, commit)
            now = tally.status(pool.progress())
            progress(now)
            heart.beat(now)


def _shuffled(todo: Sequence[Task], seed: str) -> list[Task]:
    """Shards in another order than the driver who is at work has: two meet seldom, and then waste a little."""
    shards = [list(tasks) for _, tasks in groupby(todo, lambda task: task.unit.shard)]
    random.Random(seed).shuffle(shards)
    return [task for tasks in shards for task in tasks]


def _check_budget(errors: Errors, store: Store, tally: Tally, latest: Commit | None = None) -> None:
    """Stop a run that can no longer end well, or in which one unit fails as a whole: it would only cost more."""
    done = f"{len(tally.commits)} of {len(tally.units)} units are committed"
    advice = f"`smsbatch errors {store.url}` lists them; mend the cause and run with --retry-failed, or raise the limit"
    worst = ", ".join(f"{count} {code}" for code, count in tally.errors.most_common())
    if tally.failed > errors.max_failed_fraction * tally.samples:
        raise RunError(
            f"stopped: {tally.failed} of {tally.samples} samples have failed ({worst}), more than "
            f"errors.max_failed_fraction ({errors.max_failed_fraction:g}) allows in all; {done}; {advice}"
        )
    if latest is not None and latest.failed > errors.max_failed_fraction_per_unit * latest.samples:
        raise RunError(
            f"stopped: {latest.failed} of the {latest.samples} samples of unit {latest.unit:06d} have failed ({worst} "
            f"in all), more than errors.max_failed_fraction_per_unit ({errors.max_failed_fraction_per_unit:g}) allows; "
            f"{done}; {advice}"
        )


def _publish(ledger: Ledger, tally: Tally) -> bool:
    """Publish what no worker has: shards whose last unit was another's, or whose files are gone; whether any was."""
    published = ledger.publications()
    changed = False
    for shard, grouped in groupby(tally.units.values(), lambda unit: unit.shard):
        units: list[Unit] = list(grouped)
        record = published.get(shard)
        if record is None or list(record.attempts) != [tally.commits[unit.id].attempt for unit in units]:
            ledger.publish(shard, units)
            changed = True
    return changed
