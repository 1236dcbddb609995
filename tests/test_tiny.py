"""Tests of the embedded model: its files, and the properties that its card states."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from smsbatch import tiny
from smsbatch.data import pixels
from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Model, Objective, Style
from smsbatch.metrics import Lpips

HERE = Path(tiny.__file__).parent
ROOT = Path(__file__).parent.parent
STYLES = sorted(file.stem for file in (HERE / "styles").glob("*.safetensors") if "." not in file.stem)
PHOTOS = sorted((HERE / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior.load(Model(path="tiny"))


def photo(file: Path, side: int = 128) -> torch.Tensor:
    picture = pixels.fit(pixels.decode(file.read_bytes()), side)
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def test_names_resolve_and_paths_are_left_alone() -> None:
    assert Path(tiny.resolve("tiny"), "model_index.json").is_file()
    assert Path(tiny.resolve("tiny:photos")).is_dir()
    for path in ("/a/b", "s3://bucket/tiny", "tiny/model", "x:tiny"):
        assert tiny.resolve(path) == path


def test_it_fits_in_32_megabytes() -> None:
    assert sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file()) <= 32e6


def test_it_is_a_stable_diffusion_pipeline_folder() -> None:
    index = json.loads((HERE / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {name: index[name][1] for name in ("unet", "vae", "text_encoder", "tokenizer")} == {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    weights = sorted((HERE / "model").rglob("*.safetensors"))
    assert len(weights) == 3
    for file in weights:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert not [file for file in HERE.rglob("*") if file.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_every_word_tokenizes(prior: Prior) -> None:
    """Words that occur in no caption are split into letters, so two unknown words have different embeddings."""
    first, second, empty = prior.embed(["a zyxwv on a lake", "a qjkvx on a lake", ""])
    assert not torch.equal(first, second)
    assert empty.isfinite().all()


def test_held_out_photographs_are_captioned_attributed_and_in_no_training() -> None:
    assert len(PHOTOS) >= 10
    notice = (ROOT / "NOTICE").read_text()
    with (ROOT / "tools" / "tiny" / "photos.tsv").open() as file:
        split = {row["name"]: row["split"] for row in csv.DictReader(file, delimiter="\t")}
    for file in PHOTOS:
        assert file.with_suffix(".txt").read_text().strip()
        assert file.name in notice
        assert split[file.stem] == "held-out"


def test_reconstruction(prior: Prior) -> None:
    """The VAE alone, on held-out photographs at the demo's size, has a mean LPIPS of 0.087, as on its card."""
    lpips = Lpips()
    distances = []
    for file in PHOTOS:
        image = photo(file)
        distances.append(lpips(image, prior.decode(prior.encode(image), (image.shape[2], image.shape[3]))).item())
    assert np.mean(distances) <= 0.09


def test_latents_have_unit_variance(prior: Prior) -> None:
    z = torch.cat([prior.encode(photo(file)).flatten() for file in PHOTOS])
    assert 0.7 < z.std().item() < 1.4


def test_it_predicts_noise(prior: Prior) -> None:
    """The model explains most of the noise; at a high noise level a picture's own caption lowers the error."""
    captions = [file.with_suffix(".txt").read_text().strip() for file in PHOTOS]
    generator = torch.Generator().manual_seed(0)

    def error(t: int) -> tuple[float, float]:
        """Mean squared errors with the picture's own caption and with another picture's."""
        own, other = [], []
        for index, file in enumerate(PHOTOS):
            z, time = prior.encode(photo(file, 96)), torch.tensor([t])
            eps = torch.randn(z.shape, generator=generator)
            z_t = prior.schedule.add_noise(z, time, eps).repeat(2, 1, 1, 1)
            text = prior.embed([captions[index], captions[(index + 5) % len(captions)]])
            with torch.no_grad():
                errors = (prior.noise(z_t, time.repeat(2), text) - eps).square().mean((1, 2, 3)).tolist()
            own.append(errors[0])
            other.append(errors[1])
        return float(np.mean(own)), float(np.mean(other))

    assert error(100)[0] < 0.35
    assert error(300)[0] < 0.2
    own, other = error(600)
    assert own < other


@pytest.mark.parametrize(
    "name", [name if name == "oil" else pytest.param(name, marks=pytest.mark.slow) for name in STYLES]
)
def test_a_style_pulls_photographs_toward_itself(prior: Prior, name: str) -> None:
    """Thirty steps of SMS lower the style's loss relative to the prior's, and the picture stays recognizable."""
    assert len(STYLES) >= 3
    deltas = read_style(Style(lora=f"tiny:styles/{name}.safetensors", scale=1, prompt=f"{name} style"), prior)
    style = prior.with_deltas(deltas.unet, deltas.text)
    file = HERE / "photos" / "cat.jpg"
    image = photo(file, 96)
    caption = file.with_suffix(".txt").read_text().strip()
    config = Objective(steps=30, guidance=2, fake_guidance=2, identity_weight=1e-3)
    prompts = config.prompts(f"{name} style", caption)
    target = prior.embed([prompts.target])
    z_src = prior.encode(image)
    z = optimize(prior, style, z_src, [prompts], [0], config).z

    def surprise(latent: torch.Tensor) -> float:
        """The loss of the style minus the loss of the bare prior, over a fixed set of noises."""
        generator, total = torch.Generator().manual_seed(1), 0.0
        for t in (60, 120, 180, 240, 300):
            eps, time = torch.randn(latent.shape, generator=generator), torch.tensor([t])
            z_t = prior.schedule.add_noise(latent, time, eps)
            with torch.no_grad():
                styled, bare = (model.noise(z_t, time, target) for model in (style, prior))
            total += ((styled - eps).square().mean() - (bare - eps).square().mean()).item()
        return total

    assert surprise(z) < surprise(z_src)
    size = (image.shape[2], image.shape[3])
    assert 0.02 < Lpips()(image, prior.decode(z, size)).item() < 0.5
