"""An independent implementation of the six objectives and of their distillation into a generator.

It is slow, takes one sample at a time, computes the objectives in float64 and follows the formulas directly.

Contract: no code is shared with `smsbatch`, so agreement between the two is evidence. Functions take and return plain
numpy arrays, except that the last two sections use torch tensors where gradients are needed; a latent is `[c, h, w]`.
"released" is the computation of the authors' code (without its bugs), "paper" that of arXiv 2503.07601. A direction is
G of section "directions", before the map R and the identity term. Timesteps are indices 0..999 into the schedule, as
in diffusers. The file exceeds 400 lines so that all formulas are in one place.

    z_t = a_t z + b_t eps        a_t = sqrt(abar_t), b_t = sqrt(1 - abar_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Preset = Literal["released", "paper"]
Score = Callable[[Array, int, str], Array]  # (z_t, t, "target" | "source" | "edit" | "null") -> predicted noise
Features = Callable[[Array, int, str], list[Array]]  # (z_t, t, words) -> [tokens, channels] of every layer

# ---------------------------------------------------------------------------------------------------- noise schedule


@cache
def betas(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Array:
    """Scaled-linear schedule of SD 1.x: beta_t = (sqrt(first) + t/(steps-1) (sqrt(last) - sqrt(first)))^2."""
    root = [math.sqrt(first) + t / (steps - 1) * (math.sqrt(last) - math.sqrt(first)) for t in range(steps)]
    return np.array([r * r for r in root])


@cache
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


def predicted_noise(v: Array, z_t: Array, t: int) -> Array:
    """The noise predicted by a v-prediction: with v = a eps - b z, eps = a v + b z_t."""
    abar = alphas_cumprod()[t]
    return np.asarray(math.sqrt(abar) * v + math.sqrt(1.0 - abar) * z_t)


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


def weight_one_minus_abar(t: int) -> float:
    """w_t = 1 - abar_t, DreamFusion's sigma_t^2."""
    return 1.0 - float(alphas_cumprod()[t])


def weight_dmd(t: int, z: Array, z_t: Array, e_target: Array) -> float:
    """DMD's scale-free weight: w = (b_t / a_t) / mean |z - x0_target|, x0_target = (z_t - b_t e_target) / a_t.

    So w (e_target - e_fake) = (x0_fake - x0_target) / mean |z - x0_target|.
    """
    abar = alphas_cumprod()[t]
    distance = float(np.mean(np.abs(z - predicted_clean(z_t, e_target, t))))
    return math.sqrt(1.0 - abar) / math.sqrt(abar) / distance


def weight_named(name: str, t: int, z: Array, z_t: Array, e_target: Array) -> float:
    """The weight by its name in the manifest; only DMD's depends on more than t."""
    if name == "dmd":
        return weight_dmd(t, z, z_t, e_target)
    constant = {"posterior_variance": weight_released, "one_minus_abar": weight_one_minus_abar, "one": weight_one}
    return constant[name](t)


# ------------------------------------------------------------------------------------------------- timestep sampling


def released_range(i: int, n: int) -> list[int]:
    """The timesteps from which iteration `i` of `n` draws uniformly.

    A grid of 500 of the 1000 timesteps with steps_offset 1 (1, 3, ..., 999), indices [10, floor(250 (1 - i/n))), never
    fewer than one index. The grid is fixed: only the narrowing scales with `n`. The bound is exact; the released code's
    floats fall just below an integer in 48 of 500 iterations and lose an index.
    """
    grid = [1 + 2 * k for k in range(500)]
    stop = max(math.floor(250 * (1 - Fraction(i, n))), 11)
    return grid[10:stop]


def paper_range(i: int, n: int, t_min: int = 20, t_max: int = 500) -> list[int]:
    """t ~ U(t_min, (1 - i/n) t_max), both ends included; only t_min once the upper end is below it."""
    upper = math.floor((1 - Fraction(i, n)) * t_max)
    return list(range(t_min, max(upper, t_min) + 1))


def whole_range(t_min: int, t_max: int, grid: int) -> list[int]:
    """The timesteps drawn without annealing: t_min..t_max, both included; on grid 2 the odd ones, without t_max."""
    return [t for t in range(t_min, t_max + 1) if grid == 1 or (t % 2 == 1 and t < t_max)]


def linear_timestep(i: int, n: int, t_min: int, t_max: int, grid: int) -> int:
    """The i-th of n equal steps from the whole range's last timestep down towards its first, floored to the grid."""
    whole = whole_range(t_min, t_max, grid)
    exact = whole[-1] - Fraction(i, n) * (whole[-1] - whole[0])
    return max(t for t in whole if t <= exact)


