"""Exchange rates of the pools file: written down, or where they are fetched when a run starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from decimal import Context, Decimal
from pathlib import Path

from bidbeam.pipelines.config_check import (
    Fields,
    as_tuple_exponent,
    decimal_of,
    duration_of,
    fault,
    moment_of,
    nearest,
    shown,
    text_of,
)
from bidbeam.pipelines.terms import FxRate, FxSource
from bidbeam.pipelines.yaml_text import Node

SOURCES = ("kraken", "coingecko", "file")
_WIDE = Context(prec=100)
DEFAULT_MAX_AGE = timedelta(hours=1)
"""Of rates that are fetched; one that is written down says how old it may be."""
_FETCHED = ("source", "max_age", "symbol", "url", "path")


def read_fx(node: Node, directory: str) -> tuple[dict[str, FxRate], dict[str, FxSource]]:
    """Rates that are written down, and sources of those that are fetched, by currency. Raises ConfigError."""
    if node.kind != "map":
        raise fault(node, f"is {shown(node)}", "a mapping of currencies to {rate, at, source}")
    rates: dict[str, FxRate] = {}
    sources: dict[str, FxSource] = {}
    for currency, entry in node.entries.items():
        if currency == "USD" or not re.fullmatch(r"[A-Z0-9]{3,10}", currency):
            raise fault(entry, "is not a currency that has a rate", "a code such as EUR or TAO, but not USD")
        if entry.kind == "map" and "rate" not in entry.entries:
            sources[currency] = _source(currency, entry, directory)
        else:
            rates[currency] = rate_of(currency, entry)
    return rates, sources


def known(rates: Mapping[str, FxRate], sources: Mapping[str, FxSource]) -> dict[str, Decimal | None]:
    """USD per unit of each currency, None where that is still to be fetched."""
    return {**dict.fromkeys(sources), **{currency: each.rate for currency, each in rates.items()}}


def rate_of(currency: str, node: Node) -> FxRate:
    """A rate that is written down."""
    fields = Fields(node, ("rate", "at", "source", "max_age"))
    rate = fields.need("rate", '{rate: "…", at: …, source: …}: USD per unit')
    value = decimal_of(rate, "USD per unit of the currency")
    if value <= 0 or as_tuple_exponent(value.normalize(_WIDE)) < -18 or value.adjusted() >= 18:
        raise fault(rate, f"is {shown(rate)}", "a rate above 0 with at most 18 places")
    at = moment_of(fields.need("at", "when the rate was valid, such as 2026-11-22T06:00:00Z"))
    source = text_of(fields.need("source", "where the rate is from"))
    return FxRate(currency, value, at, source, fields.maybe("max_age", duration_of))


def _source(currency: str, node: Node, directory: str) -> FxSource:
    fields = Fields(node, ("rate", "at", *_FETCHED))
    named = fields.need("source", f'{{rate: "…", at: …, source: …}}, or a feed: {" or ".join(SOURCES)}')
    feeds = []
    for each in named.items if named.kind == "list" else (named,):
        feed = text_of(each)
        if feed not in SOURCES:
            expected = f'{" or ".join(SOURCES)}; or a rate of your own beside it: {{rate: "…", at: …, source: …}}'
            raise fault(each, f"there is no feed of rates {shown(each)}", expected, nearest(feed, SOURCES))
        feeds.append(feed)
    if not feeds:
        raise fault(named, "names no feed", " or ".join(SOURCES))
    path = fields.get("path")
    if "file" in feeds and path is None:
        fields.need("path", "the path of a .json, .yaml or .csv file of rates")
    if fields.get("at") is not None:
        raise fault(node.entries["at"], "stands beside a rate that is fetched", "rate and at, or neither")
    return FxSource(
        currency,
        tuple(feeds),
        fields.read("max_age", duration_of, DEFAULT_MAX_AGE),
        symbol=fields.maybe("symbol", _symbol),
        url=fields.maybe("url", address_of),
        path=None if path is None else str((Path(directory) / Path(text_of(path)).expanduser()).resolve()),
    )


def _symbol(node: Node) -> str:
    text = text_of(node)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", text):
        raise fault(node, f"is {shown(node)}", "Kraken's pair, such as TAOUSD, or CoinGecko's coin, such as bittensor")
    return text


def address_of(node: Node) -> str:
    """The address of a feed: https, or plain http to this machine."""
    from bidbeam.connectors.fetch import FeedError, checked_host

    url = text_of(node)
    try:
        checked_host(url)
    except FeedError as error:
        raise fault(node, str(error), "https://host/path; http:// only to this machine") from None
    return url
