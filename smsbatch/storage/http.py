"""The backend of web servers: pictures and tars at http(s) URLs, read only.

A request may take `storage.timeout_s` in all; after a timeout it is not repeated. No body is read beyond the caller's
limit, whether or not the server sends its length and supports ranges.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from yarl import URL

from smsbatch.manifest import Storage
from smsbatch.storage.backend import Backend, Fetched, ObjectInfo, TooLarge, byte_range, strip_etag
from smsbatch.storage.retries import RemoteError, redact

_NUMBERS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
_PASSING = {408, 425, 429}
_PERMANENT = (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL)


class Web(Backend):
    """Objects on web servers; a path is the whole URL."""

    is_web = True

    @staticmethod
    def options(storage: Storage) -> dict[str, Any]:
        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=storage.timeout_s), "trust_env": True}}

    def path_of(self, url: str) -> str:
        return url

    def url_of(self, path: str) -> str:
        return path

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        raise NotADirectoryError(errno.ENOTDIR, "folders of a web server cannot be listed", redact(folder))

    def _upload(self, path: str, source: bytes | Path, create: bool) -> NoReturn:
        raise OSError(errno.EROFS, "a web server is only read")

    def _find(self, path: str) -> ObjectInfo:
        got = self._get(path, 0, 1, None)  # signed URLs allow no HEAD
        if got.size is None:
            raise OSError(errno.EIO, "its server does not send its length; download it first")
        return ObjectInfo(path, got.size, got.etag)

    def _get(self, path: str, start: int, stop: int | None, limit: int | None) -> Fetched:
        got: Fetched = self._wait(self._download, path, start, stop, limit)
        return got

    async def _download(self, url: str, start: int, stop: int | None, limit: int | None) -> Fetched:
        session: aiohttp.ClientSession = await self.fs.set_session()
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = byte_range(start, max(start + 1, stop) if stop is not None else None)
        as_it_is = url.isascii() and " " not in url  # quoted already, and perhaps signed
        async with session.get(URL(url, encoded=as_it_is), headers=headers) as answer:
            etag = strip_etag(answer.headers.get("ETag") or answer.headers.get("Last-Modified"))
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            size = int(whole) if whole.isdigit() else None
            if answer.status == 416:
                return Fetched(b"", size, etag)
            answer.raise_for_status()
            if answer.status not in {200, 206}:
                raise OSError(errno.EIO, f"HTTP {answer.status} is no file")
            skip = 0
            if answer.status == 200:  # the whole object, whether or not a range was requested
                size, skip = answer.content_length, start
            end = None if stop is None else stop - start + skip
            if skip and (limit is None or end is None or end > limit):
                raise OSError(errno.EIO, "its server sends no parts of files; download it first")
            expected = end if end is not None else answer.content_length or 0
            if limit is not None and expected > limit:
                raise TooLarge(expected)
            data = bytearray()
            async for chunk in answer.content.iter_any():
                data += chunk
                if end is not None and len(data) >= end:
                    break
                if limit is not None and len(data) > limit:
                    raise TooLarge(len(data))
            return Fetched(bytes(data[skip:end]), size, etag)

    def _translate(self, error: Exception) -> Exception:
        if isinstance(error, TimeoutError):
            return TimeoutError(errno.ETIMEDOUT, f"not there after {self.storage.timeout_s:g} seconds")
        if isinstance(error, aiohttp.ClientResponseError):
            text = f"HTTP {error.status} {error.message}".strip()
            if error.status in _PASSING or error.status >= 500:
                return RemoteError(text, "try again later", again=True)
            return OSError(_NUMBERS.get(error.status, errno.EIO), redact(text))
        unknown = isinstance(error, aiohttp.ClientConnectorDNSError) and _is_unknown(error.os_error)
        if isinstance(error, aiohttp.ClientError) and not unknown and not isinstance(error, _PERMANENT):
            return RemoteError(str(error), "check the network and the URL", again=True)
        if isinstance(error, aiohttp.ClientError | ValueError):
            return OSError(errno.EIO, redact(f"{error}"))
        return super()._translate(error)


def _is_unknown(error: OSError) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