# ---------------------------------------------------------------------------------------------------- style gradient


def guided(e_null: Array, e_cond: Array, g: float) -> Array:
    """Classifier-free guidance: e^g = e_null + g (e_cond - e_null); g = 1 is no guidance."""
    return np.asarray(e_null + g * (e_cond - e_null))


def style_gradient(w: float, e_style: Array, e_fake: Array) -> Array:
    """Eq. 2: G = w_t (e_style - e_fake)."""
    return np.asarray(w * (e_style - e_fake))


def _minmax(x: Array) -> Array:
    """Scale the whole map of one sample to [0, 1]; a constant map becomes ones, as released."""
    low, high = float(x.min()), float(x.max())
    return np.ones_like(x) if high <= low else np.asarray((x - low) / (high - low))


def _clipped(x: Array, k: float | None) -> Array:
    """Clip at Q3 + k (Q3 - Q1), with the quartiles of one map by linear interpolation (Watch Your Steps, k = 1.5)."""
    if k is None:
        return x
    first, third = np.quantile(x, [0.25, 0.75])
    return np.minimum(x, third + k * (third - first))


def relevance_paper(e_edit: Array, e_null: Array, clip: float | None = None) -> Array:
    """Eq. 4, one map for all channels: R = minmax(mean_c |e_edit - e_null|). Returns [h, w]."""
    return _minmax(_clipped(np.abs(e_edit - e_null).mean(axis=0), clip))


def relevance_released(e_edit: Array, e_null: Array, clip: float | None = None) -> Array:
    """As released, R = minmax(|mean_c (e_edit - e_null)|): the mean comes first, so opposite channels cancel."""
    return _minmax(_clipped(np.abs((e_edit - e_null).mean(axis=0)), clip))


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


def low_pass_mask(h: int, w: int, t: int, t_max: int = 500, cutoff: float | None = None) -> Array:
    """One where i + j <= floor(thld (h + w - 2)), else zero; thld = t/t_max, or the exact decimal value of `cutoff`.

    With t/t_max the mask keeps every coefficient from t = t_max on, and only the mean at t = 0.
    """
    kept = Fraction(t, t_max) if cutoff is None else Fraction(str(cutoff))
    threshold = math.floor(kept * (h + w - 2))
    return np.array([[1.0 if i + j <= threshold else 0.0 for j in range(w)] for i in range(h)])


def _spectral_error(z: Array, z_src: Array, t: int, t_max: int, cutoff: float | None) -> Array:
    return np.asarray(low_pass_mask(*z.shape[1:], t, t_max, cutoff) * (dct2(z) - dct2(z_src)))


def spectral_loss_released(z: Array, z_src: Array, t: int, t_max: int = 500, cutoff: float | None = None) -> float:
    """As released: mean over ALL c h w entries, masked zeros too, of |mask (DCT z - DCT z_src)|."""
    return float(np.abs(_spectral_error(z, z_src, t, t_max, cutoff)).mean())


def spectral_loss_paper(z: Array, z_src: Array, t: int, t_max: int = 500, cutoff: float | None = None) -> float:
    """Eq. 3: || mask (DCT z - DCT z_src) ||_2^2, a sum."""
    return float((_spectral_error(z, z_src, t, t_max, cutoff) ** 2).sum())


def spectral_gradient_released(z: Array, z_src: Array, t: int, t_max: int = 500, cutoff: float | None = None) -> Array:
    """d/dz of `spectral_loss_released`: IDCT(sign(mask error)) / chw, as the DCT is orthonormal; sign(0) = 0."""
    return idct2(np.sign(_spectral_error(z, z_src, t, t_max, cutoff))) / z.size


def spectral_gradient_paper(z: Array, z_src: Array, t: int, t_max: int = 500, cutoff: float | None = None) -> Array:
    """d/dz of `spectral_loss_paper`: 2 IDCT(mask error)."""
    return 2.0 * idct2(_spectral_error(z, z_src, t, t_max, cutoff))


def mse_loss(z: Array, z_src: Array) -> float:
    """Identity loss that weights all entries of the latent equally: mean((z - z_src)^2)."""
    return float(((z - z_src) ** 2).mean())


def mse_gradient(z: Array, z_src: Array) -> Array:
    """d/dz of `mse_loss`."""
    return np.asarray(2.0 * (z - z_src) / z.size)


