# Paths are plain strings here, as the stores have them.
# ruff: noqa: PTH100, PTH111
"""URLs and options of stores: which filesystem and path they name, and that no secret is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec

from bidbeam.connectors.errors import ConfigError, StoreError, UsageError
from bidbeam.connectors.near import near

LOCAL_PROTOCOLS = frozenset({"file", "local"})
_ALIASES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
_USUAL = ("s3", "gs", "abfs", "file", "memory", "http", "https")
_EXTRAS = {"s3": "s3", "gs": "gcs", "abfs": "azure"}

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_USERINFO = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/@]*:[^/@]*@")
_NAMES = (
    r"(?:sig|signature|secret\w*|password|passwd|pwd|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|account[_-]?key|sas[_-]?token|session[_-]?token|token|connection[_-]?string|client[_-]?secret"
    r"|awsaccesskeyid|aws[_-]\w*(?:key|token)\w*|x-(?:amz|goog)-\w+)"
)
_SECRET_QUERY = re.compile(rf"[?&;]{_NAMES}=", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"^(?:{_NAMES}|key|secret|username|user)$", re.IGNORECASE)
_TOKEN_MODES = frozenset({"anon", "cloud", "google_default", "cache", "browser"})


def split_url(url: str) -> tuple[str, str]:
    """``(protocol, url)`` with local paths made absolute and aliases of a protocol made one.

    ``ConfigError`` for an empty URL, a chained one and one that holds a secret; the message never prints the secret.
    """
    if not url or "\0" in url:
        raise ConfigError("an empty path", expected="a path or a URL such as s3://bucket/directory")
    refuse_secrets_in_url(url)
    if "::" in url:
        raise ConfigError("a chained URL cannot be used", expected="one plain URL, without '::'")
    match = _SCHEME.match(url)
    protocol = match.group(1).lower() if match else "file"
    protocol = _ALIASES.get(protocol, protocol)
    if protocol in LOCAL_PROTOCOLS:
        path = url[match.end() :] if match else url
        if match and not path.startswith("/"):
            raise ConfigError(f"{url!r} is not an absolute path", expected="file:///directory, or a plain path")
        path = os.path.expanduser(path) if path.startswith("~") else path
        return "file", os.path.abspath(path)
    assert match is not None  # noqa: S101 - only a URL with a scheme has another protocol
    if protocol not in fsspec.available_protocols():
        raise ConfigError(
            f"unknown protocol {protocol!r}",
            expected="a local path or a protocol that fsspec knows",
            nearest=near(protocol, _USUAL, least=0.5),
        )
    rest = re.sub(r"/{2,}", "/", url[match.end() :])
    if protocol == "memory":
        rest = rest.lstrip("/")
    if not rest.strip("/") and protocol != "memory":
        raise ConfigError(f"{protocol}:// names no bucket", expected=f"{protocol}://bucket/directory")
    return protocol, f"{protocol}://{rest.rstrip('/')}"


def refuse_secrets_in_url(url: str) -> None:
    """``ConfigError`` where ``url`` carries a password or a signed query; the message does not print it."""
    if _USERINFO.match(url):
        raise ConfigError("a URL holds a user name and password", expected="credentials in the environment")
    if _SCHEME.match(url) and _SECRET_QUERY.search(url):
        raise ConfigError("a URL holds a secret in its query", expected="credentials in the environment")


def refuse_secrets_in_options(protocol: str, options: Mapping[str, Any], at: str = "") -> None:
    """``ConfigError`` where a storage option is a credential, at any depth; the message names the key alone."""
    for name, value in options.items():
        key = f"{at or 'storage.' + protocol}.{name}"
        mode = name == "token" and isinstance(value, str) and value in _TOKEN_MODES
        if value is not None and not mode and _SECRET_OPTION.match(str(name)):
            raise ConfigError("credentials do not belong here", key=key, expected="credentials in the environment")
        if isinstance(value, Mapping):
            refuse_secrets_in_options(protocol, value, key)
        elif isinstance(value, str):
            try:
                refuse_secrets_in_url(value)
            except ConfigError as error:
                raise ConfigError(error.problem, key=key, expected=error.expected) from None


def open_filesystem(protocol: str, options: Mapping[str, Any]) -> Any:
    """A new fsspec filesystem without a listing cache: another process's files must be seen."""
    refuse_secrets_in_options(protocol, options)
    listing = {"use_listings_cache": False} if protocol in _EXTRAS else {}
    try:
        return fsspec.filesystem(protocol, **{**listing, **options})
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'bidbeam[{extra}]'" if extra else f"install the package that serves {protocol}://"
        raise UsageError(f"{protocol}:// needs a package that is not installed: {how}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the filesystem refuses these options ({type(error).__name__})",
            key=f"storage.{protocol}",
            expected="fsspec options of this protocol",
        ) from None


def check_parts(*parts: str) -> str:
    """The parts joined by ``/``. ``StoreError`` for an empty or absolute part, or one with ``.`` or ``..`` in it."""
    for part in parts:
        if not part or part.startswith("/") or "\0" in part or any(p in {"", ".", ".."} for p in part.split("/")):
            raise StoreError(f"{part!r} is not a relative name below a store")
    return "/".join(parts)
