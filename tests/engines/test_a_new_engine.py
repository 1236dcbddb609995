"""Tests of a new engine, which takes one file (here this one) and one entry in each table (see `registered`).

In the package its manifest class is in `manifest/tasks.py`, and overrides `absolute` because actors have another
working folder; its module imports torch inside of methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from support.jobs import KEYS, commits, make_photos, pictures, rows, tars
from torch import Tensor
from typer.testing import CliRunner

import smsbatch as sb
from smsbatch.cli.app import app
from smsbatch.data.pixels import decode, fit
from smsbatch.engines.base import Description, Engine, Rendered, Weights
from smsbatch.engines.table import ENGINES
from smsbatch.manifest import TASKS, Dataset


class Invert(Dataset):
    """The task that turns every picture into its negative."""

    task: Literal["invert"]
    palette: str
    """A file that says what white becomes: no model, but a file that results depend on."""


class InvertEngine(Engine[Invert]):
    units_in_flight = 1
    diverged_hint = "it cannot"
    oom_hint = "lower image.resolution"
    steps = 2
    interrupt_at: str | None = None  # the caption of a picture

    def __init__(self, manifest: Invert, device: str) -> None:
        self.device, self.white = torch.device(device), float(Path(manifest.palette).read_text())

    @staticmethod
    def steps_per_image(manifest: Invert) -> int:
        return 2

    @staticmethod
    def check_weights(manifest: Invert) -> Weights:
        if not Path(manifest.palette).is_file():
            raise sb.WeightsError(f"palette: {manifest.palette} is missing")
        return Weights(f"the palette {manifest.palette}", ["the palette has one colour"])

    @staticmethod
    def digests(manifest: Invert) -> dict[str, str]:
        return {"palette": Path(manifest.palette).read_text()}

    @staticmethod
    def describe(settings: Mapping[str, Any], about: Mapping[str, Any] | None) -> Description:
        return Description("negative", "two looks each", "by subtraction", [("palette", settings["palette"])])

    def prompt(self, caption: str) -> str:
        return f"the negative of {caption}"

    def batch_size(self, height: int, width: int) -> int:
        return 2

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        if self.interrupt_at is not None and self.interrupt_at in captions:
            raise KeyboardInterrupt
        progress(1)
        return Rendered(self.white - images, torch.full((len(images),), 2), torch.ones(len(images), dtype=torch.bool))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "invert", Invert)
    monkeypatch.setitem(ENGINES, "invert", InvertEngine)


@pytest.fixture
def job(tmp_path: Path, registered: None) -> Path:
    make_photos(tmp_path / "photos")
    (tmp_path / "palette").write_text("1.0")
    manifest = {
        "task": "invert",
        "name": "negatives",
        "palette": str(tmp_path / "palette"),
        "source": {"format": "folder", "urls": str(tmp_path / "photos")},
        "image": {"resolution": 32},
        "output": {"path": str(tmp_path / "out"), "samples_per_unit": 2, "samples_per_shard": 4, "format": "png"},
        "metrics": [],
        "compute": {"pool": "local", "threads": 1},
    }
    file = tmp_path / "manifest.yaml"
    file.write_text(yaml.safe_dump(manifest))
    return file


def smsbatch(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_it_plans_runs_resumes_verifies_and_reports(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    planned = smsbatch("plan", job)
    assert "2 shards, 3 units, 6 images of 2 steps each" in planned
    assert "note: the palette has one colour" in planned
    assert "the palette" in smsbatch("doctor", job)

    with monkeypatch.context() as patch:
        patch.setattr(InvertEngine, "interrupt_at", "waves number 4")  # in the last unit
        with pytest.raises(KeyboardInterrupt):
            sb.run(sb.load(job))
    assert sorted(commits(out)) == ["000000", "000001"]
    half = sb.status(str(out))
    assert (half.finished, half.units_done, half.samples_done) == (False, 2, 4)
    before = tars(out)
    assert list(before) == ["000000.tar"]

    assert "6 stylized, 0 failed, 6 planned" in smsbatch("run", job)
    assert tars(out).items() > before.items()
    for key, picture in pictures(out).items():
        source = fit(decode((tmp_path / "photos" / f"{key}.png").read_bytes()), 32).astype(np.int16)
        assert np.abs(255 - source - picture).max() <= 1
    assert {row["prompt"] for row in rows(out).values()} >= {"the negative of waves number 0"}
    assert {(row["steps"], row["status"]) for row in rows(out).values()} == {(2, "success")}
    assert sb.verify(str(out), full=True).ok
    assert sb.replay(str(out), KEYS[0], tmp_path).same

    page = (out / "report.html").read_text()
    assert "6 of 6 images stylized as “negative”, two looks each" in page
    card = (out / "README.md").read_text()
    assert "Images stylized by subtraction by smsbatch." in card
    assert f"| palette | {tmp_path / 'palette'} |" in card
    assert json.loads((out / "run.json").read_text())["weights"] == {"palette": "1.0"}


def test_its_weights_are_noticed_when_they_change(job: Path, tmp_path: Path) -> None:
    sb.run(sb.load(job))
    (tmp_path / "palette").write_text("0.5")
    with pytest.raises(sb.DriftError, match="weights: the file palette"):
        sb.run(sb.load(job))
    (tmp_path / "palette").unlink()
    with pytest.raises((sb.WeightsError, FileNotFoundError)):
        sb.plan(sb.load(job))


def test_a_run_of_a_task_that_this_version_lacks_is_refused_by_name(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sb.run(sb.load(job))
    monkeypatch.delitem(TASKS, "invert")
    with pytest.raises(sb.RequestError, match="this version has no task 'invert'; use smsbatch "):
        sb.status(str(tmp_path / "out"))
