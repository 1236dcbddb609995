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
    from smsbatch.execution.drive import Status, run, status
    from smsbatch.execution.plan import Plan, plan
    from smsbatch.execution.report import Report
    from smsbatch.execution.stylizer import Stylizer
    from smsbatch.manifest import Manifest
    from smsbatch.manifest_file import load

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
    "smsbatch.manifest_file": ("load",),
    "smsbatch.execution.drive": ("Status", "run", "status"),
    "smsbatch.execution.plan": ("Plan", "plan"),
    "smsbatch.execution.report": ("Report",),
    "smsbatch.execution.stylizer": ("Stylizer",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DriftError",
    "Manifest",
    "ManifestError",
    "Plan",
    "Report",
    "RequestError",
    "RunError",
    "SampleError",
    "SmsbatchError",
    "SourceError",
    "Status",
    "StorageError",
    "Stylizer",
    "WeightsError",
    "load",
    "plan",
    "run",
    "status",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smsbatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
