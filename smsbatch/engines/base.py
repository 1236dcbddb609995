"""What an engine is: pictures in, pictures out, as tensors on one device. It knows no files, rows or units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Engine", "Rendered"]


class Rendered(NamedTuple):
    """A batch of results: images [B, 3, H, W] in [0, 1], the steps each took [B], and whether each is finite [B]."""

    images: Tensor
    steps: Tensor
    finite: Tensor


class Engine(Protocol):
    """A style on one device.

    Attributes:
        steps: of a batch, as `render` tells its progress.
        if_diverged, if_too_large: what to do where a result is not finite, or a picture does not fit the memory.
    """

    device: torch.device
    steps: int
    diverged_hint: str
    oom_hint: str

    def prompt(self, caption: str) -> str:
        """What the row says a picture with this caption was to become."""

    def batch_size(self, height: int, width: int) -> int:
        """How many pictures of this size are best rendered at once."""

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        """Stylize images [B, 3, H, W] in [0, 1], none of which has any influence on another.

        `progress` is called with finished steps, and may raise to stop. Out of memory is torch's error.
        """


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)
