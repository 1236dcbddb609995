"""Tests of loading a model from a folder or a single file, and of calling it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import save_single_file
from torch import Tensor

from smsbatch.diffusion.priors.adapter import Adapter
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.errors import WeightsError
from smsbatch.manifest import Model

LAYERS = ("to_q", "to_v")


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(str(model))


def inputs(prior: Prior, n: int, seed: int = 0, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_t = torch.randn(n, prior.channels, side, side, generator=generator)
    return z_t, torch.randint(20, 980, (n,), generator=generator), torch.randn(n, 16, 16, generator=generator)


def adapter(prior: Prior, samples: int, rows: int, seed: int = 0, layers: tuple[str, ...] = LAYERS) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: layer.weight.shape for name, layer in prior.layers().items() if name.endswith(layers)}
    down = {name: torch.randn(samples, 3, shape[1], generator=generator) for name, shape in shapes.items()}
    up = {name: torch.randn(samples, shape[0], 3, generator=generator) for name, shape in shapes.items()}
    return Adapter(0.1, down, up, rows)


@pytest.mark.parametrize("kind", ["model", "v_model"])
def test_it_is_what_diffusers_makes_of_the_folder(kind: str, request: pytest.FixtureRequest) -> None:
    from diffusers import StableDiffusionPipeline

    folder: Path = request.getfixturevalue(kind)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    prior = Prior.load(str(folder))
    tokens = pipeline.tokenizer(["a fox"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = prior.embed(["a fox"])
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([77])
    with torch.no_grad():
        torch.testing.assert_close(text, pipeline.text_encoder(tokens)[0])
        noise, predicted = prior.noise(z, t, text), pipeline.unet(z, t, text).sample
    if kind == "v_model":  # v = a eps - b x0, so that with z = a x0 + b eps: eps = a v + b z
        abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[77]
        predicted = torch.tensor(
            abar**0.5 * predicted.double().numpy() + (1 - abar) ** 0.5 * z.double().numpy()
        ).float()
    torch.testing.assert_close(noise, predicted)
    assert prior.prediction == pipeline.scheduler.config.prediction_type
    torch.testing.assert_close(prior.schedule.abar, pipeline.scheduler.alphas_cumprod)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(prior.encode(images), expected)


@pytest.mark.parametrize("kind", ["model", "v_model"])
def test_a_single_file_is_the_folder(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(kind)
    file = save_single_file(tmp_path / "checkpoint.safetensors", folder)
    prior, single = Prior.load(str(folder)), Prior.load(Model(path=str(file), config=str(folder)))
    z, t, _ = inputs(prior, 2)
    text, images = prior.embed(["a fox", ""]), torch.rand(1, 3, 32, 32)
    assert torch.equal(text, single.embed(["a fox", ""]))
    with torch.no_grad():
        assert torch.equal(prior.noise(z, t, text), single.noise(z, t, text))
    assert torch.equal(prior.encode(images), single.encode(images))
    assert torch.equal(prior.decode(z, (32, 32)), single.decode(z, (32, 32)))


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("model.diffusion_model.out.2.weight", "lacks parameters of the unet or the vae"),
        ("first_stage_model.quant_conv.weight", "lacks parameters of the unet or the vae"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"text_encoder lacks (text_model\.)?final_layer_norm\.bias",
        ),
    ],
)
def test_a_single_file_that_lacks_something_is_refused(model: Path, tmp_path: Path, lost: str, words: str) -> None:
    file = save_single_file(tmp_path / "checkpoint.safetensors", model)
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=rf"checkpoint\.safetensors: .*{words}; fetch"):
        Prior.load(Model(path=str(file), config=str(model)))


def test_a_single_file_with_another_models_configuration_is_refused(model: Path, v_model: Path, tmp_path: Path) -> None:
    file = save_single_file(tmp_path / "checkpoint.safetensors", model)
    with pytest.raises(WeightsError, match=r"cannot load .*checkpoint\.safetensors"):
        Prior.load(Model(path=str(file), config=str(v_model)))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_that_lacks_something_is_refused(copied: Path, part: str) -> None:
    (file,) = (copied / part).glob("*.safetensors")
    tensors = load_file(file)
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"{part} lacks {lost.removeprefix('text_model.')}"):
        Prior.load(str(copied))


def test_a_damaged_file_is_refused(copied: Path) -> None:
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="cannot load"):
        Prior.load(str(copied))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 35), (31, 64)])
def test_any_size_comes_back_as_it_went(prior: Prior, size: tuple[int, int]) -> None:
    z = prior.encode(torch.rand(2, 3, *size))
    assert z.shape == (2, 4, -(-size[0] // 4), -(-size[1] // 4))
    with torch.no_grad():
        assert prior.noise(z, torch.tensor([20, 20]), prior.embed(["a", "b"])).shape == z.shape
    decoded = prior.decode(z, size)
    assert decoded.shape == (2, 3, *size)
    assert 0 <= decoded.min() <= decoded.max() <= 1


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"precision": "fp16"}, 5e-3),
        ({"precision": "bf16"}, 4e-2),
        ({"channels_last": True}, 1e-5),
    ],
)
def test_precision_and_layout_change_only_the_rounding(
    model: Path, prior: Prior, options: dict[str, Any], tolerance: float
) -> None:
    other = Prior.load(str(model), **options)
    z, t, text = inputs(prior, 4)
    with torch.no_grad():
        for added in (None, adapter(prior, 2, 4)):
            expected, found = prior.noise(z, t, text, added), other.noise(z, t, text, added)
            assert found.dtype == torch.float32
            assert 0 < (found - expected).norm() < tolerance * expected.norm()
    assert prior.dtype == torch.float32
    assert other.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.get("precision"), torch.float32)


@pytest.mark.parametrize("layers", [LAYERS, ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "time_emb_proj")])
def test_an_adapter_is_each_samples_weights_merged(prior: Prior, layers: tuple[str, ...]) -> None:
    z, t, text = inputs(prior, 6)
    samples, rows = 2, 4
    with torch.no_grad():
        added = adapter(prior, samples, rows, layers=layers)
        found, bare = prior.noise(z, t, text, added), prior.noise(z, t, text)
        for sample in range(samples):
            deltas = {f"{name}.weight": 0.1 * added.up[name][sample] @ added.down[name][sample] for name in added.up}
            merged = prior.with_deltas(deltas).noise(z, t, text)
            torch.testing.assert_close(found[sample:rows:samples], merged[sample:rows:samples])
            assert (merged - bare).abs().amax((1, 2, 3)).min() > 1e-2
    torch.testing.assert_close(found[rows:], bare[rows:])


def test_gradients_reach_the_factors_of_their_sample_alone(prior: Prior) -> None:
    z, t, text = inputs(prior, 4)
    added = adapter(prior, 2, 4)
    factors = [*added.down.values(), *added.up.values()]
    for factor in factors:
        factor.requires_grad_()
    prior.noise(z, t, text, added)[1::2].square().sum().backward()  # the rows of sample 1
    for factor in factors:
        assert factor.grad is not None
        assert factor.grad[0].count_nonzero() == 0
        assert factor.grad[1].count_nonzero() > 0
    assert all(parameter.grad is None for layer in prior.layers().values() for parameter in layer.parameters())


def test_what_is_not_finite_stays_in_its_sample(prior: Prior) -> None:
    z, t, text = inputs(prior, 6)
    added = adapter(prior, 2, 4)
    with torch.no_grad():
        expected = prior.noise(z, t, text, added)
        for factor in (*added.down.values(), *added.up.values()):
            factor[0] = torch.nan
        found = prior.noise(z, t, text, added)
    assert not found[[0, 2]].isfinite().any()
    assert torch.equal(found[[1, 3, 4, 5]], expected[[1, 3, 4, 5]])


def test_adapters_come_and_go(prior: Prior) -> None:
    """Calls with adapters on one set of layers, on another, and without any do not affect each other."""
    z, t, text = inputs(prior, 2)
    with torch.no_grad():
        bare = prior.noise(z, t, text)
        first = prior.noise(z, t, text, adapter(prior, 2, 2))
        other = prior.noise(z, t, text, adapter(prior, 2, 2, layers=("to_k",)))
        assert torch.equal(prior.noise(z, t, text), bare)
        assert torch.equal(prior.noise(z, t, text, adapter(prior, 2, 2)), first)
        assert torch.equal(prior.noise(z, t, text, adapter(prior, 2, 2, layers=("to_k",))), other)
        with pytest.raises(RuntimeError):  # text of another width; the adapter is removed all the same
            prior.noise(z, t, text[..., :3], adapter(prior, 2, 2))
        assert torch.equal(prior.noise(z, t, text), bare)
    assert not torch.equal(first, other)


def test_priors_that_share_a_unet_do_not_share_an_adapter(prior: Prior) -> None:
    """A style that changes only the text encoder shares the bare prior's UNet, to which the fake score adds LoRAs."""
    layers = prior.text_layers()
    style = prior.with_deltas({}, {"final_layer_norm.bias": torch.ones(layers["final_layer_norm"].bias.shape)})
    asked = inputs(prior, 2)
    with torch.no_grad():
        before = style.noise(*asked)
        assert not torch.equal(prior.noise(*asked, adapter(prior, 2, 2)), before)
        assert torch.equal(style.noise(*asked), before)


