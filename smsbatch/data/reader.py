"""Read-only access to source objects: expand names, list folders, read the bytes of one sample.

    local paths, `tiny:` names, `file://`      etag = modification time and size; `tiny:` names have none
    s3:// and every driver of fsspec           etag = the store's
    http(s)://                                 etag = ETag or Last-Modified; no globs and no folders
    data:                                      in rows of tables only

`expand`, `list_files` and `open_url` raise OSErrors, to which the caller adds the name. `Reader` separates the failure
of one sample from that of the store, which would fail all other samples too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

from smsbatch.data.cells import row_groups
from smsbatch.data.sample import Span, table_of
from smsbatch.errors import RequestError, SampleError, StorageError
from smsbatch.manifest import Source, Storage
from smsbatch.storage.addresses import Rules, decode_data_url, is_data, is_web, split_refused
from smsbatch.storage.backend import Fetched, TooLarge
from smsbatch.storage.resolve import resolve
from smsbatch.storage.retries import RemoteError, redact, shown
from smsbatch.text import hidden, one_line

GAP = 64 << 10  # bytes; a smaller gap between two spans is read too, which is cheaper than a second request
EXTRA = 1 << 20  # bytes by which a joint request of several spans may exceed `max_bytes`


class Stat(NamedTuple):
    """An object's size in bytes, and its version, '' if unknown."""

    size: int
    etag: str


class Listed(NamedTuple):
    """A file below a folder."""

    path: str  # relative to the folder
    url: str
    size: int
    etag: str


def absolute(url: str, storage: Storage) -> str:
    """The absolute name of a folder or file, valid in any process: a worker has another working folder.

    `tiny:` names stay unchanged, because they are the same on every machine.
    """
    backend, path = resolve(url, storage)
    return url if _tiny(url) else backend.url_of(path)


def expand(pattern: str, storage: Storage) -> list[tuple[str, Stat]]:
    """The objects that a path or URL, with or without `*`, `?`, `[]`, names: absolute, sorted, perhaps none.

    Costs one look-up of the exact name, and for a pattern one listing, however many objects match.
    """
    backend, path = resolve(pattern, storage)
    found = backend.find(path)
    if found is not None:
        return [(absolute(pattern, storage), Stat(found.size, "" if _tiny(pattern) else found.etag))]
    if backend.is_web or not set("*?[") & set(path):
        return []
    return sorted((backend.url_of(path), Stat(size, etag)) for path, size, etag in backend.glob(path))


def list_files(folder: str, storage: Storage) -> Iterator[Listed]:
    """Every regular file below a folder, sorted by path; OSError if `folder` is not a folder."""
    backend, root = resolve(folder, storage)
    prefix = absolute(folder, storage).rstrip("/")
    start = len(root.rstrip("/")) + 1
    found = sorted(backend.walk(root))
    if not found and not backend.is_folder(root):
        raise (NotADirectoryError if backend.find(root) else FileNotFoundError)(folder)
    for path, size, etag in found:
        yield Listed(path[start:], f"{prefix}/{path[start:]}", size, "" if _tiny(folder) else etag)


def holds(pattern: str, url: str, storage: Storage) -> bool:
    """True if the folder, or the pattern with `*`, `?`, `[]`, holds the object at `url`, which need not exist."""
    backend, inside = resolve(pattern, storage)
    other, path = resolve(url, storage)
    if type(backend) is not type(other) or backend.scheme != other.scheme:
        return False
    if backend.is_local:
        inside, path = os.path.realpath(inside), os.path.realpath(path)
    return path.startswith(f"{inside.rstrip('/')}/") or backend.matches(path, inside)


def is_local(url: str, storage: Storage) -> bool:
    """True for a file or folder of this machine."""
    return resolve(url, storage)[0].is_local


def not_followed(folder: str, storage: Storage) -> tuple[list[str], list[str]]:
    """What `list_files` leaves out below a folder of this machine: links to folders or to nothing, and folders that
    cannot be read; both sorted."""
    backend, root = resolve(folder, storage)
    if not backend.is_local:
        return [], []
    closed: list[str] = []
    walk = os.walk(root, onerror=lambda error: closed.append(str(error.filename)))
    below = (os.path.join(where, name) for where, folders, files in walk for name in (*folders, *files))  # noqa: PTH118
    links = [path for path in below if os.path.islink(path) and not os.path.isfile(path)]  # noqa: PTH113, PTH114
    return sorted(links), sorted(closed)


def open_url(url: str, storage: Storage) -> IO[bytes]:
    """The object as a seekable file, which the caller closes; a remote one is read ahead by 1 MiB."""
    backend, path = resolve(url, storage)
    return backend.open(path)


