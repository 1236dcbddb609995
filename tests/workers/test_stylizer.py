"""A worker's models: those that define the style, and batches that do not fit the device's memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import write_manifest

import smsbatch as sb
from smsbatch.data import pixels
from smsbatch.data.sample import Sample, Unit
from smsbatch.diffusion import optimize as optimizing
from smsbatch.diffusion.optimize import Optimized
from smsbatch.diffusion.priors.load import _check_family
from smsbatch.manifest import Prompts
from smsbatch.workers.worker import Worker, WorkItem

Manifest = Callable[..., sb.Manifest]


@pytest.fixture
def manifest(tmp_path: Path, model: Path, lora: Path) -> Manifest:
    """A function that makes a manifest of batches of up to six, without metrics; its arguments are overrides."""

    def make(*overrides: str) -> sb.Manifest:
        file = write_manifest(tmp_path, model, lora, tmp_path, compute={"batch_size": 6})
        return sb.load(file, ["metrics=[]", *overrides])

    return make


def samples(number: int, height: int = 32, width: int = 48, caption: str = "") -> list[Sample]:
    data = pixels.encode(np.full((height, width, 3), 99, np.uint8), "png")
    return [Sample(f"{width}x{height}-{i}", "u", data, "png", caption, {}) for i in range(number)]


class Memory:
    """Replaces `optimize`: returns z, and runs out of memory for more than `fits` samples or a "hungry" one."""

    def __init__(self, fits: int, error: str = "", at_step: int = 1) -> None:
        self.fits, self.at_step = fits, at_step
        self.error = error
        self.tried: list[int] = []
        self.held: list[weakref.ref[Any]] = []

    def __call__(
        self, prior: Any, style: Any, z: Any, prompts: Sequence[Prompts], seeds: Any, config: Any, progress: Any
    ) -> Optimized:
        assert not [held for held in self.held if held() is not None], "what had failed still takes its room"
        self.tried.append(len(prompts))

        class Graph:
            """An object that the failing frame and the object itself refer to, like a graph of autograd."""

        graph: Any = Graph()
        graph.itself = graph
        self.held.append(weakref.ref(graph))
        for step in range(1, config.steps + 1):
            if step == self.at_step and (len(prompts) > self.fits or any("hungry" in p.target for p in prompts)):
                raise RuntimeError(self.error) if self.error else torch.OutOfMemoryError("CUDA out of memory")
            progress(step)
        self.held.clear()
        return Optimized(z, torch.full((len(z),), config.steps))


def test_a_batch_that_does_not_fit_is_halved_and_later_ones_begin_with_what_fitted(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(fits=3)
    monkeypatch.setattr(optimizing, "optimize", memory)
    worker = sb.Stylizer(manifest())
    work = [*samples(7), *samples(4, height=48, width=32), *samples(4, height=32, width=32)]
    rows = [outcome.row(Unit(0, 0, 0, 1), "", "", ()) for outcome in worker.stylize(work)]
    lying, standing, square = [6, 3, 3, 1], [3, 1], [4, 2, 2]  # landscape and portrait have equally many pixels
    assert memory.tried == lying + standing + square
    assert [row["key"] for row in rows] == [sample.key for sample in work]
    assert [row["batch_size"] for row in rows] == [3, 3, 3, 3, 3, 3, 1, 3, 3, 3, 1, 2, 2, 2, 2]
    assert {row["status"] for row in rows} == {"success"}
    memory.tried.clear()
    worker.stylize(samples(5))
    assert memory.tried == [3, 2], "also in the next unit"


@pytest.mark.parametrize(
    "error",
    [
        "",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_one_that_does_not_fit_alone_is_its_own_failure(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    memory = Memory(fits=6, error=error)
    monkeypatch.setattr(optimizing, "optimize", memory)
    first, hungry, *rest = sb.Stylizer(manifest()).stylize(
        [*samples(1), *samples(1, caption="hungry"), *samples(2, width=40)]
    )
    assert memory.tried == [2, 1, 1, 2]
    assert (first.error_code, first.batch_size) == (None, 1)
    assert (hungry.error_code, hungry.batch_size) == ("oom", None)
    assert "48x32 does not fit the device's memory; lower image.resolution" in str(hungry.error_message)
    assert [(outcome.error_code, outcome.batch_size) for outcome in rest] == [(None, 2)] * 2


def test_another_error_is_no_lack_of_memory(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(fits=1, error="shapes do not match")
    monkeypatch.setattr(optimizing, "optimize", memory)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sb.Stylizer(manifest()).stylize(samples(4))
    assert memory.tried == [4]


def test_the_display_does_not_run_backwards(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, seen = Worker(manifest("objective.steps=8"), "w"), []

    class Watched(Memory):
        def __call__(self, *args: Any) -> Optimized:
            *rest, progress = args

            def watched(step: int) -> None:
                progress(step)
                seen.append(worker.progress())

            return super().__call__(*rest, watched)

    monkeypatch.setattr(optimizing, "optimize", Watched(fits=2, at_step=7))
    worker.setup()
    worker._stylize(WorkItem(Unit(0, 0, 0, 5)), samples(5))
    images_done = [progress.images_done for progress in seen]
    assert images_done == sorted(images_done)
    assert images_done[5] == 5 * 6 / 8, "where the first try failed"
    assert images_done[-1] == 5
    times = [progress.seen for progress in seen]
    assert times == sorted(set(times)), "but it is alive at every step"


def test_a_driver_of_another_version_is_refused_before_any_model_is_loaded(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smsbatch.workers.stylizer.Stylizer", None)
    with pytest.raises(sb.RequestError, match=r"has smsbatch .*, the driver has 0\.0\.9; install the same version"):
        Worker(manifest(), "w").setup("0.0.9")


def test_pictures_of_many_shapes_share_a_bucket_and_so_a_batch(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(fits=6)
    monkeypatch.setattr(optimizing, "optimize", memory)
    shapes = [(40, 60), (33, 50), (34, 54), (60, 40)]
    work = [sample for height, width in shapes for sample in samples(1, height, width)]
    outcomes = sb.Stylizer(manifest("image.fit=bucket", "image.resolution=64")).stylize(work)
    assert memory.tried == [3, 1]
    assert [(outcome.height, outcome.width) for outcome in outcomes] == [(48, 80)] * 3 + [(80, 48)]


def test_without_a_lora_the_style_is_the_bare_model(manifest: Manifest) -> None:
    bare = sb.Stylizer(manifest("style.lora=[]")).engine
    assert bare.style is bare.prior


def test_the_style_may_be_of_another_checkpoint(manifest: Manifest, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(model)
    both = sb.Stylizer(manifest(f"style.model={other}", "style.lora=[]")).engine
    assert both.style is not both.prior
    scheduler = shutil.copytree(model, tmp_path / "noisier") / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.02}))
    with pytest.raises(
        sb.WeightsError, match=r"style\.model: .*noisier does not go with .* \(another noise schedule\); "
    ):
        sb.Stylizer(manifest(f"style.model={tmp_path / 'noisier'}", "style.lora=[]"))
    both.style.factor, both.style.channels = 8, 16
    with pytest.raises(
        sb.WeightsError, match="latent channels: 16 instead of 4, pixels per latent entry: 8 instead of"
    ):
        _check_family(both.prior, both.style, "a", "b")
