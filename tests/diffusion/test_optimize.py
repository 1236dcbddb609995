"""The loop: step by step against the oracle, and exact in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import oracles
import pytest
import torch
from models import PROMPTS
from torch import Tensor

from smsbatch.diffusion.lora import FakeScore, read_style_lora
from smsbatch.diffusion.objectives import Texts
from smsbatch.diffusion.optimize import learning_rate, optimize
from smsbatch.diffusion.prior import Prior
from smsbatch.diffusion.timesteps import allowed, draw
from smsbatch.manifest import Objective


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(str(model))


@pytest.fixture(scope="module")
def style(prior: Prior, lora: Path) -> Prior:
    return prior.with_deltas(read_style_lora(str(lora), prior.layers()))


@pytest.fixture(scope="module")
def texts(prior: Prior) -> Texts:
    edit = prior.embed(["Turn into paint"] * len(PROMPTS))
    return Texts(prior.embed(PROMPTS), edit, prior.embed([""] * len(PROMPTS)))


def rows(texts: Texts, indices: list[int]) -> Texts:
    return Texts(texts.target[indices], texts.edit[indices], texts.null[indices])


def latents(size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(len(PROMPTS), 4, *size, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("steps", [1, 30, 500])
def test_learning_rate(steps: int) -> None:
    config = Objective(steps=steps)
    ours = [learning_rate(step, config) for step in range(steps)]
    np.testing.assert_allclose(ours, [oracles.learning_rate(step, steps) for step in range(steps)], rtol=1e-9)


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_the_loop_step_by_step(prior: Prior, style: Prior, texts: Texts, preset: Literal["released", "paper"]) -> None:
    """The same draws, the scores as black boxes, and everything else done by the oracle in float64."""
    steps = 12
    config = Objective(preset=preset, steps=steps)
    z_src = latents((8, 6))[:1]
    ours = optimize(prior, style, z_src, rows(texts, [0]), [5], config)

    generator = torch.Generator().manual_seed(5)
    fake = FakeScore(prior, config.fake, [generator])
    words = {"cond": texts.target[:1], "edit": texts.edit[:1], "null": texts.null[:1]}

    def as_oracle(score: Any) -> oracles.Score:
        def call(z_t: Any, t: int, word: str) -> Any:
            with torch.no_grad():
                row = torch.tensor(z_t[None], dtype=torch.float32)
                return score(row, torch.tensor([t]), words[word])[0].double().numpy()

        return call

    source = z_src[0].double().numpy()
    z, state = source.copy(), oracles.adam_start(source)
    for step in range(steps):
        t = draw(allowed(step, steps, t_min=20, t_max=500, grid=config.grid), generator)
        eps = torch.randn(z.shape, generator=generator)
        gradient = oracles.sms_iteration(
            preset,
            z,
            source,
            t,
            eps.double().numpy(),
            as_oracle(style.noise),
            as_oracle(fake),
            as_oracle(prior.noise),
            lam=5e-4,
            guidance=4.5 if preset == "released" else 1.0,
            weight=oracles.weight_released(t),
        ).gradient
        before = z
        z, state = oracles.adamw_step(
            z, gradient / (1 if preset == "released" else z.size), state, oracles.learning_rate(step, steps)
        )
        t_fake = draw(allowed(0, steps, t_min=20, t_max=500, grid=config.grid), generator)
        eps_fake = torch.randn(z.shape, generator=generator)
        trained_on = torch.tensor(z if preset == "released" else before, dtype=torch.float32)
        fake.train_step(trained_on[None], torch.tensor([t_fake]), eps_fake[None], words["cond"])
    moved = np.abs(z - source).max()
    assert moved > 0.1
    # Adam divides by the gradient's size, so entries whose gradient is rounding move by rounding's sign: compare most.
    difference = np.abs(ours[0].double().numpy() - z)
    assert np.quantile(difference, 0.99) < 0.01 * moved


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_a_batch_is_its_samples_alone(
    prior: Prior, style: Prior, texts: Texts, preset: Literal["released", "paper"]
) -> None:
    """Batch 4 against batch 1, 50 steps, different prompts and seeds: equal within the rounding of the kernels."""
    config, seeds = Objective(preset=preset, steps=50), [11, 12, 13, 14]
    z_src = latents()
    together = optimize(prior, style, z_src, texts, seeds, config)
    for i in range(4):
        alone = optimize(prior, style, z_src[i : i + 1], rows(texts, [i]), [seeds[i]], config)
        difference = (together[i] - alone[0]).abs()
        assert difference.mean() < 2e-3
        assert (together[i] - z_src[i]).abs().mean() > 0.1  # it went somewhere


def test_the_same_batch_gives_the_same_bytes(prior: Prior, style: Prior, texts: Texts) -> None:
    config = Objective(steps=5)
    first = optimize(prior, style, latents(), texts, [1, 2, 3, 4], config)
    torch.manual_seed(123)  # global random state is not looked at
    assert torch.equal(first, optimize(prior, style, latents(), texts, [1, 2, 3, 4], config))


def test_a_sample_that_is_not_finite_does_not_touch_its_neighbours(prior: Prior, style: Prior, texts: Texts) -> None:
    config, z_src = Objective(steps=5), latents()
    healthy = optimize(prior, style, z_src, texts, [1, 2, 3, 4], config)
    z_src[1, 0, 0, 0] = float("nan")
    ill = optimize(prior, style, z_src, texts, [1, 2, 3, 4], config)
    assert not ill[1].isfinite().all()
    assert torch.equal(ill[[0, 2, 3]], healthy[[0, 2, 3]])


def test_progress_and_trace(prior: Prior, style: Prior, texts: Texts) -> None:
    steps: list[int] = []
    losses: list[tuple[int, Tensor, Tensor]] = []
    optimize(
        prior,
        style,
        latents(),
        texts,
        [1, 2, 3, 4],
        Objective(steps=3),
        steps.append,
        lambda step, loss, fake: losses.append((step, loss, fake)),
    )
    assert steps == [1, 2, 3]
    assert [step for step, _, _ in losses] == [0, 1, 2]
    assert all(loss.shape == fake.shape == (4,) for _, loss, fake in losses)


def test_seeds_matter(prior: Prior, style: Prior, texts: Texts) -> None:
    config = Objective(steps=3)
    first = optimize(prior, style, latents(), texts, [1, 2, 3, 4], config)
    second = optimize(prior, style, latents(), texts, [1, 9, 3, 4], config)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[[0, 2, 3]], second[[0, 2, 3]])
