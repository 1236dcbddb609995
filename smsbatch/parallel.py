"""Run work in threads ahead of its consumer, and within a limit of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def started_ahead(started: Iterable[Item], places: int) -> Iterator[Item]:
    """The same items, taken from `started` up to `places` ahead of the consumer."""
    remaining = iter(started)
    window = deque(islice(remaining, places))
    while window:
        yield window.popleft()
        window.extend(islice(remaining, 1))


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """Yield the function's result for every item, in their order; threads run ahead of the caller by two items each.

    Closing the iterator early starts no further items. An exception of the function is raised at its item.
    """
    workers = ThreadPoolExecutor(threads, thread_name_prefix=f"smsbatch-{getattr(function, '__name__', 'map')}")
    try:
        futures = started_ahead((workers.submit(function, item) for item in items), 2 * threads)
        yield from (future.result() for future in futures)
    finally:
        workers.shutdown(cancel_futures=True)


class MemoryLimit:
    """Lets threads take memory up to a limit of bytes, in the order in which they ask; more than all is taken alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold `size` bytes in the context; waits until they are free."""
        size, turn = min(size, self.limit), object()
        with self._changed:
            self._waiting.append(turn)
            self._changed.wait_for(lambda: self._waiting[0] is turn and self.taken + size <= self.limit)
            self._waiting.popleft()
            self.taken += size
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.taken -= size
                self._changed.notify_all()
