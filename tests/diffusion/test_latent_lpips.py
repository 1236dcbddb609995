"""Tests of E-LatentLPIPS with a small stand-in for the optional package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from smsbatch.diffusion import latent_lpips as identity
from smsbatch.diffusion.latent_lpips import WEIGHTS, LatentLpips
from smsbatch.errors import WeightsError


class Trunk(nn.Module):
    """The package's trunk in small: three input channels and three slices with pooling, named as in VGG-16."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 4, 5, 6)
        for number in (1, 2, 3):
            layers = nn.Sequential()
            layers.add_module(f"{3 * number - 3}", nn.Conv2d(*widths[number - 1 : number + 1], 3, padding=1))
            layers.add_module(f"{3 * number - 2}", nn.Tanh())
            layers.add_module(f"{3 * number - 1}", nn.MaxPool2d(2))
            setattr(self, f"slice{number}", layers)

    def forward(self, z: Tensor) -> list[Tensor]:
        return [z := self.slice1(z), z := self.slice2(z), self.slice3(z)]


class Network(nn.Module):
    def __init__(self, *, pretrained: bool, pnet_rand: bool, encoder: str, augment: str, verbose: bool) -> None:
        super().__init__()
        assert (pretrained, pnet_rand, encoder, augment, verbose) == (False, True, "sd15", "bg", False)
        self.net = Trunk()
        self.lin = nn.Parameter(torch.rand(3))
        self.augment = nn.Module()
        self.augment.register_buffer("p", torch.ones(()))

    def forward(self, z: Tensor, source: Tensor) -> Tensor:
        distance = (z - source).abs().mean((1, 2, 3), keepdim=True)
        shift, scale = int(torch.randint(z.shape[-1], ())), torch.rand(())
        pair = (self.net(latent.roll(shift, -1) * scale) for latent in (z, source))
        for weight, a, b in zip(self.lin, *pair, strict=True):
            a, b = (features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt() for features in (a, b))
            distance = distance + weight * (a - b).square().sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return distance


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a file of weights for a trunk on latents; the stand-in for the package is installed."""
    package = ModuleType("elatentlpips")
    package.ELatentLPIPS = Network
    monkeypatch.setitem(sys.modules, "elatentlpips", package)
    monkeypatch.setenv("SMSBATCH_WEIGHTS", str(tmp_path))
    torch.manual_seed(0)
    network = Network(pretrained=False, pnet_rand=True, encoder="sd15", augment="bg", verbose=False)
    network.net.slice1[0] = nn.Conv2d(4, 4, 3, padding=1)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("augment")}
    torch.save(state, tmp_path / WEIGHTS)
    identity._network.cache_clear()
    yield tmp_path / WEIGHTS
    identity._network.cache_clear()


def latents(seed: int) -> Tensor:
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(seed))


T = torch.tensor([21, 101, 301])


@pytest.mark.usefixtures("weights")
def test_gradient_is_the_slope_of_the_loss() -> None:
    z, z_src, step = latents(0), latents(1), 1e-2
    gradient, loss = LatentLpips(z_src).gradient(z, T)
    assert (gradient.shape, loss.shape) == (z.shape, (3,))
    assert not loss.requires_grad
    for place in [(0, 0, 0, 0), (1, 2, 4, 3), (2, 3, 1, 5)]:
        shift = torch.zeros_like(z)
        shift[place] = step
        above, below = (LatentLpips(z_src).gradient(z + sign * shift, T)[1] for sign in (1, -1))
        slopes = (above - below) / (2 * step)
        assert slopes[place[0]].item() == pytest.approx(gradient[place].item(), rel=0.02, abs=1e-5)
        assert (slopes != 0).sum() == 1, "a sample's loss depends on its own latent alone"


@pytest.mark.usefixtures("weights")
def test_a_sample_sees_the_same_alone_and_in_a_batch() -> None:
    z, z_src = latents(0), latents(1)
    together = LatentLpips(z_src)
    steps = [together.gradient(z, T) for _ in range(2)]
    assert not torch.allclose(steps[0][1], steps[1][1]), "another augmentation in every call"
    for index in range(3):
        alone = LatentLpips(z_src[index : index + 1])
        for gradient, loss in steps:
            found = alone.gradient(z[index : index + 1], T[index : index + 1])
            torch.testing.assert_close(found, (gradient[index : index + 1], loss[index : index + 1]))


@pytest.mark.usefixtures("weights")
def test_it_leaves_its_inputs_and_the_random_state_alone() -> None:
    z, z_src = latents(0), latents(1)
    copies, state = (z.clone(), z_src.clone()), torch.get_rng_state()
    gradient, loss = LatentLpips(z_src).gradient(z, T)
    torch.testing.assert_close((z, z_src), copies, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not z.requires_grad
    same, zero = LatentLpips(z_src).gradient(z_src, T)
    assert zero.abs().max() < 1e-6
    assert same.abs().max() < gradient.abs().max()
    assert (loss > 0.1).all()


def test_without_the_package_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    identity._network.cache_clear()
    monkeypatch.setitem(sys.modules, "elatentlpips", None)
    with pytest.raises(WeightsError, match="pip install elatentlpips"):
        LatentLpips(latents(0))


def test_without_weights_it_says_where_they_are(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.unlink()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parent))
    with pytest.raises(WeightsError, match=f"{WEIGHTS} into a folder"):
        LatentLpips(latents(0))


def test_other_weights_are_refused(weights: Path) -> None:
    weights.write_bytes(b"not a file of weights")
    with pytest.raises(WeightsError, match="not the weights of latent_lpips"):
        LatentLpips(latents(0))
    torch.save({"lin": torch.zeros(3)}, weights)
    with pytest.raises(WeightsError, match=r"net\.slice1\.0\.weight does not match"):
        LatentLpips(latents(0))
