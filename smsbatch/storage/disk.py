"""The local disk as a `Backend`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from smsbatch.storage.backend import Backend, Fetched, ObjectInfo, T, TooLarge


class Disk(Backend):
    """Local files. There are no retries: errors of a disk are not temporary. The store makes writes durable."""

    is_local = True
    can_create = True

    def path_of(self, url: str) -> str:
        path = Path(url.partition("://")[2] or url)
        with suppress(RuntimeError):  # `~name` of an unknown user
            path = path.expanduser()
        return str(path.absolute())

    def url_of(self, path: str) -> str:
        return path

    def open(self, path: str) -> IO[bytes]:
        return Path(path).open("rb")

    def is_folder(self, path: str) -> bool:
        return Path(path).is_dir()

    def _with_retries(self, action: Callable[..., T], *args: Any, **options: Any) -> T:
        return action(*args, **options)

    def _get(self, path: str, start: int, stop: int | None, limit: int | None) -> Fetched:
        if self._find(path) is None:  # opening a pipe would wait for its writer
            raise IsADirectoryError(errno.EISDIR, "a folder or no regular file", path)
        with Path(path).open("rb") as file:
            stat = os.fstat(file.fileno())
            end = stat.st_size if stop is None else stop
            if limit is not None and end - start > limit:
                raise TooLarge(end - start)
            file.seek(start)
            return Fetched(file.read(max(0, end - start)), stat.st_size, _version(stat))

    def _find(self, path: str) -> ObjectInfo | None:
        stat = Path(path).stat()
        return ObjectInfo(path, stat.st_size, _version(stat)) if S_ISREG(stat.st_mode) else None

    def _found(self, path: str, info: dict[str, Any]) -> ObjectInfo | None:
        # fsspec calls links and pipes "other"; reading a pipe would never end, and a link may lead nowhere.
        try:
            return self.find(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise


def _version(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
