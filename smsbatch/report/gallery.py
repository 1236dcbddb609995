"""The pictures of a report: the chosen results with their sources.

The gallery is a function of stored data. Of a tar only the headers and the files that are shown are read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from smsbatch.data import pixels
from smsbatch.data.index import StoredFile, read_index, read_objects
from smsbatch.data.reader import Reader
from smsbatch.data.tars import find_members
from smsbatch.errors import SampleError
from smsbatch.manifest import Image, Source
from smsbatch.parallel import map_ahead
from smsbatch.report.model import SHOW_ALL, SHOW_SAMPLE, Report, RowTally, has_value
from smsbatch.runs.records import result_file
from smsbatch.runs.run import Run
from smsbatch.storage.store import Store, storage_errors

THUMBNAIL_SIDE = 640  # pixels: twice the width of a gallery entry, for high-resolution screens
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """One gallery entry. `before` is None when the source can no longer be read."""

    key: str
    caption: str
    before: bytes | None
    after: bytes
    width: int
    height: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    pictures: Sequence[Picture]


def gallery(run: Run, report: Report, tally: RowTally, index: StoredFile | Path) -> list[Group]:
    """The pictures that the report shows. Tars and sources (by the newest `index`) are read in parallel."""
    chosen: dict[str, list[dict[str, Any]]]
    name = tally.metrics[0] if tally.metrics else ""
    if report.succeeded <= SHOW_ALL:
        in_order = sorted(tally.sample, key=lambda row: row[name] if name and has_value(row, name) else math.inf)
        chosen = {f"All of them, lowest {name.upper()} first" if name else "All of them": in_order}
    else:
        chosen = {"Drawn at random": tally.sample[:SHOW_SAMPLE]}
        if name:
            chosen |= {f"Lowest {name.upper()}": tally.lowest, f"Highest {name.upper()}": tally.highest}
    results = _results(run.store, chain.from_iterable(chosen.values()), report.settings["output"]["format"])

    source = Source.model_validate(report.settings["source"])
    if source.format == "table":  # what its rows may name depends on where it lies, which may be recorded as `${NAME}`
        source = source.model_copy(update={"urls": tuple(part.url for part in read_objects(run.objects))})
    reader = Reader.of(source, run.storage)

    def picture(row: Mapping[str, Any]) -> Picture:
        return _picture(index, reader, report, row, results[row["key"]])

    return [Group(title, list(map_ahead(picture, rows, _THREADS))) for title, rows in chosen.items()]


def _results(store: Store, rows: Iterable[Mapping[str, Any]], extension: str) -> dict[str, bytes]:
    """The stylized files of some rows, by key."""
    wanted: dict[int, dict[str, str]] = defaultdict(dict)
    for row in rows:
        wanted[row["shard"]][f"{row['key']}.{extension}"] = row["key"]

    def of_shard(shard: int) -> dict[str, bytes]:
        tar, keys = result_file(shard, "tar"), wanted[shard]
        with storage_errors("read", store.locate(tar)), store.open_read(tar) as file:
            return {keys[name]: data for name, data in find_members(file, keys).items()}

    return {key: data for found in map_ahead(of_shard, wanted, _THREADS) for key, data in found.items()}


def _picture(
    index: StoredFile | Path, reader: Reader, report: Report, row: Mapping[str, Any], result: bytes
) -> Picture:
    image = Image.model_validate(report.settings["image"])
    entry = read_index(index, row["position"], row["position"] + 1)[0]
    try:
        source, _ = pixels.source_picture(reader.read(entry.fields[entry.image]), image)
        before = pixels.thumbnail(source, THUMBNAIL_SIDE)
    except SampleError:
        before = None  # it has disappeared since the run; the page says so
    return Picture(
        key=row["key"],
        caption=row["caption"] or "",
        before=before,
        after=pixels.thumbnail(result, THUMBNAIL_SIDE),
        width=row["width"],
        height=row["height"],
        metrics={name: row[name] for name in report.metrics if has_value(row, name)},
    )
