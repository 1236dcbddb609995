"""Actors that die are replaced, their units retried and the fatal sample found; a driver may be interrupted.

Processes and signals are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.deadly import DeadlyWorker, StillbornWorker
from support.jobs import commits, make_generator, make_photos, pictures, rows, tars, write_manifest, write_stylize

import smsbatch as sb
from smsbatch.cluster import ray_pool
from smsbatch.cluster.retries import UnitRetry
from smsbatch.data.sample import Unit
from smsbatch.workers.worker import WorkItem


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray cluster whose actors find the modules of the tests by PYTHONPATH, as they find a user's."""
    import ray

    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
class TestRayPool:
    def test_a_dead_actor_is_replaced_and_its_unit_done_again(
        self, tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        photos = make_photos(tmp_path / "photos", ["a", "b", "flaky", "c", "d"])
        manifest = sb.load(write_manifest(tmp_path, model, lora, photos, compute={"pool": "ray", "workers": 2}))
        monkeypatch.setattr(ray_pool, "Worker", DeadlyWorker)
        report = sb.run(manifest)
        assert (tmp_path / "died-before").exists()
        assert (report.planned, report.succeeded) == (5, 5)
        undisturbed = manifest.model_copy(
            update={
                "output": manifest.output.model_copy(update={"path": str(tmp_path / "undisturbed")}),
                "compute": manifest.compute.model_copy(update={"pool": "local"}),
            }
        )
        sb.run(undisturbed)
        assert tars(tmp_path / "out") == tars(tmp_path / "undisturbed")

    @pytest.mark.slow
    def test_a_sample_that_kills_is_found_and_the_rest_is_done(
        self, tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = ["a", "b", "killer", "c", "d", "e"]
        manifest = sb.load(
            write_manifest(
                tmp_path,
                model,
                lora,
                make_photos(tmp_path / "photos", keys),
                compute={"pool": "ray", "workers": 2, "retries": 0},
                output={"samples_per_unit": 4},
                errors={"max_failed_fraction": 0.5},
            )
        )
        monkeypatch.setattr(ray_pool, "Worker", DeadlyWorker)
        report = sb.run(manifest)
        found = rows(tmp_path / "out")
        assert set(found) == set(keys)
        assert report.errors == {"worker_lost": 1}
        assert found["killer"]["error_code"] == "worker_lost"
        assert "alone" in found["killer"]["error_message"]
        assert found["killer"]["attempts"] > 1

    @pytest.mark.slow
    def test_a_generators_actor_that_dies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fatal sample is found among four units in flight; all other pictures are those of the local pool."""
        keys = ["a", "b", "killer", "c", "d", "e", "f"]
        manifest = sb.load(
            write_stylize(
                tmp_path,
                make_generator(tmp_path / "generator"),
                make_photos(tmp_path / "photos", keys),
                compute={"pool": "ray", "workers": 1, "retries": 0, "batch_size": 1},
                errors={"max_failed_fraction": 0.5},
            )
        )
        monkeypatch.setattr(ray_pool, "Worker", DeadlyWorker)
        sb.run(manifest)
        found = {key: row["error_code"] for key, row in rows(tmp_path / "out").items()}
        assert found == dict.fromkeys(keys) | {"killer": "worker_lost"}
        update = {
            "output": manifest.output.model_copy(update={"path": str(tmp_path / "local")}),
            "compute": manifest.compute.model_copy(update={"pool": "local"}),
        }
        sb.run(manifest.model_copy(update=update))
        here, there = pictures(tmp_path / "local"), pictures(tmp_path / "out")
        assert here.keys() - there.keys() == {"killer"}
        assert all(np.array_equal(here[key], there[key]) for key in there)

    @pytest.mark.slow
    def test_actors_that_cannot_even_load_end_the_run(
        self, tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        photos = make_photos(tmp_path / "photos")
        manifest = sb.load(write_manifest(tmp_path, model, lora, photos, compute={"pool": "ray", "workers": 1}))
        monkeypatch.setattr(ray_pool, "Worker", StillbornWorker)
        with pytest.raises(sb.RunError, match="3 workers in a row died while loading the models"):
            sb.run(manifest)


def _search(killers: set[int], retries: int = 2) -> tuple[UnitRetry, int]:
    """Simulate tries that die if they contain a row of `killers`. Returns the retry's state and the number of tries."""
    job, tries = UnitRetry(WorkItem(Unit(0, 0, 10, 26))), 0
    while True:
        tries += 1
        assert tries < 200
        if job.suspects:
            if killers & set(job.suspects[0]):
                assert job.worker_died(retries)
            else:
                job.suspects.popleft()
        elif killers - set(job.lost):
            if not job.worker_died(retries):
                return job, tries
        else:
            return job, tries


@pytest.mark.parametrize("killers", [set(), {10}, {25}, {17}, {10, 25}, {12, 13, 20}, set(range(10, 26))])
def test_the_search_finds_exactly_the_killers(killers: set[int]) -> None:
    job, tries = _search(killers)
    assert set(job.lost) == killers
    assert tries <= 5 + max(1, len(killers)) * 2 * 5  # halving: about 2 log2(16) probes for each


def test_a_unit_that_dies_after_its_search_is_given_up() -> None:
    job = UnitRetry(WorkItem(Unit(0, 0, 0, 1)))
    assert job.worker_died(0)
    job.suspects.popleft()  # it succeeded alone
    assert not job.worker_died(0)


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path) -> Path:
    """A manifest of eight units of ten steps, long enough to be interrupted."""
    keys = [f"photo-{number:02}" for number in range(8)]
    return write_manifest(
        tmp_path,
        model,
        lora,
        make_photos(tmp_path / "photos", keys),
        objective={"steps": 10},
        output={"samples_per_unit": 1},
    )


def _start(job: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "smsbatch", "run", str(job), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_commits(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list((out / "_smsbatch" / "commits").glob("*.json"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("pool_name", ["local", "ray"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_all_commits(job: Path, pool_name: str, how: signal.Signals) -> None:
    out = job.parent / "out"
    process = _start(job, "--set", f"compute.pool={pool_name}")
    _wait_for_commits(out, 1, process)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # like Ctrl-C in a terminal: to the driver and all its children
    else:
        process.terminate()  # like a cluster manager
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "smsbatch: interrupted; what is done is kept, the same command goes on from here"
    assert 1 <= len(commits(out)) < 8
    assert not list((out / "_smsbatch/heartbeats").iterdir())
