"""One SMS gradient against the formulas, with arbitrary functions in place of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from smsbatch.diffusion.objectives import SMS, Scores, Texts, guided, relevance_map
from smsbatch.diffusion.timesteps import Schedule
from smsbatch.manifest import Objective

SCHEDULE = Schedule(torch.tensor(oracles.alphas_cumprod(), dtype=torch.float32))
WORDS = {"null": 0.0, "cond": 1.0, "edit": 2.0}  # a "text" is a number in these tests
Array = Any


def pretend(phase: float) -> Callable[[Array, int, str], Array]:
    """A smooth function of everything a score may depend on, in float64."""

    def score(z_t: Array, t: int, word: str) -> Array:
        mixed = np.roll(z_t, 1, axis=-1) + 0.3 * z_t[::-1]
        return np.sin(mixed + phase + 0.01 * t) + WORDS[word] * np.cos(2 * z_t + phase)

    return score


def as_score(function: Callable[[Array, int, str], Array]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same for a batch of tensors: row by row through the function."""
    names = {number: name for name, number in WORDS.items()}

    def score(z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        rows = [
            function(row.double().numpy(), int(time), names[word.flatten()[0].item()])
            for row, time, word in zip(z_t, t, text, strict=True)
        ]
        return torch.tensor(np.stack(rows), dtype=torch.float32)

    return score


@pytest.mark.parametrize("preset", ["released", "paper"])
@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 5, 9)])
def test_gradient(preset: Literal["released", "paper"], shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    timesteps = [21, 133, 480]
    z, z_src, eps = (rng.normal(size=(3, *shape)) for _ in range(3))
    style, fake, real = pretend(0.1), pretend(0.7), pretend(1.9)
    config = Objective(preset=preset)
    texts = Texts(*(torch.full((3, 2, 5), WORDS[word]) for word in ("cond", "edit", "null")))
    objective = SMS(config, SCHEDULE, torch.tensor(z_src, dtype=torch.float32), texts)
    gradient, loss = objective.gradient(
        torch.tensor(z, dtype=torch.float32),
        torch.tensor(timesteps),
        torch.tensor(eps, dtype=torch.float32),
        Scores(as_score(style), as_score(fake), as_score(real)),
    )
    for i, t in enumerate(timesteps):
        expected = oracles.sms_iteration(
            preset,
            z[i],
            z_src[i],
            t,
            eps[i],
            style,
            fake,
            real,
            lam=config.spectral_weight,
            guidance=config.guidance,
            weight=oracles.weight_released(t),  # the paper leaves w_t open; both presets take the released one
        ).gradient
        if preset == "paper":
            expected = expected / z[i].size  # ours is per entry, the paper's a sum
        np.testing.assert_allclose(gradient[i].numpy(), expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())
    assert loss.shape == (3,)
    assert bool((loss > 0).all())


@pytest.mark.parametrize(
    ("order", "oracle"), [("mean_abs", oracles.relevance_released), ("abs_mean", oracles.relevance_paper)]
)
def test_relevance_map(order: Literal["mean_abs", "abs_mean"], oracle: Callable[[Array, Array], Array]) -> None:
    rng = np.random.default_rng(4)
    e_edit, e_null = rng.normal(size=(3, 4, 5, 7)), rng.normal(size=(3, 4, 5, 7))
    e_edit[2] = e_null[2] + 1.0  # a constant map
    ours = relevance_map(torch.tensor(e_edit - e_null), order)
    assert ours.shape == (3, 1, 5, 7)
    for i in range(3):
        np.testing.assert_allclose(ours[i, 0].numpy()[:], oracle(e_edit[i], e_null[i]), atol=1e-6)


def test_relevance_map_off_leaves_the_gradient_whole() -> None:
    rng = np.random.default_rng(5)
    z = torch.tensor(rng.normal(size=(1, 4, 5, 5)), dtype=torch.float32)
    t, texts = torch.tensor([101]), Texts(*(torch.full((1, 2, 5), WORDS[word]) for word in ("cond", "edit", "null")))

    def never(*_: Tensor) -> Tensor:
        raise AssertionError("the real score is not needed")

    scores = Scores(as_score(pretend(0.1)), as_score(pretend(0.7)), never)
    config = Objective(relevance="off", spectral_weight=0, guidance=1, fake_guidance=1)
    gradient, _ = SMS(config, SCHEDULE, z, texts).gradient(z, t, torch.zeros_like(z), scores)
    z_t = oracles.add_noise(z[0].double().numpy(), np.zeros((4, 5, 5)), 101)
    expected = oracles.style_gradient(
        oracles.weight_released(101), pretend(0.1)(z_t, 101, "cond"), pretend(0.7)(z_t, 101, "cond")
    )
    np.testing.assert_allclose(gradient[0].numpy() * z.numel(), expected, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("g", [1.0, 2.0, 4.5])
def test_guidance(g: float) -> None:
    calls: list[int] = []

    def score(z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        calls.append(len(z_t))
        return z_t * text[:, :1, :1, None]

    z_t, ones = torch.randn(2, 4, 3, 3), torch.ones(2, 1, 1)
    ours = guided(score, z_t, torch.tensor([5, 6]), 3 * ones, ones, g)
    np.testing.assert_allclose(
        ours.numpy(), oracles.guided(z_t.double().numpy(), 3 * z_t.double().numpy(), g), rtol=1e-5
    )
    assert calls == [2 if g == 1 else 4]  # without guidance the null rows are not paid for
