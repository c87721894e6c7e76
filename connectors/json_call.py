"""One JSON request over HTTP, waited for: for what is asked once in a while, such as leases and price lists.

It needs no event loop and no other thread, so that it still works while the interpreter is on its way out.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from json import dumps
from typing import Any
from urllib.parse import urlsplit

from bidbeam import __version__
from bidbeam.connectors.errors import BidbeamError
from bidbeam.connectors.provider_text import provider_message
from bidbeam.connectors.wire_json import read_json

MOST_BYTES = 8 * 2**20


class NoAnswer(BidbeamError):  # noqa: N818 - named for what happened
    """The request got no answer: whether it had an effect is unknown. The message holds no URL and no key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``document`` is the JSON in it, fractions as Decimal; an object of no JSON type where none is."""

    status: int
    document: Any
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case."""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def said(self) -> str:
        """The reason that an error gives, fit to be shown: one line, cut short, the key masked; may be empty."""
        document = self.document
        if isinstance(document, dict):
            document = document.get("error") or document.get("detail") or document
        return provider_message(document, "", self.secrets)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a key goes to the address that was configured and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Timed(io.RawIOBase):
    """What comes in on a socket, until a point in time however it drips in."""

    def __init__(self, connection: socket.socket, file: Any, until: float) -> None:
        # ``file`` is what keeps the socket open.
        self._connection, self._file, self._until = connection, file, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _timed(until: float) -> type[http.client.HTTPResponse]:
    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_Timed(sock, self.fp, until))

    return Response


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens connections whose answers have to be there whole in so many seconds."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._response = _timed(time.monotonic() + timeout_s)

    def do_open(self, http_class: Any, req: urllib.request.Request, **kwargs: Any) -> Any:
        def connection(*args: Any, **more: Any) -> Any:
            made = http_class(*args, **more)
            made.response_class = self._response
            return made

        return super().do_open(connection, req, **kwargs)


def call_json(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: object = None,
    secrets: tuple[str, ...] = (),
    timeout_s: float = 30.0,
) -> Answer:
    """One request to a checked ``http(s)`` address; an error status is an answer too. Raises NoAnswer, also where the
    answer is not there whole in ``timeout_s``.
    """
    # Late: with it comes an HTTP client that whoever only describes a lease has no use for.
    from bidbeam.connectors.http_transport import is_loopback

    data = None if body is None else dumps(body).encode()
    told = {"User-Agent": f"bidbeam/{__version__}", "Accept": "application/json", **(headers or {})}
    if data is not None:
        told["Content-Type"] = "application/json"
    request = urllib.request.Request(url, data, told, method=method)  # noqa: S310 - callers have checked the scheme
    handlers: list[Any] = [_Stay, _Handler(timeout_s)]
    if is_loopback(urlsplit(url).hostname or ""):
        # A proxy of the environment never stands between us and this machine.
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
            return _answer(response.status, response.headers, response.read(MOST_BYTES + 1), secrets)
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error.code, error.headers, _rest(error), secrets)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(_why(error, timeout_s)) from None


def _answer(status: int, headers: Any, body: bytes, secrets: tuple[str, ...]) -> Answer:
    document = read_json(body if len(body) <= MOST_BYTES else b"")
    return Answer(status, document, {name.lower(): value for name, value in headers.items()}, secrets)


def _rest(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException):
        return b""


def _why(error: Exception, timeout_s: float) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(reason, ssl.SSLError):
        return "TLS failed"
    if isinstance(reason, OSError) and reason.strerror:
        return f"cannot connect: {reason.strerror}"
    return "the connection was lost before the answer came"
