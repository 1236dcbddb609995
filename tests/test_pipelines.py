"""The programs of `pipelines/` run, on the model of random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from execution.jobs import make_photos, write_manifest
from PIL import Image

ROOT = Path(__file__).parent.parent


def test_pipelines_are_short() -> None:
    for file in (ROOT / "pipelines").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file.name


def test_style_sheet(tmp_path: Path, model: Path, lora: Path) -> None:
    photos = make_photos(tmp_path / "photos", ["a", "b"])
    manifest = write_manifest(tmp_path, model, lora, photos)
    arguments = [manifest, "sheet.png", photos / "a.png", photos / "b.png", f"--style={lora}=wavy", f"--style={lora}=x"]
    subprocess.run([sys.executable, ROOT / "pipelines" / "style_sheet.py", *arguments], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 48 + 6, 3 * 32 + 2 * 6)
