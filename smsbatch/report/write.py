"""Write the report of a finished run: numbers, index, dataset card and `report.html`.

The report is a function of storage alone (`run.json`, plan, commits, published shards), so that reporting twice writes
the same bytes. The rows of a few shards are in memory at a time. A run whose rows do not add up to its plan
(`success + failed == planned`) raises a RunError instead.

index.json keeps the numbers with a digest of them and of everything that determines them. While that digest matches, no
rows are read again; otherwise the numbers are computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from smsbatch.data.index import ROWS_PER_GROUP, SAMPLES, read_index
from smsbatch.data.shards import read_rows
from smsbatch.errors import RunError, StorageError
from smsbatch.parallel import map_ahead
from smsbatch.report.card import card
from smsbatch.report.gallery import gallery
from smsbatch.report.model import Distribution, Failure, Report, RowTally
from smsbatch.report.page import render
from smsbatch.runs.drift import allowed_drift
from smsbatch.runs.layout import INDEX
from smsbatch.runs.records import PARSE_ERRORS, Commit, FileDigest, Published, dump_record, load_record
from smsbatch.runs.run import Run
from smsbatch.storage.scratch import scratch_folder
from smsbatch.storage.store import Store

_AHEAD = 8  # shards whose rows are fetched while others are counted


def summarize(
    run: Run, commits: Mapping[int, Commit] | None = None, published: Mapping[int, Published] | None = None
) -> Report:
    """The numbers of a finished run, from index.json if they are up to date.

    Args:
        commits: the newest commits, if the caller has read them.
        published: the records of published shards, likewise.

    Raises:
        RequestError: the run makes no dataset.
        RunError: a planned sample has no row, or a shard is not published.
    """
    run.require_dataset()
    published = run.ledger.publications() if published is None else published
    drift = list(allowed_drift(run.store).values())
    found = _recall(run, drift, published)
    if found is None:
        with _fetched_index(run) as index:
            found, _ = _count(run, index, drift, commits, published)
    return found


def write_report(
    run: Run, commits: Mapping[int, Commit] | None = None, published: Mapping[int, Published] | None = None
) -> Report:
    """Write README.md, report.html and index.json; returns the numbers. Arguments and errors as in `summarize`."""
    run.require_dataset()
    store, notes = run.store, allowed_drift(run.store)
    drift = list(notes.values())
    published = run.ledger.publications() if published is None else published
    with _fetched_index(run) as planned:
        report, tally = _count(run, planned, drift, commits, published)
        pictures = gallery(run, report, tally, planned if run.index.path == SAMPLES else run.index)
    numbers = {name: value for name, value in report.to_dict().items() if name in _NUMBERS}
    files = {"README.md": card(report).encode(), "report.html": render(report, pictures).encode()}
    index = {
        "name": report.name,
        "planned": report.planned,
        "succeeded": report.succeeded,
        "failed": report.failed,
        "report": {"of": _digest(run, drift, published, numbers), "numbers": numbers},
        "shards": [_shard(record) for record in tally.published],
        "files": {name: asdict(FileDigest.of(data)) for name, data in files.items()},
        "drift": list(notes),
    }
    for name, data in files.items():
        store.put(name, data)
    store.put(INDEX, dump_record(index))  # last: if it is up to date, so are the others
    return report


# ----------------------------------------------------------------------------------------------------------- numbers

_NUMBERS = (
    *("planned", "succeeded", "failed", "failures", "units", "shards", "workers", "seconds", "wall_seconds"),
    *("images_per_second", "captions", "metrics", "started", "finished"),
)


Drift = Sequence[Mapping[str, Any]]


def _recall(run: Run, drift: Drift, published: Mapping[int, Published]) -> Report | None:
    """The report from index.json; None unless it is undamaged and was made from this run and these records."""
    found = run.store.read_all([INDEX])
    try:
        told = load_record(found[INDEX])["report"]
        numbers = told["numbers"]
        if told["of"] != _digest(run, drift, published, numbers):
            return None
        failures = [Failure(**one) for one in numbers["failures"]]
        metrics = {name: Distribution(**one) for name, one in numbers["metrics"].items()}
    except PARSE_ERRORS:
        return None
    return Report(**numbers | {"failures": failures, "metrics": metrics}, **_circumstances(run, drift))


def _digest(run: Run, drift: Drift, published: Mapping[int, Published], numbers: Mapping[str, Any]) -> str:
    """Digest of a report's numbers and of everything that determines them; the records identify commits and rows."""
    records = [asdict(record) for _, record in sorted(published.items())]
    of = json.dumps([run.about, records, drift, numbers], sort_keys=True)
    return hashlib.sha256(of.encode()).hexdigest()


