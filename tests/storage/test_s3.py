"""S3 with faults: lost answers, throttling, resets, stalls, cut bodies, refusals; each with its expected outcome."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from support.making import expand, loaded, make_tar, read_range, source_of, stat
from support.s3server import SEEDED, Faults, Server
from tenacity import wait_none

from smsbatch.data.index import from_table
from smsbatch.data.reader import Reader, list_files, open_url
from smsbatch.data.sample import Span
from smsbatch.data.sources import parts, scan
from smsbatch.errors import SampleError, StorageError
from smsbatch.manifest import Storage
from smsbatch.storage import retries, s3 as s3_door
from smsbatch.storage.store import Store

CALLS = ["create", "put", "read", "read_range", "size", "list", "copy", "delete", "open_read"]
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT", wait_none())


@pytest.fixture
def faults(s3: Server) -> Iterator[Faults]:
    with Faults(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3: Server) -> str:
    return s3.bucket()


@pytest.fixture
def store(faults: Faults, bucket: str, s3: Server) -> Store:
    """A store behind the proxy, with four tries per request."""
    storage = s3.storage.model_copy(update={"endpoint": faults.endpoint, "retries": 3, "timeout_s": 1.0})
    return Store(f"s3://{bucket}/run", storage)


def calls(faults: Faults, method: str) -> int:
    return sum(request.method == method for request in faults.requests)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        *product(CALLS, [fault for fault in SEEDED if fault != "stall"]),
        *product(["create", "read"], ["stall"]),  # each takes a second
    ],
)
def test_one_fault_is_not_seen(store: Store, faults: Faults, call: str, fault: str) -> None:
    store.put("old", CONTENT)

    def opened() -> bytes:
        with store.open_read("old") as file:
            return file.read()

    act: Callable[[], object] = {
        "create": lambda: store.create("new", b"new"),
        "put": lambda: store.put("old", b"new"),
        "read": lambda: store.read("old"),
        "read_range": lambda: read_range(store, "old", 10, 2000),
        "size": lambda: store.size("old"),
        "list": lambda: store.list(),
        "copy": lambda: store.copy("old", "new"),
        "delete": lambda: store.delete("old"),
        "open_read": opened,
    }[call]
    faults.inject(fault)
    expected = {
        "create": True,
        "read": CONTENT,
        "read_range": CONTENT[10:2000],
        "size": len(CONTENT),
        "list": ["old"],
        "open_read": CONTENT,
    }
    assert act() == expected.get(call)
    assert sum(faults.injected.values()) == 1
    after = {"create": ["new", "old"], "copy": ["new", "old"], "delete": []}.get(call, ["old"])
    assert store.list() == after
    if call == "put":
        assert store.read("old") == b"new"


@pytest.mark.parametrize("fault", ["409", "500", "503"])
def test_faults_are_outlived_up_to_the_retries_and_named_beyond(store: Store, faults: Faults, fault: str) -> None:
    faults.inject(fault, times=3, method="PUT")
    assert store.create("a", b"1")
    assert len(faults.requests) == 4
    faults.inject(fault, times=4, method="PUT")
    with pytest.raises(StorageError, match=rf"^cannot write {store.url}/b: .*; .*what is committed is kept") as caught:
        store.create("b", b"1")
    assert "\n" not in str(caught.value)
    assert calls(faults, "PUT") == 8, "no second layer of retries below"
    assert store.list() == ["a"]


@pytest.mark.parametrize("size", [5, 11 << 20])
def test_a_create_whose_answer_was_lost_has_won(
    store: Store, faults: Faults, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_door, "PART", 5 << 20)
    (tmp_path / "file").write_bytes(os.urandom(size))
    method = "PUT" if size == 5 else "POST"
    for name, source in (("file", tmp_path / "file"), ("bytes", (tmp_path / "file").read_bytes())):
        faults.inject("reset_after", method=method, part=name, skip=0 if size == 5 else 1)  # after "initiate multipart"
        assert store.create(name, source)
        assert faults.injected.pop("reset_after")
        assert not store.create(name, b"another"), "there is one"
        assert not store.create(name, source), "one of another writer, even if it is the same"
    assert store.read("file") == store.read("bytes") == (tmp_path / "file").read_bytes()


def test_a_create_that_was_lost_and_then_beaten_has_lost(store: Store, faults: Faults, s3: Server, bucket: str) -> None:
    for content in (b"theirs", b"theirs, of another size"):
        s3.client.put_object(Bucket=bucket, Key="run/a", Body=content)
        faults.inject("reset_before", method="PUT")
        assert not store.create("a", b"myself")
        assert store.read("a") == content


def test_one_of_many_creators_wins_whatever_happens_on_the_way(s3: Server, bucket: str) -> None:
    with Faults(s3.endpoint, rate=0.2, kinds=["500", "503", "409", "reset_before", "reset_after", "cut"]) as faults:
        store = Store(f"s3://{bucket}", s3.storage.model_copy(update={"endpoint": faults.endpoint, "retries": 20}))
        with ThreadPoolExecutor(8) as pool:
            for round in range(10):
                won = list(pool.map(functools.partial(store.create, f"{round}"), [b"%d" % n for n in range(8)]))
                assert won.count(True) == 1
                assert store.read(f"{round}") == b"%d" % won.index(True)
        assert len(store.list()) == 10
        assert len(faults.injected) >= 4


def test_many_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    monkeypatch.setattr(s3_door, "PART", 5 << 20)
    content = os.urandom(11 << 20)
    (tmp_path / "big").write_bytes(content)
    for name, source in (("file", tmp_path / "big"), ("bytes", content)):
        store.put(name, source)
        assert sum("partNumber" in request.path and name in request.path for request in faults.requests) == 3
        assert store.size(name) == len(content)
    assert store.read("bytes") == content
    faults.inject("cut", method="GET")
    store.fetch("file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert read_range(store, "file", 10 << 20, 12 << 20) == content[10 << 20 :]
    with pytest.raises(SampleError, match=f"{len(content)} bytes or more, source.max_bytes is 1000") as caught:
        Reader(store.storage, 1000).read(Span(store.locate("file")))
    assert caught.value.code == "too_large"


def test_a_listing_of_many_pages(store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n:02d}/x" for n in range(25)]
    for name in names:
        store.put(name, b"1")
    pages = s3_door.S3._pages
    monkeypatch.setattr(s3_door.S3, "_pages", lambda self, **request: pages(self, **request, MaxKeys=10))
    before = calls(faults, "GET")
    faults.inject("503", method="GET", skip=1)
    assert store.list() == names
    assert calls(faults, "GET") == before + 4, "three pages, the second of them twice"
    assert store.entries() == [name.partition("/")[0] for name in names]


def test_a_store_that_does_not_keep_the_promise_of_create_is_found_out(
    store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.inject("501", method="PUT")
    assert not store.supports_create()
    upload = s3_door.S3._upload
    monkeypatch.setattr(s3_door.S3, "_upload", lambda self, path, source, **options: upload(self, path, source))
    assert not store.supports_create(), "it ignores If-None-Match"
    assert store.list() == []
    single = Store(store.url, store.storage, has_create_only_put=False)
    assert single.create("a", b"1")
    assert not single.create("a", b"2")


def test_without_conditions_none_is_sent(store: Store, faults: Faults) -> None:
    assert Store(store.url, store.storage, has_create_only_put=False).create("a", b"1")
    assert not any(request.conditional for request in faults.requests)
    assert store.create("b", b"1")
    assert any(request.conditional for request in faults.requests)


@pytest.mark.parametrize("lost", [False, True])
def test_a_create_that_was_beaten_by_what_is_gone_already_has_lost(
    store: Store, faults: Faults, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The object is another publisher's, or ours after a lost answer; it is deleted before `create` can look at it."""
    head = s3_door.S3._head

    def too_late(self: s3_door.S3, path: str) -> object:
        self._call("delete_object", Bucket=path.partition("/")[0], Key=path.partition("/")[2])
        return head(self, path)

    if lost:
        faults.inject("reset_after", method="PUT")
    else:
        store.put("a", b"theirs")
    monkeypatch.setattr(s3_door.S3, "_head", too_late)
    assert not store.create("a", b"mine")
    monkeypatch.undo()
    assert store.create("a", b"mine")


