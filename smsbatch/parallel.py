"""Run work in threads ahead of its consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
