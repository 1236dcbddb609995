"""Tests of the optimization loop: step by step against the oracle, and independent of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import oracles
import pytest
import torch
from support.models import PROMPTS
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.objectives import OBJECTIVES
from smsbatch.diffusion.optimize import learning_rate, optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.timesteps import allowed, draw
from smsbatch.manifest import Model, Objective, Prompts, Style


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(Model(path=str(model)))


@pytest.fixture(scope="module")
def style(prior: Prior, lora: Path) -> Prior:
    return styled(prior, lora)


def styled(prior: Prior, lora: Path) -> Prior:
    deltas = read_style(Style(lora=str(lora), scale=1.0, prompt="paint"), prior)
    return prior.with_deltas(deltas.unet, deltas.text)


WORDS = [Prompts(f"paint, {prompt}", prompt, "Turn into paint") for prompt in PROMPTS]
SEEDS = [11, 12, 13, 14]


def latents(size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(len(PROMPTS), 4, *size, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("steps", [1, 30, 500])
def test_learning_rate(steps: int) -> None:
    config = Objective(steps=steps)
    ours = [learning_rate(step, config) for step in range(steps)]
    np.testing.assert_allclose(ours, [oracles.learning_rate(step, steps) for step in range(steps)], rtol=1e-9)


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_the_loop_step_by_step(
    prior: Prior, style: Prior, preset: Literal["released", "paper"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle repeats the loop in float64 with the same draws; the two share only the score models."""
    made: list[FakeScore] = []

    def kept(*rest: Any) -> FakeScore:
        made.append(FakeScore(*rest))
        return made[-1]

    monkeypatch.setattr("smsbatch.diffusion.optimize.FakeScore", kept)
    steps = 12
    config = Objective(preset=preset, steps=steps)
    z_src = latents((8, 6))[:1]
    ours = optimize(prior, style, z_src, WORDS[:1], [5], config).z

    generator = torch.Generator().manual_seed(5)
    fake = FakeScore(prior, config.fake, [generator])
    born = [factor.detach().clone() for factor in fake.factors.values()]
    words = {"target": prior.embed([WORDS[0].target]), "edit": prior.embed([WORDS[0].edit]), "null": prior.embed([""])}

    def fake_noise(z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return prior.noise(z_t, t, text, fake.adapter(1))

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
            as_oracle(fake_noise),
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
        fake.train_step(trained_on[None], torch.tensor([t_fake]), eps_fake[None], words["target"])
    moved = np.abs(z - source).max()
    assert moved > 0.1
    # Adam normalizes gradients, so an entry with only rounding error for a gradient moves by its sign: compare 99 %.
    difference = np.abs(ours[0].double().numpy() - z)
    assert np.quantile(difference, 0.99) < 0.01 * moved
    # The latent on which the fake is trained changes its factors by a tenth of their movement, but z very little.
    (trained,) = made
    at_birth, at_the_end, expected = (
        torch.cat([factor.detach().flatten() for factor in factors])
        for factors in (born, trained.factors.values(), fake.factors.values())
    )
    assert (at_the_end - expected).norm() < 1e-3 * (expected - at_birth).norm()


MODES: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {"preset": "paper"},
    "fast": {"preset": "fast"},
    **{name: {"name": name, "learning_rate": 0.05, "optimizer": "adamw"} for name in OBJECTIVES if name != "sms"},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_samples_alone(prior: Prior, style: Prior, mode: str) -> None:
    """Batch 4 and batch 1, with different prompts and seeds, agree within the rounding of the kernels."""
    config = Objective.model_validate(MODES[mode] | {"steps": 50 if mode == "released" else 15})
    assert_alone_as_together(prior, style, config, mean=2e-4)


def test_a_batch_is_its_samples_alone_without_a_lora(prior: Prior) -> None:
    """At first gradients are only rounding errors, whose sign the L1 norm must not turn into full steps."""
    assert_alone_as_together(prior, prior, Objective(steps=20), mean=2e-4)


@pytest.mark.parametrize(("precision", "mean"), [("bf16", 0.02), ("fp16", 0.02)])
def test_in_half_precision_rounding_is_coarser(
    model: Path, lora: Path, precision: Literal["bf16", "fp16"], mean: float
) -> None:
    prior = Prior.load(Model(path=str(model)), precision=precision)
    style = styled(prior, lora)
    assert_alone_as_together(prior, style, Objective(steps=10), mean=mean)
    assert optimize(prior, style, latents(), WORDS, SEEDS, Objective(steps=1)).z.dtype == torch.float32


@pytest.mark.parametrize("pair", ["v v", "v epsilon", "epsilon v"])
def test_models_that_predict_v_and_mixed_ones(prior: Prior, v_model: Path, pair: str) -> None:
    """The bare prior and the style's model each have their own prediction type and text encoder."""
    priors = {"epsilon": prior, "v": Prior.load(Model(path=str(v_model)))}
    base, other = (priors[name] for name in pair.split())
    assert_alone_as_together(base, other, Objective(steps=10), mean=2e-4)


def assert_alone_as_together(prior: Prior, style: Prior, config: Objective, mean: float) -> None:
    together = optimize(prior, style, z_src := latents(), WORDS, SEEDS, config).z
    for i in (0, 3):
        alone = optimize(prior, style, z_src[i : i + 1], WORDS[i : i + 1], SEEDS[i : i + 1], config).z
        assert (together[i] - alone[0]).abs().mean() < mean
        assert (together[i] - z_src[i]).abs().mean() > max(0.02, 3 * mean)  # the latent has moved


def test_the_same_batch_gives_the_same_bytes(prior: Prior, style: Prior) -> None:
    config = Objective(steps=5)
    first = optimize(prior, style, latents(), WORDS, SEEDS, config).z
    torch.manual_seed(123)  # the global random state is not used
    assert torch.equal(first, optimize(prior, style, latents(), WORDS, SEEDS, config).z)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_is_not_finite_does_not_touch_its_neighbours(prior: Prior, style: Prior, mode: str) -> None:
    config, z_src = Objective.model_validate(MODES[mode] | {"steps": 4}), latents()
    healthy = optimize(prior, style, z_src, WORDS, SEEDS, config).z
    z_src[1, 0, 0, 0] = float("nan")
    ill = optimize(prior, style, z_src, WORDS, SEEDS, config).z
    assert not ill[1].isfinite().all()
    assert torch.equal(ill[[0, 2, 3]], healthy[[0, 2, 3]])


def test_equal_samples_stay_equal(prior: Prior, style: Prior) -> None:
    """Identical samples keep separate LoRAs: one picture four times in a batch gives the result of a batch of one."""
    config, z_src = Objective(steps=10), latents()[:1].expand(4, -1, -1, -1)
    together = optimize(prior, style, z_src, WORDS[:1] * 4, [7] * 4, config).z
    alone = optimize(prior, style, z_src[:1], WORDS[:1], [7], config).z
    for row in together:
        assert (row - alone[0]).abs().mean() < 1e-3


def test_a_stalled_sample_stops_and_its_neighbour_does_not_mind(prior: Prior, style: Prior) -> None:
    """The threshold is between the samples' movements: some stop after 20 steps, others after 30, each as if alone."""
    config = Objective(steps=40, warmup=0, horizon=1)
    stopping = Objective(steps=40, warmup=0, horizon=1, stall=0.2)
    whole = optimize(prior, style, latents(), WORDS, SEEDS, config)
    early = optimize(prior, style, latents(), WORDS, SEEDS, stopping)
    assert whole.steps.tolist() == [40] * 4
    assert sorted(set(early.steps.tolist())) == [20, 30]
    for i in range(4):
        alone = optimize(prior, style, latents()[i : i + 1], WORDS[i : i + 1], SEEDS[i : i + 1], stopping)
        assert alone.steps.item() == early.steps[i].item()
        assert (alone.z[0] - early.z[i]).abs().mean() < 2e-3


def calls_of(prior: Prior, monkeypatch: pytest.MonkeyPatch, config: Objective, style: Prior) -> list[int]:
    """The number of rows of every UNet call in a run of one sample."""
    rows: list[int] = []
    original = Prior.noise

    def counting(self: Prior, z_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(z_t))
        return original(self, z_t, *args, **kwargs)

    monkeypatch.setattr(Prior, "noise", counting)
    optimize(prior, style, latents()[:1], WORDS[:1], [1], config)
    return rows


@pytest.mark.parametrize(
    ("changes", "first", "each"),
    [
        ({}, [], [2, 4, 1]),  # style; fake and real; the fake's training
        ({"guidance": 1, "fake_guidance": 1}, [], [1, 3, 1]),
        ({"fake_guidance": 1}, [], [2, 3, 1]),
        ({"relevance": "off"}, [], [2, 2, 1]),
        ({"relevance_grid": 3}, [2, 2, 2], [2, 2, 1]),
        ({"guidance": 1, "fake_guidance": 1, "relevance_grid": 2, "fake": {"trains_on": "forward"}}, [2, 2], [1, 1]),
        ({"preset": "paper"}, [], [1, 3, 1]),
        ({"name": "vsd"}, [], [2, 1, 1]),
        ({"name": "sds"}, [], [2]),
        ({"name": "dds"}, [], [4]),
        ({"name": "pds"}, [], [4]),
        ({"name": "cds"}, [], [4]),  # and the calls for its features, which do not use `noise`
    ],
)
def test_what_is_paid_for(
    prior: Prior,
    style: Prior,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    first: list[int],
    each: list[int],
) -> None:
    """The table of docs/method.md: rows of the UNet calls before the first iteration and in each of three."""
    config = Objective.model_validate({"steps": 3} | changes)
    rows = calls_of(prior, monkeypatch, config, style)
    assert rows[: len(first)] == first
    iterations = [rows[len(first) + i * len(each) :][: len(each)] for i in range(3)]
    assert [sorted(rows) for rows in iterations] == [sorted(each)] * 3
    assert len(rows) == len(first) + 3 * len(each)


def test_progress_and_trace(prior: Prior, style: Prior) -> None:
    steps: list[int] = []
    losses: list[tuple[int, Tensor, Tensor]] = []

    def trace(step: int, loss: Tensor, fake: Tensor) -> None:
        losses.append((step, loss, fake))

    optimize(prior, style, latents(), WORDS, SEEDS, Objective(steps=3), steps.append, trace)
    assert steps == [1, 2, 3]
    assert [step for step, _, _ in losses] == [0, 1, 2]
    assert all(loss.shape == fake.shape == (4,) for _, loss, fake in losses)


def test_seeds_matter(prior: Prior, style: Prior) -> None:
    config = Objective(steps=3)
    first = optimize(prior, style, latents(), WORDS, [1, 2, 3, 4], config).z
    second = optimize(prior, style, latents(), WORDS, [1, 9, 3, 4], config).z
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[[0, 2, 3]], second[[0, 2, 3]])


