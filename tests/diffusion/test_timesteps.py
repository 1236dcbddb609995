"""Tests of the noise schedule, its weights and the timestep sampler against the formulas."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, strategies as st

from smsbatch.diffusion.schedule import Schedule
from smsbatch.diffusion.timesteps import allowed, draw

SCHEDULE = Schedule(torch.tensor(oracles.alphas_cumprod(), dtype=torch.float32))
TIMESTEPS = list(range(2, 1000))


def test_add_noise() -> None:
    rng = np.random.default_rng(0)
    z, eps = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 4, 3, 5))
    t = [21, 499]
    ours = SCHEDULE.add_noise(
        torch.tensor(z, dtype=torch.float32), torch.tensor(t), torch.tensor(eps, dtype=torch.float32)
    )
    expected = np.stack([oracles.add_noise(z[i], eps[i], t[i]) for i in range(2)])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_posterior_variance_is_the_released_weight() -> None:
    ours = SCHEDULE.posterior_variance(torch.tensor(TIMESTEPS))
    # float32 abar loses digits where it is nearly one
    np.testing.assert_allclose(ours.numpy(), [oracles.weight_released(t) for t in TIMESTEPS], rtol=5e-3)


def test_pds_coefficients() -> None:
    psi, chi = (coefficient.numpy() for coefficient in SCHEDULE.pds_coefficients(torch.tensor(TIMESTEPS)))
    expected = np.array([oracles.pds_coefficients(t) for t in TIMESTEPS])
    usual = np.array(TIMESTEPS) >= 20  # below 20 float32 abar is too coarse; PDS draws none there by default
    np.testing.assert_allclose(psi[usual], expected[usual, 0], rtol=5e-3, atol=5e-5)
    np.testing.assert_allclose(chi[usual], expected[usual, 1], rtol=5e-3)


@given(t=st.integers(20, 999))
def test_pds_with_coefficients_that_agree_with_each_other_has_no_pull_to_the_source(t: int) -> None:
    consistent, _ = SCHEDULE.pds_coefficients(torch.tensor([t]), stride=1)
    published, _ = SCHEDULE.pds_coefficients(torch.tensor([t]))
    assert abs(float(consistent)) < 1e-2 * float(published)


@pytest.mark.parametrize("steps", [1, 7, 100, 500])
def test_paper_range(steps: int) -> None:
    for step in range(steps):
        assert list(allowed(step, steps, t_min=20, t_max=500, grid=1)) == oracles.paper_range(step, steps)


@pytest.mark.parametrize("steps", [1, 7, 100, 500])
def test_released_range(steps: int) -> None:
    for step in range(steps):
        assert list(allowed(step, steps, t_min=20, t_max=500, grid=2)) == oracles.released_range(step, steps)


@st.composite
def moments(draw: st.DrawFn) -> dict[str, Any]:
    """A strategy for the arguments of `allowed`."""
    steps = draw(st.integers(1, 600))
    t_max = draw(st.integers(2, 999))
    return {
        "step": draw(st.integers(0, steps - 1)),
        "steps": steps,
        "t_min": draw(st.integers(1, t_max - 1)),
        "t_max": t_max,
        "grid": draw(st.sampled_from([1, 2])),
    }


@given(moments())
def test_a_range_narrows_and_never_empties(moment: dict[str, Any]) -> None:
    step, steps, t_max = moment["step"], moment["steps"], moment["t_max"]
    choices = allowed(**moment)
    assert len(choices) >= 1
    assert min(choices) >= moment["t_min"]
    assert len(choices) == 1 or max(choices) * steps <= t_max * (steps - step)
    if step:
        assert set(choices) <= set(allowed(**moment | {"step": step - 1}))


@given(moments())
def test_uniform_is_the_whole_range_always(moment: dict[str, Any]) -> None:
    whole = oracles.whole_range(moment["t_min"], moment["t_max"], moment["grid"])
    choices = allowed(**moment, timesteps="uniform")
    assert choices == allowed(**moment | {"step": 0})
    # With grid 2, an even t_min and t_max = t_min + 1, no odd timestep is below t_max; one is allowed all the same.
    if whole:
        assert list(choices) == whole
    else:
        assert len(choices) == 1


@given(moments())
def test_linear_is_one_timestep_that_falls_from_end_to_end(moment: dict[str, Any]) -> None:
    limits = {key: moment[key] for key in ("t_min", "t_max", "grid")}
    choices = allowed(**moment, timesteps="linear")
    assert len(choices) == 1
    if oracles.whole_range(**limits):
        assert choices[0] == oracles.linear_timestep(moment["step"], moment["steps"], **limits)
    if moment["step"]:
        assert choices[0] <= allowed(**moment | {"step": moment["step"] - 1}, timesteps="linear")[0]


@pytest.mark.parametrize("timesteps", ["adaptive", "uniform", "linear"])
def test_every_kind_begins_with_its_largest_timesteps(timesteps: Literal["adaptive", "uniform", "linear"]) -> None:
    assert allowed(0, 50, t_min=20, t_max=500, grid=1, timesteps=timesteps)[-1] == 500
    assert allowed(0, 50, t_min=20, t_max=500, grid=2, timesteps=timesteps)[-1] == 499


def test_draws_are_uniform_over_the_range() -> None:
    choices = allowed(250, 500, t_min=20, t_max=500, grid=2)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(choices, generator) for _ in range(20_000)]
    counts = np.array([drawn.count(t) for t in choices])
    expected = 20_000 / len(choices)
    assert set(drawn) == set(choices)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < len(choices) + 4 * np.sqrt(2 * len(choices))