def _circumstances(run: Run, drift: Drift) -> dict[str, Any]:
    """The fields of a report that are not numbers."""
    store, about = run.store, run.about
    changes = [change["text"] for note in drift for change in note["changed"].values()]
    return {
        "name": run.name,
        "settings": about["manifest"],
        "generator": about.get("generator"),
        "weights": about["weights"],
        "versions": about["versions"],
        "left": run.contents.left,
        "passed": run.contents.passed,
        "notices": [
            *about["notices"],
            *(f"changed since the plan, as allowed: {change}" for change in changes),
        ],
        "paths": {
            "shards": store.locate("shards"),
            "rows": store.locate("metrics"),
            "report": store.locate("report.html"),
        },
    }


def _count(
    run: Run, index: Path, drift: Drift, commits: Mapping[int, Commit] | None, published: Mapping[int, Published]
) -> tuple[Report, RowTally]:
    """The numbers of a run, from its rows, whose keys are checked against `index`, the planned one."""
    store, samples = run.store, run.about["planned"]["samples"]
    tally = RowTally(seed=run.about["manifest"]["seed"], metrics=run.about["manifest"]["metrics"])
    planned_in = {shard: sum(map(len, units)) for shard, units in run.shards.items()}
    missing = [shard for shard in planned_in if shard not in published]
    if missing:
        shard = missing[0]
        raise RunError(f"{store.url}: shard {shard:06d} is not published yet; run the manifest again to finish it")
    start, keys = 0, _keys(index)
    records = [published[shard] for shard in planned_in]
    with closing(map_ahead(store.read, [record.parquet for record in records], _AHEAD)) as files:
        for record, data in zip(records, files, strict=True):
            planned = list(islice(keys, planned_in[record.shard]))
            tally.add(record, _rows(store, record, data, planned, start))
            start += len(planned)
    failed = tally.failures.total()
    if tally.succeeded + failed != samples:
        raise RunError(
            f"{store.url}: {samples} images are planned, but {tally.succeeded} + {failed} have a "
            "row; run the manifest again to finish it"
        )
    commits = run.ledger.commits() if commits is None else commits
    started, finished, wall = _span(commits.values())
    return Report(
        planned=start,
        succeeded=tally.succeeded,
        failed=failed,
        failures=[Failure(code, n, *tally.examples[code]) for code, n in tally.failures.most_common()],
        units=len(run.units),
        shards=len(tally.published),
        workers=len({commit.worker for commit in commits.values()}),
        seconds=tally.seconds,
        wall_seconds=wall,
        images_per_second=start / max(wall, 1e-3),
        captions=dict(tally.captions.most_common()),
        metrics={name: Distribution.of(values) for name, values in tally.values.items() if values},
        started=started,
        finished=finished,
        **_circumstances(run, drift),
    ), tally


@contextmanager
def _fetched_index(run: Run) -> Iterator[Path]:
    """A local copy of the planned index; later ones have the same keys."""
    with scratch_folder("report") as folder:
        index = Path(folder, "samples.parquet")
        run.store.fetch(SAMPLES, index)
        yield index


def _keys(index: Path) -> Iterator[str]:
    start = 0
    while entries := read_index(index, start, start + ROWS_PER_GROUP):
        yield from (entry.key for entry in entries)
        start += len(entries)


def _rows(store: Store, published: Published, data: bytes, planned: Sequence[str], start: int) -> list[dict[str, Any]]:
    """The rows of a shard, each with its `position` in the index; raises RunError if they are not the planned ones."""
    try:
        rows = read_rows(BytesIO(data))
    except StorageError as error:
        raise RunError(
            f"{store.locate(published.parquet)} cannot be read; run `smsbatch repair --full {store.url}`"
        ) from error
    if list(planned) != [row["key"] for row in rows]:
        raise RunError(
            f"{store.locate(published.parquet)} does not have the rows of its {len(planned)} planned images; "
            f"run `smsbatch repair --full {store.url}`"
        )
    return [row | {"position": position} for position, row in enumerate(rows, start)]


def _span(commits: Iterable[Commit]) -> tuple[str, str, float]:
    """Start of the first unit, end of the last, and the seconds in which at least one worker was at work."""
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
