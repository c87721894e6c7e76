"""Bills are exact, and the bill, not the list price, ranks pools."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markets import NOW, lots_of, pool

from bidbeam.connectors.pools import Meter, PriceSchedule
from bidbeam.transforms.bidding import make_bids
from bidbeam.transforms.pricing import Usage, bill, bill_float, scaled

_EXACT = Context(prec=100)
_UNIT = Decimal("1e-18")
tokens = st.integers(0, 10**9)
prices = st.decimals(0, 1, places=15)


def _usage(uncached: int, cached: int, output: int, requests: int, ms: int = 0, *, worst: bool = False) -> Usage:
    arrays = (np.array([value], np.int64) for value in (uncached, cached, output, requests, ms))
    return Usage(*arrays, worst=worst)


def _schedule(**unit: Decimal) -> PriceSchedule:
    meters: dict[Meter, Decimal] = dict(unit)  # type: ignore[arg-type]  # keywords are meters
    return PriceSchedule("p", "p", meters)


def _one(column: pa.Array) -> Decimal:
    return column[0].as_py()


@given(tokens, tokens, tokens, st.integers(0, 10**6), prices, prices, prices, prices)
def test_a_bill_is_the_exact_sum_over_meters(
    uncached: int, cached: int, output: int, requests: int, p: Decimal, c: Decimal, o: Decimal, r: Decimal
) -> None:
    """Arrow's bill is Python's exact decimal sum of quantity times unit price, to the last digit."""
    usage = _usage(uncached, cached, output, requests)
    found = _one(bill(usage, _schedule(uncached_input=p, cached_input=c, output=o, request=r), Decimal(1)))
    exact = Decimal(0)
    for quantity, price in ((uncached, p), (cached, c), (output, o), (requests, r)):
        exact = _EXACT.add(exact, _EXACT.multiply(Decimal(quantity), price))
    assert found == exact
    float_bill = bill_float(usage, _schedule(uncached_input=p, cached_input=c, output=o, request=r), Decimal(1))[0]
    assert float_bill == pytest.approx(float(exact), rel=1e-12)


@given(tokens, tokens, prices, prices)
def test_without_a_cached_price_all_input_is_uncached(uncached: int, cached: int, p: Decimal, o: Decimal) -> None:
    """A schedule without a price for cached input charges it as uncached input."""
    with_cache = bill(_usage(uncached, cached, 7, 1), _schedule(uncached_input=p, output=o), Decimal(1))
    without = bill(_usage(uncached + cached, 0, 7, 1), _schedule(uncached_input=p, output=o), Decimal(1))
    assert with_cache.equals(without)


@given(st.integers(0, 10**12), st.decimals("1e-9", 10_000, places=18))
def test_conversion_rounds_half_even_once(millionths: int, rate: Decimal) -> None:
    """Cost times rate is rounded once, half-even, at 18 places."""
    cost = Decimal(millionths).scaleb(-15)
    exact = _EXACT.multiply(cost, rate).quantize(_UNIT, ROUND_HALF_EVEN, _EXACT)
    assert _one(scaled(pa.array([cost], pa.decimal128(38, 18)), rate)) == exact


@given(
    st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=20),
    *(prices for _ in range(4)),
    st.decimals("0.001", 1000, places=18),
)
def test_the_worst_case_covers_each_charge_rounded_by_itself(
    requests: list[tuple[int, int, int]], p: Decimal, c: Decimal, w: Decimal, o: Decimal, rate: Decimal
) -> None:
    """However input is split into meters, the charges, each rounded, sum to no more than the lot's worst case."""
    schedule = _schedule(uncached_input=p, cached_input=c, cache_write=w, output=o, request=p)
    uncached, cached, output = (sum(column) for column in zip(*requests, strict=True))
    worst = _one(bill(_usage(uncached, cached, output, len(requests), worst=True), schedule, rate))
    spent = Decimal(0)
    for fresh, reused, answer in requests:
        for quantity, unit in ((fresh, w), (reused, c), (answer, o), (1, p)):
            cost = _EXACT.multiply(_EXACT.multiply(Decimal(quantity), unit), rate)
            spent = _EXACT.add(spent, cost.quantize(_UNIT, ROUND_HALF_EVEN, _EXACT))
    assert spent <= worst


def test_accelerator_time_is_billed_by_the_millisecond() -> None:
    """A pool paid by time bills its seconds alone, whatever the tokens."""
    schedule = _schedule(accelerator_second=Decimal("0.000197222222222"), accelerator_idle_second=Decimal(1))
    assert _one(bill(_usage(5, 5, 5, 5, ms=1234), schedule, Decimal(1))) == Decimal("1.234") * Decimal(
        "0.000197222222222"
    )


@pytest.mark.parametrize(
    ("prices", "cents"),
    [
        ({"input": "0.58", "output": "1.68"}, "20.06"),
        ({"input": "1.00", "output": "1.00", "cached": "0.10"}, "9.90"),
        ({"input": "0.56", "output": "1.68", "cached": "0.056"}, "10.02"),
        ({"input": "0.28", "output": "0.84"}, "9.80"),
        ({"input": "0.26", "output": "0.38", "cached": "0.13"}, "5.03"),
    ],
)
def test_the_bill_of_a_shared_prefix(prices: dict[str, str], cents: str) -> None:
    """10,000 rows of 2,000 shared and 300 own tokens in and 400 out at 95 % hits cost what the lists add up to."""
    rows = 10_000
    workload = lots_of(
        {
            "requests": rows,
            "input_tokens": rows * 2300,
            "ideal_cached_tokens": rows * 2000,
            "max_output_tokens": rows * 400,
        }
    )
    bids = make_bids(workload, [pool("p", state={"cache_share": 0.95}, **prices)], now=NOW)
    assert round(_one(bids.expected_cost(0)), 2) == Decimal(cents)
