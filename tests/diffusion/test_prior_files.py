"""Tests of finding model files (folders, hub ids, single-file checkpoints), of refusals and of digests."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import save_single_file

from smsbatch.diffusion.priors.files import (
    locate_config,
    locate_lora,
    locate_model,
    model_digests,
    parameter_names,
    part_file,
    variant,
)
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.errors import WeightsError
from smsbatch.manifest import Manifest, Model

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def configured(model: Path, tmp_path: Path) -> Path:
    """A model's folder without its weights, which suffices for refusals."""
    folder = tmp_path / "configured"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(tmp_path_factory.mktemp("single") / "checkpoint.safetensors", model)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_is_itself(model: Path) -> None:
    assert locate_model(Model(path=str(model))) == locate_config(Model(path=str(model))) == model
    assert locate_model(Model(path="tiny")).name == "model"


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(WeightsError, match=r"model\.path: /nowhere is neither a folder"):
        locate_model(Model(path="/nowhere"))
    with pytest.raises(WeightsError, match=r"style\.model\.path: nobody/nothing .* the hub download failed"):
        locate_model(Model(path="nobody/nothing"), "style.model")  # offline in tests
    with pytest.raises(WeightsError, match=r"style\.lora: no such file /nowhere\.safetensors"):
        locate_lora("/nowhere.safetensors")


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "model.bin"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"{name} is a pickle, which can run code"):
        locate_model(Model(path=str(tmp_path / name)))
    with pytest.raises(WeightsError, match=rf"{name} is a pickle, which can run code"):
        locate_lora(str(tmp_path / name))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"model\.gguf is no \.safetensors file"):
        locate_model(Model(path=str(tmp_path / "model.gguf")))


def test_a_folder_of_pickles_is_refused(configured: Path) -> None:
    (configured / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        WeightsError, match=r"has no text_encoder/model\.safetensors; save the pipeline with safe_serial"
    ):
        locate_model(Model(path=str(configured)))


