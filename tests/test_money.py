"""Exact money: every helper against Python's Decimal at a precision that rounds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors import money
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import COST, QUANTITY

EXACT = Context(prec=200, rounding=ROUND_HALF_EVEN)
PLACE_18 = Decimal("1E-18")

units = st.one_of(st.integers(0, 10_000), st.integers(0, 10**14 - 1))
millis = st.one_of(st.integers(0, 10**7), st.integers(0, 10**17 - 1))
optional_millis = st.lists(st.one_of(st.none(), millis), max_size=30)
unit_prices = st.one_of(
    st.integers(0, 10**9).map(lambda digits: Decimal(f"{digits}E-15")),
    st.integers(0, 10**20 - 1).map(lambda digits: Decimal(f"{digits}E-15")),
)
fx_rates = st.one_of(
    st.just(Decimal(1)),
    st.just(Decimal("0.5")),
    st.integers(1, 10**8).map(lambda digits: Decimal(f"{digits}E-4")),
    st.integers(1, 10**19).map(lambda digits: Decimal(f"{digits}E-18")),
)


def quantities(values: list[int | None]) -> pa.Array:
    valid = np.array([value is not None for value in values], np.bool_)
    return money.quantity_from_millis(np.array([value or 0 for value in values], np.int64), valid)


def as_cost(values: list[Decimal | None]) -> pa.Array:
    return pa.array(values, COST)


@pytest.fixture(autouse=True)
def exact_context() -> Iterator[None]:
    """The oracle computes with 200 digits."""
    with localcontext(EXACT):
        yield


@given(st.lists(st.one_of(st.none(), units), max_size=30))
def test_units_become_quantities(values: list[int | None]) -> None:
    """Whole units become the same numbers as decimals, and unknown ones NULL."""
    valid = np.array([value is not None for value in values], np.bool_)
    array = money.quantity_from_units(np.array([value or 0 for value in values], np.int64), valid)
    array.validate(full=True)
    assert array.type == QUANTITY
    assert array.to_pylist() == values


@given(optional_millis, st.integers(0, 5))
def test_millis_become_seconds(values: list[int | None], skip: int) -> None:
    """Milliseconds become seconds with three places, also when sliced."""
    array = quantities(values).slice(skip)
    array.validate(full=True)
    assert array.to_pylist() == [None if value is None else Decimal(f"{value}E-3") for value in values[skip:]]


def test_quantities_that_cannot_be_charged_are_refused() -> None:
    """A quantity too large for quantity x price to be exact raises instead of wrapping."""
    with pytest.raises(ValueError, match="cannot be charged"):
        money.quantity_from_units(np.array([10**14]))
    with pytest.raises(ValueError, match="cannot be charged"):
        money.quantity_from_millis(np.array([10**17]))


@given(optional_millis, unit_prices, st.integers(0, 5))
def test_cost_is_exact(values: list[int | None], price: Decimal, skip: int) -> None:
    """Quantity x unit price loses no digit, small or large, and NULL stays NULL."""
    array = money.cost(quantities(values).slice(skip), price)
    array.validate(full=True)
    assert array.type == COST
    with localcontext(EXACT):
        expected = [None if value is None else Decimal(f"{value}E-3") * price for value in values[skip:]]
    assert array.to_pylist() == expected


native_costs = st.one_of(st.integers(0, 10**19), st.integers(0, 10**32)).map(lambda v: Decimal(f"{v}E-18"))


@given(
    st.lists(
        st.one_of(st.none(), native_costs),
        max_size=20,
    ),
    fx_rates,
    st.integers(0, 3),
)  # fmt: skip
def test_usd_is_half_even_at_18_places(values: list[Decimal | None], rate: Decimal, skip: int) -> None:
    """Conversion equals Decimal's quantize half-even, whichever way it is computed."""
    array = money.to_usd(as_cost(values).slice(skip), rate)
    array.validate(full=True)
    with localcontext(EXACT):
        expected = [None if value is None else (value * rate).quantize(PLACE_18) for value in values[skip:]]
    assert array.type == COST
    assert array.to_pylist() == expected


