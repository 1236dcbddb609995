"""Source objects wherever they lie, read only: what a name means, what a folder holds, and the bytes of one sample.

    local paths, `tiny:` names, `file://`      etag = time of change and size; `tiny:` names have none
    s3:// and what fsspec has a driver for     etag = the store's
    http(s)://                                 etag = ETag or Last-Modified; no globs and no folders

`stat`, `expand`, `list_files` and `open_url` raise OSErrors for the caller to name. `Reader` knows whose fault it is:
one sample's, or that of a store which would fail all others too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

from smsbatch.data.remote import RemoteError, TooLong, locate, redact
from smsbatch.data.sample import Span
from smsbatch.errors import SampleError, StorageError
from smsbatch.manifest import Storage

__all__ = ["Listed", "Reader", "Stat", "expand", "list_files", "open_url", "public", "stat"]


class Stat(NamedTuple):
    """An object's bytes, and what its version is called, '' if nobody says."""

    size: int
    etag: str


class Listed(NamedTuple):
    """A file below a folder."""

    path: str  # relative to the folder
    url: str
    size: int
    etag: str


def stat(url: str, storage: Storage) -> Stat | None:
    """Of the object of exactly that name; None if there is none."""
    door, path = locate(url, storage)
    found = door.find(path)
    return None if found is None else Stat(found.size, "" if _tiny(url) else found.etag)


def expand(pattern: str, storage: Storage) -> list[str]:
    """The objects that a path or URL with or without `*`, `?`, `[]` names, sorted; none if there are none.

    Local paths come back absolute, because a worker's working folder is another; `tiny:` names as they are, because the
    same run on another machine has the same ones.
    """
    door, path = locate(pattern, storage)
    if door.find(path):
        return [pattern if _tiny(pattern) else door.url_of(path)]
    if door.is_web or not set("*?[") & set(path):
        return []
    return sorted(map(door.url_of, door.glob(path)))


def list_files(folder: str, storage: Storage) -> Iterator[Listed]:
    """Every regular file below a folder, sorted by path; OSError if it is none."""
    door, root = locate(folder, storage)
    prefix = folder.rstrip("/") if _tiny(folder) else door.url_of(root).rstrip("/")
    start = len(root.rstrip("/")) + 1
    found = sorted(door.walk(root))
    if not found and not door.is_folder(root):
        raise (NotADirectoryError if door.find(root) else FileNotFoundError)(folder)
    for path, size, etag in found:
        yield Listed(path[start:], f"{prefix}/{path[start:]}", size, "" if _tiny(folder) else etag)


def open_url(url: str, storage: Storage) -> IO[bytes]:
    """The object as a seekable file, to be closed by the caller; a remote one is read ahead by 1 MiB."""
    door, path = locate(url, storage)
    return door.open(path)


class Reader:
    """Reads samples' bytes, from any number of threads. A file of more than `max_bytes` is refused, not read."""

    def __init__(self, storage: Storage, max_bytes: int, check_etag: bool = True) -> None:
        self.storage, self.max_bytes, self.check_etag = storage, max_bytes, check_etag

    def read(self, span: Span) -> bytes:
        """The bytes of a span.

        SampleError: `read_error` (missing, forbidden, fewer than planned, of another version), `timeout`, `too_large`.
        StorageError: the store itself refuses or does not answer, so that no other sample would be read either.
        """
        name = redact(span.url)
        if span.length is not None and span.length > self.max_bytes:
            raise self._too_large(name, span.length)
        door, path = locate(span.url, self.storage)
        stop = None if span.length is None else span.offset + span.length
        try:
            data, size, etag = door.get(path, span.offset, stop, self.max_bytes)
        except TooLong as error:
            raise self._too_large(name, error.size) from error
        except OSError as error:
            reason = redact(str(error.strerror or error))
            if isinstance(error, RemoteError) and (error.fatal or (error.again and not door.is_web)):
                raise StorageError(f"cannot read {name}: {reason}; {error.advice}") from error
            slow = isinstance(error, TimeoutError)
            raise SampleError("timeout" if slow else "read_error", f"{name}: {reason}") from error
        if self.check_etag and span.etag and etag and etag != span.etag:
            raise SampleError("read_error", f"{name}: was replaced since it was planned")
        if span.length is not None:
            if not span.offset and size is not None and size > span.length:  # what a tar holds never begins at 0
                raise SampleError("read_error", f"{name}: larger than when it was planned: it was replaced")
            if len(data) != span.length:
                missing = span.length - len(data)
                raise SampleError(
                    "read_error", f"{name}: cut off, {missing} of {span.length} bytes at {span.offset} are missing"
                )
        return data

    def _too_large(self, name: str, size: int) -> SampleError:
        return SampleError("too_large", f"{name}: {size} bytes or more, source.max_bytes is {self.max_bytes}")


def public(url: str) -> str:
    """A URL as anybody may read it: without passwords and the values of signatures."""
    return redact(url) if "://" in url else url


def _tiny(url: str) -> bool:
    return url.startswith("tiny:")
