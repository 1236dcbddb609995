"""Columns of Parquet tables, and pictures in their cells, as Hugging Face datasets store them.

A picture is a `struct<bytes, path>`, or `binary`. Reading one reads the row group that holds it,
never the whole table; the last two groups stay in memory, because the rows of units follow each other. `sample.py` has
the spans of such pictures.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container
from functools import lru_cache
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from smsbatch.data.captions import PLACE, key_of
from smsbatch.manifest import Storage
from smsbatch.storage.resolve import resolve


@lru_cache(maxsize=8)
def row_groups(storage: Storage, pid: int) -> RowGroups:
    """The one reader of cells in a process, for all its units; `pid` because a fork has a lock of its own."""
    return RowGroups(storage)


class RowGroups:
    """Reads cells, for any number of threads; holds the column of the last two row groups that were read."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = Lock()
        self._held: deque[tuple[tuple[str, str, str], int, pa.ChunkedArray]] = deque(maxlen=2)

    def read(self, column: str, table: str, row: int, etag: str) -> bytes | None:
        """The bytes in a row; None if the cell is null.

        Raises:
            OSError: the table cannot be read, or has another version than `etag`.
            ValueError: it has no such row or column, or is damaged.
        """
        with self._lock:
            for of, first, cells in self._held:
                if of == (table, column, etag) and first <= row < first + len(cells):
                    break
            else:
                first, cells = self._group(column, table, row, etag)
                self._held.append(((table, column, etag), first, cells))
        data: bytes | None = cells[row - first].as_py()
        return data

    def _group(self, column: str, table: str, row: int, etag: str) -> tuple[int, pa.ChunkedArray]:
        backend, path = resolve(table, self._storage)
        found = backend.find(path)
        if found is not None and etag and found.etag != etag:
            raise OSError("its table was replaced since it was planned")
        with backend.open(path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            first = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if row < first + rows:
                    cells = parquet.read_row_group(group, columns=[column], use_threads=False).column(0)
                    while pa.types.is_struct(cells.type):  # with the one field that was asked for
                        cells = pa.chunked_array([chunk.field(0) for chunk in cells.chunks])
                    return first, cells
                first += rows
        raise ValueError(f"its table has only {first} rows")


def top_column(name: str, columns: Container[str]) -> str:
    """The column of a name that may be a path into it; the name itself if there is none."""
    return key_of(name, columns) or name


def bytes_column(schema: pa.Schema, name: str) -> tuple[str, str | None]:
    """(column of the picture's bytes, column of its name); ('', name) if the column has addresses."""
    kind = column_type(schema, name)
    if kind is not None and pa.types.is_struct(kind):
        inside = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        if _is_binary(inside.get("bytes")):
            return f"{name}.bytes", f"{name}.path" if "path" in inside else None
    if _is_binary(kind):
        beside = f"{name.rpartition('.')[0]}.path"
        return name, beside if column_type(schema, beside) is not None else None
    return "", name


def column_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """The type of a column, or of a field at a path into a struct; None if there is none."""
    top = top_column(name, schema.names)
    kind = schema.field(top).type if top in schema.names else None
    for step in name[len(top) + 1 :].split(".") if len(top) < len(name) else ():
        if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            kind = kind.value_type
            if PLACE.fullmatch(step):
                continue
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
            return None
        kind = kind.field(step).type
    return kind


def _is_binary(kind: pa.DataType | None) -> bool:
    kind = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
    return kind is not None and re.match(r"(large_|fixed_size_)?binary(_view)?\b", str(kind)) is not None


def leaf_column(schema: pa.Schema, name: str) -> str:
    """What to ask Parquet for to get the value at a path: the path, or from the first list on the whole column."""
    top = top_column(name, schema.names)
    kind, path = schema.field(top).type, top
    for step in name[len(top) + 1 :].split(".") if len(top) < len(name) else ():
        if not pa.types.is_struct(kind):
            break
        kind, path = kind.field(step).type, f"{path}.{step}"
    return path


def is_text_type(kind: pa.DataType, also: str, lists: bool) -> bool:
    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    return re.match(rf"(large_)?string(_view)?$|null$|u?{also or 'string'}\d*$", str(text)) is not None
