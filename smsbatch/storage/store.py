"""A `Store` is the root of a run's output: named objects that appear whole or not at all.

No reader ever sees a part of an object. On disk a fsynced temporary file is renamed (`put`) or hard-linked (`create`)
into place; elsewhere an object is one upload, which `create` sends to S3 with `If-None-Match: *`. The server checks
that an upload is complete, S3 by length and MD5. `create` succeeds for exactly one of any number of writers; the
ledger relies on that, and `supports_create` tests it. A refusal after the backend's retries is a `StorageError`.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from smsbatch.errors import RequestError, StorageError
from smsbatch.manifest import Storage
from smsbatch.storage.backend import Backend
from smsbatch.storage.resolve import resolve
from smsbatch.storage.retries import RemoteError, redact

# Beside the ledger, not beside the files, so that a glob for shards never finds the leftovers of a killed process.
TEMPORARY = "_smsbatch/tmp"
READERS = 16  # parallel requests of `read_all`: its files are small, so latency dominates

ADVICE = {
    errno.ENOSPC: "free some space and run again, what is committed is kept",
    errno.EDQUOT: "free some space and run again, what is committed is kept",
    errno.EACCES: "check the permissions or choose another path",
    errno.EPERM: "check the permissions, and that the file system has hard links, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.EEXIST: "a part of this path is a file; choose another path",
    errno.ENOENT: "check the path",
}


@contextmanager
def storage_errors(action: str, where: str | Path) -> Iterator[None]:
    """Turn any OSError inside into a StorageError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        default = ADVICE.get(error.errno or 0, "check the storage and run again")
        advice = error.advice if isinstance(error, RemoteError) else default
        raise StorageError(f"cannot {action} {redact(str(where))}: {error.strerror or error}; {advice}") from error


