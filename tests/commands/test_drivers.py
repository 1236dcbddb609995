"""Heartbeats, and stores in which only one driver may commit. `test_crashes.py` tests two drivers at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.jobs import make_photos, rows, write_manifest

import smsbatch as sb
from smsbatch.commands.run import _shuffled
from smsbatch.data.sample import Unit
from smsbatch.runs import heartbeat as heart_module
from smsbatch.runs.heartbeat import Heartbeat, drivers
from smsbatch.runs.status import Progress
from smsbatch.storage.scratch import process_table
from smsbatch.storage.store import Store
from smsbatch.workers.worker import WorkItem


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path) -> Path:
    keys = [f"photo-{number:02}" for number in range(8)]
    return write_manifest(tmp_path, model, lora, make_photos(tmp_path / "photos", keys), output={"samples_per_unit": 1})


def heartbeat(out: Path, name: str = "elsewhere-1-abc", age_s: float = 0.0, **values: Any) -> Path:
    file = out / "_smsbatch/heartbeats" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    beat = {"time": time.time() - age_s, "rate": None, "samples_under_way": 0.0, "workers": []} | values
    file.write_text(json.dumps(beat))
    return file


def test_whoever_leaves_in_order_takes_his_heartbeat_along(job: Path, tmp_path: Path) -> None:
    beats = tmp_path / "out/_smsbatch/heartbeats"
    seen = []
    sb.run(sb.load(job), progress=lambda status: seen.append(beats.exists() and len(list(beats.iterdir()))))
    assert max(seen) == 1
    assert list(beats.iterdir()) == []


def test_a_heart_beats_on_while_the_driver_is_busy_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(heart_module, "BEAT_S", 0.01)
    with Heartbeat(store, sb.Status("x", 1, 0, 1, 0, 0.0, {}, False).beat()) as heart:
        (beat,) = tmp_path.rglob("*.json")
        heart.now = sb.Status("x", 1, 0, 1, 0, 0.5, {}, False).beat()
        deadline = time.monotonic() + 30
        while json.loads(beat.read_text())["samples_under_way"] != 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [driver.name for driver in drivers(store)] == [heart.name]
    assert drivers(store) == []


def test_a_store_that_is_gone_does_not_hide_why_a_driver_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(store: Store, path: str) -> None:
        raise sb.StorageError("gone")

    def leave() -> None:
        with Heartbeat(Store(tmp_path / "out"), sb.Status("x", 1, 0, 1, 0, 0.0, {}, False).beat()):
            monkeypatch.setattr(Store, "delete", gone)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()


def test_the_dead_are_buried_by_the_next_driver(job: Path, tmp_path: Path) -> None:
    sb.run(sb.load(job, ["source.limit=8"]))
    dead = heartbeat(tmp_path / "out", age_s=100_000)
    (tmp_path / "out/_smsbatch/commits/000003.json").unlink()
    sb.run(sb.load(job, ["source.limit=8"]))
    assert not dead.exists()


def test_a_process_that_is_no_more_is_dead_at_once(tmp_path: Path) -> None:
    """An ended process proves this only in our process table: another container may have the same host name."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, table, alive in (
        (ended.pid, process_table(), False),
        (os.getpid(), process_table(), True),
        (ended.pid, "of-another-container", True),
        (ended.pid, "", True),
    ):
        beat = heartbeat(tmp_path, f"{socket.gethostname()}-{process}-abc", 1.0)
        beat.write_text(json.dumps(json.loads(beat.read_text()) | {"processes": table}))
        (driver,) = drivers(Store(tmp_path))
        assert (driver.name, driver.alive) == (beat.stem, alive)
        beat.unlink()


YEAR_S = 365 * 86400.0
NO_TIMES = ("yesterday", None, [1], True, float("inf"), 10**400)


@pytest.mark.parametrize(
    ("by_driver_s", "by_store_s", "alive"),
    [
        (5, 5, True),
        (-30, 5, True),  # the driver's clock is ahead by half a minute
        (5, -30, True),  # the store's is
        (-YEAR_S, 5, True),  # the driver's clock is wrong by a year, but it has just written
        (-YEAR_S, 100, False),
        (-YEAR_S, -YEAR_S, False),  # nothing tells its age, and it must not live for a year
        (100, 5, False),  # a copied folder: the store has just written what is old
        (YEAR_S, YEAR_S, False),
    ],
)
def test_the_age_of_a_driver(by_driver_s: float, by_store_s: float, alive: bool, tmp_path: Path) -> None:
    beat = heartbeat(tmp_path, age_s=by_driver_s)
    os.utime(beat, (time.time() - by_store_s,) * 2)
    (driver,) = drivers(Store(tmp_path))
    assert driver.alive == alive
    assert driver.age_s >= 0


