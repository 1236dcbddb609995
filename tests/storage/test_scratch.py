"""Temporary folders tell their process, and only those of processes that are gone are abandoned."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from smsbatch.storage import scratch
from smsbatch.storage.scratch import abandoned, remove, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_by(process: int, monkeypatch: pytest.MonkeyPatch, table: str | None = None) -> Path:
    """A folder with ten bytes, as `process` makes it, perhaps with another process table."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        if table is not None:
            patch.setattr(scratch, "process_table", lambda: table)
        with scratch_folder("plan") as made:
            folder = Path(made)
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/file").write_bytes(b"0123456789")
    return folder


def make_old(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - scratch.OLD_S - 60,) * 2)


@pytest.fixture
def ended() -> int:
    """The id of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_folder_is_removed_at_the_end_and_is_not_abandoned_before(temporary: Path) -> None:
    with scratch_folder("unit") as folder:
        Path(folder, "file").touch()
        assert abandoned() == {}
    assert list(temporary.iterdir()) == []


def test_a_folder_whose_process_is_gone_is_abandoned(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = left_by(ended, monkeypatch)
    assert abandoned() == {folder: 10 + (folder / "inner").stat().st_size}
    remove(folder)
    assert not folder.exists()


def test_a_folder_of_a_living_process_stays_however_old(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = left_by(os.getppid(), monkeypatch)
    make_old(folder)
    assert abandoned() == {}


@pytest.mark.parametrize("table", ["another-boot-or-container", None])
def test_a_process_that_cannot_be_looked_up_counts_as_alive_for_days(
    table: str | None, ended: int, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if table is None:  # the name of an older version
        folder = temporary / "smsbatch-plan-abcd1234"
        folder.mkdir()
    else:
        folder = left_by(ended, monkeypatch, table)
    assert abandoned() == {}
    make_old(folder)
    assert list(abandoned()) == [folder]


@pytest.mark.parametrize("name", ["smsbatch-", "smsbatch-notes", "smsbatch-my-own-folder", "other-plan-abcd1234"])
def test_the_folders_of_others_stay(name: str, temporary: Path) -> None:
    (temporary / name).mkdir()
    make_old(temporary / name)
    assert abandoned() == {}


def test_a_link_is_not_followed(ended: int, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = left_by(ended, monkeypatch)
    moved = folder.rename(temporary / "mine")
    folder.symlink_to(moved)
    assert abandoned() == {}