class Reader:
    """Reads samples' bytes, in any number of threads. Files of more than `max_bytes` are refused without reading.

    `rules` are those of the tables whose rows name the objects; None if the source itself lists them.
    """

    def __init__(self, storage: Storage, max_bytes: int, check_etag: bool = True, rules: Rules | None = None) -> None:
        self.storage, self.max_bytes, self.check_etag, self.rules = storage, max_bytes, check_etag, rules

    @classmethod
    def of(cls, source: Source, storage: Storage, output: str = "") -> Reader:
        """The reader of a source's samples; `output` is where the run that reads them is stored."""
        of_table = source.format == "table"
        rules = Rules.of(source.urls, storage.private_addresses, output) if of_table else None
        return cls(storage, source.max_bytes, rules=rules)

    def read(self, span: Span) -> bytes:
        """The bytes of a span.

        SampleError: `read_error` (missing, forbidden, fewer than planned, another version), `timeout`, `too_large`.
        StorageError: the store itself refuses or does not answer, so every other sample would fail too. What a row of a
            table names is the store itself only if it lies in the bucket of a table or of the output.
        """
        if span.length is not None and span.length > self.max_bytes:
            raise self._too_large(shown(span.url), span.length)
        return self._read(span, self.max_bytes)

    def read_all(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several spans; results and errors are those of `read` on one after the other.

        Spans that lie close together, such as all fields of a sample in a tar, are one request.
        """
        found: dict[Span, bytes] = {}
        for run in self._runs(spans):
            start, stop = run[0].offset, max(map(_end, run))
            with suppress(SampleError):  # the last line reads each span alone and raises the error of the right one
                data = self._read(run[0]._replace(length=stop - start), self.max_bytes + EXTRA)
                found |= {span: data[span.offset - start : _end(span) - start] for span in run}
        return [found[span] if span in found else self.read(span) for span in spans]

    def _runs(self, spans: Sequence[Span]) -> Iterator[list[Span]]:
        """Groups of spans that are cheaper to read in one request."""
        # A span at 0 is a whole file, not a part of a tar, and `read` checks that its size is unchanged.
        parts = (span for span in spans if span.offset and span.length is not None and span.length <= self.max_bytes)
        run: list[Span] = []
        for span in sorted(parts, key=lambda span: (span.url, span.etag, span.offset)):
            is_next = (
                bool(run)
                and (span.url, span.etag) == (run[0].url, run[0].etag)
                and span.offset - max(map(_end, run)) <= GAP
                and _end(span) - run[0].offset <= self.max_bytes + EXTRA
            )
            if is_next:
                run.append(span)
                continue
            if len(run) > 1:
                yield run
            run = [span]
        if len(run) > 1:
            yield run

    def _read(self, span: Span, limit: int) -> bytes:
        found = table_of(span.url)
        if found is not None:
            return self._cell(*found, span)
        name = shown(span.url)
        stop = None if span.length is None else span.offset + span.length
        try:
            data, size, etag = self._get(span, stop, limit)
        except TooLarge as error:
            raise self._too_large(name, error.size) from error
        except RequestError as error:
            if self.rules is None:
                raise
            raise SampleError("read_error", str(error)) from error
        except OSError as error:
            reason = redact(str(error.strerror or error))
            if isinstance(error, RemoteError):
                ours = self.rules is None or self.rules.is_own(span.url)
                if ours and (error.fatal or (error.again and not is_web(span.url))):
                    raise StorageError(f"cannot read {name}: {reason}; {error.advice}") from error
                reason += "" if error.again else f"; {error.advice}"
            slow = isinstance(error, TimeoutError)
            raise SampleError("timeout" if slow else "read_error", f"{name}: {reason}") from error
        if self.check_etag and span.etag and etag and etag != span.etag:
            raise SampleError("read_error", f"{name}: was replaced since it was planned")
        if span.length is not None:
            if not span.offset and size is not None and size > span.length:  # no member of a tar begins at 0
                raise SampleError("read_error", f"{name}: larger than when it was planned: it was replaced")
            if len(data) != span.length:
                missing = span.length - len(data)
                raise SampleError(
                    "read_error", f"{name}: cut off, {missing} of {span.length} bytes at {span.offset} are missing"
                )
        return data

    def _cell(self, column: str, table: str, span: Span) -> bytes:
        name = f"{redact(table)}, row {span.offset + 1:,}"
        try:
            data = row_groups(self.storage, os.getpid()).read(
                column, table, span.offset, span.etag if self.check_etag else ""
            )
        except OSError as error:
            reason = redact(str(error.strerror or error))
            if isinstance(error, RemoteError) and (error.fatal or error.again):
                raise StorageError(f"cannot read {name}: {reason}; {error.advice}") from error
            raise SampleError("read_error", f"{name}: {reason}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise SampleError("read_error", f"{name}: {one_line(error)}") from error
        if data is None:
            raise SampleError(
                "read_error", f"{name}: no picture in column {column!r}, it is null; the table has only its name"
            )
        if len(data) > self.max_bytes:
            raise self._too_large(name, len(data))
        return data

    def _get(self, span: Span, stop: int | None, limit: int) -> Fetched:
        if is_data(span.url):
            if len(span.url) > 3 * limit + 1000:  # of a percent-encoded byte: decoding takes memory
                raise TooLarge(limit + 1)
            data = decode_data_url(span.url)
            if len(data) > limit:
                raise TooLarge(len(data))
            return Fetched(data[span.offset : stop], len(data), "")
        backend, path = resolve(span.url, self.storage, self.rules)
        return backend.get(path, span.offset, stop, limit)

    def _too_large(self, name: str, size: int) -> SampleError:
        return SampleError("too_large", f"{name}: {size} bytes or more, source.max_bytes is {self.max_bytes}")


def public(url: str) -> str:
    """A URL without passwords, signature values and values of the environment, for rows and messages."""
    address, _ = split_refused(url)
    return redact(address) if "://" in address else hidden(address)


def _end(span: Span) -> int:
    return span.offset + (span.length or 0)


def _tiny(url: str) -> bool:
    return url.startswith("tiny:")
