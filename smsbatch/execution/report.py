"""What a finished run tells: numbers, index, dataset card and `report.html`.

Contract: everything is computed from storage alone (`run.json`, plan, commits, published shards), with the rows of
one shard in memory at a time, and is a function of it: reporting twice writes the same bytes. A run whose rows do not
add up to its plan (`success + failed == planned`) has no report but a RunError.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain, groupby
from typing import Any

import numpy as np

from smsbatch.data import pixels
from smsbatch.data.index import read_index, read_units
from smsbatch.data.ledger import Commit, Ledger, Published
from smsbatch.data.objects import Reader
from smsbatch.data.sample import Unit
from smsbatch.data.shards import read_rows
from smsbatch.data.store import Store
from smsbatch.data.tars import Members
from smsbatch.errors import RequestError, RunError, SampleError
from smsbatch.execution.record import RUN, allowed_drift, read_run
from smsbatch.execution.report_card import card
from smsbatch.execution.report_page import render
from smsbatch.manifest import Source, Storage

__all__ = ["Distribution", "Failure", "Group", "Picture", "Report", "is_reported", "summarize", "write_report"]

SUCCESS = "_SUCCESS"
_WRITTEN = ("index.json", "README.md", "report.html")

SHOW_ALL = 16  # so many results are shown whole, more as a sample and the two ends of the first metric
SHOW_SAMPLE = 9
SHOW_END = 3
THUMBNAIL_SIDE = 640  # pixels: twice what a card measures, for dense screens


@dataclass(frozen=True, slots=True)
class Failure:
    """One error code: how often, and the first sample that had it."""

    code: str
    count: int
    key: str
    message: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """One metric over the stylized samples. `counts[i]` of them lie in [edges[i], edges[i + 1])."""

    count: int
    mean: float
    low: float
    high: float
    quantiles: Mapping[str, float]  # p05, p25, p50, p75, p95
    edges: Sequence[float]
    counts: Sequence[int]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Bins of a round width (1, 2 or 5 times a power of ten), some ten to twenty-five of them."""
        given = np.asarray(values, dtype=np.float64)
        low, high = float(given.min()), float(given.max())
        raw = max(
            (high - low) / 10, 0.01 * max(abs(low), abs(high), 1e-9)
        )  # equal values still need a bin of some width
        power = 10.0 ** math.floor(math.log10(raw))
        width = power * max(factor for factor in (1, 2, 5) if factor * power <= raw * (1 + 1e-9))
        first, last = math.floor(low / width), math.floor(high / width) + 1
        # By index and not by comparison with the edges, whose rounding could put a value outside of all of them.
        bins = np.clip(np.floor(given / width) - first, 0, last - first - 1).astype(int)
        return cls(
            count=len(given),
            mean=float(given.mean()),
            low=low,
            high=high,
            quantiles={f"p{q:02d}": float(np.percentile(given, q)) for q in (5, 25, 50, 75, 95)},
            edges=[float(f"{k * width:.12g}") for k in range(first, last + 1)],
            counts=np.bincount(bins, minlength=last - first).tolist(),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run in numbers. Times are ISO 8601, UTC."""

    name: str
    planned: int
    succeeded: int
    failed: int
    failures: Sequence[Failure]  # the most frequent first
    units: int
    shards: int
    workers: int
    seconds: float  # of computing, all workers together, without reading, writing and loading models
    wall_seconds: float  # while at least one worker was at work: an interruption is not counted
    images_per_second: float  # of wall time
    metrics: Mapping[str, Distribution]
    started: str
    finished: str
    settings: Mapping[str, Any]  # the resolved manifest
    weights: Mapping[str, str]  # file: SHA-256
    versions: Mapping[str, str]
    notices: Sequence[str]
    paths: Mapping[str, str]  # where the shards, rows and the report are

    @property
    def errors(self) -> dict[str, int]:
        """Failed samples by error code."""
        return {failure.code: failure.count for failure in self.failures}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


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


def is_reported(store: Store) -> bool:
    """Everything that `write_report` writes is there."""
    return all(store.exists(name) for name in _WRITTEN)


def summarize(store: Store) -> Report:
    """The numbers of a finished run.

    Raises:
        RequestError: there is no run.
        RunError: a planned sample has no row, or a shard is not published.
    """
    return _summarize(store)[0]


def write_report(store: Store) -> Report:
    """Write index.json, README.md and report.html; returns the numbers. Errors as of `summarize`."""
    report, tally = _summarize(store)
    index = {
        "name": report.name,
        "planned": report.planned,
        "succeeded": report.succeeded,
        "failed": report.failed,
        "shards": [_shard(record) for record in tally.published],
    }
    store.put("index.json", json.dumps(index, indent=1).encode())
    store.put("README.md", card(report).encode())
    store.put("report.html", render(report, _gallery(store, report, tally)).encode())
    return report


# ----------------------------------------------------------------------------------------------------------- numbers


def _summarize(store: Store) -> tuple[Report, _Tally]:
    run = read_run(store)
    if run is None:
        raise RequestError(f"{store.url} holds no run ({RUN} is missing); `smsbatch run` starts one")
    ledger, tally = Ledger(store), _Tally(seed=run["manifest"]["seed"], metrics=run["manifest"]["metrics"])
    units = read_units(store)
    commits = ledger.commits()
    for shard, members in groupby(units, lambda unit: unit.shard):
        published = ledger.published(shard)
        if published is None:
            raise RunError(f"{store.url}: shard {shard:06d} is not published yet; run the manifest again to finish it")
        tally.add(published, _rows(store, published, list(members)))
    planned: int = run["planned"]["samples"]
    failed = tally.failures.total()
    if tally.succeeded + failed != planned:
        raise RunError(
            f"{store.url}: {planned} images are planned, but {tally.succeeded} + {failed} have a row; "
            "run the manifest again to finish it"
        )
    started, finished, wall = _span(commits.values())
    return Report(
        name=run["name"],
        planned=planned,
        succeeded=tally.succeeded,
        failed=failed,
        failures=[Failure(code, n, *tally.examples[code]) for code, n in tally.failures.most_common()],
        units=len(units),
        shards=len(tally.published),
        workers=len({commit.worker for commit in commits.values()}),
        seconds=tally.seconds,
        wall_seconds=wall,
        images_per_second=planned / max(wall, 1e-3),
        metrics={name: Distribution.of(values) for name, values in tally.values.items() if values},
        started=started,
        finished=finished,
        settings=run["manifest"],
        weights=run["weights"],
        versions=run["versions"],
        notices=[*run["notices"], *_drift(store)],
        paths={
            "shards": store.locate("shards"),
            "rows": store.locate("metrics"),
            "report": store.locate("report.html"),
        },
    ), tally


def _drift(store: Store) -> list[str]:
    """What the user allowed to differ from the plan, a notice each."""
    return [
        f"went on, as allowed, though changed since it was planned: {change['text']}"
        for note in allowed_drift(store)
        for change in note["changed"].values()
    ]


def _rows(store: Store, published: Published, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The rows of a shard, proven to be those of the plan, each with its `position` in the index."""
    with store.open_read(published.parquet) as file:
        rows = read_rows(file)
    start, stop = units[0].start, units[-1].stop
    planned = [entry.key for entry in read_index(store, start, stop)]
    if planned != [row["key"] for row in rows]:
        raise RunError(
            f"{store.locate(published.parquet)} has not the rows of its {len(planned)} planned images; "
            "delete it and run the manifest again"
        )
    return [row | {"position": position} for position, row in enumerate(rows, start)]


@dataclass(slots=True)
class _Tally:
    """What remains of the rows once their shard is out of memory: counts, values, and those that may be shown."""

    seed: int
    metrics: Sequence[str]
    succeeded: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)  # code: key and message of the first
    values: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    published: list[Published] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)
    lowest: list[dict[str, Any]] = field(default_factory=list)
    highest: list[dict[str, Any]] = field(default_factory=list)

    def add(self, published: Published, rows: Iterable[dict[str, Any]]) -> None:
        stylized = []
        for row in rows:
            self.seconds += row["seconds"] or 0.0
            if row["status"] == "success":
                stylized.append(row)
            else:
                self.failures[row["error_code"]] += 1
                self.examples.setdefault(row["error_code"], (row["key"], row["error_message"] or ""))
        self.succeeded += len(stylized)
        self.published.append(published)
        for name in self.metrics:
            self.values[name].extend(row[name] for row in stylized if _measured(row, name))
        self.sample = heapq.nsmallest(SHOW_ALL, chain(self.sample, stylized), key=self._lot)
        if self.metrics:
            name = self.metrics[0]
            measured = [row for row in stylized if _measured(row, name)]
            self.lowest = heapq.nsmallest(SHOW_END, chain(self.lowest, measured), key=lambda row: row[name])
            self.highest = heapq.nlargest(SHOW_END, chain(self.highest, measured), key=lambda row: row[name])

    def _lot(self, row: Mapping[str, Any]) -> bytes:
        """Drawn by the run's seed: as good as random, and the same whenever the report is written."""
        return hashlib.sha256(f"{self.seed}/{row['key']}".encode()).digest()


