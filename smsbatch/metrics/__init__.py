"""Distances between image pairs: what a row says about its result.

Contract: a metric is built once and then called with `source, result [B, 3, H, W]` in [0, 1], on any device; it
converts for itself and returns `[B]`, one float32 per pair that does not depend on the others. It downloads nothing.
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
