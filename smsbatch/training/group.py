"""The workers of a training, and what they agree upon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smsbatch.errors import SmsbatchError

_Shared = TypeVar("_Shared")


class WorkerGroup:
    """The workers of a training. `rank` is this one's number; where there are several, a process group is set up.

    Attributes:
        error: what all of them have raised together, if they have.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device
        self.error: SmsbatchError | None = None
        self._own: SmsbatchError | None = None

    def average(self, tensors: list[Tensor]) -> None:
        """Make tensors their means over all workers, in place: one all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    @contextmanager
    def defer_errors(self) -> Iterator[None]:
        """What a worker does on its own: an error of ours inside is raised by all at the next `agree`, and only then.

        Raised by one alone, it would leave the others waiting for that one.
        """
        try:
            yield
        except SmsbatchError as error:
            self._own = error

    @contextmanager
    def collective(self) -> Iterator[None]:
        """What all workers do here, each on its own: `defer_errors`, followed by `agree`, whose errors it raises."""
        with self.defer_errors():
            yield
        self.agree()

    def agree(self, *counts: int) -> list[int]:
        """The sums of the counts over all workers.

        Raises:
            SmsbatchError: a worker has met one since the last time; every worker raises it.
        """
        sums = [int(self._own is not None), *counts]
        if self.size > 1:
            reduced = torch.tensor(sums)
            dist.all_reduce(reduced)
            sums = reduced.tolist()
        if sums[0]:
            errors = [self._own]
            if self.size > 1:
                errors *= self.size
                dist.all_gather_object(errors, self._own)
            self.error = next(error for error in errors if error is not None)
            raise self.error
        return sums[1:]

    def fail(self, error: SmsbatchError) -> NoReturn:
        """Raise what every worker has found; the words of the first one count."""
        self._own = error
        self.agree()
        raise AssertionError("agree() raises it")

    def broadcast(self, value: _Shared) -> _Shared:
        """The value that worker 0 has."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]
