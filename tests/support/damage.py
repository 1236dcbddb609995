"""Single changes of the files of a run, by a seeded generator: bytes, JSON values, swaps, deletions, truncations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Change:
    """A change, in words, of the files at `places`."""

    places: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        return f"{' and '.join(self.places)}: {self.what}"


def flip(path: Path, at: float = 0.5) -> None:
    """Change a bit of the byte at this fraction of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def torn(path: Path) -> None:
    """Empty a file, as a power loss does."""
    path.write_bytes(b"")


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change(folder: Path, draws: random.Random) -> Change:
    """Make one change of any file, or of two that are swapped."""
    files = files_of(folder)
    place = draws.choice(sorted(files))
    data, path = files[place], folder / place
    kinds = ["delete", "truncate", "flip", "flip", "swap", *(["value"] * 3 if place.endswith(".json") else [])]
    kind = draws.choice(kinds) if data else draws.choice(["delete", "append"])
    match kind:
        case "delete":
            path.unlink()
            return Change((place,), "deleted")
        case "append":
            path.write_bytes(b"x")
            return Change((place,), "a byte appended")
        case "truncate":
            length = draws.randrange(len(data))
            path.write_bytes(data[:length])
            return Change((place,), f"cut to {length} of {len(data)} bytes")
        case "flip":
            at, bit = draws.randrange(len(data)), 1 << draws.randrange(8)
            path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            return Change((place,), f"bit {bit} of byte {at} of {len(data)} flipped")
        case "swap":
            other = draws.choice(sorted(name for name in files if files[name] != data))
            path.write_bytes(files[other])
            (folder / other).write_bytes(data)
            return Change((place, other), "swapped")
        case _:
            values = json.loads(data)
            holder, key = draws.choice(list(leaves(values)))
            before, holder[key] = holder[key], _other(holder[key], draws)
            path.write_text(json.dumps(values, indent=1))
            return Change((place,), f"{key} is {holder[key]!r}, was {before!r}")


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of each value that is no mapping and no list."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list) and inner:
            yield from leaves(inner)
        else:
            yield value, key


def _other(value: Any, draws: random.Random) -> Any:
    """A value that differs, mostly of the same type."""
    others = [None, "text", 7, -1.5, [], {}, not value]
    match value:
        case bool():
            others += [not value] * 9
        case int() | float():
            others += [value + 1] * 9
        case str():
            others += [value + "x"] * 9
    return draws.choice([other for other in others if other != value])
