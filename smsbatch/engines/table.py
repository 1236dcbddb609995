"""The engine of each task that makes a dataset.

A new method is a subclass of `Engine` in a file of this folder and an entry here; its task, with its keys in the
manifest, is a class and an entry in `manifest/tasks.py`. Its mathematics belongs in `diffusion/`.
"""

from __future__ import annotations

from typing import Any

from smsbatch.engines.base import Engine
from smsbatch.engines.feedforward import GeneratorEngine
from smsbatch.engines.optimize import OptimizeEngine

ENGINES: dict[str, type[Engine[Any]]] = {"optimize": OptimizeEngine, "stylize": GeneratorEngine}
