"""The timesteps that an iteration may draw."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def allowed(
    step: int,
    steps: int,
    *,
    t_min: int,
    t_max: int,
    grid: int,
    timesteps: Literal["adaptive", "uniform", "linear"] = "adaptive",
) -> range:
    """The timesteps that iteration `step` of `steps` may draw, all equally likely.

    "adaptive" narrows, `t ~ U(t_min, (1 - step/steps) t_max)` (paper, Eq. 7); "uniform" never does; "linear" is a
    single timestep, which falls from `t_max` to `t_min` in equal steps ("random" and "naive" in the paper's Table 4).

    `grid` 1 takes every integer, the upper bound included. `grid` 2 is the released code's 500-step DDIM grid: odd
    timesteps only, the upper bound excluded. The range is never empty: at the end its lowest timestep is left.
    """
    if timesteps == "adaptive":
        return _narrowed(step, steps, t_min, t_max, grid)
    whole = _narrowed(0, steps, t_min, t_max, grid)
    if timesteps == "uniform":
        return whole
    last = (len(whole) - 1) * (steps - step) // steps
    return whole[last : last + 1]


def _narrowed(step: int, steps: int, t_min: int, t_max: int, grid: int) -> range:
    numerator = t_max * (steps - step)  # upper bound times `steps`, in integers so that no rounding moves a bound
    if grid == 1:
        return range(t_min, max(numerator // steps, t_min) + 1)
    first = t_min + (1 - t_min) % grid
    end = grid * (numerator // (grid * steps))  # the bound, rounded down to the grid as the released code's int() does
    return range(first, max(end, first + 1), grid)


def draw(choices: range, generator: torch.Generator) -> int:
    """One timestep, drawn uniformly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy numbers drawn on the CPU to the device, without waiting for it."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)
