"""Types that describe one input image before, during and after the work, and the schema of its row.

`Span` and `Entry` locate a sample without reading it, `Unit` is a range of entries, `Sample` holds the bytes read,
`Outcome` the result. Every planned entry, failed or not, ends as exactly one Outcome and so as one row of `row_schema`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa

from smsbatch.text import hidden, printable, shortened

LONGEST_TEXT = 500  # characters of a URL or message in a row


class Span(NamedTuple):
    """Bytes [offset, offset + length) of the object at `url`: an absolute path, a URL or a `tiny:` name.

    `length` None is the whole object, of unknown size: planning does not look up the pictures of a table. `etag` is the
    version of the object when it was planned, '' if unknown. A picture in a cell of a table has a span of `cell`.
    """

    url: str
    offset: int = 0
    length: int | None = None
    etag: str = ""


def cell(column: str, table: str, row: int, etag: str) -> Span:
    """The span of a picture in a Parquet table: a dotted path of a column, the table's URL, the row from 0."""
    return Span(f"parquet:{quote(column, safe='')}:{table}", row, None, etag)


def table_of(url: str) -> tuple[str, str] | None:
    """(column, table) if a span's URL is that of a cell."""
    match = re.fullmatch(r"parquet:([^:/]*):(.*)", url, re.DOTALL)
    return None if match is None else (unquote(match[1]), match[2])


@dataclass(frozen=True, slots=True)
class Entry:
    """One planned sample.

    `fields` maps extensions ('jpg', 'txt', 'seg.png') to spans; `image` is the picture's extension, '' if it has none.
    `caption` is set by tables, and by the metadata of a folder. `original_key` is the source's name for the sample if
    it could not be the key. `caption_from` is the rule that finds its caption, as far as planning knows, None for none.
    """

    key: str
    image: str
    fields: Mapping[str, Span]
    caption: str | None = None
    original_key: str | None = None
    caption_from: str | None = None

    @property
    def url(self) -> str:
        """The object of the picture, else that of the first field; a cell of a table is `table.parquet#row=17`."""
        span = self.fields[self.image] if self.image else next(iter(self.fields.values()))
        found = table_of(span.url)
        return span.url if found is None else f"{found[1]}#row={span.offset}"


@dataclass(frozen=True, slots=True)
class Sample:
    """The bytes of one entry: the picture in use, and in `fields` all others unchanged, also a second picture."""

    key: str
    url: str
    image: bytes
    image_field: str
    caption: str
    fields: Mapping[str, bytes]
    original_key: str | None = None
    caption_from: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest()


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, stop) of the index, computed and committed together; `shard` is where they are published."""

    id: int
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.id:06d}"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one sample: a success if it has an `image`, else a failure with `error_code` and `error_message`.

    `image` is the encoded result and `image_field` its extension; `fields` are the source's others, passed through.
    `attempts` counts the tries. The ledger adds unit, shard, generation, attempt and worker to the row when the unit is
    committed.
    """

    key: str
    url: str
    image: bytes | None = None
    image_field: str = ""
    error_code: str | None = None
    error_message: str | None = None
    caption: str | None = None
    caption_from: str | None = None
    prompt: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    source_sha256: str | None = None
    seed: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    seconds: float | None = None
    original_key: str | None = None
    attempts: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.image is None) == (self.error_code is None):
            raise ValueError(f"{self.key}: an outcome has either an image or an error code")
        if self.image is not None and not self.image_field:
            raise ValueError(f"{self.key}: an image needs its extension, image_field")

    @property
    def succeeded(self) -> bool:
        return self.image is not None

    def row(self, unit: Unit, attempt: str, worker: str, metrics: Sequence[str], generation: int = 0) -> dict[str, Any]:
        """The row of `row_schema(metrics)`; a metric that was not measured is null.

        URL and message, which come from anywhere, are cleaned.
        """
        columns = {name: getattr(self, name) for name in _OF_OUTCOME}
        for name in ("url", "error_message"):
            if columns[name] is not None:
                columns[name] = cleaned(columns[name])
        columns["prompt"] = None if self.prompt is None else hidden(self.prompt)
        return columns | {
            "status": "success" if self.succeeded else "failed",
            "sha256": None if self.image is None else hashlib.sha256(self.image).hexdigest(),
            "unit": unit.id,
            "shard": unit.shard,
            "generation": generation,
            "attempt": attempt,
            "worker": worker,
            **{name: self.metrics.get(name) for name in metrics},
        }

    def provenance(self) -> bytes:
        """The `<key>.json` of a sample whose source has none: only values that a re-run reproduces.

        Times, workers and the source's URL are left out, so a moved source gives the same shards. No value is null,
        because readers infer a column's type from the first samples.
        """
        values = {name: getattr(self, name) for name in _PROVENANCE}
        values |= {"caption": self.caption or "", "original_key": self.original_key or self.key}
        values["prompt"] = hidden(self.prompt or "")
        return json.dumps(values, ensure_ascii=False, sort_keys=True).encode()


# The names are img2dataset's if it has them, because data teams already filter by those.
ROW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("original_key", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # success | failed
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),  # tries of the sample
        pa.field("caption", pa.string()),
        pa.field("caption_from", pa.string()),  # the rule of source.caption, or the column; null without caption
        pa.field("prompt", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("url", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("seed", pa.uint64()),  # a hash of (run seed, key) may use all 64 bits
        pa.field("steps", pa.int32()),
        pa.field("batch_size", pa.int32()),  # samples optimized together; null if the sample failed before
        pa.field("seconds", pa.float64()),
        pa.field("unit", pa.int64(), nullable=False),
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),  # 0, plus one for every retry of failed samples
        pa.field("attempt", pa.string(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
    ]
)
_OF_LEDGER = {"status", "sha256", "unit", "shard", "generation", "attempt", "worker"}
_OF_OUTCOME = [name for name in ROW_SCHEMA.names if name not in _OF_LEDGER]
_OF_ONE_RUN = {"caption_from", "error_code", "error_message", "attempts", "batch_size", "seconds", "url"}
_PROVENANCE = [name for name in _OF_OUTCOME if name not in _OF_ONE_RUN]


def row_schema(metrics: Sequence[str] = ()) -> pa.Schema:
    """`ROW_SCHEMA` and one float32 column per metric, in the given order."""
    for name in metrics:
        if name in ROW_SCHEMA.names:
            raise ValueError(f"a metric cannot be named like the column {name}")
    return pa.schema([*ROW_SCHEMA, *(pa.field(name, pa.float32()) for name in metrics)])


def cleaned(text: str) -> str:
    """A URL or message for a row: at most LONGEST_TEXT characters, all of them printable, none moves a cursor."""
    return shortened(printable(hidden(text)), LONGEST_TEXT)


def hashed_seed(name: str) -> int:
    """The first 63 bits of the SHA-256 of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
