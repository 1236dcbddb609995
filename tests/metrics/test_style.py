"""Tests of the style distance against an independent computation, and on the embedded styles."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load
from scipy.linalg import sqrtm
from torch import Tensor

import smsbatch
from smsbatch.commands.measure import style_distance as public_distance
from smsbatch.data import pixels
from smsbatch.errors import RequestError
from smsbatch.metrics.style import StyleReference, frechet, style_distance

TINY = Path(smsbatch.__file__).parent / "tiny"
sys.path.append(str(Path(__file__).parents[2] / "tools" / "tiny"))

from filters import FILTERS  # noqa: E402


def images(seed: int, count: int = 4, height: int = 64, width: int = 80) -> Tensor:
    """Smooth shapes with some grain, [B, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 7, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    files = sorted((TINY / "photos").glob("*.jpg"))
    return [pixels.fit(pixels.decode(file.read_bytes()), 64) for file in files[::2]]


def of_pictures(pictures: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255 for picture in pictures]


def by_hand(ours: Tensor, theirs: Tensor) -> float:
    """The distance, computed independently; scipy's matrix root is inaccurate for these singular covariances."""
    trunk = load(resources.files("smsbatch.tiny").joinpath("lpips_alex.safetensors").read_bytes())
    mean = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    deviation = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]

    def features(x: Tensor) -> list[np.ndarray]:
        x, found = ((2 * x.double() - 1) - mean) / deviation, []
        for layer, (feature, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
            if layer in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (trunk[f"features.{feature}.{name}"].double() for name in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).numpy()
            found.append(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
        return found

    total = 0.0
    for a, b in zip(features(ours), features(theirs), strict=True):
        cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
        values, vectors = np.linalg.eigh(cov_a)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
        total += np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return float(total)


def test_it_is_its_formula() -> None:
    ours, theirs = images(0), 0.7 * images(1)
    found = style_distance([ours], StyleReference.of([theirs]))
    assert found > 0.5
    assert found == pytest.approx(by_hand(ours, theirs), rel=1e-3)


def test_the_frechet_distance_has_scipys_matrix_root() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((50, 9)) @ rng.standard_normal((9, 9)) + shift for shift in (0, 1))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    spread = np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + spread
    given = [torch.from_numpy(x) for x in (a.mean(0), cov_a, b.mean(0), cov_b)]
    assert frechet(*given) == pytest.approx(expected, rel=1e-9)
    assert frechet(*given[2:], *given[:2]) == pytest.approx(expected, rel=1e-9), "order does not matter"


def test_a_set_is_at_no_distance_from_itself_however_it_is_batched() -> None:
    whole = images(0)
    reference = StyleReference.of([whole])
    assert abs(style_distance([whole], reference)) < 1e-6
    assert abs(style_distance(whole.flip(0).split(1), reference)) < 1e-5
    assert style_distance([images(1)], reference) > 0.1


def test_a_reference_that_was_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    reference = StyleReference.of([images(0)])
    reference.save(tmp_path / "style.safetensors")
    assert (tmp_path / "style.safetensors").stat().st_size < 0.7e6
    loaded = StyleReference.load(tmp_path / "style.safetensors")
    for kept, found in zip(reference.means + reference.covariances, loaded.means + loaded.covariances, strict=True):
        assert torch.equal(kept, found)


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_filtered_photographs_are_nearer_to_their_style(photos: list[np.ndarray], name: str) -> None:
    """Filtered photographs are also nearer to their own style than to the others, by the references in the package."""
    rng = np.random.default_rng(0)
    filtered = of_pictures([FILTERS[name](photo, rng) for photo in photos])
    measured = StyleReference.of(filtered)
    references = {style: StyleReference.load(TINY / "styles" / f"{style}.reference.safetensors") for style in FILTERS}
    distance = {style: measured.distance(reference) for style, reference in references.items()}
    assert distance[name] < style_distance(of_pictures(photos), references[name]) - 0.1
    assert min(distance, key=distance.__getitem__) == name


def test_the_public_function_takes_arrays_files_and_folders(photos: list[np.ndarray], tmp_path: Path) -> None:
    for number, photo in enumerate(photos[:2]):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert abs(public_distance(photos[:2], tmp_path)) < 1e-6
    files = [tmp_path / "0.png", str(tmp_path / "1.png")]
    reference = "tiny:styles/oil.reference.safetensors"
    assert public_distance(files, reference) == public_distance(photos[:2], reference) > 1


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="sides of 31 pixels, got 30x64"):
        StyleReference.of([torch.rand(1, 3, 64, 30)])
    with pytest.raises(RequestError, match="0 images are too few"):
        StyleReference.of([])
    with pytest.raises(RequestError, match="no pictures in this folder"):
        public_distance([], tmp_path)
    with pytest.raises(RequestError, match=r"gone\.png: cannot be read: No such file"):
        public_distance([tmp_path / "gone.png"], "tiny:styles/oil.reference.safetensors")
    with pytest.raises(RequestError, match=r"oil\.safetensors holds no style reference"):
        public_distance([], "tiny:styles/oil.safetensors")
    with pytest.raises(RequestError, match=r"gone\.safetensors holds no style reference"):
        public_distance([], tmp_path / "gone.safetensors")
