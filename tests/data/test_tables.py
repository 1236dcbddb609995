"""Tables: rows of every format become entries; a broken table is refused with file and line.

The file exceeds 400 lines because it has every format and dialect of tables, and the keys that are derived from them.
"""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.making import STORAGE, indexed, loaded, make_files, make_tar, source_of

from smsbatch.data.reader import Reader
from smsbatch.data.sample import Entry, Span
from smsbatch.data.sources import load_sample, parts, scan
from smsbatch.errors import SampleError, SourceError

Rows = Sequence[Mapping[str, Any]]
COLUMNS = {"image": "url", "caption": "text", "key": "id"}


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # the same name of the test in every process


def make_csv(path: Path, rows: Rows, comma: str = ",") -> None:
    lines = [
        comma.join(rows[0]),
        *(comma.join('"' + str(cell).replace('"', '""') + '"' for cell in row.values()) for row in rows),
    ]
    path.write_text("\n".join(lines))


def make_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


MAKERS: dict[str, Callable[[Path, Rows], None]] = {
    "csv": make_csv,
    "tsv": lambda path, rows: make_csv(path, rows, "\t"),
    "jsonl": make_jsonl,
    "parquet": make_parquet,
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows as a table; tests that use it run once per table format."""

    def made(*rows: Mapping[str, Any], name: str = "t") -> Path:
        path = tmp_path / f"{name}.{request.param}"
        MAKERS[request.param](path, rows)
        return path

    return made


def listed(*urls: object, images: Sequence[str] = ("jpg", "png"), **columns: str) -> list[Entry]:
    if any(str(url).endswith(".tsv") for url in urls):
        columns = {"quote": '"', **columns}  # as `make` writes them
    return indexed(source_of("table", *urls, images=list(images), columns=columns))[0]


def refused(*urls: object, **columns: str) -> str:
    with pytest.raises(SourceError) as caught:
        listed(*urls, **columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- good rows ---


def test_rows_become_entries(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(
        {"id": "a", "text": ' a "cat", \n two', "url": "x/a.PNG", "n": 1},
        {"id": "b", "text": "häy", "url": "b.jpg", "n": 2},
    )
    assert listed(path, **COLUMNS) == [
        Entry("a", "png", {"png": Span(f"{tmp_path}/x/a.PNG")}, 'a "cat", \n two', caption_from="column text"),
        Entry("b", "jpg", {"jpg": Span(f"{tmp_path}/b.jpg")}, "häy", caption_from="column text"),
    ]


@pytest.mark.parametrize(
    ("url", "place", "image"),
    [
        ("https://h/a.png?w=1#x", "https://h/a.png?w=1#x", "png"),
        ("https://h/photo.php?f=a.png", "https://h/photo.php?f=a.png", "jpg"),
        ("http://h/a", "http://h/a", "jpg"),
        ("s3://bucket/a.b/c.PNG", "s3://bucket/a.b/c.PNG", "png"),
        ("/elsewhere/a.gif", "/elsewhere/a.gif", "jpg"),
        ("../a #1?.png", "{table}/../a #1?.png", "png"),
        (" a.jpg ", "{table}/a.jpg", "jpg"),
        ("tiny:photos/cat.jpg", "tiny:photos/cat.jpg", "jpg"),
    ],
)
def test_places_of_pictures(make: Callable[..., Path], tmp_path: Path, url: str, place: str, image: str) -> None:
    (entry,) = listed(make({"url": url}))
    assert (entry.url, entry.image) == (place.format(table=tmp_path), image)


def test_derived_keys_have_the_tables_name_and_the_rows_number(make: Callable[..., Path]) -> None:
    path = make({"url": "a.jpg"}, {"url": "b.jpg"}, name="my.täble\\1")
    assert [entry.key for entry in listed(path)] == ["my_täble_1-000000000", "my_täble_1-000000001"]
    (entry,) = listed(make({"url": "a.jpg"}, name="k" * 200))
    assert (entry.key, entry.original_key) == ("k" * 64 + "-000000000", None)


def test_keys_go_by_the_key_rule(make: Callable[..., Path]) -> None:
    entries = listed(make({"url": "a.jpg", "id": "v1.0/a"}, {"url": "b.jpg", "id": "b/b"}), key="id")
    assert [(entry.key[:7], entry.original_key) for entry in entries] == [("v1_0/a~", "v1.0/a"), ("b/b", None)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_whole_numbers_become_texts(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{kind}"
    MAKERS[kind](path, [{"url": "a.jpg", "id": 7}, {"url": "b.jpg", "id": 2**62}])
    assert [entry.key for entry in listed(path, key="id")] == ["7", str(2**62)]


def test_a_csv_keeps_the_zeros_of_its_numbers(tmp_path: Path) -> None:
    make_files(tmp_path, {"t.csv": b"url,id\na.jpg,007\n"})
    assert [entry.key for entry in listed(tmp_path / "t.csv", key="id")] == ["007"]


def test_several_tables_of_several_kinds(tmp_path: Path) -> None:
    for number, (kind, maker) in enumerate(MAKERS.items()):
        maker(tmp_path / f"part-{number}.{kind}", [{"url": f"{number}.jpg"}])
    names = [f"part-{number}-000000000" for number in range(4)]
    assert [entry.key for entry in listed(f"{tmp_path}/part-*")] == names
    assert [entry.key for entry in listed(f"{tmp_path}/part-{{0.csv,1.tsv}}")] == names[:2]


def test_odd_but_sound_files(tmp_path: Path) -> None:
    files = {
        "bom.csv": b"\xef\xbb\xbfurl,text\r\na.jpg,x\r\n\r\n",
        "bom.jsonl": b'\xef\xbb\xbf{"url": "a.jpg"}\r\n\n{"url": "b.jpg", "text": "x"}',
    }
    make_files(tmp_path, files)
    assert [(entry.url, entry.caption) for entry in listed(tmp_path / "bom.csv", caption="text")] == [
        (f"{tmp_path}/a.jpg", "x")
    ]
    assert [entry.caption for entry in listed(tmp_path / "bom.jsonl", caption="text")] == ["", "x"]


def test_parquet_columns_of_any_text_type(tmp_path: Path) -> None:
    for name, kind in [("a", pa.large_string()), ("b", pa.dictionary(pa.int8(), pa.string())), ("c", pa.string_view())]:
        pq.write_table(
            pa.table({"url": pa.array(["x.jpg"]).cast(kind), "text": pa.nulls(1)}), tmp_path / f"{name}.parquet"
        )
    assert [(entry.key, entry.caption) for entry in listed(f"{tmp_path}/*", caption="text")] == [
        (f"{name}-000000000", "") for name in "abc"
    ]


def test_a_table_is_never_all_python_objects(tmp_path: Path) -> None:
    """30,000 rows take about 20 MB as Python objects and 3 MB in Arrow."""
    path = tmp_path / "t.csv"
    path.write_text("url\n" + "".join(f"https://host/folder/{n}.jpg\n" for n in range(30_000)))
    source = source_of("table", path)
    (part,) = parts(source, STORAGE)
    tracemalloc.start()
    try:
        table = scan(part, source, STORAGE).table
        assert len(table) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


# --- rows that fail ---


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, "  ") for kind in MAKERS] + [("csv", ""), ("jsonl", None), ("parquet", None)]
)
def test_a_row_without_picture_is_an_entry_that_fails(tmp_path: Path, kind: str, value: str | None) -> None:
    path = tmp_path / f"t.{kind}"
    MAKERS[kind](path, [{"url": value, "id": "a"}, {"url": "b.jpg", "id": "b"}])
    source = source_of("table", path, columns={"key": "id", "quote": '"'})
    first, second = indexed(source)[0]
    assert (first.key, first.image, first.url, second.image) == ("a", "", str(path), "jpg")
    with pytest.raises(SampleError, match=r"^no image in column 'url' of .*/t\.\w+, row 1$") as caught:
        loaded(first, source)
    assert caught.value.code == "read_error"


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        ({"url": 3}, "read_error", "no image in column 'url'"),
        ({"url": ["a.jpg"]}, "read_error", "no image in column 'url'"),
        ({"url": "half a pair \ud83d.jpg"}, "read_error", "no image in column 'url'"),
        ({"url": "nul\0.jpg"}, "read_error", "no image in column 'url'"),
        ({"url": "a.jpg", "text": 3}, "bad_caption", "column 'text' of its row is not a text"),
        ({"url": "a.jpg", "text": {"en": "a"}}, "bad_caption", "column 'text' of its row is not a text"),
        ({"url": "a.jpg", "text": [3]}, "bad_caption", "column 'text' of its row is not a text"),
        ({"url": "a.jpg", "text": ["a", "b"]}, None, "a"),
        ({"url": "a.jpg", "text": [None, " ", "b"]}, None, "b"),
        ({"url": "a.jpg", "text": []}, None, ""),
        ({"url": "a.jpg", "text": "half a pair \ud83d"}, "bad_caption", "column 'text' of its row is not a text"),
        (
            {"url": "a.jpg", "text": "é" * 40_000},
            "bad_caption",
            "column 'text' of its row has 80,000 bytes; a caption has at most 65,536",
        ),
        ({"url": "a.jpg", "text": None}, None, ""),
        ({"url": "a.jpg"}, None, ""),
    ],
)
def test_odd_cells_fail_their_row_alone(tmp_path: Path, row: dict[str, Any], code: str | None, message: str) -> None:
    make_files(tmp_path, {"a.jpg": b"picture"})
    make_jsonl(tmp_path / "t.jsonl", [row, {"url": "a.jpg", "text": "good"}])
    source = source_of("table", tmp_path / "t.jsonl", columns={"caption": "text"})
    first, second = indexed(source)[0]
    assert loaded(second, source).caption == "good"
    if code is None:
        assert loaded(first, source).caption == message
        return
    with pytest.raises(SampleError) as caught:
        loaded(first, source)
    assert (caught.value.code, message in str(caught.value)) == (code, True)


@pytest.mark.parametrize(
    "url", ["nowhere://x/y", "http://[::1", "http://", "s3://", "x" * 5000, "a\nb", ".", "~", "http://h:x/a", "file://"]
)
def test_places_that_are_none_fail_their_row(tmp_path: Path, url: str) -> None:
    make_jsonl(tmp_path / "t.jsonl", [{"url": url}])
    source = source_of("table", tmp_path / "t.jsonl")
    ((entry,), _) = indexed(source)
    with pytest.raises(SampleError) as caught:
        loaded(entry, source)
    assert caught.value.code == "read_error"


# --- tables that are refused ---


def test_a_missing_column_is_named_with_those_there_are(make: Callable[..., Path]) -> None:
    path = make({"file": "a.jpg", "words": "x"})
    assert refused(path) == f"{path}: no column 'url'; set source.columns.image to one it has: file, words"
    assert "no column 'text'; set source.columns.caption to" in refused(path, image="file", caption="text")
    assert "no column 'id'; set source.columns.key to" in refused(path, image="file", key="id")


def test_keys_that_stand_twice_are_refused(make: Callable[..., Path]) -> None:
    path = make({"url": "a.jpg", "id": "1"}, {"url": "b.jpg", "id": "2"}, {"url": "c.jpg", "id": "1"})
    message = refused(path, key="id")
    assert message.startswith(f"{path}, row 3: key '1' is also in {path}, row 1; keys must be unique")


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("t.csv", b"url,text\na.jpg,x\nb.jpg,x,y\n", "line 3: 3 cells, the header has 2"),
        ("t.csv", b'url,text\n"a\n.jpg",x\nb.jpg\n', "line 4: 1 cells, the header has 2"),
        (
            "t.csv",
            b"url\na.jpg\ncaf\xe9.jpg\n",
            "line 3: not UTF-8 (invalid continuation byte); save the table as UTF-8",
        ),
        ("t.csv", "url\na.jpg\n".encode("utf-16"), "line 1: not UTF-8"),
        ("t.csv", b'url\n"a.jpg\nb.jpg\n', "line 3: unexpected end of data"),
        ("t.csv", b'url\na.jpg\n"b.jpg' + b"x" * 200_000, "line 3: field larger than field limit"),
        ("t.csv", b"", "it is empty, without a header"),
        ("t.jsonl", b'{"url": "a.jpg"}\n{"url": \n', "line 2: not JSON: Expecting value"),
        ("t.jsonl", b'{"url": "a.jpg"}\n\n["a.jpg"]\n', "line 3: not a JSON object"),
        ("t.jsonl", b'{"url": "caf\xe9.jpg"}\n', "line 1: not UTF-8"),
        ("t.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("t.jsonl", b'{"url": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("t.parquet", b"PAR1 nothing", "after row 0: not a sound parquet file: "),
        ("t.parquet", b"", "after row 0: not a sound parquet file: "),
        ("t.gz", b"x", "not a table by its name; expected one of .csv, .tsv, .jsonl, .json, .parquet, all but"),
        ("t.parquet.gz", b"x", "not a table by its name; expected one of .csv, .tsv, .jsonl, .json, .parquet, all but"),
        ("t.csv.gz", b"x", "after line 0: not a sound gzip file"),
        ("t.csv.gz", packed(b"url\na.jpg\n" * 9999)[:-20], "after line 18991: not a sound gzip file"),
        ("t.json", b'[{"url": "a.jpg"}', "not JSON: "),
        ("t.json", b'{"images": [', "line 1: not JSON"),
        ("t.json", b'["a.jpg"]', "item 1: not a JSON object"),
        ("t.json", b'[{"uri": "a.jpg"}]', "no column 'url'; set source.columns.image to one it has: uri"),
        ("table", b"x", "not a table by its name"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    make_files(tmp_path, {name: data})
    assert refused(tmp_path / name).startswith(f"{tmp_path / name}: {complaint}")


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_cut_parquet_is_refused(tmp_path: Path, cut: float) -> None:
    path = tmp_path / "t.parquet"
    make_parquet(path, [{"url": f"{n}.jpg"} for n in range(1000)])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    assert "not a sound parquet file" in refused(path)


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    bad = pa.array([b"a.jpg", b"caf\xe9.jpg"]).view(pa.string())
    pq.write_table(pa.table({"url": bad}), tmp_path / "t.parquet")
    assert "not a sound parquet file: 'utf-8' codec" in refused(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "columns",
    [{"image": "share"}, {"image": "picture.path.x"}, {"caption": "picture"}, {"key": "share"}, {"caption": "share"}],
)
def test_parquet_columns_of_a_wrong_type_are_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    make_parquet(tmp_path / "t.parquet", [{"url": "a.jpg", "picture": {"bytes": b"", "path": ""}, "share": 0.5}])
    assert "expected text" in refused(tmp_path / "t.parquet", **columns)


@pytest.mark.parametrize("key", [None, "", 1.5, True, ["a"]])
def test_a_row_without_key_is_refused(tmp_path: Path, key: object) -> None:
    make_jsonl(tmp_path / "t.jsonl", [{"url": "a.jpg", "id": "a"}, {"url": "b.jpg", "id": key}])
    assert f"line 2: {key!r} is no key; expected a text or a whole number" in refused(tmp_path / "t.jsonl", key="id")


def test_an_empty_table_is_noticed(tmp_path: Path) -> None:
    make_files(tmp_path, {"a.csv": b"url\n", "b.csv": b"url\nx.jpg\n"})
    entries, notices = indexed(source_of("table", f"{tmp_path}/*.csv"))
    assert (len(entries), notices) == (1, [f"{tmp_path}/a.csv: no rows in it"])
    assert "no samples found" in refused(tmp_path / "a.csv")


# --- pictures in parquet ---

JPGS = [b"first", b"second", b"third"]


@pytest.mark.parametrize(
    ("kind", "column", "extensions"),
    [
        (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "image", ["jpg", "png", "jpg"]),
        (pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]), "image.bytes", ["jpg", "png", "jpg"]),
        (pa.struct([("bytes", pa.binary())]), "image", ["jpg", "jpg", "jpg"]),
        (pa.binary(), "image", ["jpg", "jpg", "jpg"]),
        (pa.large_binary(), "image", ["jpg", "jpg", "jpg"]),
    ],
)
def test_pictures_in_cells(tmp_path: Path, kind: pa.DataType, column: str, extensions: list[str]) -> None:
    paths = ["0.jpg", "1.PNG", None]
    cells: list[Any] = [{"bytes": data, "path": path} for data, path in zip(JPGS, paths, strict=True)]
    if pa.types.is_struct(kind) and kind.num_fields == 1:
        cells = [{"bytes": data} for data in JPGS]
    elif not pa.types.is_struct(kind):
        cells = JPGS
    table = pa.table({"image": pa.array(cells, kind), "text": [["a", "b"], [], None], "id": [7, 8, 9]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=2)
    source = source_of("table", path, columns={"image": column, "caption": "text", "key": "id"})
    samples = [loaded(entry, source) for entry in indexed(source)[0]]
    assert [(sample.key, sample.image, sample.image_field) for sample in samples] == [
        (key, data, extension) for key, data, extension in zip("789", JPGS, extensions, strict=True)
    ]
    assert [sample.caption for sample in samples] == ["a", "", ""]
    assert samples[2].url == f"{path}#row=2"


def test_a_picture_alone_needs_no_other_column(tmp_path: Path) -> None:
    path = tmp_path / "0000.parquet"
    pq.write_table(pa.table({"jpg": pa.array([*JPGS, None], pa.binary())}), path)
    source = source_of("table", path, columns={"image": "jpg"}, max_bytes=5)
    *_, second, third, fourth = indexed(source)[0]
    assert second.key == "0000-000000001"
    assert loaded(third, source).image == b"third"
    for entry, code, message in (
        (second, "too_large", "0000.parquet, row 2: 6 bytes or more"),
        (fourth, "read_error", "0000.parquet, row 4: no picture in column 'jpg', it is null"),
    ):
        with pytest.raises(SampleError, match=message) as caught:
            loaded(entry, source)
        assert caught.value.code == code


def test_only_the_row_group_of_a_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    pictures = [bytes([number]) * 200_000 for number in range(40)]
    pq.write_table(pa.table({"jpg": pa.array(pictures, pa.binary())}), path, row_group_size=4, compression="none")
    source = source_of("table", path, columns={"image": "jpg"})
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> object:
        read.append(group)
        return original(self, group, **options)

    entries, notices = indexed(source)
    assert notices == []
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    reader = Reader(STORAGE, source.max_bytes)
    tracemalloc.start()
    for number in (0, 1, 3, 4, 5, 36):
        assert load_sample(entries[number], source, reader).image == pictures[number]
    assert read == [0, 1, 9]
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_large_row_groups_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"jpg": pa.array([b"x" * 3_000_000] * 3, pa.binary())}), path, compression="none")
    monkeypatch.setattr("smsbatch.data.tables.LARGE_GROUP", 1 << 20)
    _, (notice,) = indexed(source_of("table", path, columns={"image": "jpg"}))
    assert notice.startswith(f"{path}: row groups of up to 3 rows and ")


def test_all_readers_of_a_process_share_the_last_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pictures = tmp_path / "t.parquet", [b"%d" % row for row in range(80)]
    pq.write_table(pa.table({"jpg": pa.array(pictures, pa.binary())}), path, row_group_size=20)
    source = source_of("table", path, columns={"image": "jpg"})
    entries, _ = indexed(source)
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> object:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for unit in range(0, 80, 8):
        with ThreadPoolExecutor(8) as threads:
            load = partial(load_sample, source=source, reader=Reader.of(source, STORAGE))
            found = [sample.image for sample in threads.map(load, entries[unit : unit + 8])]
        assert found == pictures[unit : unit + 8]
    assert sorted(read) == [0, 1, 2, 3]


def test_a_caption_beside_the_picture_does_not_read_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [{"image": b"x" * 1_000_000, "text": f"{row}"} for row in range(30)]
    pq.write_table(pa.table({"data": rows}), path, row_group_size=2)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    entries = listed(path, image="data.image", caption="data.text")
    assert [entry.caption for entry in entries] == [f"{row}" for row in range(30)]
    assert pa.default_memory_pool().max_memory() - before < 200e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("table", "columns", "complaint"),
    [
        (
            {"image": [[{"bytes": b"x", "path": "a"}]]},
            {"image": "image.0"},
            "has lists of pictures, expected one in a row",
        ),
        ({"image": [[b"x"]]}, {"image": "image.0"}, "has lists of pictures, expected one in a row"),
        ({"url": [["a.jpg"]]}, {"image": "url.0"}, "column 'url.0' has a list of string, expected text"),
        (
            {"url": ["a.jpg"], "m": [[{"id": "a"}]]},
            {"key": "m.id"},
            "column 'm.id' has a list of string, expected text",
        ),
    ],
)
def test_lists_where_one_is_wanted_are_refused(
    tmp_path: Path, table: dict[str, Any], columns: dict[str, str], complaint: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert complaint in refused(tmp_path / "t.parquet", **columns)


def test_columns_of_one_name_and_names_with_dots(tmp_path: Path) -> None:
    two = pa.Table.from_arrays([pa.array(["a.jpg"]), pa.array(["b.jpg"])], names=["url", "url"])
    pq.write_table(two, tmp_path / "two.parquet")
    assert "column 'url' is there several times" in refused(tmp_path / "two.parquet")
    pictures = pa.array([{"bytes": b"first", "path": "a.png"}])
    pq.write_table(pa.table({"my.image": pictures}), tmp_path / "dots.parquet")
    source = source_of("table", tmp_path / "dots.parquet", columns={"image": "my.image"})
    (entry,), _ = indexed(source)
    assert (loaded(entry, source).image, entry.image) == (b"first", "png")
    repeated = pa.array([b"first", b"first"]).dictionary_encode()
    pq.write_table(pa.table({"jpg": repeated}), tmp_path / "dictionary.parquet")
    source = source_of("table", tmp_path / "dictionary.parquet", columns={"image": "jpg"})
    assert [loaded(entry, source).image for entry in indexed(source)[0]] == [b"first", b"first"]


def test_a_key_by_a_path(tmp_path: Path) -> None:
    make_jsonl(tmp_path / "t.jsonl", [{"url": "a.jpg", "m": {"id": 7}}])
    assert [entry.key for entry in listed(tmp_path / "t.jsonl", key="m.id")] == ["7"]


def test_a_replaced_table_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"jpg": pa.array(JPGS, pa.binary())}), path)
    source = source_of("table", path, columns={"image": "jpg"})
    entries, _ = indexed(source)
    pq.write_table(pa.table({"jpg": pa.array(JPGS[::-1], pa.binary())}), path)
    with pytest.raises(SampleError, match=r"t\.parquet, row 1: its table was replaced since it was planned"):
        loaded(entries[0], source)
    path.unlink()
    with pytest.raises(SampleError, match=r"t\.parquet, row 2: No such file"):
        loaded(entries[1], source)


# --- dialects ---


def told(path: Path, **options: Any) -> tuple[list[tuple[str, str | None]], list[str]]:
    """(name of the picture, caption) of each row, and the notices without the table's name."""
    columns = {"caption": "caption", **options}
    entries, notices = indexed(source_of("table", path, columns=columns))
    rows = [(entry.url.rpartition("/")[2], entry.caption) for entry in entries]
    return rows, [notice.removeprefix(f"{path}: ") for notice in notices]


FOX_OWL_HEN = [("a.jpg", '"the fox'), ("b.jpg", "an owl"), ("c.jpg", 'a hen"')]


@pytest.mark.parametrize(
    ("name", "data", "options", "rows", "notices"),
    [
        ("t.tsv", b'url\tcaption\na.jpg\t"the fox\nb.jpg\tan owl\nc.jpg\ta hen"\n', {}, FOX_OWL_HEN, []),
        (
            "t.csv",
            b'url,caption\na.jpg,"the fox\nb.jpg,an owl\nc.jpg,a hen"\n',
            {},
            [("a.jpg", "the fox\nb.jpg,an owl\nc.jpg,a hen")],
            [
                "1 row from 3 lines: cells in quotes go over several lines; if quotes are part of the text, set "
                "source.columns.quote to ''"
            ],
        ),
        (
            "t.csv",
            b'url,caption\na.jpg,"the fox\nb.jpg,an owl\nc.jpg,a hen"\n',
            {"quote": ""},
            FOX_OWL_HEN,
            [],
        ),
        (
            "t.tsv",
            b'url\tcaption\na.jpg\t"a fox"\nb.jpg\t6" pipe\n',
            {},
            [("a.jpg", '"a fox"'), ("b.jpg", '6" pipe')],
            ["1 row with a cell in quotes, which are kept; source.columns.quote: '\"' removes them"],
        ),
        ("t.tsv", b'url\tcaption\na.jpg\t"a fox"\n', {"quote": '"'}, [("a.jpg", "a fox")], []),
        ("t.csv", b"url,caption\n\na.jpg,a fox\n\n", {}, [("a.jpg", "a fox")], []),
        ("t.csv", b"url;caption\na.jpg;a, b\n", {"delimiter": ";"}, [("a.jpg", "a, b")], []),
        ("t.csv", b"sep=;\nurl;caption\na.jpg;a, b\n", {}, [("a.jpg", "a, b")], []),
        ("t.csv", b"url,caption,\na.jpg,a fox,\n", {}, [("a.jpg", "a fox")], []),
        ("t.tsv", b"url|caption\na.jpg|a\tb\n", {"delimiter": "|"}, [("a.jpg", "a\tb")], []),
        ("t.csv", b"a.jpg,a fox\n", {"header": False, "image": "0", "caption": "1"}, [("a.jpg", "a fox")], []),
        ("t.csv", b"a fox,a.jpg\n", {"header": ["caption", "url"]}, [("a.jpg", "a fox")], []),
        ("t.csv.gz", packed(b"url,caption\na.jpg,a fox\n"), {}, [("a.jpg", "a fox")], []),
        ("t.TSV.GZ", packed(b"url\tcaption\na.jpg\ta fox\n"), {}, [("a.jpg", "a fox")], []),
        ("t.jsonl.gz", packed(b'{"url": "a.jpg", "caption": "a fox"}\n'), {}, [("a.jpg", "a fox")], []),
        (
            "t.json",
            b'[{"url": "a.jpg", "caption": "a fox"},\n {"url": "b.jpg"}]',
            {},
            [("a.jpg", "a fox"), ("b.jpg", "")],
            [],
        ),
        ("t.json", b' \n[{"url": "a.jpg", "caption": "a fox"}]', {}, [("a.jpg", "a fox")], []),
        ("t.json", b'{"url": "a.jpg", "caption": "a fox"}\n', {}, [("a.jpg", "a fox")], []),
        ("t.json.gz", packed(b'[{"url": "a.jpg", "caption": "x"}]'), {}, [("a.jpg", "x")], []),
        (
            "t.jsonl",
            b'{"url": "a.jpg", "says": {"en": ["a fox", "x"]}}\n{"url": "b.jpg", "says": null}\n',
            {"caption": "says.en"},
            [("a.jpg", "a fox"), ("b.jpg", "")],
            [],
        ),
        (
            "t.jsonl",
            b'{"url": "a.jpg", "all": [{"text": ""}, {"text": "a fox"}]}',
            {"caption": "all.text"},
            [("a.jpg", "a fox")],
            [],
        ),
        ("t.jsonl", b'{"picture": {"url": "a.jpg"}, "caption": "x"}', {"image": "picture.url"}, [("a.jpg", "x")], []),
        ("t.jsonl", b'{"a.b": "a.jpg", "caption": "x"}', {"image": "a.b"}, [("a.jpg", "x")], []),
    ],
)
def test_dialects(
    tmp_path: Path, name: str, data: bytes, options: dict[str, Any], rows: list[tuple[str, str]], notices: list[str]
) -> None:
    make_files(tmp_path, {name: data})
    assert told(tmp_path / name, **options) == (rows, notices)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("t.csv", b"url;caption\na.jpg;x\n", "'url;caption' has ';' in it: set source.columns.delimiter to ';'"),
        ("t.csv", b"url\tcaption\na.jpg\tx\n", "has '\\t' in it: set source.columns.delimiter to '\\t'"),
        ("t.tsv", b"url,caption\na.jpg,x\n", "'url,caption' has ',' in it: set source.columns.delimiter to ','"),
        ("t.csv", b"url, caption\na.jpg, x\n", "set source.columns.caption to ' caption', as the file writes it"),
        ("t.csv", b"caption,url,url\nx,a.jpg,b.jpg\n", "column 'url' is there 2 times; name each one differently"),
        ("t.tsv", b'"url"\t"caption"\n"a.jpg"\t"x"\n', "names are in quotes: set source.columns.quote to '\"'"),
        ("t.tsv", b'url\tcaption\na.jpg\t"a\nb"\n', "line 3: 1 cells, the header has 2; if quotes enclose cells"),
        ("t.csv", b'url,caption\na.jpg,x,6" y\n', "line 2: 3 cells, the header has 2; if quotes are part of the text"),
        ("t.csv", b'url,caption\na.jpg,"6" pipe\n', "line 2: ',' expected after '\"'; if quotes are part of the text"),
        ("t.csv", b"url,caption\ra.jpg,x\r", "line 1: its lines end in CR alone, as on old Macs; save it with LF"),
        ("t.csv", b"", "it is empty, without a header"),
        ("t.csv", b"url;text, long\na.jpg;x\n", "set source.columns.delimiter to ';'"),
        ("t.csv", "url,caption\na.jpg,x\n".encode("utf-16"), "line 1: not UTF-8"),
        (
            "t.csv",
            b"URL,caption\na.jpg,x\n",
            "no column 'url'; set source.columns.image to 'URL', as the file writes it",
        ),
        ("t.tsv", b"a fox\ta.jpg\n", "its first line looks like a row: set source.columns.header to false"),
        ("t.csv", b"https://h/a.jpg,a fox\n", "its first line looks like a row: set source.columns.header to false"),
    ],
)
def test_a_dialect_that_does_not_fit_is_refused_with_the_cure(
    tmp_path: Path, name: str, data: bytes, complaint: str
) -> None:
    make_files(tmp_path, {name: data})
    with pytest.raises(SourceError) as caught:
        indexed(source_of("table", tmp_path / name, columns={"caption": "caption"}))
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert complaint in str(caught.value)


