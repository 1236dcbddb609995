"""The noise schedule, what an objective weighs a timestep with, and which timesteps an iteration may draw.

A variance-preserving process: `z_t = a_t z + b_t eps`, `a_t = sqrt(abar_t)`, `b_t = sqrt(1 - abar_t)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Schedule", "allowed", "draw", "to_device"]


@dataclass(frozen=True)
class Schedule:
    """`abar` [T], float32: the cumulative product of `1 - beta`, indexed by the timestep."""

    abar: Tensor

    def to(self, device: torch.device | str) -> Schedule:
        return Schedule(self.abar.to(device))

    def a(self, t: Tensor) -> Tensor:
        """a_t of `t` [B] as [B, 1, 1, 1]."""
        return self.abar[t].view(-1, 1, 1, 1).sqrt()

    def b(self, t: Tensor) -> Tensor:
        """b_t of `t` [B] as [B, 1, 1, 1]."""
        return (1 - self.abar[t]).view(-1, 1, 1, 1).sqrt()

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_t [B, C, h, w] of `z` [B, C, h, w] at `t` [B]."""
        return self.a(t) * z + self.b(t) * eps

    def posterior_variance(self, t: Tensor, stride: int = 2) -> Tensor:
        """betatilde_t = beta_t (1 - abar_{t - stride}) / (1 - abar_t), shape of `t`.

        The released code's w_t: the variance of DDPM's posterior, except that it takes the one-step `beta_t` together
        with the previous timestep of a 500-step grid (`stride` 2). 8.6e-4 at t = 21, 4.8e-3 at t = 499.
        """
        return self._beta(t) * (1 - self.abar[self._before(t, stride)]) / (1 - self.abar[t])

    def pds_coefficients(self, t: Tensor, stride: int = 2) -> tuple[Tensor, Tensor]:
        """`(psi_t, chi_t)`, shape of `t`, of the PDS gradient `psi_t (z - z_src) + chi_t (e_tgt - e_src)`.

        With x0 the clean latent a prediction e implies, PDS matches zt~ = (z_{t'} - c0 x0 - c1 z_t) / sigma_t of result
        and source. Written out, psi = (a_{t'} - c0 - c1 a_t) / sigma_t and chi = c0 b_t / (a_t sigma_t).

        Of a posterior that agrees with itself psi is zero, and PDS nothing but DDS weighted by chi. What pulls to the
        source in the authors' code is that it takes the one-step `beta_t` together with t' = t - 2 of its 500-step
        grid.
        The coefficients are theirs, inconsistent as they are, for there is no PDS without them: psi is 1.61 at t = 21,
        0.14 at 201 and 0.01 at 801. `stride` 1 is consistent.
        """
        abar, beta = self.abar.double(), self._beta(t).double()  # psi is a difference of nearly equal numbers
        now, before = abar[t], abar[self._before(t, stride)]
        c0 = before.sqrt() * beta / (1 - now)
        c1 = (1 - beta).sqrt() * (1 - before) / (1 - now)
        sigma = (beta * (1 - before) / (1 - now)).sqrt()
        psi = (before.sqrt() - c0 - c1 * now.sqrt()) / sigma
        chi = c0 * ((1 - now) / now).sqrt() / sigma
        return psi.float(), chi.float()

    def _beta(self, t: Tensor) -> Tensor:
        abar = self.abar.double()
        return (1 - abar[t] / abar[self._before(t, 1)]).float()

    def _before(self, t: Tensor, stride: int) -> Tensor:
        return (t - stride).clamp_min(0)


def allowed(
    step: int,
    steps: int,
    *,
    t_min: int,
    t_max: int,
    grid: int,
    timesteps: Literal["adaptive", "uniform", "linear"] = "adaptive",
) -> range:
    """The timesteps that iteration `step` of `steps` may draw, each as likely as the others.

    "adaptive" narrows, `t ~ U(t_min, (1 - step/steps) t_max)` (paper, Eq. 7); "uniform" never does; "linear" is one
    single timestep, which falls from `t_max` to `t_min` in equal parts ("random" and "naive" in the paper's Table 4).

    `grid` 1 takes every integer, the upper bound included. `grid` 2 is the released code's 500-step DDIM grid: odd
    timesteps only, the upper bound excluded. The range never empties: at the end only its lowest timestep is left.
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
    """One timestep, uniformly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, without waiting for the device."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)
