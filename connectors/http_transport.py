"""The transport under the HTTP engine: addresses, the one event loop, sessions, and what their errors mean."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from multidict import CIMultiDict

from bidbeam import __version__
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.http_wire import Outcome
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.profiles import ErrorClass, Profile, resolved
from bidbeam.connectors.provider_text import MESSAGE_CHARS

KEEPALIVE_S = 4.0
"""Below the 5 s after which common servers drop an idle connection, so that no request meets one that just closed."""
CONNECT_S = 15.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how a pool is called. ``host`` is host[:port]; the key itself is not in here."""

    base_url: str
    host: str
    profile: Profile

    def url(self, path: str) -> str:
        parts = urlsplit(self.base_url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}"))


def endpoint(spec: PoolSpec) -> Endpoint:
    """The endpoint of a remote pool, its profile with the pool's options in it. Raises ConfigError where an option is
    missing or does not fit, and where the address is missing, is no http(s) URL, holds a password, or is plain http to
    another machine.
    """
    key = f"pools.{spec.name}.base_url"
    try:
        chosen = resolved(spec.profile, spec.options, spec.base_url or None)
    except ConfigError as error:
        place = f"pools.{spec.name}.{error.key}"
        raise ConfigError(error.problem, key=place, expected=error.expected, nearest=error.nearest) from None
    address = chosen.base_url
    if not address:
        raise ConfigError("a pool of kind openai needs an address", key=key, expected="https://host/v1")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("this is no address", key=key, expected="https://host/v1") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError("this is no http address", key=key, expected="https://host/v1")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("an address holds no user or password", key=key, expected="the key in api_key_env")
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigError("plain http goes to this machine only", key=key, expected="https://...")
    name = f"[{host}]" if ":" in host else host
    return Endpoint(address, name if port is None else f"{name}:{port}", chosen)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine: ``localhost`` or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class LoopThread:
    """One event loop on its own daemon thread, begun at the first use, and anew after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="bidbeam-http", daemon=True).start()
            return self._loop

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """The result of ``work``, run on the loop. Raises concurrent.futures.TimeoutError."""
        future = asyncio.run_coroutine_threadsafe(work, self.get())
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            future.cancel()
            raise


LOOP = LoopThread()
"""The process's loop for all its HTTP engines."""


def transport_failure(error: Exception, timeout_s: float) -> Outcome:
    """What an exception of the transport amounts to; its own text is left out, for it may quote what was sent."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return failure("timeout", "the endpoint does not take connections")
    if isinstance(error, TimeoutError):
        return failure("timeout", f"no answer within {timeout_s:g} s")
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError)):
        reason = getattr(getattr(error, "certificate_error", error), "verify_message", "") or "no secure connection"
        return failure("server", f"TLS failed: {reason}")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return failure("server", "the endpoint's name does not resolve")
    if isinstance(error, aiohttp.ClientConnectorError):
        return failure("server", f"cannot connect: {error.os_error.strerror or 'no reason given'}")
    if isinstance(error, aiohttp.ClientPayloadError):
        return failure("bad_output", "the answer broke off")
    if isinstance(error, aiohttp.ClientResponseError):
        return failure("bad_output", "the endpoint does not answer in HTTP")
    if isinstance(error, ssl.SSLError):
        return failure("server", "TLS failed")
    return failure("server", "the connection was lost before the answer came")


def failure(error_class: ErrorClass, message: str, http_status: int | None = None) -> Outcome:
    """A request that failed on our side or on the way, of whose usage nothing is known."""
    return Outcome("failed", error_class, message[:MESSAGE_CHARS], http_status)


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The body, or None where it is larger than ``limit`` bytes; then the connection is given up with it."""
    if (response.content_length or 0) > limit:
        response.close()
        return None
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            response.close()
            return None
    return bytes(body)


def open_session(where: Endpoint, spec: PoolSpec, key: str | None, concurrency: int) -> aiohttp.ClientSession:
    """One session for one pool. Must be called on the loop. ``key`` None: each request brings what lets it in."""
    headers = CIMultiDict(where.profile.headers)
    headers.update(spec.headers)
    headers.update({"User-Agent": f"bidbeam/{__version__}", "Content-Type": "application/json"})
    if key:
        auth = where.profile.auth
        headers[auth.header] = f"{auth.scheme} {key}".strip()
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=concurrency, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=spec.timeout_s, sock_connect=min(CONNECT_S, spec.timeout_s)),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        # A proxy of the environment stands between us and the world, never between us and this machine.
        trust_env=not is_loopback(urlsplit(where.base_url).hostname or ""),
    )
