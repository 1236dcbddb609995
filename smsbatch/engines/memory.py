"""How many things fit the device's memory together, found out by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


class BatchFitter:
    """How many things of a size fit the device's memory together, found out by trying."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def each(
        self, count: int, pixels: int, batch_size: int, work: Callable[[slice], Result]
    ) -> Iterator[tuple[slice, Result | None, str]]:
        """Do `work` on `count` things of so many pixels, at most `batch_size` at once; what does not fit is halved, and
        less is tried from then on.

        Yields:
            Which, what came of it, and ''; or, of one that does not fit alone, None and the error's words.
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
                # Not before the exception is gone: its frames hold the tensors that must make room.
                gc.collect()
                torch.cuda.empty_cache()
                number = chosen.stop - chosen.start
                if number > 1:
                    self._most[pixels] = number // 2
                    continue
            yield chosen, result, error
            start = chosen.stop


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class of errors for it; the CPU's allocator, the driver, cuBLAS and cuDNN say it in words."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
