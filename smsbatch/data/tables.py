"""Tables of pictures: one entry per row of a csv, tsv, jsonl or parquet file, read as a stream.

    picture   `columns.image`: a URL, an absolute path, or one relative to the table's folder; storage/addresses.py has
              what a table may name. Its extension is the path's if `source.images` has it, else the first of those. A
              row without one is an entry without picture.
    caption   `columns.caption`: a text, or null, which is ''. Any other value is None and fails as `bad_caption`.
    key       `columns.key`: a text or a whole number, by the key rule; else `<table's stem>-<row, nine digits>`.

A table that is damaged or lacks a column is a SourceError with the file and, if known, the line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from reprlib import repr as short
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from smsbatch.data.keys import is_text, map_key, sanitize
from smsbatch.data.sample import Entry, Span
from smsbatch.errors import SourceError
from smsbatch.manifest import Source
from smsbatch.storage.addresses import is_data, is_web, named

ROWS_AT_ONCE = 8192
# "line 17", and the cells of picture, caption and key; None if the manifest names no column.
_Row = tuple[str, Sequence[Any]]


def read_table(file: IO[bytes], url: str, source: Source) -> Iterator[Entry]:
    """The entries of the table at `url`, read from `file`."""
    path = re.split(r"[?#]", url)[0] if is_web(url) else url
    stem, _, suffix = path.rpartition("/")[2].rpartition(".")
    if suffix.lower() not in _READERS:
        raise SourceError(f"{url}: not a table by its name; expected one of .{', .'.join(_READERS)}")
    # 64 bytes are enough to identify a table, and leave room for the number.
    stem = sanitize(stem).encode()[:64].decode(errors="ignore")
    columns = source.columns
    rows = _READERS[suffix.lower()](file, url, (columns.image, columns.caption, columns.key))
    for number, (where, (picture, caption, key)) in enumerate(rows):
        if is_text(picture) and picture.strip() and "\0" not in picture:
            at = named(url, picture.strip())
            extension = _extension(at, source.images)
            image, fields = extension, {extension: Span(at)}
        else:
            image, fields = "", {suffix.lower(): Span(url)}
        wish = f"{stem}-{number:09d}" if columns.key is None else _key(key, url, where)
        name, original = map_key(wish, fields)
        text = "" if caption is None else caption.strip() if is_text(caption) else None
        yield Entry(name, image, fields, text, original)


def _csv(file: IO[bytes], url: str, names: Sequence[str | None], delimiter: str) -> Iterator[_Row]:
    # The csv module refuses cells of more than 128 KiB: nearly always a quote that is never closed.
    rows = csv.reader((line for _, line in _lines(file, url)), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        _check_columns(url, names, header)
        places = [None if name is None else header.index(name) for name in names]
        for row in rows:
            if row and len(row) != len(header):
                raise SourceError(f"{url}: line {rows.line_num}: {len(row)} cells, the header has {len(header)}")
            if row:
                yield f"line {rows.line_num}", [None if place is None else row[place] for place in places]
    except csv.Error as error:
        raise SourceError(f"{url}: line {rows.line_num}: {error}") from error


def _jsonl(file: IO[bytes], url: str, names: Sequence[str | None]) -> Iterator[_Row]:
    met: set[str] = set()
    for number, line in _lines(file, url):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{url}: line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise SourceError(f"{url}: line {number}: not a JSON object")
        _check_columns(f"{url}: line {number}", (None, None, names[2]), list(row))  # a row may lack the others
        met |= row.keys()
        yield f"line {number}", [None if name is None else row.get(name) for name in names]
    _check_columns(url, names, sorted(met))


def _parquet(file: IO[bytes], url: str, names: Sequence[str | None]) -> Iterator[_Row]:
    read = 0
    try:
        table = pq.ParquetFile(file, pre_buffer=False)
        schema = table.schema_arrow
        _check_columns(url, names, schema.names)
        for name, also in zip(names, ("", "", "int"), strict=True):
            kind = None if name is None else schema.field(name).type
            text = getattr(kind, "value_type", kind)  # the values of a dictionary
            if kind is not None and not re.match(
                rf"(large_)?string(_view)?$|null$|u?{also or 'string'}\d*$", str(text)
            ):
                raise SourceError(f"{url}: column {name!r} has {short(str(kind))}, expected text")
        wanted = sorted({name for name in names if name is not None})
        # index.py explains why Arrow's threads are off.
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted, use_threads=False):
            columns = [[None] * len(batch) if name is None else batch[name].to_pylist() for name in names]
            for cells in zip(*columns, strict=True):
                read += 1
                yield f"row {read}", cells
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{url}: after row {read}: not a sound parquet file: {_line(error)}") from error


_READERS: dict[str, Callable[[IO[bytes], str, Sequence[str | None]], Iterator[_Row]]] = {
    "csv": partial(_csv, delimiter=","),
    "tsv": partial(_csv, delimiter="\t"),
    "jsonl": _jsonl,
    "parquet": _parquet,
}


def _lines(file: IO[bytes], url: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one, so that the error of a bad byte names its line."""
    for number, line in enumerate(file, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{url}: line {number}: not UTF-8 ({error.reason}); save the table as UTF-8") from error


def _check_columns(where: str, names: Sequence[str | None], there: Sequence[str]) -> None:
    for role, name in zip(("image", "caption", "key"), names, strict=True):
        if name is not None and name not in there:
            found = ", ".join(there) or "none"
            raise SourceError(f"{where}: no column {name!r}; set source.columns.{role} to one it has: {found}")


def _key(value: object, url: str, where: str) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise SourceError(f"{url}: {where}: {short(value)} is no key; expected a text or a whole number")


def _extension(place: str, images: Sequence[str]) -> str:
    if is_data(place):
        path = re.split("[;,]", place[:100])[0].replace("/", ".")  # of `data:image/png;base64,`
    else:
        path = re.split(r"[?#]", place)[0] if is_web(place) else place
    suffix = path.rpartition("/")[2].rpartition(".")[2].lower()
    return suffix if suffix in images else images[0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
