"""What rows of tables may name: by where the table lies, whatever form a row gives to an address."""

from __future__ import annotations

import pytest

from smsbatch import tiny
from smsbatch.errors import RequestError
from smsbatch.manifest import Storage
from smsbatch.storage.addresses import REFUSED, Rules, is_public, named, split_refused
from smsbatch.storage.resolve import resolve

WEB, STORE, LOCAL = "https://host/d/t.csv", "s3://bucket/d/t.csv", "/disk/d/t.csv"
OF_THIS_MACHINE = [
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "File:/etc/passwd",
    "file:etc/passwd",
    "file:\\\\\\etc\\passwd",
    "file://localhost/etc/passwd",
    "local:///etc/passwd",
    "LOCAL:/etc/passwd",
    "local:etc/passwd",
    "memory://x",
    "memory:x",
    "tiny:photos/cat.jpg",
    "TINY:photos/cat.jpg",
    "tiny:../../../etc/passwd",
    "tiny:/etc/passwd",
    "simplecache::file:///etc/passwd",
    "filecache::s3://bucket/x",
    "zip://x.jpg::http://host/x.zip",
    "dir://x::file:///etc",
    "ftp://host/x.jpg",
]


@pytest.mark.parametrize("table", [WEB, STORE, "gs://bucket/t.csv", "memory-x://t.csv", "HTTP://host/t.csv"])
@pytest.mark.parametrize("name", OF_THIS_MACHINE)
def test_a_table_elsewhere_names_nothing_of_this_machine(table: str, name: str) -> None:
    found, reason = split_refused(named(table, name))
    assert found.replace("/", "\\") == name.replace("/", "\\"), "the row keeps the address"
    assert reason.startswith(
        f"a table {'on the web' if table.lower().startswith('http') else 'in an object store'} may"
    )
    assert reason.endswith(f"({table})")
    with pytest.raises(RequestError, match=r"may name .*http\(s\):// addresses only"):
        resolve(named(table, name), Storage())
    with pytest.raises(RequestError, match="addresses only"):  # again where bytes are read, whatever the plan says
        resolve(name, Storage(), Rules.of([table]))


def test_a_refusal_is_short_and_has_no_secret() -> None:
    name = f"file:///x?token=hunter2&{'y' * 9000}"
    with pytest.raises(RequestError, match=r"^file:///x\?token=\*\*\*&y+…: a table on the web may name") as caught:
        resolve(named(WEB, name), Storage())
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("table", "name", "address"),
    [
        (WEB, "s3://bucket/x.jpg", ""),
        (WEB, "hf://datasets/x.jpg", ""),
        (WEB, "photo:1.jpg", ""),
        (WEB, "http:/x.jpg", ""),
        (WEB, "http:x.jpg", ""),
        (WEB, "//[::1/x.jpg", ""),
        (WEB, "/etc/passwd", "https://host/etc/passwd"),
        (WEB, "~/x.jpg", "https://host/d/~/x.jpg"),
        (WEB, "../x.jpg", "https://host/x.jpg"),
        (WEB, "12:30.jpg", "https://host/d/12:30.jpg"),
        (WEB, "HTTP://other/x.jpg", "HTTP://other/x.jpg"),
        (WEB, "//other/x.jpg", "https://other/x.jpg"),
        ("http://host/t.csv", "//other/x.jpg", "http://other/x.jpg"),
        (WEB, "\\\\other\\x.jpg?a\\b", "https://other/x.jpg?a\\b"),
        (WEB, "a\\x.jpg", "https://host/d/a/x.jpg"),
        (WEB, "x.jpg?a=1&amp;b=2&amp;amp;copy=3", "https://host/d/x.jpg?a=1&b=2&copy=3"),
        (WEB, "data:image/png;base64,AA==", "data:image/png;base64,AA=="),
        (STORE, "/etc/passwd", ""),
        (STORE, "//other/x.jpg", "https://other/x.jpg"),
        (STORE, "https://other/x.jpg", "https://other/x.jpg"),
        (STORE, "gs://other/x.jpg", "gs://other/x.jpg"),
        (STORE, "S3://other/x.jpg", "S3://other/x.jpg"),
        (STORE, "photo:1.jpg", "s3://bucket/d/photo:1.jpg"),
        (STORE, "a&amp;b.jpg", "s3://bucket/d/a&amp;b.jpg"),
        ("memory://t/t.csv", "x.jpg", "memory://t/x.jpg"),
        ("memory://t/t.csv", "memory://u/x.jpg", "memory://u/x.jpg"),
        ("memory://t/t.csv", "file:///x.jpg", ""),
        (LOCAL, "//other/x.jpg?a=1&amp;b=2", "https://other/x.jpg?a=1&b=2"),
        (LOCAL, "///x.jpg", "///x.jpg"),
        (LOCAL, "file:///x.jpg", "file:///x.jpg"),
        (LOCAL, "memory://x.jpg", "memory://x.jpg"),
        (LOCAL, "ftp://host/x.jpg", "ftp://host/x.jpg"),
        (LOCAL, "photo:1&amp;2.jpg", "/disk/d/photo:1&amp;2.jpg"),
        ("file:///disk/t.csv", "/x.jpg", "/x.jpg"),
        ("tiny:photos/t.csv", "x.jpg", "tiny:photos/x.jpg"),
    ],
)
def test_the_address_that_a_row_names(table: str, name: str, address: str) -> None:
    """'' for one that is refused."""
    found = named(table, name)
    assert (found.startswith(REFUSED), found if address else "") == (not address, address)


