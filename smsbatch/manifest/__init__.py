"""The manifest: a validated description of a run.

A manifest is frozen, with all defaults filled in: two equal manifests request the same run. `file.py` reads YAML.
"""

from smsbatch.manifest.base import SECRET, is_named
from smsbatch.manifest.objective import PAPERS, PRESETS, Fake, Objective, Prompts, ScoreObjective
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
from smsbatch.manifest.tasks import (
    TASKS,
    Dataset,
    Distill,
    Manifest,
    Optimize,
    Styled,
    Stylize,
    fill,
    identity_of,
    schema,
)
