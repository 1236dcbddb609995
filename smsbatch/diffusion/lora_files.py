"""The grammar of style LoRA files: which key belongs to which layer. Without torch: a driver checks files with it.

A key is <layer>.<part>. The layer is written kohya's way (`lora_unet_` or `lora_te_` and the path with _ for .), or as
a path (diffusers, peft, ComfyUI: `unet.`, `base_model.model.`, `diffusion_model.`, ... or nothing in front). The UNet's
layers may have the names of the original Stable Diffusion code. An unknown key is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from smsbatch.diffusion.priors.files import locate_lora, locate_model, parameter_names
from smsbatch.errors import WeightsError
from smsbatch.manifest import Styled

Part = Literal["unet", "text"]
_MODELS: tuple[Part, ...] = ("unet", "text")

# The parts of each kind of module, apart from `_ALSO`; a module with any other set of parts is incomplete.
_KINDS = (
    {"lora_down", "lora_up"},
    {"lora_down", "lora_up", "lora_mid"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    *(
        {f"lokr_{name}" for name in (*left, *right)}
        for left in (("w1",), ("w1_a", "w1_b"))
        for right in (("w2",), ("w2_a", "w2_b"), ("t2", "w2_a", "w2_b"))
    ),
    {"diff"},
    {"w_norm"},
    {"w_norm", "b_norm"},
    {"weight"},
    {"weight", "on_input"},
)
_ALSO = {"alpha", "diff_b", "dora_scale", "lora_magnitude_vector"}
_KOHYA_PARTS = {
    **{name: name for name in set().union(*_KINDS) | _ALSO if not name.startswith("lora_")},
    **{f"{name}.weight": name for name in ("lora_down", "lora_mid", "lora_up")},
}
_PATH_PARTS = {
    r"lora_A(\.\w+)?\.weight|lora(_linear_layer)?\.down\.weight|lora_down\.weight": "lora_down",
    r"lora_B(\.\w+)?\.weight|lora(_linear_layer)?\.up\.weight|lora_up\.weight": "lora_up",
    r"lora_magnitude_vector(\.\w+)?": "lora_magnitude_vector",
    r"(lora(_linear_layer)?\.)?alpha": "alpha",
    r"diff": "diff",
    r"diff_b": "diff_b",
}
# Prefixes of a path, and the model that each one names, if any.
_PREFIXES: dict[str | None, Part | None] = {
    "unet.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text",
    "text_encoders.clip_l.transformer.": "text",
    "base_model.model.": None,
    None: None,
}
_REFUSED = {
    r"lora_te2_.*|text_encoder_2\..*": "is for the second text encoder of SDXL",
    r".*\.(oft_\w+|rescale)(\..*)?": "is of OFT or BOFT",
    r".*\.([ab][12]|bm)\.weight": "is of GLoRA",
    r".*\.bias_(indices|values|size)": "is of a sparse bias",
    r".*\.lora_embedding_[AB].*": "is of an embedding",
    r".*\.lora_[AB](\.\w+)?\.bias": "is the bias of a factor",
    r"bundle_emb\..*": "is an embedding in the LoRA's file",
}
# The original code's names of the layers outside the stages, and of those within a ResNet block.
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SHOWN = 3  # names in a message; the rest are counted


class Key(NamedTuple):
    """A key, parsed.

    `layer` is the path in diffusers' or transformers' model with _ for . and without the prefix `text_model`, which
    CLIP's text encoder has only in some versions of transformers.
    """

    model: Part
    layer: str
    part: str


def parse(key: str) -> Key:
    """Parse a key of a LoRA file.

    Raises:
        ValueError: it is of no kind known here; the message describes its kind.
    """
    for pattern, what in _REFUSED.items():
        if re.fullmatch(pattern, key):
            raise ValueError(what)
    if found := re.fullmatch(r"(lora_unet|lora_te1?|lycoris)_(\w+)\.(.+)", key):
        prefix, layer, part = found.groups()
        if part in _KOHYA_PARTS:
            model: Part | None = "unet" if prefix == "lora_unet" else "text" if prefix.startswith("lora_te") else None
            return _key(model, layer, _KOHYA_PARTS[part])
    prefixes = "|".join(re.escape(prefix) for prefix in _PREFIXES if prefix)
    for pattern, part in _PATH_PARTS.items():
        if found := re.fullmatch(rf"({prefixes})?([\w.]+?)\.(?:{pattern})", _new(key)):
            return _key(_PREFIXES[found[1]], found[2].replace(".", "_"), part)
    raise ValueError("is of no kind known here")


def _key(model: Part | None, layer: str, part: str) -> Key:
    """Without a `model`, the layer's name decides to which model it belongs."""
    is_text = model == "text" or (model is None and layer.startswith(("text_model_", "encoder_layers_")))
    return Key("text", layer.removeprefix("text_model_"), part) if is_text else Key("unet", layer, part)


