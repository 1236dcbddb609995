"""Tests of style LoRA files of many formats against weight differences computed here in float64 from the formulas.

The file exceeds 400 lines because every kind of file passes the same battery of cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smsbatch.diffusion.lora import Deltas, read_lora, read_style
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.errors import WeightsError
from smsbatch.manifest import Model, Style

Array = np.ndarray
Parts = dict[str, Array]

RANK, ALPHA = 2, 3.0
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYERS = {
    "linear": f"{ATTENTION}.to_q",
    "oblong": "down_blocks.0.resnets.0.time_emb_proj",
    "1x1": "down_blocks.0.attentions.0.proj_in",
    "3x3": "down_blocks.1.resnets.0.conv1",
    "text": "encoder.layers.0.mlp.fc1",
}


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(Model(path=str(model)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, name: str = "style") -> str:
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
        return str(file)

    return write


def parameter(prior: Prior, layer: str, name: str = "weight") -> Tensor:
    layers = prior.layers() | prior.text_layers()
    return getattr(layers[layer], name).detach()


def kohya(layer: str) -> str:
    """The name of a layer in a kohya file, in which CLIP's paths begin with `text_model`."""
    path = f"te_text_model.{layer}" if layer.startswith("encoder") else f"unet_{layer}"
    return "lora_" + path.replace(".", "_")


# ------------------------------------------------------------------------------------------------ formulas written out