def test_ties_go_to_even() -> None:
    """An exact half in the 19th place goes to the even neighbour, in int64 and in wide decimals alike."""
    ties = [Decimal(f"{digits}E-18") for digits in (1, 3, 5, 7)]
    halves = [Decimal(f"{digits}E-18") for digits in (0, 2, 2, 4)]
    assert money.to_usd(as_cost(ties), Decimal("0.5")).to_pylist() == halves
    large = [value + 10**6 for value in ties]
    assert money.to_usd(as_cost(large), Decimal("0.5")).to_pylist() == [value + 500_000 for value in halves]


@pytest.mark.parametrize("rate", [Decimal(0), Decimal(-1), Decimal("1E-19")])
def test_impossible_fx_rates_are_refused(rate: Decimal) -> None:
    """A rate of zero, below zero or with more than 18 places raises."""
    with pytest.raises(ValueError, match="fx rate"):
        money.to_usd(as_cost([Decimal(1)]), rate)


def test_usd_beyond_the_type_is_refused() -> None:
    """An amount of 10^19 USD or more raises instead of wrapping."""
    with pytest.raises(ValueError, match=r"."):
        money.to_usd(as_cost([Decimal(10) ** 18]), Decimal(1000))


signed_costs = st.one_of(st.none(), st.integers(-(10**37), 10**37 - 1).map(lambda v: Decimal(f"{v}E-18")))


@given(st.lists(st.tuples(signed_costs, signed_costs, signed_costs), max_size=20), st.integers(0, 3))
def test_costs_add_up_by_row(rows: list[tuple[Decimal | None, ...]], skip: int) -> None:
    """The sum by row is exact, NULL adding nothing."""
    columns = [as_cost([row[i] for row in rows]).slice(skip) for i in range(3)]
    total = money.add_costs(columns, len(rows[skip:]))
    total.validate(full=True)
    with localcontext(EXACT):
        assert total.to_pylist() == [sum((v for v in row if v is not None), Decimal(0)) for row in rows[skip:]]


def test_no_costs_add_up_to_zero() -> None:
    """A row without any charge costs 0."""
    assert money.add_costs([], 2).to_pylist() == [0, 0]


largest = st.integers(-(10**38) + 1, 10**38 - 1).map(lambda v: Decimal(f"{v}E-18"))


@given(st.lists(st.one_of(st.none(), largest), max_size=30), st.integers(0, 29))
def test_sums_never_overflow(values: list[Decimal | None], cut: int) -> None:
    """The sum of a column is exact even where it no longer fits the column's type, in one chunk or two."""
    with localcontext(EXACT):
        expected = sum((value for value in values if value is not None), Decimal(0))
    assert money.sum_decimal(as_cost(values)) == expected
    assert money.sum_decimal(pa.chunked_array([as_cost(values[:cut]), as_cost(values[cut:])])) == expected


@given(st.integers(0, 10**12).map(lambda digits: Decimal(f"{digits}E-6")))
def test_an_hour_becomes_seconds_once(hourly: Decimal) -> None:
    """A second's price is the hour's / 3600, half-even at 15 places."""
    with localcontext(EXACT):
        assert money.hourly_to_second(hourly) == (hourly / 3600).quantize(Decimal("1E-15"))


def test_an_hourly_tie_goes_to_even() -> None:
    """Where the second's price ends in exactly half a place it goes to the even one."""
    assert money.hourly_to_second(Decimal("1.8E-12")) == 0
    assert money.hourly_to_second(Decimal("5.4E-12")) == Decimal("2E-15")


@pytest.mark.parametrize("price", ["0", "0.000000125", "99999.999999999999999", "0.1000000000000000000000"])
def test_prices_that_fit_pass(price: str) -> None:
    """A price that DECIMAL(20,15) holds exactly comes back as it was."""
    assert money.check_unit_price(Decimal(price)) == Decimal(price)


@pytest.mark.parametrize(
    ("price", "problem"),
    [
        ("-0.1", "negative"),
        ("0.0000000000000001", "15 decimal places"),
        ("1E-100000", "15 decimal places"),
        ("100000", "too large"),
        ("1E100000", "too large"),
        ("NaN", "not a number"),
        ("Infinity", "not a number"),
    ],
)
def test_prices_that_do_not_fit_are_refused(price: str, problem: str) -> None:
    """A price that is negative, too large, too fine or no number is a configuration error that says so."""
    with pytest.raises(ConfigError, match=problem):
        money.check_unit_price(Decimal(price))
