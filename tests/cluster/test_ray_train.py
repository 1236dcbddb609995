"""Trainings on a Ray cluster of real processes, one of which is killed.

`tests/training/test_loop.py` tests what all pools share.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.faults import Life, descendants, until
from support.trainings import checkpoints, log, steps, write_training

import smsbatch as sb
from smsbatch.cluster.connect import Sizing
from smsbatch.cluster.ray_train import _divided, _result
from smsbatch.storage.store import Store
from smsbatch.training.log import read_log

QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}  # seconds, so that deaths are noticed soon


@pytest.fixture(autouse=True)
def _no_life_is_left() -> Iterator[None]:
    yield
    Life.end_all()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's processes in Linux' /proc")
def test_a_worker_is_killed_and_a_driver_asked_to_leave(tmp_path: Path, model: Path, lora: Path) -> None:
    """A new group of workers resumes from the last checkpoint by itself; an interrupt stops it with a checkpoint.

    Finished by the local pool, the run has the losses of an undisturbed one, so every step had the same pictures.
    """
    job = write_training(
        tmp_path,
        model,
        lora,
        # Slow steps, because the driver's request needs two seconds to reach the workers.
        distill={"steps": 58, "repeats": 4, "checkpoint_every": 1, "keep": 3},
        compute={"pool": "ray", "workers": 2},
    )
    out = tmp_path / "out"
    run = Life(job, env=QUICK)
    until(lambda: bool(checkpoints(out)) or run.ended)
    # Ray names a process after its role.
    workers = [pid for pid, command in descendants(run.pid) if "RayTrainWorker" in command]
    assert len(workers) == 2, list(descendants(run.pid))
    os.kill(workers[1], signal.SIGKILL)
    until(lambda: len(attempts(out)) == 2 or run.ended)
    again = attempts(out)[1]
    assert again > 0, "from a checkpoint and not from the beginning"
    os.killpg(run.pid, signal.SIGINT)  # like Ctrl-C in a terminal: to the driver and all its children
    assert run.wait() == 130, run.said
    assert "interrupted" in run.said
    left = checkpoints(out)[-1]
    assert again <= left < 60
    assert len(checkpoints(out)) <= 3

    done = sb.run(sb.load(job, ["compute.pool=local"]))
    assert all(map(math.isfinite, done.losses.values()))
    assert (done.resumed_from, done.steps) == (left, 60)
    assert steps(out) == list(range(1, 61))
    undisturbed = tmp_path / "undisturbed"
    enough = min(left + 5, 60)  # includes some steps after each resumption

    def so_far(now: sb.TrainingProgress) -> None:
        if now.step > enough:
            raise EnoughError

    with suppress(EnoughError):
        reference = sb.load(job, ["compute.pool=local", "distill.checkpoint_every=60", f"output.path={undisturbed}"])
        sb.run(reference, so_far)
    expected, compared = read_log(Store(undisturbed)), set[str]()
    assert len(expected) == enough
    for ours, theirs in zip(log(out), expected, strict=False):
        for loss in ours.keys() & {"reconstruction", "fake"}:
            assert ours[loss] == pytest.approx(theirs[loss], rel=0.02), "another picture has another loss"
            compared.add(loss)
    assert compared == {"reconstruction", "fake"}


class EnoughError(Exception):
    """Ends a run that has reached the state that the test needs."""


def attempts(out: Path) -> list[int]:
    """The steps that the attempts started from, according to the names of their logs."""
    return sorted(int(file.name.split("-")[1]) for file in (out / "_smsbatch/training").glob("log-*"))


class TestWhatComesOutOfTheWorkers:
    """How results and exceptions of Ray Train are translated, without a cluster."""

    @pytest.fixture(autouse=True)
    def ray(self) -> None:
        """Import Ray only for these tests, because that takes seconds."""
        import ray.train

        self.ray = ray

    def test_our_errors_are_themselves(self) -> None:
        ours = sb.RunError("step 3 does not fit")
        failed = self.ray.train.WorkerGroupError("long", {0: RuntimeError("connection closed"), 1: ours})
        with pytest.raises(sb.RunError, match=r"^step 3 does not fit$"):
            _result(failed, retries=2)
        with pytest.raises(sb.RunError, match=r"^step 3 does not fit$"):
            _result(SimpleNamespace(return_value=ours), retries=2)

    def test_deaths_are_told_in_a_line(self) -> None:
        from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

        death = WorkerHealthCheckFailedError("long\nstory", self.ray.exceptions.RayActorError())
        failed = self.ray.train.WorkerGroupError("long", {0: RuntimeError("connection closed"), 1: death})
        with pytest.raises(sb.RunError, match=r"^workers died 3 times \(.*\); look at the memory .* last checkpoint$"):
            _result(failed, retries=2)

    def test_a_bug_keeps_its_traceback(self) -> None:
        failed = self.ray.train.WorkerGroupError("the traceback", {0: KeyError("x")})
        with pytest.raises(self.ray.train.WorkerGroupError, match="the traceback"):
            _result(failed, retries=2)

    @pytest.mark.parametrize(("done", "said"), [(True, True), (False, False)])
    def test_done_or_stopped(self, done: bool, said: bool) -> None:
        assert _result(SimpleNamespace(return_value=done), retries=2) is said


@pytest.mark.parametrize(("pictures", "room", "workers"), [(4, 8, 4), (6, 4, 3), (4, 3, 2), (5, 4, 1)])
def test_as_many_workers_as_divide_the_pictures(
    tmp_path: Path, model: Path, lora: Path, pictures: int, room: int, workers: int
) -> None:
    job = write_training(tmp_path, model, lora, distill={"images_per_step": pictures})
    assert _divided(Sizing(room, 1.0, 1), sb.load(job)).workers == workers