def random(rng: np.random.Generator, *shape: int) -> Array:
    """Random values that float32 holds exactly, as float64."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def outer(left: Array, right: Array) -> Array:
    """sum_r left[:, r] x right[r] as a matrix; trailing dimensions are flattened."""
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    return sum((np.outer(left[:, r], right[r]) for r in range(len(right))), np.zeros((len(left), right.shape[1])))


def tucker(core: Array, left: Array, right: Array) -> Array:
    """delta[o, i, y, x] = sum_pq left[p, o] core[p, q, y, x] right[q, i]."""
    delta = np.zeros((left.shape[1], right.shape[1], *core.shape[2:]))
    for y in range(core.shape[2]):
        for x in range(core.shape[3]):
            delta[:, :, y, x] = left.T @ core[:, :, y, x] @ right
    return delta


def kronecker(w1: Array, w2: Array) -> Array:
    if w2.ndim == 2:
        return np.kron(w1, w2)
    delta = np.zeros((len(w1) * len(w2), w1.shape[1] * w2.shape[1], *w2.shape[2:]))
    for y in range(w2.shape[2]):
        for x in range(w2.shape[3]):
            delta[:, :, y, x] = np.kron(w1, w2[:, :, y, x])
    return delta


def lora(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
    out, rest = weight.shape[0], weight.shape[1:]
    down, up = random(rng, RANK, *rest), random(rng, out, RANK, *(1 for _ in rest[1:]))
    return {"lora_down.weight": down, "lora_up.weight": up}, ALPHA / RANK * outer(up, down)


def locon_tucker(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
    out, into, *kernel = weight.shape
    down, up, mid = random(rng, RANK, into, 1, 1), random(rng, out, RANK, 1, 1), random(rng, RANK, RANK, *kernel)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
    return parts, ALPHA / RANK * tucker(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])


def loha(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
    out, entries = weight.shape[0], weight[0].size
    parts = {
        f"hada_w{i}_{side}": random(rng, *shape)
        for i in (1, 2)
        for side, shape in (("a", (out, RANK)), ("b", (RANK, entries)))
    }
    w1, w2 = (outer(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    return parts, ALPHA / RANK * w1 * w2


def loha_tucker(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
    out, into, *kernel = weight.shape
    shapes = {"w{}_a": (RANK, out), "w{}_b": (RANK, into), "t{}": (RANK, RANK, *kernel)}
    parts = {"hada_" + name.format(i): random(rng, *shape) for i in (1, 2) for name, shape in shapes.items()}
    w1, w2 = (tucker(parts[f"hada_t{i}"], parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    return parts, ALPHA / RANK * w1 * w2


def lokr(left: str, right: str) -> Callable[[np.random.Generator, Array], tuple[Parts, Array]]:
    """`left`: whole or factored; `right`: whole, factored or tucker. The scale is 1 when both are whole."""

    def make(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
        out, into, *kernel = weight.shape
        (a, c), (b, d) = (2, out // 2), (4, into // 4)
        if left == "whole":
            parts = {"lokr_w1": random(rng, a, b)}
            w1 = parts["lokr_w1"]
        else:
            parts = {"lokr_w1_a": random(rng, a, RANK), "lokr_w1_b": random(rng, RANK, b)}
            w1 = outer(parts["lokr_w1_a"], parts["lokr_w1_b"])
        if right == "whole":
            parts["lokr_w2"] = w2 = random(rng, c, d, *kernel)
        elif right == "factored":
            parts |= {"lokr_w2_a": random(rng, c, RANK), "lokr_w2_b": random(rng, RANK, d * int(np.prod(kernel)))}
            w2 = outer(parts["lokr_w2_a"], parts["lokr_w2_b"]).reshape(c, d, *kernel)
        else:
            parts |= {"lokr_w2_a": random(rng, RANK, c), "lokr_w2_b": random(rng, RANK, d)}
            parts["lokr_t2"] = random(rng, RANK, RANK, *kernel)
            w2 = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        scale = 1 if left == right == "whole" else ALPHA / RANK
        return parts, scale * kronecker(w1, w2)

    return make


def full(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
    diff = random(rng, *weight.shape)
    return {"diff": diff}, diff


def ia3(on_input: bool) -> Callable[[np.random.Generator, Array], tuple[Parts, Array]]:
    def make(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
        factor, delta = random(rng, weight.shape[int(on_input)]), np.zeros_like(weight)
        for index, value in enumerate(factor):
            where = (slice(None), index) if on_input else index
            delta[where] = value * weight[where]
        shape = (1, -1, *(1 for _ in weight.shape[2:])) if weight.ndim == 4 else (-1,)
        return {"weight": factor.reshape(shape), "on_input": np.array(float(on_input))}, delta

    return make


def dora(
    inner: Callable[[np.random.Generator, Array], tuple[Parts, Array]], by_input: bool
) -> Callable[[np.random.Generator, Array], tuple[Parts, Array]]:
    def make(rng: np.random.Generator, weight: Array) -> tuple[Parts, Array]:
        parts, delta = inner(rng, weight)
        merged, axis = weight + delta.reshape(weight.shape), int(by_input)
        magnitude = random(rng, weight.shape[axis])
        styled = np.zeros_like(weight)
        for index, value in enumerate(magnitude):
            where = (slice(None), index) if by_input else index
            styled[where] = value * merged[where] / np.sqrt((merged[where] ** 2).sum())
        shape = [1] * weight.ndim
        shape[axis] = -1
        return {**parts, "dora_scale": magnitude.reshape(shape)}, styled - weight

    return make


EVERYWHERE = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr("whole", "whole"),
    "lokr, right factored": lokr("whole", "factored"),
    "lokr, left factored": lokr("factored", "whole"),
    "lokr, both factored": lokr("factored", "factored"),
    "full": full,
    "ia3": ia3(on_input=False),
    "ia3 on input": ia3(on_input=True),
    "dora": dora(lora, by_input=False),
    "dora by input": dora(lora, by_input=True),
    "dora on loha": dora(loha, by_input=False),
    "dora on lokr": dora(lokr("whole", "factored"), by_input=False),
}
ON_KERNELS = {
    "locon, tucker": locon_tucker,
    "loha, tucker": loha_tucker,
    "lokr, tucker": lokr("whole", "tucker"),
    "lokr, tucker, left factored": lokr("factored", "tucker"),
    "dora on tucker": dora(locon_tucker, by_input=False),
}


@pytest.mark.parametrize("kind", [*EVERYWHERE, *ON_KERNELS])
def test_every_kind_on_every_layer(prior: Prior, write: Callable[..., str], kind: str) -> None:
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    make = (EVERYWHERE | ON_KERNELS)[kind]
    for layer in LAYERS.values() if kind in EVERYWHERE else [LAYERS["3x3"]]:
        weight = parameter(prior, layer).double().numpy()
        parts, delta = make(rng, weight)
        expected[f"{layer}.weight"] = delta.reshape(weight.shape)
        tensors |= {f"{kohya(layer)}.{part}": torch.from_numpy(array).float() for part, array in parts.items()}
        tensors[f"{kohya(layer)}.alpha"] = torch.tensor(ALPHA)
    deltas = read_lora(write(tensors), prior, text_encoder=True)
    found = deltas.unet | deltas.text
    assert found.keys() == expected.keys()
    assert all(name.startswith("encoder") for name in deltas.text)
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name].numpy(), delta, rtol=1e-4, atol=1e-5, err_msg=name)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("kind", ["lora", "full", "lokr"])
@pytest.mark.parametrize("layer", ["linear", "1x1"])
def test_a_1x1_convolution_stands_for_a_linear_layer_and_back(
    prior: Prior, write: Callable[..., str], kind: str, layer: str
) -> None:
    weight = parameter(prior, LAYERS[layer])
    other = weight[..., None, None] if layer == "linear" else weight[..., 0, 0]
    parts, delta = EVERYWHERE[kind](np.random.default_rng(0), other.double().numpy())
    tensors = {f"{kohya(LAYERS[layer])}.{part}": torch.from_numpy(array).float() for part, array in parts.items()}
    tensors[f"{kohya(LAYERS[layer])}.alpha"] = torch.tensor(ALPHA)
    found = read_lora(write(tensors), prior, text_encoder=True).unet[f"{LAYERS[layer]}.weight"]
    np.testing.assert_allclose(found.numpy(), delta.reshape(weight.shape), rtol=1e-4, atol=1e-5)


def test_biases_and_norms(prior: Prior, write: Callable[..., str]) -> None:
    conv, norm, rng = LAYERS["3x3"], "down_blocks.1.resnets.0.norm1", torch.Generator().manual_seed(0)
    expected = {
        f"{layer}.{name}": torch.randn(parameter(prior, layer, name).shape, generator=rng)
        for layer in (conv, norm)
        for name in ("weight", "bias")
    } | {"conv_in.bias": torch.randn(16, generator=rng)}
    tensors = {
        f"{kohya(conv)}.diff": expected[f"{conv}.weight"],
        f"{kohya(conv)}.diff_b": expected[f"{conv}.bias"],
        f"{kohya(norm)}.w_norm": expected[f"{norm}.weight"],
        f"{kohya(norm)}.b_norm": expected[f"{norm}.bias"],
        "lora_unet_conv_in.diff_b": expected["conv_in.bias"],
    }
    found = read_lora(write(tensors), prior, text_encoder=True).unet
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(None, 1), (0.0, 1), (torch.tensor(0), 1), (1.0, 0.5), (torch.tensor([8.0]), 4), (torch.tensor(3), 1.5)],
)
def test_alpha(prior: Prior, write: Callable[..., str], dtype: torch.dtype, alpha: object, scale: float) -> None:
    name, rng = kohya(LAYERS["linear"]), np.random.default_rng(0)
    down, up = (torch.from_numpy(random(rng, *shape)).to(dtype) for shape in ((RANK, 16), (16, RANK)))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{name}.alpha"] = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=dtype)
    (delta,) = read_lora(write(tensors), prior, text_encoder=True).unet.values()
    expected = scale * outer(up.double().numpy(), down.double().numpy())
    np.testing.assert_allclose(delta.numpy(), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- names of layers

QUERY, OUT = f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0"
TEXT_QUERY, TEXT_OUT = "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj"
FC1 = LAYERS["text"]
OLD = {
    QUERY: f"unet.{ATTENTION}.processor.to_q_lora",
    OUT: f"unet.{ATTENTION}.processor.to_out_lora",
    TEXT_QUERY: "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora",
    TEXT_OUT: "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora",
    FC1: "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer",
}
ORIGINAL = {
    QUERY: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    OUT: "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
}


def original(layer: str) -> str:
    return "lora_unet_" + ORIGINAL[layer].replace(".", "_") if layer in ORIGINAL else kohya(layer)


def comfyui(layer: str) -> str:
    if layer in ORIGINAL:
        return f"diffusion_model.{ORIGINAL[layer]}"
    return f"text_encoders.clip_l.transformer.text_model.{layer}"


def path(layer: str, in_front: str = "text_model.") -> str:
    return f"text_encoder.{in_front}{layer}" if layer.startswith("encoder") else f"unet.{layer}"


WRITINGS: dict[str, Callable[[str], tuple[str, str]]] = {  # layer to the keys of its factors down and up
    "kohya": lambda layer: (f"{kohya(layer)}.lora_down.weight", f"{kohya(layer)}.lora_up.weight"),
    "kohya te1": lambda layer: tuple(f"{kohya(layer)}.lora_{x}.weight".replace("te_", "te1_") for x in ("down", "up")),
    "lycoris": lambda layer: tuple(f"lycoris_{layer.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")),
    "diffusers": lambda layer: (f"{path(layer)}.lora_A.weight", f"{path(layer)}.lora_B.weight"),
    "transformers 5": lambda layer: (f"{path(layer, '')}.lora_A.weight", f"{path(layer, '')}.lora_B.weight"),
    "peft": lambda layer: tuple(f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"),
    "peft, adapter": lambda layer: tuple(f"base_model.model.{layer}.lora_{x}.default.weight" for x in "AB"),
    "bare": lambda layer: (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"),
    "diffusers 0.20": lambda layer: (f"{path(layer)}.lora.down.weight", f"{path(layer)}.lora.up.weight"),
    "diffusers 0.14": lambda layer: (f"{OLD[layer]}.down.weight", f"{OLD[layer]}.up.weight"),
    "original": lambda layer: tuple(f"{original(layer)}.lora_{x}.weight" for x in ("down", "up")),
    "comfyui": lambda layer: tuple(f"{comfyui(layer)}.lora_{x}.weight" for x in ("down", "up")),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_every_writing_of_a_layer(prior: Prior, write: Callable[..., str], writing: str) -> None:
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for layer in OLD:
        parts, delta = lora(rng, parameter(prior, layer).double().numpy())
        expected[f"{layer}.weight"] = delta * RANK / ALPHA
        for key, array in zip(WRITINGS[writing](layer), parts.values(), strict=True):
            tensors[key] = torch.from_numpy(array).float()
    deltas = read_lora(write(tensors), prior, text_encoder=True)
    assert deltas.text.keys() == {f"{layer}.weight" for layer in (TEXT_QUERY, TEXT_OUT, FC1)}
    assert (deltas.unet | deltas.text).keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose((deltas.unet | deltas.text)[name].numpy(), delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("settings", "query", "key"),
    [
        ({}, 1, 1),
        ({"lora_alpha": 4}, 2, 2),
        ({"lora_alpha": 4, "alpha_pattern": {"to_k": 1}}, 2, 0.5),
        ({"lora_alpha": 4, "alpha_pattern": {f"{ATTENTION}.to_q": 8, ".*attn1.to_k": 6}}, 4, 3),
        ({"lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5, 4 / 2**0.5),
    ],
)
def test_pefts_settings(
    prior: Prior, write: Callable[..., str], settings: dict[str, object], query: float, key: float, beside: bool
) -> None:
    """Diffusers writes the settings into the file, prefixed by model; peft writes them into adapter_config.json."""
    scales, rng, tensors, expected = {"to_q": query, "to_k": key}, np.random.default_rng(0), {}, {}
    for name, scale in scales.items():
        down, up = random(rng, RANK, 16), random(rng, 16, RANK)
        expected[f"{ATTENTION}.{name}.weight"] = scale * outer(up, down)
        prefix = "base_model.model" if beside else "unet"
        tensors[f"{prefix}.{ATTENTION}.{name}.lora_A.weight"] = torch.from_numpy(down).float()
        tensors[f"{prefix}.{ATTENTION}.{name}.lora_B.weight"] = torch.from_numpy(up).float()
    if beside:
        file = write(tensors, name="adapter_model")
        Path(file).with_name("adapter_config.json").write_text(json.dumps(settings))
    else:
        packed = {f"unet.{name}": value for name, value in settings.items()} | {"text_encoder.lora_alpha": 99}
        file = write(tensors, {"lora_adapter_metadata": json.dumps(packed)})
    found = read_lora(file, prior, text_encoder=True).unet
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name].numpy(), delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_front", ["", "text_model."])
def test_a_pattern_of_any_version_of_transformers(prior: Prior, write: Callable[..., str], in_front: str) -> None:
    """The file's own settings take precedence over adapter_config.json."""
    name = f"text_encoder.{in_front}{TEXT_QUERY}"
    down, up = torch.ones(RANK, 16), torch.ones(16, RANK)
    settings = {"text_encoder.lora_alpha": 1, "text_encoder.alpha_pattern": {f"{in_front}{TEXT_QUERY}": 6}}
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    file = write(tensors, {"lora_adapter_metadata": json.dumps(settings)}, name="adapter_model")
    Path(file).with_name("adapter_config.json").write_text('{"lora_alpha": 99}')
    (delta,) = read_lora(file, prior, text_encoder=True).text.values()
    torch.testing.assert_close(delta, 6 / RANK * (up @ down))


