"""Settling: what engines return becomes rows of the journal, with what each attempt used and what it costs.

Believed is what the provider reports, as far as it can be true; what it leaves out is filled in only for attempts that
answered (``ok``), from our own recount or else at the worst case, and marked so in ``usage_source``. An attempt that
failed or was cancelled is charged for what is known of its usage and for nothing else. A crash leaves attempts of
which nothing is known: :func:`book_lost` books them at the worst case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.money import (
    Bools,
    Int64s,
    add_costs,
    cost,
    quantity_from_millis,
    quantity_from_units,
    to_usd,
)
from bidbeam.connectors.pools import Meter, PriceSchedule
from bidbeam.connectors.schemas import COST, METER_COLUMNS, SEGMENT
from bidbeam.transforms.accelerator_time import share_milliseconds
from bidbeam.transforms.estimates import worst_input

USAGE_SOURCES = ("reported", "recount", "estimate")
"""From the most to the least trustworthy."""
_REPORTED, _RECOUNT, _ESTIMATE = range(3)

_INPUT_METERS: tuple[Meter, ...] = ("uncached_input", "cached_input", "cache_write")
_MOST_TOKENS = 2**31 - 1  # no request has more; a provider that reports more is not believed
_ULP = Decimal(1).scaleb(-COST.scale)


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed for one pool in a run, frozen at the award. ``fx_rate`` is USD per unit of the currency."""

    pool: str
    model: str
    price: PriceSchedule
    fx_rate: Decimal = Decimal(1)
    fx_source: str | None = None
    fx_at: datetime | None = None
    jurisdiction: str | None = None
    operator: str | None = None


@dataclass(frozen=True, slots=True)
class _Usage:
    """Tokens per row with what is known of them (False: NULL), and the index of their source (-1: none)."""

    input: Int64s
    input_known: Bools
    cached: Int64s
    cached_known: Bools
    written: Int64s
    written_known: Bools
    output: Int64s
    output_known: Bools
    source: Int64s


def settle(
    requests: pa.RecordBatch,
    results: pa.RecordBatch,
    terms: Terms,
    *,
    accelerator_ms: int | None,
    recount_output_tokens: pa.Array | None = None,
) -> pa.RecordBatch:
    """One row of ``schemas.SEGMENT`` for each of ``results``.

    ``requests`` stands row by row beside ``results`` (RESULT_SCHEMA) with the columns tag, key, attempt_id, request_id,
    lot_id, round, attempt_no, kind, input_tokens, tokens_exact, max_tokens and n. ``accelerator_ms`` is the busy time
    that these attempts share, all of them, failed ones too; only a pool paid by time needs it.
    ``recount_output_tokens`` (int64) is our own count of the answers, NULL where not counted. Raises ValueError where
    the two batches do not fit together or the time is missing.
    """
    if not requests.column("tag").equals(results.column("tag")):
        raise ValueError("requests and results must hold the same tags in the same order")
    rows = results.num_rows
    answered = _flags(pc.equal(results.column("status"), "ok"))
    usage = _usage(requests, results, answered, recount_output_tokens)
    quantities = _token_quantities(terms.price, usage, answered)
    if terms.price.by_time:
        if accelerator_ms is None:
            raise ValueError(f"pool {terms.pool!r} is paid by time: settle needs its accelerator_ms")
        weights = usage.input - usage.cached + usage.output
        quantities["accelerator_second"] = quantity_from_millis(share_milliseconds(accelerator_ms, weights))
    ours, exact = _tokens(requests.column("input_tokens"))[0], _flags(requests.column("tokens_exact"))
    columns = {
        name: results.column(name)
        for name in (
            "started_at", "finished_at", "status", "error_class", "error_message", "http_status", "output", "samples",
            "finish_reason", "model_returned", "other_model", "provider_request_id", "provider_cost", "endpoint_host",
        )
    }  # fmt: skip
    columns |= {
        "input_tokens": pa.array(usage.input, mask=~usage.input_known),
        "cached_tokens": pa.array(usage.cached, mask=~usage.cached_known),
        "cache_write_tokens": pa.array(usage.written, mask=~usage.written_known),
        "output_tokens": pa.array(usage.output, mask=~usage.output_known),
        "recount_input_tokens": pa.array(ours, mask=~exact),
        "recount_output_tokens": pa.nulls(rows) if recount_output_tokens is None else recount_output_tokens,
        "jurisdiction": _places(results.column("jurisdiction"), terms),
        "usage_source": pa.DictionaryArray.from_arrays(
            pa.array(usage.source.astype(np.int32), mask=usage.source < 0), pa.array(USAGE_SOURCES)
        ),
    }
    return _segment(_identity(requests) | columns, quantities, terms, rows)


