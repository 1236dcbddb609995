"""Where weight files are, and their digests. Without torch: a driver that only deals units never loads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from smsbatch import tiny
from smsbatch.errors import WeightsError
from smsbatch.manifest import Manifest

__all__ = ["digests", "left_out", "locate", "locate_lora"]

# What of a pipeline folder is read, and so decides results: not the pickles, variants and safety checkers beside it.
_READ = (
    "model_index.json",
    "scheduler/scheduler_config.json",
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
        return folder
    if folder.exists() or path.count("/") != 1 or path.startswith(("/", ".", "~", "tiny:")):
        raise WeightsError(
            f"model.path: no diffusers pipeline at {path} (a folder with model_index.json), nor a hub id"
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


def left_out(path: str) -> list[str]:
    """A line for what a style file holds and is not applied: parts for the text encoder, as in the released code.

    Raises:
        WeightsError: there is no such file, or it is not of safetensors.
    """
    try:
        with safe_open(locate_lora(path), "np") as file:
            count = sum(key.startswith("lora_te") for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"style.lora: {path} is not a safetensors file ({error})") from error
    return [f"{path}: {count} tensors for the text encoder are left out"] if count else []


def digests(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of every model file that results depend on, by a name that is the same on every machine."""
    model = locate(manifest.model.path, manifest.model.revision)
    files = {f"{manifest.model.path}/{name}": model / name for name in _READ if (model / name).is_file()}
    files[manifest.style.lora] = locate_lora(manifest.style.lora)
    return {name: _digest(file) for name, file in files.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
