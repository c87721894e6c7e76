"""Keys: read where they are used, masked wherever text leaves us, refused where they do not belong."""

from __future__ import annotations

import base64
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.pools import PoolSpec

MASK = "***"
_read: set[str] = set()
_PIECE = 8
"""Shortest run of a secret's characters that is masked: providers echo keys cut short or with stars in the middle."""

_SHAPES = re.compile(
    r"""
    \b(?:sk|pk|rk)-[A-Za-z0-9_*-]{8,}          # OpenAI and its many relatives
    | \b(?:cpk|hf|pit|gsk|xai|nvapi|fw|tgp|r8|ghp|gho|ghs|glpat|pypi)[_-][A-Za-z0-9_.*-]{16,}
    | \bgithub_pat_[A-Za-z0-9_]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b            # AWS access key ids
    | \bAIza[A-Za-z0-9_-]{30,}                 # Google API keys
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*   # signed web tokens
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----
    | \bsagemaker-api-key-[A-Za-z0-9+/=]{8,}
    """,
    re.VERBOSE,
)
_BEARER = re.compile(r"\bbearer\s+(?P<bearer>[A-Za-z0-9._~+/*-]{8,}=*)", re.IGNORECASE)
_IN_URL = re.compile(
    r"://[^/?#\s@]+:[^/?#\s@]+@"  # user:password@host
    r"|[?&](?:[a-z0-9_-]*(?:key|token|secret|password|signature)|sig)=[^&\s]+",
    re.IGNORECASE,
)
_SECRET_WORDS = frozenset(
    {"key", "keys", "apikey", "token", "secret", "secrets", "password", "passwd", "passphrase", "credential",
     "credentials", "authorization"}
)  # fmt: skip
_WHERE_WORDS = frozenset({"env", "file", "path", "name", "id"})


def read_key(spec: PoolSpec) -> str | None:
    """The key of ``spec``'s endpoint from its environment variable or file; None where it names neither.

    Raises ConfigError that names the variable or file, never the value, where that is unset, unreadable, empty or
    not fit for a header.
    """
    if spec.api_key_env:
        where = f"environment variable {spec.api_key_env}"
        text = os.environ.get(spec.api_key_env)
        if text is None or not text.strip():
            raise ConfigError(
                f"{where} is not set", key=f"pools.{spec.name}.api_key_env", expected="the endpoint's key in it"
            )
    elif spec.api_key_file:
        where = f"file {spec.api_key_file}"
        try:
            text = Path(spec.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"{where} cannot be read: {reason}", key=f"pools.{spec.name}.api_key_file", expected="a readable file"
            ) from None
        if not text.strip():
            raise ConfigError(f"{where} is empty", key=f"pools.{spec.name}.api_key_file", expected="the endpoint's key")
    else:
        return None
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{where} holds characters that no header can carry", key=f"pools.{spec.name}", expected="printable ASCII"
        )
    _read.add(key)
    return key


def mask(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` with every one of ``secrets``, every piece of 8 or more of their characters, and whatever has the shape
    of a key replaced by ``***``; also where a secret stands in base64 or escaped for a URL.
    """
    # All are looked for in the text as it came: what one of them hides may be a part of what another has to find.
    hidden = bytearray(len(text))
    for found in (*_SHAPES.finditer(text), *_BEARER.finditer(text)):
        start, end = found.span("bearer") if "bearer" in found.re.groupindex else found.span()
        hidden[start:end] = b"\1" * (end - start)
    for secret in secrets:
        if not secret or _pieces(secret).isdisjoint(text[at : at + _width(secret)] for at in range(len(text))):
            continue
        for spelling in _spellings(secret):
            _hide_pieces(text, spelling, hidden)
    runs = groupby(zip(text, hidden, strict=True), key=lambda pair: pair[1])
    return "".join(MASK if secret else "".join(char for char, _ in run) for secret, run in runs)


def known_secrets(*, environment: bool) -> tuple[str, ...]:
    """What this process knows to be secret: the keys it has read and, with ``environment``, the values of variables
    that are named like one, which a failure that nobody foresaw may quote.
    """
    if not environment:
        return tuple(_read)
    named = (
        value
        for name, value in os.environ.items()
        if len(value) >= _PIECE and _named_secret(name.lower()) and not Path(value).exists()
    )
    return (*_read, *named)


def _named_secret(name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", name) if word]
    return bool(words) and words[-1] not in _WHERE_WORDS and not _SECRET_WORDS.isdisjoint(words)


def _width(secret: str) -> int:
    return min(_PIECE, len(secret))


@lru_cache(maxsize=256)
def _pieces(secret: str) -> frozenset[str]:
    """The shortest pieces of a secret, in any spelling, that must not show."""
    width = _width(secret)
    return frozenset(text[at : at + width] for text in _spellings(secret) for at in range(len(text) - width + 1))


@lru_cache(maxsize=256)
def _spellings(secret: str) -> tuple[str, ...]:
    """A secret as it is, escaped for a URL, and in base64 wherever it begins among the bytes encoded."""
    data = secret.encode()
    coded = [base64.b64encode(b"\0" * before + data).decode().rstrip("=") for before in range(3)]
    # What the bytes before and behind have a part in is left out.
    cores = [text[(0, 2, 3)[before] : len(text) - 1] for before, text in enumerate(coded)]
    plain = [core for core in cores if len(core) >= _PIECE]
    websafe = [core.replace("+", "-").replace("/", "_") for core in plain]
    return tuple(dict.fromkeys((secret, quote(secret, safe=""), *plain, *websafe)))


def _hide_pieces(text: str, secret: str, hidden: bytearray) -> None:
    """Marks in ``hidden`` where pieces of a secret stand in ``text``."""
    width = _width(secret)
    for start in range(len(text) - width + 1):
        if text[start : start + width] in secret:
            hidden[start : start + width] = b"\1" * width


def looks_like_secret(text: str, key: str = "") -> bool:
    """Whether ``text`` is or holds a key, password or token: by its shape, by being part of a URL, or, under a ``key``
    that is named like one (``api_key``, ``password``, ...), by being long and random.
    """
    if _SHAPES.search(text) or _BEARER.search(text) or _IN_URL.search(text):
        return True
    if not _named_secret(key.lower()):
        return False
    return len(text) >= 16 and not any(char.isspace() for char in text) and _bits_per_char(text) >= 3.0


def _bits_per_char(text: str) -> float:
    total = len(text)
    return -sum(count / total * math.log2(count / total) for count in Counter(text).values())
