"""The mathematics of SMS a second time: slow, one sample at a time, float64, straight from the formulas.

Contract: nothing here is shared with `smsbatch`, so an agreement between the two is evidence. Every function takes and
returns plain numpy arrays; a latent is `[c, h, w]`. "released" is what the authors' code computes (without its bugs),
"paper" what arXiv 2503.07601 writes. Timesteps are indices 0..999 into the schedule, as in diffusers.

    z_t = a_t z + b_t eps        a_t = sqrt(abar_t), b_t = sqrt(1 - abar_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Preset = Literal["released", "paper"]
Score = Callable[[Array, int, str], Array]  # (z_t, t, "cond" | "null" | "edit") -> predicted noise

# ---------------------------------------------------------------------------------------------------- noise schedule


def betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Array:
    """Scaled-linear schedule of SD 1.x: beta_t = (sqrt(first) + t/(steps-1) (sqrt(last) - sqrt(first)))^2."""
    root = [math.sqrt(first) + t / (steps - 1) * (math.sqrt(last) - math.sqrt(first)) for t in range(steps)]
    return np.array([r * r for r in root])


def alphas_cumprod(steps: int = 1000) -> Array:
    """abar_t = prod_{s <= t} (1 - beta_s)."""
    product, result = 1.0, []
    for beta in betas(steps):
        product *= 1.0 - float(beta)
        result.append(product)
    return np.array(result)


def add_noise(z: Array, eps: Array, t: int) -> Array:
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps."""
    abar = alphas_cumprod()[t]
    return np.asarray(math.sqrt(abar) * z + math.sqrt(1.0 - abar) * eps)


def predicted_clean(z_t: Array, e: Array, t: int) -> Array:
    """x0 = (z_t - b_t e) / a_t."""
    abar = alphas_cumprod()[t]
    return np.asarray((z_t - math.sqrt(1.0 - abar) * e) / math.sqrt(abar))


# ----------------------------------------------------------------------------------------------------------- weights


def weight_released(t: int) -> float:
    """betatilde_t = beta_t (1 - abar_{t'}) / (1 - abar_t): a two-step t' = t - 2 with the one-step beta_t."""
    if t < 2:
        raise ValueError(f"t = {t} has no timestep two before it")
    abar = alphas_cumprod()
    return float(betas()[t] * (1.0 - abar[t - 2]) / (1.0 - abar[t]))


def weight_one(t: int) -> float:
    """w_t = 1."""
    return 1.0


def weight_dmd(t: int, z: Array, z_t: Array, e_target: Array) -> float:
    """DMD's scale-free weight: w = (b_t / a_t) / mean |z - x0_target|, x0_target = (z_t - b_t e_target) / a_t.

    So w (e_target - e_fake) = (x0_fake - x0_target) / mean |z - x0_target|.
    """
    abar = alphas_cumprod()[t]
    distance = float(np.mean(np.abs(z - predicted_clean(z_t, e_target, t))))
    return math.sqrt(1.0 - abar) / math.sqrt(abar) / distance


# ------------------------------------------------------------------------------------------------- timestep sampling


def released_range(i: int, n: int) -> list[int]:
    """Timesteps that iteration `i` of `n` draws from, uniformly.

    A grid of 500 of the 1000 timesteps with steps_offset 1 (1, 3, ..., 999), indices [10, floor(250 (1 - i/n))), never
    fewer than one index. The grid is fixed: only the narrowing scales with `n`. Exact, where the released floats put a
    product just below an integer at times (48 of 500 iterations) and lose an index.
    """
    grid = [1 + 2 * k for k in range(500)]
    stop = max(math.floor(250 * (1 - Fraction(i, n))), 11)
    return grid[10:stop]


def paper_range(i: int, n: int, t_min: int = 20, t_max: int = 500) -> list[int]:
    """t ~ U(t_min, (1 - i/n) t_max), both ends included; t_min alone once the upper end has fallen below it."""
    upper = math.floor((1 - Fraction(i, n)) * t_max)
    return list(range(t_min, max(upper, t_min) + 1))


# ---------------------------------------------------------------------------------------------------- style gradient


def guided(e_null: Array, e_cond: Array, g: float) -> Array:
    """Classifier-free guidance: e^g = e_null + g (e_cond - e_null); g = 1 is no guidance."""
    return np.asarray(e_null + g * (e_cond - e_null))


def style_gradient(w: float, e_style: Array, e_fake: Array) -> Array:
    """Eq. 2: G = w_t (e_style - e_fake)."""
    return np.asarray(w * (e_style - e_fake))


