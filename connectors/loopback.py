"""A small HTTP server on loopback, which the doubles and fronts for tests are made of."""

from __future__ import annotations

import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from bidbeam.connectors.doubles import Reply


class Handler(BaseHTTPRequestHandler):
    """One connection, on a thread of its own. A subclass says how a request on it is served, for ``server.owner``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # so that headers and body leave in one piece
    server: Server

    def serve(self) -> None:
        """Answers one request; ``command`` is its method."""
        raise NotImplementedError

    def do_any(self) -> None:
        """What the base class calls for each method."""
        self.serve()

    do_GET = do_POST = do_DELETE = do_PUT = do_any  # noqa: N815 - the base class names them

    def lower_headers(self) -> dict[str, str]:
        """The request's headers by lower-case name."""
        return {name.lower(): value for name, value in self.headers.items()}

    def read_body(self) -> bytes:
        """The request's body, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = bytearray()
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def send(self, reply: Reply) -> None:
        """Sends a reply as it is scripted: whole, several times over, cut short, or not at all."""
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
        if reply.times > 1:
            self.send_header("Connection", "close")
            self.end_headers()
            for _ in range(reply.times):
                self.wfile.write(body)
            self.close_connection = True
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if reply.cut == "truncate" else body)
        self.wfile.flush()
        if reply.cut == "truncate":
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Says nothing: a test's output is its own."""


class Server(ThreadingHTTPServer):
    """Listens for its ``owner``."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, address: Any, owner: Any, handler: type[Handler]) -> None:
        self.owner = owner
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stays silent: clients that hang up are part of what is tested."""


class Loopback:
    """A context manager that serves on a port of 127.0.0.1 (0: a free one), each connection on a thread of its own."""

    handler: ClassVar[type[Handler]]

    def __init__(self, port: int = 0) -> None:
        self._stopping = threading.Event()
        self._bind(("127.0.0.1", port))

    def _bind(self, address: Any) -> None:
        self._server = Server(address, self, self.handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def host(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops serving and frees the port; requests that are being held back are dropped."""
        self._stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
