"""Small jobs on a model of random weights, and functions that read their output."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from smsbatch.generator.network import Generator

KEYS = [f"photo-{number}" for number in range(6)]


def make_photos(folder: Path, keys: list[str] | None = None, size: tuple[int, int] = (48, 32)) -> Path:
    """Write smooth, different pictures of (width, height) `size` to a folder, every second one with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, key in enumerate(KEYS if keys is None else keys):
        x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
        waves = [np.sin((number + 2) * x * 3 + phase) * np.cos((number + 1) * y * 2) for phase in (0, 1, 2)]
        Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8)).save(folder / f"{key}.png")
        if number % 2 == 0:
            (folder / f"{key}.txt").write_text(f"waves number {number}")
    return folder


def write_manifest(folder: Path, model: Path, lora: Path, photos: Path, **sections: dict[str, Any]) -> Path:
    """Write a manifest: two steps at 32 pixels, units of two, shards of four, PNG; `sections` override its keys."""
    manifest: dict[str, Any] = {
        "task": "optimize",
        "name": "test",
        "source": {"format": "folder", "urls": str(photos)},
        "model": {"path": str(model)},
        "style": {"lora": str(lora), "prompt": "wavy style"},
        "objective": {"steps": 2},
        "image": {"resolution": 32},
        "output": {"path": str(folder / "out"), "samples_per_unit": 2, "samples_per_shard": 4, "format": "png"},
        "compute": {"pool": "local", "batch_size": 2, "threads": 1},
    }
    for name, section in sections.items():
        manifest[name] = manifest.get(name, {}) | section
    file = folder / "manifest.yaml"
    file.write_text(yaml.safe_dump(manifest))
    return file


def make_generator(folder: Path, seed: int = 0) -> Path:
    """Save a small generator with random weights and an invented style."""
    torch.manual_seed(seed)
    about = {"name": "waves", "style": "wavy style", "lora": ["waves.safetensors"], "model": "tiny"}
    Generator(8, 1, about=about).save(folder)
    return folder


def write_stylize(folder: Path, generator: Path | str, photos: Path, **sections: Any) -> Path:
    """Write a manifest like that of `write_manifest`, for `task: stylize`."""
    manifest: dict[str, Any] = {
        "task": "stylize",
        "name": "test",
        "generator": str(generator),
        "source": {"format": "folder", "urls": str(photos)},
        "image": {"resolution": 32},
        "output": {"path": str(folder / "out"), "samples_per_unit": 2, "samples_per_shard": 4, "format": "png"},
        "compute": {"pool": "local", "batch_size": 2, "threads": 1},
    }
    for name, section in sections.items():
        manifest[name] = manifest.get(name, {}) | section if isinstance(section, dict) else section
    file = folder / "manifest.yaml"
    file.write_text(yaml.safe_dump(manifest))
    return file


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """All rows of a run by key; a duplicate key is an error."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((out / "metrics").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert row["key"] not in found
            found[row["key"]] = row
    return found


def tars(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "shards").glob("*.tar"))}


def pictures(out: Path) -> dict[str, NDArray[np.uint8]]:
    found = {}
    for file in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "png":
                    content = tar.extractfile(member)
                    assert content is not None
                    found[key] = np.asarray(Image.open(io.BytesIO(content.read())))
    return found


def commits(out: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((out / "_smsbatch" / "commits").glob("*.json"))}
