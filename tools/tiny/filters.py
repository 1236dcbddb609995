"""Procedural style filters: the training data of the style LoRAs, and the oracle of their evaluation.

Each takes a uint8 [h, w, 3] picture of about 128 px and a generator, and returns one of the same shape. Lengths are
pixels at that size. A style is a grade (palette and tone, easy to learn), a drawing (flat regions, lines, strokes along
the picture's own structure) and a ground (paper or canvas).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray
from scipy.ndimage import gaussian_filter, map_coordinates, sobel, uniform_filter

LUMA = np.array([0.299, 0.587, 0.114])


def oil(picture: ndarray, rng: np.random.Generator) -> ndarray:
    """Oil painting: colour dragged along the forms in long strokes with ridges of paint, deep warm colours."""
    x = picture / 255.0
    angle = tangent(x, rng, wander=0.02)
    paint = along(gaussian_filter(x, (0.6, 0.6, 0)), angle, 5)
    paint = paint + 0.9 * (paint - gaussian_filter(paint, (1.8, 1.8, 0)))  # strokes meet with hard edges
    bristles = unit(along(gaussian_filter(noise(x, rng), 0.7)[..., None], angle, 6))
    ridges = gaussian_filter(bristles[..., 0], 0.5)
    light = unit(sobel(ridges, 0) + sobel(ridges, 1))[..., None]
    graded = saturate(contrast(paint.clip(0, 1), 1.15), 1.35) * [1.05, 0.98, 0.84] + [0.03, 0.014, -0.005]
    return finish(graded * (1 + 0.055 * bristles) + 0.035 * light)


def watercolor(picture: ndarray, rng: np.random.Generator) -> ndarray:
    """Watercolour: flat bright washes that pool darkly at their borders, blotched and granulated, on white paper."""
    x = wobble(picture / 255.0, rng, 1.2, 4)
    wash = 0.85 * kuwahara(x, 2) + 0.15 * x
    border = np.hypot(*(sobel(gaussian_filter(wash @ LUMA, 0.6), axis) for axis in (0, 1)))[..., None]
    pigment = 1 - saturate(0.06 + 0.94 * wash.clip(0, 1) ** 0.78, 1.3)  # how much white the pigment takes away
    blotches, grain = (unit(gaussian_filter(noise(x, rng), scale))[..., None] for scale in (3, 1))
    pigment = pigment * (1 + 0.2 * blotches + 0.1 * grain) + 0.5 * border.clip(0, 0.8)
    return finish([0.995, 0.985, 0.955] - pigment)


def sketch(picture: ndarray, rng: np.random.Generator) -> ndarray:
    """Coloured pencil sketch: dark contours and shading in diagonal strokes of coloured pencil, on white paper."""
    x = wobble(picture / 255.0, rng, 0.4, 4)
    luma = (x @ LUMA)[..., None]
    smooth = gaussian_filter(luma[..., 0], 0.7)
    edge = np.hypot(sobel(smooth, 0), sobel(smooth, 1))[..., None]
    lines = ((gaussian_filter(luma, (1.6, 1.6, 0)) - luma - 0.01).clip(0) * 3 + 0.14 * edge).clip(0, 0.6)
    hatch = unit(along(gaussian_filter(noise(x, rng), 0.6)[..., None], np.full(x.shape[:2], -0.8), 7))
    colour = 0.87 * (1 - saturate(x, 0.95).clip(0, 1)) * (1 + 0.15 * hatch) + 0.03 * hatch * (1 - luma)
    return finish([0.985, 0.98, 0.965] - colour.clip(0, 1) - 0.9 * lines * luma.clip(0.35, 1))


FILTERS: dict[str, Callable[[ndarray, np.random.Generator], ndarray]] = {
    "oil": oil,
    "sketch": sketch,
    "watercolor": watercolor,
}
PROMPTS = {"oil": "oil painting style", "sketch": "pencil sketch style", "watercolor": "watercolor style"}


def noise(like: ndarray, rng: np.random.Generator) -> ndarray:
    return rng.standard_normal(like.shape[:2])


def unit(x: ndarray) -> ndarray:
    """Zero mean, unit deviation, without outliers."""
    return ((x - x.mean()) / (x.std() + 1e-6)).clip(-2.5, 2.5)


def finish(x: ndarray) -> ndarray:
    return (x.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def saturate(x: ndarray, factor: float) -> ndarray:
    grey = (x @ LUMA)[..., None]
    return grey + factor * (x - grey)


def contrast(x: ndarray, factor: float) -> ndarray:
    """An S-curve through 0, 1/2 and 1."""
    return 0.5 + np.tanh(factor * (x - 0.5) * 2) / np.tanh(factor) / 2


def tangent(x: ndarray, rng: np.random.Generator, wander: float) -> ndarray:
    """Direction of least change at every pixel (structure tensor); where nothing changes, a slowly turning field."""
    luma = x @ LUMA
    gy, gx = sobel(luma, 0), sobel(luma, 1)
    xx, yy, xy = (gaussian_filter(g, 2.0) for g in (gx * gx, gy * gy, gx * gy))
    turn = unit(gaussian_filter(noise(x, rng), 14)) * 0.8
    return 0.5 * np.arctan2(2 * xy + wander * np.sin(turn), xx - yy + wander * np.cos(turn)) + np.pi / 2


def along(x: ndarray, angle: ndarray, length: int) -> ndarray:
    """Average [h, w, c] over `length` pixels to both sides along the direction field (line integral convolution)."""
    h, w = angle.shape
    rows, columns = np.mgrid[0:h, 0:w].astype(float)
    total, weight = x.astype(float).copy(), 1.0
    for sign in (-1, 1):
        r, c, dr, dc = rows, columns, sign * np.sin(angle), sign * np.cos(angle)
        for i in range(1, length + 1):
            r, c = r + dr, c + dc
            ri, ci = np.clip(np.rint(r).astype(int), 0, h - 1), np.clip(np.rint(c).astype(int), 0, w - 1)
            ndr, ndc = np.sin(angle[ri, ci]), np.cos(angle[ri, ci])
            flip = np.where(ndr * dr + ndc * dc < 0, -1.0, 1.0)  # a direction has no sign: keep going forward
            dr, dc = flip * ndr, flip * ndc
            g = 1 - i / (length + 1)
            total += g * x[ri, ci]
            weight += g
    return total / weight


def wobble(x: ndarray, rng: np.random.Generator, amplitude: float, scale: float) -> ndarray:
    """Shift every pixel by a smooth random field: hand-drawn lines are not straight."""
    h, w = x.shape[:2]
    shift = [amplitude * unit(gaussian_filter(rng.standard_normal((h, w)), scale)) for _ in range(2)]
    where = np.mgrid[0:h, 0:w] + np.stack(shift) * 0.6
    return np.stack([map_coordinates(x[..., k], where, order=1, mode="reflect") for k in range(x.shape[2])], axis=-1)


def kuwahara(x: ndarray, radius: int) -> ndarray:
    """The mean of whichever neighbouring square varies least: flat regions with sharp borders."""
    h, w = x.shape[:2]
    x = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    size = radius + 1
    mean = uniform_filter(x, (size, size, 1))
    spread = uniform_filter((x * x) @ LUMA, size) - uniform_filter(x @ LUMA, size) ** 2
    sides = (radius // 2, radius + radius // 2)
    corners = [np.s_[r : r + h, c : c + w] for r in sides for c in sides]
    means = np.stack([mean[corner] for corner in corners])
    weights = 1 / (1e-5 + np.stack([spread[corner] for corner in corners]).clip(0)) ** 4
    weights /= weights.sum(0)
    return (weights[..., None] * means).sum(0)