def book_lost(
    requests: pa.RecordBatch, terms: Terms, at: datetime, *, accelerator_ms: int | None = None
) -> pa.RecordBatch:
    """SEGMENT rows for attempts that were dispatched and whose outcome a crash took: ``lost``, at the worst case.

    ``requests`` has the columns that :func:`settle` asks for, and started_at where that is known. A pool paid by time
    needs ``accelerator_ms``, the most that may have run: what was reserved and is not yet settled.
    """
    rows = requests.num_rows
    # An estimate may be too low, and what may have been served may not cost more than is booked for it.
    most = worst_input(requests.column("input_tokens"), requests.column("tokens_exact"))
    usage = _worst_usage(requests.set_column(requests.schema.get_field_index("input_tokens"), "input_tokens", most))
    quantities = _worst_quantities(terms.price, usage)
    if terms.price.by_time:
        if accelerator_ms is None:
            raise ValueError(f"pool {terms.pool!r} is paid by time: book_lost needs the reserved accelerator_ms")
        shares = share_milliseconds(accelerator_ms, usage.input + usage.output)
        quantities["accelerator_second"] = quantity_from_millis(shares)
    columns = {
        "started_at": requests.column("started_at") if "started_at" in requests.schema.names else at,
        "finished_at": at,
        "status": "lost",
        "input_tokens": pa.array(usage.input),
        "output_tokens": pa.array(usage.output),
        "usage_source": "estimate",
    }
    return _segment(_identity(requests) | columns, quantities, terms, rows)


def worst_case_cost(requests: pa.RecordBatch, terms: Terms) -> pa.Array:
    """The most (COST, USD) that each request can cost in tokens: all input at its dearest, n full answers.

    Never below what :func:`settle` charges for usage within these bounds: where an fx rate makes costs round, the last
    place is raised by as much as rounding can add. Accelerator time is not in it; that is reserved in seconds.
    """
    price = terms.price
    amounts = _costs(_worst_quantities(price, _worst_usage(requests)), terms)
    if terms.fx_rate != 1 and amounts:
        slack = pa.scalar(_ULP * len(price.unit_prices), COST)
        amounts.append(pa.repeat(slack, requests.num_rows))
    return add_costs(amounts, requests.num_rows)


def over_worst_case(requests: pa.RecordBatch, segment: pa.RecordBatch, terms: Terms) -> pa.Array:
    """Which rows of a settled segment (bool[n]) cost more than their worst case, so more than was reserved for them.

    Only a provider that reports more input than we sent, or more output than we allowed, makes one. What it reports is
    what it will bill, and so is what the ledger books; the budget's wall then stands on the caller, who has to stop
    buying from such a pool. Never True on a pool paid by time.
    """
    if terms.price.by_time:
        return pa.repeat(pa.scalar(False), segment.num_rows)
    return pc.greater(segment.column("cost"), worst_case_cost(requests, terms))


def overhead_row(
    terms: Terms,
    *,
    meter: Meter,
    millis: int,
    at: datetime,
    attempt_id: bytes,
    kind: str = "overhead",
    round_no: int | None = None,
) -> pa.RecordBatch:
    """One SEGMENT row that no request bears (tag NULL): ``millis`` of idle, setup or unshared time up to ``at``.

    Raises ValueError where the pool's schedule has no such meter.
    """
    if meter not in terms.price.unit_prices:
        raise ValueError(f"pool {terms.pool!r} has no price for {meter}; there is nothing to book")
    columns = {
        "attempt_id": pa.array([attempt_id], pa.binary(16)),
        "round": round_no,
        "attempt_no": 1,
        "kind": kind,
        "started_at": at - timedelta(milliseconds=millis),
        "finished_at": at,
        "status": "ok",
    }
    quantity = quantity_from_millis(np.array([millis], np.int64))
    return _segment(columns, {meter: quantity}, terms, 1)


