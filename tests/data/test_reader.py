"""Source objects: how names are resolved, which reads are refused, and web servers with every kind of fault."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.making import expand, stat
from support.webserver import BODY, Web
from tenacity import wait_none

from smsbatch.data.reader import GAP, Reader, Stat, absolute, list_files, open_url
from smsbatch.data.sample import Span
from smsbatch.errors import RequestError, SampleError
from smsbatch.manifest import Storage
from smsbatch.storage import backend as remote, retries
from smsbatch.storage.store import Store

HERE = Storage()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setattr(retries, "WAIT", wait_none())
    return Reader(Storage(timeout_s=5, retries=2), 10_000)


def failure(reader: Reader, span: Span) -> tuple[str, str]:
    with pytest.raises(SampleError) as caught:
        reader.read(span)
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value)


# ------------------------------------------------------------------------------------------------------------- spans


@pytest.fixture(params=["disk", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        s3 = request.getfixturevalue("s3")
        return Store(f"s3://{s3.bucket()}/in", s3.storage)
    return Store(tmp_path / "in" if request.param == "disk" else f"memory://in-{tmp_path.name}")


def test_a_span_is_read_exactly_or_fails(store: Store) -> None:
    reader = Reader(store.storage, 1000)
    store.put("data", b"0123456789")
    store.put("empty", b"")
    url = store.locate("data")
    assert reader.read(Span(url, 2, 3)) == b"234"
    assert reader.read(Span(url, 10, 0)) == b""
    assert reader.read(Span(url, 0, 10)) == reader.read(Span(url)) == b"0123456789"
    assert reader.read(Span(store.locate("empty"))) == reader.read(Span(store.locate("empty"), 0, 0)) == b""
    for offset, length, missing in ((8, 5, 3), (20, 5, 5)):
        reason = f"{url}: cut off, {missing} of {length} bytes at {offset} are missing"
        assert failure(reader, Span(url, offset, length)) == ("read_error", reason)
    for span in (Span(url, 0, 9), Span(url, 0, 0)):
        assert failure(reader, span) == (
            "read_error",
            f"{url}: larger than when it was planned: it was replaced",
        )
    for span in (Span(store.locate("gone"), 0, 1), Span(store.locate("gone")), Span(store.url, 0, 1)):
        assert failure(reader, span)[0] == "read_error"


def test_what_is_too_large_is_not_read(store: Store) -> None:
    store.put("data", b"0123456789")
    url = store.locate("data")
    reason = f"{url}: 10 bytes or more, source.max_bytes is 9"
    assert failure(Reader(store.storage, 9), Span(url)) == ("too_large", reason)
    assert failure(Reader(store.storage, 9), Span(url, 0, 10)) == ("too_large", reason)
    assert Reader(store.storage, 9).read(Span(url, 1, 9)) == b"123456789"
    assert Reader(store.storage, 10).read(Span(url)) == b"0123456789"


def test_another_version_than_planned_is_refused(store: Store) -> None:
    if store.url.startswith("memory:"):
        assert stat(_put(store, b"1"), store.storage) == Stat(1, "")
        return
    url = _put(store, b"first")
    planned = stat(url, store.storage)
    assert planned is not None
    reader = Reader(store.storage, 1000)
    assert reader.read(Span(url, 1, 2, planned.etag)) == b"ir"
    _put(store, b"other")
    reason = f"{url}: was replaced since it was planned"
    assert failure(reader, Span(url, 1, 2, planned.etag)) == ("read_error", reason)
    assert Reader(store.storage, 1000, check_etag=False).read(Span(url, 1, 2, planned.etag)) == b"th"
    assert reader.read(Span(url, 1, 2)) == b"th"


def _put(store: Store, content: bytes) -> str:
    store.put("data", content)
    return store.locate("data")


class Counting(Reader):
    """A reader that records the offset and length of every read."""

    def __init__(self, storage: Storage, max_bytes: int) -> None:
        super().__init__(storage, max_bytes)
        self.asked: list[tuple[int, int | None]] = []

    def _read(self, span: Span, limit: int) -> bytes:
        self.asked.append((span.offset, span.length))
        return super()._read(span, limit)


def test_spans_that_lie_close_together_are_read_at_once(store: Store) -> None:
    content = os.urandom(3_000_000)
    store.put("data", content)
    store.put("other", content)
    url, other = store.locate("data"), store.locate("other")
    far = 600 + GAP + 1

    def asked(*spans: Span, max_bytes: int = 10_000_000) -> list[tuple[int, int | None]]:
        reader = Counting(store.storage, max_bytes)
        wanted = [content[span.offset :][: span.length] for span in spans]
        assert reader.read_all(spans) == wanted
        return reader.asked

    assert asked(Span(url, 512, 100), Span(url, 2000, 0), Span(url, 1024, 50)) == [(512, 1488)]
    assert asked(Span(url, 512, 88), Span(url, far - 1, 9)) == [(512, far - 1 + 9 - 512)]
    assert asked(Span(url, 512, 88), Span(url, far, 9)) == [(512, 88), (far, 9)]
    assert asked(Span(url, 512, 88), Span(other, 600, 9)) == [(512, 88), (600, 9)]
    assert asked(Span(url, 0, 3_000_000), Span(url, 600, 9)) == [(0, 3_000_000), (600, 9)], "a whole file"
    assert asked(Span(url), Span(other)) == [(0, None), (0, None)]
    three = [Span(url, 512 + 700_000 * n, 700_000) for n in range(3)]
    assert asked(*three) == [(512, 2_100_000)]
    assert asked(*three, max_bytes=700_000) == [(512, 1_400_000), (1_400_512, 700_000)]
    assert asked() == []


def test_what_is_wrong_with_one_of_several_spans_is_told_as_of_it_alone(store: Store) -> None:
    store.put("data", b"0123456789")
    url = store.locate("data")
    for spans, wrong in (
        ([Span(url, 1, 3), Span(url, 6, 9)], Span(url, 6, 9)),
        ([Span(url, 20, 3), Span(url, 1, 3)], Span(url, 20, 3)),
        ([Span(url, 1, 3), Span(url, 1, 1001)], Span(url, 1, 1001)),
        ([Span(url, 1, 3, "old"), Span(url, 4, 3, "old")], Span(url, 1, 3, "old")),
        ([Span(url + "x", 1, 3), Span(url + "x", 4, 3)], Span(url + "x", 1, 3)),
    ):
        if wrong.etag and store.url.startswith("memory:"):
            continue
        with pytest.raises(SampleError) as caught:
            Reader(store.storage, 1000).read_all(spans)
        assert (caught.value.code, str(caught.value)) == failure(Reader(store.storage, 1000), wrong)


def test_a_reader_serves_many_threads(store: Store) -> None:
    store.put("data", bytes(range(256)))
    reader, url = Reader(store.storage, 1000), store.locate("data")
    with ThreadPoolExecutor(16) as pool:
        assert b"".join(pool.map(lambda n: reader.read(Span(url, n, 1)), range(1, 256))) == bytes(range(1, 256))


# ------------------------------------------------------------------------------------------------------------- names


def test_local_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[1].tar", "1.tar", "2.tar", "x/y.tar", "a b#c?d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    assert expand("[1].tar", HERE) == [f"{tmp_path}/[1].tar"]
    assert expand("?.tar", HERE) == [f"{tmp_path}/1.tar", f"{tmp_path}/2.tar"]
    assert expand(f"file://{tmp_path}/a b#c?d.tar", HERE) == [f"{tmp_path}/a b#c?d.tar"]
    assert expand("x", HERE) == expand("3*.tar", HERE) == []
    assert [file.path for file in list_files(".", HERE)] == ["1.tar", "2.tar", "[1].tar", "a b#c?d.tar", "x/y.tar"]
    assert {file.etag for file in list_files(".", HERE)} == {
        f"{path.stat().st_mtime_ns:x}-1" for path in tmp_path.rglob("*.tar")
    }
    with pytest.raises(NotADirectoryError):
        list(list_files("1.tar", HERE))
    with pytest.raises(FileNotFoundError):
        list(list_files("nowhere", HERE))
    (tmp_path / "empty").mkdir()
    assert list(list_files("empty", HERE)) == []


def test_links_count_as_what_they_mean_and_pipes_not(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "file")
    (tmp_path / "in" / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")
    assert [(file.path, file.size) for file in list_files(str(tmp_path / "in"), HERE)] == [("link", 5)]
    for name in ("pipe", "broken"):
        assert failure(Reader(HERE, 100), Span(str(tmp_path / "in" / name)))[0] == "read_error"


def test_names_of_the_package_have_no_version() -> None:
    listed = list(list_files("tiny:photos", HERE))
    assert listed
    assert {file.etag for file in listed} == {""}
    assert all(file.url == f"tiny:photos/{file.path}" for file in listed)
    assert stat(listed[0].url, HERE) == Stat(listed[0].size, "")
    assert expand(listed[0].url, HERE) == [listed[0].url]
    with open_url(listed[0].url, HERE) as file:
        assert file.read() == Reader(HERE, 10_000_000).read(Span(listed[0].url, 0, listed[0].size))


def test_a_source_without_a_driver_is_a_wrong_request() -> None:
    for act in (absolute, expand, open_url, lambda url, storage: list(list_files(url, storage))):
        with pytest.raises(RequestError, match=r"^gs://: .*gcsfs"):
            act("gs://bucket/x", HERE)


# --------------------------------------------------------------------------------------------------------------- web


def test_a_picture_at_a_url(web: Web, reader: Reader) -> None:
    for kind in ("whole", "ranges"):
        url = f"{web.url}/{kind}/a"
        assert reader.read(Span(url)) == BODY
        assert reader.read(Span(url, 0, len(BODY), "v1")) == BODY
        assert reader.read(Span(url, 100, 50, "v1")) == BODY[100:150]
        assert stat(url, HERE) == Stat(len(BODY), "v1")
        assert expand(url, HERE) == [url]
        assert failure(reader, Span(url, 3000, 100)) == (
            "read_error",
            f"{url}: cut off, 28 of 100 bytes at 3000 are missing",
        )
        assert failure(reader, Span(url, 0, 5, "v0")) == (
            "read_error",
            f"{url}: was replaced since it was planned",
        )
    assert failure(reader, Span(f"{web.url}/ranges/a", 5000, 100))[0] == "read_error"
    assert expand(f"{web.url}/status/404/*.tar", HERE) == []
    with pytest.raises(NotADirectoryError, match="cannot be listed"):
        list(list_files(web.url, HERE))


@pytest.mark.parametrize("status", [401, 403, 404, 410, 418, 204])
def test_a_refusal_is_asked_once(web: Web, reader: Reader, status: int) -> None:
    path = f"/status/{status}/{time.monotonic()}"
    code, reason = failure(reader, Span(web.url + path))
    assert (code, web.asked[path]) == ("read_error", 1)
    assert reason.startswith(f"{web.url}{path}: HTTP {status} ")


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset", "cut"])
def test_a_fault_is_asked_again(web: Web, reader: Reader, fault: str) -> None:
    path = f"/flaky/{fault}/{time.monotonic()}"
    assert reader.read(Span(web.url + path)) == BODY
    assert web.asked[path] == 2


def test_a_fault_that_stays_is_the_rows(web: Web, reader: Reader) -> None:
    path = f"/status/503/{time.monotonic()}"
    code, reason = failure(reader, Span(web.url + path))
    assert (code, web.asked[path]) == ("read_error", 3)
    assert "HTTP 503" in reason
    for url in ("http://127.0.0.1:9/x", "http://", "http://[::1/x", "http://a:b/x"):
        assert failure(reader, Span(url))[0] == "read_error"


def test_a_host_that_nobody_knows_is_asked_for_once(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def unknown(host: object, *args: object, **options: object) -> list[object]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, reason = failure(reader, Span("http://gone.example/a.jpg"))
    assert (code, len(asked)) == ("read_error", 1)
    assert "Name or service not known" in reason


def test_a_drip_is_a_timeout_in_all(web: Web) -> None:
    started = time.monotonic()
    url = f"{web.url}/drip/{started}"
    reader = Reader(Storage(timeout_s=0.4), 10_000)
    assert failure(reader, Span(url)) == ("timeout", f"{url}: not there after 0.4 seconds")
    assert time.monotonic() - started < 3
    assert web.asked[url.removeprefix(web.url)] == 1


def test_a_body_is_never_read_beyond_the_limit(web: Web, reader: Reader) -> None:
    before = web.sent
    for span in (Span(f"{web.url}/endless/a"), Span(f"{web.url}/whole/a")):
        code, reason = failure(Reader(reader.storage, 2000), span)
        assert code == "too_large"
        assert reason.endswith("source.max_bytes is 2000")
    assert web.sent - before < 20_000_000, "what the kernel holds for a client that went away"
    assert reader.read(Span(f"{web.url}/endless/a", 0, 5000)) == (BODY * 2)[:5000]
    code, reason = failure(reader, Span(f"{web.url}/endless/a", 1_000_000, 10))
    assert (code, reason.partition(": ")[2]) == (
        "read_error",
        "its server sends no parts of files; download it first",
    )


def test_spans_of_a_server_without_parts_are_read_one_by_one(web: Web, reader: Reader) -> None:
    for kind in ("whole", "ranges", "endless"):
        spans = [Span(f"{web.url}/{kind}/{time.monotonic()}", start, 10) for start in (500, 100, 900)]
        assert reader.read_all(spans) == [BODY[span.offset :][:10] for span in spans]


@pytest.mark.parametrize("bug", [TypeError, KeyError, AttributeError, MemoryError, AssertionError])
def test_a_bug_is_no_samples_fault(bug: type[Exception], reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise bug("x")

    monkeypatch.setattr(remote.Backend, "_get", broken)
    with pytest.raises(bug, match="x"):
        reader.read(Span("memory://x"))
    monkeypatch.setattr(remote.Backend, "_get", lambda *args: [][0])
    assert failure(reader, Span("memory://x")) == ("read_error", "memory://x: IndexError: list index out of range")


def test_redirects_stay_on_the_web(web: Web, reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    assert reader.read(Span(f"{web.url}/redirect/whole/a")) == BODY
    for target in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/x", "redirect/redirect/" * 12):
        assert failure(reader, Span(f"{web.url}/redirect/{target}"))[0] == "read_error"


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("/echo/a b/ü.jpg", "/echo/a%20b/%C3%BC.jpg"),
        ("/echo/a%2Fb+c.jpg?sig=x%2Fy%3D&t=1:2", "/echo/a%2Fb+c.jpg?sig=x%2Fy%3D&t=1:2"),
        ("/echo/a.jpg#part", "/echo/a.jpg"),
    ],
)
def test_a_url_is_sent_as_it_is(web: Web, reader: Reader, asked: str, sent: str) -> None:
    assert reader.read(Span(web.url + asked)).decode() == sent


def test_no_secret_of_a_url_is_shown(web: Web, reader: Reader) -> None:
    address = web.url.replace("http://", "http://me:password@")
    for path in ("/status/404", "/whole/a", "/redirect/file:///x"):
        for small in (reader, Reader(reader.storage, 1)):
            span = Span(f"{address}{path}?X-Amz-Signature=secret", 0, 5000)
            _, reason = failure(small, span)
            assert "password" not in reason
            assert "secret" not in reason
            assert reason.startswith("http://***@127.0.0.1")


def test_a_file_on_the_web_can_be_sought_in(web: Web) -> None:
    with open_url(f"{web.url}/ranges/a", HERE) as file:
        file.seek(3000)
        assert file.read(1000) == BODY[3000:]
        file.seek(10)
        assert file.read(5) == BODY[10:15]
    with pytest.raises(OSError, match="does not send its length"):
        open_url(f"{web.url}/endless/a", HERE)
    with pytest.raises(FileNotFoundError):
        open_url(f"{web.url}/status/404", HERE)


def test_a_run_cannot_be_written_to_the_web(web: Web) -> None:
    with pytest.raises(RequestError, match="web servers are only read"):
        Store(f"{web.url}/out")
