"""Tests of the demo on the embedded model: a short run, and full runs, which take minutes (`make test-slow`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.jobs import rows, tars

import smsbatch as sb

ROOT = Path(__file__).parent.parent
RUN = [sys.executable, "-m", "smsbatch", "run", "manifests/demo.yaml"]


def test_two_steps_of_it(tmp_path: Path) -> None:
    """The run is a new process that starts its own Ray, as in `make demo`."""
    short = ["--limit", "2", "--set", "objective.steps=2", "--set", "compute.workers=1"]
    subprocess.run([*RUN, *short, "--set", f"output.path={tmp_path / 'out'}"], cwd=ROOT, check=True)
    assert [row["status"] for row in rows(tmp_path / "out").values()] == ["success"] * 2
    assert len(tars(tmp_path / "out")) == 1


@pytest.mark.slow
def test_two_steps_of_it_in_both_pools(tmp_path: Path) -> None:
    for pool in ("ray", "local"):
        short = ["--limit", "3", "--set", "objective.steps=2", "--set", f"compute.pool={pool}"]
        subprocess.run([*RUN, *short, "--set", f"output.path={tmp_path / pool}"], cwd=ROOT, check=True)
    assert tars(tmp_path / "ray") == tars(tmp_path / "local")


@pytest.mark.slow
def test_both_pools_give_the_same_bytes(tmp_path: Path) -> None:
    for pool in ("ray", "local"):
        subprocess.run(
            [*RUN, "--set", f"compute.pool={pool}", "--set", f"output.path={tmp_path / pool}"], cwd=ROOT, check=True
        )
    assert tars(tmp_path / "ray") == tars(tmp_path / "local")
    found = rows(tmp_path / "ray")
    assert len(found) >= 8
    assert all(row["status"] == "success" and 0.05 < row["lpips"] <= 0.4 for row in found.values())


def distilled(folder: Path, pool: str, *short: str) -> Path:
    """Run both manifests of `make demo-distill`, the second with the first's generator; return the second's output."""
    outputs = {"demo-distill": folder / f"{pool}-generator", "demo-stylize": folder / f"{pool}-pictures"}
    for name, output in outputs.items():
        arguments = ["--set", f"compute.pool={pool}", "--set", f"output.path={output}"]
        arguments += short if name == "demo-distill" else ["--set", f"generator={outputs['demo-distill']}"]
        run = [sys.executable, "-m", "smsbatch", "run", f"manifests/{name}.yaml"]
        subprocess.run([*run, *arguments], cwd=ROOT, check=True)
    return outputs["demo-stylize"]


@pytest.mark.slow
def test_two_steps_of_a_training_on_ray_and_what_it_made(tmp_path: Path) -> None:
    short = ("--set", "distill.warmup_steps=1", "--set", "distill.steps=1", "--set", "image.resolution=32")
    assert len(rows(distilled(tmp_path, "ray", *short))) == 5


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["ray", "local"])
def test_a_generator_carries_the_style_and_keeps_the_content(tmp_path: Path, pool: str) -> None:
    pictures = distilled(tmp_path, pool)
    reference = "tiny:styles/oil.reference.safetensors"
    made, sources = (sb.measure(str(pictures), reference, of_sources=of).values for of in (False, True))
    assert made["style distance"] < 0.92 * sources["style distance"]
    assert 0.1 < made["LPIPS"] < 0.42
