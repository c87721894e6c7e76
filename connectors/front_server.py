"""What the fronts of providers share: a small HTTP server on loopback that answers as a function of what was called."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from bidbeam.connectors.doubles import Reply


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it came in. ``headers`` has lower-case names; ``path`` is without the query."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> Mapping[str, Any]:
        """The JSON object in it; empty where there is none."""
        try:
            document = json.loads(self.raw)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


class FrontServer:
    """A context manager that serves ``answer`` on a free port, each request on a thread of its own."""

    def __init__(self, port: int = 0) -> None:
        self.calls: list[Call] = []
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def answer(self, call: Call) -> Reply:
        """How one request is answered. Runs on many threads at once."""
        raise NotImplementedError

    @property
    def host(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"http://{self.host}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops serving and frees the port; what is being held back is dropped."""
        self._stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def as_json(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply with a JSON body."""
    return Reply(status, json.dumps(document).encode(), headers or {})


def forwarded(base_url: str, path: str, raw: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """What the OpenAI-compatible server at ``base_url`` (on loopback, ``/v1`` included) answers to this body."""
    parts = urlsplit(base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    try:
        connection.request("POST", f"{parts.path}/{path}", raw, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], front: FrontServer) -> None:
        self.front = front
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stays silent: clients that hang up are part of what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # so that headers and body leave in one piece
    server: _Server

    def _serve(self) -> None:
        front = self.server.front
        target = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, target.path, dict(parse_qsl(target.query)), headers, raw)
        front.calls.append(call)
        reply = front.answer(call)
        if reply.delay_s:
            front._stopping.wait(reply.delay_s)
        self._send(reply)

    do_GET = do_POST = do_DELETE = do_PUT = _serve  # noqa: N815 - the base class names them

    def _send(self, reply: Reply) -> None:
        if reply.cut == "reset":
            # Lingering for zero seconds makes the close a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        body = reply.body or b""
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if reply.cut == "truncate" else body)
        self.wfile.flush()
        if reply.cut == "truncate":
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Says nothing: a test's output is its own."""
