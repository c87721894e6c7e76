"""List prices: what providers publish for their models, by the token, as of a day. Nothing is fetched.

Most are those of the package ``genai-prices``. For open models on two clouds that it has no figures of there is a short
list of our own, with its source.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import ROUND_HALF_EVEN, Context, Decimal
from types import MappingProxyType
from typing import Any

from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.pools import Meter

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "vertex": "google", "vertex-ai": "google", "vertexai": "google", "azure-ai": "azure", "foundry": "azure",
        "bedrock": "aws", "aws-bedrock": "aws", "grok": "x-ai", "kimi": "moonshotai",
    }
)  # fmt: skip
"""Names that people use, and the package's."""

BY_THE_HOUR = frozenset({"sagemaker", "aws-sagemaker"})
"""Providers that are paid by the instance hour: what a token costs there is the job's own to say."""

_ADDED_FROM = "litellm 1.109.1 price map, as of 2026-11"
_ADDED: Mapping[str, Mapping[str, tuple[str, str, str | None]]] = {
    "google": {
        "deepseek-v3.2": ("0.56", "1.68", "0.056"),
        "glm-5.2": ("1.40", "4.40", "0.14"),
    },
    "azure": {
        "deepseek-v3.2": ("0.58", "1.68", None),
        "glm-5.2": ("1.54", "4.84", "0.15"),
        "kimi-k2.6": ("0.95", "4.00", "0.16"),
    },
}
"""USD per million of input, output and cached input."""
_ADDED_BATCH: Mapping[str, Mapping[str, tuple[str, str, str | None]]] = {
    "google": {"deepseek-v3.2": ("0.28", "0.84", None)},
}

_METERS: Mapping[Meter, str] = {
    "uncached_input": "input_mtok", "cached_input": "cache_read_mtok", "cache_write": "cache_write_mtok",
    "output": "output_mtok",
}  # fmt: skip
_ORIGINALS = {"openai": re.compile(r"(gpt|o)-?\d(?!.*oss)"), "anthropic": re.compile(r"claude")}
"""Whose own list another cloud's follows, for which models: those that are sold under one name at one price."""
_SUFFIX = re.compile(r"(-maas|-tee|:free|@[a-z0-9-]+)$")
_PLACES = Decimal("1e-15")
_WIDE = Context(prec=60)


class NotListed(UsageError):  # noqa: N818 # named for what happened
    """A provider or a model that no list has. ``nearest`` is the closest name that one has."""

    def __init__(self, problem: str, nearest: str | None = None) -> None:
        super().__init__(problem)
        self.nearest = nearest


@dataclass(frozen=True, slots=True)
class ListPrice:
    """USD per single token, where that is published, and since when it holds (None: not said)."""

    unit_prices: Mapping[Meter, Decimal]
    source: str
    valid_from: datetime | None = None


def list_price(provider: str, models: Iterable[str], day: date, *, batch: bool = False) -> ListPrice:
    """A provider's list price of the first of ``models`` (names of one model) that its list has, as of a day's noon.

    Of prices that rise with a prompt's length the lowest counts. ``batch``: the provider's batch price, or its usual
    one where it has none. Raises NotListed.
    """
    wanted = tuple(models)
    snapshot = _snapshot()
    found = _provider(snapshot, provider)
    moment = datetime.combine(day, time(12), UTC)
    for name in _spellings(wanted):
        added = _ADDED.get(found.id, {}).get(name)
        if added is not None:
            return _added((_ADDED_BATCH if batch else _ADDED).get(found.id, {}).get(name, added), found.id, name)
        match = _model(snapshot, found, name)
        if match is not None:
            model, whose = match
            prices = _unit_prices(model.get_prices(moment, {"processing": "batch"} if batch else None))
            if prices is not None:
                follows = "" if whose == found.id else f", by {whose}'s list"
                source = f"genai-prices {_version()} {found.id} {model.id}{follows}, as of {day}"
                return ListPrice(prices, source, _since(model, moment))
    raise _not_listed(snapshot, provider, found, wanted)