def constant(value: Any, type_: pa.DataType, rows: int) -> pa.Array:
    """``value`` ``rows`` times; dictionary-encoded where the type is, so that text costs four bytes a row."""
    if value is None:
        return pa.nulls(rows, type_)
    if pa.types.is_dictionary(type_):
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value], type_.value_type))
    return pa.repeat(pa.scalar(value, type_), rows)


def _usage(
    requests: pa.RecordBatch, results: pa.RecordBatch, answered: Bools, recount_output: pa.Array | None
) -> _Usage:
    rows = results.num_rows
    worst = _worst_usage(requests)
    exact = _flags(requests.column("tokens_exact"))
    input_, input_reported = _tokens(results.column("input_tokens"))
    output, output_reported = _tokens(results.column("output_tokens"))
    cached, cached_reported = _tokens(results.column("cached_tokens"))
    written, written_reported = _tokens(results.column("cache_write_tokens"))
    recount, recounted = (
        (np.zeros(rows, np.int64), np.zeros(rows, np.bool_)) if recount_output is None else _tokens(recount_output)
    )
    input_ = np.where(input_reported, input_, np.where(answered, worst.input, 0))
    output = np.where(output_reported, output, np.where(answered, np.where(recounted, recount, worst.output), 0))
    input_known, output_known = input_reported | answered, output_reported | answered
    # Cached tokens are a subset of input tokens: a report that says otherwise is not believed.
    cached_known = cached_reported & input_known & (cached <= input_)
    cached = np.where(cached_known, cached, 0)
    # So are those written to a cache, and no token is both.
    written_known = written_reported & input_known & (written <= input_ - cached)

    engine_source = pc.index_in(results.column("usage_source"), pa.array(USAGE_SOURCES)).fill_null(_REPORTED)
    claimed = engine_source.to_numpy(zero_copy_only=False).astype(np.int64)
    source = np.full(rows, -1, np.int64)
    source[input_reported | output_reported] = claimed[input_reported | output_reported]
    filled_input, filled_output = answered & ~input_reported, answered & ~output_reported
    source = np.maximum(source, np.where(filled_input, np.where(exact, _RECOUNT, _ESTIMATE), -1))
    source = np.maximum(source, np.where(filled_output, np.where(recounted, _RECOUNT, _ESTIMATE), -1))
    written = np.where(written_known, written, 0)
    return _Usage(
        input_, input_known, cached, cached_known, written, written_known, output, output_known, source
    )  # fmt: skip


def _worst_usage(requests: pa.RecordBatch) -> _Usage:
    """Our own count of the input, none of it cached, and n full answers."""
    rows = requests.num_rows
    input_ = _tokens(requests.column("input_tokens"))[0]
    output = _tokens(requests.column("max_tokens"))[0] * _tokens(requests.column("n"))[0]
    known, unknown, none = np.ones(rows, np.bool_), np.zeros(rows, np.bool_), np.zeros(rows, np.int64)
    source = np.full(rows, _ESTIMATE, np.int64)
    return _Usage(input_, known, none, unknown, none, unknown, output, known, source)


