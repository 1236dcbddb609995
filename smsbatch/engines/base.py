"""The interface of an engine: pictures in, pictures out, as tensors on one device; no files, rows or units."""

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
        steps: of a batch, as `render` reports them.
        diverged_hint, oom_hint: advice if a result is not finite, or a picture does not fit the memory.
    """

    device: torch.device
    steps: int
    diverged_hint: str
    oom_hint: str

    def prompt(self, caption: str) -> str:
        """The prompt of a picture with this caption, for its row."""

    def batch_size(self, height: int, width: int) -> int:
        """The best number of pictures of this size to render at once."""

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        """Stylize images [B, 3, H, W] in [0, 1], each independently of the others.

        `progress` is called with the number of finished steps, and may raise to stop. Out of memory is torch's error.
        """


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)
