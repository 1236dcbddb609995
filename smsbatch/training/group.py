"""The workers of a training, and the values and errors that they share."""

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
    """The workers of a training. `rank` is this one's number; several need a process group, already set up.

    Attributes:
        error: the one that all workers have raised together, if any.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device
        self.error: SmsbatchError | None = None
        self._own: SmsbatchError | None = None

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over all workers, in place, by one all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    @contextmanager
    def defer_errors(self) -> Iterator[None]:
        """Keep a SmsbatchError from the body of the `with`; all workers raise it at the next `agree`, and only then.

        Raised by one worker alone, it would leave the others waiting for that one.
        """
        try:
            yield
        except SmsbatchError as error:
            self._own = error

    @contextmanager
    def collective(self) -> Iterator[None]:
        """`defer_errors` around work that every worker does, followed by `agree`, which raises the errors."""
        with self.defer_errors():
            yield
        self.agree()

    def agree(self, *counts: int) -> list[int]:
        """The sums of the counts over all workers.

        Raises:
            SmsbatchError: a worker has kept one since the last call; every worker raises it.
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
        """Raise an error that every worker has found; all of them raise the first worker's."""
        self._own = error
        self.agree()
        raise AssertionError("agree() raises it")

    def broadcast(self, value: _Shared) -> _Shared:
        """The value that worker 0 has."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]
