"""Tables on the web and pictures at URLs: what is reached, what a server may forbid, and how it is asked."""

from __future__ import annotations

import base64
import re
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from importlib.metadata import version
from pathlib import Path

import pytest
from support.making import STORAGE as IMPATIENT, indexed, loaded, source_of
from support.webserver import BODY, Web
from tenacity import wait_none

from smsbatch.data.sample import Outcome, Sample, Unit
from smsbatch.errors import SampleError
from smsbatch.manifest import Storage
from smsbatch.storage import http, retries
from smsbatch.storage.retries import seconds_to_wait
from smsbatch.workers.worker import failed

STORAGE = IMPATIENT.model_copy(update={"timeout_s": 20})  # of a server on a machine at work


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Web, Web]]:
    with Web() as web, Web() as other:
        yield web, other


@pytest.fixture
def web(servers: tuple[Web, Web]) -> Web:
    servers[0].reset()
    return servers[0]


@pytest.fixture
def other(servers: tuple[Web, Web]) -> Web:
    """Another server, which is as much on loopback."""
    servers[1].reset()
    return servers[1]


def read(table: str, storage: Storage = STORAGE, **options: object) -> Sample:
    """The sample of the only row of a table."""
    source = source_of("table", table, **options)
    ((entry,), _) = indexed(source, storage)
    return loaded(entry, source, storage)


def refused(table: str, storage: Storage = STORAGE, **options: object) -> str:
    with pytest.raises(SampleError) as caught:
        read(table, storage, **options)
    assert caught.value.code == "read_error"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def at(web: Web, url: str) -> str:
    """A table on a server with one row."""
    web.files["/t.jsonl"] = b'{"url": "%s"}' % url.replace("\\", "\\\\").encode()
    return f"{web.url}/t.jsonl"


def on_disk(folder: Path, url: str) -> str:
    (folder / "t.jsonl").write_text(f'{{"url": "{url}"}}')
    return f"{folder}/t.jsonl"


# ---------------------------------------------------------------------------------------------- what may be named


