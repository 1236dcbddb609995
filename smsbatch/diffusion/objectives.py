"""What turns scores into a gradient on the latent.

    objective   gradient on z                                                     source
    ─────────   ────────────────────────────────────────────────────────────────  ──────────────────────────
    sms         R . w_t (e_style(z_t; y) - e_fake(z_t; y)) + lambda dL_freq/dz    arXiv 2503.07601, Eq. 2 to 6

    e_*     noise predictions with classifier-free guidance, e^g(y) = e(null) + g (e(y) - e(null))
    R       relevance map in [0, 1]: where the bare prior reacts to "turn it into <style>", on the noised *source*
    L_freq  low frequencies of z against those of the source, cut off at t (`spectrum.py`)

The paper's Eq. 5 writes a squared norm; what it means, and what its authors run, is the gradient above, without the
UNet's Jacobian (Eq. 2). Gradients are per latent entry (times 1/(C h w)), as a mean-reduced loss gives them: Adam's
epsilon is calibrated to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smsbatch.diffusion.spectrum import SpectralPenalty
from smsbatch.diffusion.timesteps import Schedule
from smsbatch.manifest import Objective

__all__ = ["OBJECTIVES", "SMS", "Scores", "Texts", "guided", "relevance_map"]

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A noise prediction: (z_t [N, C, h, w], t [N], text [N, L, D]) -> eps [N, C, h, w]."""


@dataclass(frozen=True)
class Scores:
    """The three score models of DESIGN's glossary; an objective sees these, never adapters."""

    style: Score
    fake: Score
    real: Score


@dataclass(frozen=True)
class Texts:
    """Text embeddings [B, L, D]: of the target prompt, of the edit instruction, of the empty prompt."""

    target: Tensor
    edit: Tensor
    null: Tensor


def guided(score: Score, z_t: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
    """e(null) + guidance (e(text) - e(null)), both in one call; guidance 1 needs, and pays for, the text alone."""
    if guidance == 1:
        return score(z_t, t, text)
    e_null, e_text = _null_and_text(score, z_t, t, text, null)
    return e_null + guidance * (e_text - e_null)


def _null_and_text(score: Score, z_t: Tensor, t: Tensor, text: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    e_null, e_text = score(z_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([null, text])).chunk(2)
    return e_null, e_text


def relevance_map(difference: Tensor, order: Literal["mean_abs", "abs_mean"]) -> Tensor:
    """R [B, 1, h, w] in [0, 1] of `e_real(z_t^src; y_edit) - e_real(z_t^src; null)` [B, C, h, w] (paper, Eq. 4).

    "abs_mean" is the paper's order, absolute value before the mean over channels; "mean_abs" the released code's.
    Normalized by minimum and maximum of every sample. A constant map says nothing about where, and gives ones.
    """
    reduced = difference.mean(1, keepdim=True).abs() if order == "mean_abs" else difference.abs().mean(1, keepdim=True)
    low, high = reduced.amin((-2, -1), keepdim=True), reduced.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (reduced - low) / (high - low), 1.0)


class SMS:
    """Style Matching Score for one batch of samples.

    Args:
        config: constants, from the manifest.
        schedule: of the prior all three scores share.
        z_src: source latents [B, C, h, w], float32.
    """

    def __init__(self, config: Objective, schedule: Schedule, z_src: Tensor, texts: Texts) -> None:
        self.config, self.schedule, self.z_src, self.texts = config, schedule, z_src, texts
        self.penalty = SpectralPenalty(z_src, norm=config.spectral_norm, t_max=config.t_max)

    def gradient(self, z: Tensor, t: Tensor, eps: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """`(gradient [B, C, h, w], loss [B])` at `z` [B, C, h, w], with its own `t` [B] and noise `eps` for each.

        The loss is what a trace shows, |G_style|^2 / 2 + lambda L_freq; the gradient is not its derivative, see above.
        """
        config, texts = self.config, self.texts
        z_t = self.schedule.add_noise(z, t, eps)
        e_style = guided(scores.style, z_t, t, texts.target, texts.null, config.guidance)
        e_fake = guided(scores.fake, z_t, t, texts.target, texts.null, config.fake_guidance)
        g_style = self.schedule.posterior_variance(t).view(-1, 1, 1, 1) * (e_style - e_fake)
        if config.relevance != "off":
            z_t_src = self.schedule.add_noise(self.z_src, t, eps)
            e_null, e_edit = _null_and_text(scores.real, z_t_src, t, texts.edit, texts.null)
            g_style = relevance_map(e_edit - e_null, config.relevance) * g_style
        g_spectral, l_freq = self.penalty.gradient(z, t)
        gradient = g_style / z[0].numel() + config.spectral_weight * g_spectral
        loss = g_style.square().flatten(1).mean(1) / 2 + config.spectral_weight * l_freq
        return gradient, loss


OBJECTIVES = {"sms": SMS}