def _new(key: str) -> str:
    """The key as diffusers writes it today: it once kept an attention layer's LoRA in its processor."""
    key = key.replace(".processor.", ".")
    key = re.sub(r"\.to_([qkv])_lora\.", r".to_\1.lora.", key).replace(".to_out_lora.", ".to_out.0.lora.")
    key = re.sub(r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj.", key)
    return key.replace(".self_attn.to_out.0.", ".self_attn.out_proj.")


@dataclass(frozen=True)
class Survey:
    """The contents of a file, by its header.

    Attributes:
        path: as the manifest names it.
        modules: by model and layer, the key of every part.
        settings: peft's configuration: `lora_alpha`, `alpha_pattern`, `use_rslora`, ...
    """

    path: str
    file: Path
    modules: Mapping[tuple[Part, str], Mapping[str, str]]
    settings: Mapping[str, Any]

    def place(self, model: Part, paths: Collection[str]) -> dict[str, Mapping[str, str]]:
        """The keys of each layer's parts, by the layer's dotted path in `paths`.

        Raises:
            WeightsError: a layer is not in `paths`.
        """
        names = {path.replace(".", "_").removeprefix("text_model_" if model == "text" else ""): path for path in paths}
        if model == "unet":
            names = {name.replace(".", "_"): path for name, path in _originals(paths).items()} | names
        wanted = {layer: parts for (of, layer), parts in self.modules.items() if of == model}
        if strange := [next(iter(parts.values())) for layer, parts in wanted.items() if layer not in names]:
            raise WeightsError(
                f"style.lora: {self.path}: the model has no layer for {_some(strange)}; "
                "choose a style made for this model"
            )
        return {names[layer]: parts for layer, parts in wanted.items()}

    def models(self, text_encoder: bool) -> list[Part]:
        """The models that the file changes.

        Raises:
            WeightsError: it changes none.
        """
        held = {model for model, _ in self.modules}
        used = [model for model in _MODELS if model in held and (model == "unet" or text_encoder)]
        if not used:
            what = "parts for the text encoder alone, and style.text_encoder is false" if held else "no weights"
            raise WeightsError(f"style.lora: {self.path} holds {what}; choose another file")
        return used


def survey(path: str) -> Survey:
    """Read a LoRA file's header.

    Raises:
        WeightsError: the file is missing, a pickle or damaged, a key is unknown, or a part is repeated or missing.
    """
    file = locate_lora(path)
    try:
        with safe_open(file, "np") as tensors:
            keys, metadata = list(tensors.keys()), tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"style.lora: {path} is not a safetensors file ({error}); fetch it again") from error

    modules: dict[tuple[Part, str], dict[str, str]] = {}
    unknown: dict[str, list[str]] = {}
    for key in keys:
        try:
            model, layer, part = parse(key)
        except ValueError as error:
            unknown.setdefault(str(error), []).append(key)
            continue
        parts = modules.setdefault((model, layer), {})
        if part in parts:
            raise WeightsError(f"style.lora: {path}: {parts[part]} and {key} are the same part; choose another file")
        parts[part] = key
    if unknown:
        what = "; ".join(f"{_some(strange)} {reason}" for reason, strange in unknown.items())
        raise WeightsError(f"style.lora: {path}: {what} (known: LoRA, LoCon, LoHa, LoKr, IA3, full); convert the file")
    for parts in modules.values():
        _complete(path, parts)
    return Survey(path, file, modules, _settings(path, file, metadata))


def _complete(path: str, parts: Mapping[str, str]) -> None:
    """Refuse an incomplete module; the message compares it with the nearest complete one."""
    own = parts.keys() - _ALSO
    if own in _KINDS or (not own and "diff_b" in parts and len(parts) == 1):
        return
    if not own:
        raise WeightsError(f"style.lora: {path}: {_some(parts.values())} has no weights; fetch the file again")
    nearest = min(_KINDS, key=lambda kind: (len(own ^ kind), sorted(kind)))
    wrong = [f"no {name}" for name in sorted(nearest - own)] + [f"{name} too" for name in sorted(own - nearest)]
    first = parts[min(own & nearest, default=min(own))]
    raise WeightsError(f"style.lora: {path}: with {first} there is {' and '.join(wrong)}; fetch the file again")


