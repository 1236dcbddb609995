"""Score distillation objectives: each turns noise predictions into a gradient on the latent.

    objective   its direction G                                                    source
    ─────────   ─────────────────────────────────────────────────────────────────  ─────────────────────────────────
    sms         w_t (e_style(z_t; y) - e_fake(z_t; y)),  with R, lambda, narrow t  arXiv 2503.07601, Eq. 2 to 7
    vsd         w_t (e_style(z_t; y) - e_fake(z_t; y))                             arXiv 2305.16213, Eq. 9
    sds         w_t (e_style(z_t; y) - eps)                                        arXiv 2209.14988, Eq. 3
    dds         w_t (e_style(z_t; y) - e_style(z_t^src; y_src))                    arXiv 2304.07090, Eq. 3
    pds         psi_t (z - z_src) + chi_t G of dds                                 arXiv 2311.13831, Eq. 14
    cds         G of dds + w_cut dL_con/dz, L_con over self-attention features     arXiv 2311.18608, Eq. 7

    every one   gradient = R . G + lambda dL_id/dz

    e_*     noise predictions with classifier-free guidance; without a style LoRA, e_style is the bare prior's
    z_t     z noised at t with eps; z_t^src is the source noised with the same eps
    R       relevance map in [0, 1]: where the bare prior reacts to "turn it into <style>", on the noised source
    L_id    distance of z's low frequencies, cut off at t, from the source's (`spectrum.py`), or another identity term

R and lambda belong to SMS; the constants of the other objectives switch them off, and a manifest may switch them on. So
SMS is VSD with a map, a spectral term and a narrowing range of timesteps, and its ablations are numbers in a manifest.
The style LoRA is not part of an objective either: it belongs to the model whose predictions are called "style".

The papers write squared norms, but mean, and their authors compute, the gradient above without the UNet's Jacobian
(paper, Eq. 2). Gradients are per latent entry (times 1/(C h w)), as those of a mean-reduced loss: Adam's epsilon is
calibrated to that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from smsbatch.diffusion.relevance import relevance_map
from smsbatch.diffusion.schedule import Schedule
from smsbatch.diffusion.scores import Ask, Scores
from smsbatch.diffusion.spectrum import SpectralPenalty
from smsbatch.manifest import ScoreObjective


@dataclass(frozen=True)
class Point:
    """The input of the scores: result and source [B, C, h, w], noised at `t` [B] with the same `eps`."""

    z: Tensor
    z_src: Tensor
    t: Tensor
    eps: Tensor
    z_t: Tensor
    z_t_src: Tensor


class Identity(Protocol):
    """The identity term, which keeps a result close to its source."""

    def gradient(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(gradient [B, C, h, w], loss [B])`, both per latent entry."""


