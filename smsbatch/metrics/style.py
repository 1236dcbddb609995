"""The distance of a set of images from a style: the Frechet distance of AlexNet's features, layer by layer.

    d = sum_l |m_l - m'_l|^2 + tr(C_l + C'_l - 2 (C_l C'_l)^(1/2))

m_l and C_l are mean and covariance of layer l's features, normalized over channels as LPIPS does, over all positions of
all images. d measures texture and colour at five scales rather than content, and a dozen pictures give thousands of
positions, whereas FID needs thousands of pictures. Contract: sets of images [B, 3, H, W] in [0, 1], of one or many
sizes. Compare only sets of similar size and number of pixels: few positions increase the distance of any set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smsbatch.errors import RequestError
from smsbatch.metrics.lpips import MIN_SIDE, network

CHANNELS = (64, 192, 384, 256, 256)


@dataclass(frozen=True)
class StyleReference:
    """The statistics of a set of images: for every layer the mean [C] and the covariance [C, C].

    They are float64 with the values of float32, so that saving and loading does not change a reference.
    """

    means: tuple[Tensor, ...]
    covariances: tuple[Tensor, ...]

    @classmethod
    def of(cls, images: Iterable[Tensor]) -> StyleReference:
        """The reference of a set of images [B, 3, H, W] in [0, 1], in batches of any size.

        Raises:
            RequestError: there are too few images, or one is too small for AlexNet.
        """
        counted = 0
        sums = [torch.zeros(c, dtype=torch.float64) for c in CHANNELS]
        products = [torch.zeros(c, c, dtype=torch.float64) for c in CHANNELS]
        positions = [0] * len(CHANNELS)
        for image in images:
            if min(image.shape[-2:]) < MIN_SIDE:
                height, width = image.shape[-2:]
                raise RequestError(
                    f"a style distance needs sides of {MIN_SIDE} pixels, got {width}x{height}: enlarge it"
                )
            counted += len(image)
            for layer, features in enumerate(_features(image)):
                sums[layer] += features.sum(0)
                products[layer] += features.T @ features
                positions[layer] += len(features)
        if min(positions) < 2:
            raise RequestError(f"{counted} images are too few to measure a style; give more or larger ones")
        means = [total / n for total, n in zip(sums, positions, strict=True)]
        covariances = [
            (product - n * torch.outer(mean, mean)) / (n - 1)
            for product, mean, n in zip(products, means, positions, strict=True)
        ]
        return cls(tuple(map(_rounded, means)), tuple(map(_rounded, covariances)))

    @classmethod
    def load(cls, path: str | Path) -> StyleReference:
        """Load a file that `save` wrote. RequestError: it is absent, or something else."""
        try:
            tensors = load_file(path)
            means = tuple(tensors[f"mean.{layer}"].double() for layer in range(len(CHANNELS)))
            covariances = tuple(_square(tensors[f"covariance.{layer}"], len(mean)) for layer, mean in enumerate(means))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise RequestError(
                f"{path} holds no style reference ({error}); make one with StyleReference.save"
            ) from error
        return cls(means, covariances)

    def distance(self, other: StyleReference) -> float:
        """d to another reference; it is symmetric."""
        layers = zip(self.means, self.covariances, other.means, other.covariances, strict=True)
        return sum(frechet(*layer) for layer in layers)

    def save(self, path: str | Path) -> None:
        """Write safetensors, float32: the means, and the covariances' upper triangles, row by row; 0.6 MB."""
        tensors = {f"mean.{layer}": mean.float() for layer, mean in enumerate(self.means)}
        for layer, covariance in enumerate(self.covariances):
            rows, columns = torch.triu_indices(*covariance.shape)
            tensors[f"covariance.{layer}"] = covariance[rows, columns].float()
        save_file(tensors, path)


def style_distance(images: Iterable[Tensor], reference: StyleReference) -> float:
    """d of the images, [B, 3, H, W] in [0, 1], to the reference: 0 for the reference's own set."""
    return StyleReference.of(images).distance(reference)


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """The Frechet distance of two normal distributions, in float64.

    tr (C C')^(1/2) is the sum of the singular values of C^(1/2) C'^(1/2): both roots are of symmetric matrices, and no
    product of covariances is formed, which would square their condition number.
    """
    overlap = torch.linalg.svdvals(_root(covariance.double()) @ _root(other_covariance.double())).sum()
    spread = covariance.double().trace() + other_covariance.double().trace() - 2 * overlap
    return max(0.0, float((mean.double() - other_mean.double()).square().sum() + spread))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


@torch.no_grad()
def _features(images: Tensor) -> list[Tensor]:
    """The five layers' features of `[B, 3, H, W]`, `[B h w, C]` each, normalized over channels, float64 on the CPU."""
    alexnet = network().to(images.device)
    layers = alexnet.net(alexnet.scaling_layer(images.float() * 2 - 1))
    normalized = (nn.functional.normalize(features, dim=1) for features in layers)
    return [features.movedim(1, -1).flatten(0, 2).double().cpu() for features in normalized]


def _rounded(values: Tensor) -> Tensor:
    return values.float().double()


def _square(triangle: Tensor, side: int) -> Tensor:
    covariance = torch.zeros(side, side, dtype=torch.float64)
    rows, columns = torch.triu_indices(side, side)
    covariance[rows, columns] = covariance[columns, rows] = triangle.double()
    return covariance