def finite_difference(f: Callable[[Array], float], z: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function, entry by entry: (f(z + h e_k) - f(z - h e_k)) / 2h."""
    gradient = np.zeros_like(z)
    for index in np.ndindex(*z.shape):
        plus, minus = z.copy(), z.copy()
        plus[index] += step
        minus[index] -= step
        gradient[index] = (f(plus) - f(minus)) / (2 * step)
    return gradient


# ---------------------------------------------------------------------------------------- fake score, AdamW, plain SGD


def fake_loss_released(e: Array, eps: Array, t: int) -> float:
    """mean((abar_t e - abar_t eps)^2) = abar_t^2 times the plain eps-MSE."""
    abar = alphas_cumprod()[t]
    return float(((abar * e - abar * eps) ** 2).mean())


def fake_loss_paper(e: Array, eps: Array) -> float:
    """Eq. 19: mean((e - eps)^2)."""
    return float(((e - eps) ** 2).mean())


def fake_loss_v(v: Array, z: Array, eps: Array, t: int) -> float:
    """The plain loss of a model that predicts v: mean((v - v*)^2), v* = a eps - b z; it equals the eps-MSE / a_t^2."""
    abar = alphas_cumprod()[t]
    return float(((v - (math.sqrt(abar) * eps - math.sqrt(1.0 - abar) * z)) ** 2).mean())


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


def sgd_step(x: Array, direction: Array, lr: float) -> Array:
    """x <- x - lr G, with G from section "directions", not divided by the number of entries."""
    return np.asarray(x - lr * direction)


def learning_rate(step: int, n: int = 500, peak: float = 0.1) -> float:
    """The released schedule of 500 steps, stretched to `n` steps: with s = 500 step / n,

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


# -------------------------------------------------------------------------------------------------------- directions


def _predicted(score: Score, z_t: Array, t: int, words: str, g: float) -> Array:
    return guided(score(z_t, t, "null"), score(z_t, t, words), g)


def vsd_direction(
    z: Array, t: int, eps: Array, style: Score, fake: Score, g: float, g_fake: float, weight: str
) -> Array:
    """VSD, and SMS before its map: G = w_t (e_style^g(z_t; y) - e_fake^g'(z_t; y))."""
    z_t = add_noise(z, eps, t)
    e_style, e_fake = _predicted(style, z_t, t, "target", g), _predicted(fake, z_t, t, "target", g_fake)
    return style_gradient(weight_named(weight, t, z, z_t, e_style), e_style, e_fake)


def sds_direction(z: Array, t: int, eps: Array, style: Score, g: float, weight: str) -> Array:
    """G = w_t (e^g(z_t; y) - eps)."""
    z_t = add_noise(z, eps, t)
    e = _predicted(style, z_t, t, "target", g)
    return np.asarray(weight_named(weight, t, z, z_t, e) * (e - eps))


def dds_direction(z: Array, z_src: Array, t: int, eps: Array, style: Score, g: float, weight: str) -> Array:
    """G = w_t (e^g(z_t; y) - e^g(z_t^src; y_src)), the same t and eps."""
    z_t = add_noise(z, eps, t)
    e = _predicted(style, z_t, t, "target", g)
    e_src = _predicted(style, add_noise(z_src, eps, t), t, "source", g)
    return np.asarray(weight_named(weight, t, z, z_t, e) * (e - e_src))


class Posterior(NamedTuple):
    """q(z_{t'} | z_t, x0) = N(c0 x0 + c1 z_t, sigma^2), and a' = a_{t'}, b' = b_{t'}."""

    a: float
    b: float
    c0: float
    c1: float
    sigma: float


def pds_posterior(t: int, consistent: bool = False) -> Posterior:
    """The posterior in the PDS authors' code: t' = t - 2, but beta_t and alpha_t = 1 - beta_t of a single step.

    With `consistent`, beta = 1 - abar_t / abar_{t'} covers both steps.
    """
    abar = alphas_cumprod()
    now, before = float(abar[t]), float(abar[t - 2])
    beta = 1.0 - now / before if consistent else float(betas()[t])
    c0, c1 = math.sqrt(before) * beta / (1 - now), math.sqrt(1 - beta) * (1 - before) / (1 - now)
    return Posterior(math.sqrt(before), math.sqrt(1 - before), c0, c1, math.sqrt(beta * (1 - before) / (1 - now)))


def pds_coefficients(t: int, consistent: bool = False) -> tuple[float, float]:
    """psi_t = (a' - c0 - c1 a_t) / sigma_t and chi_t = c0 b_t / (a_t sigma_t)."""
    posterior, abar = pds_posterior(t, consistent), float(alphas_cumprod()[t])
    psi = (posterior.a - posterior.c0 - posterior.c1 * math.sqrt(abar)) / posterior.sigma
    return psi, posterior.c0 * math.sqrt((1 - abar) / abar) / posterior.sigma


def pds_direction(z: Array, z_src: Array, t: int, eps: Array, style: Score, g: float) -> Array:
    """Closed form: G = psi_t (z - z_src) + chi_t (e^g(z_t; y) - e^g(z_t^src; y_src))."""
    psi, chi = pds_coefficients(t)
    return np.asarray(psi * (z - z_src) + chi * dds_direction(z, z_src, t, eps, style, g, "one"))


def pds_direction_long(
    z: Array, z_src: Array, t: int, eps: Array, eps_before: Array, style: Score, g: float, consistent: bool = False
) -> Array:
    """Definition: G = zt~ of the result - zt~ of the source, zt~ = (z_{t'} - mu(z_t, e^g)) / sigma_t.

    z_{t'} = a' z + b' eps' with a separate noise eps', and mu = c0 x0 + c1 z_t.
    """
    posterior = pds_posterior(t, consistent)

    def stochastic_latent(x: Array, words: str) -> Array:
        x_t = add_noise(x, eps, t)
        x0 = predicted_clean(x_t, _predicted(style, x_t, t, words, g), t)
        x_before = posterior.a * x + posterior.b * eps_before
        return np.asarray((x_before - posterior.c0 * x0 - posterior.c1 * x_t) / posterior.sigma)

    return np.asarray(stochastic_latent(z, "target") - stochastic_latent(z_src, "source"))


# ------------------------------------------------------------------------------------------- contrastive term of CDS


def patch_nce(
    source: Array, result: Array, size: tuple[int, int], patch: int, positions: list[int], tau: float = 0.07
) -> float:
    """One layer, one patch size: the mean over positions i of -log softmax_j(r_i . g_j / tau) at j = i.

    `source` and `result` [tokens, channels] are images of `size` (h, w), row by row. They are averaged over patches of
    patch x patch tokens (incomplete patches are dropped) and normalized to unit vectors r and g. As in the authors'
    code the source's patch i is the query and the result's patches are the keys; CUT (arXiv 2007.15651), the origin of
    the loss, exchanges the two.
    """
    h, w = size[0] // patch, size[1] // patch

    def unit_patches(tokens: Array) -> Array:
        image = tokens.reshape(*size, -1)[: h * patch, : w * patch]
        means = image.reshape(h, patch, w, patch, -1).mean(axis=(1, 3)).reshape(h * w, -1)[positions]
        return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12))

    similar = np.exp(unit_patches(source) @ unit_patches(result).T / tau)  # at most exp(1 / 0.07) = 1.6e6
    return float(-np.log(np.diagonal(similar) / similar.sum(axis=1)).mean())


