"""The plain loop: the authors' script for one image, rewritten from a description of it, as the baseline.

Contract: same arithmetic, same draws and, with the preset `released`, the same result as
`smsbatch.diffusion.optimize` for one image, at the script's cost: fp32 and eager, three UNets, a pass of its own for
style, fake and real score, each with its unconditional half (guidance 4.5 on both scores), a LoRA training step whose
unconditional half is computed, differentiated and thrown away, the relevance map in numpy on the CPU, losses and
timesteps read back in every iteration. That is 8 sample-forwards and 2 sample-backwards an iteration. Left out are
the script's slips that change the result (its posterior sample for the source latent, for one) and its previews.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from common import Parts
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

GUIDANCE = 4.5
IDENTITY_WEIGHT = 5e-4
GRID_STEPS, T_MAX = 500, 500  # timesteps 1, 3, ..., 999, of which indices 10 to 249 are drawn
LOWEST, HIGHEST = 10, 250


class PlainLoop:
    """The three UNets of one style on one device.

    Args:
        parts: the model, fp32; its UNet is copied.
        deltas: the style's differences of the UNet's parameters, by dotted name.
    """

    def __init__(self, parts: Parts, deltas: Mapping[str, Tensor]) -> None:
        self.unused = parts.unet  # the script keeps the style's UNet without its LoRA, which only takes memory
        self.style = copy.deepcopy(parts.unet)
        parameters = dict(self.style.named_parameters())
        for name, delta in deltas.items():
            parameters[name].data += delta.to(parameters[name].device)
        self.fake: UNet2DConditionModel = copy.deepcopy(parts.unet)
        self.fake.add_adapter(LoraConfig(r=8, lora_alpha=32, target_modules=["to_q", "to_v"]))
        self.scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        )

    def __call__(
        self,
        z_src: Tensor,
        target: Tensor,
        edit: Tensor,
        null: Tensor,
        seed: int,
        steps: int,
        trace: Callable[[Tensor, float], None] = lambda gradient, fake_loss: None,
    ) -> Tensor:
        """The latent [1, C, h, w] of the source latent `z_src` after `steps` iterations; the texts are [1, L, D].

        `trace` is called in every iteration with the gradient on the latent and the loss of the fake score.
        """
        generator, device = torch.Generator().manual_seed(seed), z_src.device
        lora = self._fresh_lora(generator)
        self.abar = self.scheduler.alphas_cumprod.to(device)
        z = z_src.clone().requires_grad_()
        optimizer = torch.optim.AdamW([z], lr=0.1)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        fake_optimizer = torch.optim.AdamW(lora, lr=1e-3, weight_decay=0)

        for step in range(steps):
            t, t_before = self._timestep(HIGHEST * (steps - step) // steps, generator)
            eps = torch.randn(z.shape[1:], generator=generator)[None].to(device)
            with torch.no_grad():
                z_t = self._add_noise(z, eps, t)
                e_style = self._guided(self.style, z_t, t, target, null)
                e_fake = self._guided(self.fake, z_t, t, target, null)
                beta = self.scheduler.betas.to(device)[t]
                w = beta * (1 - self.abar[t_before]) / (1 - self.abar[t])
            relevance = self._relevance(self._add_noise(z_src, eps, t), t, edit, null)
            towards = (z - relevance * w * (e_style - e_fake)).detach()
            loss = F.mse_loss(z, towards) / 2 + IDENTITY_WEIGHT * self._spectral(z, z_src, int(t))
            optimizer.zero_grad()
            loss.backward()
            loss.item()
            gradient = z.grad.clone()
            optimizer.step()
            rate.step()

            t, _ = self._timestep(HIGHEST, generator)
            eps = torch.randn(z.shape[1:], generator=generator)[None].to(device)
            z_t = self._add_noise(z.detach(), eps, t)
            e = self._pair(self.fake, z_t, t, target, null)[1]
            fake_loss = F.mse_loss(self.abar[t] * e, self.abar[t] * eps)
            fake_optimizer.zero_grad()
            fake_loss.backward()
            fake_optimizer.step()
            trace(gradient, fake_loss.item())
        return z.detach()

    def _fresh_lora(self, generator: torch.Generator) -> list[Tensor]:
        """The factors of an untrained LoRA: A as peft draws it, but from `generator`; B zero."""
        factors = {name: p for name, p in self.fake.named_parameters() if "lora_" in name}
        for name, factor in factors.items():
            if "lora_A" in name:
                bound = factor.shape[1] ** -0.5
                factor.data.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))
            else:
                factor.data.zero_()
            factor.requires_grad_()
        return list(factors.values())

    def _timestep(self, end: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A timestep of the grid's indices from LOWEST up to `end`, and the one before it."""
        self.scheduler.set_timesteps(GRID_STEPS, device=self.abar.device)
        times = self.scheduler.timesteps.flip(0)
        index = LOWEST + int(torch.randint(max(end - LOWEST, 1), (), generator=generator))
        return times[index], times[index - 1]

    def _add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.abar[t].sqrt() * z + (1 - self.abar[t]).sqrt() * eps

    @staticmethod
    def _pair(unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, text: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
        """The predictions under the empty prompt and under `text`, in one call of two rows."""
        e = unet(torch.cat([z_t] * 2), torch.stack([t] * 2), encoder_hidden_states=torch.cat([null, text])).sample
        e_null, e_text = e.chunk(2)
        return e_null, e_text

    def _guided(self, unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, text: Tensor, null: Tensor) -> Tensor:
        e_null, e_text = self._pair(unet, z_t, t, text, null)
        return e_null + GUIDANCE * (e_text - e_null)

    def _relevance(self, z_t: Tensor, t: Tensor, edit: Tensor, null: Tensor) -> Tensor:
        self.fake.disable_adapters()
        e_null, e_edit = self._pair(self.fake, z_t, t, edit, null)
        self.fake.enable_adapters()
        reduced: np.ndarray = (e_edit - e_null).detach().squeeze(0).mean(0).abs().cpu().numpy()
        normalized = (reduced - reduced.min()) / (reduced.max() - reduced.min())
        return torch.from_numpy(normalized).to(z_t.device)

    @staticmethod
    def _spectral(z: Tensor, z_src: Tensor, t: int) -> Tensor:
        h, w = z.shape[-2:]
        rows, columns = (_dct(n).to(z.device) for n in (h, w))
        kept = torch.arange(h)[:, None] + torch.arange(w) <= int(t / T_MAX * (h + w - 2))
        kept = kept.to(z.device)
        return F.l1_loss(rows @ z @ columns.T * kept, rows @ z_src @ columns.T * kept)


def _dct(n: int) -> Tensor:
    """The orthonormal DCT-II [n, n]."""
    matrix = torch.cos(math.pi / n * torch.outer(torch.arange(n), torch.arange(n) + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _rate(step: int, steps: int) -> float:
    """A fifth of the run linearly up from zero, then a cosine that would reach zero after one and a half runs."""
    warmup, horizon = 0.2 * steps, 1.5 * steps
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup))) / 2
