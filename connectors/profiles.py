"""Provider profiles: what is particular about an endpoint, as data.

A profile says how to authenticate, where the usage stands in an answer, and what an error means. The client that reads
it (``http_engine``) knows no provider by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from bidbeam.connectors.errors import ConfigError

ErrorClass = Literal["caller", "auth_funds", "rate", "capacity", "server", "timeout", "bad_output", "policy"]
"""Why an attempt failed, by what follows from it.

``caller``: this request is at fault, no other try would end better. ``auth_funds``: the pool is unusable as configured
(key, funds, model name, address). ``rate``: we send too fast. ``capacity``: the pool has no room. ``server`` and
``timeout``: the pool failed. ``bad_output``: it answered, with something unusable. ``policy``: it refuses this content.
"""

PriceUnit = Literal["usd/token", "usd/mtok"]
"""US dollars for one token, or for a million. Feeds do not say which: half of them mean the one, half the other."""


@dataclass(frozen=True, slots=True)
class Auth:
    """The header that carries the key: ``header: scheme key``, or the bare key where ``scheme`` is empty."""

    header: str = "Authorization"
    scheme: str = "Bearer"


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """An error whose status is in ``statuses`` (empty: any) and whose text at one of ``pointers`` holds ``contains``,
    upper and lower case alike (empty: any text), is of class ``error_class``.
    """

    error_class: ErrorClass
    statuses: tuple[int, ...] = ()
    contains: str = ""
    pointers: tuple[str, ...] = ("/error/code", "/error/type", "/error/message")


@dataclass(frozen=True, slots=True)
class UsagePointers:
    """RFC 6901 pointers into an answer. ``input`` includes cached tokens; ``output`` is that of all samples."""

    input: str = "/usage/prompt_tokens"
    cached: str = "/usage/prompt_tokens_details/cached_tokens"
    output: str = "/usage/completion_tokens"
    cost: str = "/usage/cost"


_OPENAI_ERRORS = (
    ErrorRule("auth_funds", (429,), "insufficient_quota"),
    ErrorRule("policy", (400, 403), "content_policy"),
    ErrorRule("policy", (400, 403), "content_filter"),
    ErrorRule("policy", (403,), "moderation"),
    ErrorRule("policy", (403,), "flagged"),
    ErrorRule("auth_funds", (401, 402, 403)),
    # A wrong model name or path, or an address that has moved: nothing this pool is sent can be served.
    ErrorRule("auth_funds", (301, 302, 303, 307, 308, 404, 405, 410)),
    ErrorRule("timeout", (408,)),
    ErrorRule("rate", (429,)),
    ErrorRule("capacity", (503, 529)),
    ErrorRule("server", (409, 424, 425)),
)


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of endpoint. ``error_map`` is read top down, the first rule that matches wins; what none matches is
    ``server`` from 500 up, else ``caller``.
    """

    name: str
    base_url: str | None = None
    auth: Auth = Auth()
    usage: UsagePointers = UsagePointers()
    error_map: tuple[ErrorRule, ...] = _OPENAI_ERRORS
    retry_after_headers: tuple[str, ...] = ("retry-after-ms", "retry-after")
    """Read in this order; a name that ends in ``-ms`` counts milliseconds."""
    request_id_headers: tuple[str, ...] = ("x-request-id",)
    """Where the provider names the request, when its answer has no ``id``."""
    max_tokens_field: str = "max_tokens"
    takes_cache_salt: bool = False
    """Whether the request body may carry ``cache_salt``, which keeps the prefix caches of tenants apart."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Placement labels that the provider declares for all it serves."""
    transport: Literal["http", "sagemaker"] = "http"
    """Who carries requests there: our own client, or AWS's."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What the pool's ``options`` may name, and what each is; ``{name}`` in ``base_url`` takes its value."""
    needs: tuple[str, ...] = ()
    """Those of ``options`` that must be there."""
    price_unit: PriceUnit | None = None
    """What the prices of its model feed (see ``price_feeds``) are counted in; None: it has no such feed."""


_PROFILES: tuple[Profile, ...] = (
    Profile("openai-compatible"),
    Profile("vllm", takes_cache_salt=True),
)
PROFILES: Mapping[str, Profile] = MappingProxyType({each.name: each for each in _PROFILES})
DEFAULT_PROFILE = "openai-compatible"


def profile(name: str | None) -> Profile:
    """The built-in profile ``name``; None is the default. Raises ConfigError with the nearest name."""
    wanted = DEFAULT_PROFILE if name is None else name
    found = PROFILES.get(wanted)
    if found is None:
        nearest = difflib.get_close_matches(wanted, PROFILES, n=1, cutoff=0.4)
        raise ConfigError(
            f"unknown profile {wanted!r}",
            key="profile",
            expected=" or ".join(PROFILES),
            nearest=nearest[0] if nearest else None,
        )
    return found
