"""Fixtures shared by many tests: models of random weights and a style LoRA; torch uses one thread everywhere."""

from __future__ import annotations

import support.environment  # noqa: F401

# isort: split
import shutil
from pathlib import Path

import pytest
import torch
from support.models import save_lora, save_model

pytest_plugins = ["support.goldens", "support.s3server"]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", model)


@pytest.fixture(scope="session")
def v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2.x model of random weights that predicts v."""
    return save_model(tmp_path_factory.mktemp("v_model"), second=True)


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder that the test may damage."""
    return Path(shutil.copytree(model, tmp_path / "copied"))
