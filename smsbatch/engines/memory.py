"""Find batch sizes that fit into the device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


class BatchFitter:
    """Finds by trial how many items of a size fit into the device's memory together."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def each(
        self, count: int, pixels: int, batch_size: int, work: Callable[[slice], Result]
    ) -> Iterator[tuple[slice, Result | None, str]]:
        """Do `work` on `count` items of `pixels` pixels, at most `batch_size` at once.

        A batch that does not fit is halved, and later batches of this size keep the smaller size.

        Yields:
            The slice, its result and ''; for a single item that does not fit, its slice, None and the error message.
        """
        start = 0
        while start < count:
            chosen = slice(start, min(count, start + min(batch_size, self._most.get(pixels, batch_size))))
            result, error = None, ""
            try:
                result = work(chosen)
            except RuntimeError as raised:
                if not _out_of_memory(raised):
                    raise
                error = str(raised) or "out of memory"
            if error:
                # Not in the except clause: the exception's frames hold the tensors to free.
                gc.collect()
                torch.cuda.empty_cache()
                number = chosen.stop - chosen.start
                if number > 1:
                    self._most[pixels] = number // 2
                    continue
            yield chosen, result, error
            start = chosen.stop


def _out_of_memory(error: RuntimeError) -> bool:
    """True for out of memory: CUDA has an error class; CPU allocator, driver, cuBLAS and cuDNN only have messages."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
