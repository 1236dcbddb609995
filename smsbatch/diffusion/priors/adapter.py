"""Low-rank adapters, one for each row of a batch, added to the layers of a network during a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A low-rank update of the named linear layers per sample, y = W x + scale up (down x), in some rows of a call.

    Row i of the first `rows` rows belongs to sample i % B; the other rows see the bare prior. `rows` is a multiple
    of B. Rows never mix, so that an entry that is not finite stays in its sample.

    Attributes:
        scale: alpha / r.
        down: [B, r, in] by layer, float32; cast to the activations' dtype.
        up: [B, out, r] by layer.
    """

    scale: float
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    rows: int

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output `y` [N, ..., out] for its input `x` [N, ..., in], updated."""
        down, up = self.down[name].to(x.dtype), self.up[name].to(x.dtype)
        copies = x[: self.rows].reshape(-1, down.shape[0], x[0].numel() // x.shape[-1], x.shape[-1])
        update = self.scale * (copies @ down.mT @ up.mT).reshape(-1, *y.shape[1:])
        return torch.cat([y[: self.rows] + update, y[self.rows :]]) if self.rows < len(y) else y + update


class _Adapted:
    """A UNet whose layers apply the adapter of the current call.

    A layer is hooked once, when an adapter first names it: with new hooks in every call, the compiler would recompile.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._adapter: Adapter | None = None
        self._hooks: dict[str, Any] = {}

    def prepare(self, adapter: Adapter) -> None:
        for name in adapter.down.keys() - self._hooks.keys():
            layer = self._unet.get_submodule(name)
            self._hooks[name] = layer.register_forward_hook(lambda _, inputs, y, name=name: self._hook(name, inputs, y))

    def remove(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self._adapter is None or name not in self._adapter.down:
            return y
        return self._adapter.add(name, inputs[0], y)

    def __call__(self, z_t: Tensor, t: Tensor, text: Tensor, adapter: Adapter | None) -> Tensor:
        self._adapter = adapter
        prediction: Tensor = self._unet(z_t, t, encoder_hidden_states=text, return_dict=False)[0]
        return prediction

    def release(self) -> None:
        """Forget the last call's adapter: another prior may share the UNet, and after OOM its factors must be freed."""
        self._adapter = None
