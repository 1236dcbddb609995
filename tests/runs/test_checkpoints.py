"""A checkpoint is whole or absent when writers race, die or meet a full disk; `restore` finds the newest intact one."""

from __future__ import annotations

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from support.s3server import Server

from smsbatch.errors import StorageError
from smsbatch.runs.checkpoints import latest, prune, read, restore, write
from smsbatch.runs.layout import CHECKPOINTS
from smsbatch.storage.store import Store


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(tmp_path / "run")
    s3: Server = request.getfixturevalue("s3")
    return Store(f"s3://{s3.bucket()}/run", s3.storage)


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def state(step: int) -> bytes:
    return f"the state after {step} steps".encode() * 10


def written(store: Store, *steps: int) -> None:
    for step in steps:
        write(store, step, state(step))


def names(store: Store) -> list[str]:
    return [path.removeprefix(f"{CHECKPOINTS}/") for path in store.list()]


def test_what_is_written_is_read_again(store: Store) -> None:
    assert latest(store) is None
    assert (restore(store).checkpoint, restore(store).data, restore(store).notices) == (None, b"", [])
    first = write(store, 20, state(20), {"losses": {"objective": 0.5}})
    second = write(store, 100_000_000, state(9))
    assert latest(store) == second
    assert (first.step, first.bytes, first.about) == (20, len(state(20)), {"losses": {"objective": 0.5}})
    assert read(store, first) == state(20)
    found = restore(store)
    assert (found.checkpoint, found.data, found.notices) == (second, state(9), [])
    assert json.loads(store.read(f"{CHECKPOINTS}/00000020.json"))["file"] == first.file
    assert len(names(store)) == 4


def test_of_two_writers_of_a_step_one_wins_and_both_know_which(store: Store) -> None:
    together = Barrier(6)

    def compete(number: int) -> tuple[Any, bytes]:
        together.wait(20)
        data = f"by writer {number}".encode()
        return write(store, 7, data), data

    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(compete, range(6)))
    (winner,) = {standing.file: standing for standing, _ in results}.values()
    assert latest(store) == winner
    assert read(store, winner) in [data for _, data in results]
    assert sorted(names(store)) == sorted(["00000007.json", Path(winner.file).name]), "the losers' files are gone"


def spoil(store: Store, how: str, step: int) -> None:
    record = f"{CHECKPOINTS}/{step:08d}.json"
    file = json.loads(store.read(record))["file"]
    data = store.read(file)
    if how == "missing":
        store.delete(file)
    elif how == "truncated":
        store.put(file, data[:-1])
    elif how == "flipped":
        store.put(file, data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "torn":
        store.put(record, store.read(record)[:-20])
    elif how == "strange":
        store.put(record, b'{"step": 1}')


DAMAGE = {
    "missing": r"00000030-\w+\.safetensors is missing; an older",
    "truncated": r"00000030-\w+\.safetensors has 239 bytes instead of 240; an older",
    "flipped": r"00000030-\w+\.safetensors is not what was written; an older",
    "torn": r"00000030\.json is not a checkpoint's record; an older",
    "strange": r"00000030\.json is not a checkpoint's record; an older",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_passed_over_said_and_replaced(disk: Store, how: str) -> None:
    written(disk, 10, 20, 30)
    spoil(disk, how, 30)
    found = restore(disk)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.data) == (20, state(20))
    (notice,) = found.notices
    assert re.search(DAMAGE[how], notice)
    unread = latest(disk)
    assert unread is not None
    assert unread.step == (30 if how == "flipped" else 20)  # a flipped bit is found only by reading the file
    spoil(disk, "missing", 20)
    assert [restore(disk).data, len(restore(disk).notices)] == [state(10), 2]
    # The training goes on from 10, and comes to 20 and 30 again.
    for step in (20, 30):
        write(disk, step, state(step) + b"!")
        again = restore(disk)
        assert again.checkpoint is not None
        assert (again.checkpoint.step, again.data) == (step, state(step) + b"!")
    assert restore(disk).notices == []


def test_a_good_one_is_not_replaced(disk: Store) -> None:
    first = write(disk, 5, b"first")
    assert write(disk, 5, b"second") == first
    assert restore(disk).data == b"first"


def test_a_full_disk_leaves_all_as_it_was(disk: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written(disk, 10)
    before = disk.list()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot write .*: No space left on device; free some space and run"):
            write(disk, 20, state(20))
    assert disk.list() == before
    assert restore(disk).data == state(10)


@pytest.mark.parametrize("calls", range(3))
def test_a_writer_may_die_between_any_two_requests(disk: Store, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    written(disk, 10)
    left = iter([True] * calls)

    def dies(original: Any) -> Any:
        def call(*args: Any) -> Any:
            if not next(left, False):
                raise KeyboardInterrupt
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", dies(Store.put))
        patch.setattr(Store, "create", dies(Store.create))
        if calls < 2:
            with pytest.raises(KeyboardInterrupt):
                write(disk, 20, state(20))
        else:
            write(disk, 20, state(20))
    assert restore(disk).data == state(20 if calls == 2 else 10)
    assert restore(disk).notices == []
    written(disk, 20)
    assert restore(disk).data == state(20)


def test_prune_keeps_the_newest_that_are_whole(store: Store) -> None:
    written(store, *range(10, 70, 10))
    spoil(store, "missing", 40)
    prune(store, 3)  # keeps 60, 50 and, because the file of 40 is missing, 30
    assert [name for name in names(store) if name.endswith("json")] == [f"000000{n}.json" for n in (30, 40, 50, 60)]
    assert len([name for name in names(store) if name.endswith("safetensors")]) == 3
    prune(store, 1)
    assert [name.partition("-")[0] for name in names(store)] == ["00000060", "00000060.json"]
    assert restore(store).data == state(60)
    prune(store, 5)
    assert len(names(store)) == 2


def test_prune_removes_what_got_no_record_in_an_hour(disk: Store, tmp_path: Path) -> None:
    written(disk, 10, 20)
    for name, minutes in (("00000020-fresh", 50), ("00000020-stale", 70), ("00000030-stale", 70), ("00000005-new", 0)):
        path = tmp_path / "run" / CHECKPOINTS / f"{name}.safetensors"
        path.write_bytes(b"left by a writer who died")
        os.utime(path, (path.stat().st_mtime - 60 * minutes,) * 2)
    (tmp_path / "run" / CHECKPOINTS / "notes.txt").write_text("of the user's")
    prune(disk, 2)
    assert {name for name in names(disk) if not name.endswith("json")} == {
        Path(json.loads(disk.read(f"{CHECKPOINTS}/00000010.json"))["file"]).name,
        Path(json.loads(disk.read(f"{CHECKPOINTS}/00000020.json"))["file"]).name,
        "00000020-fresh.safetensors",
        "notes.txt",
    }, "what is older than the oldest checkpoint goes at once"
    assert restore(disk).data == state(20)
