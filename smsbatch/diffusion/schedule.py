"""The noise schedule of a prior: how much of a latent is left at each timestep.

A variance-preserving process: `z_t = a_t z + b_t eps`, `a_t = sqrt(abar_t)`, `b_t = sqrt(1 - abar_t)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

        With x0 the clean latent that a prediction e implies, PDS makes zt~ = (z_{t'} - c0 x0 - c1 z_t) / sigma_t of
        result and source equal. Written out, psi = (a_{t'} - c0 - c1 a_t) / sigma_t and chi = c0 b_t / (a_t sigma_t).

        With a consistent posterior (`stride` 1) psi is zero, and PDS is DDS weighted by chi. The authors' code combines
        the one-step `beta_t` with t' = t - 2 of its 500-step grid, and only this inconsistency pulls to the source.
        Their coefficients are kept, since PDS needs them: psi is 1.61 at t = 21, 0.14 at 201 and 0.01 at 801.
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
