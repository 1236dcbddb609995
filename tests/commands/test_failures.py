"""The rows of failed samples of finished and unfinished runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.ledgers import commit_unit
from support.made_up_run import MIXED, make_run, stylized

import smsbatch as sb
from smsbatch.commands.failures import failures
from smsbatch.data.index import read_units
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.snapshot import Snapshot
from smsbatch.storage.store import Store

FAILED = ["p001", "p009", "p010"]


def keys(*arguments: object) -> list[str]:
    return [row["key"] for row in failures(*arguments)]  # type: ignore[arg-type]


def test_of_a_finished_run(tmp_path: Path) -> None:
    url = make_run(tmp_path, MIXED).url
    assert keys(url) == FAILED
    assert keys(url, "decode_error") == ["p001", "p009"]
    assert keys(url, None, 1) == ["p001"]
    assert keys(url, "oom") == []
    row = next(failures(url))
    assert (row["status"], row["error_code"], row["attempts"]) == ("failed", "decode_error", 1)
    assert row["error_message"] == "damaged JPEG data: broken"


def test_of_an_unfinished_run_from_its_attempts(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, commit=False)
    assert keys(store.url) == []
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    for unit in (units[0], units[2]):
        commit_unit(ledger, unit, MIXED[unit.start : unit.stop], worker="w", seconds=1.0)
    assert not store.list("metrics")
    assert keys(store.url) == FAILED


def test_of_a_newer_generation_before_it_is_published(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    unit = read_units(store)[2]
    again = [stylized(8), stylized(9), replace(MIXED[10], attempts=2), stylized(11)]
    commit_unit(Ledger(store, metrics=("lpips",)), unit, again, worker="w", seconds=1.0, generation=1)
    assert [(row["key"], row["attempts"]) for row in failures(store.url)] == [("p001", 1), ("p010", 2)]


def test_units_without_failures_are_not_read(tmp_path: Path) -> None:
    store = make_run(tmp_path, [stylized(n) for n in range(4)])
    for path in store.list("metrics"):
        store.put(path, b"x" * (store.size(path) or 0))  # reading it would fail
    assert keys(store.url) == []


def test_no_commit_is_read_twice_nor_one_whose_shard_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_run(tmp_path, MIXED)
    store.delete("_smsbatch/published/000001.json")
    read: list[str] = []
    read_one = Store._read_if_there
    monkeypatch.setattr(Store, "_read_if_there", lambda self, path: (read.append(path), read_one(self, path))[1])
    look = Snapshot(store.url)
    assert [row["key"] for row in failures(look)] == FAILED
    assert sb.status(look).failed == 3
    look.renew()
    assert sb.status(look).failed == 3
    assert [path for path in read if path.startswith("_smsbatch/commits")] == ["_smsbatch/commits/000002.json"]
    assert read.count("_smsbatch/published/000000.json") == 1


def test_of_a_published_file_that_is_gone_from_its_attempts(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    store.delete("metrics/000000.parquet")
    assert keys(store.url) == FAILED


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(sb.RequestError, match="no run here"):
        failures(str(tmp_path))
