"""What a request shows to be let in: a key, or a token that is fetched when it is needed and again before it ends.

One seam for every provider. Secrets stand in these objects alone: not in a pool's values, a repr, a pickle, an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NoReturn, Protocol

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.profile_record import Auth
from bidbeam.connectors.secrets import read_key
from bidbeam.connectors.token_sources import Token, TokenSource, entra_tokens, google_tokens, sagemaker_tokens

MARGIN = timedelta(minutes=5)
"""How long before its end a token is replaced."""


def _now() -> datetime:
    return datetime.now(UTC)


class Credentials(Protocol):
    """Of one pool in one process. Thread-safe."""

    def current(self) -> Mapping[str, str] | None:
        """The headers that let a request in now; None where ``refresh`` must be called first. Returns at once."""
        ...

    def refresh(self) -> Mapping[str, str]:
        """The headers anew. May take seconds. Raises ConfigError that says what is missing, never a secret."""
        ...

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must be masked wherever text leaves us."""
        ...


class _InProcess:
    """Stays where it was made."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("credentials live in one process: pickle the PoolSpec that says where they are")


class StaticKey(_InProcess):
    """A key that does not change, or none at all."""

    def __init__(self, auth: Auth, key: str | None) -> None:
        self._headers = {auth.header: f"{auth.scheme} {key}".strip()} if key else {}
        self._secrets = (key,) if key else ()

    def __repr__(self) -> str:
        return "StaticKey(***)" if self._secrets else "StaticKey(none)"

    def current(self) -> Mapping[str, str]:
        return self._headers

    def refresh(self) -> Mapping[str, str]:
        return self._headers

    @property
    def secrets(self) -> tuple[str, ...]:
        return self._secrets


class BearerTokens(_InProcess):
    """Tokens of ``source``, each used until ``MARGIN`` before its end.

    Where a new one is not to be had, the old one is used for as long as it holds.
    """

    def __init__(self, source: TokenSource, *, now: Callable[[], datetime] = _now) -> None:
        self._source, self._now = source, now
        self._token: Token | None = None
        self._before: Token | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "BearerTokens(***)"

    def current(self) -> Mapping[str, str] | None:
        token = self._token
        return _bearer(token) if token is not None and self._holds(token, MARGIN) else None

    def refresh(self) -> Mapping[str, str]:
        with self._lock:
            # Whoever waited here for another's refresh has what it brought.
            if (headers := self.current()) is not None:
                return headers
            try:
                fetched = self._source()
                self._before, self._token = self._token, fetched
            except ConfigError:
                if self._token is None or not self._holds(self._token, timedelta(0)):
                    raise
            return _bearer(self._token)

    @property
    def secrets(self) -> tuple[str, ...]:
        # The one before may still be on its way.
        return tuple(token.value for token in (self._token, self._before) if token is not None)

    def _holds(self, token: Token, margin: timedelta) -> bool:
        return token.expires_at is None or self._now() + margin < token.expires_at


def _bearer(token: Token) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {token.value}"}


def credentials_for(spec: PoolSpec, auth: Auth, *, now: Callable[[], datetime] = _now) -> Credentials:
    """What lets requests into ``spec``'s endpoint: its own key, else the one the profile looks for, else tokens.

    Nothing is fetched yet. Raises ConfigError where a key is named and not there, or needed and not named.
    """
    where = f"pools.{spec.name}"
    if auth.tokens == "google" and spec.api_key_file:
        return BearerTokens(google_tokens(auth.scope, where, spec.api_key_file), now=now)
    key = read_key(spec)
    if key is None and auth.env is not None and os.environ.get(auth.env, "").strip():
        key = read_key(replace(spec, api_key_env=auth.env))
    if key is not None:
        return StaticKey(auth, key)
    if auth.tokens == "google":
        return BearerTokens(google_tokens(auth.scope, where), now=now)
    if auth.tokens == "entra":
        return BearerTokens(entra_tokens(auth.scope, where), now=now)
    if auth.tokens == "sagemaker":
        return BearerTokens(_aws(spec), now=now)
    if auth.required:
        expected = "the name of a variable that holds one" + (f", or {auth.env} set" if auth.env else "")
        raise ConfigError(f"pool {spec.name} has no key", key=f"{where}.api_key_env", expected=expected)
    return StaticKey(auth, None)


def _aws(spec: PoolSpec) -> TokenSource:
    aws_profile = spec.options.get("aws_profile")
    region = str(spec.options.get("region", ""))
    return sagemaker_tokens(region, f"pools.{spec.name}", None if aws_profile is None else str(aws_profile))


def check_credentials(spec: PoolSpec) -> None:
    """Whether what lets requests into ``spec``'s endpoint is to be had: keys are read, tokens fetched once.

    Raises ConfigError that names the variable, file or package, never a secret.
    """
    from bidbeam.connectors.profiles import profile

    chosen = profile(spec.profile)
    if chosen.transport == "sagemaker":
        _aws(spec)()  # what signs a token signs every request of AWS's own client
    else:
        credentials_for(spec, chosen.auth).refresh()
