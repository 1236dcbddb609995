"""Tests of the properties of every metric in `METRICS`, and of LPIPS against its formula written out."""

from __future__ import annotations

import warnings
from importlib import resources
from typing import get_args

import lpips
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

from smsbatch.manifest import Dataset
from smsbatch.metrics import METRICS, Lpips, Metric
from smsbatch.metrics.lpips import MIN_SIDE


def test_a_manifest_can_name_every_metric() -> None:
    assert tuple(METRICS) == get_args(get_args(Dataset.model_fields["metrics"].annotation)[0])


@pytest.fixture(scope="module", params=sorted(METRICS))
def metric(request: pytest.FixtureRequest) -> Metric:
    return METRICS[request.param]()


@pytest.fixture(scope="module")
def distance() -> Lpips:
    return Lpips()


def picture(seed: int = 0, height: int = 64, width: int = 80) -> Tensor:
    """Smooth shapes with edges, [1, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return torch.where(smooth > 0.5, smooth, 0.3 * smooth)


def noisy(image: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (image + sigma * torch.randn(image.shape, generator=generator)).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------ every metric


def test_a_metric_gives_one_finite_number_per_pair(metric: Metric) -> None:
    source = torch.cat([picture(0), picture(1), picture(2)])
    found = metric(source, noisy(source, 0.1))
    assert (found.shape, found.dtype, found.requires_grad) == ((3,), torch.float32, False)
    assert torch.isfinite(found).all()
    assert len(set(found.tolist())) == 3


def test_a_metric_does_not_depend_on_the_batch(metric: Metric) -> None:
    source = torch.cat([picture(s) for s in range(4)])
    result = noisy(source, 0.15)
    alone = torch.cat([metric(a[None], b[None]) for a, b in zip(source, result, strict=True)])
    torch.testing.assert_close(metric(source, result), alone, rtol=1e-4, atol=1e-6)


def test_a_metric_leaves_its_inputs_and_the_random_state_alone(metric: Metric) -> None:
    source, result = picture(0), noisy(picture(0), 0.1)
    copies, state = (source.clone(), result.clone()), torch.get_rng_state()
    type(metric)()(source, result)
    assert torch.equal(source, copies[0])
    assert torch.equal(result, copies[1])
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- LPIPS


def by_hand(source: Tensor, result: Tensor) -> float:
    """LPIPS from the paper, in float64, from the two weight files and torch's own convolutions."""
    trunk = load(resources.files("smsbatch.tiny").joinpath("lpips_alex.safetensors").read_bytes())
    heads = torch.load(str(resources.files(lpips) / "weights/v0.1/alex.pth"), map_location="cpu", weights_only=True)
    mean = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    deviation = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]

    def features(image: Tensor) -> list[Tensor]:
        x, found = ((2 * image.double() - 1) - mean) / deviation, []
        for layer, (feature, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
            if layer in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (trunk[f"features.{feature}.{name}"].double() for name in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            found.append(x / x.square().sum(dim=0, keepdim=True).sqrt().clamp_min(1e-10))
        return found

    total = 0.0
    for layer, (a, b) in enumerate(zip(features(source), features(result), strict=True)):
        weights = heads[f"lin{layer}.model.1.weight"].double().flatten()[:, None, None]
        total += float((weights * (a - b).square()).sum(dim=0).mean())
    return total


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 65), (MIN_SIDE, MIN_SIDE)])
def test_lpips_is_its_formula(distance: Lpips, height: int, width: int) -> None:
    source, result = picture(0, height, width), noisy(picture(0, height, width), 0.2)
    found = distance(source, result).item()
    assert found > 0.01
    assert found == pytest.approx(by_hand(source[0], result[0]), rel=1e-4)


def test_lpips_of_an_image_with_itself_is_zero_and_order_does_not_matter(distance: Lpips) -> None:
    a, b = picture(0), picture(1)
    assert distance(a, a).item() == 0.0
    assert distance(a, b).item() == pytest.approx(distance(b, a).item(), rel=1e-5)


def test_lpips_orders_changes_as_an_eye_does(distance: Lpips) -> None:
    source = picture(0, 128, 128)
    blurred = F.avg_pool2d(source, 3, 1, 1, count_include_pad=False)
    changes = [source * 0.97, noisy(source, 0.03), blurred, noisy(source, 0.2), picture(5, 128, 128)]
    found = [distance(source, change).item() for change in changes]
    assert found == sorted(found)
    assert found[0] < 0.05
    assert found[-1] > 0.3


def test_lpips_is_not_squared_error(distance: Lpips) -> None:
    """A shift of brightness has a larger squared error than grain, but a smaller LPIPS."""
    source = picture(3, 128, 128) * 0.8
    brighter, grainy = source + 0.1, noisy(source, 0.08)
    assert F.mse_loss(source, brighter) > F.mse_loss(source, grainy)
    assert distance(source, brighter).item() < 0.5 * distance(source, grainy).item()


def test_lpips_takes_half_precision(distance: Lpips) -> None:
    source, result = picture(0), noisy(picture(0), 0.1)
    halves = distance(source.bfloat16(), result.bfloat16())
    assert halves.dtype == torch.float32
    assert halves.item() == pytest.approx(distance(source, result).item(), rel=0.1)


@pytest.mark.parametrize(
    ("source", "result", "says"),
    [
        (picture(0, 30, 64), picture(0, 30, 64), "at least 31 pixels, got 64x30"),
        (picture(0, 64, 64), picture(0, 64, 80), "one shape"),
        (picture(0)[:, :1], picture(0)[:, :1], r"\[1, 1, 64, 80\]"),
        (picture(0)[0], picture(0)[0], r"\[3, 64, 80\]"),
    ],
)
def test_lpips_refuses_what_it_cannot_compare(distance: Lpips, source: Tensor, result: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        distance(source, result)


def test_lpips_is_built_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lpips()
    assert capfd.readouterr() == ("", "")