# --- keys that are derived, and prefixes ---


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["d/metadata.jsonl"], ["metadata"]),
        (["d/a.csv", "d/b.csv"], ["a", "b"]),
        (["d/a.csv.gz"], ["a"]),
        (["train/0000.jsonl", "test/0000.jsonl"], ["train__0000", "test__0000"]),
        (["c/train/0000.csv", "c/train/0001.csv", "c/test/0000.csv"], ["train__0000", "0001", "test__0000"]),
        (["a/x/t.csv", "b/x/t.csv", "c/y/t.csv"], ["a__x__t", "b__x__t", "y__t"]),
        (
            ["year=2023/month=01/p.csv", "year=2024/month=01/p.csv"],
            ["year=2023__month=01__p", "year=2024__month=01__p"],
        ),
        (["d/t.csv", "d/t.jsonl"], ["t_csv", "t_jsonl"]),
        (["d/t.csv", "d/t.csv.gz"], ["t_csv", "t_csv_gz"]),
    ],
)
def test_derived_keys_tell_the_tables_apart(tmp_path: Path, names: list[str], labels: list[str]) -> None:
    for name in names:
        text = b'{"url": "x.jpg"}' if name.endswith("jsonl") else b"url\nx.jpg\n"
        text = packed(text) if name.endswith("gz") else text
        make_files(tmp_path, {name: text})
    keys = [entry.key for entry in listed(*(tmp_path / name for name in names))]
    assert keys == [f"{label}-000000000" for label in labels]


