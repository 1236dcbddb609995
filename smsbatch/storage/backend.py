"""The base of all storage backends, with one retry policy for all except the local disk.

Every failure is an OSError: FileNotFoundError, PermissionError, FileExistsError as on disk, and `RemoteError` for
failures that disks do not have. After throttling, server errors, broken and stalled connections and truncated bodies, a
request is repeated up to `storage.retries` times. The retries of the S3 and http drivers are off, so that two policies
do not multiply; other drivers keep theirs. A backend serves all threads of one process. Call `resolve` for each use:
connections do not survive a fork, after which `resolve` makes a new backend.
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
from fsspec.exceptions import FSTimeoutError
from fsspec.utils import glob_translate

from smsbatch.manifest import Storage
from smsbatch.storage.addresses import Rules
from smsbatch.storage.retries import RemoteError, redact, with_retries

T = TypeVar("T")

_LOCK = threading.RLock()


class TooLarge(Exception):
    """The object exceeds the caller's limit and was not read completely. `size` is a lower bound of its bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes")
        self.size = size


class ObjectInfo(NamedTuple):
    """An object: its full path, its size in bytes, and its etag ('' where the store has none)."""

    path: str
    size: int
    etag: str


class Fetched(NamedTuple):
    """Bytes of an object, with the size of the whole object (None if unknown) and its etag."""

    data: bytes
    size: int | None
    etag: str