def _settings(path: str, file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Peft's configuration: diffusers writes it into the file, peft into one next to `adapter_model.safetensors`."""
    beside = file.with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata")
    if text is None and file.name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text("utf-8")
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise WeightsError(f"style.lora: {path}: its peft configuration is no JSON ({error}); save it again") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"style.lora: {path}: its peft configuration is no JSON object; save it again")
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        patterns = value if name == "alpha_pattern" and isinstance(value, dict) else {}
        # Peft reads them as regular expressions; from an unknown author, only those that match quickly are allowed.
        strange = [p for p in patterns if not re.fullmatch(r"[\w.\\^$|*]+", p) or p.count("*") > 3 or "**" in p]
        if strange:
            raise WeightsError(f"style.lora: {path}: {key} has the pattern {strange[0]!r}; name the layers instead")
        alphas = [value] if name == "lora_alpha" else [*patterns.values()]
        if not all(isinstance(alpha, int | float) for alpha in alphas):
            raise WeightsError(f"style.lora: {path}: {key} of its peft configuration is no number: {value!r}")
    return settings


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    shown = [first, *rest[: _SHOWN - 1]]
    more = len(rest) + 1 - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _originals(paths: Collection[str]) -> dict[str, str]:
    """The UNet's layers by their paths in the original Stable Diffusion code, for the layout of 1.x and 2.x.

    That code numbers the places of all stages consecutively, and ResNet block, attention and resampling within a place:
    `input_blocks.4.1` is the attention of the second stage's first place.
    """
    attending = {path.partition(".attentions.")[0] for path in paths if ".attentions." in path}
    per_stage = 1 + sum(1 for path in paths if re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", path))
    names = {}
    for path in paths:
        found = re.fullmatch(r"((down|mid|up)_blocks?(?:\.(\d+))?)\.([a-z]+)\.(\d+)\.(.+)", path)
        if not found:
            names[_ENDS.get(path, path)] = path
            continue
        block, side, stage, kind, place, rest = (
            *found.groups()[:2],
            int(found[3] or 0),
            found[4],
            int(found[5]),
            found[6],
        )
        begin, within = stage * per_stage, int(kind == "attentions")
        if kind == "resnets":
            rest = _RESNET.get(rest, rest)
        if kind == "downsamplers":
            name = f"input_blocks.{begin + per_stage}.0.op"
        elif kind == "upsamplers":
            name = f"output_blocks.{begin + per_stage - 1}.{1 + (block in attending)}.conv"
        elif side == "mid":
            name = f"middle_block.{1 if within else 2 * place}.{rest}"
        else:
            name = (
                f"input_blocks.{1 + begin + place}.{within}.{rest}"
                if side == "down"
                else f"output_blocks.{begin + place}.{within}.{rest}"
            )
        names[name] = path
    return names


def check_style(manifest: Styled) -> list[str]:
    """Check every LoRA file's keys against its model's layers; returns a notice for each file with parts left out.

    The layers of a single-file checkpoint are not known here: then only the LoRA files themselves are checked.

    Raises:
        WeightsError: a model or the style is missing or damaged, or the style is for another architecture.
    """
    style, notices = manifest.style, []
    if manifest.objective.identity == "latent_lpips" and find_spec("elatentlpips") is None:
        raise WeightsError(
            "objective.identity: latent_lpips is an extra: pip install elatentlpips 'setuptools<81', which is not for "
            "commercial use, or take spectral"
        )
    locate_model(manifest.model)
    model, key = (style.model, "style.model") if style.model else (manifest.model, "model")
    names = {"unet": parameter_names(model, "unet", key), "text": parameter_names(model, "text_encoder", key)}
    layers = {part: {name.rpartition(".")[0] for name in found} for part, found in names.items() if found is not None}
    for path, _ in style.loras:
        found = survey(path)
        for part in found.models(style.text_encoder):
            if part in layers:
                found.place(part, layers[part])
        left_out = sum(part == "text" for part, _ in found.modules)
        if left_out and not style.text_encoder:
            notices.append(f"{path}: parts for {left_out} layers of the text encoder are left out")
    return notices
