"""Tests of the spectral penalty against explicit sums of cosines."""

from __future__ import annotations

from typing import Literal

import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given, strategies as st

from smsbatch.diffusion.spectrum import SpectralPenalty, dct_matrix, low_pass

SIZES = [(5, 5), (4, 7), (8, 3), (1, 6)]


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_transform_is_the_orthonormal_dct(h: int, w: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, h, w))
    penalty = SpectralPenalty(torch.tensor(x[None], dtype=torch.float32), norm="l1", t_max=500)
    np.testing.assert_allclose(penalty.source[0].numpy(), oracles.dct2(x), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_the_inverse_is_the_transpose(n: int) -> None:
    matrix = dct_matrix(n)
    np.testing.assert_allclose((matrix.T @ matrix).numpy(), np.eye(n), atol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(64, 64), (64, 85), (85, 64), (3, 9)])
def test_low_pass_mask(h: int, w: int) -> None:
    """Sizes include landscape formats, on which the released code fails."""
    timesteps = [0, 1, 21, 101, 201, 301, 401, 499, 500]
    ours = low_pass(h, w, torch.tensor(timesteps), 500)
    for index, t in enumerate(timesteps):
        np.testing.assert_array_equal(ours[index, 0].numpy(), oracles.low_pass_mask(h, w, t), err_msg=f"t = {t}")


@given(t=st.integers(0, 500), h=st.integers(1, 40), w=st.integers(1, 40))
def test_low_pass_keeps_more_at_larger_t(t: int, h: int, w: int) -> None:
    smaller, larger = low_pass(h, w, torch.tensor([t, min(t + 1, 500)]), 500)
    assert bool((smaller <= larger).all())
    assert bool(smaller[0, 0, 0])


@example(hundredths=58, h=26, w=26)
@given(hundredths=st.integers(0, 100), h=st.integers(1, 40), w=st.integers(1, 40))
def test_a_fixed_cut_off_keeps_the_same_at_every_timestep(hundredths: int, h: int, w: int) -> None:
    """Examples include 0.58 * 50, where a float product falls just below an integer."""
    ours = low_pass(h, w, torch.tensor([21, 499]), 500, hundredths / 100)
    expected = oracles.low_pass_mask(h, w, 0, cutoff=hundredths / 100)
    for row in ours[:, 0].numpy():
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("t_max", [500, 948])
def test_the_progressive_cut_off_reaches_all_at_the_largest_timestep(t_max: int) -> None:
    masks = low_pass(6, 9, torch.tensor([t_max, 201]), t_max)
    assert bool(masks[0].all())
    np.testing.assert_array_equal(masks[1, 0].numpy(), oracles.low_pass_mask(6, 9, 201, t_max))


@pytest.mark.parametrize("cutoff", ["progressive", 0.3])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_gradient_and_loss(norm: Literal["l1", "l2"], h: int, w: int, cutoff: Literal["progressive"] | float) -> None:
    rng = np.random.default_rng(1)
    timesteps = [21, 250, 499]
    z, z_src = rng.normal(size=(3, 4, h, w)), rng.normal(size=(3, 4, h, w))
    penalty = SpectralPenalty(torch.tensor(z_src, dtype=torch.float32), norm=norm, t_max=500, cutoff=cutoff)
    gradient, loss = penalty.gradient(torch.tensor(z, dtype=torch.float32), torch.tensor(timesteps))
    fixed = None if cutoff == "progressive" else cutoff
    for i, t in enumerate(timesteps):
        if norm == "l1":
            value = oracles.spectral_loss_released(z[i], z_src[i], t, 500, fixed)
            slope = oracles.spectral_gradient_released(z[i], z_src[i], t, 500, fixed)
        else:  # ours is per entry, the paper's a sum
            value = oracles.spectral_loss_paper(z[i], z_src[i], t, 500, fixed) / z[i].size
            slope = oracles.spectral_gradient_paper(z[i], z_src[i], t, 500, fixed) / z[i].size
        np.testing.assert_allclose(loss[i].item(), value, rtol=1e-4)
        np.testing.assert_allclose(gradient[i].numpy(), slope, atol=1e-6)


def test_rounding_has_no_sign() -> None:
    """Where latents differ only by rounding, loss and gradient of the L1 norm are zero."""
    z_src = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    penalty = SpectralPenalty(z_src, norm="l1", t_max=500)
    nearly = z_src * (1 + 1e-7 * torch.randn(z_src.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(nearly, z_src)
    gradient, loss = penalty.gradient(nearly, torch.tensor([500]))
    assert not gradient.any()
    assert loss.item() == 0
    assert penalty.gradient(z_src + 1e-3, torch.tensor([500]))[0].any()