class Store:
    """A rooted file system. Paths are relative to the root, with '/'.

    Attributes:
        has_create_only_put: False for a store whose uploads cannot be create-only. `create` then looks and writes,
            which is right for a single writer alone.
        must_exist: its root is never made on disk, so that a run whose folder was deleted cannot write there again.
    """

    def __init__(
        self,
        url: str | Path,
        storage: Storage | None = None,
        *,
        has_create_only_put: bool = True,
        must_exist: bool = False,
    ) -> None:
        self.storage = storage or Storage()
        self.has_create_only_put, self.must_exist = has_create_only_put, must_exist
        backend, root = resolve(url, self.storage)
        self.is_local = backend.is_local
        if backend.is_web:
            raise RequestError(f"{redact(str(url))}: web servers are only read; choose a folder or s3://bucket/prefix")
        self.root: str = root.rstrip("/") or ("/" if backend.is_local else "")
        self.url: str = backend.url_of(self.root)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def without_create_only_put(self) -> Store:
        """The same store, known to have no create-only put."""
        return Store(self.url, self.storage, has_create_only_put=False, must_exist=self.must_exist)

    def existing(self) -> Store:
        """The same store, with a root that must exist."""
        return Store(self.url, self.storage, has_create_only_put=self.has_create_only_put, must_exist=True)

    def locate(self, path: str) -> str:
        """The full address of a path, for messages and reports."""
        return f"{self.url}/{path}"

    def open_read(self, path: str) -> IO[bytes]:
        """The object as a seekable file, which the caller closes. Its reads raise OSErrors."""
        with storage_errors("read", self.locate(path)):
            return self._backend.open(self._full(path))

    def read(self, path: str) -> bytes:
        with storage_errors("read", self.locate(path)):
            return self._backend.get(self._full(path)).data

    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Whole objects by path, in the given order, read in parallel; missing ones are left out."""
        paths = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(max(1, min(READERS, len(paths)))) as pool:
            return {
                path: data
                for path, data in zip(paths, pool.map(self._read_if_there, paths), strict=True)
                if data is not None
            }

    def fetch(self, path: str, target: Path) -> None:
        """Copy the whole object to a local file."""
        with (
            self.open_read(path) as source,
            storage_errors(f"copy to {target}", self.locate(path)),
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 16 << 20)

    def put(self, path: str, source: bytes | Path) -> None:
        """Write the whole object, atomically replacing an existing one."""
        with storage_errors("write", self.locate(path)):
            if self.is_local:
                self._replace(path, source)
                return
            self._backend.upload(self._full(path), source)

    def create(self, path: str, source: bytes | Path) -> bool:
        """Write the whole object only if there is none: True for the one writer that did, False for all others."""
        with storage_errors("write", self.locate(path)):
            if self.is_local:
                target = Path(self._full(path))
                with self._staged(source, target) as staged:
                    try:
                        os.link(staged, target)  # unlike rename, fails if the name is taken
                    except FileExistsError:
                        return False
                    _fsync(target.parent)
                return True
            backend = self._backend
            atomic = self.has_create_only_put and backend.can_create
            if not atomic and backend.find(self._full(path)):
                return False
            try:
                backend.upload(self._full(path), source, create=atomic)
            except FileExistsError:
                return False
            return True

    def copy(self, path: str, target: str) -> None:
        """Copy an object within the store, atomically replacing an existing target."""
        with storage_errors(f"copy to {self.locate(target)}", self.locate(path)):
            if self.is_local:
                self._replace(target, Path(self._full(path)))
            else:
                self._backend.copy(self._full(path), self._full(target))

    def entries(self) -> list[str]:
        """The names directly in the root, sorted; none if it does not exist."""
        with storage_errors("list", self.url):
            return sorted(self._backend.names(self.root))

    def list(self, prefix: str = "") -> builtins.list[str]:
        """All objects below a folder, sorted; none if it does not exist."""
        return list(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of all objects below a folder, by path, sorted; costs one listing."""
        with storage_errors("list", self.locate(prefix)):
            start = len(self.root.rstrip("/")) + 1
            return dict(sorted((found.path[start:], found.size) for found in self._backend.walk(self._full(prefix))))

    def size(self, path: str) -> int | None:
        """The object's size in bytes, None if there is none."""
        with storage_errors("read", self.locate(path)):
            found = self._backend.find(self._full(path))
            return None if found is None else found.size

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def modified(self, path: str) -> datetime:
        """Time at which the object was written, by the clock of the store, in UTC."""
        with storage_errors("read", self.locate(path)):
            return self._backend.modified(self._full(path))

    def delete(self, path: str) -> None:
        """Delete an object; a missing one is no error."""
        with storage_errors("delete", self.locate(path)):
            self._backend.delete(self._full(path))

    def check_writable(self) -> None:
        """Put and delete a probe, as the ledger will: raises StorageError now instead of after an hour of work."""
        with self._probe() as probe:
            self.put(probe, b"smsbatch looks whether it can write here")

    def supports_create(self) -> bool:
        """True if `create` is exclusive in this store, by a test: the second one of a name must fail."""
        if not self._backend.can_create:
            return False
        with self._probe() as probe:
            try:
                return self.create(probe, b"the first") and not self.create(probe, b"the second")
            except StorageError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in {errno.ENOSYS, errno.EINVAL}:
                    return False
                raise

    @property
    def _backend(self) -> Backend:
        return resolve(self.url, self.storage)[0]  # not cached: a store is pickled to other processes

    def _full(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def _read_if_there(self, path: str) -> bytes | None:
        with storage_errors("read", self.locate(path)):
            try:
                return self._backend.get(self._full(path)).data
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    @contextmanager
    def _probe(self) -> Iterator[str]:
        """The name of a test object, which is deleted at the end."""
        probe = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
        try:
            yield probe
            self.delete(probe)
        except StorageError as error:  # the user knows the folder, not the probe
            raise StorageError(str(error).replace(self.locate(probe), self.url)) from error.__cause__

    def _replace(self, path: str, source: bytes | Path) -> None:
        target = Path(self._full(path))
        with self._staged(source, target) as staged:
            staged.replace(target)
            _fsync(target.parent)

    @contextmanager
    def _staged(self, source: bytes | Path, target: Path) -> Iterator[Path]:
        """A complete, fsynced temporary copy on the target's file system, removed at the end in any case."""
        if self.must_exist and not Path(self.root).is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", self.root)
        staged = Path(self._full(f"{TEMPORARY}/{uuid.uuid4().hex}"))
        _make_folder(staged.parent)
        _make_folder(target.parent)
        try:
            with staged.open("xb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    with source.open("rb") as original:
                        shutil.copyfileobj(original, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            staged.unlink(missing_ok=True)


def _fsync(folder: Path) -> None:
    """Make the names in a folder durable; fsync of a file does not cover its directory entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """mkdir -p, durable: otherwise a power cut could keep a commit and lose the folder of its attempt."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync(folder.parent)
