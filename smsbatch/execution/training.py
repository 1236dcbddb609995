"""A distill run from its manifest to its generator: plan, train in the pool, tell of it.

Started again it goes on from the newest checkpoint, and with nothing left to do it says so.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from smsbatch.data.store import Store
from smsbatch.errors import RequestError
from smsbatch.execution.checkpoints import latest
from smsbatch.execution.distilled import Distilled
from smsbatch.execution.heart import Heart
from smsbatch.execution.plan import establish, relocate
from smsbatch.execution.pool import pool_of
from smsbatch.execution.record import check_allowed, inputs_changed, store_of, the_run
from smsbatch.execution.report import SUCCESS
from smsbatch.execution.status import drivers
from smsbatch.execution.training_log import TrainingProgress
from smsbatch.manifest import Distill

__all__ = ["distill"]


def distill(
    manifest: Distill,
    progress: Callable[[TrainingProgress], None] = lambda now: None,
    allow_drift: Collection[str] = (),
) -> Distilled:
    """Plan if there is no plan, train what is not trained.

    SIGINT and SIGTERM, where this is called in the main thread: the step is finished and a checkpoint written, then
    comes a KeyboardInterrupt; by a second one at once.

    Raises:
        RequestError: the manifest, source or weights are wrong, or not those of the run at `output.path`; or another
            driver is at work on it.
        StorageError: the output cannot be read or written; what is written is kept.
        RunError: the training diverged, too many samples failed, or workers kept dying.
    """
    check_allowed(manifest, allow_drift)
    store = store_of(manifest)
    with pool_of(manifest) as pool:
        establish(manifest, store, pool, allow_drift)
        if store.exists(SUCCESS):
            return Distilled.of(store, the_run(store))
        if inputs_changed(store, manifest, allow_drift):
            relocate(manifest, store, pool)
    checkpoint, training = latest(store), manifest.distill
    first_step = checkpoint.step if checkpoint else 0
    phase = "warm-up" if first_step < training.warmup_steps else "distillation"
    progress(TrainingProgress(first_step, training.all_steps, phase, None, None, time=time.time()))
    with Heart(store) as heart, _asked_to_stop() as stop:
        _refuse_others(store, heart.name)
        if manifest.compute.pool == "local":
            from smsbatch.execution.train import train_here  # with torch, which nobody needs who only looks

            done = train_here(manifest, stop.is_set, progress)
        else:
            from smsbatch.execution.ray_train import train_on_ray

            done = train_on_ray(manifest, store, stop.is_set, progress)
    if not done:
        raise KeyboardInterrupt
    return Distilled.of(store, the_run(store), first_step)


def _refuse_others(store: Store, own: str) -> None:
    """Two trainings would write one generator."""
    others = [driver for driver in drivers(store, bury=True) if driver.alive and driver.name != own]
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