def test_sgd_steps_by_the_gradient_itself(prior: Prior, style: Prior) -> None:
    """One step of DDS moves the latent by the learning rate times G, for any size of the latent."""
    for size in ((8, 8), (8, 12)):
        z_src = latents(size)[:1]
        config = Objective(name="dds", steps=1, prompt="{caption}", source_prompt="{style}", learning_rate=0.1)
        moved = optimize(prior, style, z_src, [Prompts("a", "b", "c")], [3], config).z - z_src
        generator = torch.Generator().manual_seed(3)
        t = torch.tensor([draw(allowed(0, 1, t_min=50, t_max=948, grid=1), generator)])
        z_t = prior.schedule.add_noise(z_src, t, torch.randn(z_src.shape[1:], generator=generator)[None])
        with torch.no_grad():
            e_null, e_a, e_b = style.noise(z_t.repeat(3, 1, 1, 1), t.repeat(3), style.embed(["", "a", "b"])).chunk(3)
        torch.testing.assert_close(moved, -0.1 * 7.5 * (e_a - e_b), rtol=1e-3, atol=1e-5)
        assert e_null.shape == e_a.shape


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_reads_nothing_from_the_device(model: Path, lora: Path, mode: str) -> None:
    """On the meta device, which has shapes but no values, reading a value fails; on a GPU it would wait."""
    prior = Prior.load(Model(path=str(model)), device="meta")
    config = Objective.model_validate(MODES[mode] | {"steps": 2})
    result = optimize(prior, prior.with_deltas({}, {}), latents().to("meta"), WORDS, SEEDS, config)
    assert result.z.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.z.sum().item()