def _snapshot() -> Any:
    # Imported late: the package and its figures take a quarter of a second to load.
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot()


def _version() -> str:
    from importlib.metadata import version

    return version("genai-prices")


def _provider(snapshot: Any, name: str) -> Any:
    wanted = name.strip().casefold()
    if wanted in BY_THE_HOUR:
        raise NotListed(f"{name} is paid by the instance hour, so that no list says what a token costs there")
    wanted = ALIASES.get(wanted, wanted)
    known = {each.id.casefold(): each for each in snapshot.providers}
    if wanted not in known:
        names = (*known, *ALIASES)
        near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.55)
        raise NotListed(f"there is no price list by the name {name!r}", near[0] if near else None)
    return known[wanted]


def _spellings(models: Iterable[str]) -> Iterator[str]:
    """The ways in which lists may write a model's name, most exact first, each once."""
    seen: set[str] = set()
    for name in models:
        full = name.strip().casefold()
        tail = full.rpartition("/")[2]
        bare = _SUFFIX.sub("", tail)
        for spelling in (full, _SUFFIX.sub("", full), tail, bare):
            if spelling and spelling not in seen:
                seen.add(spelling)
                yield spelling


def _model(snapshot: Any, provider: Any, name: str) -> tuple[Any, str] | None:
    """The provider's entry of a model, and whose list it stands in."""
    own = provider.find_model(name)
    if own is not None:
        return own, provider.id
    for whose in provider.fallback_model_providers or ():
        pattern = _ORIGINALS.get(whose)
        if pattern is None or not pattern.match(name):
            continue
        original = next((each for each in snapshot.providers if each.id == whose), None)
        model = None if original is None else original.find_model(name)
        if model is not None:
            return model, whose
    return None


def _unit_prices(prices: Any) -> dict[Meter, Decimal] | None:
    """Per single token; None where the list does not price input and output."""
    found: dict[Meter, Decimal] = {}
    for meter, key in _METERS.items():
        price = getattr(prices, key, None)
        price = getattr(price, "base", price)  # one that rises with length begins at its base
        if isinstance(price, Decimal) and price.is_finite() and price >= 0:
            found[meter] = _per_token(price)
    return found if {"uncached_input", "output"} <= found.keys() else None


def _since(model: Any, moment: datetime) -> datetime | None:
    """When the price that holds began, where the list dates its prices."""
    if not isinstance(model.prices, list):
        return None
    for each in reversed(model.prices):
        constraint = each.constraint
        if constraint is None or constraint.active(moment):
            start = getattr(constraint, "start_date", None)
            return None if start is None else datetime.combine(start, time(), UTC)
    return None


def _added(figures: tuple[str, str, str | None], provider: str, name: str) -> ListPrice:
    input_, output, cached = figures
    prices: dict[Meter, Decimal] = {
        "uncached_input": _per_token(Decimal(input_)),
        "output": _per_token(Decimal(output)),
    }
    if cached is not None:
        prices["cached_input"] = _per_token(Decimal(cached))
    return ListPrice(prices, f"{_ADDED_FROM}: {provider} {name}")


def _per_token(price: Decimal) -> Decimal:
    return price.scaleb(-6, _WIDE).quantize(_PLACES, ROUND_HALF_EVEN, _WIDE)


def _not_listed(snapshot: Any, asked: str, provider: Any, models: tuple[str, ...]) -> NotListed:
    spellings = list(_spellings(models))
    listed = [*_ADDED.get(provider.id, {}), *(model.id for model in provider.models)]
    near = next(
        (found[0] for name in spellings if (found := difflib.get_close_matches(name, listed, n=1, cutoff=0.6))), None
    )
    elsewhere = [
        each.id
        for each in snapshot.providers
        if each is not provider and any(each.find_model(name) is not None for name in spellings)
    ]
    also = f"; it is listed by {', '.join(elsewhere[:8])}" if elsewhere else ""
    return NotListed(f"{asked} lists no price of {' or '.join(map(repr, dict.fromkeys(models)))}{also}", near)
