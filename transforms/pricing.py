"""What a number of tokens costs on a price schedule: exact to the last digit, and a float image for the optimiser.

Quantities are decimal (17,3), unit prices (20,15); their product is a cost of (38,18), exactly. Nothing is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.pools import Meter, PriceSchedule
from bidbeam.connectors.schemas import COST, UNIT_PRICE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FACTOR = pa.decimal128(17, 3)
_MILLIONTHS = pa.decimal128(18, 6)
_SUMMAND = pa.decimal128(37, 18)


@dataclass(frozen=True, slots=True)
class Usage:
    """What lots use of one pool, an element a lot: single tokens, requests, and thousandths of an accelerator second.

    ``worst`` marks an upper limit: its input is charged at the dearest of the schedule's input meters, and its
    conversion into USD is rounded up for every charge that may come of it.
    """

    uncached: Ints
    cached: Ints
    output: Ints
    requests: Ints
    milliseconds: Ints
    worst: bool = False

    def metered(self, price: PriceSchedule) -> dict[Meter, Ints]:
        """The quantity per meter of this schedule, in thousandths.

        A schedule without ``cached_input`` charges cached tokens as uncached ones; one by time charges time alone.
        Tokens that a provider bills as cache writes are not foreseen in an expected bill, only in a worst one.
        """
        prices = price.unit_prices
        if price.by_time:
            return {"accelerator_second": self.milliseconds}
        quantities: dict[Meter, Ints] = {}
        if self.worst:
            dearest = max(
                (meter for meter in _INPUT_METERS if meter in prices),
                key=lambda meter: prices[meter],
                default=None,
            )
            if dearest is not None:
                quantities[dearest] = (self.uncached + self.cached) * 1000
        elif "cached_input" in prices:
            quantities["uncached_input"] = self.uncached * 1000
            quantities["cached_input"] = self.cached * 1000
        else:
            quantities["uncached_input"] = (self.uncached + self.cached) * 1000
        quantities["output"] = self.output * 1000
        quantities["request"] = self.requests * 1000
        return {meter: quantity for meter, quantity in quantities.items() if meter in prices}


_INPUT_METERS: tuple[Meter, ...] = ("uncached_input", "cached_input", "cache_write")


def bill(usage: Usage, price: PriceSchedule, rate: Decimal) -> pa.Array:
    """The exact cost in USD of each lot's usage, decimal128(38,18); ``rate`` is USD per unit of its currency.

    Half-even at 18 places after conversion; a worst case instead covers every charge's rounding. Raises
    pyarrow.ArrowInvalid for a sum beyond 19 digits before the point.
    """
    meters = usage.metered(price)
    total = pa.repeat(pa.scalar(Decimal(0), COST), len(usage.requests))
    for meter, quantity in meters.items():
        cost = pc.multiply(thousandths(quantity), pa.scalar(price.unit_prices[meter], UNIT_PRICE))
        total = pc.add(total.cast(_SUMMAND), cost.cast(_SUMMAND))
    if rate == 1:
        return total
    if not usage.worst:
        return scaled(total, rate)
    # Each charge of a request is rounded by itself, up by less than one unit in the last place.
    slack = thousandths(usage.requests * 1000 * len(meters))
    unit = pa.scalar(Decimal("1e-15"), UNIT_PRICE)
    roundings = scaled(pc.multiply(slack, unit), Decimal("0.001"))
    return pc.add(scaled(total, rate, "up").cast(_SUMMAND), roundings.cast(_SUMMAND))


def bill_float(usage: Usage, price: PriceSchedule, rate: Decimal) -> Floats:
    """``bill`` as float64, for ranking and optimising; never for what is written down."""
    total = np.zeros(len(usage.requests))
    for meter, quantity in usage.metered(price).items():
        total += quantity * (float(price.unit_prices[meter]) / 1000)
    return total * float(rate)


def thousandths(values: Ints) -> pa.Array:
    """Non-negative integers read as thousandths: decimal128(17,3), without a conversion per value."""
    raw = np.zeros((len(values), 2), dtype=np.int64)
    raw[:, 0] = values
    return pa.Array.from_buffers(_FACTOR, len(values), [None, pa.py_buffer(raw)])


def scaled(cost: pa.Array, rate: Decimal, rounding: Literal["half_to_even", "up"] = "half_to_even") -> pa.Array:
    """decimal128(38,18) x a rate of at most 18 places, rounded once at 18 places."""
    exact = pc.multiply(cost.cast(pa.decimal256(38, 18)), pa.scalar(rate, pa.decimal256(37, 18)))
    return pc.round(exact, ndigits=18, round_mode=rounding).cast(COST)


def parts_per_million(cost: pa.Array, ppm: Ints) -> pa.Array:
    """decimal128(38,18) x so many millionths, element by element, rounded half-even at 18 places."""
    raw = np.zeros((len(ppm), 2), dtype=np.int64)
    raw[:, 0], raw[:, 1] = ppm, ppm >> 63  # two's complement
    millionths = pa.Array.from_buffers(_MILLIONTHS, len(ppm), [None, pa.py_buffer(raw)]).cast(pa.decimal256(18, 6))
    exact = pc.multiply(cost.cast(pa.decimal256(38, 18)), millionths)
    return pc.round(exact, ndigits=18, round_mode="half_to_even").cast(COST)


def rate_of(currency: str, rates: Mapping[str, Decimal]) -> Decimal | None:
    """USD per unit of the currency, or None where no rate is known."""
    return Decimal(1) if currency == "USD" else rates.get(currency)


def as_floats(cost: Any) -> Floats:
    """A decimal column as float64."""
    return np.asarray(cost.cast(pa.float64()))
