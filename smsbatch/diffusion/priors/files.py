"""Find model files, check their kind and compute digests. Without torch: a driver that only deals units needs none.

A model is a folder in diffusers' format, local or on the hub, or a single file with a separate configuration.
Only safetensors are read: a pickle can run any code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from smsbatch import tiny
from smsbatch.errors import WeightsError
from smsbatch.manifest import Model, Styled
from smsbatch.text import first_line

# The files read from a pipeline folder, which determine results: no pickles, variants or safety checkers.
_CONFIG = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
_WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_KNOWN = "known are Stable Diffusion 1.x and 2.x that predict epsilon or v"

# Keys of single-file checkpoints: those that only other kinds of models have, and one whose width tells 1.x from 2.x.
_FOREIGN = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": "Stable Diffusion XL",
    "conditioner.embedders.1.model.positional_embedding": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "FLUX",
    "control_model.time_embed.0.weight": "a ControlNet",
}
_UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
_UNET_OUTPUT = "model.diffusion_model.out.2.weight"
_IN_FILE = {  # one key of each part must exist; diffusers would look elsewhere for an absent part
    "unet": (_UNET_INPUT,),
    "vae": ("first_stage_model.encoder.conv_in.weight",),
    "text encoder": (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.model.token_embedding.weight",
    ),
}
_UNET_TEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_SD1_TEXT_WIDTH = 768
_SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def locate_model(model: Model, key: str = "model") -> Path:
    """The local folder of a model, or its single file; a hub id is downloaded into the hub's cache when absent.

    Args:
        key: the manifest's section, for messages.

    Raises:
        WeightsError: the model cannot be found or fetched, is not safetensors, or is of another kind.
    """
    path = Path(tiny.resolve(model.path)).expanduser()
    if path.suffix.lower() in _PICKLES:
        raise WeightsError(
            f"{key}.path: {model.path} is a pickle, which can run code; take the model's .safetensors, or convert it"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(f"{key}.path: {model.path} is no .safetensors file; name a checkpoint or a folder")
        return path
    if model.config is not None:
        raise WeightsError(
            f"{key}.config: is for a single-file checkpoint, which {model.path} is not; check the path, or omit config"
        )
    folder = path if path.is_dir() else _download(model.path, model.revision, key, _CONFIG + _files(""))
    _check_kind(folder, model.path, key)
    missing = [part for part in _WEIGHTS if not part_file(folder, part).is_file()]
    if missing and not path.is_dir():
        _download(model.path, model.revision, key, _files(".fp16"))
        missing = [part for part in missing if not part_file(folder, part).is_file()]
    for part in missing:
        name = f"{part}/{_WEIGHTS[part]}"
        if (folder / f"{name}.index.json").is_file():
            raise WeightsError(
                f"{key}.path: {model.path} has its {part} in several files; save it with max_shard_size='20GB'"
            )
        raise WeightsError(f"{key}.path: {model.path} has no {name}; save the pipeline with safe_serialization=True")
    return folder


def locate_config(model: Model, key: str = "model") -> Path:
    """The local folder with a model's configuration and tokenizer: its own folder, or the one for its single file.

    A single file without `config` uses Stable Diffusion 1.5's from the hub, if it has the same keys. Models 2.x that
    predict epsilon and those that predict v have the same keys, so that `config` is required.

    Raises:
        WeightsError: as `locate_model`.
    """
    path = locate_model(model, key)
    if path.is_dir():
        return path
    name = _config_name(model, path, key)
    folder = Path(tiny.resolve(name)).expanduser()
    if not folder.is_dir():
        folder = _download(name, model.revision, key, _CONFIG)
    _check_kind(folder, name, key)
    return folder


def locate_lora(path: str) -> Path:
    """The local file of a style LoRA.

    Raises:
        WeightsError: there is none, or it is a pickle.
    """
    file = Path(tiny.resolve(path)).expanduser()
    if file.suffix.lower() in _PICKLES:
        raise WeightsError(f"style.lora: {path} is a pickle, which can run code; take the .safetensors, or convert it")
    if not file.is_file():
        raise WeightsError(f"style.lora: no such file {path}; check the path in the manifest")
    return file


def variant(folder: Path, part: str) -> str | None:
    """ "fp16" if the folder has the part in half precision only, else None."""
    name = _WEIGHTS[part]
    halves = folder / part / name.replace(".safetensors", ".fp16.safetensors")
    return "fp16" if halves.is_file() and not (folder / part / name).is_file() else None


def part_file(folder: Path, part: str) -> Path:
    """The file with the parameters of `part`, "unet", "vae" or "text_encoder"."""
    suffix = ".fp16" if variant(folder, part) else ""
    return folder / part / _WEIGHTS[part].replace(".safetensors", f"{suffix}.safetensors")


def parameter_names(model: Model, part: str, key: str = "model") -> list[str] | None:
    """The names of a part's parameters as `Prior` has them; None for a single file, which has others before loading.

    Raises:
        WeightsError: as `locate_model`, or the file is damaged.
    """
    folder = locate_model(model, key)
    if folder.is_file():
        return None
    return [name.removeprefix("text_model.") for name in _shapes(part_file(folder, part), f"{key}.path")]


def model_digests(manifest: Styled) -> dict[str, str]:
    """SHA-256 of every model file that the scores depend on, by a machine-independent name; empty without scores."""
    files: dict[str, Path] = {}
    for key, model in (("model", manifest.model), ("style.model", manifest.style.model)):
        if model is None:
            continue
        path, config = locate_model(model, key), locate_config(model, key)
        name = model.path
        if path.is_file():
            files[model.path] = path
            name = _config_name(model, path, key)
        else:
            weights = [part_file(path, part) for part in _WEIGHTS]
            files |= {f"{name}/{file.relative_to(path).as_posix()}": file for file in weights}
        files |= {f"{name}/{file}": config / file for file in _CONFIG if (config / file).is_file()}
    for lora in manifest.style.lora:
        files[lora] = locate_lora(lora)
        settings = files[lora].with_name("adapter_config.json")  # peft's, which decides alpha
        if files[lora].name == "adapter_model.safetensors" and settings.is_file():
            files[f"{lora} (adapter_config.json)"] = settings
    return {name: _digest(files[name]) for name in files}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(infix: str) -> tuple[str, ...]:
    return tuple(f"{part}/{name.replace('.safetensors', f'{infix}.safetensors')}" for part, name in _WEIGHTS.items())


def _download(name: str, revision: str | None, key: str, files: tuple[str, ...]) -> Path:
    if name.count("/") != 1 or name.startswith(("/", ".", "~", "tiny:")):
        raise _nothing(name, key)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error)
        raise WeightsError(f"{key}.path: {name} is no local folder, and the hub download failed: {reason}") from error


def _nothing(name: str, key: str) -> WeightsError:
    return WeightsError(
        f"{key}.path: {name} is neither a folder with a diffusers pipeline (model_index.json), nor a .safetensors "
        "file, nor a hub id; check the path, or save the model with pipeline.save_pretrained"
    )


def _conditioned(channels: int) -> str:
    return f"takes {channels} channels, as models for inpainting, depth or instructions do"


def _config_name(model: Model, file: Path, key: str) -> str:
    shapes = _shapes(file, f"{key}.path")
    foreign = [kind for name, kind in _FOREIGN.items() if name in shapes]
    if foreign:
        raise WeightsError(f"{key}.path: {model.path} is {foreign[0]}; {_KNOWN}")
    for part, names in _IN_FILE.items():
        if not any(name in shapes for name in names):
            raise WeightsError(
                f"{key}.path: {model.path} has no {part} ({names[0]}), and one file needs unet, vae and text encoder; "
                "take the whole checkpoint, or a folder"
            )
    channels = shapes[_UNET_INPUT][1]
    if shapes.get(_UNET_OUTPUT, [channels])[0] != channels:
        raise WeightsError(f"{key}.path: {model.path} {_conditioned(channels)}; {_KNOWN}")
    if model.config is not None:
        return model.config
    if shapes.get(_UNET_TEXT, [0])[-1] == _SD1_TEXT_WIDTH:
        return _SD1
    raise WeightsError(
        f"{key}.config: {model.path} is not Stable Diffusion 1.x, and keys of 2.x do not tell whether it predicts "
        "epsilon or v; name the folder or hub id of a model of its kind"
    )


def _shapes(file: Path, key: str) -> dict[str, list[int]]:
    try:
        with safe_open(file, "np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{key}: {file} is not a safetensors file ({error}); fetch or save it again") from error


def _check_kind(folder: Path, name: str, key: str) -> None:
    """Refuse a configuration that is not Stable Diffusion 1.x or 2.x; absent values are diffusers' defaults."""

    def refuse(what: str) -> WeightsError:
        return WeightsError(f"{key}.path: {name} {what}; {_KNOWN}")

    def read(file: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise WeightsError(
                f"{key}.path: {name} has no {file}; save the whole pipeline with pipeline.save_pretrained"
            ) from None
        except (OSError, ValueError) as error:
            raise WeightsError(f"{key}.path: cannot read {name}/{file} ({error}); save the model again") from error
        return content

    if not (folder / "model_index.json").is_file():
        raise _nothing(name, key)
    index = read("model_index.json")
    if "unet" not in index or "text_encoder_2" in index:
        raise refuse(f"is a {index.get('_class_name', 'pipeline without a UNet')}")
    scheduler, unet, text_encoder = (
        read(f"{part}_config.json" if part.startswith("scheduler") else f"{part}/config.json")
        for part in ("scheduler/scheduler", "unet", "text_encoder")
    )
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise refuse(f"predicts {scheduler['prediction_type']}")
    if scheduler.get("num_train_timesteps", 1000) != 1000:
        raise refuse(f"was trained with {scheduler['num_train_timesteps']} timesteps, not 1000")
    for field, kind in (
        ("addition_embed_type", "needs more than text (as Stable Diffusion XL does)"),
        ("class_embed_type", "needs a class or an image (as unCLIP does)"),
        ("num_class_embeds", "needs a class or a noise level (as upscalers do)"),
        ("time_cond_proj_dim", "is distilled to few steps (latent consistency)"),
    ):
        if unet.get(field) is not None:
            raise refuse(f"{kind}: its unet has {field} = {unet[field]}")
    channels = unet.get("in_channels", 4)
    if channels != unet.get("out_channels", 4):
        raise refuse(_conditioned(channels))
    if unet.get("cross_attention_dim", 1280) != text_encoder.get("hidden_size", 512):
        raise refuse("has a unet and a text encoder that do not fit each other")
