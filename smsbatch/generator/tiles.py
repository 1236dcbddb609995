"""Stylize a picture far larger than the training pictures, tile by tile, without seams.

Seams have two causes. With moments of its own, a tile has its own colours and contrast: so all tiles use the moments of
a small copy of the whole picture (thumbnail instance normalization, arXiv 2103.11784). Near its edge a tile lacks the
pixels beyond: so neighbours overlap, and fade into each other in the middle of the overlap. With an overlap of at least
twice the generator's reach the result is that of the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from smsbatch.generator.network import STRIDE

_SHORTEST = 16  # pixels: the shortest side that a generator takes


def overview(image: Tensor, side: int) -> Tensor:
    """The image [1, 3, H, W] shrunk with antialiasing to a long side of `side` pixels; unchanged if no larger."""
    scale = side / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(_SHORTEST, round(length * scale)) for length in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


class Tiling:
    """The tiles of one picture [1, 3, H, W], all of one size: a square of `size`, less where the picture is narrower.

    They begin at multiples of the generator's stride, so that every tile is sampled as the whole would be, and are
    evenly spaced, row by row. `paste` them in any order, then take the `result`.

    Args:
        size, overlap: pixels, multiples of the stride; neighbours share at least `overlap`.
        reach: pixels from a tile's edge within which the tile differs from the whole picture.
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
        """The number of pixels of a tile."""
        return self._size[0] * self._size[1]

    def cut(self, chosen: slice) -> Tensor:
        """The chosen tiles [n, 3, h, w]."""
        return torch.cat([self._image[window] for window in self._windows(chosen)])

    def paste(self, chosen: slice, tiles: Tensor) -> None:
        """Add the stylized `tiles` [n, 3, h, w], those of `chosen`, to the result."""
        for (row, column), window, tile in zip(self._places[chosen], self._windows(chosen), tiles, strict=True):
            self._canvas[window] += tile * self._shares[0][row][:, None] * self._shares[1][column]

    def result(self) -> Tensor:
        """The picture [1, 3, H, W], once all tiles are pasted."""
        return self._canvas[..., : self._height, : self._width]

    def _windows(self, chosen: slice) -> Iterator[tuple[slice, ...]]:
        height, width = self._size
        for row, column in self._places[chosen]:
            top, left = self._edges[0][row], self._edges[1][column]
            yield slice(None), slice(None), slice(top, top + height), slice(left, left + width)


def _edges(length: int, size: int, overlap: int) -> list[int]:
    """The starts of the fewest tiles of `size` that cover `length` and share at least `overlap`."""
    if length == size:
        return [0]
    number = -(-(length - overlap) // (size - overlap))
    units = (length - size) // STRIDE
    return [STRIDE * (units * index // (number - 1)) for index in range(number)]


def _shares(length: int, size: int, starts: list[int], reach: int) -> Tensor:
    """The weights of every tile along one side [tiles, size]: 1 inside, a linear ramp in the middle of each overlap.

    A tile's weight is the ramp at its start minus that at the next tile's start: they add up to 1 however many overlap.
    """
    place = torch.arange(length) + 0.5
    begun = [torch.ones(length)]
    for before, start in pairwise(starts):
        shared = before + size - start
        spared = reach if shared >= 2 * reach else shared // 4  # of the overlap, at either edge
        ramp = shared - 2 * spared
        inside = place - (start + spared)
        begun.append((inside / ramp).clamp(0, 1) if ramp else (inside > 0).float())
    begun.append(torch.zeros(length))
    return torch.stack([(begun[i] - begun[i + 1])[start : start + size] for i, start in enumerate(starts)])