def test_a_create_and_a_put_are_one_request(store: Store, faults: Faults, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"whole")
    assert store.create("a", tmp_path / "file")
    store.put("b", tmp_path / "file")
    assert [request.method for request in faults.requests] == ["PUT", "PUT"]


def test_no_such_bucket(s3: Server) -> None:
    store = Store("s3://nowhere-at-all/run", s3.storage)
    for act in (store.check_writable, store.list, store.entries, lambda: store.read("a"), store.supports_create):
        with pytest.raises(
            StorageError, match=r"s3://nowhere-at-all/run.*: there is no such bucket; create it or check"
        ):
            act()


def test_forbidden(store: Store, faults: Faults) -> None:
    faults.inject("403")
    with pytest.raises(
        StorageError, match=rf"^cannot write {store.url}: injected \(AccessDenied\); check the permissions"
    ):
        store.check_writable()
    assert len(faults.requests) == 1, "not tried again"
    faults.inject("403")
    with pytest.raises(SampleError, match="AccessDenied") as caught:
        Reader(store.storage, 1000).read(Span(store.locate("a")))
    assert caught.value.code == "read_error"


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        (Storage(retries=0), "Unable to locate credentials"),
        (Storage(profile="nobody", retries=0), r"The config profile \(nobody\) could not be found"),
    ],
)
def test_no_credentials_is_one_line_and_stops_the_run(
    s3: Server, bucket: str, storage: Storage, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = storage.model_copy(update={"endpoint": s3.endpoint, "region": "us-east-1"})
    store = Store(f"s3://{bucket}/run", storage)
    with pytest.raises(StorageError, match=rf"^cannot write s3://{bucket}/run: {reason}; set AWS_PROFILE") as caught:
        store.check_writable()
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match=rf"^cannot read s3://{bucket}/a.jpg: {reason}"):
        Reader(storage, 1000).read(Span(f"s3://{bucket}/a.jpg", 0, 1))


