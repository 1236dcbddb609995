"""The stored plan of a run: `plan/{samples,objects,units}.parquet`, written once, then only read.

If the user allows changed inputs, the rows stay and their bytes are located again, in `samples.1.parquet` and
`objects.1.parquet`, then `.2` and so on; the highest number is valid.

An index is an Arrow table from the scan of an object to the file; only the rows that a unit reads become entries. A
file that is damaged or has other columns is a StorageError, wherever that shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smsbatch.data.reader import public
from smsbatch.data.sample import Entry, Span, Unit
from smsbatch.errors import SourceError, StorageError
from smsbatch.storage.store import Store, storage_errors
from smsbatch.text import first_line

SAMPLES = "plan/samples.parquet"
OBJECTS = "plan/objects.parquet"
UNITS = "plan/units.parquet"

# A worker reads the row groups of its unit: small enough to be cheap, large enough that ten million rows have a short
# footer. Arrow's threads are off in every read: one that holds a Python file when the interpreter exits aborts it.
ROWS_PER_GROUP = 8192


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
    texts = [pa.field(name, pa.string()) for name in ("key", "original_key", "image", "caption")]
    return pa.schema([*texts, pa.field("fields", pa.list_(field))])


INDEX_SCHEMA = _schema(pa.dictionary(pa.int32(), pa.string()))
"""Schema of an index in memory. URLs and etags are dictionary-encoded: all spans of a tar name the same object."""
# On disk without dictionaries: Parquet finds the repetitions itself, and Arrow cannot read dictionaries inside lists.
_STORED_SCHEMA = _schema(pa.string())
_UNIT_SCHEMA = pa.schema([(name, pa.int64()) for name in ("id", "shard", "start", "stop")])
_OBJECT_SCHEMA = pa.schema([("format", pa.string()), ("url", pa.string()), ("size", pa.int64()), ("etag", pa.string())])


class Part(NamedTuple):
    """An object that is indexed on its own: a tar, a table, or a folder with all its files.

    For a folder, `size` is the bytes of all its files and `etag` the digest of its listing.
    """

    format: str
    url: str
    size: int
    etag: str


class StoredFile(NamedTuple):
    """An object of a store, for readers that also take a local `Path`."""

    store: Store
    path: str


class Built(NamedTuple):
    """Result of `build_index`: the number of samples, the bytes of all their fields as far as known, and a digest.

    `sha256` covers every key, caption and byte range in order, but not how the rows were chunked or stored.
    """

    samples: int
    bytes: int
    sha256: str


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
    columns: list[pa.Array] = [
        pa.array([getattr(entry, name) for entry in entries], pa.string())
        for name in ("key", "original_key", "image", "caption")
    ]
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
        )
        for row in table.to_pylist()
    ]


def build_index(target: Path, tables: Iterable[pa.Table], limit: int | None = None, skip: int = 0) -> Built:
    """Stream tables into one Parquet file: skip the first `skip` rows, then take at most `limit`.

    Memory holds a few tables and eight bytes per key.

    Raises:
        SourceError: duplicate keys; the message names the first with both its places, and how many there are.
    """
    digest, hashes, size = _Digest(), [], 0
    with storage_errors("write", target), _writer(target) as writer:
        waiting: list[pa.Table] = []
        for table in _chosen(tables, limit, skip):
            stored = table.cast(_STORED_SCHEMA)
            hashes.append(np.fromiter(map(hash, stored["key"].to_pylist()), np.int64, len(stored)))
            size += digest.update(stored)
            waiting.append(stored)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                joined = pa.concat_tables(waiting)
                whole = len(joined) // ROWS_PER_GROUP * ROWS_PER_GROUP
                writer.write_table(joined.slice(0, whole), row_group_size=ROWS_PER_GROUP)
                waiting = [joined.slice(whole)]
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_PER_GROUP)
    keys = np.concatenate([np.empty(0, np.int64), *hashes])
    _check_unique(target, keys)
    return Built(len(keys), size, digest.hexdigest())


def index_size(index: StoredFile | Path) -> int:
    """Number of entries in the stored index."""
    with _opened(index) as file:
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
    found = [_STORED_SCHEMA.empty_table()]
    with _opened(index) as file:
        for group, first, count in _groups(file):
            low, high = max(start, first), first + count if stop is None else min(stop, first + count)
            if low < high:
                found.append(file.read_row_group(group, use_threads=False).slice(low - first, high - low))
    return pa.concat_tables(found)


def find_key(index: StoredFile | Path, key: str) -> int | None:
    """Row number of a key, None if the key is not planned."""
    with _opened(index) as file:
        for group, first, _ in _groups(file):
            bounds = file.metadata.row_group(group).column(0).statistics
            if bounds is not None and bounds.has_min_max and not bounds.min <= key <= bounds.max:
                continue
            row = pc.index(file.read_row_group(group, columns=["key"], use_threads=False)["key"], key).as_py()
            if row >= 0:
                return first + int(row)
    return None


def digest_index(path: Path) -> str:
    """`Built.sha256` of an index file."""
    digest = _Digest()
    with _opened(path) as file:
        for group, _, _ in _groups(file):
            digest.update(file.read_row_group(group, use_threads=False))
    return digest.hexdigest()


def move_index(planned: StoredFile | Path, found: Path, target: Path) -> None:
    """Write the planned index to `target` with the byte ranges of `found`, an index of the source as it is now.

    Rows whose key is gone stay unchanged and fail when they are read. Memory holds all rows of `found`.
    """
    with _opened(found) as file:
        now = file.read(use_threads=False)
    with _opened(planned) as file, storage_errors("write", target), _writer(target) as writer:
        keys = file.read(columns=["key"], use_threads=False)["key"]
        rows = pc.index_in(keys, value_set=now["key"])
        for group, first, count in _groups(file):
            old = file.read_row_group(group, use_threads=False)
            stays = pa.array(np.arange(len(now), len(now) + count), pa.int64())
            moved = rows.slice(first, count)
            places = pc.coalesce(moved.cast(pa.int64()), stays)
            writer.write_table(pa.concat_tables([now, old]).take(places), row_group_size=ROWS_PER_GROUP)


def encode_objects(parts: Sequence[Part]) -> bytes:
    """The file of the objects that were indexed."""
    return _parquet(parts, _OBJECT_SCHEMA)


def read_objects(objects: StoredFile) -> list[Part]:
    with _opened(objects, _OBJECT_SCHEMA) as file:
        return [Part(**row) for row in file.read(use_threads=False).to_pylist()]


def encode_units(units: Iterable[Unit]) -> bytes:
    """The file of the units."""
    return _parquet(list(units), _UNIT_SCHEMA)


def read_units(store: Store) -> list[Unit]:
    with _opened(StoredFile(store, UNITS), _UNIT_SCHEMA) as file:
        return [Unit(**row) for row in file.read(use_threads=False).to_pylist()]


class _Digest:
    """A SHA-256 per column, of its values and their lengths, so that chunk edges do not change it.

    Etags are left out: they distinguish versions of an object, and `objects.parquet` has them.
    """

    def __init__(self) -> None:
        self._streams: dict[str, Any] = {}

    def update(self, table: pa.Table) -> int:
        """Add a table; returns the bytes of its fields."""
        size = 0
        for batch in table.to_batches():
            for name in ("key", "original_key", "image", "caption"):
                self._texts(name, batch[name])
            self._numbers("fields", batch["fields"].value_lengths())
            fields = batch["fields"].flatten()
            self._texts("extension", fields.field("extension"))
            self._texts("url", fields.field("url"))
            self._numbers("offset", fields.field("offset"))
            self._numbers("length", fields.field("length"))
            size += pc.sum(fields.field("length")).as_py() or 0
        return size

    def hexdigest(self) -> str:
        parts = (name.encode() + stream.digest() for name, stream in sorted(self._streams.items()))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _texts(self, name: str, array: pa.Array) -> None:
        self._numbers(f"{name}.length", pc.binary_length(array))
        array = array.fill_null("")
        _, offsets, data = array.buffers()
        places = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        self._take(name, b"" if data is None else memoryview(data)[places[0] : places[-1]])

    def _numbers(self, name: str, array: pa.Array) -> None:
        self._take(name, array.cast(pa.int64()).fill_null(-1).to_numpy().astype("<i8").tobytes())

    def _take(self, name: str, data: bytes | memoryview) -> None:
        self._streams.setdefault(name, hashlib.sha256()).update(data)


def _chosen(tables: Iterable[pa.Table], limit: int | None, skip: int) -> Iterator[pa.Table]:
    for table in tables:
        passed = min(skip, len(table))
        chosen = table.slice(passed, limit)
        yield chosen
        skip -= passed
        if limit is not None:
            limit -= len(chosen)
            if limit == 0:
                return


def _check_unique(path: Path, hashes: npt.NDArray[np.int64]) -> None:
    """Raise SourceError for duplicate keys. Only keys with equal hashes, nearly always none, are read and compared."""
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    for begin in range(0, len(again), 1000):  # a source that is listed twice has all its keys here
        seen: dict[str, str] = {}
        with _opened(path) as file:
            for group, first, count in _groups(file):
                rows = np.flatnonzero(np.isin(hashes[first : first + count], again[begin : begin + 1000]))
                for entry in from_table(file.read_row_group(group, use_threads=False).take(rows)) if len(rows) else ():
                    if entry.key in seen:
                        origin = "" if entry.original_key is None else f" (made of {entry.original_key!r})"
                        number = f"; {len(again):,} keys are duplicated" if len(again) > 1 else ""
                        raise SourceError(
                            f"{public(entry.url)}: key {entry.key!r}{origin} is also in {public(seen[entry.key])}; "
                            f"keys must be unique, rename one of them{number}"
                        )
                    seen[entry.key] = entry.url


def _writer(path: Path) -> pq.ParquetWriter:
    # Every reader of a unit reads the footer first, so it has only the statistics that `find_key` needs.
    return pq.ParquetWriter(path, _STORED_SCHEMA, compression="zstd", write_statistics=["key"])


@contextmanager
def _opened(source: StoredFile | Path, schema: pa.Schema = _STORED_SCHEMA) -> Iterator[pq.ParquetFile]:
    where = source.store.locate(source.path) if isinstance(source, StoredFile) else source
    with (
        storage_errors("read", where),
        source.store.open_read(source.path) if isinstance(source, StoredFile) else source.open("rb") as file,
    ):
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            if not parquet.schema_arrow.equals(schema):
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


def _groups(file: pq.ParquetFile) -> Iterator[tuple[int, int, int]]:
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
