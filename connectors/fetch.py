"""Fetch: one JSON document from a public feed, within limits of size and time; what comes back is not trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from urllib.parse import urlsplit, urlunsplit

from bidbeam.connectors.errors import UsageError

MAX_BYTES = 16 * 2**20
"""The largest list of models known takes a tenth of it."""
TIMEOUT_S = 15.0


class FeedError(UsageError):
    """A feed that does not answer, or not with what it should. The message says what to do, and holds no secret."""


def fetch_json(
    url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S, max_bytes: int = MAX_BYTES
) -> object:
    """The JSON document at ``url``, numbers with a fraction as Decimal. No redirect is followed.

    Raises FeedError where the address is not https (plain http only to this machine), and where no JSON comes within
    ``timeout_s`` and ``max_bytes``.
    """
    # Imported here: aiohttp takes longer to load than a job file to read.
    import aiohttp

    from bidbeam import __version__
    from bidbeam.connectors.http_transport import CONNECT_S, LOOP, is_loopback, read_body, transport_failure
    from bidbeam.connectors.wire_json import read_json

    host = checked_host(url)

    async def ask() -> tuple[int, bytes | None]:
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_S, timeout_s))
        told = {"User-Agent": f"bidbeam/{__version__}", "Accept": "application/json", **(headers or {})}
        async with (
            aiohttp.ClientSession(
                timeout=limits,
                headers=told,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=not is_loopback(host),
            ) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            return response.status, await read_body(response, max_bytes)

    where = bare(url)
    try:
        status, body = LOOP.run(ask(), timeout_s + 5.0)
    except (aiohttp.ClientError, TimeoutError, FutureTimeout, OSError) as error:
        raise FeedError(f"{where}: {transport_failure(error, timeout_s).error_message}") from None
    except (asyncio.CancelledError, ValueError):
        raise FeedError(f"{where}: the address cannot be called") from None
    if status in (401, 403):
        raise FeedError(f"{where} asks for a key ({status}); is the pool's key set and valid?")
    if status != 200:
        raise FeedError(f"{where} answers {status}")
    if body is None:
        raise FeedError(f"{where} sends more than {max_bytes:,} bytes")
    document = read_json(body)
    if not isinstance(document, dict | list):
        raise FeedError(f"{where} sends no JSON object or list")
    return document


def checked_host(url: str) -> str:
    """The host of an address that may be fetched. Raises FeedError for any other."""
    from bidbeam.connectors.http_transport import is_loopback

    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise FeedError("the feed's address is no URL; write it as https://host/path") from None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise FeedError("the feed's address is no https URL; write it as https://host/path, without user or password")
    if parts.scheme == "http" and not is_loopback(host):
        raise FeedError(f"the feed at {host} is asked in the clear; write https://, for its figures decide who is paid")
    return host


def bare(url: str) -> str:
    """The address as it may be written down: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
