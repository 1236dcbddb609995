"""The stored plan of a run, written once, then only read: `plan/samples.parquet` and `plan/units.parquet`.

Both are create-only: of two drivers that plan at once the first one's stands, and the other obeys it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from smsbatch.data.sample import Entry, Span, Unit
from smsbatch.data.store import Store, storage_errors

__all__ = ["SAMPLES", "UNITS", "index_size", "read_index", "read_units", "write_index", "write_units"]

SAMPLES = "plan/samples.parquet"
UNITS = "plan/units.parquet"

# A worker reads the groups its unit touches: small enough to be cheap, large enough that ten million rows have a short
# footer. Files are read without Arrow's threads: one that holds a Python file when the interpreter ends aborts it.
ROWS_PER_GROUP = 8192

_FIELD = pa.struct([("extension", pa.string()), ("url", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
_INDEX_SCHEMA = pa.schema([("key", pa.string()), ("image", pa.string()), ("fields", pa.list_(_FIELD))])
_UNIT_SCHEMA = pa.schema([(name, pa.int64()) for name in ("id", "shard", "start", "stop")])


def write_index(store: Store, entries: Iterable[Entry]) -> int:
    """Store the entries, in their order; returns how many are stored: these, or those of who was first."""
    remaining = iter(entries)
    with tempfile.TemporaryDirectory(prefix="smsbatch-") as folder:
        path = Path(folder, "samples.parquet")
        with storage_errors("write", path), pq.ParquetWriter(path, _INDEX_SCHEMA, compression="zstd") as writer:
            while batch := list(islice(remaining, ROWS_PER_GROUP)):
                table = pa.Table.from_pylist([_to_row(entry) for entry in batch], schema=_INDEX_SCHEMA)
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        store.create(SAMPLES, path)
    return index_size(store)


def index_size(store: Store) -> int:
    """How many entries the stored index has."""
    with store.open_read(SAMPLES) as file:
        return int(pq.ParquetFile(file, pre_buffer=False).metadata.num_rows)


def read_index(store: Store, start: int = 0, stop: int | None = None) -> list[Entry]:
    """Entries [start, stop) of the stored index; only the row groups that hold them are read."""
    with store.open_read(SAMPLES) as file, storage_errors("read", store.locate(SAMPLES)):
        return list(_rows(pq.ParquetFile(file, pre_buffer=False), start, stop))


def write_units(store: Store, units: Iterable[Unit]) -> list[Unit]:
    """Store the units; returns those that are stored: these, or those of whoever was first."""
    rows = [{"id": unit.id, "shard": unit.shard, "start": unit.start, "stop": unit.stop} for unit in units]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_UNIT_SCHEMA), sink, compression="zstd")
    store.create(UNITS, sink.getvalue().to_pybytes())
    return read_units(store)


def read_units(store: Store) -> list[Unit]:
    with store.open_read(UNITS) as file, storage_errors("read", store.locate(UNITS)):
        return [Unit(**row) for row in pq.ParquetFile(file, pre_buffer=False).read(use_threads=False).to_pylist()]


def _rows(file: pq.ParquetFile, start: int, stop: int | None) -> Iterator[Entry]:
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(start, first), first + count if stop is None else min(stop, first + count)
        if low < high:
            yield from map(
                _from_row, file.read_row_group(group, use_threads=False).slice(low - first, high - low).to_pylist()
            )
        first += count


def _to_row(entry: Entry) -> dict[str, object]:
    fields = [{"extension": extension, **span._asdict()} for extension, span in entry.fields.items()]
    return {"key": entry.key, "image": entry.image, "fields": fields}


def _from_row(row: dict[str, object]) -> Entry:
    spans = row["fields"]
    assert isinstance(spans, list)
    fields = {span["extension"]: Span(span["url"], span["offset"], span["length"]) for span in spans}
    return Entry(str(row["key"]), str(row["image"]), fields)