class Backend:
    """Objects of one URL scheme, by paths without the scheme. This class serves any driver of fsspec.

    `rules`: the objects are pictures that rows of tables name, for a backend that treats these otherwise.
    """

    is_local = False
    is_web = False
    can_create = False  # True: of two uploads with `create` one fails; False: `create` checks, then writes

    def __init__(self, fs: Any, scheme: str, storage: Storage, rules: Rules | None = None) -> None:
        self.fs, self.scheme, self.storage, self.rules = fs, scheme, storage, rules
        self.can_create = self.can_create or scheme == "memory"

    @staticmethod
    def options(storage: Storage) -> dict[str, Any]:
        """Keyword arguments of the fsspec driver."""
        return {}

    def path_of(self, url: str) -> str:
        return str(self.fs._strip_protocol(url))

    def url_of(self, path: str) -> str:
        return str(self.fs.unstrip_protocol(path))

    def get(self, path: str, start: int = 0, stop: int | None = None, limit: int | None = None) -> Fetched:
        """Bytes [start, stop), stop None: to the end; fewer if there are no more. TooLarge: more than `limit`."""
        return self._with_retries(self._get, path, start, stop, limit)

    def find(self, path: str) -> ObjectInfo | None:
        """The object at exactly this path, None if there is none."""
        try:
            return self._with_retries(self._find, path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, path: str) -> IO[bytes]:
        """The object as a seekable file, read ahead by 1 MiB, because readers of headers skip from one to the next."""
        found = self.find(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return io.BufferedReader(_Ranges(self, found), 1 << 20)

    def is_folder(self, path: str) -> bool:
        """True also for an empty folder, if the store has such."""
        return bool(self.names(path))

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """All objects below a folder, in no order; none if it does not exist."""
        for path, info in self._with_retries(self.fs.find, folder, detail=True).items():
            found = self._found(path, info) if path.startswith(folder_prefix(folder)) else None
            if found is not None:
                yield found

    def names(self, folder: str) -> list[str]:
        """The names directly in a folder, in no order; none if it does not exist."""
        try:
            paths = self._with_retries(self.fs.ls, folder, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths if path.startswith(folder_prefix(folder))]

    def glob(self, pattern: str) -> list[ObjectInfo]:
        """The objects that match a pattern with `*`, `?`, `[]`, in no order."""
        paths: dict[str, dict[str, Any]] = self._with_retries(self.fs.glob, pattern, detail=True)
        return [found for path, info in paths.items() if (found := self._found(path, info)) is not None]

    @staticmethod
    def matches(path: str, pattern: str) -> bool:
        """True if `glob` would find an object at this path."""
        return re.fullmatch(glob_translate(pattern), path) is not None

    def upload(self, path: str, source: bytes | Path, *, create: bool = False) -> None:
        """Write the whole object. FileExistsError: with `create`, if the object exists."""
        self._with_retries(self._upload, path, source, create)

    def copy(self, path: str, target: str) -> None:
        """Copy an object, within the store if it can."""
        self._with_retries(self.fs.cp_file, path, target)

    def delete(self, path: str) -> None:
        """Delete an object; a missing one is no error."""
        try:
            self._with_retries(self.fs.rm_file, path)
        except FileNotFoundError:
            return

    def _with_retries(self, action: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call `action`, again if that may help. Raises OSError or TooLarge; anything else is a bug."""
        return with_retries(partial(action, *args, **options), self.storage.retries, self._translate)

    def _translate(self, error: Exception) -> Exception:
        """The error to raise instead: drivers raise errors of many libraries, which the caller need not know."""
        if isinstance(error, ConnectionError | TimeoutError | FSTimeoutError):
            reason = redact(str(error)) or "no answer in time"
            return RemoteError(reason, "check the network; what is committed is kept, run again", again=True)
        if isinstance(error, OSError | TooLarge):
            return error
        return OSError(errno.EIO, redact(f"{type(error).__name__}: {error}"))

    def _wait(self, coroutine: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return fsspec.asyn.sync(self.fs.loop, coroutine, *args, **options)

    def _get(self, path: str, start: int, stop: int | None, limit: int | None) -> Fetched:
        found = self._find(path)
        if found is None:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        end = found.size if stop is None else min(stop, found.size)
        if limit is not None and end - start > limit:
            raise TooLarge(end - start)
        data: bytes = self.fs.cat_file(path, start=start, end=end) if end > start else b""
        return Fetched(data, found.size, found.etag)

    def _find(self, path: str) -> ObjectInfo | None:
        return self._found(path, self.fs.info(path))

    def _found(self, path: str, info: dict[str, Any]) -> ObjectInfo | None:
        if info["type"] != "file" or path.endswith("/"):
            return None
        return ObjectInfo(path, int(info["size"]), strip_etag(info.get("ETag") or info.get("etag")))

    def _upload(self, path: str, source: bytes | Path, create: bool) -> None:
        with _LOCK if self.scheme == "memory" else nullcontext():  # makes the check and the write one step
            if create and self.fs.exists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            if isinstance(source, bytes):
                self.fs.pipe_file(path, source)
            else:
                self.fs.put_file(str(source), path)

    def modified(self, path: str) -> datetime:
        """Time at which the object was written."""
        when: datetime = self._with_retries(self.fs.modified, path)
        return when if when.tzinfo else when.replace(tzinfo=UTC)


class _Ranges(io.RawIOBase):
    """A file on which every read is a request, with the retries of its backend."""

    def __init__(self, backend: Backend, found: ObjectInfo) -> None:
        self.backend, self.found, self.at = backend, found, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.found.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        path, size, etag = self.found
        stop = min(self.at + len(buffer), size)
        if stop <= self.at:
            return 0
        got = self.backend.get(path, self.at, stop)
        if got.etag != etag or len(got.data) != stop - self.at:
            raise OSError(errno.EIO, "it was replaced while it was read", path)
        buffer[: len(got.data)] = got.data
        self.at = stop
        return len(got.data)


def byte_range(start: int, stop: int | None) -> str:
    """The Range header of [start, stop)."""
    return f"bytes={start}-{'' if stop is None else stop - 1}"


def folder_prefix(folder: str) -> str:
    """The common prefix of all paths in a folder."""
    return f"{folder.rstrip('/')}/" if folder else ""


def strip_etag(etag: Any) -> str:
    """An ETag without its quotes, '' for none."""
    return str(etag or "").strip('"')
