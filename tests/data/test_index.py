"""The stored index and units give back what was planned, piece by piece, and the first plan stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smsbatch.data import index
from smsbatch.data.sample import Entry, Span, Unit
from smsbatch.data.store import Store
from smsbatch.errors import SourceError, StorageError

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
spans = st.builds(Span, texts, st.integers(0, 2**62), st.integers(0, 2**62))
entries = st.builds(Entry, texts, st.sampled_from(["", "jpg"]), st.dictionaries(texts, spans, min_size=1, max_size=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@settings(max_examples=30, deadline=None)
@given(st.lists(entries, max_size=20), st.data())
def test_any_slice_reads_what_was_written(folder: Path, planned: list[Entry], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "ROWS_PER_GROUP", 4)
        store = Store(folder)
        store.delete(index.SAMPLES)
        assert index.write_index(store, planned) == len(planned) == index.index_size(store)
        start = data.draw(st.integers(0, len(planned)))
        stop = data.draw(st.none() | st.integers(0, len(planned)))
        assert index.read_index(store, start, stop) == planned[start:stop]


def test_only_the_groups_of_a_unit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_PER_GROUP", 10)
    store = Store(tmp_path)
    index.write_index(store, (Entry(f"{n}", "jpg", {"jpg": Span("a.tar", n, 1)}) for n in range(100)))
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: object) -> object:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [entry.key for entry in index.read_index(store, 25, 32)] == [f"{n}" for n in range(25, 32)]
    assert read == [2, 3]


def test_the_first_plan_stands(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = (Entry(key, "jpg", {"jpg": Span("a", 0, 1)}) for key in "ab")
    assert index.write_index(store, [first]) == 1
    assert index.write_index(store, [second, second]) == 1
    assert index.read_index(store) == [first]
    units = [Unit(0, 0, 0, 64), Unit(1, 0, 64, 70)]
    assert index.write_units(store, units) == units
    assert index.write_units(store, units[:1]) == units == index.read_units(store)
    assert [unit.name for unit in units] == ["000000", "000001"]
    assert [len(unit) for unit in units] == [64, 6]


def test_a_source_that_fails_midway_leaves_no_index(tmp_path: Path) -> None:
    def failing() -> Iterator[Entry]:
        yield Entry("a", "jpg", {"jpg": Span("a", 0, 1)})
        raise SourceError("b.tar: no such file")

    store = Store(tmp_path)
    with pytest.raises(SourceError):
        index.write_index(store, failing())
    assert store.list() == []
    with pytest.raises(StorageError, match=r"samples\.parquet"):
        index.read_index(store)
