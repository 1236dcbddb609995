"""What many tests share: a model of random weights and a style for it, and one torch thread everywhere."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; its threads cost these small models more than they give
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once

import pytest
import torch
from models import save_lora, save_model

pytest_plugins = ["s3server"]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", model)
