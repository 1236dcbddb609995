"""LPIPS (Zhang et al. 2018), AlexNet, version 0.1: the `lpips` package's network and heads on the bundled trunk."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import resources
from typing import Any

import torch
from lpips import LPIPS
from safetensors.torch import load
from torch import Tensor

# AlexNet's convolutions, and the slice in which the lpips package keeps each.
_SLICE_OF_FEATURE = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}

# The smallest side for which AlexNet's second pooling has an output: conv 11/4 makes 7 of 31, pool 3/2 makes 3, then 1.
MIN_SIDE = 31


@cache
def network() -> Any:
    """The package's network with the bundled trunk, frozen; its `net` gives the trunk's five layers. Shared by all."""
    # The package builds a random trunk before ours is loaded: it must not change the caller's random state, and its
    # warning about torchvision's old `pretrained` argument does not help the user.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")
        built = LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    trunk = load(resources.files("smsbatch.tiny").joinpath("lpips_alex.safetensors").read_bytes())
    built.net.load_state_dict(
        {
            f"slice{index}.{feature}.{name}": trunk[f"features.{feature}.{name}"]
            for feature, index in _SLICE_OF_FEATURE.items()
            for name in ("weight", "bias")
        }
    )
    return built.requires_grad_(False)


class Lpips:
    """d(source, result) = sum_l mean_hw sum_c w_lc (f_lc(source)/|f_l(source)| - f_lc(result)/|f_l(result)|)^2.

    Zero for identical images; 0.1 is a visible but mild change, 0.6 another picture. The network moves to the
    device of its input, and runs in float32 whatever the input's precision.
    """

    def __init__(self) -> None:
        self._network = network()

    @torch.no_grad()
    def __call__(self, source: Tensor, result: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1], twice, H and W at least `MIN_SIDE` -> `[B]`. ValueError for any other shape."""
        if source.shape != result.shape or source.ndim != 4 or source.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two [B, 3, H, W] of one shape, got {list(source.shape)} and {list(result.shape)}"
            )
        height, width = source.shape[2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"LPIPS needs sides of at least {MIN_SIDE} pixels, got {width}x{height}: enlarge both images"
            )
        self._network.to(source.device)
        distance: Tensor = self._network(source.float(), result.to(source.device).float(), normalize=True)
        return distance.flatten()
