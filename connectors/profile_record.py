"""What a provider profile is made of: the record that the HTTP client reads, and nothing that knows a provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ErrorClass = Literal["caller", "auth_funds", "rate", "capacity", "server", "timeout", "bad_output", "policy"]
"""Why an attempt failed, by what follows from it.

``caller``: this request is at fault, no other try would end better. ``auth_funds``: the pool is unusable as configured
(key, funds, model name, address). ``rate``: we send too fast. ``capacity``: the pool has no room. ``server`` and
``timeout``: the pool failed. ``bad_output``: it answered, with something unusable. ``policy``: it refuses this content.
"""

PriceUnit = Literal["usd/token", "usd/mtok"]
"""US dollars for one token, or for a million. Feeds do not say which: half of them mean the one, half the other."""

TokenKind = Literal["google", "entra", "sagemaker"]
"""Where short-lived tokens come from: Google's login, Microsoft's, or AWS credentials that sign one on this machine."""


@dataclass(frozen=True, slots=True)
class Auth:
    """How a request shows who sends it.

    A key of the pool's own goes into ``header`` as ``scheme key``, or bare where ``scheme`` is empty. Without one,
    ``env`` is where the key is looked for, and where that is unset too, ``tokens`` are fetched and sent as a bearer.
    """

    header: str = "Authorization"
    scheme: str = "Bearer"
    env: str | None = None
    """The environment variable that holds the key where the pool names none."""
    required: bool = False
    """Whether a pool without a key is a configuration error."""
    tokens: TokenKind | None = None
    scope: str = ""
    """What the tokens are asked for."""


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """An error whose status is in ``statuses`` (empty: any) and whose text at one of ``pointers`` holds ``contains``,
    upper and lower case alike (empty: any text), is of class ``error_class``.

    A pointer that does not begin with ``/`` is the name of a header. ``waits``: only where the answer names a time to
    wait.
    """

    error_class: ErrorClass
    statuses: tuple[int, ...] = ()
    contains: str = ""
    pointers: tuple[str, ...] = ("/error/code", "/error/type", "/error/message")
    waits: bool = False


@dataclass(frozen=True, slots=True)
class UsagePointers:
    """RFC 6901 pointers into an answer. ``input`` includes cached tokens and those written to a cache; ``output`` is
    that of all samples; ``cost`` is the provider's own figure in US dollars.
    """

    input: str = "/usage/prompt_tokens"
    cached: str = "/usage/prompt_tokens_details/cached_tokens"
    cache_write: str = "/usage/prompt_tokens_details/cache_write_tokens"
    output: str = "/usage/completion_tokens"
    cost: str | None = "/usage/cost"


@dataclass(frozen=True, slots=True)
class Residency:
    """Where prompts are processed, from an option: the place that ``option``'s value has in ``places`` becomes the
    labels ``jurisdiction`` and ``data_zone``, provided that every option in ``when`` has one of the values there. What
    has no place stays undeclared.
    """

    option: str
    places: Mapping[str, str]
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToldRegion:
    """Where an answer says in which of its regions the provider processed it, and the country that each is in.

    ``at`` is a pointer, or the lower-case name of a header if it does not begin with ``/``. A region is looked up by
    its letters and digits alone: ``East US`` is ``eastus``.
    """

    at: str
    places: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Variant:
    """What is different where every option in ``when`` has one of the values there; where none are, any value."""

    when: Mapping[str, tuple[str, ...]]
    base_url: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields beside those that others set, also within an object of theirs; ``{name}`` is the option of that name."""
    max_tokens_field: str | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of endpoint. ``error_map`` is read top down, the first rule that matches wins; what none matches is
    ``server`` from 500 up, else ``caller``.
    """

    name: str
    base_url: str | None = None
    """Its address; ``{name}`` stands for the option of that name."""
    auth: Auth = Auth()
    usage: UsagePointers = UsagePointers()
    error_map: tuple[ErrorRule, ...] = ()
    inner_status: str | None = None
    """Where an error quotes the status of what stands behind the provider, which then counts instead of its own."""
    retry_after_headers: tuple[str, ...] = ("retry-after-ms", "retry-after")
    """Read in this order; a name that ends in ``-ms`` counts milliseconds."""
    retry_after_phrases: tuple[str, ...] = ()
    """Lower-case words of an error's message after which it names the time to wait, where no header does."""
    request_id_headers: tuple[str, ...] = ("x-request-id",)
    """Where the provider names the request, when its answer has no ``id``."""
    sends_request_id: str | None = "X-Request-Id"
    """The header that carries our name for the attempt; None: the provider has no use for one."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request; one with ``{name}`` only where the pool has that option, whose value it takes."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every request's body. No row may set them otherwise."""
    max_tokens_field: str = "max_tokens"
    sends_model: bool = True
    """Whether the body names the model; else it is empty, because the address says which."""
    model_pointer: str = "/model"
    """Where an answer names its model."""
    echoes_model: bool = True
    """Whether what is asked for is a model's name, so that the one in the answer can be held against it."""
    takes_raw: bool = True
    """Whether there is a ``/completions`` beside ``/chat/completions``."""
    takes_cache_salt: bool = False
    """Whether the request body may carry ``cache_salt``, which keeps the prefix caches of tenants apart."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Placement labels that the provider declares for all it serves at its own address."""
    residency: tuple[Residency, ...] = ()
    told_region: ToldRegion | None = None
    """Set where answers name the region they were processed in, which the pool's labels are then held to."""
    variants: tuple[Variant, ...] = ()
    transport: Literal["http", "sagemaker"] = "http"
    """Who carries requests there: our own client, or AWS's."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What the pool's ``options`` may name, and what each is."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values that an option may have, where not any will do."""
    needs: tuple[str, ...] = ()
    """Those of ``options`` that must be there even if the pool gives an address of its own."""
    price_unit: PriceUnit | None = None
    """What the prices of its model feed (see ``price_feeds``) are counted in; None: it has no such feed."""
