"""Start work ahead of its consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def started_ahead(started: Iterable[Item], places: int) -> Iterator[Item]:
    """The same items, drawn from `started` up to `places` ahead of the consumer."""
    remaining = iter(started)
    window = deque(islice(remaining, places))
    while window:
        yield window.popleft()
        window.extend(islice(remaining, 1))
