"""Format numbers, tables, sizes and durations for people; show values of the environment by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

_SHORTEST = 6  # letters of a value that `hidden` replaces; a shorter one is part of many words
_values: dict[str, str] = {}  # of all manifests of this process: value: `${NAME}`


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
    """A time in its two largest units: `0.8 s`, `42 s`, `3 min 20 s`, `5 h 2 min`, `4 d 7 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or parts:
            parts.append((amount, unit))
    return " ".join(f"{amount} {unit}" for amount, unit in parts[:2] if amount)


def moment(iso: str) -> str:
    """`2026-11-22T14:18:05+00:00` -> `2026-11-22 14:18 UTC`."""
    return f"{iso[:10]} {iso[11:16]} UTC"


def one_line(error: object) -> str:
    """The message of an error, or any other text, on one line, cut at 200 characters."""
    return " ".join(str(error).split())[:200]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def hide(environment: Mapping[str, str], alone: bool = False) -> None:
    """Have `hidden` replace the values of these environment variables, by name, in this process from now on.

    With `alone`, no others: the rows of a run must not depend on which manifests were read before.
    """
    if alone:
        _values.clear()
    for name, value in environment.items():
        shown = f"${{{name}}}"
        forms = dict.fromkeys(_parents(value), f"{shown}/..") | dict.fromkeys(_forms(value), shown)
        _values.update({form: as_shown for form, as_shown in forms.items() if len(form) >= _SHORTEST})


def _forms(value: str) -> Iterator[str]:
    """A value as other texts may have it: quoted, and as an absolute path."""
    yield from (value, quote(value), quote(value, safe=""))
    if _is_place(value) and "://" not in value:
        yield os.path.abspath(value)  # noqa: PTH100 - it follows no links


def _parents(value: str) -> Iterator[str]:
    """The folder of a file or pattern, in which are the files that it stands for or names."""
    literal = re.split(r"[*?\[{]", value)[0]
    folder, _, name = literal.rpartition("/")
    if not _is_place(value) or (literal == value and "." not in name):
        return
    if "://" not in value:
        yield os.path.abspath(folder or "/")  # noqa: PTH100 - it follows no links
    elif "/" in folder.partition("://")[2]:  # not a host alone
        yield folder


def _is_place(value: str) -> bool:
    return "/" in value and not any(map(str.isspace, value))


def hidden(text: str) -> str:
    """The text with `${NAME}` for the value of each environment variable of `hide`, the longest first."""
    if not any(value in text for value in _values):
        return text
    longest_first = sorted(_values, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: _values[match[0]], text)


def shortened(text: str, most: int) -> str:
    """The text, cut to at most so many characters and then with `…` as the last."""
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """The text with a space for each character that is not printable, such as line breaks."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def code_span(text: str) -> str:
    """Text as a Markdown code span of one line that may stand in a table: no bar, fences longer than any inside."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


def render_template(name: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A Jinja template of the package, with the words of this module as filters; HTML is escaped."""
    from jinja2 import (  # slow to import, and needed only for reports and cards
        Environment,
        PackageLoader,
        StrictUndefined,
    )

    environment = Environment(
        loader=PackageLoader("smsbatch", ""),
        autoescape=".html" in name,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "code_span": code_span,
        "count": count,
        "duration": duration,
        "moment": moment,
        "thousands": "{:,}".format,
        "three": "{:.3f}".format,
        **(filters or {}),
    }
    return environment.get_template(name).render(values)
