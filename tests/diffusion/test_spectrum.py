"""The spectral penalty against cosine sums written out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    """Also on landscape sizes, where the released code fails."""
    timesteps = [0, 1, 21, 101, 201, 301, 401, 499, 500]
    ours = low_pass(h, w, torch.tensor(timesteps), 500)
    for index, t in enumerate(timesteps):
        np.testing.assert_array_equal(ours[index, 0].numpy(), oracles.low_pass_mask(h, w, t), err_msg=f"t = {t}")


@given(t=st.integers(0, 500), h=st.integers(1, 40), w=st.integers(1, 40))
def test_low_pass_keeps_more_at_larger_t(t: int, h: int, w: int) -> None:
    smaller, larger = low_pass(h, w, torch.tensor([t, min(t + 1, 500)]), 500)
    assert bool((smaller <= larger).all())
    assert bool(smaller[0, 0, 0])


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_gradient_and_loss(norm: Literal["l1", "l2"], h: int, w: int) -> None:
    rng = np.random.default_rng(1)
    timesteps = [21, 250, 499]
    z, z_src = rng.normal(size=(3, 4, h, w)), rng.normal(size=(3, 4, h, w))
    penalty = SpectralPenalty(torch.tensor(z_src, dtype=torch.float32), norm=norm, t_max=500)
    gradient, loss = penalty.gradient(torch.tensor(z, dtype=torch.float32), torch.tensor(timesteps))
    for i, t in enumerate(timesteps):
        if norm == "l1":
            value = oracles.spectral_loss_released(z[i], z_src[i], t)
            slope = oracles.spectral_gradient_released(z[i], z_src[i], t)
        else:  # ours is per entry, the paper's a sum
            value = oracles.spectral_loss_paper(z[i], z_src[i], t) / z[i].size
            slope = oracles.spectral_gradient_paper(z[i], z_src[i], t) / z[i].size
        np.testing.assert_allclose(loss[i].item(), value, rtol=1e-4)
        np.testing.assert_allclose(gradient[i].numpy(), slope, atol=1e-6)
