"""Tests of the grammar of LoRA files' keys, and of the driver's check of a style, which loads no tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from torch import Tensor

from smsbatch.diffusion.lora_files import Key, _originals, check_style, parse, survey
from smsbatch.errors import WeightsError
from smsbatch.manifest import Manifest

UNET = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
LORA = ("lora_down.weight", "lora_up.weight")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*keys: str, name: str = "style", metadata: dict[str, str] | None = None) -> str:
        file = tmp_path / f"{name}.safetensors"
        save_file({key: torch.ones(1) for key in keys}, file, metadata)
        return str(file)

    return write


def both(layer: str) -> list[str]:
    return [f"{layer}.{part}" for part in LORA]


# ------------------------------------------------------------------------------------------------------------ grammar

NAMES = st.sampled_from(
    ["resnets", "attentions", "to_q", "to_out", "ff", "net", "proj_in", "conv1", "attn1", "0", "12"]
)
UNET_PATHS = st.lists(NAMES, max_size=6).map(lambda names: ".".join(["up_blocks.1", *names]))
TEXT_PATHS = st.builds(
    "encoder.layers.{}.{}".format,
    st.integers(0, 30),
    st.sampled_from(["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1"]),
)
PARTS = {
    "lora_down": ["lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_linear_layer.down.weight"],
    "lora_up": ["lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_linear_layer.up.weight"],
    "alpha": ["alpha", "lora.alpha"],
    "diff": ["diff"],
    "diff_b": ["diff_b"],
    "lora_magnitude_vector": ["lora_magnitude_vector", "lora_magnitude_vector.default"],
}
WHOLE = """alpha diff diff_b dora_scale w_norm b_norm weight on_input hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1
hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"""
KOHYA = {name: name for name in WHOLE.split()} | {
    name: f"{name}.weight" for name in ("lora_down", "lora_up", "lora_mid")
}


@given(UNET_PATHS, st.sampled_from(sorted(PARTS)), st.data())
def test_paths_round_trip(path: str, part: str, data: st.DataObject) -> None:
    prefix = data.draw(st.sampled_from(["unet.", "diffusion_model.", "base_model.model.", ""]))
    written = data.draw(st.sampled_from(PARTS[part]))
    assert parse(f"{prefix}{path}.{written}") == Key("unet", path.replace(".", "_"), part)


@given(TEXT_PATHS, st.sampled_from(sorted(PARTS)), st.data())
def test_text_paths_round_trip(path: str, part: str, data: st.DataObject) -> None:
    prefix = data.draw(st.sampled_from(["text_encoder.", "base_model.model.", ""]))
    in_front = data.draw(st.sampled_from(["text_model.", ""]))
    written = data.draw(st.sampled_from(PARTS[part]))
    assert parse(f"{prefix}{in_front}{path}.{written}") == Key("text", path.replace(".", "_"), part)


@given(st.one_of(UNET_PATHS, TEXT_PATHS), st.sampled_from(sorted(KOHYA)), st.data())
def test_kohyas_names_round_trip(path: str, part: str, data: st.DataObject) -> None:
    is_text = path.startswith("encoder")
    prefixes = ["lora_te_text_model_", "lora_te1_text_model_", "lora_te_"] if is_text else ["lora_unet_"]
    name = path.replace(".", "_")
    key = data.draw(st.sampled_from([*prefixes, "lycoris_"])) + name + "." + KOHYA[part]
    assert parse(key) == Key("text" if is_text else "unet", name, part)


@given(st.text(max_size=60).filter(lambda key: "." not in key))
def test_what_has_no_part_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is of no kind known here"):
        parse(key)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{UNET}.oft_blocks", "OFT"),
        (f"{UNET}.rescale", "OFT"),
        (f"{UNET}.a1.weight", "GLoRA"),
        (f"{UNET}.bias_indices", "sparse bias"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "SDXL"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "SDXL"),
        ("unet.conv_in.lora_B.bias", "bias of a factor"),
        ("base_model.model.embeddings.lora_embedding_A", "embedding"),
        ("bundle_emb.word.string_to_param.*", "embedding"),
        (f"{UNET}.lora_down", "no kind known"),
        (f"{UNET}.scalar", "no kind known"),
        ("unet.conv_in.weight", "no kind known"),  # IA3 in a kohya file; here a parameter of a whole model
        ("model.diffusion_model.input_blocks.0.0.weight", "no kind known"),
        ("something", "no kind known"),
    ],
)
def test_what_is_not_understood_is_named_with_its_kind(write: Callable[..., str], key: str, what: str) -> None:
    with pytest.raises(WeightsError) as caught:
        survey(write(*both(UNET), key))
    message = str(caught.value)
    assert all(words in message for words in (key, what)), message
    assert "\n" not in message


def test_of_many_unknown_keys_a_few_are_named_and_the_rest_counted(write: Callable[..., str]) -> None:
    with pytest.raises(WeightsError, match="x0, x1, x2 and 7 more is of no kind known here"):
        survey(write(*(f"x{number}" for number in range(10))))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["lora_down.weight"], ["lora_down.weight", "no lora_up"]),
        (["lora_mid.weight", "lora_up.weight"], ["lora_mid.weight", "no lora_down"]),
        (["alpha"], ["alpha has no weights"]),
        (["dora_scale", "diff_b"], ["has no weights"]),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a"], ["hada_w1_a", "no hada_w2_b"]),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1"], ["hada_t"]),
        (["lokr_w1"], ["lokr_w1", "no lokr_w2"]),
        (["lokr_w1", "lokr_w2_a"], ["lokr_w1", "no lokr_w2_b"]),
        (["lokr_w1", "lokr_w2", "lokr_w2_a"], ["lokr_w1", "lokr_w2"]),
        (["on_input"], ["on_input", "no weight"]),
        (["b_norm"], ["b_norm", "no w_norm"]),
        (["diff", "lora_up.weight", "lora_down.weight"], ["diff too"]),
    ],
)
def test_an_incomplete_module_is_named(write: Callable[..., str], parts: list[str], words: list[str]) -> None:
    with pytest.raises(WeightsError, match=UNET) as caught:
        survey(write(*(f"{UNET}.{part}" for part in parts)))
    assert all(word in str(caught.value) for word in words), caught.value


def test_two_writings_of_one_part_are_refused(write: Callable[..., str]) -> None:
    keys = ["unet.mid_block.resnets.0.conv1.lora_A.weight", "unet.mid_block.resnets.0.conv1.lora_B.weight"]
    with pytest.raises(WeightsError, match=r"are the same part"):
        survey(write(*both(UNET), *keys))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_refused(write: Callable[..., str], text: str) -> None:
    with pytest.raises(WeightsError, match="peft configuration is no JSON"):
        survey(write(*both(UNET), metadata={"lora_adapter_metadata": text}))


def test_files_that_are_none_are_refused(tmp_path: Path, write: Callable[..., str]) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        survey(str(tmp_path / "none.safetensors"))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a header")
    with pytest.raises(WeightsError, match=r"damaged\.safetensors is not a safetensors file"):
        survey(str(damaged))
    cut = Path(write(*both(UNET), name="cut"))
    cut.write_bytes(cut.read_bytes()[:-2])
    with pytest.raises(WeightsError, match=r"cut\.safetensors is not a safetensors file"):
        survey(str(cut))
    for ending in ("pt", "bin", "ckpt"):
        pickled = tmp_path / f"style.{ending}"
        torch.save({f"{UNET}.alpha": torch.ones(1)}, pickled)
        with pytest.raises(WeightsError, match=rf"style\.{ending} is a pickle"):
            survey(str(pickled))
    with pytest.raises(WeightsError, match="holds no weights"):
        survey(write(name="empty")).models(text_encoder=True)


def test_half_precision_files_are_read_by_their_header(tmp_path: Path) -> None:
    """NumPy has no bf16, but a driver reads only the names."""
    file = tmp_path / "half.safetensors"
    tensors: dict[str, Tensor] = {key: torch.ones(1, dtype=torch.bfloat16) for key in both(UNET)}
    save_file(tensors, file)
    assert survey(str(file)).modules == {
        ("unet", "mid_block_resnets_0_conv1"): {"lora_down": f"{UNET}.{LORA[0]}", "lora_up": f"{UNET}.{LORA[1]}"}
    }


@pytest.mark.parametrize("per_block", [1, 2])
def test_the_original_codes_names_are_those_that_diffusers_converts(per_block: int) -> None:
    """A small UNet of Stable Diffusion 1.x's layout passes through diffusers' converter of single-file checkpoints."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=per_block,
        down_block_types=(*down[:1] * 3, down[1]),
        up_block_types=(up[0], *up[1:] * 3),
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    layers = {name.rpartition(".")[0] for name in unet.state_dict()}
    names = _originals(layers)
    assert sorted(names.values()) == sorted(layers)
    prefix = "model.diffusion_model."
    checkpoint = {f"{prefix}{theirs}.{kind}": ours for theirs, ours in names.items() for kind in ("weight", "bias")}
    config = {"layers_per_block": per_block, "class_embed_type": None, "addition_embed_type": None}
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    assert converted == {f"{layer}.{kind}": layer for layer in layers for kind in ("weight", "bias")}


