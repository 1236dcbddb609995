"""Status: the counts, the files read for them, and the messages when no driver is at work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.ledgers import commit_unit
from support.made_up_run import MIXED, make_run, stylized

import smsbatch as sb
from smsbatch.data.index import read_units
from smsbatch.report.write import write_report
from smsbatch.runs import status as status_module
from smsbatch.runs.heartbeat import HEARTBEATS
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.run import Run
from smsbatch.runs.snapshot import Snapshot
from smsbatch.runs.status import Progress, RunTally
from smsbatch.storage.store import Store

LENIENT = {"errors": {"max_failed_fraction": 0.5}}


def beat(store: Store, *workers: Progress, **values: Any) -> None:
    told = {"time": time.time(), "rate": None, "samples_under_way": 0.0, "workers": list(map(asdict, workers))}
    store.put(f"{HEARTBEATS}/driver.json", json.dumps(told | values).encode())


def retry(store: Store, unit: int, *, publish: bool = False) -> None:
    """Commit a retry in which the unit's failed samples succeed; with `publish`, also publish its shard."""
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    of = units[unit]
    commit_unit(ledger, of, [stylized(n) for n in range(of.start, of.stop)], worker="w", seconds=1.0, generation=1)
    if publish:
        ledger.publish(of.shard, [one for one in units if one.shard == of.shard])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(tmp_path, MIXED, **LENIENT)


def test_published_shards_are_counted_by_their_records(store: Store) -> None:
    for path in store.list("_smsbatch/commits"):
        store.put(path, b"")  # reading it would fail
    now = sb.status(store.url)
    assert (now.units_done, now.samples_done, now.errors) == (3, 12, {"decode_error": 2, "bad_caption": 1})


@pytest.mark.parametrize("publish", [True, False])
def test_the_newest_generation_counts_published_or_not(publish: bool, store: Store) -> None:
    look = Snapshot(store.url)
    retry(store, 0, publish=publish)
    assert sb.status(look).failed == 3
    look.renew()
    assert sb.status(look).errors == sb.status(store.url).errors == {"decode_error": 1, "bad_caption": 1}


def test_a_record_that_lags_behind_its_own_generation(store: Store) -> None:
    """Two units of a shard were retried; its record has only one of them."""
    retry(store, 0, publish=True)
    retry(store, 1)
    record = json.loads(store.read("_smsbatch/published/000000.json"))
    assert record["generation"] == 1
    look = Snapshot(store.url)
    assert 0 not in look.records
    assert set(look.commits) == {0, 1}
    assert sb.status(look).failed == 2


def test_a_unit_that_is_not_done_any_more(store: Store) -> None:
    look = Snapshot(store.url)
    store.delete("_smsbatch/commits/000002.json")
    look.renew()
    assert (sb.status(look).samples_done, sb.status(look).errors) == (8, {"decode_error": 1})


def test_a_worker_that_tries_again_is_not_waiting(store: Store) -> None:
    busy = Progress("w", "000000", 1, 1, 0, 0, 0, generation=1)  # its driver has deleted the old report
    beat(store, busy, rate=0.5, samples_retried=3)
    now = sb.status(store.url)
    assert (now.workers, now.finished, now.note) == ((busy,), False, "")
    assert now.remaining_s == pytest.approx((3 - 1) / 0.5)
    retry(store, 0)
    assert [worker.unit for worker in sb.status(store.url).workers] == [None]


def test_what_was_kept_of_a_unit_tried_again_says_nothing_about_the_rate(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    clock: Iterator[float] = iter([100.0, 101.0, 110.0])
    monkeypatch.setattr(status_module, "monotonic", lambda: next(clock))
    before = ledger.commits()
    tally = RunTally("x", units, before)
    tally.retry(0, 1)
    tally.retry(2, 2)
    busy = Progress("w", "000000", 0, 1, 1, 1, 2, generation=1)
    started = tally.status([busy])
    assert started.workers == (busy,)
    assert (started.samples_retried, started.samples_under_way) == (3, 0.5)
    tally.add(replace(before[0], generation=1, attempt="again", failed=0, succeeded=4, errors={}))
    now = tally.status([busy])
    assert now.workers[0].unit is None
    assert (now.rate, now.samples_retried) == (pytest.approx(1 / 10), 2)


def test_it_says_that_nobody_is_at_work(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, commit=False, **LENIENT)
    assert sb.status(store.url).note == "no driver is at work on it; `smsbatch run` continues it"
    beat(store)
    assert sb.status(store.url).note == ""
    beat(store, time=time.time() - 1000)
    assert sb.status(store.url).note.startswith("no driver is at work")


def test_it_says_that_only_the_report_is_missing(store: Store) -> None:
    assert "shards or the report are missing" in sb.status(store.url).note
    write_report(Run.open(store))
    now = sb.status(store.url)
    assert (now.finished, now.note) == (True, "")


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({}, "3 of 12 samples failed (2 decode_error, 1 bad_caption), more than errors.max_failed_fraction (0.01)"),
        (
            {"max_failed_fraction": 0.5, "max_failed_fraction_per_unit": 0.4},
            "2 of the 4 samples of unit 000002 failed, more than errors.max_failed_fraction_per_unit (0.4)",
        ),
    ],
)
def test_it_says_that_a_run_stopped_by_its_budget(errors: dict[str, float], said: str, tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, errors=errors)
    note = sb.status(store.url).note
    assert note.startswith(f"stopped, but {said} allows; ")
    assert note.endswith("run with --retry-failed, or raise the limit")
    manifest = sb.Manifest.model_validate(json.loads(store.read("run.json"))["manifest"] | LENIENT)
    assert "report" in sb.status(manifest).note, "the limit was raised"
    write_report(Run.open(store))
    assert sb.status(store.url).note.startswith("finished, but ")


def test_what_a_killed_driver_left_does_not_unmake_a_finished_run(store: Store) -> None:
    """The heartbeat of a killed driver is fresh for a minute, and another driver may finish the run meanwhile."""
    write_report(Run.open(store))
    beat(store)
    assert sb.status(store.url).finished
    store.delete("_smsbatch/published/000001.json")
    assert not sb.status(store.url).finished
