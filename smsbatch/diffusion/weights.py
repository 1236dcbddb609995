"""Where weight files are, and their digests. Without torch: a driver that only deals units never loads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from smsbatch import tiny
from smsbatch.errors import WeightsError
from smsbatch.manifest import Manifest

__all__ = ["check_lora", "digests", "locate", "locate_lora"]

# What of a pipeline folder is read, and so decides results: not the pickles, variants and safety checkers beside it.
_READ = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)


def locate(path: str, revision: str | None = None) -> Path:
    """The local folder of a model named by folder, `tiny`, or hub id (downloaded into the hub's cache when absent).

    Raises:
        WeightsError: neither a folder in diffusers' format nor a hub id that could be fetched.
    """
    folder = Path(tiny.resolve(path)).expanduser()
    if (folder / "model_index.json").is_file():
        for name in _READ:
            if name.endswith(".safetensors") and not (folder / name).is_file():
                raise WeightsError(f"model.path: {path} has no {name}; save the pipeline with safe_serialization=True")
        return folder
    if folder.exists() or path.count("/") != 1 or path.startswith(("/", ".", "~", "tiny:")):
        raise WeightsError(
            f"model.path: {path} is neither a folder with a diffusers pipeline (model_index.json) nor a hub id; "
            "check the path, or save the model with pipeline.save_pretrained"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(_READ)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"model.path: {path} is no folder here, and the hub did not give it: {reason}") from error


def locate_lora(path: str) -> Path:
    """The local file of a style LoRA.

    Raises:
        WeightsError: there is none.
    """
    file = Path(tiny.resolve(path)).expanduser()
    if not file.is_file():
        raise WeightsError(f"style.lora: no such file {path}; check the path in the manifest")
    return file


def check_lora(manifest: Manifest) -> list[str]:
    """Hold the style file's keys against the model's UNet; a line for what is left out: parts for the text encoder.

    Raises:
        WeightsError: model or style are missing or damaged, or the style is for another architecture.
    """
    path = manifest.style.lora
    unet = locate(manifest.model.path, manifest.model.revision) / "unet/diffusion_pytorch_model.safetensors"
    layers = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_") for key in _keys(unet, "model.path")}
    modules = {key.partition(".")[0] for key in _keys(locate_lora(path), "style.lora")}
    skipped = {name for name in modules if name.startswith("lora_te")}
    unknown = sorted(modules - layers - skipped)
    if unknown:
        raise WeightsError(
            f"style.lora: {path}: {unknown[0]} is no layer of {manifest.model.path} (known: kohya's LoRA and LoCon); "
            "choose a style made for this model"
        )
    return [f"{path}: parts for {len(skipped)} layers of the text encoder are left out"] if skipped else []


def _keys(file: Path, key: str) -> list[str]:
    try:
        with safe_open(file, "np") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{key}: {file} is not a safetensors file ({error}); fetch or save it again") from error


def digests(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of every model file that results depend on, by a name that is the same on every machine."""
    model = locate(manifest.model.path, manifest.model.revision)
    files = {f"{manifest.model.path}/{name}": model / name for name in _READ if (model / name).is_file()}
    files[manifest.style.lora] = locate_lora(manifest.style.lora)
    return {name: _digest(file) for name, file in files.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
