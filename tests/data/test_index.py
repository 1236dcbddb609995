"""The index: it is read back as written, keys are unique, the digest covers every place, the first plan stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from smsbatch.data import index, indexing
from smsbatch.data.index import OBJECTS, SAMPLES, Part, StoredFile, from_table, read_index, to_table
from smsbatch.data.indexing import build_index
from smsbatch.data.sample import Entry, Span, Unit
from smsbatch.errors import SourceError, StorageError
from smsbatch.storage.store import Store

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
spans = st.builds(Span, texts, st.integers(0, 2**62), st.none() | st.integers(0, 2**40), texts)
entries = st.builds(
    Entry,
    texts,
    st.sampled_from(["", "jpg"]),
    st.dictionaries(texts, spans, max_size=3),
    st.none() | texts,
    st.none() | texts,
)
planned_entries = st.lists(entries, max_size=20, unique_by=lambda entry: entry.key)


def entry(key: str, url: str = "a.tar", offset: int = 512) -> Entry:
    return Entry(key, "jpg", {"jpg": Span(url, offset, 1, "etag")})


def chunks(planned: list[Entry], sizes: list[int]) -> Iterator[pa.Table]:
    """Yield the entries as tables of these sizes, then the rest as one table."""
    for size in sizes:
        yield to_table(planned[:size])
        planned = planned[size:]
    yield to_table(planned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@settings(deadline=None)
@given(st.lists(entries, max_size=20))
def test_tables_hold_any_entries(planned: list[Entry]) -> None:
    table = to_table(planned)
    assert table.schema == index.INDEX_SCHEMA
    assert from_table(table) == planned


@settings(max_examples=40, deadline=None)
@given(planned_entries, st.lists(st.integers(0, 9), max_size=4), st.data())
def test_any_slice_reads_what_was_built_however_it_came(
    folder: Path, planned: list[Entry], sizes: list[int], data: st.DataObject
) -> None:
    path = folder / "samples.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "ROWS_PER_GROUP", 4)
        built = build_index(path, chunks(planned, sizes), None)
    start = data.draw(st.integers(0, len(planned)))
    stop = data.draw(st.none() | st.integers(0, len(planned)))
    assert read_index(path, start, stop) == planned[start:stop]
    lengths = [span.length or 0 for one in planned for span in one.fields.values()]
    assert built[:3] == (len(planned), sum(lengths), build_index(path, [to_table(planned)], None).sha256)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "c"},
        {"image": "png"},
        {"caption": ""},
        {"original_key": "B"},
        {"fields": {}},
        {"fields": {"png": Span("a.tar", 512, 1, "etag")}},
        {"fields": {"jpg": Span("b.tar", 512, 1, "etag")}},
        {"fields": {"jpg": Span("a.tar", 513, 1, "etag")}},
        {"fields": {"jpg": Span("a.tar", 512, 2, "etag")}},
        {"fields": {"jpg": Span("a.tar", 512, None, "etag")}},
    ],
)
def test_the_digest_knows_every_key_and_place(tmp_path: Path, change: dict[str, Any]) -> None:
    def digest(second: Entry) -> str:
        return build_index(tmp_path / "x", [to_table([entry("a"), second, entry("z")])], None).sha256

    assert digest(entry("b")) != digest(replace(entry("b"), **change))


def test_the_digest_is_of_the_order_and_not_of_versions(tmp_path: Path) -> None:
    def digest(*entries: Entry) -> str:
        return build_index(tmp_path / "x", [to_table(list(entries))], None).sha256

    assert digest(entry("a"), entry("b")) != digest(entry("b"), entry("a"))
    assert digest(entry("ab"), entry("c")) != digest(entry("a"), entry("bc"))
    other = Entry("a", "jpg", {"jpg": Span("a.tar", 512, 1, "another")})
    assert digest(entry("a")) == digest(other)
    # A stored constant: a run resumes only if every release, Arrow version and machine computes the same digest.
    assert digest(entry("ä"), Entry("b", "", {"txt": Span("t", 0, None)}, "c", "o")) == DIGEST


DIGEST = "cf5f835d69652ec44f8c31afeb95dbf6011fee27b72d3f37db39f08d4de71b5a"


@settings(max_examples=60, deadline=None)
@given(planned_entries, st.lists(st.integers(0, 9), max_size=4), st.integers(0, 25), st.none() | st.integers(1, 25))
def test_so_many_are_skipped_and_then_so_many_taken_however_they_came(
    folder: Path, planned: list[Entry], sizes: list[int], skip: int, limit: int | None
) -> None:
    path = folder / "some.parquet"
    chosen = planned[skip:] if limit is None else planned[skip : skip + limit]
    built = build_index(path, chunks(planned, sizes), limit, skip)
    assert read_index(path) == chosen
    assert (built.samples, built.sha256) == (len(chosen), build_index(path, [to_table(chosen)]).sha256)


def test_a_limit_cuts_and_reads_no_further(tmp_path: Path) -> None:
    def tables() -> Iterator[pa.Table]:
        yield to_table([entry("a"), entry("b")])
        yield to_table([entry("c"), entry("d")])
        raise AssertionError("read on")

    assert build_index(tmp_path / "x", tables(), 3).samples == 3
    assert build_index(tmp_path / "z", tables(), 1, skip=3).samples == 1
    assert [one.key for one in read_index(tmp_path / "x")] == ["a", "b", "c"]
    assert build_index(tmp_path / "y", [], None).samples == 0
    assert read_index(tmp_path / "y") == []


# --- duplicate keys ---


def test_keys_that_stand_twice_are_named_with_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "ROWS_PER_GROUP", 3)
    tables = [
        to_table([entry(f"k{n}", f"{tar}.tar") for n in numbers]) for tar, numbers in ((1, range(7)), (2, [9, 5]))
    ]
    with pytest.raises(SourceError) as caught:
        build_index(tmp_path / "x", tables, None)
    advice = "keys must be unique: rename one of them, or set source.key_prefix to shard"
    assert str(caught.value) == f"2.tar: key 'k5' is also in 1.tar; {advice}"
    assert build_index(tmp_path / "x", tables, 8).samples == 8  # the duplicate is beyond the limit


def test_a_source_that_is_there_twice_is_counted(tmp_path: Path) -> None:
    once = [entry(f"k{n}") for n in range(3000)]
    with pytest.raises(SourceError, match=r"key 'k\d+' is also in a\.tar; .*; 3,000 keys are duplicated$"):
        build_index(tmp_path / "x", [to_table(once), to_table(once)], None)


def test_equal_hashes_of_unequal_keys_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "hash", lambda key: len(key), raising=False)
    planned = [entry(f"{n}") for n in range(5)]
    assert build_index(tmp_path / "x", [to_table(planned)], None).samples == 5
    with pytest.raises(SourceError, match="key '3' is also"):
        build_index(tmp_path / "x", [to_table([*planned, entry("3", "b.tar")])], None)


# --- stored ---


def stored(store: Store, path: Path, planned: list[Entry]) -> bool:
    build_index(path, [to_table(planned)], None)
    return store.create(SAMPLES, path)


def test_only_the_groups_of_a_unit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "ROWS_PER_GROUP", 10)
    store = Store(tmp_path / "run")
    stored(store, tmp_path / "x", [entry(f"{n:03d}") for n in range(100)])
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> object:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [one.key for one in read_index(StoredFile(store, SAMPLES), 25, 32)] == [f"{n:03d}" for n in range(25, 32)]
    assert read == [2, 3]
    assert index.find_key(StoredFile(store, SAMPLES), "071") == 71
    assert read == [2, 3, 7]


def test_a_key_is_found_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "ROWS_PER_GROUP", 3)
    store = Store(tmp_path / "run")
    keys = ["zé", "a", "ü/x", "😀", "b~0123456789", "m", "B"]
    stored(store, tmp_path / "x", [entry(key) for key in keys])
    planned = StoredFile(store, SAMPLES)
    assert [index.find_key(planned, key) for key in keys] == list(range(7))
    assert [index.find_key(planned, key) for key in ("c", "", "zz")] == [None, None, None]


def test_the_first_plan_stands(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    assert stored(store, tmp_path / "x", [entry("a")])
    assert not stored(store, tmp_path / "x", [entry("b"), entry("c")])
    assert read_index(StoredFile(store, SAMPLES)) == [entry("a")]
    assert index.index_size(StoredFile(store, SAMPLES)) == 1
    units = [Unit(0, 0, 0, 64), Unit(1, 0, 64, 70)]
    store.put(index.UNITS, index.encode_units(units))
    assert index.read_units(store) == units
    assert [unit.name for unit in units] == ["000000", "000001"]
    assert [len(unit) for unit in units] == [64, 6]
    objects = [Part("webdataset", "s3://b/ä.tar", 2**40, "etag-1"), Part("folder", "/photos", 0, "")]
    store.put(OBJECTS, index.encode_objects(objects))
    assert index.read_objects(StoredFile(store, OBJECTS)) == objects


def test_a_source_that_fails_midway_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    def failing() -> Iterator[pa.Table]:
        yield to_table([entry("a")])
        raise SourceError("b.tar: no such file")

    store = Store(tmp_path / "run")
    with pytest.raises(SourceError, match=r"b\.tar"):
        build_index(tmp_path / "x", failing(), None)
    with pytest.raises(StorageError, match=r"samples\.parquet"):
        read_index(StoredFile(store, SAMPLES))
    with pytest.raises(StorageError, match="nowhere"):
        build_index(tmp_path / "nowhere" / "x", [], None)
