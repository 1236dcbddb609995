"""The relevance map R: where the bare prior reacts to the style's words (paper, Eq. 4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def relevance_map(difference: Tensor, order: Literal["mean_abs", "abs_mean"], clip: float | None = None) -> Tensor:
    """R [B, 1, h, w] in [0, 1] of `e_real(z_t^src; y_edit) - e_real(z_t^src; null)` [B, C, h, w] (paper, Eq. 4).

    "abs_mean" is the paper's order, absolute value before the mean over channels; "mean_abs" the released code's.
    Values above the third quartile + `clip` interquartile ranges are clipped (arXiv 2308.08947). Every sample is
    normalized by its minimum and maximum. A constant map does not distinguish positions, and becomes ones.
    """
    reduced = difference.mean(1, keepdim=True).abs() if order == "mean_abs" else difference.abs().mean(1, keepdim=True)
    if clip is not None:
        first, third = (reduced.flatten(1).quantile(q, dim=1) for q in (0.25, 0.75))
        reduced = reduced.minimum((third + clip * (third - first)).view(-1, 1, 1, 1))
    low, high = reduced.amin((-2, -1), keepdim=True), reduced.amax((-2, -1), keepdim=True)
    return torch.where(high == low, 1.0, (reduced - low) / (high - low))