def test_anonymous_needs_no_credentials(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.client.put_object(Bucket=bucket, Key="a", Body=b"public", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = s3.storage.model_copy(update={"anonymous": True})
    assert Reader(storage, 1000).read(Span(f"s3://{bucket}/a")) == b"public"


def test_an_endpoint_that_is_not_there_stops_the_run(bucket: str) -> None:
    storage = Storage(endpoint="http://127.0.0.1:9", region="us-east-1", retries=1)
    with pytest.raises(
        StorageError, match=r"^cannot write s3://.*127\.0\.0\.1:9.*; check the network and the endpoint"
    ):
        Store(f"s3://{bucket}/run", storage).check_writable()
    with pytest.raises(StorageError, match=r"^cannot read s3://.*/a.jpg: .*; check the network and the endpoint"):
        Reader(storage, 1000).read(Span(f"s3://{bucket}/a.jpg"))
    for endpoint in ("nonsense", "http://"):
        with pytest.raises(StorageError, match=r"Invalid endpoint.*; check the manifest's storage section"):
            Store(f"s3://{bucket}/run", storage.model_copy(update={"endpoint": endpoint})).check_writable()


def test_an_outage_is_no_samples_fault(store: Store, faults: Faults) -> None:
    store.put("a", b"1")
    faults.inject("503", times=4)
    with pytest.raises(StorageError, match=rf"^cannot read {store.url}/a: injected \(SlowDown\); what is committed"):
        Reader(store.storage, 1000).read(Span(store.locate("a"), 0, 1))


def test_a_stall_ends_at_the_timeout(store: Store, faults: Faults) -> None:
    store.put("a", b"1")
    storage = store.storage.model_copy(update={"retries": 0, "timeout_s": 0.3})
    faults.inject("stall", method="GET")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"[Tt]imeout"):
        Store(store.url, storage).read("a")
    assert time.monotonic() - started < 3


def test_sources_on_s3(store: Store, bucket: str) -> None:
    for name in ("b/2.jpg", "a [1].jpg", "b/1.jpg", "c.tar", "c2.tar"):
        store.put(name, name.encode())
    storage, root = store.storage, store.url
    assert expand(f"{root}/c*.tar", storage) == [f"{root}/c.tar", f"{root}/c2.tar"]
    assert expand(f"{root}/b/?.jpg", storage) == [f"{root}/b/1.jpg", f"{root}/b/2.jpg"]
    assert expand(f"{root}/a [1].jpg", storage) == [f"{root}/a [1].jpg"]
    assert expand(f"{root}/b", storage) == expand(f"{root}/z*", storage) == expand(f"{root}/z", storage) == []
    listed = list(list_files(root, storage))
    assert [file.path for file in listed] == ["a [1].jpg", "b/1.jpg", "b/2.jpg", "c.tar", "c2.tar"]
    assert [file.url for file in listed] == [f"{root}/{file.path}" for file in listed]
    for file in listed:
        assert (file.size, file.etag) == stat(file.url, storage)
        assert Reader(storage, 99).read(Span(file.url, 0, file.size, file.etag)) == file.path.encode()
        with open_url(file.url, storage) as opened:
            assert opened.read() == file.path.encode()
    assert next(list_files(f"s3://{bucket}", storage)).path == "run/a [1].jpg"
    assert stat(f"{root}/z", storage) is None
    with pytest.raises(NotADirectoryError):
        list(list_files(f"{root}/c.tar", storage))
    with pytest.raises(FileNotFoundError):
        list(list_files(f"{root}/z", storage))
    with pytest.raises(OSError, match="there is no such bucket"):
        list(list_files("s3://nowhere-at-all", storage))


def test_what_planning_asks_of_a_store(store: Store, faults: Faults) -> None:
    for number in range(50):
        store.put(f"{number:02d}.tar", b"x" * number)

    def requests(pattern: str) -> tuple[int, int]:
        """The numbers of HEAD and GET requests for fifty tars."""
        before = calls(faults, "HEAD"), calls(faults, "GET")
        found = parts(source_of("webdataset", f"{store.url}/{pattern}"), store.storage)
        assert [(part.url, part.size, part.etag != "") for part in found] == [
            (f"{store.url}/{number:02d}.tar", number, True) for number in range(50)
        ]
        return calls(faults, "HEAD") - before[0], calls(faults, "GET") - before[1]

    assert requests("{00..49}.tar") == (50, 0)
    heads, listings = requests("*.tar")
    assert heads + listings <= 5, "however many they are"


def test_the_fields_of_a_sample_in_a_tar_are_one_request(store: Store, faults: Faults, tmp_path: Path) -> None:
    members = [("a.jpg", b"1" * 70_000), ("a.json", b"{}"), ("a.txt", b"words"), ("b.jpg", b"2")]
    store.put("a.tar", make_tar(tmp_path / "a.tar", members))
    source = source_of("webdataset", f"{store.url}/a.tar")
    (part,) = parts(source, store.storage)
    entries = from_table(scan(part, source, store.storage).table)
    before = len(faults.requests)
    sample = loaded(entries[0], source, store.storage)
    assert len(faults.requests) == before + 1
    assert (sample.image, sample.caption, sample.fields) == (b"1" * 70_000, "words", {"json": b"{}", "txt": b"words"})


def test_an_object_replaced_under_a_reader_is_noticed(store: Store) -> None:
    store.put("a", b"0" * (3 << 20))
    with store.open_read("a") as file:
        file.read(10)
        store.put("a", b"1" * (3 << 20))
        file.seek(2 << 20)
        with pytest.raises(OSError, match="replaced while it was read"):
            file.read(10)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_store_works_on_both_sides_of_a_fork(store: Store) -> None:
    store.put("a", b"1")
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if store.read("a") == b"1" and store.create("b", b"2") else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("b") == b"2"