def test_a_refused_address_is_its_rows_failure_and_names_the_table(web: Web, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(BODY)
    table = at(web, f"FILE://{tmp_path}/secret.jpg")
    source = source_of("table", table)
    ((entry,), _) = indexed(source)
    told = f"FILE://{tmp_path}/secret.jpg: a table on the web may name http(s):// addresses only ({table})"
    assert refused(table) == told
    assert failed(entry, "read_error", told).url == f"FILE://{tmp_path}/secret.jpg"


def test_the_plan_is_not_believed_where_bytes_are_read(web: Web, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(BODY)
    ((entry,), _) = indexed(source_of("table", on_disk(tmp_path, "secret.jpg")))
    with pytest.raises(SampleError, match="a table on the web may name"):
        loaded(entry, source_of("table", at(web, "x.jpg")))


def test_pictures_on_the_host_of_their_table(web: Web) -> None:
    for name in ("whole/a", "/whole/a", f"{web.url}/whole/a", web.url.removeprefix("http:") + "/whole/a"):
        assert read(at(web, name)).image == BODY


@pytest.mark.parametrize("hop", ["", "/redirect/"])
def test_a_table_on_the_web_reaches_no_private_address_elsewhere(web: Web, other: Web, hop: str) -> None:
    """Not directly and not by a redirect of its own host; the other server is never asked."""
    name = f"{other.url}/whole/a"
    table = at(web, f"{web.url}{hop}{name}" if hop else name)
    assert "a private, loopback or link-local address, which a table on the web may not name" in refused(table)
    assert "storage.private_addresses: true" in refused(table)
    assert not other.asked
    assert read(table, STORAGE.model_copy(update={"private_addresses": True})).image == BODY


def test_tables_elsewhere_reach_every_address(web: Web, other: Web, tmp_path: Path) -> None:
    assert read(on_disk(tmp_path, f"{web.url}/redirect/{other.url}/whole/a")).image == BODY


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"],
)
@pytest.mark.parametrize("through_proxy", [False, True])
def test_no_form_of_a_private_address_is_connected_to(
    web: Web, other: Web, monkeypatch: pytest.MonkeyPatch, host: str, through_proxy: bool
) -> None:
    if through_proxy:
        table = at(web, f"http://{host}:{other.url.rpartition(':')[2]}/whole/a")
        source = source_of("table", table)
        ((entry,), _) = indexed(source)
        monkeypatch.setenv("http_proxy", other.url)
        monkeypatch.setenv("no_proxy", "nothing")
        monkeypatch.setenv("NO_PROXY", "nothing")
        with pytest.raises(SampleError, match="a private, loopback"):
            loaded(entry, source)
    else:
        message = refused(at(web, f"http://{host}:{other.url.rpartition(':')[2]}/whole/a"))
        assert re.search("a private, loopback|is not a canonical IPv4 address", message)
    assert not other.asked


def test_what_a_name_means_is_checked_where_it_is_connected_to(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver says something else each time, as for an attack by DNS rebinding; no socket is ever made."""
    answers = iter(["10.0.0.1", "169.254.169.254", "192.168.0.1", "::1"])
    made: list[object] = []
    real = socket.getaddrinfo

    def resolved(host: str, port: int, *args: object, **options: object) -> list[object]:
        if host != "intranet.example":
            return real(host, port, *args, **options)  # type: ignore[arg-type,return-value]
        place = next(answers)
        family = socket.AF_INET6 if ":" in place else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (place, port) if family == socket.AF_INET else (place, port, 0, 0))]

    table = at(web, "http://intranet.example/a.jpg")
    source = source_of("table", table)
    ((entry,), _) = indexed(source)
    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(http.socket, "socket", lambda *args: made.append(args))
    with pytest.raises(SampleError, match="a private, loopback"):
        loaded(entry, source)
    assert made == []


def test_a_public_address_gets_a_socket() -> None:
    place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))
    with http._public_socket(place) as made:
        assert made.family == socket.AF_INET
    with pytest.raises(PermissionError):
        http._public_socket((*place[:4], ("10.0.0.1", 80)))


# --------------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize(
    ("header", "directive"),
    [
        ("noai", "noai"),
        ("NOINDEX, nofollow", "noindex"),
        ("nofollow, noimageai", "noimageai"),
        ("none", "noindex"),
        ("smsbatch: noimageindex", "noimageindex"),
        ("otherbot: nofollow, SMSbatch: noai", "noai"),
        ("max-image-preview: large, noindex", "noindex"),
        ("otherbot: noindex, noai", ""),
        ("nofollow", ""),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST", ""),
        ("noai-not", ""),
        ("", ""),
    ],
)
def test_what_a_server_forbids_is_obeyed(web: Web, tmp_path: Path, header: str, directive: str) -> None:
    table = on_disk(tmp_path, f"{web.url}/a.jpg")
    web.files["/a.jpg"], web.headers["X_Robots_Tag"] = BODY, header
    if directive:
        told = f"its server forbids this use (X-Robots-Tag: {directive})"
        assert refused(table).startswith(f"{web.url}/a.jpg: {told}; storage.disallowed_header_directives")
        everything = STORAGE.model_copy(update={"disallowed_header_directives": ()})
        assert read(table, everything).image == BODY
    else:
        assert read(table).image == BODY


def test_what_a_server_forbids_is_a_setting(web: Web, tmp_path: Path) -> None:
    table = on_disk(tmp_path, f"{web.url}/a.jpg")
    web.files["/a.jpg"], web.headers["X_Robots_Tag"] = BODY, "mine: nofollow"
    storage = Storage.model_validate({"disallowed_header_directives": "NoFollow", "user_agent_token": "Mine"})
    assert "X-Robots-Tag: nofollow" in refused(table, storage)
    assert read(table, storage.model_copy(update={"user_agent_token": None})).image == BODY


def test_files_that_the_manifest_names_are_the_users_own(web: Web) -> None:
    table = at(web, "/whole/a")
    web.headers["X_Robots_Tag"] = "noindex"
    assert read(table).image == BODY


@pytest.mark.parametrize(
    ("given", "sent"),
    [(None, f"smsbatch/{version('smsbatch')}"), ("mine/1 (+https://x.example; me@x.example)", None)],
)
def test_the_user_agent(web: Web, tmp_path: Path, given: str | None, sent: str | None) -> None:
    read(on_disk(tmp_path, f"{web.url}/redirect/whole/a"), Storage(user_agent=given))
    assert web.agents == [sent or given] * 2


@pytest.mark.parametrize("agent", ["", "a\nX: y", "a\r", "häufig", " a", "x" * 501])
def test_a_user_agent_is_one_header(agent: str) -> None:
    with pytest.raises(ValueError, match="user_agent"):
        Storage(user_agent=agent)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (" 0 ", 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Sun, 06 Nov 1994 08:49:37 -0000", 0),
        *((value, 0) for value in (None, "", "soon", "-5", "1.5", "٣", "nan")),
    ],
)
def test_the_time_that_a_server_asks_for(value: str | None, seconds: float) -> None:
    assert seconds_to_wait(value) == seconds
    assert seconds_to_wait(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=2)


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("86400", retries.LONGEST_WAIT), ("", 0.0)])
def test_a_server_is_asked_again_when_it_wants(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, waited: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retries, "WAIT", wait_none())
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    web.headers["Retry_After"] = asked
    assert read(on_disk(tmp_path, f"{web.url}/flaky/429/x"), Storage(retries=2)).image == BODY
    assert slept == [waited]


# ------------------------------------------------------------------------------------------------------- data: URLs

PICTURE = base64.b64encode(BODY).decode()


@pytest.mark.parametrize(
    ("url", "field", "content"),
    [
        (f"data:image/png;base64,{PICTURE}", "png", BODY),
        (f"DATA:image/jpeg;charset=x;BASE64,{PICTURE.rstrip('=')}", "jpg", BODY),
        ("data:;base64,QUJD%3D", "jpg", b"ABC"),
        ("data:image/png;base64,QU\\nJ D", "png", b"ABC"),
        ("data:,a%20b%FF", "jpg", b"a b\xff"),
    ],
)
@pytest.mark.parametrize("on_web", [False, True])
def test_data_urls_hold_their_pictures(
    web: Web, tmp_path: Path, url: str, field: str, content: bytes, on_web: bool
) -> None:
    table = on_disk(tmp_path, url)
    if on_web:
        web.files["/t.jsonl"], table = (tmp_path / "t.jsonl").read_bytes(), f"{web.url}/t.jsonl"
    sample = read(table, images=["jpg", "png"])
    assert (sample.image, sample.image_field) == (content, field)


@pytest.mark.parametrize(
    ("url", "code", "told"),
    [
        ("data:image/png;base64", "read_error", "a data: URL without a comma"),
        ("data:image/png;base64,A", "read_error", "a data: URL that is not base64"),
        ("data:image/png;base64,ä???" + "A" * 600, "read_error", "a data: URL that is not base64"),
        (f"data:image/png;base64,{PICTURE}", "too_large", "3072 bytes or more, source.max_bytes is 1500"),
        ("data:," + "A" * 7000, "too_large", "1501 bytes or more"),
        ("data:," + "A" * 300_000, "read_error", "a data: URL of 300,006 characters, more than 250,000;"),
    ],
)
def test_data_urls_that_are_refused_take_one_line(tmp_path: Path, url: str, code: str, told: str) -> None:
    source = source_of("table", on_disk(tmp_path, url), max_bytes=1500)
    ((entry,), _) = indexed(source)
    with pytest.raises(SampleError, match=re.escape(told)) as caught:
        loaded(entry, source)
    row = failed(entry, caught.value.code, str(caught.value)).row(Unit(0, 0, 0, 1), "", "", ())
    assert (caught.value.code, len(row["url"]) <= 500, told in row["error_message"]) == (code, True, True)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "letter", ["\n", "\0", "\x1b", "\x7f", "\x9b", "\u2028", *map(chr, range(0x202A, 0x202F)), "\u2066", "\u2069"]
)
def test_texts_from_elsewhere_are_short_and_harmless_in_rows(letter: str) -> None:
    text = f"https://host/{letter}[31m" + "x" * 600
    outcome = Outcome("a", text, error_code="read_error", error_message=text, caption=text)
    row = outcome.row(Unit(0, 0, 0, 1), "", "", ())
    assert row["caption"] == text, "captions are data"
    for name in ("url", "error_message"):
        assert row[name] == "https://host/ [31m" + "x" * 481 + "…"
        assert len(row[name]) == 500
    short = Outcome("a", "ü/日本.jpg", error_code="read_error", error_message="ü").row(Unit(0, 0, 0, 1), "", "", ())
    assert (short["url"], short["error_message"]) == ("ü/日本.jpg", "ü")
