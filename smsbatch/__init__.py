"""smsbatch: stylize image datasets with Style Matching Score. This is the whole public API.

    import smsbatch as sb

    manifest = sb.load("manifests/demo.yaml")
    print(sb.plan(manifest))
    report = sb.run(manifest)

Everything is imported when it is first used, so that `import smsbatch` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smsbatch.commands.doctor import Check, doctor
    from smsbatch.commands.export import Exported, export
    from smsbatch.commands.failures import failures
    from smsbatch.commands.gc import Collected, gc
    from smsbatch.commands.measure import Measured, measure, style_distance
    from smsbatch.commands.plan import plan
    from smsbatch.commands.repair import Repaired, repair
    from smsbatch.commands.replay import Replayed, replay
    from smsbatch.commands.run import run
    from smsbatch.commands.status import TrainingStatus, status
    from smsbatch.commands.verify import Verification, verify
    from smsbatch.errors import (
        DriftError,
        ManifestError,
        RequestError,
        RunError,
        SampleError,
        SmsbatchError,
        SourceError,
        StorageError,
        WeightsError,
    )
    from smsbatch.generator.network import Generator
    from smsbatch.manifest import Manifest
    from smsbatch.manifest.file import load
    from smsbatch.report.model import Report
    from smsbatch.runs.plan import Plan, TrainingPlan
    from smsbatch.runs.snapshot import Problem
    from smsbatch.runs.status import Status
    from smsbatch.training.log import TrainingProgress
    from smsbatch.training.result import Distilled
    from smsbatch.workers.stylizer import Stylizer

_HOMES = {
    "smsbatch.errors": (
        "DriftError",
        "ManifestError",
        "RequestError",
        "RunError",
        "SampleError",
        "SmsbatchError",
        "SourceError",
        "StorageError",
        "WeightsError",
    ),
    "smsbatch.manifest": ("Manifest",),
    "smsbatch.manifest.file": ("load",),
    "smsbatch.commands.doctor": ("Check", "doctor"),
    "smsbatch.commands.export": ("Exported", "export"),
    "smsbatch.commands.failures": ("failures",),
    "smsbatch.commands.gc": ("Collected", "gc"),
    "smsbatch.commands.measure": ("Measured", "measure", "style_distance"),
    "smsbatch.commands.plan": ("plan",),
    "smsbatch.commands.repair": ("Repaired", "repair"),
    "smsbatch.commands.replay": ("Replayed", "replay"),
    "smsbatch.commands.run": ("run",),
    "smsbatch.commands.status": ("TrainingStatus", "status"),
    "smsbatch.commands.verify": ("Verification", "verify"),
    "smsbatch.generator.network": ("Generator",),
    "smsbatch.report.model": ("Report",),
    "smsbatch.runs.plan": ("Plan", "TrainingPlan"),
    "smsbatch.runs.snapshot": ("Problem",),
    "smsbatch.runs.status": ("Status",),
    "smsbatch.training.log": ("TrainingProgress",),
    "smsbatch.training.result": ("Distilled",),
    "smsbatch.workers.stylizer": ("Stylizer",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Check",
    "Collected",
    "Distilled",
    "DriftError",
    "Exported",
    "Generator",
    "Manifest",
    "ManifestError",
    "Measured",
    "Plan",
    "Problem",
    "Repaired",
    "Replayed",
    "Report",
    "RequestError",
    "RunError",
    "SampleError",
    "SmsbatchError",
    "SourceError",
    "Status",
    "StorageError",
    "Stylizer",
    "TrainingPlan",
    "TrainingProgress",
    "TrainingStatus",
    "Verification",
    "WeightsError",
    "doctor",
    "export",
    "failures",
    "gc",
    "load",
    "measure",
    "plan",
    "repair",
    "replay",
    "run",
    "status",
    "style_distance",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smsbatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
