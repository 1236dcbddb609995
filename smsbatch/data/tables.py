"""Tables of pictures: one entry per row of a csv, tsv, jsonl, json or parquet file, read as a stream.

    picture   `columns.image`: a URL, an absolute path, or one relative to the table's folder (storage/addresses.py has
              what a table may name); in parquet also the bytes themselves (cells.py). Its extension is the path's if
              `source.images` has it, else the first of those. A row without one is an entry without picture.
    caption   `columns.caption`: a text, a list of texts of which `source.caption_choice` takes one, or null, which is
              ''. In json and parquet it may be a path (`answers.0.text`). Any other value is None: `bad_caption`.
    key       `columns.key`: a text or a whole number, by the key rule; else `<the table's name>-<row, nine digits>`.

csv, tsv, jsonl and json may be gzipped (`.csv.gz`). A json file is an array of objects, which is held in memory, or has
an object a line. A table that is damaged or lacks a column is a SourceError with the file and, if known, the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from reprlib import repr as short
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from smsbatch.data.captions import PLACE, text_at
from smsbatch.data.cells import bytes_column, column_type, is_text_type, leaf_column, top_column
from smsbatch.data.index import Part
from smsbatch.data.keys import distinct_names, is_text, map_key
from smsbatch.data.sample import Entry, Span, cell
from smsbatch.errors import SampleError, SourceError
from smsbatch.manifest import Source
from smsbatch.storage.addresses import is_data, is_web, named
from smsbatch.text import count, one_line

ROWS_AT_ONCE = 8192
_ROLES = ("image", "caption", "key")
LARGE_GROUP = 1 << 29  # bytes of pictures in a row group, which a worker holds in memory, that are worth a notice


class _Row(NamedTuple):
    """A row: "line 17", and the cells of picture, caption and key, None if the manifest names no column.

    `column` is that of the picture's bytes if the table has them; the first cell is then the name that came with them.
    """

    where: str
    cells: list[Any]
    column: str = ""


def read_table(file: IO[bytes], part: Part, source: Source, seed: int, notices: list[str]) -> Iterator[Entry]:
    """The entries of the table `part`, read from `file`; `notices` gets what is odd about it.

    Raises:
        SourceError: it is no table, damaged, or lacks a column.
    """
    url, columns = part.url, source.columns
    *_, kind = suffixes = ["", *_suffixes(url)]
    if kind == "gz" and suffixes[-2] != "parquet":
        kind = suffixes[-2]
        file = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if kind not in _READERS:
        known = ", .".join(_READERS)
        raise SourceError(f"{url}: not a table by its name; expected one of .{known}, all but parquet also with .gz")
    label = part.label or distinct_names([url])[0]
    for number, (where, (picture, caption, key), column) in enumerate(_READERS[kind](file, part, source, notices)):
        if column:
            extension = _extension(picture if is_text(picture) else "", source.images)
            image, fields = extension, {extension: cell(column, url, number, part.etag)}
        elif is_text(picture) and picture.strip() and "\0" not in picture:
            at = named(url, picture.strip())
            extension = _extension(at, source.images)
            image, fields = extension, {extension: Span(at)}
        else:
            image, fields = "", {kind: Span(url, number)}  # never read
        wish = f"{label}-{number:09d}" if columns.key is None else _key(key, url, where)
        name, original = map_key(f"{part.prefix}/{wish}" if part.prefix else wish, fields, wish)
        text = _caption(caption, source, seed, name)
        yield Entry(name, image, fields, text, original, f"column {columns.caption}" if text else None)


def _caption(value: Any, source: Source, seed: int, key: str) -> str | None:
    """The text of a caption's cell, '' for null, None if it is no text."""
    if isinstance(value, list):
        try:
            return text_at(value, "", "its caption", source, f"{seed}:{key}")
        except SampleError:
            return None
    return "" if value is None else value.strip() if is_text(value) else None


# --------------------------------------------------------------------------------------------------- csv and tsv


