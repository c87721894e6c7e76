"""Where a pool's price comes from when it is not simply written down: read from the pools file, nothing fetched yet."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

from bidbeam.connectors.pools import PriceSchedule
from bidbeam.pipelines.config_check import Fields, fault, nearest, shown, text_of
from bidbeam.pipelines.fx import address_of
from bidbeam.pipelines.prices import TOKEN_KEYS, currency_of, price_of, token_prices
from bidbeam.pipelines.terms import PriceSource
from bidbeam.pipelines.yaml_text import Node

SOURCES = ("live", "list", "file")
FALLBACK = "fallback of the pools file"
"""How the source of a price begins that counts because its feed does not answer."""
_KEYS = ("source", "feed", "url", "served_by", "machine", "provider", "model", "path", "currency", "fallback", "expect")
_OWN_KEYS = {
    "live": ("feed", "url", "served_by", "machine"),
    "list": ("provider", "model"),
    "file": ("path",),
}  # fmt: skip
_EVERY = ("source", "currency", "fallback", "expect")


def read_price(
    node: Node,
    pool: str,
    fx: Mapping[str, Decimal | None],
    *,
    by_hour: bool,
    tokens_per_second: Decimal | None,
    profile: str | None,
    directory: str,
) -> tuple[PriceSchedule, PriceSource | None]:
    """A pool's price: the schedule, or one without prices and the source that it is taken from at the start.

    A list of blocks is a list of dated prices. ``directory`` is where relative paths start. Raises ConfigError.
    """

    def written(block: Node) -> PriceSchedule:
        return price_of(block, pool, fx, by_hour=by_hour, tokens_per_second=tokens_per_second)

    if node.kind == "list":
        if not node.items:
            raise fault(node, "is an empty list", "at least one price")
        dated = tuple(map(written, node.items))
        if len({each.currency for each in dated}) > 1:
            raise fault(node, "has prices in several currencies", "one currency for a pool")
        return _unpriced(pool, dated[0].currency), PriceSource("dated", dated[0].currency, dated=dated)
    if not _is_source(node):
        schedule = written(node)
        if schedule.valid_from is None and schedule.valid_to is None:
            return schedule, None
        return schedule, PriceSource("dated", schedule.currency, dated=(schedule,))
    source = _source(node, pool, fx, by_hour, tokens_per_second, profile, directory)
    return _unpriced(pool, source.currency), source


def _unpriced(pool: str, currency: str) -> PriceSchedule:
    """What stands for a price that is looked up later: it has no meter, so that nothing can be bought at it."""
    return PriceSchedule("", pool, {}, currency, None, "to be looked up when a run starts")


def _is_source(node: Node) -> bool:
    told = node.entries.get("source") if node.kind == "map" else None
    if told is None or told.kind != "scalar" or told.text not in SOURCES:
        return False
    # Written-down prices may name anything as their source, but live ones are not written down.
    return told.text == "live" or not any(name in node.entries for name in (*TOKEN_KEYS, "accelerator_hour"))


def _source(
    node: Node,
    pool: str,
    fx: Mapping[str, Decimal | None],
    by_hour: bool,
    tokens_per_second: Decimal | None,
    profile: str | None,
    directory: str,
) -> PriceSource:
    kind = node.entries["source"].text
    for name in (*TOKEN_KEYS, "accelerator_hour"):
        if name in node.entries:
            raise fault(node.entries[name], f"stands beside source: {kind}", "it under fallback, or under expect")
    fields = Fields(node, _KEYS)
    for name, entry in node.entries.items():
        if name not in (*_OWN_KEYS[kind], *_EVERY):
            raise fault(entry, f"does not belong to source: {kind}", ", ".join((*_EVERY, *_OWN_KEYS[kind])))
    currency = currency_of(fields, fx)
    common = {
        "currency": currency,
        "by_hour": by_hour,
        "tokens_per_second": tokens_per_second,
        "fallback": fields.maybe(
            "fallback", lambda entry: _fallback(entry, pool, currency, by_hour, tokens_per_second)
        ),
        "expected": fields.maybe("expect", lambda entry: token_prices(Fields(entry, TOKEN_KEYS), "the prices")),
    }
    if kind == "file":
        path = text_of(fields.need("path", "the path of a .json, .yaml or .csv file of prices"))
        return PriceSource("file", path=str((Path(directory) / Path(path).expanduser()).resolve()), **common)  # type: ignore[arg-type]
    if kind == "list":
        if currency != "USD":
            raise fault(node.entries["currency"], f"is {shown(node.entries['currency'])}", "USD: lists are in dollars")
        provider, model = text_of(fields.need("provider", "whose list")), fields.maybe("model", text_of)
        return PriceSource("list", provider=provider, model=model, **common)  # type: ignore[arg-type]
    source = PriceSource(
        "live",
        feed=fields.maybe("feed", text_of),
        url=fields.maybe("url", address_of),
        served_by=fields.maybe("served_by", text_of),
        machine=fields.maybe("machine", text_of),
        **common,  # type: ignore[arg-type]  # each is of its own type
    )
    _check_feed(fields, source, profile)
    return source


def _fallback(node: Node, pool: str, currency: str, by_hour: bool, tokens_per_second: Decimal | None) -> PriceSchedule:
    if node.kind == "map" and "currency" in node.entries:
        raise fault(node.entries["currency"], "stands in a fallback", f"prices in {currency}, as the feed has them")
    return price_of(
        Node("map", node.file, node.line, node.key, entries={**node.entries, "currency": _text(node, currency)})
        if node.kind == "map"
        else node,
        pool,
        {currency: None},
        by_hour=by_hour,
        tokens_per_second=tokens_per_second,
        source=FALLBACK,
    )


def _text(node: Node, text: str) -> Node:
    return Node("scalar", node.file, node.line, node.key, text, "text")


def _check_feed(fields: Fields, source: PriceSource, profile: str | None) -> None:
    """Whether there is a feed that tells this price, before anybody waits for one."""
    from bidbeam.connectors.live_prices import HOUR_FEEDS, feeds_for, has_live_price, of_aws

    node = fields.get("feed")
    known = feeds_for(by_hour=source.by_hour)
    if node is not None:
        if source.feed not in known:
            raise fault(
                node, f"there is no price feed {shown(node)}", " or ".join(known), nearest(source.feed or "", known)
            )
    elif not has_live_price(profile, by_hour=source.by_hour):
        expected = f"prices that are written down, or feed: {' or '.join(known)}"
        raise fault(
            fields.node.entries["source"], f"profile {profile or 'openai-compatible'} has no price feed", expected
        )
    if source.by_hour and source.machine is None and (source.feed or profile) in HOUR_FEEDS:
        fields.need("machine", "which machine: its name there, or its accelerator")
    if not source.by_hour and of_aws(profile, source.feed):
        fields.need("machine", "the endpoint's instance, such as ml.g5.xlarge")
        if source.tokens_per_second is None:
            problem = "an instance is paid by the hour, and nobody said how many tokens it serves in one"
            raise fault(fields.node.entries["source"], problem, "capacity: {tokens_per_second: …}, as measured")