def test_of_several_tables_the_least_strict_one_decides_on_schemes_and_the_web_on_hosts() -> None:
    both = Rules.of([WEB, LOCAL])
    assert both.refusal("file:///x") == ""
    assert Rules.of([WEB, STORE]).refusal("gs://x/y") == ""
    assert Rules.of([WEB, STORE]).refusal("file:///x") != ""
    assert both.hosts == Rules.of([WEB]).hosts == {("host", 443)}
    assert Rules.of([LOCAL]).hosts is None
    assert Rules.of([WEB], private_addresses=True).hosts is None
    own = Rules.of([STORE, LOCAL], output="s3a://out/run")
    assert [own.is_own(url) for url in ("s3://bucket/x", "s3://out/x", "s3a://out/x", "s3://x/y", "gs://out/x")] == [
        *(True, True, True),
        *(False, False),
    ]


@pytest.mark.parametrize(
    "name", ["tiny:..", "tiny:../tiny-x", "tiny:/etc/passwd", "tiny:photos/../../errors.py", "TINY:../errors.py"]
)
def test_tiny_names_stay_in_their_folder_whoever_asks(name: str) -> None:
    with pytest.raises(RequestError, match="leaves the embedded folder"):
        tiny.resolve(name)
    with pytest.raises(RequestError, match="leaves the embedded folder"):
        resolve(name, Storage())
    assert tiny.resolve("tiny:photos/../photos/cat.jpg") == tiny.resolve("TINY:photos/cat.jpg")


@pytest.mark.parametrize(
    ("host", "public"),
    [
        *((host, True) for host in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((host, False) for host in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1")),
        *((host, False) for host in ("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1")),
        *((host, False) for host in ("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1")),
        *((host, False) for host in ("::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "2002:7f00:1::")),
        *((host, False) for host in ("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:a00:1::", "::ffff:169.254.1.1")),
        *((host, False) for host in ("fec0::1", "64:ff9b:1::7f00:1", "::ffff:0:7f00:1")),
        *((host, False) for host in ("2130706433", "0177.0.0.1", "0x7f.1", "127.1", "localhost", "")),
    ],
)
def test_public_addresses(host: str, public: bool) -> None:
    assert is_public(host) is public
