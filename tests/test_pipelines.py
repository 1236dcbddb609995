"""Tests of the programs in `pipelines/` on the model of random weights."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.jobs import make_photos, pictures, write_manifest

import smsbatch as sb
from smsbatch.metrics import hub

PIPELINES = Path(__file__).parent.parent / "pipelines"
WIDTH, HEIGHT = 48, 32


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A function that runs a program of `pipelines/` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PIPELINES)
    monkeypatch.setenv("SMSBATCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(PIPELINES / f"{name}.py"), run_name="__main__")

    return run


def table(printed: str) -> dict[str, list[float]]:
    """The numbers in each row of a Markdown table, by the row's first cell."""
    _, _, *lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: [float(number) for number in numbers] for name, *numbers in cells}


def objectives(out: Path) -> dict[str, dict]:
    """The manifest of every variant's run, by the name of the run's folder."""
    return {file.parent.name: json.loads(file.read_text())["manifest"] for file in sorted(out.glob("*/run.json"))}


def test_pipelines_are_short() -> None:
    for file in PIPELINES.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file.name


def test_style_sheet(program: Callable[..., None], tmp_path: Path, model: Path, lora: Path) -> None:
    photos = make_photos(tmp_path / "photos", ["a", "b"])
    manifest = write_manifest(tmp_path, model, lora, photos)
    files = [photos / "a.png", photos / "b.png"]
    program("style_sheet", manifest, "sheet.png", *files, f"--style={lora}=wavy", f"--style={lora}=x")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * WIDTH + 6, 3 * HEIGHT + 2 * 6)


