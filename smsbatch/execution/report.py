"""What a finished run tells: numbers, index, dataset card and `report.html`.

Contract: everything is computed from storage alone (`run.json`, plan, commits, published shards), with the rows of a
few shards in memory at a time, and is a function of it: reporting twice writes the same bytes. A run whose rows do not
add up to its plan (`success + failed == planned`) has no report but a RunError.

index.json keeps the numbers, under a digest of them and of all that they follow from, so that whoever asks again reads
no row; where anything of that has changed they are computed anew.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from smsbatch.data.index import ROWS_PER_GROUP, SAMPLES, read_index, read_units
from smsbatch.data.ledger import Ledger
from smsbatch.data.records import ILLEGIBLE, Commit, Published
from smsbatch.data.shards import read_rows
from smsbatch.data.store import Store, storage_errors
from smsbatch.errors import RunError
from smsbatch.execution.gallery import SHOW_ALL, SHOW_END, gallery, has_value
from smsbatch.execution.pool import started_ahead
from smsbatch.execution.record import allowed_drift, check_dataset, the_run
from smsbatch.execution.report_card import card
from smsbatch.execution.report_page import render

__all__ = ["Distribution", "Failure", "Report", "Tally", "is_reported", "summarize", "write_report"]

SUCCESS = "_SUCCESS"
INDEX = "index.json"
REPORT = (INDEX, "README.md", "report.html")

_AHEAD = 8  # shards whose rows are fetched while others are counted


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
    generator: Mapping[str, Any] | None  # what it says of itself, of task stylize
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


def is_reported(store: Store) -> bool:
    """Everything that `write_report` writes is there."""
    return all(store.exists(name) for name in REPORT)


def summarize(
    store: Store, commits: Mapping[int, Commit] | None = None, published: Mapping[int, Published] | None = None
) -> Report:
    """The numbers of a finished run, from index.json if they are of what stands now.

    Args:
        commits: as the ledger has them now, of a caller who has read them.
        published: likewise.

    Raises:
        RequestError: there is no run, or one that makes no dataset.
        RunError: a planned sample has no row, or a shard is not published.
    """
    run = the_run(store)
    check_dataset(store, run)
    published = Ledger(store).publications() if published is None else published
    return _recall(store, run, published) or _count(store, run, commits, published)[0]


def write_report(
    store: Store, commits: Mapping[int, Commit] | None = None, published: Mapping[int, Published] | None = None
) -> Report:
    """Write README.md, report.html and index.json; returns the numbers. Arguments and errors as of `summarize`."""
    run = the_run(store)
    check_dataset(store, run)
    published = Ledger(store).publications() if published is None else published
    report, tally = _count(store, run, commits, published)
    numbers = {name: value for name, value in report.to_dict().items() if name in _NUMBERS}
    index = {
        "name": report.name,
        "planned": report.planned,
        "succeeded": report.succeeded,
        "failed": report.failed,
        "report": {"of": _digest(store, run, published, numbers), "numbers": numbers},
        "shards": [_shard(record) for record in tally.published],
    }
    store.put("README.md", card(report).encode())
    store.put("report.html", render(report, gallery(store, report, tally)).encode())
    store.put(INDEX, json.dumps(index, indent=1).encode())  # last: where it is of what stands, the others are too
    return report


# ----------------------------------------------------------------------------------------------------------- numbers

_NUMBERS = (
    *("planned", "succeeded", "failed", "failures", "units", "shards", "workers", "seconds", "wall_seconds"),
    *("images_per_second", "metrics", "started", "finished"),
)


def _recall(store: Store, run: Mapping[str, Any], published: Mapping[int, Published]) -> Report | None:
    """What index.json has of a report; None unless that is of just this run, these records, and as it was written."""
    found = store.read_all([INDEX])
    try:
        told = json.loads(found[INDEX])["report"]
        numbers = told["numbers"]
        if told["of"] != _digest(store, run, published, numbers):
            return None
        failures = [Failure(**one) for one in numbers["failures"]]
        metrics = {name: Distribution(**one) for name, one in numbers["metrics"].items()}
    except ILLEGIBLE:
        return None
    return Report(**numbers | {"failures": failures, "metrics": metrics}, **_circumstances(store, run))


def _digest(
    store: Store, run: Mapping[str, Any], published: Mapping[int, Published], numbers: Mapping[str, Any]
) -> str:
    """Of a report's numbers and of what they follow from: the commits are named by the records, the rows by digests."""
    records = [asdict(record) for _, record in sorted(published.items())]
    of = json.dumps([run, records, allowed_drift(store), numbers], sort_keys=True)
    return hashlib.sha256(of.encode()).hexdigest()


