"""Read style LoRA files of all common kinds as differences of a prior's parameters.

    kind            parts of a module, r = rank                                 delta W
    LoRA, LoCon     lora_down [r, in, ...], lora_up [out, r, ...]               s up down
      tucker        and lora_mid [r, r, kh, kw]                                 s sum_pq up_op mid_pqkl down_qi
    LoHa            hada_w1_a [out, r], hada_w1_b [r, in ...], hada_w2_a, _b    s (w1_a w1_b) * (w2_a w2_b)
      tucker        wi_a [r, out], wi_b [r, in], hada_ti [r, r, kh, kw]         s (t1; w1_a, w1_b) * (t2; w2_a, w2_b)
    LoKr            lokr_w1 or lokr_w1_a, _b; lokr_w2 or lokr_w2_a, _b[, t2]    s w1 (x) w2; s = 1 if both are whole
    full, norm      diff, w_norm (and diff_b, b_norm of the bias)               diff
    IA3             weight [out], or [in] with on_input                         weight * W
    DoRA            any of the first three with a magnitude m                   m (W + delta) / |W + delta| - W

s = alpha / r, or alpha / sqrt(r) with `use_rslora` in peft's configuration; alpha absent or zero counts as r (LoRA,
2106.09685; LyCORIS, 2309.14859; DoRA, 2402.09353; IA3, 2205.05638).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smsbatch.diffusion.lora_files import Part, survey
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.errors import WeightsError
from smsbatch.manifest import Style


@dataclass(frozen=True)
class Deltas:
    """Differences to add to parameters, by `<layer>.weight` or `<layer>.bias`: of their shapes, float32, on the CPU."""

    unet: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, Tensor] = field(default_factory=dict)


def read_style(style: Style, prior: Prior) -> Deltas:
    """The sum of a style's LoRAs, each times its scale; empty without a LoRA.

    Raises:
        WeightsError: as `read_lora`.
    """
    total = Deltas()
    for path, scale in style.loras:
        deltas = read_lora(path, prior, text_encoder=style.text_encoder)
        for into, found in ((total.unet, deltas.unet), (total.text, deltas.text)):
            while found:  # deltas of every layer are as large as the model: free each once it is added
                name, delta = found.popitem()
                into[name] = into[name] + scale * delta if name in into else scale * delta
    return total


def read_lora(path: str, prior: Prior, *, text_encoder: bool) -> Deltas:
    """Read one LoRA file against the layers of a prior, not yet scaled.

    Args:
        text_encoder: read its parts for the text encoder too.

    Raises:
        WeightsError: the file is missing or not safetensors, or something in it is unknown, incomplete, not finite, or
            of a shape or for a layer that the prior does not have.
    """
    found, deltas = survey(path), Deltas()
    models = found.models(text_encoder)
    tensors = load_file(found.file)
    for key, tensor in tensors.items():
        if not tensor.numel() or not tensor.float().isfinite().all():
            raise WeightsError(f"style.lora: {path}: {key} is empty or holds NaN or infinity; choose another file")
    for model in models:
        layers = prior.layers() if model == "unet" else prior.text_layers()
        into, settings = getattr(deltas, model), _settings_of(model, found.settings)
        for name, keys in found.place(model, layers).items():
            parts, layer = {part: tensors[key].float() for part, key in keys.items()}, layers[name]
            try:
                for parameter, delta in _deltas(parts, layer, settings, name).items():
                    if not delta.isfinite().all():
                        raise WeightsError(f"style.lora: {path}: {name} gives NaN or infinity; choose another file")
                    into[f"{name}.{parameter}"] = delta
            except (RuntimeError, IndexError) as error:
                shapes = ", ".join(f"{key} {list(tensors[key].shape)}" for key in keys.values())
                raise WeightsError(
                    f"style.lora: {path}: {shapes} do not fit the model's {name} {_shapes(layer)}; "
                    "choose a style made for this model"
                ) from error
    return deltas


def _settings_of(model: Part, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one model: diffusers prefixes peft's settings with the model's name, peft does not."""
    prefix = {"unet": "unet.", "text": "text_encoder."}[model]
    return {
        key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix) or "." not in key
    }


def _shapes(layer: nn.Module) -> str:
    return " and ".join(f"{name} {list(tensor.shape)}" for name, tensor in layer.named_parameters(recurse=False))


