"""Common parts of the training programs: LPIPS from the bundled trunk, moving averages, checkpoints, the learning rate.

A checkpoint is one file, replaced atomically; a program started again with the same folder continues where it stopped.
Two single-threaded processes that average their gradients (`torchrun --nproc-per-node 2`) make better use of two cores
than one process with two threads, which loses a fifth of its time at barriers, and most of it on a busy machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lpips
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

TINY = Path(__file__).parents[2] / "smsbatch" / "tiny"
TRUNK = TINY / "lpips_alex.safetensors"


def load_lpips(trunk: Path = TRUNK) -> nn.Module:
    """LPIPS v0.1 with AlexNet; images in [-1, 1]. `net.net` is the trunk, for its features."""
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    weights = load_file(trunk)
    for i, slice_ in enumerate((net.net.slice1, net.net.slice2, net.net.slice3, net.net.slice4, net.net.slice5)):
        for name, layer in slice_.named_children():
            if isinstance(layer, nn.Conv2d):
                layer.load_state_dict({k: weights[f"features.{name}.{k}"] for k in ("weight", "bias")})
                assert i == (0, 3, 6, 8, 10).index(int(name))
    return net.eval().requires_grad_(False)


def cosine(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.01) -> float:
    """Linear warm-up, then a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Average:
    """Exponential moving average of parameters; young averages forget faster, which avoids a bias towards the start."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the `with`, the model's parameters are the average."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.count = state["shadow"], state["count"]


def join() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def in_turn() -> Iterator[None]:
    """Run rank 0 first and the others after it: for work whose result is kept in a file."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients by their means over all processes."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def save_checkpoint(path: Path, step: int, **parts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, fresh)
    fresh.replace(path)


def load_checkpoint(path: Path, **parts: Any) -> int:
    """Restore the parts; returns the next step, 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