# ------------------------------------------------------------------------------------------------------- check_style


def manifest(base: Path, *loras: str, **style: object) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "x",
            "source": {"format": "folder", "urls": "x"},
            "model": {"path": str(base)},
            "style": {"lora": loras, "prompt": "x", **style},
            "output": {"path": "x"},
        }
    )


def test_a_style_that_fits_has_no_notices(model: Path, lora: Path, write: Callable[..., str]) -> None:
    assert check_style(manifest(model, str(lora))) == []
    assert check_style(manifest(model)) == []
    assert check_style(manifest(model, str(lora), write(*both(UNET), *both(TEXT)))) == []


def test_left_out_parts_are_noticed(model: Path, lora: Path, write: Callable[..., str]) -> None:
    file = write(*both(UNET), *both(TEXT))
    (notice,) = check_style(manifest(model, str(lora), file, text_encoder=False))
    assert notice == f"{file}: parts for 1 layers of the text encoder are left out"
    with pytest.raises(WeightsError, match=r"text\.safetensors holds parts for the text encoder alone"):
        check_style(manifest(model, write(*both(TEXT), name="text"), text_encoder=False))


@pytest.mark.parametrize("layer", ["lora_unet_x", "lora_te_x"])
def test_a_style_for_another_model_is_refused(model: Path, write: Callable[..., str], layer: str) -> None:
    with pytest.raises(WeightsError, match=rf"the model has no layer for {layer}"):
        check_style(manifest(model, write(*both(UNET), *both(layer))))