def test_a_second_prior_shares_what_it_does_not_change(prior: Prior) -> None:
    prior.noise(*inputs(prior, 2), adapter(prior, 2, 2)).sum()  # hooks must not be copied
    layers, words = prior.layers(), prior.text_layers()
    unet = {
        "conv_in.weight": torch.randn(layers["conv_in"].weight.shape),
        "conv_in.bias": torch.randn(layers["conv_in"].bias.shape),
        "down_blocks.0.resnets.0.norm1.bias": torch.randn(layers["down_blocks.0.resnets.0.norm1"].bias.shape),
    }
    text = {"encoder.layers.0.mlp.fc1.weight": torch.randn(words["encoder.layers.0.mlp.fc1"].weight.shape)}

    def parameters(of: Prior) -> dict[str, Tensor]:
        return {
            f"{part}/{name}.{kind}": parameter
            for part, layers in (("unet", of.layers()), ("text", of.text_layers()))
            for name, layer in layers.items()
            for kind, parameter in layer.named_parameters()
        }

    before = parameters(prior)
    for unet_deltas, text_deltas in ((unet, {}), ({}, text), (unet, text)):
        styled = prior.with_deltas(unet_deltas, text_deltas)
        deltas = {f"unet/{key}": value for key, value in unet_deltas.items()}
        deltas |= {f"text/{key}": value for key, value in text_deltas.items()}
        after = parameters(styled)
        for name, parameter in before.items():
            if name in deltas:
                assert torch.equal(after[name], parameter + deltas[name]), name
            else:
                assert after[name] is parameter, name
        assert styled.schedule is prior.schedule
        assert not any(layer._forward_hooks for layer in styled.layers().values())
        assert (styled.layers()["conv_in"] is layers["conv_in"]) == (not unet_deltas)
        assert torch.equal(styled.embed(["a fox"]), prior.embed(["a fox"])) == (not text_deltas)
        with torch.no_grad():
            asked = inputs(prior, 2)
            assert torch.equal(styled.noise(*asked), prior.noise(*asked)) == (not unet_deltas)


