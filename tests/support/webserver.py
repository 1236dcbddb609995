"""A web server on loopback with every kind of fault."""

from __future__ import annotations

import http.server
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress

BODY = bytes(range(256)) * 12  # 3072 bytes


class Web:
    """A web server on loopback that answers by the first part of the path, and counts the requests of each path.

    `files` are served at their paths, with `headers` beside the content. `agents` are the User-Agents that asked.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.agents: list[str] = []
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.sent = 0  # bytes of response bodies
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                web.asked[self.path] += 1
                web.agents.append(self.headers["User-Agent"])
                self.close_connection = True
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has disconnected
                    if self.path in web.files:
                        web._answer(self, web.files[self.path], **web.headers)
                    else:
                        getattr(web, "_" + self.path.split("/")[1].partition("?")[0])(self)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = "http://{}:{}".format(*self._server.server_address)

    def reset(self) -> None:
        """Forget all files, headers and requests."""
        for memory in (self.asked, self.agents, self.files, self.headers):
            memory.clear()

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(
        self,
        client: http.server.BaseHTTPRequestHandler,
        body: bytes = BODY,
        status: int = 200,
        **headers: str,
    ) -> None:
        client.send_response(status)
        for name, value in headers.items():
            client.send_header(name.replace("_", "-"), value)
        client.send_header("Content-Length", str(len(body)))
        client.end_headers()
        client.wfile.write(body)
        self.sent += len(body)

    def _status(self, client: http.server.BaseHTTPRequestHandler) -> None:
        status = int(client.path.split("/")[2])
        self._answer(client, b"" if status == 204 else b"no", status)

    def _whole(self, client: http.server.BaseHTTPRequestHandler) -> None:
        self._answer(client, ETag='"v1"')

    def _ranges(self, client: http.server.BaseHTTPRequestHandler) -> None:
        asked = client.headers.get("Range")
        if asked is None:
            self._whole(client)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(len(BODY), int(last or len(BODY)) + 1)
        if start >= len(BODY):
            self._answer(client, b"", 416, Content_Range=f"bytes */{len(BODY)}")
        else:
            self._answer(
                client, BODY[start:stop], 206, Content_Range=f"bytes {start}-{stop - 1}/{len(BODY)}", ETag='"v1"'
            )

    def _endless(self, client: http.server.BaseHTTPRequestHandler) -> None:
        client.send_response(200)
        client.end_headers()
        while True:
            client.wfile.write(BODY)
            self.sent += len(BODY)

    def _drip(self, client: http.server.BaseHTTPRequestHandler) -> None:
        client.send_response(200)
        client.send_header("Content-Length", str(len(BODY)))
        client.end_headers()
        for byte in BODY:
            client.wfile.write(bytes([byte]))
            client.wfile.flush()
            time.sleep(0.05)

    def _flaky(self, client: http.server.BaseHTTPRequestHandler) -> None:
        if self.asked[client.path] > 1:
            self._whole(client)
        elif client.path.split("/")[2] == "reset":
            client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.connection.close()
        elif client.path.split("/")[2] == "cut":
            client.send_response(200)
            client.send_header("Content-Length", str(len(BODY)))
            client.end_headers()
            client.wfile.write(BODY[:1000])
        else:
            self._answer(client, b"later", int(client.path.split("/")[2]), **self.headers)

    def _redirect(self, client: http.server.BaseHTTPRequestHandler) -> None:
        target = client.path.removeprefix("/redirect/")
        self._answer(client, b"", 302, Location=target if "://" in target else f"/{target}")

    def _echo(self, client: http.server.BaseHTTPRequestHandler) -> None:
        self._answer(client, client.path.encode())
