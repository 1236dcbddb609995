"""The engine of each task that makes a dataset. A new engine is a file in this folder and an entry here."""

from __future__ import annotations

from typing import Any

from smsbatch.engines.base import Engine
from smsbatch.engines.feedforward import GeneratorEngine
from smsbatch.engines.optimize import OptimizeEngine

ENGINES: dict[str, type[Engine[Any]]] = {"optimize": OptimizeEngine, "stylize": GeneratorEngine}
