"""The noise schedule and the timestep sampler against the formulas."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smsbatch.diffusion.timesteps import Schedule, allowed, draw

ABAR = torch.tensor(oracles.alphas_cumprod(), dtype=torch.float32)


def test_add_noise() -> None:
    rng = np.random.default_rng(0)
    z, eps = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 4, 3, 5))
    t = [21, 499]
    ours = Schedule(ABAR).add_noise(
        torch.tensor(z, dtype=torch.float32), torch.tensor(t), torch.tensor(eps, dtype=torch.float32)
    )
    expected = np.stack([oracles.add_noise(z[i], eps[i], t[i]) for i in range(2)])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_posterior_variance_is_the_released_weight() -> None:
    t = list(range(2, 1000))
    ours = Schedule(ABAR).posterior_variance(torch.tensor(t))
    # float32 abar loses digits where abar_t and abar_{t-1} are nearly one
    np.testing.assert_allclose(ours.numpy(), [oracles.weight_released(i) for i in t], rtol=5e-3)


@pytest.mark.parametrize("steps", [1, 7, 100, 500])
def test_paper_range(steps: int) -> None:
    for step in range(steps):
        assert list(allowed(step, steps, t_min=20, t_max=500, grid=1)) == oracles.paper_range(step, steps)


@pytest.mark.parametrize("steps", [1, 7, 100, 500])
def test_released_range(steps: int) -> None:
    for step in range(steps):
        assert list(allowed(step, steps, t_min=20, t_max=500, grid=2)) == oracles.released_range(step, steps)


@given(
    steps=st.integers(1, 600), fraction=st.floats(0, 1, exclude_max=True), grid=st.sampled_from([1, 2]), data=st.data()
)
def test_a_range_narrows_and_never_empties(steps: int, fraction: float, grid: int, data: st.DataObject) -> None:
    t_max = data.draw(st.integers(2, 1000))
    t_min = data.draw(st.integers(1, t_max - 1))
    step = int(fraction * steps)
    choices = allowed(step, steps, t_min=t_min, t_max=t_max, grid=grid)
    assert len(choices) >= 1
    assert min(choices) >= t_min
    assert len(choices) == 1 or max(choices) * steps <= t_max * (steps - step)
    if step:
        before = allowed(step - 1, steps, t_min=t_min, t_max=t_max, grid=grid)
        assert set(choices) <= set(before)


def test_draws_are_uniform_over_the_range() -> None:
    choices = allowed(250, 500, t_min=20, t_max=500, grid=2)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(choices, generator) for _ in range(20_000)]
    counts = np.array([drawn.count(t) for t in choices])
    expected = 20_000 / len(choices)
    assert set(drawn) == set(choices)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < len(choices) + 4 * np.sqrt(2 * len(choices))
