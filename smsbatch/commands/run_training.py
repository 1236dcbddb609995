"""Run a training: plan, then train in this process or on Ray. A second call resumes from the newest checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from smsbatch.cluster.ray_pool import pool_of
from smsbatch.commands.plan import establish, relocate
from smsbatch.errors import RequestError
from smsbatch.manifest import Distill
from smsbatch.runs.checkpoints import restore
from smsbatch.runs.deleted import ends_if_deleted
from smsbatch.runs.drift import inputs_changed
from smsbatch.runs.heartbeat import Heartbeat, other_drivers, refuse
from smsbatch.runs.layout import SUCCESS
from smsbatch.storage.store import Store
from smsbatch.training.log import TrainingProgress
from smsbatch.training.result import Distilled


def train(
    manifest: Distill,
    progress: Callable[[TrainingProgress], None],
    *,
    retry_failed: bool,
    codes: Collection[str],
    allow_drift: Collection[str],
) -> Distilled:
    """`run` of a task that makes a generator."""
    if retry_failed or codes:
        raise RequestError("--retry-failed: only for runs that make a dataset; a training replaces failed samples")
    with pool_of(manifest) as pool:
        run = establish(manifest, pool, allow_drift)
        store = run.store
        if store.exists(SUCCESS):
            return Distilled.of(run)
        if inputs_changed(run, manifest, allow_drift):
            relocate(manifest, run, pool)
    training = manifest.distill
    with ends_if_deleted(run), Heartbeat(store) as heartbeat, _asked_to_stop() as stop:
        for other in other_drivers(store, heartbeat):
            refuse(store, other, "two trainings would write one generator; stop it")
        first_step, notices = _resume_point(store)
        progress(TrainingProgress(first_step, training.all_steps, training.phase(first_step), time=time.time()))
        if manifest.compute.pool == "local":
            from smsbatch.training.loop import train_here  # loads torch, which no other branch needs

            done = train_here(manifest, run, stop.is_set, progress)
        else:
            from smsbatch.cluster.ray_train import train_on_ray

            done = train_on_ray(manifest, store, stop.is_set, progress)
    if not done:
        raise KeyboardInterrupt
    return Distilled.of(run, first_step, notices)


def _resume_point(store: Store) -> tuple[int, list[str]]:
    """The step of the checkpoint that the workers will take, and notices about damaged newer ones.

    The checkpoint is read here only to check its digest, because its length does not show all damage.
    """
    found = restore(store)
    return (found.checkpoint.step if found.checkpoint else 0), found.notices


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one raises KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
