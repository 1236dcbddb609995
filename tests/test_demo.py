"""The demo, on the embedded model: in short, and in full, which takes minutes (`make test-slow`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from execution.jobs import rows, tars

ROOT = Path(__file__).parent.parent
RUN = [sys.executable, "-m", "smsbatch", "run", "manifests/demo.yaml"]


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