def test_the_styles_own_model_is_the_one_that_counts(
    model: Path, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are checked against the style's own model; a missing base model is refused too."""
    asked = []

    def parameter_names(model: object, part: str, key: str) -> list[str]:
        asked.append((model, part, key))
        return ["mid_block.other.weight"]

    monkeypatch.setattr("smsbatch.diffusion.lora_files.parameter_names", parameter_names)
    styled = manifest(model, write(*both("lora_unet_mid_block_other")), model={"path": "elsewhere"})
    assert check_style(styled) == []
    assert {(model, key) for model, _, key in asked} == {(styled.style.model, "style.model")}
    with pytest.raises(WeightsError, match="elsewhere"):
        check_style(manifest(Path("/elsewhere"), write(*both(UNET)), model={"path": str(model)}))


def test_of_a_single_file_checkpoint_the_grammar_alone_is_checked(
    model: Path, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smsbatch.diffusion.lora_files.parameter_names", lambda *_: None)
    assert check_style(manifest(model, write(*both("lora_unet_x")))) == []
    with pytest.raises(WeightsError, match=r"lora_unet_x\.oft_blocks is of OFT"):
        check_style(manifest(model, write("lora_unet_x.oft_blocks")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": "x"}, "lora_alpha of its peft configuration is no number"),
        ({"unet.alpha_pattern": {"to_q": [1]}}, "is no number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "has the pattern '(a+)+$'"),
        ({"alpha_pattern": {".*.*.*.*x": 1}}, "has the pattern"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.x.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=re.escape(words)):
        survey(str(file))