def _minmax(x: Array) -> Array:
    """To [0, 1] over the whole map of one sample. A constant map says nothing about where: ones (as released)."""
    low, high = float(x.min()), float(x.max())
    return np.ones_like(x) if high <= low else np.asarray((x - low) / (high - low))


def relevance_paper(e_edit: Array, e_null: Array) -> Array:
    """Eq. 4, one map for all channels: R = minmax(mean_c |e_edit - e_null|). Returns [h, w]."""
    return _minmax(np.abs(e_edit - e_null).mean(axis=0))


def relevance_released(e_edit: Array, e_null: Array) -> Array:
    """As released the mean comes first, so opposite channels cancel: R = minmax(|mean_c (e_edit - e_null)|)."""
    return _minmax(np.abs((e_edit - e_null).mean(axis=0)))


# ---------------------------------------------------------------------------------------------------------- spectrum


def _cosine(u: int, n: int) -> Array:
    """Row u of the orthonormal DCT-II: s_u cos(pi (2x + 1) u / 2n), s_0 = sqrt(1/n), else sqrt(2/n)."""
    scale = math.sqrt((1.0 if u == 0 else 2.0) / n)
    return np.array([scale * math.cos(math.pi * (2 * x + 1) * u / (2 * n)) for x in range(n)])


def dct2(x: Array) -> Array:
    """Orthonormal two-dimensional DCT-II per channel: X[c,u,v] = sum_ij x[c,i,j] row_u[i] row_v[j]."""
    c, h, w = x.shape
    out = np.zeros((c, h, w))
    for u in range(h):
        for v in range(w):
            out[:, u, v] = (x * np.outer(_cosine(u, h), _cosine(v, w))).sum(axis=(1, 2))
    return out


def idct2(x: Array) -> Array:
    """Inverse, and transpose, of `dct2`: x[c,i,j] = sum_uv X[c,u,v] row_u[i] row_v[j]."""
    c, h, w = x.shape
    out = np.zeros((c, h, w))
    for u in range(h):
        for v in range(w):
            out += x[:, u, v][:, None, None] * np.outer(_cosine(u, h), _cosine(v, w))
    return out


def low_pass_mask(h: int, w: int, t: int) -> Array:
    """One where i + j <= floor(t/500 (h + w - 2)), else zero: everything from t = 500 on, only the mean at t = 0."""
    threshold = math.floor(Fraction(t, 500) * (h + w - 2))
    return np.array([[1.0 if i + j <= threshold else 0.0 for j in range(w)] for i in range(h)])


def _spectral_error(z: Array, z_src: Array, t: int) -> Array:
    return np.asarray(low_pass_mask(*z.shape[1:], t) * (dct2(z) - dct2(z_src)))


def spectral_loss_released(z: Array, z_src: Array, t: int) -> float:
    """As released: mean over ALL c h w entries, masked zeros too, of |mask (DCT z - DCT z_src)|."""
    return float(np.abs(_spectral_error(z, z_src, t)).mean())


def spectral_loss_paper(z: Array, z_src: Array, t: int) -> float:
    """Eq. 3: || mask (DCT z - DCT z_src) ||_2^2, a sum."""
    return float((_spectral_error(z, z_src, t) ** 2).sum())


def spectral_gradient_released(z: Array, z_src: Array, t: int) -> Array:
    """d/dz of `spectral_loss_released`: IDCT(sign(mask error)) / chw, for the DCT is orthonormal. sign(0) = 0."""
    return idct2(np.sign(_spectral_error(z, z_src, t))) / z.size


def spectral_gradient_paper(z: Array, z_src: Array, t: int) -> Array:
    """d/dz of `spectral_loss_paper`: 2 IDCT(mask error)."""
    return 2.0 * idct2(_spectral_error(z, z_src, t))