def test_peft_dora_has_its_magnitude_per_output(prior: Prior, write: Callable[..., str]) -> None:
    tensors, expected = {}, {}
    for layer in (LAYERS["linear"], LAYERS["3x3"]):
        parts, delta = dora(lora, by_input=False)(np.random.default_rng(0), parameter(prior, layer).double().numpy())
        shape = (1, -1, 1, 1) if layer == LAYERS["3x3"] else (-1,)  # as in peft
        written = {"lora_A.weight": parts["lora_down.weight"], "lora_B.weight": parts["lora_up.weight"]}
        written |= {"lora_magnitude_vector": parts["dora_scale"].reshape(shape), "alpha": np.array(ALPHA)}
        tensors |= {f"unet.{layer}.{part}": torch.from_numpy(array).float() for part, array in written.items()}
        expected[f"{layer}.weight"] = delta
    found = read_lora(write(tensors), prior, text_encoder=True).unet
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name].numpy(), delta, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- parts of a style


def one(layer: str, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    name = kohya(layer)
    return {
        f"{name}.lora_down.weight": torch.randn(RANK, 16, generator=rng),
        f"{name}.lora_up.weight": torch.randn(16, RANK, generator=rng),
    }


def test_several_loras_are_summed_with_their_scales(prior: Prior, write: Callable[..., str]) -> None:
    files = [
        write(one(QUERY, 1) | one(TEXT_QUERY, 2), name="a"),
        write(one(QUERY, 3) | one(OUT, 4), name="b"),
    ]
    a, b = (read_lora(file, prior, text_encoder=True) for file in files)
    both = read_style(Style(lora=tuple(files), scale=(0.5, -2.0), prompt="x"), prior)
    torch.testing.assert_close(
        both.unet,
        {
            f"{QUERY}.weight": 0.5 * a.unet[f"{QUERY}.weight"] - 2 * b.unet[f"{QUERY}.weight"],
            f"{OUT}.weight": -2 * b.unet[f"{OUT}.weight"],
        },
    )
    torch.testing.assert_close(both.text, {f"{TEXT_QUERY}.weight": 0.5 * a.text[f"{TEXT_QUERY}.weight"]})
    assert read_style(Style(prompt="x"), prior) == Deltas()


def test_the_text_encoders_parts_have_a_switch(prior: Prior, write: Callable[..., str]) -> None:
    both = write(one(QUERY) | one(TEXT_QUERY), name="both")
    text = write(one(TEXT_QUERY), name="text")
    assert read_lora(both, prior, text_encoder=True).text
    assert read_lora(text, prior, text_encoder=True).text
    assert read_lora(both, prior, text_encoder=False).text == {}
    assert read_lora(both, prior, text_encoder=False).unet
    with pytest.raises(WeightsError, match="text encoder alone"):
        read_lora(text, prior, text_encoder=False)


def test_the_styled_prior_is_the_prior_plus_deltas(prior: Prior, lora: Path, write: Callable[..., str]) -> None:
    deltas = read_lora(str(lora), prior, text_encoder=True)
    text = read_lora(write(one(TEXT_QUERY)), prior, text_encoder=True).text
    assert {delta.ndim for delta in deltas.unet.values()} == {2, 4}
    before = {name: layer.weight.clone() for name, layer in (prior.layers() | prior.text_layers()).items()}
    styled = prior.with_deltas(deltas.unet, text)
    added = deltas.unet | text
    for name, layer in (styled.layers() | styled.text_layers()).items():
        expected = before[name] + added.get(f"{name}.weight", 0)
        torch.testing.assert_close(layer.weight.data, expected)
    for name, layer in (prior.layers() | prior.text_layers()).items():
        assert torch.equal(layer.weight, before[name])


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{kohya(QUERY)}.lora_up.weight": torch.ones(3, RANK)}, ["[3, 2]", QUERY, "weight [16, 16]"]),
        ({f"{kohya(QUERY)}.lora_up.weight": torch.ones(16, 3)}, ["[16, 3]", "[2, 16]", QUERY]),
        ({f"{kohya(QUERY)}.alpha": torch.ones(2)}, ["alpha [2]", QUERY]),
        ({f"{kohya(QUERY)}.alpha": torch.tensor(float("nan"))}, ["alpha", "NaN"]),
        ({f"{kohya(QUERY)}.lora_up.weight": torch.full((16, RANK), float("inf"))}, ["lora_up.weight", "infinity"]),
        ({f"{kohya(QUERY)}.lora_up.weight": torch.ones(16, 0)}, ["lora_up.weight", "empty"]),
        ({f"{kohya(QUERY)}.diff_b": torch.ones(16)}, ["diff_b [16]", QUERY]),
        ({"lora_unet_conv_in.diff_b": torch.ones(3)}, ["diff_b [3]", "conv_in", "bias [16]"]),
        ({f"{kohya(QUERY)}.dora_scale": torch.ones(5, 1)}, ["dora_scale [5, 1]", QUERY]),
        ({f"{kohya(LAYERS['3x3'])}.diff": torch.ones(32, 16)}, ["diff [32, 16]", "[32, 16, 3, 3]"]),
        ({f"{kohya(OUT)}.diff": torch.ones(16, 4, 2, 2)}, ["diff [16, 4, 2, 2]", OUT, "[16, 16]"]),  # 256 entries too
        ({"lora_unet_x.diff": torch.ones(1, 1)}, ["no layer for lora_unet_x.diff"]),
        ({"lora_te_x.diff": torch.ones(1, 1)}, ["no layer for lora_te_x.diff"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    prior: Prior, write: Callable[..., str], change: dict[str, Tensor], words: list[str]
) -> None:
    with pytest.raises(WeightsError, match=r"^style\.lora: .*style\.safetensors.*; (choose|fetch) ") as caught:
        read_lora(write(one(QUERY) | change), prior, text_encoder=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_transposed_layer_is_refused(prior: Prior, write: Callable[..., str]) -> None:
    """The number of entries matches, but the shape is the transposed one."""
    out, into = parameter(prior, LAYERS["oblong"]).shape
    name = kohya(LAYERS["oblong"])
    with pytest.raises(WeightsError, match="do not fit"):
        read_lora(write({f"{name}.diff": torch.ones(into, out)}), prior, text_encoder=True)


# ------------------------------------------------------------------------------- comparison with other implementations


@pytest.fixture
def pipeline(model: Path):  # type: ignore[no-untyped-def]
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model)


def merged(pipeline, prior: Prior) -> Deltas:  # type: ignore[no-untyped-def]
    """The differences of the pipeline's weights from the prior's once adapters are fused; equal ones are left out."""
    found = Deltas()
    for part, layers, into in (
        (pipeline.unet, prior.layers(), found.unet),
        (pipeline.text_encoder, prior.text_layers(), found.text),
    ):
        for name, tensor in part.state_dict().items():
            layer, _, kind = name.removeprefix("text_model.").replace(".base_layer", "").rpartition(".")
            if layer in layers and (delta := tensor - getattr(layers[layer], kind)).any():
                into[f"{layer}.{kind}"] = delta
    return found


def test_a_kohya_file_as_diffusers_reads_it(pipeline, prior: Prior, lora: Path, write: Callable[..., str]) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(lora)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        tensors |= one(f"encoder.layers.0.self_attn.{name}")
        tensors[f"{kohya(f'encoder.layers.0.self_attn.{name}')}.alpha"] = torch.tensor(1.0)
    file = write(tensors)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    theirs = merged(pipeline, prior)
    ours = read_lora(file, prior, text_encoder=True)
    torch.testing.assert_close(ours.unet, theirs.unet, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.text, theirs.text, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_file_that_diffusers_and_peft_write(  # type: ignore[no-untyped-def]
    pipeline, prior: Prior, tmp_path: Path, options: dict[str, bool]
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    written = {}
    for kind, targets, patterns in (
        ("unet", ["to_q", "to_k", "to_v", "conv1"], {"alpha_pattern": {"to_k": 5}, "rank_pattern": {"to_v": 3}}),
        ("text_encoder", ["q_proj", "k_proj"], {"alpha_pattern": {"k_proj": 7}}),
    ):
        part = getattr(pipeline, kind)
        own = options or patterns  # peft forbids both at once
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **own)
        part.add_adapter(config, "default")
        written[f"{kind}_lora_layers"] = get_peft_model_state_dict(part)
        written[f"{kind}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(tmp_path, **written)
    pipeline.fuse_lora()
    theirs = merged(pipeline, prior)
    ours = read_lora(str(tmp_path / "pytorch_lora_weights.safetensors"), prior, text_encoder=True)
    assert len(ours.unet) > 8
    torch.testing.assert_close(ours.unet, theirs.unet, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.text, theirs.text, rtol=1e-4, atol=1e-5)


def test_a_folder_that_peft_writes(pipeline, prior: Prior, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"alpha_pattern": {"attn1.to_k": 5}, "init_lora_weights": False}
    tuned = get_peft_model(pipeline.unet, LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k"], **settings))
    tuned.save_pretrained(tmp_path)
    pipeline.unet = tuned.merge_and_unload()
    ours = read_lora(str(tmp_path / "adapter_model.safetensors"), prior, text_encoder=True)
    torch.testing.assert_close(ours.unet, merged(pipeline, prior).unet, rtol=1e-4, atol=1e-5)
