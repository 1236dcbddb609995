"""Batch sizes that fit the device's memory, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


class BatchFitter:
    """The number of items of a size that fit the device's memory together, found by trying."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def each(
        self, count: int, pixels: int, batch_size: int, work: Callable[[slice], Result]
    ) -> Iterator[tuple[slice, Result | None, str]]:
        """Do `work` on `count` items of `pixels` pixels, at most `batch_size` at once; a batch that does not fit is
        halved, and so are later ones of this size.

        Yields:
            The slice, its result and ''; or, for one item that does not fit alone, None and the error's message.
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
                # Only once the exception is gone: its frames hold the tensors to free.
                gc.collect()
                torch.cuda.empty_cache()
                number = chosen.stop - chosen.start
                if number > 1:
                    self._most[pixels] = number // 2
                    continue
            yield chosen, result, error
            start = chosen.stop


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has an error class for it; the CPU's allocator, the driver, cuBLAS and cuDNN only have messages."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