def finite_difference(f: Callable[[Array], float], z: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function, entry by entry: (f(z + h e_k) - f(z - h e_k)) / 2h."""
    gradient = np.zeros_like(z)
    for index in np.ndindex(*z.shape):
        plus, minus = z.copy(), z.copy()
        plus[index] += step
        minus[index] -= step
        gradient[index] = (f(plus) - f(minus)) / (2 * step)
    return gradient


# --------------------------------------------------------------------------------------------------- fake score, AdamW


def fake_loss_released(e: Array, eps: Array, t: int) -> float:
    """mean((abar_t e - abar_t eps)^2) = abar_t^2 times the plain eps-MSE."""
    abar = alphas_cumprod()[t]
    return float(((abar * e - abar * eps) ** 2).mean())


def fake_loss_paper(e: Array, eps: Array) -> float:
    """Eq. 19: mean((e - eps)^2)."""
    return float(((e - eps) ** 2).mean())


class AdamState(NamedTuple):
    m: Array
    v: Array
    step: int


def adam_start(x: Array) -> AdamState:
    return AdamState(np.zeros_like(x), np.zeros_like(x), 0)


def adamw_step(
    x: Array,
    gradient: Array,
    state: AdamState,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Array, AdamState]:
    """Decoupled weight decay (Loshchilov & Hutter), element by element.

    x <- (1 - lr wd) x;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  x <- x - lr mhat / (sqrt(vhat) + epsilon)
    """
    step = state.step + 1
    m = beta1 * state.m + (1 - beta1) * gradient
    v = beta2 * state.v + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    x = (1 - lr * weight_decay) * x - lr * m_hat / (np.sqrt(v_hat) + epsilon)
    return x, AdamState(m, v, step)


def learning_rate(step: int, n: int = 500, peak: float = 0.1) -> float:
    """The released schedule, its 500 steps stretched to `n`: with s = 500 step / n,

    s < 100: peak s/100 (step 0 moves nothing);  else peak (1 + cos(pi (s-100)/(750-100))) / 2, cut at s = 500.
    """
    s = 500 * step / n
    if s < 100:
        return peak * s / 100
    return peak * 0.5 * (1 + math.cos(math.pi * (s - 100) / 650))


# -------------------------------------------------------------------------------------------------------------- LoRA


def lora_delta(down: Array, up: Array, alpha: float | None = None, scale: float = 1.0) -> Array:
    """Kohya LoRA and LoCon: Delta W = scale (alpha / r) up @ down; alpha absent or 0 means r.

    Linear: down [r, in], up [out, r] -> [out, in].
    Convolution: down [r, in, k, k], up [out, r, 1, 1] -> [out, in, k, k].
    """
    rank = down.shape[0]
    factor = scale * ((alpha / rank) if alpha else 1.0)
    delta = np.zeros((up.shape[0], *down.shape[1:]))
    for o in range(up.shape[0]):
        for r in range(rank):
            delta[o] += factor * float(up[o, r].reshape(())) * down[r]
    return delta


# ----------------------------------------------------------------------------------------------------- one iteration


class Iteration(NamedTuple):
    """Every intermediate of one iteration for one sample; `gradient` is what the optimizer of z receives."""

    style: Array  # G = w_t (e_style - e_fake), before the relevance map
    relevance: Array  # [h, w] in [0, 1]
    spectral: Array  # d/dz of the spectral loss, without lambda
    gradient: Array


def sms_iteration(
    preset: Preset,
    z: Array,
    z_src: Array,
    t: int,
    eps: Array,
    e_style: Score,
    e_fake: Score,
    e_real: Score,
    lam: float,
    guidance: float = 1.0,
    weight: float | None = None,
) -> Iteration:
    """One SMS gradient on z (Eq. 2-6), the same t and eps for z and z_src.

    released: CFG with `guidance` on style and fake, w_t = betatilde_t unless `weight` is given, relevance as released;
        loss = mean(1/2 (z - sg[z - R G])^2) + lam L1, so gradient = R G / chw + lam d(L1).
    paper: `guidance` is 1 (no CFG), w_t = 1 unless given, gradient = R G + lam d(L2), all of it sums.
    """
    z_t, z_src_t = add_noise(z, eps, t), add_noise(z_src, eps, t)

    def predicted(score: Score) -> Array:
        return guided(score(z_t, t, "null"), score(z_t, t, "cond"), guidance)

    e_edit, e_null = e_real(z_src_t, t, "edit"), e_real(z_src_t, t, "null")
    if preset == "released":
        w = weight_released(t) if weight is None else weight
        relevance, spectral = relevance_released(e_edit, e_null), spectral_gradient_released(z, z_src, t)
        reduction = 1.0 / z.size
    else:
        w = weight_one(t) if weight is None else weight
        relevance, spectral = relevance_paper(e_edit, e_null), spectral_gradient_paper(z, z_src, t)
        reduction = 1.0
    style = style_gradient(w, predicted(e_style), predicted(e_fake))
    return Iteration(style, relevance, spectral, reduction * relevance[None] * style + lam * spectral)
