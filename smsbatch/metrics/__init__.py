"""Distances between a source and its result, which a row records.

Contract: a metric is built once and then called with `source, result [B, 3, H, W]` in [0, 1], on any device; it
converts its inputs and returns `[B]`, one float32 per pair, independent of the other pairs. It downloads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from smsbatch.metrics.lpips import Lpips

__all__ = ["METRICS", "Lpips", "Metric"]


class Metric(Protocol):
    def __call__(self, source: Tensor, result: Tensor) -> Tensor: ...


METRICS: dict[str, Callable[[], Metric]] = {"lpips": Lpips}
