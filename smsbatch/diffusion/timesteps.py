"""The noise schedule and which timestep an iteration may draw.

A variance-preserving process: `z_t = a_t z + b_t eps`, `a_t = sqrt(abar_t)`, `b_t = sqrt(1 - abar_t)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Schedule", "allowed", "draw"]


@dataclass(frozen=True)
class Schedule:
    """`abar` [T], float32: the cumulative product of `1 - beta`, indexed by the timestep."""

    abar: Tensor

    def to(self, device: torch.device | str) -> Schedule:
        return Schedule(self.abar.to(device))

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_t [B, C, h, w] of `z` [B, C, h, w] at `t` [B]."""
        abar = self.abar[t].view(-1, 1, 1, 1)
        return abar.sqrt() * z + (1 - abar).sqrt() * eps

    def posterior_variance(self, t: Tensor, stride: int = 2) -> Tensor:
        """betatilde_t = beta_t (1 - abar_{t - stride}) / (1 - abar_t), shape of `t`.

        The released code's w_t: the variance of DDPM's posterior, except that it takes the one-step `beta_t` together
        with the previous timestep of a 500-step grid (`stride` 2). 8.6e-4 at t = 21, 4.8e-3 at t = 499.
        """
        abar = self.abar
        beta = 1 - abar[t] / abar[(t - 1).clamp_min(0)]
        return beta * (1 - abar[(t - stride).clamp_min(0)]) / (1 - abar[t])


def allowed(step: int, steps: int, *, t_min: int, t_max: int, grid: int) -> range:
    """The timesteps that iteration `step` of `steps` may draw: `t ~ U(t_min, (1 - step/steps) t_max)` (paper, Eq. 7).

    `grid` 1 takes every integer, the upper bound included. `grid` 2 is the released code's 500-step DDIM grid: odd
    timesteps only, the upper bound excluded. The range never empties: at the end only its lowest timestep is left.
    `step` 0 gives the whole range, which is also what the fake score trains on.
    """
    numerator = t_max * (steps - step)  # upper bound times `steps`, in integers so that no rounding moves a bound
    if grid == 1:
        return range(t_min, max(numerator // steps, t_min) + 1)
    first = t_min + (1 - t_min) % grid
    end = grid * (numerator // (grid * steps))  # the bound, rounded down to the grid as the released code's int() does
    return range(first, max(end, first + 1), grid)


def draw(choices: range, generator: torch.Generator) -> int:
    """One timestep, uniformly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]
