"""Tests of the fake score: one LoRA per sample, each trained as in a batch of one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Fake, Model


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(Model(path=str(model)))


def ask(fake: FakeScore, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        return fake.prior.noise(z_t, t, text, fake.adapter(len(z_t)))


def test_the_fake_score_begins_as_the_prior(prior: Prior) -> None:
    fake = FakeScore(prior, Fake(), [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    z_t, t, text = torch.randn(4, 4, 8, 8), torch.tensor([21, 50, 21, 50]), prior.embed(["a", "b", "c", "d"])
    with torch.no_grad():
        torch.testing.assert_close(ask(fake, z_t, t, text), prior.noise(z_t, t, text))


def test_at_birth_factors_are_as_large_as_pefts(prior: Prior) -> None:
    """Initial up factors are zero; down factors are Kaiming-uniform (He et al. 2015) with peft's a = √5."""
    fake = FakeScore(prior, Fake(), [torch.Generator().manual_seed(seed) for seed in range(40)])
    layers, widths = prior.layers(), set()
    for name, factor in fake.factors.items():
        kind, _, layer = name.partition(".")
        if kind == "up":
            assert not factor.any()
            continue
        rank, width = factor.shape[1:]
        assert (rank, width) == (Fake().rank, layers[layer].weight.shape[1])
        bound = math.sqrt(2 / (1 + math.sqrt(5) ** 2)) * math.sqrt(3 / width)  # gain times √3 / √fan_in
        assert 0.99 * bound < factor.max() <= bound
        assert -bound <= factor.min() < -0.99 * bound
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        widths.add(width)
    assert len(widths) > 1, "one width alone would not show what the bound depends on"


def test_every_sample_trains_its_own_lora_and_leaves_the_prior_alone(prior: Prior) -> None:
    """Ten AdamW steps of a batch of three are compared to those of three fake scores of one sample each."""
    seeds, text = (1, 2, 3), prior.embed(["a fox", "a lake", ""])
    rng = torch.Generator().manual_seed(0)
    z, eps = torch.randn(3, 4, 8, 8, generator=rng), torch.randn(10, 3, 4, 8, 8, generator=rng)
    t = torch.randint(20, 500, (10, 3), generator=rng)
    before = [layer.weight.clone() for layer in prior.layers().values()]

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = FakeScore(prior, Fake(), generators(*seeds))
    losses = torch.stack([together.train_step(z, t[i], eps[i], text) for i in range(10)])
    probe_t = torch.tensor([100])
    for index, seed in enumerate(seeds):
        alone = FakeScore(prior, Fake(), generators(seed))
        row = slice(index, index + 1)
        own = torch.stack([alone.train_step(z[row], t[i, row], eps[i, row], text[row]) for i in range(10)])
        torch.testing.assert_close(losses[:, index], own[:, 0], rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            ours = ask(together, z, probe_t.repeat(3), text)[row]
            torch.testing.assert_close(ours, ask(alone, z[row], probe_t, text[row]), rtol=1e-4, atol=1e-4)
            assert (ours - prior.noise(z[row], probe_t, text[row])).abs().max() > 1e-3  # training had an effect
    for weight, layer in zip(before, prior.layers().values(), strict=True):
        assert torch.equal(weight, layer.weight)


@pytest.mark.parametrize("weight", ["alpha_bar", "one"])
def test_the_first_training_loss(prior: Prior, weight: str) -> None:
    fake = FakeScore(prior, Fake(weight=weight), [torch.Generator().manual_seed(0)])
    z, eps, t, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([300]), prior.embed(["a fox"])
    with torch.no_grad():
        e = prior.noise(prior.schedule.add_noise(z, t, eps), t, text)[0].double().numpy()
    target = eps[0].double().numpy()
    expected = oracles.fake_loss_paper(e, target) if weight == "one" else oracles.fake_loss_released(e, target, 300)
    assert fake.train_step(z, t, eps, text).item() == pytest.approx(expected, rel=1e-4)


def test_the_first_step_is_adamw(prior: Prior) -> None:
    """The up factor starts at zero and moves by the learning rate against its gradient's sign, as in the oracle."""
    fake = FakeScore(prior, Fake(learning_rate=0.01), [torch.Generator().manual_seed(0)])
    name = next(iter(fake._up))
    z, eps, t, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([300]), prior.embed(["a fox"])
    fake.add_gradient(fake.predict(z, t, eps, text), t, eps)
    assert fake._up[name].grad is not None
    gradient = fake._up[name].grad.clone()
    fake.update()
    start = np.zeros(gradient.shape)
    expected, _ = oracles.adamw_step(
        start, gradient.double().numpy(), oracles.adam_start(start), 0.01, weight_decay=0.0
    )
    np.testing.assert_allclose(fake._up[name].detach().numpy(), expected, atol=1e-6)


def test_the_layers_are_the_configuration_s(prior: Prior) -> None:
    names = set(FakeScore(prior, Fake(layers=("to_k", "to_out.0")), [torch.Generator()]).adapter(1).down)
    assert names == {name for name in prior.layers() if name.endswith((".to_k", ".to_out.0"))}


def test_under_v_prediction_the_error_is_of_v(v_model: Path) -> None:
    """As v = a eps - b z, an error of the noise counts 1 / a_t as much; the expected loss is written out in v."""
    prior = Prior.load(Model(path=str(v_model)))
    fake = FakeScore(prior, Fake(weight="one"), [torch.Generator().manual_seed(0)])
    z, eps, t, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([300]), prior.embed(["a fox"])
    abar = oracles.alphas_cumprod()[300]
    z_t = prior.schedule.add_noise(z, t, eps)
    with torch.no_grad():
        e = prior.noise(z_t, t, text)[0].double().numpy()
    v = (e - np.sqrt(1 - abar) * z_t[0].double().numpy()) / np.sqrt(abar)
    target = np.sqrt(abar) * eps[0].double().numpy() - np.sqrt(1 - abar) * z[0].double().numpy()
    assert fake.train_step(z, t, eps, text).item() == pytest.approx(float(((v - target) ** 2).mean()), rel=1e-4)


def test_half_precision_does_not_lose_the_gradients(model: Path) -> None:
    """A mean over a latent would let gradients underflow in fp16; with loss scaling they match those of fp32."""
    moved = {}
    for precision in ("fp32", "fp16"):
        prior = Prior.load(Model(path=str(model)), precision=precision)
        fake = FakeScore(prior, Fake(), [torch.Generator().manual_seed(0)])
        rng = torch.Generator().manual_seed(1)
        z, eps = (torch.randn(1, 4, 8, 8, generator=rng) for _ in range(2))
        t, found = torch.tensor([300]), []
        fake.add_gradient(fake.predict(z, t, eps, prior.embed(["a fox"])), t, eps)
        fake.update(found.extend)
        moved[precision] = torch.cat([gradient.flatten() for gradient in found if gradient.any()])
    assert moved["fp16"].dtype == torch.float32
    difference = (moved["fp16"] - moved["fp32"]).norm() / moved["fp32"].norm()
    assert 0 < difference < 0.02