def _token_quantities(price: PriceSchedule, usage: _Usage, answered: Bools) -> dict[Meter, pa.Array]:
    """What is charged by token and by request, on the meters that the schedule has; NULL where unknown.

    What a cache hit and what was written to one is uncached input where the schedule has no price of its own for it.
    """
    prices = price.unit_prices
    cached_apart, written_apart = "cached_input" in prices, "cache_write" in prices
    known = usage.input_known | usage.output_known
    quantities: dict[Meter, pa.Array] = {}
    if "uncached_input" in prices:
        uncached = usage.input - usage.cached if cached_apart else usage.input
        uncached = uncached - usage.written if written_apart else uncached
        quantities["uncached_input"] = quantity_from_units(uncached, usage.input_known)
    if cached_apart:
        quantities["cached_input"] = quantity_from_units(usage.cached, usage.cached_known)
    if written_apart:
        quantities["cache_write"] = quantity_from_units(usage.written, usage.written_known)
    if "output" in prices:
        quantities["output"] = quantity_from_units(usage.output, usage.output_known)
    if "request" in prices:
        quantities["request"] = quantity_from_units(np.ones(len(known), np.int64), known | answered)
    return quantities


def _worst_quantities(price: PriceSchedule, usage: _Usage) -> dict[Meter, pa.Array]:
    """The quantities of the worst case: all input on the dearest of the input meters."""
    quantities = _token_quantities(price, usage, usage.input_known)
    dearest = max(
        (meter for meter in _INPUT_METERS if meter in price.unit_prices),
        key=price.unit_prices.__getitem__,
        default=None,
    )
    if dearest is not None:
        for meter in _INPUT_METERS:
            quantities.pop(meter, None)
        quantities[dearest] = quantity_from_units(usage.input)
    return quantities


def _costs(quantities: Mapping[Meter, pa.Array], terms: Terms) -> list[pa.Array]:
    """USD per row and meter, each rounded by itself as its charge will be, so that charges sum to the row's cost."""
    prices = terms.price.unit_prices
    return [to_usd(cost(quantity, prices[meter]), terms.fx_rate) for meter, quantity in quantities.items()]


def _places(told: pa.Array, terms: Terms) -> pa.Array | str | None:
    """Where each row was processed: where its answer says, else where the pool declares."""
    if told.null_count == len(told) or terms.jurisdiction is None:
        return told if told.null_count < len(told) else terms.jurisdiction
    return pc.fill_null(told, terms.jurisdiction)


def _identity(requests: pa.RecordBatch) -> dict[str, Any]:
    names = ("tag", "key", "request_id", "lot_id", "round", "attempt_id", "attempt_no", "kind")
    return {name: requests.column(name) for name in names}


def _segment(
    columns: Mapping[str, Any], quantities: Mapping[Meter, pa.Array], terms: Terms, rows: int
) -> pa.RecordBatch:
    """A SEGMENT batch of ``columns`` (arrays, or one value for all rows), NULL where nothing is given."""
    given: dict[str, Any] = {
        "pool": terms.pool, "model": terms.model, "jurisdiction": terms.jurisdiction, "operator": terms.operator,
        "price_id": terms.price.price_id, "cost": add_costs(_costs(quantities, terms), rows),
    }  # fmt: skip
    given |= {METER_COLUMNS[meter]: quantity for meter, quantity in quantities.items()}
    given |= columns
    return pa.RecordBatch.from_arrays(
        [_column(given.get(field.name), field.type, rows) for field in SEGMENT], schema=SEGMENT
    )


def _column(value: Any, type_: pa.DataType, rows: int) -> pa.Array:
    if not isinstance(value, pa.Array):
        return constant(value, type_, rows)
    if value.type == type_:
        return value
    if value.null_count == rows:
        return pa.nulls(rows, type_)
    if pa.types.is_dictionary(type_) and not pa.types.is_dictionary(value.type):
        return value.dictionary_encode().cast(type_)
    return value.cast(type_)


def _tokens(column: pa.Array) -> tuple[Int64s, Bools]:
    """(tokens, known): 0 and False where the column is NULL, negative or beyond belief."""
    known = _flags(pc.is_valid(column))
    tokens: Int64s = column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    known &= (tokens >= 0) & (tokens <= _MOST_TOKENS)
    return np.where(known, tokens, 0), known


def _flags(column: pa.Array) -> Bools:
    """A bool column as numpy, NULL being False."""
    flags: Bools = column.fill_null(False).to_numpy(zero_copy_only=False)
    return flags.copy() if not flags.flags.writeable else flags
