"""Tests that predictions requested together equal separate ones, each by its own model and text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.scores import Ask, ScoreModels
from smsbatch.manifest import Fake, Model, Prompts, Style

PROMPTS = [Prompts("oil, a fox", "a fox", "Turn into oil"), Prompts("oil, a lake", "", "Turn into oil")]
T = torch.tensor([120, 300])


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(Model(path=str(model)))


@pytest.fixture(scope="module")
def style(prior: Prior, lora: Path) -> Prior:
    """A style that also changes the text encoder."""
    generator = torch.Generator().manual_seed(4)
    text = {
        f"{name}.weight": 0.1 * torch.randn(layer.weight.shape, generator=generator)
        for name, layer in prior.text_layers().items()
        if name.endswith("fc1")
    }
    assert text
    return prior.with_deltas(read_style(Style(lora=(str(lora),), prompt="oil"), prior).unet, text)


@pytest.fixture(scope="module")
def fake(prior: Prior) -> FakeScore:
    """A trained fake score, because a new one equals the prior."""
    fake = FakeScore(prior, Fake(learning_rate=0.02), [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    z, eps = points()
    for _ in range(3):
        fake.train_step(z, T, eps, prior.embed([p.target for p in PROMPTS]))
    return fake


def points() -> tuple[Tensor, Tensor]:
    z, z_src = torch.randn(2, 2, 4, 8, 6, generator=torch.Generator().manual_seed(3))
    return z, z_src


@pytest.mark.parametrize("with_lora", [True, False], ids=["with the style LoRA", "without"])
@pytest.mark.parametrize("g", [1.0, 4.5])
@pytest.mark.parametrize("graph", [False, True])
def test_together_is_one_by_one(
    prior: Prior, style: Prior, fake: FakeScore, with_lora: bool, g: float, graph: bool
) -> None:
    used = style if with_lora else prior
    z, z_src = points()
    asked = [
        Ask("style", z, "target", g),
        Ask("fake", z, "target", g),
        Ask("style", z_src, "source", g),
        Ask("real", z_src, "edit"),
        Ask("real", z_src, "null"),
    ]
    models = ScoreModels(prior, used, fake, PROMPTS, graph=graph)
    answers = models(T, *asked)
    words = {
        "target": [p.target for p in PROMPTS],
        "source": [p.source for p in PROMPTS],
        "edit": [p.edit for p in PROMPTS],
        "null": ["", ""],
    }
    different = []
    for ask, answer in zip(asked, answers, strict=True):
        own = used if ask.model == "style" else prior
        adapter = fake.adapter(2) if ask.model == "fake" else None
        with torch.no_grad():
            e, e_null = (own.noise(ask.z_t, T, own.embed(words[key]), adapter) for key in (ask.words, "null"))
        torch.testing.assert_close(answer, e_null + ask.guidance * (e - e_null), rtol=1e-4, atol=1e-4)
        assert not answer.requires_grad
        different.append(answer)
    apart = [float((different[0] - different[1]).abs().max()), float((different[3] - different[4]).abs().max())]
    assert min(apart) > 1e-2, "models and words matter"
    if graph:
        assert models.fake_prediction is not None
        assert models.fake_prediction.requires_grad
    else:
        assert models.fake_prediction is None


def test_each_model_reads_the_words_with_its_own_text_encoder(prior: Prior, style: Prior, fake: FakeScore) -> None:
    models = ScoreModels(prior, style, fake, PROMPTS)
    target = [p.target for p in PROMPTS]
    torch.testing.assert_close(models.text("style", "target"), style.embed(target))
    torch.testing.assert_close(models.text("real", "target"), prior.embed(target))
    torch.testing.assert_close(models.text("fake", "target"), prior.embed(target))
    assert (models.text("style", "target") - models.text("real", "target")).abs().max() > 1e-3


def test_features_are_those_of_the_model_with_gradients_to_where_it_is_asked(
    prior: Prior, style: Prior, fake: FakeScore
) -> None:
    models, z = ScoreModels(prior, style, fake, PROMPTS), points()[0].requires_grad_()
    found = models.features("style", z, T, "target")
    expected = style.features(z, T, style.embed([p.target for p in PROMPTS]))
    bare = prior.features(z, T, prior.embed([p.target for p in PROMPTS]))
    assert len(found) == len(expected) > 1
    for ours, theirs, other in zip(found, expected, bare, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert (ours - other).abs().max() > 1e-3
    (slope,) = torch.autograd.grad(sum(layer[0].sum() for layer in found), z)
    assert slope[0].abs().max() > 0
    assert not slope[1].any(), "of its own sample alone"
