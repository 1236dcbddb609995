"""The backend of web servers: pictures and tars at http(s) URLs, read only.

A request may take `storage.timeout_s` in all, redirects included; after a timeout it is not repeated. No body is read
beyond the caller's limit, whether or not the server sends its length and supports ranges. Pictures that tables name
(`rules` in storage/addresses.py) are not read if the server's `X-Robots-Tag` forbids their use, and tables on the web
reach no private address: every socket, also after a redirect, is checked by the address that it connects to.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from smsbatch.manifest import Storage
from smsbatch.storage.addresses import WEB, Rules, is_public
from smsbatch.storage.backend import Backend, Fetched, ObjectInfo, TooLarge, byte_range, strip_etag
from smsbatch.storage.retries import RemoteError, redact, seconds_to_wait

REDIRECTS = 10  # at most

_NUMBERS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
_PASSING = {408, 425, 429}
_PERMANENT = (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL)
_PRIVATE = (
    "a private, loopback or link-local address, which a table on the web may not name; "
    "storage.private_addresses: true allows it"
)
_BOT = re.compile(r"\*|[a-z][\w-]*")
# Of X-Robots-Tag, which are no names of clients although a colon may follow.
_DIRECTIVES = {
    *("all", "none", "noai", "noimageai", "noindex", "noimageindex", "nofollow", "noarchive", "nosnippet"),
    *("notranslate", "max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"),
}


class Web(Backend):
    """Objects on web servers; a path is the whole URL."""

    is_web = True

    def __init__(self, fs: Any, scheme: str, storage: Storage, rules: Rules | None = None) -> None:
        super().__init__(fs, scheme, storage, rules)
        # A second driver, because a session must not take over the connections and DNS answers of the other.
        self._guarded = type(fs)(**self.options(storage), get_client=_public_client, skip_instance_cache=True)

    @staticmethod
    def options(storage: Storage) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=storage.timeout_s)
        agent = storage.user_agent or f"smsbatch/{version('smsbatch')}"
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, "headers": {"User-Agent": agent}}}

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

    async def _download(self, address: str, start: int, stop: int | None, limit: int | None) -> Fetched:
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = byte_range(start, max(start + 1, stop) if stop is not None else None)
        as_it_is = address.isascii() and " " not in address  # quoted already, and perhaps signed
        url = URL(address, encoded=as_it_is)
        async with asyncio.timeout(self.storage.timeout_s):
            for _ in range(REDIRECTS + 1):
                session = await self._session(url)
                async with session.get(url, headers=headers, allow_redirects=False) as answer:
                    target = answer.headers.get("Location") if 300 < answer.status < 309 else None
                    if target is None:
                        return await self._body(answer, start, stop, limit)
                url = url.join(URL(target))
                if url.scheme not in WEB:
                    raise OSError(errno.EIO, f"its server redirects to {url.scheme}:, which is not the web")
        raise OSError(errno.ELOOP, f"its server redirects more than {REDIRECTS} times")

    async def _session(self, url: URL) -> aiohttp.ClientSession:
        """The session for a URL, which may be a redirect's: one that connects to public addresses only, or any."""
        session: aiohttp.ClientSession
        host, port = url.host or "", url.port or 0
        if self.rules is None or self.rules.hosts is None or (host, port) in self.rules.hosts:
            session = await self.fs.set_session()
        elif url.scheme in getproxies() and not proxy_bypass(host):
            # The proxy connects, and may know more names than this machine. What is known here is checked here.
            try:
                found = await asyncio.get_running_loop().getaddrinfo(host, port)
            except OSError:
                found = []
            if not all(is_public(str(address[0])) for *_, address in found):
                raise PermissionError(errno.EACCES, _PRIVATE)
            session = await self.fs.set_session()
        else:
            session = await self._guarded.set_session()
        return session

    async def _body(self, answer: aiohttp.ClientResponse, start: int, stop: int | None, limit: int | None) -> Fetched:
        etag = strip_etag(answer.headers.get("ETag") or answer.headers.get("Last-Modified"))
        whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(whole) if whole.isdigit() else None
        if answer.status == 416:
            return Fetched(b"", size, etag)
        answer.raise_for_status()
        if answer.status not in {200, 206}:
            raise OSError(errno.EIO, f"HTTP {answer.status} is no file")
        forbidden = directives(answer.headers.getall("X-Robots-Tag", ()), self.storage.user_agent_token)
        for directive in self.storage.disallowed_header_directives:
            if directive in forbidden and self.rules is not None:
                told = f"its server forbids this use (X-Robots-Tag: {directive})"
                raise PermissionError(errno.EACCES, f"{told}; storage.disallowed_header_directives lists what counts")
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
                after_s = seconds_to_wait(error.headers.get("Retry-After") if error.headers else None)
                return RemoteError(text, "try again later", again=True, after_s=after_s)
            return OSError(_NUMBERS.get(error.status, errno.EIO), redact(text))
        if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == errno.EACCES:
            return PermissionError(errno.EACCES, error.os_error.strerror)
        unknown = isinstance(error, aiohttp.ClientConnectorDNSError) and _is_unknown(error.os_error)
        if isinstance(error, aiohttp.ClientError) and not unknown and not isinstance(error, _PERMANENT):
            return RemoteError(str(error), "check the network and the URL", again=True)
        if isinstance(error, aiohttp.ClientError | ValueError):
            return OSError(errno.EIO, redact(f"{error}"))
        return super()._translate(error)


def directives(headers: Iterable[str], token: str | None) -> set[str]:
    """The directives, in lower case, of `X-Robots-Tag` headers that address everybody or this client's token.

    `noai, otherbot: noindex, nofollow` has `noai` for everybody and the other two for `otherbot`.
    """
    found = set()
    for header in headers:
        addressed = True
        for part in header.lower().split(","):
            name, colon, value = (text.strip() for text in part.partition(":"))
            if colon and name not in _DIRECTIVES and _BOT.fullmatch(name):
                addressed = name == "*" or (token is not None and name == token.lower())
                name = value
            if addressed:
                found |= {"noindex", "nofollow"} if name == "none" else {name}
    return found


async def _public_client(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(**options, connector=aiohttp.TCPConnector(socket_factory=_public_socket))


def _public_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """The socket for an address about to be connected to; PermissionError if it is not public."""
    family, kind, protocol, _, place = address
    if not is_public(str(place[0])):
        raise PermissionError(errno.EACCES, _PRIVATE)
    return socket.socket(family, kind, protocol)


def _is_unknown(error: OSError) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
