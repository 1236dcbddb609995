"""Loading a pipeline folder, and calling it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from smsbatch.diffusion.prior import Prior
from smsbatch.diffusion.weights import locate
from smsbatch.errors import WeightsError


def test_it_is_what_diffusers_makes_of_the_folder(model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    prior = Prior.load(str(model))
    tokens = pipeline.tokenizer(["a fox"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = prior.embed(["a fox"])
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([77])
    with torch.no_grad():
        torch.testing.assert_close(text, pipeline.text_encoder(tokens)[0])
        torch.testing.assert_close(prior.noise(z, t, text), pipeline.unet(z, t, text).sample)
    torch.testing.assert_close(prior.schedule.abar, pipeline.scheduler.alphas_cumprod)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(prior.encode(images), expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 35), (31, 64)])
def test_any_size_comes_back_as_it_went(model: Path, size: tuple[int, int]) -> None:
    prior = Prior.load(str(model))
    z = prior.encode(torch.rand(2, 3, *size))
    assert z.shape == (2, 4, -(-size[0] // 4), -(-size[1] // 4))
    with torch.no_grad():
        assert prior.noise(z, torch.tensor([20, 20]), prior.embed(["a", "b"])).shape == z.shape
    decoded = prior.decode(z, size)
    assert decoded.shape == (2, 3, *size)
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_what_cannot_be_loaded_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.path: /nowhere is neither a folder"):
        locate("/nowhere")
    with pytest.raises(WeightsError, match="the hub did not give it"):  # offline in tests
        locate("nobody/nothing")
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="has no unet/diffusion_pytorch_model"):
        Prior.load(str(folder))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="cannot load"):
        Prior.load(str(folder))


def test_another_prediction_type_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    shutil.copytree(model, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(WeightsError, match="v_prediction"):
        Prior.load(str(folder))
