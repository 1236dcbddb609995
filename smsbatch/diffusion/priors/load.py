"""The two models of a manifest: the bare prior, and that of the style."""

from __future__ import annotations

from functools import partial

import torch

from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.errors import WeightsError
from smsbatch.manifest import Styled


def load_models(manifest: Styled, device: str) -> tuple[Prior, Prior]:
    """The bare prior and the style's, which is the same one where there is neither a LoRA nor another checkpoint.

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
    """Raise WeightsError unless both models have the same latents and noise schedule, since both score one latent."""
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