def _measured(row: Mapping[str, Any], name: str) -> bool:
    return row[name] is not None and math.isfinite(row[name])


def _span(commits: Iterable[Commit]) -> tuple[str, str, float]:
    """When the first unit was begun, when the last was finished, and for how long of that some worker was at work."""
    ends = ((datetime.fromisoformat(commit.finished).timestamp(), commit.seconds) for commit in commits)
    intervals = sorted((end - seconds, end) for end, seconds in ends)
    at_work, reached = 0.0, -math.inf
    for start, end in intervals:
        at_work += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return _iso(intervals[0][0]), _iso(reached), at_work


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")


def _shard(record: Published) -> dict[str, Any]:
    """A line of index.json."""
    paths = {"tar": record.tar, "parquet": record.parquet}
    files = {kind: {"path": path} | asdict(record.files[kind]) for kind, path in paths.items()}
    return files | {"samples": record.samples, "succeeded": record.succeeded, "failed": record.failed}


# ----------------------------------------------------------------------------------------------------------- gallery


def _gallery(store: Store, report: Report, tally: _Tally) -> list[Group]:
    chosen: dict[str, list[dict[str, Any]]]
    name = tally.metrics[0] if tally.metrics else ""
    if report.succeeded <= SHOW_ALL:
        in_order = sorted(tally.sample, key=lambda row: row[name] if name and _measured(row, name) else math.inf)
        chosen = {f"All of them, lowest {name.upper()} first" if name else "All of them": in_order}
    else:
        chosen = {"Drawn by lot": tally.sample[:SHOW_SAMPLE]}
        if name:
            chosen |= {f"Lowest {name.upper()}": tally.lowest, f"Highest {name.upper()}": tally.highest}
    results = _results(store, chain.from_iterable(chosen.values()), report.settings["output"]["format"])
    return [
        Group(title, [_picture(store, report, row, results[row["key"]]) for row in rows])
        for title, rows in chosen.items()
    ]