def test_parts_in_several_files_are_refused(copied: Path) -> None:
    (copied / UNET).rename(copied / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    (copied / f"{UNET}.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="has its unet in several files; save it with max_shard_size"):
        locate_model(Model(path=str(copied)))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts sample;"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 50}, "was trained with 50 timesteps, not 1000;"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels, as models for inpainting"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, r"as Stable Diffusion XL does.*= text_time;"),
        ("unet/config.json", {"class_embed_type": "projection"}, "as unCLIP does"),
        ("unet/config.json", {"num_class_embeds": 1000}, "as upscalers do"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "latent consistency"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "do not fit each other"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]},
            "is a StableDiffusionXLPipeline;",
        ),
    ],
)
def test_models_of_another_kind_are_refused_by_it(
    configured: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    edit(configured / file, **changes)
    with pytest.raises(WeightsError, match=rf"{words}.* known are Stable Diffusion 1\.x and 2\.x that predict epsilon"):
        locate_model(Model(path=str(configured)))


def test_a_folder_with_half_a_configuration_is_refused(configured: Path) -> None:
    (configured / "unet/config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot read .*/unet/config\.json"):
        locate_model(Model(path=str(configured)))
    (configured / "unet/config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no unet/config\.json"):
        locate_model(Model(path=str(configured)))


def test_half_precision_files_are_taken_where_there_are_no_others(copied: Path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = copied / part / f"{name}.safetensors"
        halves = {key: value.half() for key, value in load_file(file).items()}
        save_file(halves, file.with_name(f"{name}.fp16.safetensors"), metadata={"format": "pt"})
    assert variant(copied, "unet") is None
    (copied / UNET).unlink()
    (copied / "text_encoder/model.safetensors").unlink()
    assert [variant(copied, part) for part in ("unet", "vae", "text_encoder")] == ["fp16", None, "fp16"]
    model = Model(path=str(copied))
    stored = load_file(part_file(copied, "unet"))
    assert set(parameter_names(model, "unet") or ()) == set(stored)
    prior = Prior.load(model)
    weight = prior.layers()["conv_in"].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored["conv_in.weight"].float())


def test_a_hub_id_is_fetched_with_half_precision_where_there_is_no_other(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only files that are read are requested; half-precision weights are requested only when a part is missing."""
    asked = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("somebody/something", "v2")
        asked.append(allow_patterns)
        if UNET.replace(".safetensors", ".fp16.safetensors") in allow_patterns:
            kept.rename(copied / UNET.replace(".safetensors", ".fp16.safetensors"))
        return str(copied)

    kept = (copied / UNET).rename(copied.parent / "kept")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate_model(Model(path="somebody/something", revision="v2")) == copied
    assert [UNET in patterns for patterns in asked] == [True, False]
    assert locate_model(Model(path="somebody/something", revision="v2")) == copied
    assert len(asked) == 3
    assert not any(pattern.endswith((".bin", ".ckpt")) or "*" in pattern for patterns in asked for pattern in patterns)


def test_a_single_file_takes_its_configuration_from_where_it_is_told(single: Path, model: Path) -> None:
    section = Model(path=str(single), config=str(model))
    assert locate_model(section) == single
    assert locate_config(section) == model
    assert parameter_names(section, "unet") is None
    with pytest.raises(WeightsError, match=r"model\.config: is for a single-file checkpoint, which .* is not"):
        locate_model(Model(path=str(model), config=str(model)))


def test_a_single_file_of_an_unknown_width_needs_its_configuration_named(single: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.config: .* do not tell whether it predicts epsilon or v; name"):
        locate_config(Model(path=str(single)))


def test_a_single_file_of_1_x_is_known_by_its_keys(single: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file(load_file(single) | {key: torch.zeros(1, 768)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5 .* the hub download failed"):
        locate_config(Model(path=str(tmp_path / "model.safetensors")))  # offline in tests


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("conditioner.embedders.1.model.positional_embedding", "is Stable Diffusion XL; known are"),
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "is FLUX; known are"),
        ("decoder.conv_in.weight", r"has no unet \(model\.diffusion_model\."),
    ],
)
def test_a_single_file_of_another_kind_is_refused_by_it(model: Path, tmp_path: Path, key: str, words: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=words):
        locate_config(Model(path=str(tmp_path / "model.safetensors"), config=str(model)))


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("model.diffusion_model.", "unet"), ("first_stage_model.", "vae"), ("cond_stage_model.", "text encoder")],
)
def test_a_single_file_without_a_part_is_refused(
    single: Path, model: Path, tmp_path: Path, prefix: str, part: str
) -> None:
    """The configuration's folder may have the missing part, perhaps as a pickle, but it belongs to another model."""
    rest = {name: tensor for name, tensor in load_file(single).items() if not name.startswith(prefix)}
    save_file(rest, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"has no {part} .* needs unet, vae and text encoder"):
        Prior.load(Model(path=str(tmp_path / "model.safetensors"), config=str(model)))


def test_a_single_file_for_inpainting_is_refused(single: Path, model: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(load_file(single) | {key: torch.zeros(16, 9, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="takes 9 channels, as models for inpainting"):
        locate_config(Model(path=str(tmp_path / "model.safetensors"), config=str(model)))


def test_a_damaged_single_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        locate_config(Model(path=str(tmp_path / "model.safetensors"), config=str(model)))


def manifest(model: Model, style: dict[str, Any]) -> Manifest:
    return Manifest.model_validate(
        {
            "name": "x",
            "source": {"format": "folder", "urls": "x"},
            "model": model.model_dump(),
            "style": {"prompt": "x"} | style,
            "output": {"path": "x"},
        }
    )


def test_every_file_that_results_depend_on_is_digested(model: Path, single: Path, lora: Path) -> None:
    found = model_digests(
        manifest(
            Model(path=str(model)),
            {
                "lora": [str(lora), "tiny:styles/oil.safetensors"],
                "model": {"path": str(single), "config": "tiny"},
            },
        )
    )
    read = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    read -= {"feature_extractor/preprocessor_config.json"}
    assert {name.removeprefix(f"{model}/") for name in found if name.startswith(f"{model}/")} == read
    assert {name for name in found if name.startswith("tiny/")} >= {"tiny/unet/config.json", "tiny/model_index.json"}
    assert not any(name.startswith("tiny/") and name.endswith(".safetensors") for name in found)
    for name, file in {str(single): single, str(lora): lora, f"{model}/{UNET}": model / UNET}.items():
        assert found[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "tiny:styles/oil.safetensors" in found
    assert len(found) == len(read) + 3 + len([name for name in found if name.startswith("tiny/")])


def test_peft_s_configuration_decides_alpha_and_is_digested(model: Path, lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    shutil.copyfile(lora, file)
    wanted = manifest(Model(path=str(model)), {"lora": str(file)})
    alone = model_digests(wanted)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    beside = model_digests(wanted)
    assert set(beside) - set(alone) == {f"{file} (adapter_config.json)"}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert model_digests(wanted) != beside


def test_a_driver_needs_no_torch_for_any_of_it(model: Path, single: Path) -> None:
    code = (
        "import sys; from smsbatch.diffusion.priors.files import *; from smsbatch.manifest import Model\n"
        f"section = Model(path={str(single)!r}, config={str(model)!r})\n"
        "locate_model(section), locate_config(section), parameter_names(Model(path=section.config), 'unet')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
