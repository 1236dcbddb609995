"""Crops of the training photographs as latents, encoded once and kept; random windows of them as batches.

Latents are kept as the posterior's mean and deviation (8 channels), so that every draw is a fresh sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from photos import crop, photos
from torch import Tensor
from train_vae import to_tensor

WIDE, TALL, SQUARE = (128, 192), (192, 128), (144, 144)  # px
# by the shape of the crop: windows in latent pixels, and for each a batch size that takes about the same time
WINDOWS = {
    WIDE: (((24, 24), 18), ((32, 32), 10), ((32, 48), 7), ((24, 40), 11)),
    TALL: (((24, 24), 18), ((32, 32), 10), ((48, 32), 7), ((40, 24), 11)),
    SQUARE: (((24, 24), 18), ((32, 32), 10), ((36, 36), 8)),
}


@dataclass(frozen=True)
class Latents:
    """`moments[shape]` is [n, 8, h, w] (mean, deviation; scaled), `captions[shape]` its n captions."""

    moments: dict[tuple[int, int], Tensor]
    captions: dict[tuple[int, int], list[str]]

    def batch(self, rng: np.random.Generator, share: float = 1.0) -> tuple[Tensor, list[str]]:
        """Windows of one random shape, latents [n, 4, h, w] with their captions; `share` scales the batch."""
        counts = np.array([len(m) for m in self.moments.values()])
        shape = list(self.moments)[rng.choice(len(counts), p=counts / counts.sum())]
        options = WINDOWS[shape]
        (h, w), n = options[rng.integers(len(options))]
        rows = rng.integers(len(self.moments[shape]), size=max(1, round(n * share)))
        height, width = self.moments[shape].shape[-2:]
        out = []
        for row in rows:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            out.append(self.moments[shape][row, :, top : top + h, left : left + w].float())
        mean, deviation = torch.stack(out).chunk(2, dim=1)
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        return mean + deviation * noise, [self.captions[shape][row] for row in rows]


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """[-1, 1] pictures -> scaled moments [n, 8, h, w] (mean, deviation)."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean.float(), posterior.std.float()], 1) * vae.config.scaling_factor


def build(
    file: Path,
    vae: AutoencoderKL,
    cache: Path,
    extra: Path | None,
    crops: int,
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    seed: int = 0,
) -> Latents:
    """Encode `crops` crops of every photograph (a third as many of a cut-out object), each put through `change`.

    The result is kept in `file`, and read from it if it exists.
    """
    if file.exists():
        kept = torch.load(file, weights_only=True)
        return Latents(kept["moments"], kept["captions"])
    rng = np.random.default_rng([seed, 7])
    pixels: dict[tuple[int, int], list[np.ndarray]] = {WIDE: [], TALL: [], SQUARE: []}
    captions: dict[tuple[int, int], list[str]] = {WIDE: [], TALL: [], SQUARE: []}
    for photo, picture in photos("train", cache, extra):
        stamp = photo.name.startswith("stamp-")
        for _ in range(-(-crops // 3) if stamp else crops):
            shape = [WIDE, TALL, SQUARE][rng.choice(3, p=[0, 0, 1] if stamp else [0.65, 0.15, 0.2])]
            part = crop(picture, *shape, rng, whole=0.6)
            pixels[shape].append(change(part, rng) if change else part)
            captions[shape].append(photo.caption)
    moments = {
        shape: torch.cat([encode(vae, to_tensor(parts[i : i + 16])).half() for i in range(0, len(parts), 16)])
        for shape, parts in pixels.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"moments": moments, "captions": captions}, file)
    return Latents(moments, captions)
