"""The manifest: what to run.

A manifest is frozen and resolved: two equal manifests ask for the same run. `file.py` reads one from YAML.
"""

from smsbatch.manifest.models import Compute, Errors, Image, Manifest, Model, Output, Source, Storage, Style
from smsbatch.manifest.objective import PRESETS, Fake, Objective, Prompts
from smsbatch.manifest.section import SECRET

__all__ = [
    "PRESETS",
    "SECRET",
    "Compute",
    "Errors",
    "Fake",
    "Image",
    "Manifest",
    "Model",
    "Objective",
    "Output",
    "Prompts",
    "Source",
    "Storage",
    "Style",
]