def _results(store: Store, rows: Iterable[Mapping[str, Any]], extension: str) -> dict[str, bytes]:
    """The stylized files of some rows, by key; of a shard's tar only the headers and these files are read."""
    wanted: dict[int, dict[str, str]] = defaultdict(dict)
    for row in rows:
        wanted[row["shard"]][f"{row['key']}.{extension}"] = row["key"]
    found: dict[str, bytes] = {}
    for shard, names in wanted.items():
        with store.open_read(f"shards/{shard:06d}.tar") as file:
            for member in list(Members(file)):
                if member.name in names:
                    file.seek(member.offset)
                    found[names[member.name]] = file.read(member.length)
    return found


def _picture(store: Store, report: Report, row: Mapping[str, Any], result: bytes) -> Picture:
    image = report.settings["image"]
    entry = read_index(store, row["position"], row["position"] + 1)[0]
    storage = Storage.model_validate(report.settings.get("storage", {}))
    reader = Reader(storage, Source.model_validate(report.settings["source"]).max_bytes)
    try:
        source = pixels.decode(
            reader.read(entry.fields[entry.image]), min_side=image["min_side"], max_pixels=image["max_pixels"]
        )
        before = pixels.thumbnail(pixels.fit(source, image["resolution"], image["fit"]), THUMBNAIL_SIDE)
    except SampleError:
        before = None  # it was read when it was stylized; the page says that it is gone
    return Picture(
        key=row["key"],
        caption=row["caption"] or "",
        before=before,
        after=pixels.thumbnail(result, THUMBNAIL_SIDE),
        width=row["width"],
        height=row["height"],
        metrics={name: row[name] for name in report.metrics if _measured(row, name)},
    )
