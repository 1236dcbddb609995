"""The store's guarantees on disk, in memory and on S3: objects are whole or absent, one creator wins, clear errors."""

from __future__ import annotations

import errno
import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.making import leftovers, read_range

from smsbatch.errors import RequestError, StorageError
from smsbatch.storage.retries import redact
from smsbatch.storage.store import Store

ODD_NAMES = [
    "a b+c.txt",
    "ü/日本.txt",
    "100%.txt",
    "%41.txt",
    "what?.txt",
    "a#b.txt",
    "[0-9]*.txt",
    "{1,2}.txt",
    "a&b=c;d,e'f.txt",
    "~/x",
]


@pytest.fixture(params=["disk", "memory", "s3", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(tmp_path / "run")
    if request.param == "memory":
        return Store(f"memory://run-{uuid.uuid4().hex}")
    s3 = request.getfixturevalue("s3")
    return Store(f"s3://{s3.bucket()}" + ("/some/run/" if request.param == "s3" else ""), s3.storage)


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


def test_one_of_many_creators_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        for round in range(20 if store.is_local else 5):
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
    assert Store(f"file://{tmp_path}/out").locate("run.json") == f"{tmp_path}/out/run.json"
    for url in ("s3://bucket/a b/run", "s3://bucket/a b/run/"):
        assert Store(url).locate("run.json") == "s3://bucket/a b/run/run.json"
    assert Store("s3://bucket").locate("run.json") == "s3://bucket/run.json"


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


def test_parts_and_many_are_read(store: Store) -> None:
    store.put("data", b"0123456789")
    store.put("empty", b"")
    assert read_range(store, "data", 2, 5) == b"234"
    assert read_range(store, "data", 8, 20) == b"89"
    assert [read_range(store, "data", *ends) for ends in ((3, 3), (10, 12), (50, 60))] == [b"", b"", b""]
    assert store.read("empty") == read_range(store, "empty", 0, 5) == b""
    with pytest.raises(FileNotFoundError):
        read_range(store, "gone", 0, 5)
    with pytest.raises(StorageError, match=rf"^cannot read {store.url}/gone: .*"):
        store.read("gone")
    store.put("folder/x", b"")
    assert store.read_all(["gone", "empty", "data", "folder", "data"]) == {"empty": b"", "data": b"0123456789"}
    assert store.read_all([]) == {}
    assert store.sizes() == {"data": 10, "empty": 0, "folder/x": 0}
    assert store.sizes("folder") == {"folder/x": 0}
    assert [name for name in store.entries() if name != "_smsbatch"] == ["data", "empty", "folder"]


def test_a_file_can_be_sought_in(store: Store) -> None:
    content = bytes(range(256)) * 10_000
    store.put("data", content)
    with store.open_read("data") as file:
        assert file.seek(0, os.SEEK_END) == len(content)
        assert file.read(10) == b""
        file.seek(-3, os.SEEK_END)
        assert file.read() == content[-3:]
        for at, length in ((0, 512), (70_000, 512), (1 << 20, 3), (70_003, 2_000_000)):
            file.seek(at)
            assert (file.tell(), file.read(length)) == (at, content[at : at + length])


def test_a_copy_replaces_its_target_and_keeps_its_source(store: Store) -> None:
    store.put("a/one", b"one")
    store.put("b/two", b"before")
    store.copy("a/one", "b/two")
    store.copy("a/one", "c/new")
    assert store.read_all(["a/one", "b/two", "c/new"]) == dict.fromkeys(["a/one", "b/two", "c/new"], b"one")
    with pytest.raises(StorageError, match=rf"^cannot copy to {store.url}/d {store.url}/gone: "):
        store.copy("gone", "d")
    assert not store.exists("d")
    assert leftovers(store) == []


def test_when_it_was_written(store: Store) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    store.put("a", b"1")
    assert before < store.modified("a") < before + timedelta(minutes=1)
    with pytest.raises(StorageError, match=rf"^cannot read {store.url}/gone: .*"):
        store.modified("gone")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_mean_themselves(store: Store, name: str) -> None:
    assert store.create(name, b"1")
    assert not store.create(name, b"2")
    store.put("0.txt", b"another")
    store.copy(name, f"copies/{name}")
    assert store.list() == sorted(["0.txt", name, f"copies/{name}"])
    assert (store.read(name), store.size(name)) == (b"1", 1)
    assert read_range(store, f"copies/{name}", 0, 1) == b"1"
    store.delete(name)
    assert store.list() == sorted(["0.txt", f"copies/{name}"])


def test_a_name_is_no_folder_of_longer_names(store: Store) -> None:
    store.put("run", b"1")
    store.put("run2/a", b"1")
    assert store.list("run") == []
    assert store.list("ru") == []
    assert not store.exists("run2")


def test_a_store_that_keeps_the_promise_of_create_says_so(store: Store) -> None:
    assert store.supports_create()
    assert store.list() == []


def test_a_single_writer_may_go_without_conditions(store: Store, tmp_path: Path) -> None:
    single = Store(store.url, store.storage, has_create_only_put=False)
    (tmp_path / "local").write_bytes(b"2")
    assert single.create("a", b"1")
    assert not single.create("a", tmp_path / "local")
    assert single.read("a") == b"1"
    assert pickle.loads(pickle.dumps(single)).has_create_only_put is False


def test_no_driver_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match=r"^gs://: .*gcsfs"):
        Store("gs://bucket/run")
    with pytest.raises(RequestError, match=r"^what://: no driver is known"):
        Store("what://bucket/run")
    with pytest.raises(RequestError, match=r"web servers are only read") as caught:
        Store("https://me:secret@host/run")
    assert "secret" not in str(caught.value)


def test_no_secret_is_shown() -> None:
    signed = "https://user:pass@host/a.jpg?x=1&X-Amz-Signature=abc&X-Amz-Security-Token=def&sig=ghi&y=2\nnext"
    shown = "https://***@host/a.jpg?x=1&X-Amz-Signature=***&X-Amz-Security-Token=***&sig=***&y=2 next"
    assert redact(signed) == shown
