"""Threads and calls that run ahead of whoever takes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def started_ahead(started: Iterable[Item], places: int) -> Iterator[Item]:
    """The same items, each taken from its source so many places before it is given."""
    remaining = iter(started)
    window = deque(islice(remaining, places))
    while window:
        yield window.popleft()
        window.extend(islice(remaining, 1))