class Distillation(ABC):
    """The common part of the six objectives, for one batch. A subclass lists its predictions and computes G from them.

    Args:
        config: the constants in the manifest.
        schedule: of the prior that all scores share.
        z_src: source latents [B, C, h, w], float32.
    """

    asks_fake = False

    def __init__(self, config: ScoreObjective, schedule: Schedule, z_src: Tensor) -> None:
        self.config, self.schedule, self.z_src = config, schedule, z_src
        self.identity = _identity(config, z_src) if config.identity_weight else None
        self._times = self._maps = z_src.new_empty(0)  # the cached relevance maps and their timesteps

    @abstractmethod
    def asks(self, p: Point) -> list[Ask]:
        """The predictions that `direction` needs."""

    @abstractmethod
    def direction(self, p: Point, scores: Scores, *e: Tensor) -> Tensor:
        """G [B, C, h, w] from the predictions `e`, which are in the order of `asks`."""

    def gradient(self, z: Tensor, t: Tensor, eps: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """`(gradient [B, C, h, w], loss [B])` at `z` [B, C, h, w]; each sample has its own `t` [B] and noise `eps`.

        The loss |R . G|^2 / 2 + lambda L_id is for traces; the gradient is not its derivative (see the module).
        """
        p = self._point(z, t, eps)
        asked = self.asks(p)
        mapped, cached = self.config.relevance != "off", len(self._maps) > 0
        answers = scores(t, *asked, *(_edits(p.z_t_src) if mapped and not cached else ()))
        g = self.direction(p, scores, *answers[: len(asked)])
        if mapped:
            g = (self._nearest_map(t) if cached else self._relevance(*answers[len(asked) :])) * g
        gradient, loss = g / z[0].numel(), g.square().flatten(1).mean(1) / 2
        if self.identity is not None:
            pull, distance = self.identity.gradient(z, t)
            gradient = gradient + self.config.identity_weight * pull
            loss = loss + self.config.identity_weight * distance
        return gradient, loss

    def cache_maps(self, scores: Scores, noise: Callable[[], Tensor], repeats: int = 1) -> None:
        """Compute the relevance map at `relevance_grid` timesteps, evenly between `t_min` and `t_max`, each with its
        own noise.

        Each group of `repeats` rows has one source, for which the map is computed once; `scores` and `noise` have one
        row per group.
        """
        config, maps, z_src = self.config, [], self.z_src[::repeats]
        assert config.relevance_grid is not None
        inner = torch.linspace(config.t_min, config.t_max, config.relevance_grid + 2, device=z_src.device)[1:-1]
        self._times = inner.round().long()
        for t in self._times:
            z_t_src = self.schedule.add_noise(z_src, t.expand(len(z_src)), noise())
            maps.append(self._relevance(*scores(t.expand(len(z_src)), *_edits(z_t_src))))
        self._maps = torch.stack(maps).repeat_interleave(repeats, dim=1)

    def weight(self, p: Point, e_style: Tensor) -> Tensor:
        """w_t [B, 1, 1, 1]. DMD's is (b_t / a_t) / mean |z - x0|, where `e_style` implies the clean latent x0."""
        schedule, t = self.schedule, p.t
        if self.config.weight == "dmd":
            x0 = (p.z_t - schedule.b(t) * e_style) / schedule.a(t)
            return schedule.b(t) / schedule.a(t) / (p.z - x0).abs().mean((1, 2, 3), keepdim=True)
        if self.config.weight == "one_minus_abar":
            return schedule.b(t).square()
        if self.config.weight == "posterior_variance":
            return schedule.posterior_variance(t).view(-1, 1, 1, 1)
        return torch.ones_like(p.z[:, :1, :1, :1])

    def _point(self, z: Tensor, t: Tensor, eps: Tensor) -> Point:
        add_noise = self.schedule.add_noise
        return Point(z, self.z_src, t, eps, add_noise(z, t, eps), add_noise(self.z_src, t, eps))

    def _relevance(self, e_edit: Tensor, e_null: Tensor) -> Tensor:
        assert self.config.relevance != "off"
        return relevance_map(e_edit - e_null, self.config.relevance, self.config.relevance_clip)

    def _nearest_map(self, t: Tensor) -> Tensor:
        nearest = (self._times[:, None] - t).abs().argmin(0)
        return self._maps[nearest, torch.arange(len(t), device=t.device)]


def _edits(z_t_src: Tensor) -> tuple[Ask, Ask]:
    """The two predictions of the relevance map (paper, Eq. 4)."""
    return Ask("real", z_t_src, "edit"), Ask("real", z_t_src, "null")


def _identity(config: ScoreObjective, z_src: Tensor) -> Identity:
    if config.identity == "spectral":
        return SpectralPenalty(z_src, norm=config.spectral_norm, t_max=config.t_max, cutoff=config.spectral_cutoff)
    if config.identity == "mse":
        return LatentMse(z_src)
    from smsbatch.diffusion.latent_lpips import LatentLpips  # an extra

    return LatentLpips(z_src)


class LatentMse:
    """The mean squared difference from the source (paper, appendix E.1)."""

    def __init__(self, z_src: Tensor) -> None:
        self.z_src = z_src

    def gradient(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Identity`."""
        difference = z - self.z_src
        return 2 * difference / z[0].numel(), difference.square().flatten(1).mean(1)


class Matching(Distillation):
    """SMS and VSD: away from the distribution of the results (fake), toward that of the style."""

    asks_fake = True

    def asks(self, p: Point) -> list[Ask]:
        config = self.config
        return [Ask("style", p.z_t, "target", config.guidance), Ask("fake", p.z_t, "target", config.fake_guidance)]

    def direction(self, p: Point, scores: Scores, *e: Tensor) -> Tensor:
        e_style, e_fake = e
        return self.weight(p, e_style) * (e_style - e_fake)


class SDS(Distillation):
    """Toward the model's denoised version of the result."""

    def asks(self, p: Point) -> list[Ask]:
        return [Ask("style", p.z_t, "target", self.config.guidance)]

    def direction(self, p: Point, scores: Scores, *e: Tensor) -> Tensor:
        (e_style,) = e
        return self.weight(p, e_style) * (e_style - p.eps)


class DDS(Distillation):
    """SDS minus its direction for the source, which removes what SDS changes in an image that matches its prompt."""

    def asks(self, p: Point) -> list[Ask]:
        guidance = self.config.guidance
        return [Ask("style", p.z_t, "target", guidance), Ask("style", p.z_t_src, "source", guidance)]

    def direction(self, p: Point, scores: Scores, *e: Tensor) -> Tensor:
        e_target, e_source = e
        return self.weight(p, e_target) * (e_target - e_source)


class PDS(DDS):
    """Makes the stochastic latents of result and source equal; `Schedule.pds_coefficients` derives psi and chi."""

    def direction(self, p: Point, scores: Scores, *e: Tensor) -> Tensor:
        e_target, e_source = e
        psi, chi = (coefficient.view(-1, 1, 1, 1) for coefficient in self.schedule.pds_coefficients(p.t))
        return psi * (p.z - p.z_src) + chi * (e_target - e_source)


_PATCHES = 256  # positions of one layer and patch size that are contrasted
_TAU = 0.07
_LOSS_SCALE = 2.0**10  # without it the gradients of a mean over positions vanish in fp16
_CONTRASTIVE = 64**2 / 2000  # the source's DDS term is 2000 / (64 x 64) G, its contrastive term is not scaled


class CDS(DDS):
    """DDS plus a contrastive term: a patch of the result stays closer to the same patch of the source than others.

    L_con = sum over self-attentions of the UNet's upper half and patch sizes 1 and 2 of the cross entropy of f_src . f
    / tau over positions. As in the authors' code, and unlike their formula, the source's patch is the anchor and the
    result's patches are the negatives.
    """

    def direction(self, p: Point, scores: Scores, *e: Tensor) -> Tensor:
        with torch.no_grad():
            anchors = scores.features("style", p.z_t_src, p.t, "source")
        with torch.enable_grad():
            z_t = p.z_t.detach().requires_grad_()
            features = scores.features("style", z_t, p.t, "target")
            loss = z_t.new_zeros(())
            for layer, (f, f_src) in enumerate(zip(features, anchors, strict=True)):
                for size in (1, 2):
                    patches, anchor = (_patches(x, p.z.shape, size) for x in (f, f_src))
                    if not patches.numel():
                        continue  # the picture is so small that this layer is a single row
                    chosen = positions(p.eps, patches.shape[1], 2 * layer + size)[..., None].expand(-1, -1, f.shape[-1])
                    similar = anchor.gather(1, chosen) @ patches.gather(1, chosen).mT / _TAU  # [B, patches, patches]
                    own = similar.log_softmax(-1).diagonal(dim1=1, dim2=2)
                    loss = loss - own.mean(1).sum()  # summed over samples: each gets its own gradient
            (pull,) = torch.autograd.grad(loss * _LOSS_SCALE, z_t)
        weight = self.config.contrastive_weight * _CONTRASTIVE / _LOSS_SCALE
        return super().direction(p, scores, *e) + weight * self.schedule.a(p.t) * pull


def _patches(features: Tensor, latent: torch.Size, size: int) -> Tensor:
    """Unit vectors [B, patches, C]: means of `features` [B, tokens, C] over `size` x `size` positions."""
    height, width = latent[-2:]
    while height * width > features.shape[1]:  # the UNet halves the sides, rounding up
        height, width = -(-height // 2), -(-width // 2)
    grid = features.mT.reshape(len(features), -1, height, width)
    if min(height, width) < size:
        return features[:, :0]
    return F.normalize(F.avg_pool2d(grid, size).flatten(2).mT, dim=-1)


def positions(eps: Tensor, patches: int, turn: int) -> Tensor:
    """Up to 256 different positions of `patches`, [B, n], ordered by some of the noise's entries.

    They are random, specific to the sample, different for every `turn`, and need no further draw.
    """
    order = eps.flatten(1).roll(turn * 1009, dims=1)[:, :patches].argsort(1)
    return order[:, :_PATCHES]


OBJECTIVES: dict[str, type[Distillation]] = {
    "sms": Matching,
    "vsd": Matching,
    "sds": SDS,
    "dds": DDS,
    "pds": PDS,
    "cds": CDS,
}