@pytest.mark.parametrize(
    "names", [["a.b.csv", "a_b.csv"], ["x/a.b.csv", "y/a_b.csv"], ["k" * 80 + "a.csv", "k" * 80 + "b.csv"]]
)
def test_derived_keys_do_not_depend_on_where_the_data_lies(tmp_path: Path, names: list[str]) -> None:
    found = []
    for place in ("one", "another/place"):
        make_files(tmp_path / place, dict.fromkeys(names, b"url\nx.jpg\n"))
        found.append([entry.key for entry in listed(*(tmp_path / place / name for name in names))])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2


def test_long_names_that_begin_alike_have_keys_of_their_own(tmp_path: Path) -> None:
    names = [f"{'k' * 80}{end}.csv" for end in "ab"]
    make_files(tmp_path, dict.fromkeys(names, b"url\nx.jpg\n"))
    keys = [entry.key for entry in listed(*(tmp_path / name for name in names))]
    assert len(set(keys)) == 2
    assert all(key.startswith("k" * 53 + "~") and len(key) == 64 + 10 for key in keys)


@pytest.mark.parametrize(("prefix", "before"), [("url", ["cc3m", "sbu"]), ("shard", ["cc3m__00000", "sbu__00000"])])
def test_a_prefix_tells_repeated_keys_apart(tmp_path: Path, prefix: str, before: list[str]) -> None:
    members = [("000.jpg", b"x"), ("001.jpg", b"y")]
    tars = [make_tar(tmp_path / name / "00000.tar", members) for name in ("cc3m", "sbu")]
    globs = [f"{tar.parent}/{{00000..00000}}.tar" for tar in tars]
    entries, _ = indexed(source_of("webdataset", *globs, key_prefix=prefix))
    assert [entry.key for entry in entries] == [f"{name}/{key}" for name in before for key in ("000", "001")]
    assert [entry.original_key for entry in entries] == ["000", "001"] * 2
    with pytest.raises(
        SourceError, match=r"key '000' is also in .*, or set source\.key_prefix to shard; 2 keys are duplicated"
    ):
        indexed(source_of("webdataset", *globs))


