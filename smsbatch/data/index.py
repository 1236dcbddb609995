"""The stored plan of a run: `plan/{samples,objects,units}.parquet`, written once, then only read.

If the user allows changed inputs, the rows stay and their bytes are located again, in `samples.1.parquet` and
`objects.1.parquet`, then `.2` and so on; the highest number is valid.

An index is an Arrow table from the scan of an object to the file; only the rows that a unit reads become entries. A
file that is damaged or has other columns is a StorageError, wherever that shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smsbatch.data.sample import Entry, Span, Unit
from smsbatch.errors import StorageError
from smsbatch.storage.store import Store, storage_errors
from smsbatch.text import first_line

SAMPLES = "plan/samples.parquet"
OBJECTS = "plan/objects.parquet"
UNITS = "plan/units.parquet"

# A worker reads the row groups of its unit: small enough to be cheap, large enough that ten million rows have a short
# footer. Arrow's threads are off in every read: one that holds a Python file when the interpreter exits aborts it.
ROWS_PER_GROUP = 8192


_TEXTS = ("key", "original_key", "image", "caption", "caption_from")


def _schema(repeated: pa.DataType) -> pa.Schema:
    field = pa.struct(
        [
            pa.field("extension", pa.string()),
            pa.field("url", repeated),
            pa.field("offset", pa.int64()),
            pa.field("length", pa.int64()),  # null: the whole object, of unknown size
            pa.field("etag", repeated),
        ]
    )
    return pa.schema([*(pa.field(name, pa.string()) for name in _TEXTS), pa.field("fields", pa.list_(field))])


INDEX_SCHEMA = _schema(pa.dictionary(pa.int32(), pa.string()))
"""Schema of an index in memory. URLs and etags are dictionary-encoded: all spans of a tar name the same object."""
# On disk without dictionaries: Parquet finds the repetitions itself, and Arrow cannot read dictionaries inside lists.
STORED_SCHEMA = _schema(pa.string())
_OLDER_SCHEMA = pa.schema([field for field in STORED_SCHEMA if field.name != "caption_from"])
_UNIT_SCHEMA = pa.schema([(name, pa.int64()) for name in ("id", "shard", "start", "stop")])
_OBJECT_SCHEMA = pa.schema([("format", pa.string()), ("url", pa.string()), ("size", pa.int64()), ("etag", pa.string())])


class Part(NamedTuple):
    """An object that is indexed on its own: a tar, a table, or a folder with all its files.

    For a folder, `size` is the bytes of the files that the index uses, and `etag` a digest of their names, sizes and
    etags. `label` is a name among the parts of a run, `prefix` what `source.key_prefix` puts before keys.
    """

    format: str
    url: str
    size: int
    etag: str
    label: str = ""
    prefix: str = ""

    @property
    def version(self) -> tuple[str, str, int, str]:
        """What is stored of it, and compared later."""
        return self[:4]


class StoredFile(NamedTuple):
    """An object of a store, for readers that also take a local `Path`."""

    store: Store
    path: str


def to_table(entries: Sequence[Entry]) -> pa.Table:
    """The entries as a table of `INDEX_SCHEMA`."""
    spans = [span for entry in entries for span in entry.fields.values()]
    fields = pa.StructArray.from_arrays(
        [
            pa.array([name for entry in entries for name in entry.fields], pa.string()),
            pa.array([span.url for span in spans], pa.string()).dictionary_encode(),
            pa.array([span.offset for span in spans], pa.int64()),
            pa.array([span.length for span in spans], pa.int64()),
            pa.array([span.etag for span in spans], pa.string()).dictionary_encode(),
        ],
        fields=list(INDEX_SCHEMA.field("fields").type.value_type),
    )
    offsets = pa.array(accumulate((len(entry.fields) for entry in entries), initial=0), pa.int32())
    columns: list[pa.Array] = [pa.array([getattr(entry, name) for entry in entries], pa.string()) for name in _TEXTS]
    return pa.Table.from_arrays([*columns, pa.ListArray.from_arrays(offsets, fields)], schema=INDEX_SCHEMA)


def from_table(table: pa.Table) -> list[Entry]:
    """The entries of a table, in memory or stored."""
    return [
        Entry(
            row["key"],
            row["image"],
            {
                field["extension"]: Span(field["url"], field["offset"], field["length"], field["etag"])
                for field in row["fields"]
            },
            row["caption"],
            row["original_key"],
            row["caption_from"],
        )
        for row in table.to_pylist()
    ]


def index_size(index: StoredFile | Path) -> int:
    """Number of entries in the stored index."""
    with opened(index) as file:
        return int(file.metadata.num_rows)


def read_index(index: StoredFile | Path, start: int = 0, stop: int | None = None) -> list[Entry]:
    """Entries [start, stop) of an index, stored or just built; reads only the row groups that hold them."""
    table = read_index_table(index, start, stop)
    try:
        return from_table(table)
    except UnicodeDecodeError as error:
        where = index.store.locate(index.path) if isinstance(index, StoredFile) else index
        raise StorageError(f"{where} is damaged ({first_line(error)}); run `smsbatch repair`") from error


def read_index_table(index: StoredFile | Path, start: int = 0, stop: int | None = None) -> pa.Table:
    """Rows [start, stop) as a table for `from_table`, which needs much less memory than entries."""
    found = [STORED_SCHEMA.empty_table()]
    with opened(index) as file:
        for group, first, count in groups(file):
            low, high = max(start, first), first + count if stop is None else min(stop, first + count)
            if low < high:
                found.append(read_group(file, group).slice(low - first, high - low))
    return pa.concat_tables(found)


def find_key(index: StoredFile | Path, key: str) -> int | None:
    """Row number of a key, None if the key is not planned."""
    with opened(index) as file:
        for group, first, _ in groups(file):
            bounds = file.metadata.row_group(group).column(0).statistics
            if bounds is not None and bounds.has_min_max and not bounds.min <= key <= bounds.max:
                continue
            row = pc.index(file.read_row_group(group, columns=["key"], use_threads=False)["key"], key).as_py()
            if row >= 0:
                return first + int(row)
    return None


def encode_objects(parts: Sequence[Part]) -> bytes:
    """The file of the objects that were indexed."""
    return _parquet(parts, _OBJECT_SCHEMA)


def read_objects(objects: StoredFile) -> list[Part]:
    with opened(objects, _OBJECT_SCHEMA) as file:
        return [Part(**row) for row in file.read(use_threads=False).to_pylist()]


def encode_units(units: Iterable[Unit]) -> bytes:
    """The file of the units."""
    return _parquet(list(units), _UNIT_SCHEMA)


def read_units(store: Store) -> list[Unit]:
    with opened(StoredFile(store, UNITS), _UNIT_SCHEMA) as file:
        return [Unit(**row) for row in file.read(use_threads=False).to_pylist()]


@contextmanager
def opened(source: StoredFile | Path, schema: pa.Schema = STORED_SCHEMA) -> Iterator[pq.ParquetFile]:
    where = source.store.locate(source.path) if isinstance(source, StoredFile) else source
    with (
        storage_errors("read", where),
        source.store.open_read(source.path) if isinstance(source, StoredFile) else source.open("rb") as file,
    ):
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            known = (schema, _OLDER_SCHEMA) if schema is STORED_SCHEMA else (schema,)
            if not any(parquet.schema_arrow.equals(one) for one in known):
                raise ValueError("it has other columns")
            yield parquet
        except (pa.ArrowException, EOFError, ValueError) as error:
            reason = first_line(error)
            raise StorageError(
                f"{where} is empty, cut or no file of a plan ({reason}); run `smsbatch repair`"
            ) from error


def newest_number(name: str, paths: Iterable[str]) -> int:
    """The highest number that a file has among the files of a plan; 0 is the file without a number."""
    stem, extension = name.split(".")
    numbers = (path.removeprefix(f"{stem}.").removesuffix(f".{extension}") for path in paths if path != name)
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def numbered(name: str, number: int) -> str:
    stem, extension = name.split(".")
    return f"{stem}.{number}.{extension}" if number else name


def read_group(file: pq.ParquetFile, group: int) -> pa.Table:
    return completed(file.read_row_group(group, use_threads=False))


def completed(table: pa.Table) -> pa.Table:
    """The table with all columns of an index; older versions wrote fewer."""
    for place, name in enumerate(_TEXTS):
        if name not in table.column_names:
            table = table.add_column(place, name, pa.nulls(len(table), pa.string()))
    return table


def groups(file: pq.ParquetFile) -> Iterator[tuple[int, int, int]]:
    """(number, first row, rows) of each row group."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        yield group, first, count
        first += count


def _parquet(rows: Sequence[Any], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    columns = [pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in schema.names]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
