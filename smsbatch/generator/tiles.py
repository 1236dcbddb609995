"""A picture far larger than a generator was trained on, tile by tile, without a seam.

Seams come from two sides. Normalized by its own moments a tile has colours and contrasts of its own: all tiles are
computed under the moments of the whole picture in small (thumbnail instance normalization, arXiv 2103.11784). Near
its edge a tile lacks what lies beyond: there its neighbour counts, one fading into the other over the middle of what
they share. Where they share twice the generator's reach the result is that of the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from smsbatch.generator.network import STRIDE

__all__ = ["Tiling", "overview"]

_SHORTEST = 16  # pixels of a side that a generator takes


def overview(image: Tensor, side: int) -> Tensor:
    """The image [1, 3, H, W] with a long side of `side` pixels, antialiased; itself if it is no larger."""
    scale = side / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(_SHORTEST, round(length * scale)) for length in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


class Tiling:
    """The tiles of one picture [1, 3, H, W], all of one size: a square of `size`, less where the picture is narrower.

    They begin at multiples of the generator's stride, so that every tile is sampled as the whole would be, and are
    spread evenly. Row by row; `paste` them in any order, then take the `result`.

    Args:
        size, overlap: pixels, multiples of the stride; neighbours share at least `overlap`.
        reach: pixels from a tile's edge up to which it is not as the whole picture would be.
    """

    def __init__(self, image: Tensor, size: int, overlap: int, reach: int) -> None:
        self._height, self._width = image.shape[-2:]
        # Padded once, as the generator would pad the whole.
        self._image = F.pad(image, (0, -self._width % STRIDE, 0, -self._height % STRIDE), mode="reflect")
        self._size = [min(size, length) for length in self._image.shape[-2:]]
        edges = [_edges(length, side, overlap) for length, side in zip(self._image.shape[-2:], self._size, strict=True)]
        self._shares = [
            _shares(length, side, starts, reach).to(image.device)
            for length, side, starts in zip(self._image.shape[-2:], self._size, edges, strict=True)
        ]
        self._places = [(row, column) for row in range(len(edges[0])) for column in range(len(edges[1]))]
        self._edges = edges
        self._canvas = torch.zeros_like(self._image)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def pixels(self) -> int:
        """Of a tile."""
        return self._size[0] * self._size[1]

    def cut(self, chosen: slice) -> Tensor:
        """Some of the tiles [n, 3, h, w]."""
        return torch.cat([self._image[window] for window in self._windows(chosen)])

    def paste(self, chosen: slice, tiles: Tensor) -> None:
        """What became of them."""
        for (row, column), window, tile in zip(self._places[chosen], self._windows(chosen), tiles, strict=True):
            self._canvas[window] += tile * self._shares[0][row][:, None] * self._shares[1][column]

    def result(self) -> Tensor:
        """The picture [1, 3, H, W], all tiles pasted."""
        return self._canvas[..., : self._height, : self._width]

    def _windows(self, chosen: slice) -> Iterator[tuple[slice, ...]]:
        height, width = self._size
        for row, column in self._places[chosen]:
            top, left = self._edges[0][row], self._edges[1][column]
            yield slice(None), slice(None), slice(top, top + height), slice(left, left + width)


def _edges(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of `size` begin that cover `length` and share at least `overlap`, as few as can be."""
    if length == size:
        return [0]
    number = -(-(length - overlap) // (size - overlap))
    units = (length - size) // STRIDE
    return [STRIDE * (units * index // (number - 1)) for index in range(number)]


def _shares(length: int, size: int, starts: list[int], reach: int) -> Tensor:
    """How much every tile counts along one side [tiles, size]: 1 inside, linear ramps in the middle of what two share.

    A tile's share is what has begun with it, less what has begun with the next: they add up to 1 wherever many meet.
    """
    place = torch.arange(length) + 0.5
    begun = [torch.ones(length)]
    for before, start in pairwise(starts):
        shared = before + size - start
        spared = reach if shared >= 2 * reach else shared // 4  # of it, at either edge
        ramp = shared - 2 * spared
        inside = place - (start + spared)
        begun.append((inside / ramp).clamp(0, 1) if ramp else (inside > 0).float())
    begun.append(torch.zeros(length))
    return torch.stack([(begun[i] - begun[i + 1])[start : start + size] for i, start in enumerate(starts)])