@pytest.mark.parametrize(
    ("urls", "prefixes"),
    [
        (["a/x*.tar", "a/y*.tar"], ["x_", "y_"]),
        (["a/x0.tar", "b/y0.tar"], ["x0", "y0"]),
        (["a/{x0,x1}.tar", "b/*.tar"], ["a", "a", "b"]),
    ],
)
def test_prefixes_of_urls(tmp_path: Path, urls: list[str], prefixes: list[str]) -> None:
    for name in ("a/x0", "a/x1", "a/y0", "b/y0"):
        make_tar(tmp_path / f"{name}.tar", [(f"{name[-2:]}.jpg", b"x")])
    found = parts(source_of("webdataset", *(f"{tmp_path}/{url}" for url in urls), key_prefix="url"), STORAGE)
    assert list(dict.fromkeys(part.prefix for part in found)) == list(dict.fromkeys(prefixes))


@pytest.mark.parametrize("format", ["folder", "table"])
def test_a_prefix_is_for_every_format(tmp_path: Path, format: str) -> None:
    names = ("one", "two")
    for name in names:
        make_files(tmp_path / name, {"a.jpg": b"x", "t.csv": b"url,id\na.jpg,a\n"})
    urls = [tmp_path / name / ("" if format == "folder" else "t.csv") for name in names]
    columns = {"columns": {"key": "id"}} if format == "table" else {}
    entries, _ = indexed(source_of(format, *urls, key_prefix="shard", **columns))
    wanted = ["one", "two"] if format == "folder" else ["one__t", "two__t"]
    assert [entry.key for entry in entries] == [f"{name}/a" for name in wanted]