def _circumstances(store: Store, run: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says beside its numbers."""
    return {
        "name": run["name"],
        "settings": run["manifest"],
        "generator": run.get("generator"),
        "weights": run["weights"],
        "versions": run["versions"],
        "notices": [*run["notices"], *_drift(store)],
        "paths": {
            "shards": store.locate("shards"),
            "rows": store.locate("metrics"),
            "report": store.locate("report.html"),
        },
    }


def _count(
    store: Store, run: Mapping[str, Any], commits: Mapping[int, Commit] | None, published: Mapping[int, Published]
) -> tuple[Report, Tally]:
    tally = Tally(seed=run["manifest"]["seed"], metrics=run["manifest"]["metrics"])
    units = read_units(store)
    planned_in = {shard: sum(map(len, members)) for shard, members in groupby(units, lambda unit: unit.shard)}
    missing = [shard for shard in planned_in if shard not in published]
    if missing:
        shard = missing[0]
        raise RunError(f"{store.url}: shard {shard:06d} is not published yet; run the manifest again to finish it")
    start = 0
    records = [published[shard] for shard in planned_in]
    with _planned(store) as keys, _fetched(store, records) as files:
        for record, data in zip(records, files, strict=True):
            planned = list(islice(keys, planned_in[record.shard]))
            tally.add(record, _rows(store, record, data, planned, start))
            start += len(planned)
    failed = tally.failures.total()
    if tally.succeeded + failed != run["planned"]["samples"]:
        raise RunError(
            f"{store.url}: {run['planned']['samples']} images are planned, but {tally.succeeded} + {failed} have a "
            "row; run the manifest again to finish it"
        )
    commits = Ledger(store).commits() if commits is None else commits
    started, finished, wall = _span(commits.values())
    return Report(
        planned=start,
        succeeded=tally.succeeded,
        failed=failed,
        failures=[Failure(code, n, *tally.examples[code]) for code, n in tally.failures.most_common()],
        units=len(units),
        shards=len(tally.published),
        workers=len({commit.worker for commit in commits.values()}),
        seconds=tally.seconds,
        wall_seconds=wall,
        images_per_second=start / max(wall, 1e-3),
        metrics={name: Distribution.of(values) for name, values in tally.values.items() if values},
        started=started,
        finished=finished,
        **_circumstances(store, run),
    ), tally


@contextmanager
def _planned(store: Store) -> Iterator[Iterator[str]]:
    """All planned keys in order. The index is fetched once, as it was planned: no key has ever moved."""
    with (
        storage_errors("make a folder in", tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="smsbatch-report-") as folder,
    ):
        index = Path(folder, "samples.parquet")
        store.fetch(SAMPLES, index)
        yield _keys(index)


def _keys(index: Path) -> Iterator[str]:
    start = 0
    while entries := read_index(index, start, start + ROWS_PER_GROUP):
        yield from (entry.key for entry in entries)
        start += len(entries)


@contextmanager
def _fetched(store: Store, records: Sequence[Published]) -> Iterator[Iterator[bytes]]:
    """The Parquet files of shards, in order, one request each, a few ahead."""
    threads = ThreadPoolExecutor(_AHEAD, thread_name_prefix="smsbatch-report")
    try:
        waiting = (threads.submit(store.read, record.parquet) for record in records)
        yield (future.result() for future in started_ahead(waiting, _AHEAD))
    finally:
        threads.shutdown(cancel_futures=True)


def _drift(store: Store) -> list[str]:
    """What the user allowed to differ from the plan, a notice each."""
    return [
        f"went on, as allowed, though changed since it was planned: {change['text']}"
        for note in allowed_drift(store)
        for change in note["changed"].values()
    ]


def _rows(store: Store, published: Published, data: bytes, planned: Sequence[str], start: int) -> list[dict[str, Any]]:
    """The rows of a shard, proven to be those of the plan, each with its `position` in the index."""
    try:
        rows = read_rows(BytesIO(data))
    except (OSError, ValueError) as error:  # Arrow's, of what is no Parquet
        raise RunError(
            f"{store.locate(published.parquet)} cannot be read; run `smsbatch repair --full {store.url}`"
        ) from error
    if list(planned) != [row["key"] for row in rows]:
        raise RunError(
            f"{store.locate(published.parquet)} has not the rows of its {len(planned)} planned images; "
            f"run `smsbatch repair --full {store.url}`"
        )
    return [row | {"position": position} for position, row in enumerate(rows, start)]


@dataclass(slots=True)
class Tally:
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
            self.values[name].extend(row[name] for row in stylized if has_value(row, name))
        self.sample = heapq.nsmallest(SHOW_ALL, chain(self.sample, stylized), key=self._lot)
        if self.metrics:
            name = self.metrics[0]
            measured = [row for row in stylized if has_value(row, name)]
            self.lowest = heapq.nsmallest(SHOW_END, chain(self.lowest, measured), key=lambda row: row[name])
            self.highest = heapq.nlargest(SHOW_END, chain(self.highest, measured), key=lambda row: row[name])

    def _lot(self, row: Mapping[str, Any]) -> bytes:
        """Drawn by the run's seed: as good as random, and the same whenever the report is written."""
        return hashlib.sha256(f"{self.seed}/{row['key']}".encode()).digest()


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
