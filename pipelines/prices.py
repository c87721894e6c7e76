"""Prices as people write them, per million tokens or per hour, turned once into exact unit prices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact

from bidbeam.connectors.pools import Demand, Meter, PriceSchedule
from bidbeam.connectors.price_feeds import PLACES, implausible
from bidbeam.pipelines.config_check import Fields, decimal_of, fault, moment_of, nearest, shown, text_of
from bidbeam.pipelines.yaml_text import Node

UNITS: Mapping[str, int] = {"1M tokens": 6, "1K tokens": 3, "token": 0}
"""What ``per`` may say, and the power of ten that it stands for."""

_TOKEN_METERS: Mapping[str, Meter] = {
    "input": "uncached_input", "cached_input": "cached_input", "cache_write": "cache_write", "output": "output",
}  # fmt: skip
TOKEN_KEYS = (*_TOKEN_METERS, "request", "per")
_DEMAND = (Decimal("0.5"), Decimal(10))
_WIDE = Context(prec=100)
_EXACT = Context(prec=100, traps=[Inexact])


def per_token(price: Decimal, power: int) -> Decimal:
    """``price`` per 10**power tokens as the price of one, exactly. Raises Inexact where 15 places do not hold it."""
    return _EXACT.quantize(price.scaleb(-power, _EXACT), PLACES)


def per_second(hour: Decimal) -> Decimal:
    """An hour's price as that of a second, half-even at 15 places."""
    return _WIDE.divide(hour, Decimal(3600)).quantize(PLACES, ROUND_HALF_EVEN, _WIDE)


def price_id(
    pool: str,
    unit_prices: Mapping[Meter, Decimal],
    currency: str,
    source: str,
    valid_from: datetime | None,
    valid_to: datetime | None = None,
) -> str:
    """A digest of everything that the schedule says; the same schedule has the same id wherever it is read."""
    said = {
        "pool": pool,
        "prices": {meter: f"{price:.15f}" for meter, price in unit_prices.items()},
        "currency": currency,
        "source": source,
        "valid_from": valid_from.isoformat() if valid_from else None,
    }
    if valid_to is not None:
        said["valid_to"] = valid_to.isoformat()
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def price_of(
    node: Node,
    pool: str,
    fx: Mapping[str, Decimal | None],
    *,
    by_hour: bool,
    tokens_per_second: Decimal | None = None,
    source: str = "pools file",
) -> PriceSchedule:
    """A price schedule as it is written down in one block.

    ``fx`` is USD per unit of each currency that has a rate, None where that is not known yet. ``by_hour``: whether this
    kind of pool may be paid by the accelerator hour. A remote pool that is rented by the hour and does
    ``tokens_per_second`` has the price of a token that follows.
    """
    fields = Fields(node, (*TOKEN_KEYS, "accelerator_hour", "currency", "source", "valid_from", "valid_to", "demand"))
    currency = currency_of(fields, fx)
    told = fields.read("source", text_of, source)
    valid_from, valid_to = fields.maybe("valid_from", moment_of), fields.maybe("valid_to", moment_of)
    if valid_from is not None and valid_to is not None and valid_to <= valid_from:
        raise fault(fields.need("valid_to", ""), "ends before it begins", "a moment after valid_from")
    hour = fields.get("accelerator_hour")
    rate = Decimal(1) if currency == "USD" else fx[currency] or Decimal(0)
    if hour is not None and not by_hour and tokens_per_second is not None:
        _check_alone(fields)
        unit_prices = by_throughput(_unit_price(hour, 0), tokens_per_second)
        told = f"{told}: {shown(hour)} an hour at {tokens_per_second.normalize():f} tokens a second"
    elif hour is not None:
        unit_prices = _by_hour(fields, hour, by_hour)
    else:
        also = " or accelerator_hour" if by_hour else ""
        unit_prices = token_prices(fields, f'input and output, such as "0.10" and "0.40" per: 1M tokens{also}', rate)
    if hour is not None:
        _check_plausible(hour, unit_prices, rate)
    priced = schedule_of(pool, unit_prices, currency, told, valid_from=valid_from, valid_to=valid_to)
    return replace(priced, demand=_demand(fields, by_hour))


def _demand(fields: Fields, allowed: bool) -> Demand | None:
    """The curve by which an engine of ours bids: bounded, so that no bid runs away."""
    node = fields.get("demand")
    if node is None:
        return None
    if not allowed:
        raise fault(node, "only engines of ours bid by supply and demand", "a price without demand")
    curve = Fields(node, ("least", "most"))

    def factor(entry: Node) -> Decimal:
        return decimal_of(entry, 'a factor of the price, such as "0.8" or "2.0"')

    least, most = curve.read("least", factor, Decimal(1)), curve.read("most", factor, Decimal(1))
    low, high = _DEMAND
    if not low <= least <= 1 <= most <= high:
        raise fault(node, f"asks for {least:f} to {most:f} times the price", f"{low} <= least <= 1 <= most <= {high}")
    return Demand(least, most)


