"""The engine of each task."""

from __future__ import annotations

from smsbatch.engines.base import Engine
from smsbatch.engines.feedforward import GeneratorEngine
from smsbatch.engines.optimize import OptimizeEngine
from smsbatch.manifest import Dataset, Optimize, Stylize


def engine_of(manifest: Dataset, device: str) -> Engine:
    """The engine of a manifest's task.

    Raises:
        WeightsError: a model, LoRA or generator is missing or not understood, or two models do not go together.
    """
    if isinstance(manifest, Stylize):
        return GeneratorEngine(manifest, device)
    assert isinstance(manifest, Optimize), "a task that makes rows"
    return OptimizeEngine(manifest, device)
