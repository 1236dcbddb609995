"""Style LoRA files and the fake score's LoRA per sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file

from smsbatch.diffusion.lora import FakeScore, read_style_lora
from smsbatch.diffusion.prior import Prior
from smsbatch.errors import WeightsError
from smsbatch.manifest import Fake


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(str(model))


def test_deltas_are_alpha_over_rank_up_down(prior: Prior, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora)
    keys = sorted({key.partition(".")[0] for key in tensors})
    del tensors[f"{keys[0]}.alpha"]
    tensors[f"{keys[1]}.alpha"] = torch.tensor(0.0)
    tensors[f"{keys[2]}.alpha"] = torch.tensor(7.0)
    file = tmp_path / "other.safetensors"
    save_file(tensors, file)
    deltas = read_style_lora(str(file), prior.layers())
    assert len(deltas) == len(keys)
    assert {delta.ndim for delta in deltas.values()} == {2, 4}
    for name, delta in deltas.items():
        key = "lora_unet_" + name.replace(".", "_")
        alpha = tensors[f"{key}.alpha"].item() if f"{key}.alpha" in tensors else None
        down, up = (tensors[f"{key}.lora_{part}.weight"].double().numpy() for part in ("down", "up"))
        np.testing.assert_allclose(delta.numpy(), oracles.lora_delta(down, up, alpha), atol=1e-5)


def test_the_styled_prior_is_the_prior_plus_deltas(prior: Prior, lora: Path) -> None:
    deltas = read_style_lora(str(lora), prior.layers())
    before = {name: layer.weight.clone() for name, layer in prior.layers().items()}
    styled = prior.with_deltas(deltas)
    for name, layer in styled.layers().items():
        expected = before[name] + deltas[name] if name in deltas else before[name]
        torch.testing.assert_close(layer.weight.data, expected.data)
        torch.testing.assert_close(prior.layers()[name].weight.data, before[name].data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, "no layer for lora_unet_x"),
        ({"lora_unet_x.hada_w1_a": torch.ones(1, 1)}, "lora_unet_x.hada_w1_a"),
        ({"something": torch.ones(1)}, "something"),
        ("drop up", "lacks lora_up.weight"),
        ("wrong shape", "does not fit"),
        ("transposed", "does not fit"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_name(
    prior: Prior, lora: Path, tmp_path: Path, change: dict[str, torch.Tensor] | str, words: str
) -> None:
    tensors = load_file(lora)
    up = next(key for key in tensors if key.endswith("lora_up.weight"))
    if change == "drop up":
        del tensors[up]
    elif change == "wrong shape":
        tensors[up] = torch.ones(3, 2)
    elif change == "transposed":  # as many entries, another layer
        pairs = [(key, key.replace("lora_up", "lora_down")) for key in tensors if key.endswith("to_k.lora_up.weight")]
        up, down = next(pair for pair in pairs if tensors[pair[0]].shape[0] != tensors[pair[1]].shape[1])
        tensors[up], tensors[down] = tensors[down].T.contiguous(), tensors[up].T.contiguous()
    elif isinstance(change, dict):
        tensors |= change
    file = tmp_path / "bad.safetensors"
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"bad\.safetensors") as caught:
        read_style_lora(str(file), prior.layers())
    assert words in str(caught.value)


def test_a_missing_or_damaged_file_is_refused(prior: Prior, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_style_lora(str(tmp_path / "none.safetensors"), prior.layers())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a header")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        read_style_lora(str(damaged), prior.layers())


def test_text_encoder_parts_are_left_out(prior: Prior, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora) | {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(1.0)}
    file = tmp_path / "te.safetensors"
    save_file(tensors, file)
    assert read_style_lora(str(file), prior.layers()).keys() == read_style_lora(str(lora), prior.layers()).keys()


def test_the_fake_score_begins_as_the_prior(prior: Prior) -> None:
    fake = FakeScore(prior, Fake(), [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    z_t, t, text = torch.randn(4, 4, 8, 8), torch.tensor([21, 50, 21, 50]), prior.embed(["a", "b", "c", "d"])
    with torch.no_grad():
        torch.testing.assert_close(fake(z_t, t, text), prior.noise(z_t, t, text))


def test_every_sample_trains_its_own_lora_and_leaves_the_prior_alone(prior: Prior) -> None:
    """A batch of three, ten AdamW steps, against three fake scores of one sample."""
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
            ours = together(z, probe_t.repeat(3), text)[row]
            torch.testing.assert_close(ours, alone(z[row], probe_t, text[row]), rtol=1e-4, atol=1e-4)
            assert (ours - prior.noise(z[row], probe_t, text[row])).abs().max() > 1e-3  # it did learn something
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
    """From zero, the up factor moves by the learning rate against its gradient's sign; the oracle does the same."""
    fake = FakeScore(prior, Fake(learning_rate=0.01), [torch.Generator().manual_seed(0)])
    name = next(iter(fake._up))
    z, eps, t, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([300]), prior.embed(["a fox"])
    fake.train_step(z, t, eps, text)
    gradient = fake._up[name].grad
    assert gradient is not None
    start = np.zeros(gradient.shape)
    expected, _ = oracles.adamw_step(
        start, gradient.double().numpy(), oracles.adam_start(start), 0.01, weight_decay=0.0
    )
    np.testing.assert_allclose(fake._up[name].detach().numpy(), expected, atol=1e-6)
