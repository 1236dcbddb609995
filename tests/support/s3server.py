"""An S3 server on loopback for tests (moto), and `Faults`, a proxy in front of it that injects faults.

Both run in the process of the tests, so that other processes can be killed while the server keeps running. The
environment has credentials for the whole session, also for child processes; `environment.py` prevents a search for
other credentials outside loopback.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import http.server
import io
import select
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from smsbatch.manifest import Storage

__all__ = ["ANSWERS", "SEEDED", "Faults", "Request", "Server", "s3"]

REGION = "us-east-1"
ANSWERS = {  # S3's own error responses, by the name of the fault
    "403": (403, "AccessDenied"),
    "409": (409, "ConditionalRequestConflict"),
    "500": (500, "InternalError"),
    "501": (501, "NotImplemented"),
    "503": (503, "SlowDown"),
}
SEEDED = ("500", "503", "reset_before", "reset_after", "stall", "cut")  # faults that retries must overcome


class Server:
    """An S3 server: its URL `endpoint`, the manifest section `storage` that reaches it, and a boto3 `client`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.storage = Storage(endpoint=endpoint, region=REGION)
        self.client: Any = boto3.client(
            "s3", endpoint_url=endpoint, region_name=REGION, config=Config(s3={"addressing_style": "path"})
        )

    def bucket(self) -> str:
        """Create an empty bucket and return its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def upload(self, folder: Path, url: str) -> None:
        """Upload all files below a folder to `s3://bucket/prefix`."""
        bucket, prefix = _split(url)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.client.upload_file(str(file), bucket, f"{prefix}{file.relative_to(folder).as_posix()}")

    def names(self, url: str) -> set[str]:
        """The keys of all objects below `s3://bucket/prefix`, without the prefix."""
        bucket, prefix = _split(url)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", ())}

    def objects(self, url: str) -> dict[str, bytes]:
        """The content of all objects below `s3://bucket/prefix`, by key without the prefix."""
        bucket, prefix = _split(url)
        return {name: self._read(bucket, prefix + name) for name in sorted(self.names(url))}

    def download(self, url: str, folder: Path) -> Path:
        """Download all objects below `s3://bucket/prefix` to a folder."""
        for name, content in self.objects(url).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def _read(self, bucket: str, key: str) -> bytes:
        with self.client.get_object(Bucket=bucket, Key=key)["Body"] as body:
            content: bytes = body.read()
            return content


def _split(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        moto.start()
        wsgi: Any = moto._server
        wsgi.app = _one_writer(wsgi.app)
        wsgi.RequestHandlerClass.log_request = lambda *args: None
        wsgi.RequestHandlerClass.protocol_version = "HTTP/1.1"  # persistent connections, as with S3
        server = Server("http://{}:{}".format(*moto.get_host_and_port()))
        yield server
        server.client.close()
        moto.stop()
        wsgi.server_close()


def _one_writer(app: Callable[..., Any]) -> Callable[..., Any]:
    """Process writes one at a time: moto checks `If-None-Match` before it stores, and S3 does both atomically."""
    lock = threading.Lock()

    def guarded(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return app(environ, start_response)
        # The whole request is read before the lock is taken, so that a client that was killed cannot hold it.
        sent = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with lock:
            return app(environ | {"wsgi.input": io.BytesIO(sent)}, start_response)

    return guarded


@dataclass(frozen=True)
class Request:
    """A request that the proxy received: `path` is bucket and key with the query, `fault` the fault that it got."""

    method: str
    path: str
    fault: str | None
    conditional: bool
    headers: Mapping[str, str] = field(default_factory=dict)  # by names in lower case


class Faults:
    """A proxy in front of an S3 server that injects faults; a context manager.

    A fault is a key of `ANSWERS` (the request is not forwarded) or one of
        reset_before: the connection is reset and the request is not forwarded;
        reset_after: the connection is reset after the request was forwarded: a write takes effect, its answer is lost;
        stall: there is no answer until the client gives up, and the request is not forwarded;
        cut: the answer ends after its headers and half its body; the same as `reset_after` if it has no body.

    A share `rate` of all requests gets one of `kinds`. The choice depends on `seed`, the method, the path and how often
    that was requested, and not on the order of threads. `inject` adds faults for certain requests, which take
    precedence. `requests` are the requests so far. With `strict` it answers as servers do that speak S3 of before 2025:
    that status and code for newer checksum headers and chunked bodies, BadDigest for a body with another MD5.
    """

    def __init__(
        self,
        target: str,
        *,
        rate: float = 0.0,
        kinds: Sequence[str] = SEEDED,
        seed: int = 0,
        stall_s: float = 60.0,
        strict: tuple[int, str] | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self.rate, self.strict = rate, strict
        self._target = urlsplit(target)
        self._kinds, self._seed, self._stall_s = tuple(kinds), seed, stall_s
        self._plans: list[_Plan] = []
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        faults = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _relay(self) -> None:
                faults._relay(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

        class Proxy(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # these tests expect clients that disconnect

        self._proxy = Proxy(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return "http://{}:{}".format(*self._proxy.server_address)

    @property
    def injected(self) -> Counter[str]:
        """The number of injected faults so far, by fault."""
        return Counter(request.fault for request in self.requests if request.fault)

    def inject(
        self,
        fault: str,
        *,
        times: int = 1,
        method: str = "",
        part: str = "",
        skip: int = 0,
        conditional: bool = False,
    ) -> None:
        """Inject `fault` into the next `times` requests of `method` with `part` in their path, after the first `skip`.

        With `conditional`, only requests with `If-None-Match` count.
        """
        if fault not in (*ANSWERS, *SEEDED):
            raise ValueError(fault)
        with self._lock:
            self._plans.append(_Plan(fault, times, method, part, skip, conditional))

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._closing.set()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._thread.join()

    def _choose(self, method: str, path: str, conditional: bool) -> str | None:
        with self._lock:
            for plan in self._plans:
                if plan.means(method, path, conditional):
                    if plan.skip > 0:
                        plan.skip -= 1
                        continue
                    plan.times -= 1
                    return plan.fault
            self._asked[method, path] += 1
            name = f"{self._seed} {method} {path} {self._asked[method, path]}"
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        chance, kind = (draw >> 16) / 2**48, draw % len(self._kinds)
        return self._kinds[kind] if chance < self.rate else None

    def _relay(self, client: http.server.BaseHTTPRequestHandler) -> None:
        if "chunked" in client.headers.get("Transfer-Encoding", ""):
            client.send_error(411)
            return
        sent = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        conditional = "If-None-Match" in client.headers
        fault = self._choose(client.command, client.path, conditional)
        headers = {name.lower(): value for name, value in client.headers.items()}
        self.requests.append(Request(client.command, client.path, fault, conditional, headers))
        if refused := self._refused(client.command, headers, sent) if self.strict else None:
            _answer_error(client, *refused)
        elif fault in ANSWERS:
            _answer_error(client, *ANSWERS[fault], "injected")
        elif fault == "reset_before":
            _reset(client)
        elif fault == "stall":
            self._wait_until_gone(client.connection)
            _reset(client)
        else:
            status, headers, length, content = self._ask(client, sent)
            if fault == "reset_after" or (fault == "cut" and not content):
                _reset(client)
            elif fault == "cut":
                _answer(client, status, headers, length, content[: len(content) // 2])
                client.close_connection = True
            else:
                _answer(client, status, headers, length, content)

    def _refused(self, method: str, headers: Mapping[str, str], sent: bytes) -> tuple[int, str, str] | None:
        """Status, code and message of what a strict server refuses, None for what it takes."""
        newer = ("x-amz-checksum-", "x-amz-sdk-checksum", "x-amz-trailer")
        for name, value in headers.items() if self.strict else ():
            if method in ("PUT", "POST") and (name.startswith(newer) or "aws-chunked" in value):
                return (*self.strict, f"Header '{name}' with value '{value}' not implemented")
        digest = base64.b64encode(hashlib.md5(sent).digest()).decode()
        if "content-md5" in headers and headers["content-md5"] != digest:
            return 400, "BadDigest", "The Content-MD5 you specified did not match what we received."
        return None

    def _ask(
        self, client: http.server.BaseHTTPRequestHandler, sent: bytes
    ) -> tuple[int, list[tuple[str, str]], int, bytes]:
        """The server's answer: status, headers, Content-Length and body."""
        upstream = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=60)
        dropped = {"connection", "expect", "transfer-encoding", "content-length"}
        try:
            headers = {name: value for name, value in client.headers.items() if name.lower() not in dropped}
            upstream.request(client.command, client.path, sent, headers | {"Content-Length": str(len(sent))})
            answer = upstream.getresponse()
            content = answer.read()
            length = int(answer.getheader("Content-Length") or len(content))
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in dropped]
            return answer.status, kept, length, content
        finally:
            upstream.close()

    def _wait_until_gone(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + self._stall_s
        while time.monotonic() < deadline and not self._closing.is_set():
            if select.select([connection], [], [], 0.05)[0]:  # the client sends nothing more, so it has disconnected
                return


@dataclass
class _Plan:
    fault: str
    times: int
    method: str
    part: str
    skip: int
    conditional: bool

    def means(self, method: str, path: str, conditional: bool) -> bool:
        return (
            self.times > 0
            and self.method in ("", method)
            and self.part in path
            and (conditional or not self.conditional)
        )


def _answer_error(client: http.server.BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    content = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    _answer(client, status, [("Content-Type", "application/xml")], len(content), content)


def _answer(
    client: http.server.BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], length: int, content: bytes
) -> None:
    client.send_response_only(status)
    for name, value in headers:
        client.send_header(name, value)
    if status != 204:
        client.send_header("Content-Length", str(length))
    client.end_headers()
    if client.command != "HEAD":
        client.wfile.write(content)
        client.wfile.flush()


def _reset(client: http.server.BaseHTTPRequestHandler) -> None:
    """Close with RST instead of FIN: the client gets "connection reset by peer"."""
    client.close_connection = True
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.connection.close()