def _csv(file: IO[bytes], part: Part, source: Source, notices: list[str], tabs: bool = False) -> Iterator[_Row]:
    columns, url = source.columns, part.url
    delimiter = columns.delimiter or ("\t" if tabs else ",")
    quote = columns.quote if columns.quote is not None else "" if tabs else '"'
    lines = _Lines(file, url)
    texts = iter(lines)
    start = next(texts, "")
    if sep := re.fullmatch(r"sep=(.)\s*", start):  # Excel's own way to name the delimiter
        delimiter = columns.delimiter or sep[1]
    elif "\r" in start.rstrip("\r\n"):
        raise SourceError(f"{url}: line 1: its lines end in CR alone, as on old Macs; save it with LF")
    # The csv module refuses cells of more than 128 KiB: nearly always a quote that is never closed.
    unread = texts if sep else chain([start], texts)
    rows = csv.reader(
        unread,
        delimiter=delimiter,
        quotechar=quote or None,
        quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
        strict=True,
    )
    told, blank, quoted = 0, 0, 0
    try:
        header = next(rows, []) if columns.header is True else columns.header or None
        places: list[int | None] | None = None
        for row in rows:
            if not row:
                blank += 1
                continue
            if places is None:
                if header is None:
                    header = [str(number) for number in range(len(row))]
                places = _places(url, source, list(header), delimiter)
            if len(row) != len(header or ()):
                raise SourceError(
                    f"{url}: line {lines.number}: {len(row)} cells, the header has {len(header or ())}"
                    f"{_is_quoted(row, quote)}"
                )
            told += 1
            quoted += not quote and any(len(text) > 1 and text[0] == text[-1] == '"' for text in row)
            yield _Row(f"line {lines.number}", [None if place is None else row[place] for place in places])
        if places is None:
            _places(url, source, list(header or ()), delimiter)
    except csv.Error as error:
        advice = "; if quotes are part of the text, set source.columns.quote to ''" if quote else ""
        raise SourceError(f"{url}: line {lines.number}: {error}{advice}") from error
    physical = lines.number - bool(sep) - blank - (columns.header is True)
    if physical != told:
        notices.append(
            f"{url}: {count(told, 'row')} from {count(physical, 'line')}: cells in quotes go over several lines; if "
            "quotes are part of the text, set source.columns.quote to ''"
        )
    if quoted:
        notices.append(
            f"{url}: {count(quoted, 'row')} with a cell in quotes, which are kept; source.columns.quote: '\"' removes "
            "them"
        )


def _is_quoted(row: Sequence[str], quote: str) -> str:
    """Advice for a row of a wrong length."""
    if '"' not in "".join(row):
        return ""
    if quote:
        return "; if quotes are part of the text, set source.columns.quote to ''"
    return "; if quotes enclose cells, set source.columns.quote to '\"'"


def _places(url: str, source: Source, header: list[str], delimiter: str) -> list[int | None]:
    columns = source.columns
    names = (columns.image, columns.caption, columns.key)
    hints: list[str] = []
    if not header:
        raise SourceError(f"{url}: it is empty, without a header")
    for role, name in zip(_ROLES, names, strict=True):
        if name is not None and header.count(name) > 1:
            raise SourceError(f"{url}: column {name!r} is there {header.count(name)} times; name each one differently")
        similar = [column for column in header if name and column.strip().casefold() == name.casefold()]
        if name not in header and similar:
            hints.append(f"set source.columns.{role} to {similar[0]!r}, as the file writes it")
        if f'"{name}"' in header:
            hints.append("its names are in quotes: set source.columns.quote to '\"'")
    if not set(header) & set(names):
        for other in (";", "\t", "|", ","):
            if other != delimiter and other in header[0]:
                hints.append(f"{header[0]!r} has {other!r} in it: set source.columns.delimiter to {other!r}")
    if columns.header is True and any(is_web(cell) or _suffix(cell) in source.images for cell in header):
        hints.append("its first line looks like a row: set source.columns.header to false or to a list of names")
    _check_columns(url, names, header, "; ".join(dict.fromkeys(hints)))
    return [None if name is None else header.index(name) for name in names]


