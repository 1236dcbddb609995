"""The key rule: makes a source's name for a sample safe as a file name in any folder and tar.

A key is kept unchanged if it has no dot (tar readers end the key at the first dot), no backslash, no control character
and no empty part between its slashes, and fits with its longest extension into the 100 bytes of a USTAR name. Any other
key is mapped: offending characters become '_', empty parts are dropped, the rest is cut to fit, and '~' with ten hex
digits of the original's SHA-256 makes it unique. A key that already ends like a mapped one is mapped too, so no mapped
key equals another key.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeGuard

# Bytes of a USTAR name without its prefix field, which some readers ignore.
LONGEST_NAME = 100
LONGEST_EXTENSION = 32
LONGEST_LABEL = 64  # of a table's name in derived keys: enough to know it, and leaves room for the number
# Fields that every result has besides the source's own.
OURS = ("json", "webp")

_OFFENDING = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\"
_EXTENSION = re.compile(rf"[^/{_OFFENDING}]+")
_KEY = re.compile(rf"[^/.{_OFFENDING}]+(/[^/.{_OFFENDING}]+)*")
_BAD = re.compile(rf"[.{_OFFENDING}]")
_META = re.compile(r"__[^/]*__/")  # tar readers skip names that begin like this
_MAPPED = re.compile(r"~[0-9a-f]{10}$")


def map_key(wish: str, extensions: Iterable[str], original: str | None = None) -> tuple[str, str | None]:
    """(key, original_key) of a sample with these extensions; original_key is None if the key is the original.

    `wish` is the preferred key; `original`, by default the same, is the source's name for the sample.
    """
    original = wish if original is None else original
    names = (*extensions, *OURS)
    room = LONGEST_NAME - 1 - max(len(name.encode()) for name in names)
    meta = wish.startswith("__") and any(_META.match(f"{wish}.{name}/") for name in names)
    if _KEY.fullmatch(wish) and len(wish.encode()) <= room and not meta and not _MAPPED.search(wish):
        return wish, None if wish == original else shown(original)
    mark = f"~{_digest(original)}"
    stem = "/".join(part for part in sanitize(wish).split("/") if part)
    if meta:
        stem = stem.lstrip("_/")
    stem = _cut(stem, room - len(mark)).rstrip("/")
    return stem + mark, shown(original)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name of at most 64 bytes for each path, no two alike: of the file without its suffixes, `0000`.

    Files of one name are told apart by as many of their folders as that takes, `train__0000` and `test__0000`, and in
    one folder by their suffixes. Where that is too long or has characters that keys cannot have, names that would be
    alike end in `~` and a digest of these folders and the file's name.
    """
    split = [[part for part in _path(path).split("/") if part] or [path] for path in paths]
    stems = Counter((*parts[:-1], _stem(parts[-1])) for parts in split)
    named = [
        [*parts[:-1], _stem(parts[-1]) if stems[(*parts[:-1], _stem(parts[-1]))] == 1 else parts[-1]] for parts in split
    ]
    depths = [1] * len(named)
    while True:
        tails = [tuple(parts[-depth:]) for parts, depth in zip(named, depths, strict=True)]
        often = Counter(tails)
        deeper = [at for at, tail in enumerate(tails) if often[tail] > 1 and depths[at] < len(named[at])]
        if not deeper:
            break
        for at in deeper:
            depths[at] += 1
    short = [_cut(sanitize("__".join(tail)), LONGEST_LABEL) for tail in tails]
    alike = Counter(short)
    return [
        name if alike[name] == 1 else f"{_cut(name, LONGEST_LABEL - 11)}~{_digest('/'.join(parts[-depth:]))}"
        for name, parts, depth in zip(short, split, depths, strict=True)
    ]


def _stem(name: str) -> str:
    """A file's name without its extension, and without `.gz` after that."""
    return name.removesuffix(".gz").rpartition(".")[0] or name


def _path(url: str) -> str:
    """A URL without its query."""
    return re.split(r"[?#]", url)[0] if re.match("https?://", url, re.IGNORECASE) else url


def _cut(text: str, size: int) -> str:
    """As many of the first characters as fit into `size` bytes."""
    return text.encode()[:size].decode(errors="ignore")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def sanitize(text: str) -> str:
    """The text with '_' in place of each dot and other offending character."""
    return _BAD.sub("_", text)


def is_extension(name: str) -> bool:
    """True if a field's name can follow a key: no control character, no slash, at most 32 bytes."""
    return _EXTENSION.fullmatch(name) is not None and len(name.encode()) <= LONGEST_EXTENSION


def shown(text: str) -> str:
    """The text with escapes for what UTF-8 cannot encode (from names of tars and disks in other encodings)."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_text(value: object) -> TypeGuard[str]:
    """True for a string without lone surrogates, which JSON can escape but no file can hold."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))