def contrastive_loss(
    source: list[Array], result: list[Array], sizes: list[tuple[int, int]], positions: list[list[list[int]]]
) -> float:
    """`patch_nce` summed over layers and patch sizes 1 and 2; `positions[layer][0 or 1]` has at most 256 positions."""
    return sum(
        patch_nce(r, g, size, patch, chosen)
        for r, g, size, layer in zip(source, result, sizes, positions, strict=True)
        for patch, chosen in zip((1, 2), layer, strict=True)
    )


def contrastive_gradient(
    z: Array,
    z_src: Array,
    t: int,
    eps: Array,
    features: Features,
    sizes: list[tuple[int, int]],
    positions: list[list[list[int]]],
) -> Array:
    """d/dz of `contrastive_loss` by finite differences, with z_t = a_t z + b_t eps and constant source features."""
    source = features(add_noise(z_src, eps, t), t, "source")

    def loss(x: Array) -> float:
        return contrastive_loss(source, features(add_noise(x, eps, t), t, "target"), sizes, positions)

    return finite_difference(loss, z, 1e-5)


CDS_SCALE = 64**2 / 2000
"""The authors minimize 2000/(h w) L_dds + w_cut L_cut by SGD at 0.1. Divided by 2000/64^2, for 64 x 64, L_dds has the
gradient G of DDS, the learning rate is 0.0488, and L_cut comes with this factor."""


# ----------------------------------------------------------------------------------------------------- one iteration