class _Lines:
    """Lines, decoded one by one, so that the error of a bad byte names its line; `number` is that of the last."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self.file, self.url, self.number = file, url, 0

    def __iter__(self) -> Iterator[str]:
        try:
            for line in self.file:
                self.number += 1
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(f"{self.url}: after line {self.number}: not a sound gzip file ({error})") from error
        except UnicodeDecodeError as error:
            reason = f"line {self.number}: not UTF-8 ({error.reason})"
            raise SourceError(f"{self.url}: {reason}; save the table as UTF-8") from error


# ---------------------------------------------------------------------------------------------------------- json


def _jsonl(file: IO[bytes], part: Part, source: Source, notices: list[str]) -> Iterator[_Row]:
    lines = _Lines(file, part.url)

    def rows() -> Iterator[tuple[str, Any]]:
        for line in lines:
            if line.strip():
                try:
                    yield f"line {lines.number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceError(f"{part.url}: line {lines.number}: not JSON: {error}") from error

    return _objects(rows(), part.url, source)


def _json(file: IO[bytes], part: Part, source: Source, notices: list[str]) -> Iterator[_Row]:
    """An array of objects, or, as Hugging Face datasets have them too, an object a line."""
    lines = iter(_Lines(file, part.url))
    text = next((line for line in lines if line.strip()), "")
    if not text.lstrip().startswith("["):
        file.seek(0)
        return _jsonl(file, part, source, notices)
    try:
        items = json.loads("".join([text, *lines]))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{part.url}: not JSON: {error}") from error
    return _objects(((f"item {number}", item) for number, item in enumerate(items, 1)), part.url, source)


def _objects(rows: Iterator[tuple[str, Any]], url: str, source: Source) -> Iterator[_Row]:
    columns = source.columns
    names, met = (columns.image, columns.caption, columns.key), Counter[str]()
    for where, row in rows:
        if not isinstance(row, dict):
            raise SourceError(f"{url}: {where}: not a JSON object")
        key = columns.key and top_column(columns.key, row)
        _check_columns(f"{url}: {where}", (None, None, key), list(row))  # a row may lack the others
        met.update(row.keys())
        yield _Row(where, [None if name is None else _at(row, name) for name in names])
    _check_columns(url, [name and top_column(name, met) for name in names], sorted(met))


def _at(row: dict[str, Any], name: str) -> Any:
    """The value of a column, or at a path that begins with one."""
    top = top_column(name, row)
    return _walk(row.get(top), name[len(top) + 1 :].split(".") if len(top) < len(name) else [])


def _walk(value: Any, steps: list[str]) -> Any:
    if not steps:
        return value
    if isinstance(value, list) and not PLACE.fullmatch(steps[0]):
        return [_walk(item, steps) for item in value]
    if isinstance(value, list):
        return _walk(value[int(steps[0])], steps[1:]) if int(steps[0]) < len(value) else None
    return _walk(value.get(steps[0]), steps[1:]) if isinstance(value, dict) else None


# ------------------------------------------------------------------------------------------------------- parquet


def _parquet(file: IO[bytes], part: Part, source: Source, notices: list[str]) -> Iterator[_Row]:
    url, columns, read = part.url, source.columns, 0
    names: list[str | None] = [columns.image, columns.caption, columns.key]
    try:
        table = pq.ParquetFile(file, pre_buffer=False)
        schema = table.schema_arrow
        _check_columns(url, [name and top_column(name, schema.names) for name in names], schema.names)
        for top in (top_column(name, schema.names) for name in names if name is not None):
            if schema.names.count(top) > 1:
                raise SourceError(f"{url}: column {top!r} is there several times; name each one differently")
        column, names[0] = bytes_column(schema, columns.image)
        if column and leaf_column(schema, column) != column:
            raise SourceError(f"{url}: column {columns.image!r} has lists of pictures, expected one in a row")
        if column:
            _tell_large_groups(table, column, url, notices)
        for name, also in zip(names, ("", "", "int"), strict=True):
            kind = None if name is None else column_type(schema, name)
            of_list = name is not None and kind is not None and leaf_column(schema, name) != name
            listed = of_list and name != columns.caption
            if name is not None and (kind is None or listed or not is_text_type(kind, also, name == columns.caption)):
                listing = "a list of " if listed else ""
                found = "nothing there" if kind is None else listing + short(str(kind)).strip("'")
                raise SourceError(f"{url}: column {name!r} has {found}, expected text")
        wanted = sorted({leaf_column(schema, name) for name in names if name is not None})
        # index.py explains why Arrow's threads are off.
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted, use_threads=False):
            rows = batch.to_pylist() if wanted else [{}] * batch.num_rows
            for row in rows:
                read += 1
                yield _Row(f"row {read}", [None if name is None else _at(row, name) for name in names], column)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{url}: after row {read}: not a sound parquet file: {one_line(error)}") from error


def _tell_large_groups(table: pq.ParquetFile, column: str, url: str, notices: list[str]) -> None:
    groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    sizes = [
        group.column(place).total_uncompressed_size
        for group in groups
        for place in range(group.num_columns)
        if group.column(place).path_in_schema == column
    ]
    if sizes and max(sizes) > LARGE_GROUP:
        notices.append(
            f"{url}: row groups of up to {max(group.num_rows for group in groups):,} rows and {max(sizes) >> 20:,} MiB "
            "of pictures; a worker holds one in memory, and each unit reads all of it: write smaller row groups"
        )


_READERS: dict[str, Callable[[IO[bytes], Part, Source, list[str]], Iterator[_Row]]] = {
    "csv": _csv,
    "tsv": partial(_csv, tabs=True),
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
}


# -------------------------------------------------------------------------------------------------------- common


def _suffixes(url: str) -> list[str]:
    """The extensions of a table's name, in lower case: ['csv', 'gz']."""
    path = re.split(r"[?#]", url)[0] if is_web(url) else url
    return path.rpartition("/")[2].lower().split(".")[1:]


def _check_columns(where: str, names: Sequence[str | None], there: Sequence[str], hint: str = "") -> None:
    for role, name in zip(_ROLES, names, strict=True):
        if name is not None and name not in there:
            found = ", ".join(column if column.strip() == column and column else repr(column) for column in there)
            advice = hint or f"set source.columns.{role} to one it has"
            raise SourceError(f"{where}: no column {name!r}; {advice}: {found or 'none'}")


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
    return suffix if (suffix := _suffix(path)) in images else images[0]


def _suffix(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[2].lower()
