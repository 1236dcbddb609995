"""Low-rank adaptations: style files of the wild, and the fake score's one LoRA per sample.

Style files are kohya's: `lora_unet_<module path with _>.{lora_down,lora_up}.weight` and `.alpha`, on linear layers,
1x1 and 3x3 convolutions (LoCon). delta W = (alpha / rank) up @ down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smsbatch.diffusion.prior import Prior
from smsbatch.diffusion.weights import locate_lora
from smsbatch.errors import WeightsError
from smsbatch.manifest import Fake

__all__ = ["FakeScore", "read_style_lora"]

_PREFIX = "lora_unet_"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def read_style_lora(path: str, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Read a kohya LoRA or LoCon file against the layers of a UNet.

    Parts for the text encoder (`lora_te...`) are left out, as the released code does; `weights.check_lora` says so.

    Returns:
        Weight differences by the UNet's layer, shaped as the layer's weight, float32, not yet scaled.

    Raises:
        WeightsError: the file is missing or no safetensors; a key is unknown, incomplete or of another shape.
    """
    try:
        tensors = load_file(locate_lora(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"style.lora: {path} is not a safetensors file ({error}); fetch it again") from error

    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if name.startswith("lora_te"):
            continue
        if name.startswith(_PREFIX) and part in _PARTS:
            modules.setdefault(name, {})[part] = tensor
        else:
            raise WeightsError(
                f"style.lora: {path}: key {key} is not of a kohya LoRA or LoCon, the kinds known here; convert the file"
            )
    if not modules:
        raise WeightsError(f"style.lora: {path} holds nothing for a UNet; choose another file")

    paths = {_PREFIX + name.replace(".", "_"): name for name in layers}
    deltas = {}
    for name, parts in modules.items():
        if name not in paths:
            raise WeightsError(
                f"style.lora: {path}: the model has no layer for {name}; choose a style made for this model"
            )
        try:
            deltas[paths[name]] = _delta(parts, layers[paths[name]])
        except KeyError as error:
            raise WeightsError(f"style.lora: {path}: {name} lacks {error.args[0]}; fetch the file again") from error
        except RuntimeError as error:
            raise WeightsError(
                f"style.lora: {path}: {name} does not fit the model: {error}; choose a style made for this model"
            ) from error
    return deltas


def _delta(parts: Mapping[str, Tensor], layer: nn.Module) -> Tensor:
    """(alpha / rank) up @ down in the shape of the layer's weight; alpha absent or zero means alpha = rank."""
    down, up = parts["lora_down.weight"].float(), parts["lora_up.weight"].float()
    rank = down.shape[0]
    alpha = (parts["alpha"].item() if "alpha" in parts else 0) or rank
    weight: Tensor = layer.weight  # type: ignore[assignment]
    shape = (up.shape[0], *down.shape[1:])
    if math.prod(shape) != weight.numel() or shape[:2] != weight.shape[:2]:  # a 1x1 convolution may stand for a linear
        raise RuntimeError(f"a delta of {list(shape)} for a weight of {list(weight.shape)}")
    return (alpha / rank) * (up.flatten(1) @ down.flatten(1)).view(weight.shape)


class FakeScore:
    """The fake score of B samples: the prior with, for each sample, its own LoRA trained on its own current result.

    The factors are A [B, r, in] and B [B, out, r] on every `to_q` and `to_v` of the attention, applied by one batched
    product. Losses are summed over samples of per-sample means and AdamW works element by element, so this *is* B
    separate runs, up to the rounding of the kernels. Rows of a call must be whole copies of the batch: k * B rows,
    row i belonging to sample i % B.

    Args:
        generators: one per sample; each draws its own LoRA's initial values (A Kaiming-uniform as peft's, B zero).
    """

    def __init__(self, prior: Prior, config: Fake, generators: Sequence[torch.Generator]) -> None:
        self.prior, self.scale = prior, config.alpha / config.rank
        self._layers = {name: layer for name, layer in prior.layers().items() if name.endswith(("to_q", "to_v"))}
        self._down: dict[str, Tensor] = {}
        self._up: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            out_features, in_features = layer.weight.shape  # type: ignore[misc]
            bound = in_features**-0.5  # kaiming_uniform with a = sqrt(5)
            draws = [
                torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
                for generator in generators
            ]
            self._down[name] = torch.stack(draws).to(prior.device).requires_grad_()
            self._up[name] = torch.zeros(
                len(generators), out_features, config.rank, device=prior.device
            ).requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [*self._down.values(), *self._up.values()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self._abar_weighted = config.weight == "alpha_bar"

    def __call__(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise prediction [k * B, C, h, w]."""
        with self._attached():
            return self.prior.noise(z_t, t, text)

    def train_step(self, z: Tensor, t: Tensor, eps: Tensor, text: Tensor) -> Tensor:
        """One AdamW step of every sample's LoRA on eps-MSE at its own `z`, `t` (paper, Eq. 19); the losses [B].

        With weight "alpha_bar" the error is scaled by abar_t before squaring, as the released code's is.
        """
        with torch.enable_grad():
            error = self(self.prior.schedule.add_noise(z, t, eps), t, text) - eps
            if self._abar_weighted:
                error = error * self.prior.schedule.abar[t].view(-1, 1, 1, 1)
            losses = error.square().flatten(1).mean(1)
            self._optimizer.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return losses.detach()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        handles = [layer.register_forward_hook(partial(self._add, name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, _layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = inputs[0]
        down, up = self._down[name].to(x.dtype), self._up[name].to(x.dtype)
        copies = x.view(-1, down.shape[0], *x.shape[1:])  # [k, B, tokens, in]
        return output + self.scale * (copies @ down.mT @ up.mT).view_as(output)
