"""Progressive spectrum regularization (paper, section 3.3): keep the source's low frequencies, fewer at less noise.

Everything is in closed form: the orthonormal DCT-II is two matrix products, so its gradient is its transpose.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

_ROUNDING = 1e-5  # of a coefficient in float32; latents are of order 1


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [n, n], float32: `D @ x` transforms columns, `D.T` is the inverse."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def low_pass(h: int, w: int, t: Tensor, t_max: int, cutoff: Literal["progressive"] | float = "progressive") -> Tensor:
    """LPF(., thld(t)) as a mask [B, 1, h, w]: coefficient (i, j) stays when `i + j <= thld (h + w - 2)`.

    thld is t / t_max, or `cutoff` whatever the timestep. Height and width enter separately: the released code takes the
    width for both and fails on landscape images.
    """
    order = torch.arange(h, device=t.device)[:, None] + torch.arange(w, device=t.device)
    if cutoff == "progressive":
        highest = t * (h + w - 2) // t_max
    else:  # 0.58 of 50 is 29, not 28.999999
        highest = torch.full_like(t, int(cutoff * (h + w - 2) + 1e-9))
    return order <= highest.view(-1, 1, 1, 1)


class SpectralPenalty:
    """L_freq(z, t) against one batch of sources (paper, Eq. 3) and its gradient.

    `norm` "l1" is the released code's mean of absolute differences, masked coefficients counted as zeros; "l2" the
    paper's squared norm. Both are returned per latent entry, i.e. times 1/(C h w), as the style gradient is.

    Args:
        z_src: source latents [B, C, h, w].
    """

    def __init__(
        self,
        z_src: Tensor,
        *,
        norm: Literal["l1", "l2"],
        t_max: int,
        cutoff: Literal["progressive"] | float = "progressive",
    ) -> None:
        self.rows, self.columns = (dct_matrix(n).to(z_src.device) for n in z_src.shape[-2:])
        self.source = self.transform(z_src)
        self.norm, self.t_max, self.cutoff = norm, t_max, cutoff

    def transform(self, z: Tensor) -> Tensor:
        """DCT of every channel, shape of `z`."""
        return self.rows @ z @ self.columns.T

    def gradient(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(gradient [B, C, h, w], loss [B])` at latents `z` [B, C, h, w] and timesteps `t` [B]."""
        entries = z[0].numel()
        kept = low_pass(z.shape[-2], z.shape[-1], t, self.t_max, self.cutoff)
        difference = (self.transform(z) - self.source) * kept
        # Rounding errors count as zero: with l1 their sign, which differs by batch, would fully pull an unmoved entry.
        difference = torch.where(difference.abs() < _ROUNDING, 0.0, difference)
        if self.norm == "l1":
            loss, outer = difference.abs(), difference.sign()
        else:
            loss, outer = difference.square(), 2 * difference
        return self.rows.T @ outer @ self.columns / entries, loss.flatten(1).sum(1) / entries
