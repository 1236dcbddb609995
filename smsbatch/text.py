"""Format numbers, tables, sizes and durations for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


def table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines of left-aligned columns, without trailing spaces."""
    known = list(rows)
    widths = [max(map(len, column)) for column in zip(*known, strict=True)]
    for row in known:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """A number of bytes to three digits, in a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def printable(text: str) -> str:
    """The text with a space for each character that is not printable, such as line breaks."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def bar(done: int, total: int) -> str:
    """A progress bar of 30 characters."""
    filled = round(30 * done / total) if total else 0
    return "█" * filled + "░" * (30 - filled)


def code_span(text: str) -> str:
    """Text as a Markdown code span of one line that may stand in a table: no bar, fences longer than any inside."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"
