"""The key rule: what a source calls a sample, made safe to be a file's name in anybody's folder and tar.

A key is taken as it is when it has no dot (readers of tars end the key at the first one), no backslash, no control
character, only non-empty parts between its slashes, and fits with its longest extension into the 100 bytes of a USTAR
name. Any other is mapped: what offends becomes '_', empty parts go, the rest is cut to fit, and '~' with ten hex digits
of the SHA-256 of the original make it one of its own. A key that already ends like a mapped one is mapped too, so no
mapped key is ever equal to another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

__all__ = ["LONGEST_NAME", "is_extension", "map_key", "printable", "sanitize"]

# What a USTAR name holds without its prefix field, which not every reader joins.
LONGEST_NAME = 100
LONGEST_EXTENSION = 32
# Beside the source's own fields every result has these.
OURS = ("json", "webp")

_OFFENDING = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\"
_EXTENSION = re.compile(rf"[^/{_OFFENDING}]+")
_KEY = re.compile(rf"[^/.{_OFFENDING}]+(/[^/.{_OFFENDING}]+)*")
_BAD = re.compile(rf"[.{_OFFENDING}]")
_META = re.compile(r"__[^/]*__/")  # readers of tars take what begins so for no sample
_MAPPED = re.compile(r"~[0-9a-f]{10}$")


def map_key(wish: str, extensions: Iterable[str], original: str | None = None) -> tuple[str, str | None]:
    """(key, original_key) of a sample with these extensions; original_key is None where the key is the original.

    `wish` is what the key should be, `original`, by default the same, what the source calls the sample.
    """
    original = wish if original is None else original
    room = LONGEST_NAME - 1 - max(len(name.encode()) for name in (*extensions, *OURS))
    if _KEY.fullmatch(wish) and len(wish.encode()) <= room and not _META.match(wish) and not _MAPPED.search(wish):
        return wish, None if wish == original else printable(original)
    mark = "~" + hashlib.sha256(original.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    stem = "/".join(part for part in sanitize(wish).split("/") if part)
    if _META.match(stem):
        stem = stem.lstrip("_/")
    stem = stem.encode()[: room - len(mark)].decode(errors="ignore").rstrip("/")
    return stem + mark, printable(original)


def sanitize(text: str) -> str:
    """The text with '_' for each of its dots and other offending characters."""
    return _BAD.sub("_", text)


def is_extension(name: str) -> bool:
    """Whether a field of this name can stand beside a key: no control character, no slash, at most 32 bytes."""
    return _EXTENSION.fullmatch(name) is not None and len(name.encode()) <= LONGEST_EXTENSION


def printable(text: str) -> str:
    """The text with what no file can hold as UTF-8 (names of tars and disks in other encodings) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
