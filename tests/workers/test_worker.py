"""The calls that a pool makes to a worker."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from support.jobs import make_photos, write_manifest

import smsbatch as sb
from smsbatch.workers.worker import Worker


def test_a_driver_of_another_version_is_refused_before_the_models_load(tmp_path: Path, model: Path, lora: Path) -> None:
    photos = make_photos(tmp_path / "photos", ["photo"])
    worker = Worker(sb.load(write_manifest(tmp_path, model, lora, photos)), "w")
    with pytest.raises(sb.RequestError) as refused:
        worker.setup("0.0.1")
    assert str(refused.value) == (
        f"worker {worker.name} has smsbatch {version('smsbatch')}, the driver has 0.0.1; "
        "install the same version on every node"
    )
    assert worker._stylizer is None
    worker.setup(version("smsbatch"))
    assert worker._stylizer is not None