def schedule_of(
    pool: str,
    unit_prices: Mapping[Meter, Decimal],
    currency: str,
    source: str,
    *,
    valid_from: datetime | None = None,
    valid_to: datetime | None = None,
    fetched_at: datetime | None = None,
) -> PriceSchedule:
    """The schedule of these unit prices, with its id."""
    digest = price_id(pool, unit_prices, currency, source, valid_from, valid_to)
    return PriceSchedule(digest, pool, unit_prices, currency, valid_from, source, valid_to, fetched_at)


def by_throughput(hour: Decimal, tokens_per_second: Decimal) -> dict[Meter, Decimal]:
    """What a token costs on a machine of this price an hour that serves so many: half-even at 15 places, once.

    As in a pool's capacity, tokens are uncached input and output; cached ones take no time and cost nothing.
    """
    token = _WIDE.divide(hour, _WIDE.multiply(Decimal(3600), tokens_per_second)).quantize(
        PLACES, ROUND_HALF_EVEN, _WIDE
    )
    return {"uncached_input": token, "cached_input": Decimal(0), "output": token}


def hour_prices(hour: Decimal) -> dict[Meter, Decimal]:
    """The meters of a pool that is paid by the accelerator hour: all of them at the same second."""
    second = per_second(hour)
    return {"accelerator_second": second, "accelerator_idle_second": second, "setup": second}


def _by_hour(fields: Fields, hour: Node, allowed: bool) -> dict[Meter, Decimal]:
    if not allowed:
        raise fault(
            hour,
            "only an engine in our workers is paid by the hour",
            "prices per token or request, or capacity: {tokens_per_second: …}, what it was measured to serve",
        )
    _check_alone(fields)
    return hour_prices(_unit_price(hour, 0))


def _check_alone(fields: Fields) -> None:
    for name in TOKEN_KEYS:
        mixed = fields.get(name)
        if mixed is not None:
            raise fault(mixed, "stands beside accelerator_hour", "either accelerator_hour or prices per token")


def token_prices(fields: Fields, expected: str, usd: Decimal = Decimal(1)) -> dict[Meter, Decimal]:
    """The unit prices of a block's token and request keys. ``usd`` is what a unit of its currency is worth."""
    prices: dict[Meter, Decimal] = {}
    request = fields.get("request")
    if any(fields.get(name) is not None for name in _TOKEN_METERS):
        for name in ("input", "output"):
            fields.need(name, "a price; write 0 where these tokens are free")
        power = _power(fields)
        for name, meter in _TOKEN_METERS.items():
            entry = fields.get(name)
            if entry is not None:
                prices[meter] = _token_price(entry, power, usd)
    elif request is None:
        raise fault(fields.node, "names no price", expected)
    if request is not None:
        prices["request"] = _unit_price(request, 0)
        _check_plausible(request, {"request": prices["request"]}, usd)
    return prices


def _power(fields: Fields) -> int:
    unit = fields.need("per", "1M tokens, 1K tokens or token: the unit of these prices")
    text = " ".join(unit.text.split()) if unit.kind == "scalar" else ""
    if text not in UNITS:
        raise fault(unit, f"is {shown(unit)}", "1M tokens, 1K tokens or token", nearest(text, UNITS))
    return UNITS[text]


def _token_price(node: Node, power: int, usd: Decimal) -> Decimal:
    price = _unit_price(node, power)
    if implausible("output", price, usd) is not None:
        raise fault(node, f"comes to {price.normalize():f} for a single token", "a price in the unit that `per` names")
    return price


def _check_plausible(node: Node, unit_prices: Mapping[Meter, Decimal], usd: Decimal) -> None:
    for meter, price in unit_prices.items():
        if (said := implausible(meter, price, usd)) is not None:
            raise fault(node, f"cannot be: {said}", "a price in the unit of its key")


def _unit_price(node: Node, power: int) -> Decimal:
    value = decimal_of(node, 'an exact price such as "0.10"')
    if value < 0:
        raise fault(node, f"is negative: {shown(node)}", "a price of 0 or more")
    try:
        price = per_token(value, power)
    except Inexact:
        raise fault(
            node, f"is {shown(node)}, which needs more than 15 places per single unit", "at most 15 places per unit"
        ) from None
    if price.adjusted() >= 5:
        raise fault(node, f"is {shown(node)}", "a unit price below 100000")
    return price


def currency_of(fields: Fields, fx: Mapping[str, Decimal | None]) -> str:
    """The currency of a price: one that has a rate."""
    node = fields.get("currency")
    if node is None:
        return "USD"
    currency = text_of(node)
    if currency != "USD" and currency not in fx:
        problem = f"there is no exchange rate for {shown(node)}"
        raise fault(node, problem, "USD, or a currency with a rate under fx", nearest(currency, ("USD", *fx)))
    return currency
