"""The one loop that optimizes a batch of latents (paper, Algorithm 1, per image)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smsbatch.diffusion.lora import FakeScore
from smsbatch.diffusion.objectives import OBJECTIVES, Scores, Texts
from smsbatch.diffusion.prior import Prior
from smsbatch.diffusion.timesteps import allowed, draw
from smsbatch.manifest import Objective

__all__ = ["learning_rate", "optimize"]


def learning_rate(step: int, config: Objective) -> float:
    """Linear warm-up from zero over `warmup` of the run, then a cosine that would reach zero at `horizon` runs.

    The released constants (0.2 and 1.5 of 500 steps) begin at 0, peak at 0.1 and end at 0.0325.
    """
    warmup, horizon = config.warmup * config.steps, config.horizon * config.steps
    if step < warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (horizon - warmup))) / 2


def optimize(
    prior: Prior,
    style: Prior,
    z_src: Tensor,
    texts: Texts,
    seeds: Sequence[int],
    config: Objective,
    progress: Callable[[int], None] = lambda step: None,
    trace: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Optimize B latents in lockstep, each exactly as if it were alone.

    Every sample has its own seed, from which its timesteps, noises and fake LoRA are drawn on the CPU, so that a result
    depends neither on its neighbours nor on the device's random numbers. Nothing in the loop reads from the device.

    Args:
        prior: the bare prior; its UNet carries the fake score's LoRAs.
        style: the prior with the style.
        z_src: source latents [B, C, h, w].
        texts: embeddings [B, L, D] each.
        seeds: one per sample.
        progress: called with the number of finished steps.
        trace: called with step, loss [B] of the objective and loss [B] of the fake score.

    Returns:
        Latents [B, C, h, w]; a sample that diverged has entries that are not finite, its neighbours are untouched.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device = z_src.device

    def noise() -> Tensor:
        drawn = [torch.randn(z_src.shape[1:], generator=generator) for generator in generators]
        return torch.stack(drawn).to(device, non_blocking=True)

    def times(choices: range) -> Tensor:
        return torch.tensor([draw(choices, generator) for generator in generators]).to(device, non_blocking=True)

    def timesteps(step: int) -> range:
        return allowed(step, config.steps, t_min=config.t_min, t_max=config.t_max, grid=config.grid)

    fake = FakeScore(prior, config.fake, generators)
    scores = Scores(style=style.noise, fake=fake, real=prior.noise)
    objective = OBJECTIVES[config.name](config, prior.schedule, z_src, texts)
    z = z_src.clone().requires_grad_()
    optimizer = torch.optim.AdamW([z], lr=0.0, betas=config.betas, weight_decay=config.weight_decay)

    for step in range(config.steps):
        t, eps = times(timesteps(step)), noise()
        with torch.no_grad():
            z_before = z.detach().clone()
            z.grad, loss = objective.gradient(z_before, t, eps, scores)
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.step()
        z_fake = z.detach() if config.fake.trains_on == "result" else z_before
        fake_loss = fake.train_step(z_fake, times(timesteps(0)), noise(), texts.target)
        if trace is not None:
            trace(step, loss, fake_loss)
        progress(step + 1)
    return z.detach()