@pytest.mark.parametrize("told", NO_TIMES, ids=lambda told: str(told)[:9])
def test_of_what_is_no_time_the_store_s_counts(told: Any, tmp_path: Path) -> None:
    beat = heartbeat(tmp_path, time=told)
    for age_s, alive in ((5, True), (100, False)):
        os.utime(beat, (time.time() - age_s,) * 2)
        (driver,) = drivers(Store(tmp_path))
        assert driver.alive == alive
    assert drivers(Store(tmp_path), remove_stale=True) == []
    assert not beat.exists()


def test_a_heartbeat_that_is_no_json_grows_old_too(tmp_path: Path) -> None:
    beat = heartbeat(tmp_path)
    for content in ("", "[", "[1]", "null", "[" * 100_000):
        beat.write_text(content)
        (driver,) = drivers(Store(tmp_path))
        assert driver.alive
        os.utime(beat, (time.time() - 100,) * 2)
        (driver,) = drivers(Store(tmp_path))
        assert not driver.alive


def test_a_second_driver_takes_shards_in_another_order() -> None:
    todo = [WorkItem(Unit(number, number // 4, number, number + 1)) for number in range(400)]
    shuffled = _shuffled(todo, "a-driver")
    assert sorted(shuffled, key=lambda item: item.unit.id) == todo
    assert [item.unit.shard for item in shuffled] != [item.unit.shard for item in todo]
    for place in range(0, 400, 4):  # a shard's units stay together, in reverse order, so that it is complete soon
        together = [item.unit.id for item in shuffled[place : place + 4]]
        assert together == sorted(together, reverse=True)
        assert together[0] - together[-1] == 3


class TestAStoreWithoutCreateOnlyPut:
    @pytest.fixture(autouse=True)
    def unconditional(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Store, "supports_create", lambda self: False)

    def test_the_driver_alone_commits_and_run_json_says_so(self, job: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        committing: list[str] = []
        create = Store.create

        def spied(store: Store, path: str, source: bytes | Path) -> bool:
            if path.startswith("_smsbatch/commits"):
                committing.append(threading.current_thread().name)
            return create(store, path, source)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "create", spied)
            sb.run(sb.load(job))
        assert json.loads((out / "run.json").read_text())["commits"] == "driver"
        assert set(committing) == {threading.main_thread().name}
        assert len(committing) == len(rows(out)) == 8

    def test_a_second_driver_is_refused(self, job: Path, tmp_path: Path) -> None:
        sb.run(sb.load(job))
        (tmp_path / "out/_smsbatch/commits/000003.json").unlink()
        heartbeat(tmp_path / "out")
        with pytest.raises(sb.RequestError, match="another driver, elsewhere-1-abc, is at work"):
            sb.run(sb.load(job))
        heartbeat(tmp_path / "out", age_s=100)
        assert sb.run(sb.load(job)).succeeded == 8


def test_status_tells_of_every_driver_and_how_long_ago(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sb.run(sb.load(job))
    (out / "_smsbatch/commits/000007.json").unlink()
    worker = Progress("w0", "000007", 0, 1, 1, 5, 10, seen=time.time() - 20)
    heartbeat(out, "a", age_s=5, rate=0.5, samples_under_way=0.5, workers=[asdict(worker)])
    heartbeat(out, "b", age_s=100_000, rate=9.0, workers=[asdict(worker)])
    found = sb.status(sb.load(job))
    assert (found.samples_done, found.samples_under_way, found.rate) == (7, 0.5, 0.5)
    assert [(driver.name, driver.alive) for driver in found.drivers] == [("a", True), ("b", False)]
    assert found.workers == (worker,)
    (told,) = found.to_dict()["workers"]
    assert 20 <= told["seen_age_s"] < 60
    assert found.heartbeat_age_s == pytest.approx(5, abs=5)
