"""The loop that optimizes a batch of latents (paper, Algorithm 1, per image)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.objectives import OBJECTIVES
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.scores import ScoreModels
from smsbatch.diffusion.timesteps import allowed, draw, to_device
from smsbatch.manifest import Objective, Prompts

_STALL_WINDOW = 10


class Optimized(NamedTuple):
    """Latents [B, C, h, w] and the number of iterations of each [B]."""

    z: Tensor
    steps: Tensor


def learning_rate(step: int, config: Objective) -> float:
    """Linear warm-up from zero over `warmup` of the run, then a cosine that would reach zero after `horizon` runs.

    The released constants (0.2 and 1.5 of 500 steps) begin at 0, peak at 0.1 and end at 0.0325.
    """
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.horizon is None:
        return config.learning_rate
    return (
        config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (config.horizon * config.steps - warmup))) / 2
    )


def optimize(
    prior: Prior,
    style: Prior,
    z_src: Tensor,
    prompts: Sequence[Prompts],
    seeds: Sequence[int],
    config: Objective,
    progress: Callable[[int], None] = lambda step: None,
    trace: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Optimized:
    """Optimize B latents in lockstep, each exactly as if it were alone.

    Every sample has its own seed, from which its timesteps, noises and fake LoRA are drawn on the CPU, so that a result
    depends neither on its neighbours nor on the device's random numbers. The loop reads nothing from the device, except
    one number every ten iterations with `stall`.

    Args:
        prior: the bare prior; its UNet carries the fake score's LoRAs.
        style: the model of the style score; the prior itself where there is no LoRA.
        z_src: source latents [B, C, h, w].
        prompts: of each sample.
        seeds: one per sample.
        progress: called with the number of finished steps.
        trace: called with step, loss [B] of the objective and loss [B] of the fake score, zeros where there is none.

    Returns:
        The results; a diverged sample has entries that are not finite, and does not affect its neighbours.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device = z_src.device

    def noise() -> Tensor:
        drawn = [torch.randn(z_src.shape[1:], generator=generator) for generator in generators]
        return to_device(torch.stack(drawn), device)

    def times(choices: range) -> Tensor:
        return to_device(torch.tensor([draw(choices, generator) for generator in generators]), device)

    objective = OBJECTIVES[config.name](config, prior.schedule, z_src)
    fake = FakeScore(prior, config.fake, generators) if objective.asks_fake else None
    scores = ScoreModels(prior, style, fake, prompts, graph=fake is not None and config.fake.trains_on == "forward")
    if config.relevance != "off" and config.relevance_grid is not None:
        with torch.no_grad():
            objective.cache_maps(scores, noise)
    z = z_src.clone().requires_grad_()
    optimizer = _optimizer(z, config)
    per_entry = 1 if config.optimizer == "adamw" else z[0].numel()
    fake_min, fake_max = config.fake_range
    fake_times = allowed(0, config.steps, t_min=fake_min, t_max=fake_max, grid=config.grid)
    moving, taken, anchor = z.new_ones(len(z), dtype=torch.bool), z.new_zeros(len(z), dtype=torch.long), z_src

    for step in range(config.steps):
        choices = allowed(
            step, config.steps, t_min=config.t_min, t_max=config.t_max, grid=config.grid, timesteps=config.timesteps
        )
        t, eps = times(choices), noise()
        with torch.no_grad():
            z_before = z.detach().clone()
            gradient, loss = objective.gradient(z_before, t, eps, scores)
            z.grad = gradient * per_entry
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.step()
            if config.stall is not None:
                z.copy_(torch.where(moving.view(-1, 1, 1, 1), z, z_before))
                taken += moving
        fake_loss = torch.zeros_like(loss)
        if scores.fake_prediction is not None and fake is not None:
            fake_loss = fake.learn(scores.fake_prediction, t, eps)
        elif fake is not None:
            z_fake = z.detach() if config.fake.trains_on == "result" else z_before
            for _ in range(config.fake.updates):
                fake_loss = fake.train_step(z_fake, times(fake_times), noise(), scores.text("fake", "target"))
        if trace is not None:
            trace(step, loss, fake_loss)
        progress(step + 1)
        if config.stall is not None and (step + 1) % _STALL_WINDOW == 0:
            moved = (z.detach() - anchor).flatten(1).norm(dim=1) / anchor.flatten(1).norm(dim=1)
            anchor = z.detach().clone()
            if step >= config.warmup * config.steps:
                moving &= ~(moved < config.stall)  # NaN counts as moving: a diverged sample goes on
                if not moving.any():
                    break
    return Optimized(z.detach(), taken if config.stall is not None else taken + config.steps)


def _optimizer(z: Tensor, config: Objective) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD([z], lr=0.0, weight_decay=config.weight_decay)
    return torch.optim.AdamW([z], lr=0.0, betas=config.betas, weight_decay=config.weight_decay)