class Iteration(NamedTuple):
    """All intermediate values of one iteration of one sample; the optimizer of z receives `gradient`."""

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
    paper: `guidance` is 1 (no CFG), w_t = 1 unless given, gradient = R G + lam d(L2); the losses are sums.
    """
    z_t, z_src_t = add_noise(z, eps, t), add_noise(z_src, eps, t)
    e_edit, e_null = e_real(z_src_t, t, "edit"), e_real(z_src_t, t, "null")
    if preset == "released":
        w = weight_released(t) if weight is None else weight
        relevance, spectral = relevance_released(e_edit, e_null), spectral_gradient_released(z, z_src, t)
        reduction = 1.0 / z.size
    else:
        w = weight_one(t) if weight is None else weight
        relevance, spectral = relevance_paper(e_edit, e_null), spectral_gradient_paper(z, z_src, t)
        reduction = 1.0
    style = style_gradient(
        w, _predicted(e_style, z_t, t, "target", guidance), _predicted(e_fake, z_t, t, "target", guidance)
    )
    return Iteration(style, relevance, spectral, reduction * relevance[None] * style + lam * spectral)


# --------------------------------------------------------------------------------------------------------- generator

Layer = tuple[Tensor, Tensor]  # weight [out, in, k, k] and bias [out] of a convolution


def generator(layers: Sequence[Layer], image: Tensor, restore: bool = False) -> Tensor:
    """CycleGAN's residual network with anti-aliased sampling; it takes and returns one image [3, H, W] in [0, 1].

    arXiv 1703.10593, appendix 7.2: c7s1-k, d2k, d4k, R4k ..., u2k, uk, c7s1-3, with InstanceNorm without affine
    parameters (epsilon 1e-5) and ReLU, no activation after a block's sum, and a final tanh; images are scaled to
    [-1, 1]. As in CUT (arXiv 2007.15651) every convolution has stride 1; each d is followed by the blur of arXiv
    1904.11486 at every second pixel, and each u is preceded by the corresponding upsampling. Padding is by reflection.
    Sides are padded at their ends to multiples of 4, and the result is cropped.

    `layers` are in the order of the network. With `restore` the tanh's output is normalized too, every channel gets the
    image's mean and standard deviation, and values outside [0, 1] are clamped.
    """
    head, down1, down2, *blocks, up1, up2, tail = layers
    height, width = image.shape[1:]
    x = _reflected(2 * image - 1, 0, -height % 4, 0, -width % 4)
    x = F.relu(_instance_norm(_convolved(x, head)))
    for layer in (down1, down2):
        x = _halved(F.relu(_instance_norm(_convolved(x, layer))))
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        y = F.relu(_instance_norm(_convolved(x, first)))
        x = x + _instance_norm(_convolved(y, second))
    for layer in (up1, up2):
        x = F.relu(_instance_norm(_convolved(_doubled(x), layer)))
    y = torch.tanh(_convolved(x, tail)[:, :height, :width])
    if not restore:
        return (y + 1) / 2
    mean = image.mean((1, 2), keepdim=True)
    deviation = torch.sqrt(((image - mean) ** 2).mean((1, 2), keepdim=True))
    return torch.clamp(_instance_norm(y) * deviation + mean, 0, 1)


def generator_parameters(width: int, blocks: int) -> int:
    """The number of parameters: k^2 in out weights and out biases of every convolution."""
    k = width
    shapes = [(3, k, 7), (k, 2 * k, 3), (2 * k, 4 * k, 3), *[(4 * k, 4 * k, 3)] * (2 * blocks)]
    shapes += [(4 * k, 2 * k, 3), (2 * k, k, 3), (k, 3, 7)]
    return sum(size**2 * inputs * outputs + outputs for inputs, outputs, size in shapes)


def _reflected(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Pad by reflection: ... 2 1 | 0 1 2 ... n-1 | n-2 n-3 ...; the edge itself is not repeated."""

    def mirror(length: int, before: int, after: int) -> list[int]:
        return [min(abs(i), 2 * (length - 1) - abs(i)) for i in range(-before, length + after)]

    return x[:, mirror(x.shape[1], top, bottom)][:, :, mirror(x.shape[2], left, right)]


def _convolved(x: Tensor, layer: Layer) -> Tensor:
    weight, bias = layer
    half = weight.shape[-1] // 2
    return F.conv2d(_reflected(x, half, half, half, half)[None], weight, bias)[0]


def _instance_norm(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5), with the mean and the biased variance of each channel's pixels."""
    centred = x - x.mean((1, 2), keepdim=True)
    return centred / torch.sqrt((centred**2).mean((1, 2), keepdim=True) + 1e-5)


