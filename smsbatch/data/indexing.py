"""Make an index: join the scans of all objects into one file, check that keys are unique, and digest it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smsbatch.data.index import (
    ROWS_PER_GROUP,
    STORED_SCHEMA,
    StoredFile,
    completed,
    from_table,
    groups,
    opened,
    read_group,
)
from smsbatch.data.reader import public
from smsbatch.errors import SourceError
from smsbatch.storage.store import storage_errors


class Built(NamedTuple):
    """Result of `build_index`: the number of samples, the bytes of all their fields as far as known, and a digest.

    `sha256` covers every key, caption and byte range in order, but not how the rows were chunked or stored. `captions`
    counts the samples by the rule that finds their caption.
    """

    samples: int
    bytes: int
    sha256: str
    captions: Mapping[str, int]


def build_index(
    target: Path, tables: Iterable[pa.Table], limit: int | None = None, skip: int = 0, names: Sequence[str] = ()
) -> Built:
    """Stream tables into one Parquet file: skip the first `skip` rows, then take at most `limit`.

    Memory holds a few tables and eight bytes per key.

    Args:
        names: of the objects that the tables are of, for messages.

    Raises:
        SourceError: duplicate keys; the message names the first with both its places, and how many there are.
    """
    digest, hashes, size, captions = _Digest(), [], 0, Counter[str]()
    counts: list[int] = []
    with storage_errors("write", target), _writer(target) as writer:
        waiting: list[pa.Table] = []
        for table in _chosen(_counted(tables, counts), limit, skip):
            stored = table.cast(STORED_SCHEMA)
            hashes.append(np.fromiter(map(hash, stored["key"].to_pylist()), np.int64, len(stored)))
            size += digest.update(stored)
            for found in pc.value_counts(stored["caption_from"].drop_null()).to_pylist():
                captions[found["values"]] += found["counts"]
            waiting.append(stored)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                joined = pa.concat_tables(waiting)
                whole = len(joined) // ROWS_PER_GROUP * ROWS_PER_GROUP
                writer.write_table(joined.slice(0, whole), row_group_size=ROWS_PER_GROUP)
                waiting = [joined.slice(whole)]
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=ROWS_PER_GROUP)
    keys = np.concatenate([np.empty(0, np.int64), *hashes])
    _check_unique(target, keys, lambda row: _place(row + skip, counts, names))
    return Built(len(keys), size, digest.hexdigest(), dict(captions))


def digest_index(path: Path) -> str:
    """`Built.sha256` of an index file."""
    digest = _Digest()
    with opened(path) as file:
        for group, _, _ in groups(file):
            digest.update(file.read_row_group(group, use_threads=False))
    return digest.hexdigest()


def move_index(planned: StoredFile | Path, found: Path, target: Path) -> None:
    """Write the planned index to `target` with the byte ranges of `found`, an index of the source as it is now.

    Rows whose key is gone stay unchanged and fail when they are read. Memory holds all rows of `found`.
    """
    with opened(found) as file:
        now = completed(file.read(use_threads=False))
    with opened(planned) as file, storage_errors("write", target), _writer(target) as writer:
        keys = file.read(columns=["key"], use_threads=False)["key"]
        rows = pc.index_in(keys, value_set=now["key"])
        for group, first, count in groups(file):
            old = read_group(file, group)
            stays = pa.array(np.arange(len(now), len(now) + count), pa.int64())
            moved = rows.slice(first, count)
            places = pc.coalesce(moved.cast(pa.int64()), stays)
            writer.write_table(pa.concat_tables([now, old]).take(places), row_group_size=ROWS_PER_GROUP)


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
            for name in ("key", "original_key", "image", "caption"):  # a run's captions are found when they are read
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


def _counted(tables: Iterable[pa.Table], counts: list[int]) -> Iterator[pa.Table]:
    for table in tables:
        counts.append(len(table))
        yield table


def _place(row: int, counts: Sequence[int], names: Sequence[str]) -> str:
    """`table.csv, row 3` for a row of all tables joined; '' if they have no names."""
    for name, number in zip(names, counts, strict=False):
        if row < number:
            return f"{name}, row {row + 1:,}"
        row -= number
    return ""


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


def _check_unique(path: Path, hashes: npt.NDArray[np.int64], place: Callable[[int], str]) -> None:
    """Raise SourceError for duplicate keys. Only keys with equal hashes, nearly always none, are read and compared."""
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    for begin in range(0, len(again), 1000):  # a source that is listed twice has all its keys here
        seen: dict[str, str] = {}
        with opened(path) as file:
            for group, first, count in groups(file):
                rows = np.flatnonzero(np.isin(hashes[first : first + count], again[begin : begin + 1000]))
                entries = from_table(read_group(file, group).take(rows)) if len(rows) else []
                for row, entry in zip(rows, entries, strict=True):
                    where = place(first + int(row)) or public(entry.url)
                    if entry.key in seen:
                        origin = "" if entry.original_key is None else f" (made of {entry.original_key!r})"
                        number = f"; {len(again):,} keys are duplicated" if len(again) > 1 else ""
                        raise SourceError(
                            f"{where}: key {entry.key!r}{origin} is also in {seen[entry.key]}; keys must be unique: "
                            f"rename one of them, or set source.key_prefix to shard{number}"
                        )
                    seen[entry.key] = where


def _writer(path: Path) -> pq.ParquetWriter:
    # Every reader of a unit reads the footer first, so it has only the statistics that `find_key` needs.
    return pq.ParquetWriter(path, STORED_SCHEMA, compression="zstd", write_statistics=["key"])
