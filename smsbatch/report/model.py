"""The data of a report: its numbers, and the tally of rows from which they are computed."""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from smsbatch.data.captions import Contents
from smsbatch.engines.base import Description
from smsbatch.engines.table import ENGINES
from smsbatch.runs.records import Published

SHOW_ALL = 16  # up to so many results are all shown; of more, a sample and the two ends of the first metric
SHOW_SAMPLE = 9
SHOW_END = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """One error code: its number of samples, and the first of them."""

    code: str
    count: int
    key: str
    message: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """One metric over the stylized samples; `counts[i]` of them lie in [edges[i], edges[i + 1])."""

    count: int
    mean: float
    low: float
    high: float
    quantiles: Mapping[str, float]  # p05, p25, p50, p75, p95
    edges: Sequence[float]
    counts: Sequence[int]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Makes about ten to twenty-five bins of a round width: 1, 2 or 5 times a power of ten."""
        given = np.asarray(values, dtype=np.float64)
        low, high = float(given.min()), float(given.max())
        raw = max(
            (high - low) / 10, 0.01 * max(abs(low), abs(high), 1e-9)
        )  # equal values need a bin of positive width, too
        power = 10.0 ** math.floor(math.log10(raw))
        width = power * max(factor for factor in (1, 2, 5) if factor * power <= raw * (1 + 1e-9))
        first, last = math.floor(low / width), math.floor(high / width) + 1
        # By index, because the edges are rounded and a comparison could put a value outside of all bins.
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
    """The numbers of a finished run. Times are ISO 8601, UTC."""

    name: str
    planned: int
    succeeded: int
    failed: int
    failures: Sequence[Failure]  # the most frequent first
    units: int
    shards: int
    workers: int
    seconds: float  # computing time, sum over all workers, without reading, writing and loading models
    wall_seconds: float  # time in which at least one worker was at work, without interruptions
    images_per_second: float  # per wall second
    captions: Mapping[str, int]  # samples by the rule that found their caption
    metrics: Mapping[str, Distribution]
    started: str
    finished: str
    settings: Mapping[str, Any]  # the resolved manifest
    generator: Mapping[str, Any] | None  # facts about the generator of task stylize
    weights: Mapping[str, str]  # file: SHA-256
    versions: Mapping[str, str]
    left: Mapping[str, int]  # files of the source that are not used, by extension
    passed: Mapping[str, int]  # fields of its tars that are passed through, by extension
    notices: Sequence[str]
    paths: Mapping[str, str]  # locations of the shards, the rows and the report

    @property
    def contents(self) -> Contents:
        """Captions as they were found, and what else the source held."""
        return Contents(self.planned, self.captions, self.left, self.passed)

    @property
    def description(self) -> Description:
        return ENGINES[self.settings.get("task", "optimize")].describe(self.settings, self.generator)

    @property
    def rate(self) -> str:
        """`4.67 a second`; per minute or hour if that is less than one."""
        for unit, size in (("a second", 1), ("a minute", 60)):
            if self.images_per_second * size >= 1:
                return f"{self.images_per_second * size:.3g} {unit}"
        return f"{self.images_per_second * 3600:.3g} an hour"

    @property
    def errors(self) -> dict[str, int]:
        """Failed samples by error code."""
        return {failure.code: failure.count for failure in self.failures}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class RowTally:
    """The summary of the rows of all shards: counts, values, and the few rows that may be shown."""

    seed: int
    metrics: Sequence[str]
    succeeded: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
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
            if row.get("caption_from"):
                self.captions[row["caption_from"]] += 1
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
        """Sort key of a draw that depends only on the run's seed, so that every report shows the same samples."""
        return hashlib.sha256(f"{self.seed}/{row['key']}".encode()).digest()


def has_value(row: Mapping[str, Any], name: str) -> bool:
    return row[name] is not None and math.isfinite(row[name])
