"""Keys: read where they are used, masked wherever text leaves us, refused where they do not belong."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.pools import PoolSpec

MASK = "***"
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
_BEARER = re.compile(r"\bbearer\s+[A-Za-z0-9._~+/*-]{8,}=*", re.IGNORECASE)
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
    return key


def mask(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` with every one of ``secrets``, every piece of 8 or more of their characters, and whatever has the shape
    of a key replaced by ``***``.
    """
    for secret in secrets:
        if secret:
            text = _mask_pieces(text, secret)
    text = _SHAPES.sub(MASK, text)
    return _BEARER.sub(f"Bearer {MASK}", text)


def _mask_pieces(text: str, secret: str) -> str:
    width = min(_PIECE, len(secret))
    kept: list[str] = []
    hidden_until = 0
    for start in range(len(text)):
        if text[start : start + width] in secret and start + width <= len(text):
            if start >= hidden_until:
                kept.append(MASK)
            hidden_until = start + width
        if start >= hidden_until:
            kept.append(text[start])
    return "".join(kept)


def looks_like_secret(text: str, key: str = "") -> bool:
    """Whether ``text`` is or holds a key, password or token: by its shape, by being part of a URL, or, under a ``key``
    that is named like one (``api_key``, ``password``, ...), by being long and random.
    """
    if _SHAPES.search(text) or _BEARER.search(text) or _IN_URL.search(text):
        return True
    words = [word for word in re.split(r"[^a-z0-9]+", key.lower()) if word]
    if not words or words[-1] in _WHERE_WORDS or not _SECRET_WORDS.intersection(words):
        return False
    return len(text) >= 16 and not any(char.isspace() for char in text) and _bits_per_char(text) >= 3.0


def _bits_per_char(text: str) -> float:
    total = len(text)
    return -sum(count / total * math.log2(count / total) for count in Counter(text).values())
