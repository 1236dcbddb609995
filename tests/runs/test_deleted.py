"""An output that is deleted under a run; `tests/commands/test_crashes.py` deletes that of a real process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.damage import files_of
from support.made_up_run import MIXED, finish, make_run

from smsbatch.errors import RunError, SmsbatchError, StorageError
from smsbatch.runs.deleted import ends_if_deleted, remove_remains
from smsbatch.runs.heartbeat import HEARTBEATS
from smsbatch.runs.run import Run
from smsbatch.storage.store import Store


@pytest.mark.parametrize("error", [StorageError("plan/samples.parquet: no such file"), RunError("units are lost")])
def test_the_error_names_the_cause_and_late_files_are_removed(error: SmsbatchError, tmp_path: Path) -> None:
    out = finish(tmp_path)
    run = Run.open(str(out))
    (out / HEARTBEATS).mkdir()
    (out / HEARTBEATS / "other.json").touch()
    (out / "_smsbatch/published/000001.json").unlink()
    shutil.rmtree(out / "plan")
    (out / "run.json").unlink()
    (out / "_smsbatch/run.json").unlink()
    said = "the output was deleted while the run was at work; run again to start anew"
    with pytest.raises(StorageError, match=said), ends_if_deleted(run):
        raise error
    left = {name.split("/")[0] for name in files_of(out)}
    assert left == {"_smsbatch", "shards", "metrics", "README.md", "report.html", "index.json", "_SUCCESS"}
    assert [name for name in files_of(out) if name.startswith("_smsbatch")] == [f"{HEARTBEATS}/other.json"]
    assert not (out / "shards/000000.tar").exists(), "its record was there, so that it was published since"
    assert (out / "shards/000001.tar").exists(), "perhaps the deletion was stopped"


@pytest.mark.parametrize("lost", ["run.json", "_smsbatch/run.json", "plan/samples.parquet", "index.json"])
def test_of_a_run_that_is_there_nothing_is_removed(lost: str, tmp_path: Path) -> None:
    out = finish(tmp_path)
    run = Run.open(str(out))
    (out / lost).unlink()
    before = files_of(out)
    with pytest.raises(RunError, match="units are lost"), ends_if_deleted(run):
        raise RunError("units are lost")
    assert files_of(out) == before


def test_the_files_of_a_run_are_no_remains(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    before = files_of(tmp_path / "out")
    assert remove_remains(store) == 0
    assert files_of(tmp_path / "out") == before


def test_a_run_does_not_make_its_folder_again(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    run = Run.open(store)
    shutil.rmtree(tmp_path / "out")
    for write in (run.store.put, run.store.create, run.store.without_create_only_put().create):
        with pytest.raises(StorageError, match=r"cannot write .*: the folder is gone"):
            write("shards/000000.tar", b"x")
    assert not (tmp_path / "out").exists()
    Store(tmp_path / "out").put("x", b"x")
