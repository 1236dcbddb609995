"""E-LatentLPIPS (arXiv 2405.05967) as the identity term of the paper's appendix: a perceptual distance between latents.

    d(z, z_src) = sum_l mean_hw lin_l((f_l(T z) - f_l(T z_src))^2) + mean |z - z_src|

f_l are layers of a VGG-16 on latents, normalized over channels; T is a random flip, shift, rotation and scaling, the
same for both. The package is an extra, `smsbatch[latent-lpips]`, and like its weights not for commercial use. Weights
are never downloaded: they are looked for in the folder SMSBATCH_WEIGHTS and in torch's cache.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from smsbatch.errors import WeightsError

# Heads and trunk for the latents of Stable Diffusion 1.x; those of 2.x come from the same encoder.
WEIGHTS = "sd15_latest_vgg16_tuned.pth"
ADDRESS = f"https://huggingface.co/Mingguksky/elatentlpips/resolve/main/elatentlpips_ckpt/{WEIGHTS}"


class LatentLpips:
    """d(z, z_src) to one batch of sources and its gradient, sample by sample.

    Every call draws a new T, seeded by the call's number alone, so that a sample's T does not depend on its batch.

    Args:
        z_src: source latents [B, 4, h, w], scaled as the UNet sees them.

    Raises:
        WeightsError: the extra is not installed, or its weights are not on this machine.
    """

    def __init__(self, z_src: Tensor) -> None:
        self.source, self.calls = z_src.detach().float(), 0
        self.network = _network().to(z_src.device)

    def gradient(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(gradient [B, 4, h, w], loss [B])` at latents `z` [B, 4, h, w], at any timesteps `t` [B]."""
        devices = [z.device] if z.device.type == "cuda" else []
        gradients, losses = [], []
        for one, source in zip(z.detach().float()[:, None], self.source[:, None], strict=True):
            one.requires_grad_()
            with torch.enable_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(self.calls)
                loss = self.network(one, source).sum()
                gradients += torch.autograd.grad(loss, one)
            losses.append(loss.detach())
        self.calls += 1
        return torch.cat(gradients), torch.stack(losses)


@cache
def _network() -> nn.Module:
    """The package's network with the file's weights; its own constructor downloads some into the working folder."""
    try:
        from elatentlpips import ELatentLPIPS
    except ImportError as error:
        raise WeightsError(
            f"objective.identity: latent_lpips is an extra ({error}); pip install elatentlpips 'setuptools<81', "
            "which is not for commercial use, or take spectral"
        ) from error
    path = next((path for path in _candidates() if path.is_file()), None)
    if path is None:
        raise WeightsError(
            f"objective.identity: the weights of latent_lpips are not on this machine; download {ADDRESS} "
            "into a folder, and set the environment variable SMSBATCH_WEIGHTS to it"
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")  # it warns of an old argument, which no user can change
        network = ELatentLPIPS(pretrained=False, pnet_rand=True, encoder="sd15", augment="bg", verbose=False)
        _take_latents(network.net)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        absent, unknown = network.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise WeightsError(f"{path}: not the weights of latent_lpips ({error}); download {ADDRESS}") from error
    wrong = [*unknown, *(name for name in absent if not name.startswith("augment."))]  # its buffers are constants
    if wrong:
        raise WeightsError(f"{path}: not the weights of latent_lpips, {wrong[0]} does not match; download {ADDRESS}")
    frozen: nn.Module = network.eval().requires_grad_(False)
    return frozen


def _candidates() -> list[Path]:
    own = [Path(os.environ["SMSBATCH_WEIGHTS"])] if "SMSBATCH_WEIGHTS" in os.environ else []
    return [folder / WEIGHTS for folder in (*own, Path(torch.hub.get_dir(), "checkpoints"))]


def _take_latents(trunk: Any) -> None:
    """Change VGG-16 as the package does when it loads a trunk: four input channels, first three poolings removed."""
    for layers in (trunk.slice1, trunk.slice2, trunk.slice3):
        for name, layer in layers.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(layers, name, nn.Identity())
    first = trunk.slice1[0]
    trunk.slice1[0] = nn.Conv2d(4, first.out_channels, first.kernel_size, first.stride, first.padding)
