"""Find the fields of samples in a tar from its headers, and check that the archive is complete.

A tar cut at a member boundary opens and reads without any error. `Members.damage` therefore reports a last member that
is not followed by the end-of-archive mark of two zero blocks.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterator
from typing import IO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
END_OF_ARCHIVE = 2 * BLOCK

# The webdataset library's rules: the key ends at the first dot of the basename, names like __meta__ are not samples.
# Its own pattern takes `a/._x.jpg`, a file of macOS, for a sample `a/`; here it is hidden, as `._x.jpg` is.
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")

# Exceptions of tarfile on damaged headers, observed or found in its source; all are treated alike.
_DAMAGE = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError)


class Member(NamedTuple):
    """A regular file of an archive; its bytes are [offset, offset + length) of the archive."""

    name: str
    offset: int
    length: int


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) as the webdataset library splits them.

    None for names that it skips: without extension, hidden, __meta__. A leading './', as `tar -C folder .` writes it,
    is dropped.
    """
    name = re.sub(r"^(\./+)+", "", name)
    match = _NAME.fullmatch(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


class Members:
    """Iterate once over the regular files of an uncompressed tar, reading headers only.

    Folders, links, devices and sparse files are skipped. After the iteration `special` counts the skipped ones except
    folders, `end` is the byte after the last member, and `damage` describes a fault there, '' if there is none. A file
    that is not a tar raises tarfile.ReadError.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.end = 0
        self.damage = ""
        self.special = 0

    def __iter__(self) -> Iterator[Member]:
        self.file.seek(0)
        if not self.file.read(1):
            self.damage = "an empty file"
            return
        self.file.seek(0)
        with _opened(self.file) as tar:
            before = -1
            while True:
                try:
                    member = tar.next()
                except _DAMAGE as error:
                    self.damage = f"{error} at byte {tar.offset}"
                    return
                if member is None:
                    break
                # A negative size sends tarfile backwards into an endless loop, a huge one beyond the file.
                if member.size < 0 or not before < tar.offset < 1 << 62:
                    self.damage = f"a member of {member.size} bytes at byte {member.offset}"
                    return
                before = tar.offset
                # tarfile keeps all members for look-ups by name, which are not used here.
                tar.members = []  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
                elif not member.isdir():
                    self.special += 1
            self.end = tar.offset
        self.file.seek(self.end)
        tail = self.file.read(END_OF_ARCHIVE)
        if tail.strip(b"\0"):
            self.damage = f"damaged header at byte {self.end}, nothing after it can be read"
        elif len(tail) < END_OF_ARCHIVE:
            self.damage = "no end-of-archive blocks, perhaps cut"


def _opened(file: IO[bytes]) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
    except _DAMAGE as error:  # it reads the first header at once
        raise tarfile.ReadError(str(error)) from error


def find_members(file: IO[bytes], names: Collection[str]) -> dict[str, bytes]:
    """The contents of these files of a tar, as far as it has them; reads only the headers of all others."""
    wanted = [member for member in list(Members(file)) if member.name in names]
    found = {}
    for member in wanted:
        file.seek(member.offset)
        found[member.name] = file.read(member.length)
    return found
