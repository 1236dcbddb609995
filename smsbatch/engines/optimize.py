"""Every picture by optimizing its latent with the scores (paper, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.engines.base import Rendered, _finite
from smsbatch.errors import WeightsError
from smsbatch.manifest import Optimize, Styled


class OptimizeEngine:
    """Every picture by optimizing its latent with the scores (paper, Algorithm 1)."""

    diverged_hint = "the latent is not finite; lower objective.learning_rate"
    oom_hint = "lower image.resolution"

    def __init__(self, manifest: Optimize, device: str) -> None:
        self.prior, self.style = load_models(manifest, device)
        self.device = self.prior.device
        self.objective, self.steps = manifest.objective, manifest.objective.steps
        self._words, self._batch_size = manifest.style.prompt, manifest.compute.batch_size

    def prompt(self, caption: str) -> str:
        return self.objective.prompts(self._words, caption).target

    def batch_size(self, height: int, width: int) -> int:
        return self._batch_size

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        z, steps = optimize(
            self.prior,
            self.style,
            # One at a time, as below: a small part of the work, but the largest peak of memory if batched.
            torch.cat([self.prior.encode(row[None]) for row in images]),
            [self.objective.prompts(self._words, caption) for caption in captions],
            seeds,
            self.objective,
            progress,
        )
        size = (images.shape[-2], images.shape[-1])
        results = torch.cat([self.prior.decode(row[None], size) for row in z.nan_to_num()])
        return Rendered(results, steps, _finite(z) & _finite(results))


def load_models(manifest: Styled, device: str) -> tuple[Prior, Prior]:
    """The bare prior and the style's, the same object if the style has neither a LoRA nor another checkpoint.

    Raises:
        WeightsError: a model or LoRA is missing or not understood, or the two models do not go together.
    """
    compute, style = manifest.compute, manifest.style
    load = partial(
        Prior.load,
        device=device,
        precision=compute.precision,
        channels_last=compute.channels_last,
        compile=compute.compile,
    )
    prior = load(manifest.model)
    base = prior
    if style.model is not None and style.model != manifest.model:
        base = load(style.model, key="style.model")
        _check_family(prior, base, manifest.model.path, style.model.path)
    if not style.lora:
        return prior, base
    deltas = read_style(style, base)
    return prior, base.with_deltas(deltas.unet, deltas.text)


def _check_family(prior: Prior, style: Prior, path: str, style_path: str) -> None:
    """Both models see one latent: they must have the same latent space and the same noise schedule."""
    other = [
        f"{name} {its} instead of {ours}"
        for name, its, ours in (
            ("latent channels:", style.channels, prior.channels),
            ("pixels per latent entry:", style.factor, prior.factor),
        )
        if its != ours
    ]
    if not torch.allclose(style.schedule.abar, prior.schedule.abar, atol=1e-4):
        other.append("another noise schedule")
    if other:
        raise WeightsError(
            f"style.model: {style_path} does not go with {path} ({', '.join(other)}); choose models of one family"
        )
