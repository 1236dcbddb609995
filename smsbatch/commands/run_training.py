"""A training from its manifest to its generator: plan, then train in this process or on Ray.

Started again it goes on from the newest checkpoint, and with nothing left to do it says so.
"""

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
from smsbatch.runs.drift import inputs_changed
from smsbatch.runs.heartbeat import Heartbeat, other_drivers
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
        raise RequestError("--retry-failed is of runs that make a dataset; a training takes other samples instead")
    with pool_of(manifest) as pool:
        run = establish(manifest, pool, allow_drift)
        store = run.store
        if store.exists(SUCCESS):
            return Distilled.of(run)
        if inputs_changed(run, manifest, allow_drift):
            relocate(manifest, run, pool)
    training = manifest.distill
    with Heartbeat(store) as heart, _asked_to_stop() as stop:
        _refuse_others(store, heart)
        first_step, notices = _to_go_on_from(store)
        progress(TrainingProgress(first_step, training.all_steps, training.phase(first_step), time=time.time()))
        if manifest.compute.pool == "local":
            from smsbatch.training.loop import train_here  # with torch, which nobody needs who only looks

            done = train_here(manifest, stop.is_set, progress)
        else:
            from smsbatch.cluster.ray_train import train_on_ray

            done = train_on_ray(manifest, store, stop.is_set, progress)
    if not done:
        raise KeyboardInterrupt
    return Distilled.of(run, first_step, notices)


def _to_go_on_from(store: Store) -> tuple[int, list[str]]:
    """The step of the checkpoint that the workers will take, and why no newer one. It is read, and dropped at once: the
    length alone does not show all damage."""
    found = restore(store)
    return (found.checkpoint.step if found.checkpoint else 0), found.notices


def _refuse_others(store: Store, heart: Heartbeat) -> None:
    """Two trainings would write one generator."""
    others = other_drivers(store, heart)
    if others:
        raise RequestError(
            f"{store.url}: another driver, {others[0].name}, is at work (seen {others[0].age_s:.0f} s ago); stop it, "
            "or, if it is dead, try again in a minute"
        )


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second one interrupts whatever is going on."""
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
