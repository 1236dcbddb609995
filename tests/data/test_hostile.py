"""Damaged, malformed and malicious input, in one table; no such input stops the other samples.

Every case takes the steps of a run, from the source's parts through index and bytes to pixels. `rows` has the expected
result of each planned key: '' for a correct picture, else the beginning of `error_code: error_message`. `notice` is a
part of the notices of `plan`; `refused` is the beginning of its error before anything starts (exit code 2).
The file exceeds 400 lines because it is this one table.
"""

from __future__ import annotations

import io
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from support.making import indexed, loaded, make_files, make_tar, pattern, source_of, special

from smsbatch.data.pixels import decode
from smsbatch.data.tars import Members
from smsbatch.errors import SampleError, SourceError
from smsbatch.manifest import Source

RGB = Image.fromarray(pattern())
GREY = np.asarray(RGB.convert("L").convert("RGB"))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


JPG, PNG = saved(RGB, "JPEG", quality=95), saved(RGB, "PNG")
_Members = list[tuple[str | tarfile.TarInfo, bytes]]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Path], Source]
    rows: dict[str, str] = field(default_factory=dict)
    notice: str = ""
    refused: str = ""
    like: Any = field(default_factory=pattern)


# --- how sources are made ---


def tar(
    *members: tuple[str | tarfile.TarInfo, bytes], cut: int | None = None, **options: Any
) -> Callable[[Path], Source]:
    """A tar of these members between the valid samples `a` and `z`; it ends `cut` bytes after `a`."""

    def make(root: Path) -> Source:
        ours: _Members = [("a.jpg", JPG), *members, ("z.jpg", JPG)]
        path = make_tar(root / "x.tar", ours, tarfile.GNU_FORMAT)
        if cut is not None:
            path.write_bytes(path.read_bytes()[: 512 + -(-len(JPG) // 512) * 512 + cut])
        return source_of("webdataset", path, **options)

    return make


def patched(place: int, data: bytes) -> Callable[[Path], Source]:
    """A tar of `a`, `b` and `z` with `data` at offset `place` of b's header, whose checksum is corrected."""

    def make(root: Path) -> Source:
        source = tar(("b.jpg", JPG))(root)
        path = Path(source.urls[0])
        whole = bytearray(path.read_bytes())
        start = 512 + -(-len(JPG) // 512) * 512
        whole[start + place : start + place + len(data)] = data
        header = whole[start : start + 512]
        header[148:156] = b" " * 8
        whole[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        path.write_bytes(whole)
        return source

    return make


def files(format: str, urls: list[str], content: dict[str, bytes], **options: Any) -> Callable[[Path], Source]:
    def make(root: Path) -> Source:
        make_files(root, content)
        return source_of(format, *[f"{root}/{url}" for url in urls], **options)

    return make


def tars(**content: _Members) -> Callable[[Path], Source]:
    def make(root: Path) -> Source:
        return source_of("webdataset", *[make_tar(root / f"{name}.tar", members) for name, members in content.items()])

    return make


def picture(name: str, data: bytes, row: str = "", extension: str = "jpg", **options: Any) -> Case:
    return Case(name, tar((f"b.{extension}", data)), {"a": "", "b": row, "z": ""}, **options)


# --- hostile pictures ---


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def jpg_bomb(side: int) -> bytes:
    data = bytearray(JPG)
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def transparent() -> Image.Image:
    """The pattern with a transparent white corner."""
    image = RGB.convert("RGBA")
    image.paste((0, 0, 0, 0), (30, 20, 60, 40))
    return image


PICTURES = [
    picture("a jpeg of zero bytes", b"", "decode_error: an empty file (0 bytes)"),
    picture("a jpeg cut in half", JPG[: len(JPG) // 2], "decode_error: damaged: "),
    picture("a jpeg of only a header", JPG[:20], "decode_error: "),
    picture("a png cut in half", PNG[: len(PNG) // 2], "decode_error: ", extension="png"),
    picture("a page that says not found", b"<html>404</html>", "decode_error: not a picture in a known format"),
    picture(
        "a postscript program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "decode_error: not a picture"
    ),
    picture("a png bomb", png_bomb(50_000, 50_000), "too_large: ", extension="png"),
    picture("a png of wrong length", png_bomb(1000, 1000), "decode_error: damaged: ", extension="png"),
    picture("a jpeg bomb", jpg_bomb(65_500), "too_large: "),
    picture("a hair", saved(RGB.resize((4000, 1)), "PNG"), "too_small: 4000 x 1", extension="png"),
    picture("cmyk", saved(RGB.convert("CMYK"), "JPEG", quality=95)),
    picture("16 bits", saved(Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), "PNG"), extension="png", like=GREY),
    picture("a palette", saved(RGB.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), extension="png"),
    picture("alpha", saved(transparent(), "PNG"), extension="png"),
    picture("an animation", saved(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)]), extension="webp"),
    picture("turned by exif", saved(RGB.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif(6), quality=95)),
    picture("damaged exif", saved(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)),
]

# --- hostile tars ---

BLOCKS = 512 + -(-len(JPG) // 512) * 512  # bytes of a tar member that holds JPG


def sparse(name: str) -> tarfile.TarInfo:
    return special(name, tarfile.GNUTYPE_SPARSE)


TARS = [
    Case(
        "cut in data",
        tar(("b.jpg", JPG), cut=512 + 100),
        {"a": "", "b": "read_error: {x.tar}: cut off, "},
        "unexpected end of data at byte {end}; samples found: 2",
    ),
    Case(
        "cut at a member's boundary",
        tar(("b.jpg", JPG), cut=BLOCKS),
        {"a": "", "b": ""},
        "no end-of-archive blocks, perhaps cut; samples found: 2",
    ),
    Case(
        "cut between picture and caption",
        tar(("a.txt", b"words"), ("b.jpg", JPG), ("b.txt", b"words"), cut=1024 + BLOCKS),
        {"a": "", "b": "read_error"},
        "perhaps cut; samples found: 2",
    ),
    Case(
        "cut after a picture where none has a caption",
        tar(("b.jpg", JPG), ("b.txt", b"words"), cut=BLOCKS),
        {"a": "", "b": ""},
        "perhaps cut; samples found: 2",
    ),
    Case("cut in a header", tar(("b.jpg", JPG), cut=100), {"a": ""}, "x.tar: "),
    Case("a header of noise", tar(("b.jpg", JPG), cut=0), {"a": ""}, "perhaps cut; samples found: 1"),
    Case("a member of negative size", patched(124, b"\xff" * 12), {"a": ""}, "bytes at byte"),
    Case("a member of impossible size", patched(124, b"\x80" + b"\xff" * 11), {"a": ""}, "bytes at byte"),
    Case(
        "a member of endless size",
        patched(124, b"77777777777\0"),
        {"a": "", "b": "too_large: "},
        "unexpected end of data",
    ),
    Case(
        "no tar at all",
        files("webdataset", ["x.tar"], {"x.tar": b"words " * 999}),
        refused="{x.tar}: not an uncompressed tar",
    ),
    Case(
        "an empty file, an empty tar, a good one",
        lambda root: source_of(
            "webdataset",
            *[
                make_files(root, {"0.tar": b""}) / "0.tar",
                make_tar(root / "1.tar", []),
                make_tar(root / "2.tar", [("a.jpg", JPG)]),
            ],
        ),
        {"a": ""},
        "0.tar: an empty file; samples found: 0 | {1.tar}: no samples in it",
    ),
    Case(
        "only empty tars",
        tars(x=[]),
        refused="{x.tar}: no samples found ({x.tar}: no samples in it); expected pictures",
    ),
    Case(
        "links and devices",
        tar(
            (special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (special("c.jpg", tarfile.LNKTYPE, "a.jpg"), b""),
            (special("d.jpg", tarfile.CHRTYPE), b""),
            (special("e.jpg", tarfile.FIFOTYPE), b""),
        ),
        {"a": "", "z": ""},
        "links, devices or sparse files passed over: 4",
    ),
    Case(
        "a sparse file",
        tar((sparse("b.jpg"), b"")),
        {"a": "", "z": ""},
        "links, devices or sparse files passed over: 1",
    ),
    Case("a name that climbs out", tar(("../../etc/b.jpg", JPG)), {"a": "", "__/__/etc/b~": "", "z": ""}),
    Case("an absolute name", tar(("/etc/b.jpg", JPG)), {"a": "", "etc/b~": "", "z": ""}),
    Case("a dot in a folder's name", tar(("v1.0/b.jpg", JPG)), {"a": "", "v1_0/b~": "", "z": ""}),
    Case(
        "a name that is not UTF-8",
        tar((b"caf\xe9.jpg".decode(errors="surrogateescape"), JPG)),
        {"a": "", "caf_~": "", "z": ""},
    ),
    Case("a name with control characters", tar(("b\x1b[2J\n.jpg", JPG)), {"a": "", "b_[2J_~": "", "z": ""}),
    Case("a name too long", tar(("k" * 300 + ".jpg", JPG)), {"a": "", "k" * 84 + "~": "", "z": ""}),
    Case("a name that looks mapped", tar(("b~0123456789.jpg", JPG)), {"a": "", "b~0123456789~": "", "z": ""}),
    Case(
        "an extension with control characters",
        tar(("b.j\x1bpg", JPG)),
        {"a": "", "z": ""},
        "members with unusable extensions passed over: 1, first 'b.j\\x1bpg'",
    ),
    Case(
        "an extension too long",
        tar(("b.jpg", JPG), ("b." + "x" * 300, b"")),
        {"a": "", "b": "", "z": ""},
        "members with unusable extensions passed over: 1",
    ),
    Case(
        "one key in two tars",
        tars(x=[("a.jpg", JPG)], y=[("b.jpg", JPG), ("a.png", JPG)]),
        refused="{y.tar}: key 'a' is also in {x.tar}; keys must be unique",
    ),
    Case("one name twice in a tar", tar(("a.jpg", JPG)), refused="{x.tar}: two members are 'a.jpg'"),
    Case(
        "no picture",
        tar(("b.gif", b"x")),
        {"a": "", "b": "read_error: no image (jpg, jpeg, png, webp) among its fields: gif", "z": ""},
    ),
    Case(
        "more bytes than allowed",
        tar(("b.jpg", JPG + bytes(9000)), max_bytes=9000),
        {"a": "", "b": "too_large: ", "z": ""},
    ),
]

# --- hostile captions ---

MEGABYTE = b"word " * 200_000

BROKEN = "sidecars from which no caption can be read: 1"
CAPTIONS = [
    Case(
        "not UTF-8",
        tar(("b.jpg", JPG), ("b.txt", b"caf\xe9")),
        {"a": "", "b": "bad_caption: its .txt is not UTF-8: ", "z": ""},
        notice=BROKEN,
    ),
    Case(
        "a megabyte",
        tar(("b.jpg", JPG), ("b.txt", MEGABYTE)),
        {"a": "", "b": "bad_caption: its .txt has 1,000,000 bytes; a caption has at most 65,536", "z": ""},
        notice=BROKEN,
    ),
    Case(
        "a megabyte in JSON",
        tar(("b.jpg", JPG), ("b.json", b'{"caption": "' + MEGABYTE + b'"}')),
        {"a": "", "b": "bad_caption: 'caption' in its .json has 999,999 bytes", "z": ""},
        notice=BROKEN,
    ),
    Case(
        "JSON of another shape",
        tar(("b.jpg", JPG), ("b.json", b"[]")),
        {"a": "", "b": "", "z": ""},
    ),
    Case(
        "JSON that is a number",
        tar(("b.jpg", JPG), ("b.json", b"7")),
        {"a": "", "b": "bad_caption: its .json is neither a JSON object nor a list", "z": ""},
        notice=BROKEN,
    ),
    Case(
        "JSON of a deep nest",
        tar(("b.jpg", JPG), ("b.json", b"[" * 60_000)),
        {"a": "", "b": "bad_caption: its .json is not JSON", "z": ""},
        notice=BROKEN,
    ),
]

# --- hostile folders and tables ---

FOLDERS = [
    Case(
        "one key by two paths",
        files("folder", ["p"], {"p/a/b.jpg": JPG, "p/a__b.jpg": JPG}),
        refused="{p}/a__b.jpg: key 'a__b' is also in {p}/a/b.jpg",
    ),
    Case(
        "two pictures of one name",
        files("folder", ["p"], {"p/a.jpg": JPG, "p/a.png": JPG}),
        refused="{p}/a.png: key 'a' is also in {p}/a.jpg",
    ),
    Case(
        "odd names",
        files("folder", ["p"], {"p/a\nb.jpg": JPG, "p/" + "k" * 150 + ".jpg": JPG, "p/v.1/a.jpg": JPG}),
        {"a_b~": "", "k" * 84 + "~": "", "v_1__a": ""},
    ),
    Case(
        "nothing in it",
        files("folder", ["p"], {"p/notes.md": b""}),
        refused="{p}: no samples found (captions: 0 of 0; left aside: 1 .md",
    ),
]

UNUSABLE = ["ftp", "github", "dbfs", "webhdfs", "gist", "jupyter", "hdfs", "tar", "zip", "dir", "generic", "reference"]

TABLES = [
    Case(
        "a missing column",
        files("table", ["t.csv"], {"t.csv": b"file,words\na.jpg,x\n"}),
        refused="{t.csv}: no column 'url'; set source.columns.image to one it has: file, words",
    ),
    Case(
        "a ragged line",
        files("table", ["t.csv"], {"t.csv": b"url,words\na.jpg,x\nb.jpg\n"}),
        refused="{t.csv}: line 3: 1 cells, the header has 2",
    ),
    Case(
        "rows without picture",
        files(
            "table",
            ["t.csv"],
            {"a.jpg": JPG, "t.csv": b"url,key\n,1\na.jpg,2\nnone.jpg,3\n../../../etc/passwd,4\n"},
            columns={"key": "key"},
        ),
        {
            "1": "read_error: no image in column 'url' of {t.csv}, row 1",
            "2": "",
            "3": "read_error: {none.jpg}: No such file",
            "4": "read_error: ",
        },
    ),
    Case(
        "duplicate keys",
        files("table", ["t.csv"], {"t.csv": b"url,key\na.jpg,1\nb.jpg,1\n"}, columns={"key": "key"}),
        refused="{t.csv}, row 2: key '1' is also in {t.csv}, row 1",
    ),
    Case(
        "duplicate keys at signed addresses",
        files(
            "table",
            ["t.csv"],
            {"t.csv": b"url,key\nhttps://h/a?X-Goog-Signature=1,1\nhttps://ghp_x@h/b,1\n"},
            columns={"key": "key"},
        ),
        refused="{t.csv}, row 2: key '1' is also in {t.csv}, row 1; keys must be",
    ),
    *[
        Case(
            f"an address of {scheme}",
            files(
                "table",
                ["t.csv"],
                {"a.jpg": JPG, "t.csv": f"url,key\na.jpg,a\n{scheme}://host/b.jpg,b\na.jpg,z\n".encode()},
                columns={"key": "key"},
            ),
            {"a": "", "b": f"read_error: {row}", "z": ""},
        )
        for scheme, row in [
            *[(scheme, f"{scheme}://: its driver cannot be used by an address alone") for scheme in UNUSABLE],
            ("gs", "gs://: its driver is not installed"),
            ("what", "what://: no driver is known for this scheme"),
            ("data", "data://host/b.jpg: "),
            ("memory", "memory://host/b.jpg: "),
            ("file", "file://host/b.jpg: No such file"),
            ("file://~nobody-at-all", "file://~nobody-at-all://host/b.jpg: No such file"),
        ]
    ],
]


@pytest.mark.parametrize("case", [*PICTURES, *TARS, *CAPTIONS, *FOLDERS, *TABLES], ids=lambda case: case.name)
def test_hostile_input(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, case.make(tmp_path))


def check(case: Case, root: Path, source: Source) -> None:
    def placed(text: str) -> str:
        for name in ("x.tar", "y.tar", "1.tar", "p", "t.csv", "a.jpg", "b.jpg", "none.jpg"):
            text = text.replace(f"{{{name}}}", f"{root}/{name}")
        return text.replace("{end}", str(2 * BLOCKS))

    if case.refused:
        with pytest.raises(SourceError) as caught:
            indexed(source)
        assert str(caught.value).startswith(placed(case.refused))
        assert "\n" not in str(caught.value)
        return
    entries, notices = indexed(source)
    # `rows` has a mapped key without its digest; test_keys.py tests the rule.
    rows = {
        entry.key[:-10] if entry.original_key and "~" in entry.key else entry.key: ending(entry, source, case)
        for entry in entries
    }
    assert rows.keys() == case.rows.keys()
    for key, expected in case.rows.items():
        assert rows[key].startswith(placed(expected)), rows[key]
        assert (rows[key] == "") == (expected == "")
        assert "\n" not in rows[key]
    assert placed(case.notice) in " | ".join(notices)
    assert bool(notices) == bool(case.notice)


def ending(entry: Any, source: Source, case: Case) -> str:
    try:
        pixels = decode(loaded(entry, source).image)
    except SampleError as error:
        return f"{error.code}: {error}"
    like = case.like if entry.key == "b" else pattern()
    assert pixels.shape == like.shape
    assert np.abs(pixels.astype(int) - like).mean() < 8
    return ""


# --- hostile servers ---


class Hostile(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    over: threading.Event

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "slow.jpg":
            self.over.wait(20)
            return
        if name == "drip.jpg":
            self.head(200, 50_000)
            while not self.over.wait(0.2):
                self.wfile.write(b"x")
                self.wfile.flush()
            return
        status, length, body = {
            "good.jpg": (200, len(JPG), JPG),
            "gone.jpg": (404, 4, b"gone"),
            "secret.jpg": (403, 2, b"no"),
            "broken.jpg": (500, 4, b"oops"),
            "cut.jpg": (200, len(JPG), JPG[:300]),
            "huge.jpg": (200, 10**12, JPG),
            "endless.jpg": (200, None, bytes(1_000_000)),
            "file.jpg": (302, 0, b""),
            "page.jpg": (200, 9, b"<html>404"),
        }[name]
        self.head(status, length)
        self.wfile.write(body)
        self.close_connection = True

    do_HEAD = do_GET

    def head(self, status: int, length: int | None) -> None:
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "file:///etc/passwd")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: these tests make clients disconnect."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    handler = type("Handler", (Hostile,), {"over": threading.Event()})
    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        handler.over.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gone.jpg", "read_error: "),
        ("secret.jpg", "read_error: "),
        ("broken.jpg", "read_error: "),
        ("slow.jpg", "timeout: "),
        ("drip.jpg", "timeout: "),
        ("cut.jpg", "read_error: "),
        ("huge.jpg", "too_large: "),
        ("endless.jpg", "too_large: "),
        ("file.jpg", "read_error: "),
        ("page.jpg", "decode_error: not a picture"),
    ],
)
def test_hostile_servers(tmp_path: Path, server: str, name: str, row: str) -> None:
    rows = "".join(
        f'{{"url": "{server}/{path}", "key": "{key}"}}\n'
        for key, path in [("a", "good.jpg"), ("b", name), ("z", "good.jpg")]
    )
    make_files(tmp_path, {"t.jsonl": rows.encode()})
    source = source_of("table", tmp_path / "t.jsonl", columns={"key": "key"}, max_bytes=100_000)
    check(Case(name, lambda root: source, {"a": "", "b": row, "z": ""}), tmp_path, source)


# --- arbitrary damage ---


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=12)), max_size=6),
    st.none() | st.integers(0, 5000),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@example([(124, b"\xff" * 12)], None, tarfile.USTAR_FORMAT)
def test_any_damage_to_a_tar_ends_in_members_or_one_kind_of_error(
    damage: list[tuple[int, bytes]], cut: int | None, format: int
) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name in ("a.jpg", "ü" * (30 if format == tarfile.USTAR_FORMAT else 120) + ".jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 300
            tar.addfile(member, io.BytesIO(bytes(300)))
    data = bytearray(sink.getvalue()[:cut])
    for place, other in damage:
        data[place : place + len(other)] = other
    for start in range(0, len(data) - 511, 512):  # correct checksums, so that damaged headers are parsed
        if data[start + 257 : start + 262] == b"ustar":
            total = sum(data[start : start + 148]) + 256 + sum(data[start + 156 : start + 512])
            data[start + 148 : start + 156] = b"%06o\0 " % total
    try:
        members = list(Members(io.BytesIO(bytes(data))))
    except tarfile.ReadError:
        return
    assert all(512 <= member.offset <= member.offset + member.length < 1 << 62 for member in members)
