"""Tables: rows of every format become entries; a broken table is refused with file and line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.making import STORAGE, indexed, loaded, make_files, source_of

from smsbatch.data.sample import Entry, Span
from smsbatch.data.sources import parts, scan
from smsbatch.errors import SampleError, SourceError

Rows = Sequence[Mapping[str, Any]]
COLUMNS = {"image": "url", "caption": "text", "key": "id"}


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
        Entry("a", "png", {"png": Span(f"{tmp_path}/x/a.PNG")}, 'a "cat", \n two'),
        Entry("b", "jpg", {"jpg": Span(f"{tmp_path}/b.jpg")}, "häy"),
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
    source = source_of("table", path, columns={"key": "id"})
    first, second = indexed(source)[0]
    assert (first.key, first.image, first.url, second.image) == ("a", "", str(path), "jpg")
    with pytest.raises(SampleError, match=r"^no image in column 'url' of its row in .*/t\.") as caught:
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
        ({"url": "a.jpg", "text": ["a", "b"]}, "bad_caption", "column 'text' of its row is not a text"),
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
    assert message.startswith(f"{path.parent}/c.jpg: key '1' is also in {path.parent}/a.jpg")


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
        ("t.csv", b"", "no column 'url'; set source.columns.image to one it has: none"),
        ("t.jsonl", b'{"url": "a.jpg"}\n{"url": \n', "line 2: not JSON: Expecting value"),
        ("t.jsonl", b'{"url": "a.jpg"}\n\n["a.jpg"]\n', "line 3: not a JSON object"),
        ("t.jsonl", b'{"url": "caf\xe9.jpg"}\n', "line 1: not UTF-8"),
        ("t.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("t.jsonl", b'{"url": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("t.parquet", b"PAR1 nothing", "after row 0: not a sound parquet file: "),
        ("t.parquet", b"", "after row 0: not a sound parquet file: "),
        ("t.csv.gz", b"x", "not a table by its name; expected one of .csv, .tsv, .jsonl, .parquet"),
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
    "columns", [{"image": "picture"}, {"caption": "picture"}, {"key": "share"}, {"caption": "share"}]
)
def test_parquet_columns_of_a_wrong_type_are_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    make_parquet(tmp_path / "t.parquet", [{"url": "a.jpg", "picture": {"bytes": b"x", "path": "y"}, "share": 0.5}])
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
