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
    from smsbatch.execution.audit import Collected, Repaired, gc, repair
    from smsbatch.execution.distilled import Distilled
    from smsbatch.execution.doctor import Check, doctor
    from smsbatch.execution.drive import run
    from smsbatch.execution.export import Exported, export
    from smsbatch.execution.failures import failures
    from smsbatch.execution.measure import Measured, measure, style_distance
    from smsbatch.execution.plan import plan
    from smsbatch.execution.planned import Plan, TrainingPlan
    from smsbatch.execution.replay import Replayed, replay
    from smsbatch.execution.report import Report
    from smsbatch.execution.standing import Problem
    from smsbatch.execution.status import Status, status
    from smsbatch.execution.stylizer import Stylizer
    from smsbatch.execution.training_log import TrainingProgress
    from smsbatch.execution.training_status import TrainingStatus
    from smsbatch.execution.verification import Verification, verify
    from smsbatch.manifest import Manifest
    from smsbatch.manifest.file import load

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
    "smsbatch.execution.audit": ("Collected", "Repaired", "gc", "repair"),
    "smsbatch.execution.distilled": ("Distilled",),
    "smsbatch.execution.doctor": ("Check", "doctor"),
    "smsbatch.execution.drive": ("run",),
    "smsbatch.execution.export": ("Exported", "export"),
    "smsbatch.execution.failures": ("failures",),
    "smsbatch.execution.plan": ("plan",),
    "smsbatch.execution.planned": ("Plan", "TrainingPlan"),
    "smsbatch.execution.replay": ("Replayed", "replay"),
    "smsbatch.execution.report": ("Report",),
    "smsbatch.execution.standing": ("Problem",),
    "smsbatch.execution.status": ("Status", "status"),
    "smsbatch.execution.measure": ("Measured", "measure", "style_distance"),
    "smsbatch.execution.stylizer": ("Stylizer",),
    "smsbatch.execution.training_log": ("TrainingProgress",),
    "smsbatch.execution.training_status": ("TrainingStatus",),
    "smsbatch.execution.verification": ("Verification", "verify"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Check",
    "Collected",
    "Distilled",
    "DriftError",
    "Exported",
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
