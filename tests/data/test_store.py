"""The store's promises, on disk and in memory: whole or absent, one creator, clear refusals."""

from __future__ import annotations

import errno
import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from making import leftovers

from smsbatch.data.sample import Span
from smsbatch.data.store import Store, read_span
from smsbatch.errors import SampleError, StorageError


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "run" if request.param == "disk" else f"memory://run-{uuid.uuid4().hex}")


def test_put_read_list_size_delete(store: Store, tmp_path: Path) -> None:
    assert store.list() == []
    store.put("b/two", b"2")
    (tmp_path / "local").write_bytes(b"one")
    store.put("a/one", tmp_path / "local")
    store.put("b/two", b"two again")
    assert store.list() == ["a/one", "b/two"]
    assert store.list("b") == ["b/two"]
    assert store.list("c") == []
    assert (store.read("a/one"), store.read("b/two")) == (b"one", b"two again")
    assert (store.size("b/two"), store.size("b"), store.size("c"), store.size("b/two/c")) == (9, None, None, None)
    with store.open_read("b/two") as file:
        file.seek(4)
        assert file.read() == b"again"
    store.fetch("b/two", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"two again"
    store.delete("b/two")
    store.delete("b/two")
    assert not store.exists("b/two")
    assert leftovers(store) == []


def test_create_only_creates(store: Store, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"other")
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert not store.create("a", tmp_path / "local")
    assert store.read("a") == b"first"
    assert store.create("b", tmp_path / "local")
    assert leftovers(store) == []


def test_one_of_many_creators_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for round in range(20):
            won = list(
                pool.map(lambda name, round=round: store.create(f"{round}", name), [b"%d" % n for n in range(8)])
            )
            assert won.count(True) == 1
            assert store.read(f"{round}") == b"%d" % won.index(True)
    assert leftovers(store) == []


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


def test_addresses_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("out/x/").locate("run.json") == f"{tmp_path}/out/x/run.json"
    assert Store("memory://out").locate("run.json") == "memory:///out/run.json"


def test_a_store_that_can_be_written_is_left_as_it_was(store: Store) -> None:
    store.check_writable()
    assert store.list() == []


def test_a_root_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        store = Store(root)
        assert not store.exists("run.json")
        with pytest.raises(
            StorageError, match=r"^cannot write .*; a part of this path is a file; choose another path$"
        ):
            store.check_writable()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "shards").touch()
    for write in (Store(tmp_path / "run").put, Store(tmp_path / "run").create):
        with pytest.raises(StorageError, match="a part of this path is a file"):
            write("shards/0.tar", b"x")


def test_what_is_missing_is_named(store: Store) -> None:
    for read in (store.read, store.open_read, lambda path: store.fetch(path, Path("unused"))):
        with pytest.raises(StorageError, match=rf"^cannot read {store.url}/gone: .*"):
            read("gone")


@pytest.mark.parametrize("write", [Store.put, Store.create])
def test_a_full_disk_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object
) -> None:
    store = Store(tmp_path)
    store.put("old", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert callable(write)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for name in ("old", "new"):
            with pytest.raises(
                StorageError, match=rf"cannot write {tmp_path}/{name}: No space left on device; free some"
            ):
                write(store, name, b"new")
    assert store.list() == ["old"]
    assert store.read("old") == b"old"


def test_a_span_is_read_exactly_or_fails(store: Store) -> None:
    store.put("data", b"0123456789")
    url = store.locate("data")
    assert read_span(Span(url, 2, 3)) == b"234"
    assert read_span(Span(url, 10, 0)) == b""
    for offset, length, missing in ((8, 5, 3), (20, 5, 5)):
        with pytest.raises(SampleError, match=f"data: cut off, {missing} of {length} bytes at {offset} are missing"):
            read_span(Span(url, offset, length))
    with pytest.raises(SampleError) as caught:
        read_span(Span(store.locate("gone"), 0, 1))
    assert caught.value.code == "read_error"