def _halved(x: Tensor) -> Tensor:
    """y[i, j] = sum_kl f_k f_l x[2i + k, 2j + l], k, l in -1, 0, 1, f = [1, 2, 1] / 4."""
    padded, (height, width), f = _reflected(x, 1, 1, 1, 1), x.shape[1:], (0.25, 0.5, 0.25)
    rows = sum(f[k] * padded[:, k : k + height : 2] for k in range(3))
    return torch.as_tensor(sum(f[k] * rows[:, :, k : k + width : 2] for k in range(3)))


def _doubled(x: Tensor) -> Tensor:
    """Zeros between the pixels, then the filter [1, 3, 3, 1] / 4 along both axes; padding repeats the edge."""

    def along(x: Tensor) -> Tensor:  # the first spatial axis
        before, after = torch.cat([x[:, :1], x[:, :-1]], 1), torch.cat([x[:, 1:], x[:, -1:]], 1)
        return torch.stack([(before + 3 * x) / 4, (3 * x + after) / 4], 2).flatten(1, 2)

    return along(along(x).mT).mT


# ------------------------------------------------------------------------------------------------------ distillation


def generator_gradient(
    parameters: Sequence[Tensor],
    latents: Sequence[Callable[[], Tensor]],
    draws: Sequence[Sequence[tuple[int, Array]]],
    gradient: Callable[[int, Array, int, Array], Array],
) -> list[Tensor]:
    """The gradient of the generator's parameters, computed naively: each (t, eps) of each image separately.

    d/dtheta of <sg[g], E(G_theta(x))>, the surrogate whose slope in z is g: a sum over a latent's entries, a mean over
    images and their draws (paper, section 4: one image with B times its own t and eps).

    Args:
        latents: for every image a function that computes z = E(G(x)) [c, h, w] with its graph.
        draws: the pairs (t, eps) of every image.
        gradient: a function of (index of the image, z, t, eps) that returns g [c, h, w], not divided by c h w.
    """
    count = sum(len(of_image) for of_image in draws)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for number, (latent, of_image) in enumerate(zip(latents, draws, strict=True)):
        for t, eps in of_image:
            z = latent()
            g = torch.from_numpy(gradient(number, z.detach().double().numpy(), t, eps)).to(z.dtype)
            found = torch.autograd.grad((g * z).sum(), list(parameters), allow_unused=True)
            for sum_, one in zip(total, found, strict=True):
                if one is not None:
                    sum_ += one / count
    return total


def shared_lora_gradient(
    predict: Callable[[int, Mapping[str, Tensor]], Tensor],
    rows: Sequence[tuple[Tensor, float]],
    down: Mapping[str, Array],
    up: Mapping[str, Array],
    scale: float,
) -> tuple[float, dict[str, Array], dict[str, Array]]:
    """Loss and gradients by layer of one LoRA for all rows: mean over rows of mean((factor (e - eps))^2).

    Args:
        predict: a function of the row's index and the difference of each layer's weight, scale up @ down; returns e.
        rows: the target eps and the factor of every row.
        down: [r, in] by layer.
        up: [out, r] by layer.
    """
    downs = {name: torch.from_numpy(value).float().requires_grad_() for name, value in down.items()}
    ups = {name: torch.from_numpy(value).float().requires_grad_() for name, value in up.items()}
    loss = torch.zeros(())
    for number, (target, factor) in enumerate(rows):
        deltas = {name: scale * (ups[name] @ downs[name]) for name in downs}
        loss = loss + (factor * (predict(number, deltas) - target)).square().mean() / len(rows)
    found = torch.autograd.grad(loss, [*downs.values(), *ups.values()])
    arrays = [gradient.double().numpy() for gradient in found]
    names, count = list(downs), len(downs)
    return (
        float(loss.detach()),
        dict(zip(names, arrays[:count], strict=True)),
        dict(zip(names, arrays[count:], strict=True)),
    )


def running_average(average: Array, x: Array, decay: float) -> Array:
    """average <- decay average + (1 - decay) x, after every step."""
    return np.asarray(decay * average + (1 - decay) * x)


def decaying_rate(step: int, n: int, peak: float, decay: float) -> float:
    """`peak`, then a linear decrease over the last fraction `decay` of the `n` steps, which reaches zero at step n."""
    left = Fraction(n - step, n)
    return peak * float(min(Fraction(1), left / Fraction(str(decay)))) if decay else peak
