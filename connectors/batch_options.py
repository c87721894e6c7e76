"""What a pool of ``kind: batch`` may say about its batches, in ``options`` of the pools file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bidbeam.connectors.errors import ConfigError

BATCH_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "window": "how long a batch may take, such as 24h: the auction counts on it",
        "poll": "how soon to look at a batch again, such as 30s; doubles up to 20 times of that",
        "patience": "how long the provider may be silent before its batches count as lost, such as 1h",
        "max_rows": "the most requests in one file, at most 50000",
        "max_bytes": "the most bytes in one file, at most 200000000",
        "route": "what stands before /chat/completions in a row's url: /v1 or nothing",
        "staging": "a directory that the provider reaches too, for one that reads rows from a bucket: gs://bucket/path",
    }
)
_FILES = ("openai-compatible", "openai", "azure")
_STAGED = ("vertex",)
_ROUTES = {"azure": ""}
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
MAX_ROWS = 50_000
MAX_BYTES = 200_000_000
BACKOFF = 20
"""Polling slows down to this many times its first interval."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Limits of one pool's batches; times in seconds, sizes in requests and bytes of one file."""

    window_s: float = 86_400.0
    poll_s: float = 30.0
    patience_s: float = 3_600.0
    max_rows: int = MAX_ROWS
    max_bytes: int = MAX_BYTES
    route: str = "/v1"
    staging: str | None = None
    """URL of the store where a provider that takes no uploads finds rows and leaves answers."""


_DEFAULT = BatchOptions()


def check_profile(profile: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError where a profile's provider has no batch API, or lacks what its batch API needs."""
    if profile not in (*_FILES, *_STAGED):
        raise ConfigError(
            f"profile {profile} has no batch API", key="profile", expected=" or ".join((*_FILES, *_STAGED))
        )
    if (profile in _STAGED) != (options.get("staging") is not None):
        problem = "needs" if profile in _STAGED else "has no use for"
        raise ConfigError(
            f"profile {profile} {problem} options.staging", key="options.staging", expected=BATCH_OPTIONS["staging"]
        )


def read_options(options: Mapping[str, Any], pool: str = "", profile: str | None = None) -> BatchOptions:
    """The batch options among a pool's ``options``. Raises ConfigError that names the key."""

    def wrong(name: str, expected: str) -> ConfigError:
        return ConfigError(f"is {options[name]!r}", key=f"pools.{pool}.options.{name}", expected=expected)

    def seconds(name: str, default: float) -> float:
        if options.get(name) is None:
            return default
        text = str(options[name])
        if len(text) > 60 or not _DURATION.fullmatch(text):
            raise wrong(name, "a duration such as 30s, 15m or 24h")
        total = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
        if not 0 < total <= 864_000_000:
            raise wrong(name, "a duration above zero")
        return total

    def whole(name: str, most: int) -> int:
        if options.get(name) is None:
            return most
        text = str(options[name]).replace("_", "")
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise wrong(name, f"a whole number from 1 to {most}")
        return int(text)

    route = options.get("route")
    if route is not None and not re.fullmatch(r"(?:/[A-Za-z0-9._-]+)*", str(route)):
        raise wrong("route", "a path such as /v1, or nothing")
    return BatchOptions(
        window_s=seconds("window", _DEFAULT.window_s),
        poll_s=seconds("poll", _DEFAULT.poll_s),
        patience_s=seconds("patience", _DEFAULT.patience_s),
        max_rows=whole("max_rows", MAX_ROWS),
        max_bytes=whole("max_bytes", MAX_BYTES),
        route=_ROUTES.get(profile or "", _DEFAULT.route) if route is None else str(route),
        staging=None if options.get("staging") is None else str(options["staging"]),
    )
