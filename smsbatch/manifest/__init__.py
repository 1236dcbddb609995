"""The manifest: what to run.

A manifest is frozen and resolved: two equal manifests ask for the same run. `file.py` reads one from YAML.
"""

from smsbatch.manifest.base import SECRET
from smsbatch.manifest.objective import PRESETS, Fake, Objective, Prompts, ScoreObjective
from smsbatch.manifest.sections import (
    HOUSEKEEPING,
    Compute,
    Crops,
    Destination,
    Errors,
    Image,
    Model,
    Output,
    Source,
    Storage,
    Style,
    Tiles,
    Training,
)
from smsbatch.manifest.tasks import TASKS, Dataset, Distill, Manifest, Optimize, Styled, Stylize, schema

__all__ = [
    "HOUSEKEEPING",
    "PRESETS",
    "SECRET",
    "TASKS",
    "Compute",
    "Crops",
    "Dataset",
    "Destination",
    "Distill",
    "Errors",
    "Fake",
    "Image",
    "Manifest",
    "Model",
    "Objective",
    "Optimize",
    "Output",
    "Prompts",
    "ScoreObjective",
    "Source",
    "Storage",
    "Style",
    "Styled",
    "Stylize",
    "Tiles",
    "Training",
    "schema",
]
