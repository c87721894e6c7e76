"""Exact money over Arrow arrays: quantities, costs, conversion to USD, sums.

Types are those of :mod:`bidbeam.connectors.schemas`: quantity (18,3), unit price (20,15), cost (38,18). No value is
ever a float. The common case (charges below 9.2 units of currency) is computed in int64; bounds that are themselves
exact decide when Arrow's wide decimals take over, so both ways give the same digits. NULL stays NULL.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import COST, QUANTITY, UNIT_PRICE

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PRICE_PLACES = 15
COST_PLACES = 18
_INT64_LIMIT = 1 << 63
_QUANTITY_LIMIT = 10**17  # thousandths: 17 digits, so that quantity x unit price has at most 38
_SPLIT_PLACES = 9  # an fx rate of at most so many places is applied in int64


def quantity_from_units(units: Int64s, valid: Bools | None = None) -> pa.Array:
    """Whole tokens or requests as a QUANTITY array; NULL where ``valid`` is False.

    Raises ValueError from 100,000,000,000,000 units on: that many no price schedule can charge.
    """
    counted = _masked(units, valid)
    _check_magnitude(counted, _QUANTITY_LIMIT // 1000)
    return _decimals(counted * 1000, valid, QUANTITY)


def quantity_from_millis(millis: Int64s, valid: Bools | None = None) -> pa.Array:
    """Milliseconds as a QUANTITY array of seconds; NULL where ``valid`` is False. Raises ValueError when too large."""
    counted = _masked(millis, valid)
    _check_magnitude(counted, _QUANTITY_LIMIT)
    return _decimals(counted, valid, QUANTITY)


def cost(quantity: pa.Array, unit_price: Decimal) -> pa.Array:
    """``quantity`` (QUANTITY) x ``unit_price``, exact, as COST in the price's own currency.

    Raises ConfigError for a price that UNIT_PRICE cannot hold, ValueError for a quantity of 10^14 or more.
    """
    digits, places = _trimmed(check_unit_price(unit_price))
    price = digits * 10 ** (PRICE_PLACES - places)
    # A quantity of 18 digits always fits the low word.
    thousandths = _words(quantity)[:, 0]
    if max(_largest(thousandths), 1) * price < _INT64_LIMIT:
        return _decimals(thousandths * price, _validity(quantity), COST)
    narrow = quantity.cast(pa.decimal128(17, 3))
    return pc.multiply(narrow, pa.scalar(unit_price, UNIT_PRICE))


def to_usd(cost_native: pa.Array, fx_rate: Decimal) -> pa.Array:
    """``cost_native`` x ``fx_rate`` as COST, rounded half-even at 18 places; unchanged where the rate is 1.

    Raises ValueError for a rate that is not positive or has more than 18 places, and where a result reaches 10^19.
    """
    if fx_rate == 1:
        return cost_native
    rate, places = _trimmed(fx_rate)
    if rate <= 0 or places > COST_PLACES:
        raise ValueError(f"an fx rate must be positive with at most {COST_PLACES} decimal places, not {fx_rate}")
    fast = _to_usd_int64(cost_native, rate, places)
    return fast if fast is not None else _to_usd_wide(cost_native, rate, places)


def _to_usd_int64(cost_native: pa.Array, rate: int, places: int) -> pa.Array | None:
    """The conversion in int64, or None where a value might not fit.

    With rate = whole + part/10^p and cost = high x 10^p + low, the product is cost x whole + high x part +
    low x part / 10^p, and only the last term needs rounding.
    """
    words = _words(cost_native)
    if places > _SPLIT_PLACES or not np.array_equal(words[:, 1], words[:, 0] >> 63):
        return None
    amount = words[:, 0]
    unit = 10**places
    if len(amount) == 0 or int(amount.min()) < 0 or max(int(amount.max()), 1) * rate // unit + 2 >= _INT64_LIMIT:
        return None
    whole, part = divmod(rate, unit)
    high, low = np.divmod(amount, unit)
    carried, rest = np.divmod(low * part, unit)
    product = amount * whole + high * part + carried
    product += (2 * rest > unit) | ((2 * rest == unit) & (product % 2 == 1))
    return _decimals(product, _validity(cost_native), COST)


def _to_usd_wide(cost_native: pa.Array, rate: int, places: int) -> pa.Array:
    digits = max(len(str(rate)), places, 1)
    multiplier = pa.scalar(_decimal(rate, places), pa.decimal256(digits, places))
    product = pc.multiply(cost_native.cast(pa.decimal256(37, COST_PLACES)), multiplier)
    return pc.round(product, COST_PLACES, "half_to_even").cast(pa.decimal128(37, COST_PLACES)).cast(COST)


def add_costs(costs: Sequence[pa.Array], rows: int) -> pa.Array:
    """The sum by row of at most ten COST arrays of ``rows`` rows each; NULL adds nothing, and no array at all gives 0.

    Each amount must be below 10^19, as :func:`cost` and :func:`to_usd` make them, so that the sum cannot overflow.
    """
    if len(costs) > 10:
        raise ValueError("more than ten costs a row could overflow")
    low = np.zeros(rows, np.uint64)
    high = np.zeros(rows, np.int64)
    for array in costs:
        words = _words(array)
        valid = _validity(array)
        if valid is not None:
            words = np.where(valid[:, None], words, 0)
        addend = np.ascontiguousarray(words[:, 0]).view(np.uint64)
        low = low + addend
        high = high + words[:, 1] + (low < addend)
    return _from_words(np.column_stack([low.view(np.int64), high]), None, COST)


def sum_decimal(array: pa.Array | pa.ChunkedArray) -> Decimal:
    """The exact sum of a decimal128 array, however large; NULL adds nothing, an empty array gives 0."""
    total = 0
    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        words = _words(chunk)
        valid = _validity(chunk)
        if valid is not None:
            words = words[valid]
        # In halves of 32 bits, 2^31 rows cannot overflow a sum.
        low = np.ascontiguousarray(words[:, 0]).view(np.uint64)
        high = words[:, 1]
        total += int((low & 0xFFFFFFFF).sum()) + (int((low >> 32).sum()) << 32)
        total += (int((high & 0xFFFFFFFF).sum()) << 64) + (int((high >> 32).sum()) << 96)
    return _decimal(total, array.type.scale)


def hourly_to_second(hourly: Decimal) -> Decimal:
    """An hour's price as a second's, half-even at 15 places. Raises ConfigError where that is no unit price."""
    # Fractions round half-even, without the context's limit of digits.
    return check_unit_price(_decimal(round(Fraction(hourly) * 10**PRICE_PLACES / 3600), PRICE_PLACES))


def check_unit_price(price: Decimal) -> Decimal:
    """The price itself, when UNIT_PRICE holds it exactly. Raises ConfigError for any other."""
    problem = None
    if not price.is_finite():
        problem = "is not a number"
    elif price < 0:
        problem = "is negative"
    elif price >= 10 ** (UNIT_PRICE.precision - UNIT_PRICE.scale):
        problem = "is too large"
    elif _trimmed(price)[1] > PRICE_PLACES:
        problem = f"needs more than {PRICE_PLACES} decimal places per single token, request or second"
    if problem:
        raise ConfigError(
            f"the unit price {price} {problem}", expected="0 or more, below 100000, at most 15 decimal places"
        )
    return price


def _trimmed(value: Decimal) -> tuple[int, int]:
    """(digits, places) with value = digits / 10^places, and places as few as may be."""
    sign, digits, exponent = value.as_tuple()
    scaled = int("".join(map(str, digits)))
    if scaled == 0 or not isinstance(exponent, int):
        return 0, 0
    while exponent < 0 and scaled % 10 == 0:
        scaled, exponent = scaled // 10, exponent + 1
    scaled *= 10 ** max(exponent, 0)
    return (-scaled if sign else scaled), max(-exponent, 0)


def _decimal(scaled: int, places: int) -> Decimal:
    # The constructor is exact; arithmetic would round to the context's precision.
    return Decimal(f"{scaled}E-{places}")


def _masked(values: Int64s, valid: Bools | None) -> Int64s:
    values = np.ascontiguousarray(values, dtype=np.int64)
    return values if valid is None else np.where(valid, values, 0)


def _largest(values: Int64s) -> int:
    return max(abs(int(values.max())), abs(int(values.min()))) if len(values) else 0


def _check_magnitude(values: Int64s, limit: int) -> None:
    if _largest(values) >= limit:
        raise ValueError(f"a quantity of {_largest(values)} cannot be charged; the most is {limit - 1}")


def _words(array: pa.Array) -> Int64s:
    """A decimal128 array as int64[n, 2]: low word (to be read as unsigned), high word. Under a NULL stands anything."""
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        return np.zeros((len(array), 2), np.int64)
    return np.frombuffer(buffer, np.int64).reshape(-1, 2)[array.offset : array.offset + len(array)]


def _validity(array: pa.Array) -> Bools | None:
    if array.null_count == 0:
        return None
    valid: Bools = pc.is_valid(array).to_numpy(zero_copy_only=False)
    return valid


def _decimals(values: Int64s, valid: Bools | None, type_: pa.DataType) -> pa.Array:
    return _from_words(np.column_stack([values, values >> 63]), valid, type_)


def _from_words(words: Int64s, valid: Bools | None, type_: pa.DataType) -> pa.Array:
    bitmap: Any = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(type_, len(words), [bitmap, pa.py_buffer(np.ascontiguousarray(words))])
