"""The one door to file systems: a run's rooted store, and ranged reads of source objects anywhere.

What a `Store` writes is whole or absent, never part of a file: on disk a fsynced temporary file is renamed (`put`) or
hard-linked (`create`) into place, elsewhere a single conditional upload is. `create` succeeds for exactly one of any
number of writers; the ledger is built on that. A refusal of the file system is a `StorageError` for the run and a
`SampleError` for one sample's bytes.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from smsbatch import tiny
from smsbatch.data.sample import Span
from smsbatch.errors import RequestError, SampleError, StorageError

__all__ = ["Store", "expand", "list_files", "open_url", "read_span", "storage_errors"]

# Beside the ledger and not beside the files: what a killed process leaves must not look like a shard to anyone who
# globs for them.
TEMPORARY = "_smsbatch/tmp"

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
    """Any OSError inside becomes a StorageError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "check the storage and run again")
        raise StorageError(f"cannot {action} {where}: {error.strerror or error}; {advice}") from error


class Store:
    """A rooted file system. Paths are relative to the root, with '/'; `options` go to fsspec (endpoint, profile)."""

    def __init__(self, url: str | Path, **options: Any) -> None:
        self.fs, root = _locate(os.fspath(url), **options)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.root: str = str(Path(root).absolute()) if self.is_local else root.rstrip("/")
        self.url: str = self.root if self.is_local else self.fs.unstrip_protocol(self.root)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def locate(self, path: str) -> str:
        """The full address of a path, for messages and reports."""
        return f"{self.url}/{path}"

    def open_read(self, path: str) -> IO[bytes]:
        """The object as a seekable file, to be closed by the caller."""
        with storage_errors("read", self.locate(path)):
            file: IO[bytes] = self.fs.open(self._full(path), "rb")
            return file

    def read(self, path: str) -> bytes:
        with storage_errors("read", self.locate(path)):
            data: bytes = self.fs.cat_file(self._full(path))
            return data

    def fetch(self, path: str, target: Path) -> None:
        """Copy the whole object to a local file."""
        with (
            storage_errors(f"copy to {target}", self.locate(path)),
            self.open_read(path) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)

    def put(self, path: str, source: bytes | Path) -> None:
        """Write the whole object, replacing what was there in one step."""
        with storage_errors("write", self.locate(path)):
            if self.is_local:
                target = Path(self._full(path))
                with self._staged(source, target) as staged:
                    staged.replace(target)
                    _fsync(target.parent)
            elif isinstance(source, bytes):
                self.fs.pipe_file(self._full(path), source)
            else:
                self.fs.put_file(str(source), self._full(path))

    def create(self, path: str, source: bytes | Path) -> bool:
        """Write the whole object only if there is none: True for the one writer who did, False for all others."""
        with storage_errors("write", self.locate(path)):
            try:
                if self.is_local:
                    target = Path(self._full(path))
                    with self._staged(source, target) as staged:
                        os.link(staged, target)  # fails if the name is taken, which rename does not
                        _fsync(target.parent)
                elif isinstance(source, bytes):
                    self.fs.pipe_file(self._full(path), source, mode="create")
                else:
                    self.fs.put_file(str(source), self._full(path), mode="create")
            except FileExistsError:
                if self.size(path) is None:  # it was a folder of the path that exists, as a file
                    raise
                return False
            return True

    def entries(self) -> list[str]:
        """The names right below the root, sorted; none if it does not exist."""
        with storage_errors("list", self.url):
            try:
                found = self.fs.ls(self.root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def list(self, prefix: str = "") -> Sequence[str]:
        """All objects below a folder, sorted; none if it does not exist."""
        with storage_errors("list", self.locate(prefix)):
            found = self.fs.find(self._full(prefix))
            return sorted(path.removeprefix(self._full("")).lstrip("/") for path in found)

    def size(self, path: str) -> int | None:
        """The object's size in bytes, None if there is none."""
        with storage_errors("read", self.locate(path)):
            try:
                info = self.fs.info(self._full(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return None if info["type"] == "directory" else int(info["size"])

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def delete(self, path: str) -> None:
        """Remove an object; it is no error if it is gone already."""
        with storage_errors("delete", self.locate(path)):
            try:
                self.fs.rm_file(self._full(path))
            except FileNotFoundError:
                return

    def check_writable(self) -> None:
        """Create and delete a probe, as the ledger will: a StorageError now and not after the first hour of work."""
        probe = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
        try:
            self.create(probe, b"smsbatch looks whether it can write here")
            self.delete(probe)
        except StorageError as error:  # the user knows the folder, not the probe
            raise StorageError(str(error).replace(self.locate(probe), self.url)) from error

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @contextmanager
    def _staged(self, source: bytes | Path, target: Path) -> Iterator[Path]:
        """A complete, fsynced temporary copy on the target's file system, removed at the end whatever happens."""
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
    """Make the names in a folder durable; fsync of a file does not cover the entry that names it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """mkdir -p, durable: a commit must not outlive, in a power cut, the folder that holds its attempt."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync(folder.parent)


def _locate(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, path = fsspec.url_to_fs(tiny.resolve(url), use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise RequestError(f"{url}: {error}; this version works with local paths") from error
    return fs, path


def open_url(url: str, **options: Any) -> IO[bytes]:
    """A source object as a seekable file; OSErrors are the caller's to name."""
    fs, path = _locate(url, **options)
    file: IO[bytes] = fs.open(path, "rb")
    return file


def expand(pattern: str, **options: Any) -> list[str]:
    """The objects that a path or URL with or without `*`, `?`, `[]` names, sorted; none if there are none.

    Local paths come back absolute, because a worker's working folder is another; `tiny:` names as they are, because the
    same run on another machine has the same ones.
    """
    fs, path = _locate(pattern, **options)
    if fs.exists(path):
        return [pattern if pattern.startswith("tiny:") else _url(fs, path)]
    return sorted(_url(fs, found) for found in fs.glob(path)) if set("*?[") & set(path) else []


def list_files(folder: str, **options: Any) -> Iterator[tuple[str, str, int]]:
    """(relative path, URL, size) of every regular file below a folder, sorted by path; OSError if it is none."""
    fs, root = _locate(folder, **options)
    if not fs.isdir(root):
        kind = NotADirectoryError if fs.exists(root) else FileNotFoundError
        raise kind(folder)
    prefix = folder.rstrip("/") if folder.startswith("tiny:") else _url(fs, root).rstrip("/")
    found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
    for path in sorted(found):
        info = found[path]
        # fsspec calls a link "other", and also a pipe, whose reading would never end.
        if info["type"] == "file" or (isinstance(fs, LocalFileSystem) and Path(path).is_file()):
            relative = path.removeprefix(root).lstrip("/")
            yield relative, f"{prefix}/{relative}", int(info["size"])


def read_span(span: Span, **options: Any) -> bytes:
    """The bytes of a span; SampleError('read_error') if they are missing, fewer than planned, or of another file."""
    try:
        fs, path = _locate(span.url, **options)
        if span.offset == 0 and fs.size(path) > span.length:  # a whole file; what a tar holds never begins at 0
            raise SampleError("read_error", f"{span.url}: larger than when it was planned: it was replaced")
        data: bytes = fs.cat_file(path, start=span.offset, end=span.offset + span.length) if span.length else b""
    except OSError as error:
        raise SampleError("read_error", f"{span.url}: {error.strerror or error}") from error
    if len(data) != span.length:
        missing = span.length - len(data)
        raise SampleError(
            "read_error", f"{span.url}: cut off, {missing} of {span.length} bytes at {span.offset} are missing"
        )
    return data


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return str(Path(path).absolute()) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))