@pytest.mark.slow
def test_ablation(
    program: Callable[..., None], tmp_path: Path, model: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_photos(tmp_path / "photos", ["a", "b"])
    manifest = write_manifest(tmp_path, model, lora, photos, compute={"batch_size": 1})
    arguments = ("out", "--manifest", manifest, "--reference", photos, "--set", "objective.steps=3")
    program("ablation", *arguments)
    printed = capsys.readouterr().out
    found = table(printed)
    names = ["source", "w/o L_f, R", "w/o R", "w/o L_f", "full", "random t", "naive t"]
    assert list(found) == names
    assert printed.startswith("| | LPIPS | style distance | s / image |\n")
    assert "CFSD: vgg19-dcbb9e9d.pth is not on this machine" in printed
    assert np.abs(found["source"]).max() < 1e-3, "its own pictures are the reference"
    assert len({tuple(numbers[:2]) for numbers in found.values()}) == 7

    runs = {folder: run["objective"] for folder, run in objectives(tmp_path / "out").items()}
    changed = {
        folder: {name: value for name, value in run.items() if value != runs["full"][name]}
        for folder, run in runs.items()
    }
    assert changed == {
        "full": {},
        "w-o-L-f--R": {"relevance": "off", "identity_weight": 0.0},
        "w-o-R": {"relevance": "off"},
        "w-o-L-f": {"identity_weight": 0.0},
        "random-t": {"timesteps": "uniform"},
        "naive-t": {"timesteps": "linear"},
    }
    with Image.open(tmp_path / "out" / "grid.png") as opened:
        grid = np.asarray(opened)
    assert grid.shape == (20 + 2 * (HEIGHT + 4), 7 * (WIDTH + 4), 3)
    for column, name in enumerate(names[1:], 1):
        folder = "".join(letter if letter.isalnum() else "-" for letter in name)
        shown = grid[20 + HEIGHT + 4 :][:HEIGHT, column * (WIDTH + 4) :][:, :WIDTH]
        assert np.array_equal(shown, pictures(tmp_path / "out" / folder)["b"])

    program("ablation", *arguments)
    assert capsys.readouterr().out == printed, "what is done is not done again"


def test_compare(
    program: Callable[..., None], tmp_path: Path, model: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_photos(tmp_path / "photos", ["a"])
    manifest = write_manifest(tmp_path, model, lora, photos, objective={"steps": 9, "learning_rate": 0.05})
    program("compare", "out", "--manifest", manifest, "--set", "objective.steps=2")
    found = table(capsys.readouterr().out)
    baselines = ["SDS", "DDS", "PDS", "CDS", "VSD"]
    assert list(found) == ["source", *(name + lora for name in baselines for lora in ("", " + LoRA")), "SMS"]
    assert found["source"][0] == 0
    assert min(lpips for lpips, *_ in list(found.values())[1:]) > 0
    runs = objectives(tmp_path / "out")
    assert [bool(runs[name]["style"]["lora"]) for name in ("SDS", "SDS---LoRA", "SMS")] == [False, True, True]
    of_source = {name: (run["objective"]["guidance"], run["objective"]["learning_rate"]) for name, run in runs.items()}
    assert of_source["SDS"] == of_source["PDS---LoRA"] == (100, 0.05)
    assert of_source["DDS"] == of_source["CDS"] == (7.5, pytest.approx(0.0488, abs=1e-4))
    assert (of_source["VSD"], of_source["SMS"]) == ((7.5, 0.05), (4.5, 0.05))


def test_synthetic_dataset(
    program: Callable[..., None], tmp_path: Path, model: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_photos(tmp_path / "photos", ["a", "b", "c"])
    shared = {"name": "waves", "source": {"format": "folder", "urls": str(photos)}, "output": {"path": "elsewhere"}}
    training = shared | {
        "task": "distill",
        "model": str(model),
        "style": {"lora": str(lora), "prompt": "wavy style"},
        "distill": {"width": 4, "blocks": 1, "warmup_steps": 1, "steps": 2, "images_per_step": 2, "repeats": 1},
    }
    dataset = shared | {"task": "stylize", "generator": "elsewhere", "output": {"path": "elsewhere", "format": "png"}}
    for name, manifest in (("training", training), ("dataset", dataset)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(manifest | {"image": {"resolution": 32}}))
    arguments = ("training.yaml", "dataset.yaml", "out", "--reference", photos, "--set", "compute.pool=local")
    program("synthetic_dataset", *arguments)
    out = tmp_path / "out"
    card = (out / "dataset" / "README.md").read_text()
    printed, _, reasons = capsys.readouterr().out.partition(card)
    assert "CFSD: vgg19-dcbb9e9d.pth is not on this machine" in reasons
    assert "this machine" not in printed + card
    made = pictures(out / "dataset")
    assert list(made) == ["a", "b", "c"]
    figures = sb.measure(str(out / "dataset"), photos)
    own, _, evaluation = card.partition("\n## Evaluation\n")
    assert own.startswith("---\nlicense: other")
    assert "## Load it" in own
    assert f"| LPIPS | 0.000 | {figures.values['LPIPS']:.3f} |" in evaluation
    assert f"| {figures.values['style distance']:.3f} |\n" in evaluation
    assert "| 3 steps on 6 crops of 3 pictures |" in evaluation.replace("training | ", "| ")
    told = json.loads((out / "generator" / "generator" / "generator.json").read_text())
    assert f"| parameters | {told['parameters']:,} |" in evaluation
    for name, loss in told["about"]["training"]["losses"].items():
        assert f"{name} {loss:.4g}" in evaluation
    assert f"`{told['about']['manifest_sha256']}`" in evaluation
    assert sb.verify(str(out / "dataset")).ok

    program("synthetic_dataset", *arguments)
    assert (out / "dataset" / "README.md").read_text() == card, "what is done is not done, and not said, again"


def test_a_run_is_measured_with_what_the_hub_has(
    tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stubs replace the networks of `hub`; this tests pairs, ArtFID from LPIPS and FID, and PickScore as a ratio."""
    photos, style = make_photos(tmp_path / "photos", ["a", "b", "c"]), make_photos(tmp_path / "style", ["x", "y"])
    (photos / "c.png").write_bytes(b"no picture")
    run = sb.load(write_manifest(tmp_path, model, lora, photos, errors={"max_failed_fraction": 0.5}))
    report = sb.run(run)
    monkeypatch.setattr(hub, "missing", lambda _name: None)
    monkeypatch.setattr(hub, "Cfsd", lambda: lambda source, result: (source - result).abs().mean((1, 2, 3)))
    monkeypatch.setattr(hub, "ArtInception", lambda: lambda image: image.mean((2, 3)))
    monkeypatch.setattr(hub, "PickScore", lambda: lambda shown, _prompts: torch.tensor([p.mean() / 99 for p in shown]))
    monkeypatch.setattr(hub, "HpsV2", lambda: lambda shown, _prompts: torch.tensor([float(x.max()) for x in shown]))

    found = sb.measure(run, style)
    made = pictures(tmp_path / "out")
    assert list(found.pictures) == list(made) == ["a", "b"]
    assert all(np.array_equal(found.pictures[key], made[key]) for key in made)
    before = [np.asarray(Image.open(photos / f"{key}.png")) / 255 for key in made]
    after = [made[key] / 255 for key in made]
    lpips = report.metrics["lpips"].mean
    references = [np.asarray(Image.open(style / f"{key}.png")) / 255 for key in "xy"]
    colours = [torch.tensor(np.array([p.mean((0, 1)) for p in set_])) for set_ in (after, references)]
    fid = hub.fid(*colours)
    ratios = [np.exp((b.mean() - a.mean()) * 255 / 99) for a, b in zip(before, after, strict=True)]
    assert dict(found.values) == pytest.approx(
        {
            "LPIPS": lpips,
            "style distance": sb.style_distance(list(made.values()), style),
            "CFSD": np.mean([np.abs(a - b).mean() for a, b in zip(before, after, strict=True)]),
            "FID": fid,
            "ArtFID": (1 + lpips) * (1 + fid),
            "PickScore": np.mean(ratios),
            "HPSv2": np.mean([p.max() for p in after]),
        },
        rel=1e-4,
    )
    real = sb.measure(str(tmp_path / "out"), style, of_sources=True)
    assert (real.values["LPIPS"], real.values["CFSD"], real.values["PickScore"], real.seconds) == (0, 0, 1, 0)
    assert found.seconds > 0