def _deltas(parts: Mapping[str, Tensor], layer: nn.Module, settings: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The differences of a layer's `weight` and `bias`. RuntimeError: one does not fit."""
    old = {key: value.detach().float().cpu() for key, value in layer.named_parameters(recurse=False)}
    deltas = {}
    delta, weight = _product(parts, old["weight"]), old["weight"]
    if delta is not None:
        deltas["weight"] = _decomposed(parts, weight, _scale(parts, settings, name) * _fitted(delta, weight))
    bias = parts.get("diff_b", parts.get("b_norm"))
    if bias is not None:
        if "bias" not in old:
            raise RuntimeError("the layer has no bias")
        deltas["bias"] = _fitted(bias, old["bias"])
    return deltas


def _product(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """delta W in the table of the module's docstring, without s and DoRA."""
    get = parts.get
    if "lora_down" in parts:
        up, mid, down = parts["lora_up"], get("lora_mid"), parts["lora_down"]
        return _joined(up, down) if mid is None else _joined(up.flatten(1).T, down.flatten(1), mid)
    if "hada_w1_a" in parts:
        halves = [_joined(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], get(f"hada_t{i}")) for i in (1, 2)]
        return halves[0] * halves[1]
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        w1 = parts["lokr_w1"] if "lokr_w1" in parts else _joined(parts["lokr_w1_a"], parts["lokr_w1_b"])
        w2 = parts["lokr_w2"] if "lokr_w2" in parts else _joined(parts["lokr_w2_a"], parts["lokr_w2_b"], get("lokr_t2"))
        if w2.ndim == 2:  # for a convolution, LyCORIS writes [out, in * kh * kw]
            w2 = w2.reshape(len(w2), -1, *weight.shape[2:])
        return torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2.contiguous())  # kron views w2
    if "weight" in parts:
        shape = [1] * weight.ndim
        shape["on_input" in parts and bool(parts["on_input"])] = -1
        return weight * parts["weight"].reshape(shape)
    return get("diff", get("w_norm"))


def _joined(left: Tensor, right: Tensor, core: Tensor | None = None) -> Tensor:
    """left [out, r, ...] times right [r, ...]; around a core [r, r, kh, kw], left is [r, out] and right [r, in]."""
    if core is not None:
        product: Tensor = torch.einsum("pq...,po,qi->oi...", core, left, right)
        return product
    return (left.flatten(1) @ right.flatten(1)).view(len(left), *right.shape[1:])


def _fitted(delta: Tensor, parameter: Tensor) -> Tensor:
    """`delta` in the parameter's shape: 1x1 convolutions and linear layers fit each other, and a matrix fits any."""
    if delta.shape == parameter.shape:
        return delta
    if delta.shape[0] != parameter.shape[0] or (delta.ndim != 2 and delta.shape[:2] != parameter.shape[:2]):
        raise RuntimeError(f"{list(delta.shape)} for {list(parameter.shape)}")
    return delta.reshape(parameter.shape)


def _scale(parts: Mapping[str, Tensor], settings: Mapping[str, Any], name: str) -> float:
    """s of the module's docstring, for a layer's dotted path `name`."""
    rank = next((len(parts[p]) for p in ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if p in parts), None)
    if rank is None:
        return 1.0
    alpha = parts["alpha"].item() if "alpha" in parts else None
    if alpha is None and settings:
        patterns = settings.get("alpha_pattern") or {}
        paths = (name, f"text_model.{name}")  # a text encoder's may have the prefix; a pattern matches a path's end
        fits = (a for end, a in patterns.items() if any(re.fullmatch(rf"(.*\.)?({end})", path) for path in paths))
        alpha = next(fits, settings.get("lora_alpha"))
        if settings.get("use_rslora"):
            return (alpha or rank) / math.sqrt(rank)
    return (alpha or rank) / rank


def _decomposed(parts: Mapping[str, Tensor], weight: Tensor, delta: Tensor) -> Tensor:
    """DoRA's difference at strength 1, which a scale then multiplies; without a magnitude, `delta` itself.

    The magnitude is per output, or per input in older LyCORIS files, whose `dora_scale` is then [1, in, ...].
    """
    magnitude = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
    if magnitude is None:
        return delta
    by_input = "dora_scale" in parts and len(magnitude) == 1 < len(weight)
    merged = weight + delta
    norm = merged.transpose(0, int(by_input)).flatten(1).norm(dim=1)
    shape = [1] * weight.ndim
    shape[1 if by_input else 0] = -1
    stretch: Tensor = (magnitude.reshape(norm.shape) / norm).view(shape)
    return stretch * merged - weight