def test_features_are_what_the_upper_self_attentions_put_out(model: Path, prior: Prior) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    expected: list[Tensor] = []
    for block in unet.up_blocks:
        for attention in block.attentions:
            for transformer in attention.transformer_blocks:
                transformer.attn1.to_out[0].register_forward_hook(lambda _, __, y: expected.append(y))
    z_t, t, text = inputs(prior, 2)
    z_t.requires_grad_()
    with torch.no_grad():
        unet(z_t, t, text)
    found = prior.features(z_t, t, text)
    assert [list(y.shape) for y in found] == [[2, 16, 32]] * 2 + [[2, 64, 16]] * 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(sum(y.square().sum() for y in found), z_t)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    assert len(prior.features(z_t, t, text)) == len(found) == 4  # no hook remains


@pytest.mark.slow
def test_compiled_once_for_each_way_of_asking(model: Path, prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three unbroken graphs (bare, with an adapter, with its gradients) serve all factors and timesteps."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # the same graphs, without a compiler
    torch._dynamo.reset()
    counters.clear()
    compiled = Prior.load(str(model), compile=True)
    styled = compiled.with_deltas({"conv_in.bias": torch.ones_like(compiled.layers()["conv_in"].bias)})
    for seed in range(2):
        asked, added = inputs(prior, 2, seed), adapter(prior, 1, 2, seed)
        for factor in added.up.values():
            factor.requires_grad_()
        with torch.no_grad():
            for given in (None, added):
                torch.testing.assert_close(compiled.noise(*asked, given), prior.noise(*asked, given))
            assert not torch.allclose(styled.noise(*asked), prior.noise(*asked), rtol=1e-2)
        gradients = []
        for each in (compiled, prior):
            loss = each.noise(*asked, added).square().sum()
            gradients.append(torch.autograd.grad(loss, list(added.up.values())))
        torch.testing.assert_close(*gradients)
        if not seed:
            graphs = counters["stats"]["unique_graphs"]
            assert graphs in (3, 4)  # some versions of torch compile one more for the second prior
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
