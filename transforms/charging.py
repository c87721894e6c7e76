"""Charging: settled segments become the ledger's rows, attempts and charges.

A charge is attempt x meter: a quantity, its unit price, the exact product in the pool's currency and, half-even at 18
places, in USD. An attempt's cost is the sum of its charges as they are rounded, so the ledger adds up to the last
digit at every level. The order of charges is that of the segment, price schedule by price schedule, meter by meter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.money import Bools, add_costs, cost, quantity_from_units, sum_decimal, to_usd
from bidbeam.connectors.pools import METERS, Meter
from bidbeam.connectors.schemas import ATTEMPTS, CHARGES, COST, METER_COLUMNS
from bidbeam.transforms.settling import Terms, constant

_NEEDED = (
    "attempt_id", "request_id", "model", "finished_at", "status", "kind", "usage_source", "price_id", "input_tokens",
    "cached_tokens", "output_tokens", *METER_COLUMNS.values(),
)  # fmt: skip
_NOT_SERVING = pa.array(["audit", "hedge", "overhead", "probe"])

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Baseline:
    """A list price, USD per token and request, that savings are counted against. Without ``cached_input`` all input
    costs alike.
    """

    name: str
    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    request: Decimal | None = None
    model: str | None = None
    """The one model that this is a price of; None: of every model."""
    also: tuple[Baseline, ...] = ()
    """The same list's prices of other models."""
    source: str = "job file"
    valid_from: datetime | None = None

    def of(self, model: str) -> Baseline | None:
        """What holds for a model; None where the list has no price of it."""
        return next((each for each in (self, *self.also) if each.model in (None, model)), None)


def explode(
    segment: pa.RecordBatch | pa.Table,
    *,
    schedules: Mapping[str, Terms],
    run_id: str,
    run_date: date,
    tags: str | None = None,
    baseline: Baseline | None = None,
) -> tuple[pa.Table, pa.Table]:
    """(attempts, charges) of ``schemas.SEGMENT`` rows: one charge for each meter whose quantity is not NULL.

    ``schedules`` holds the terms of each price_id in the segment. ``baseline_cost`` stands on the first charge of an
    attempt that served its request (``ok``, and no audit, probe or overhead) and is NULL elsewhere, and where its
    tokens are unknown or only estimated. An attempt on which nothing is metered has no charge. Raises StoreError for a
    price_id without terms, or terms without a price for a metered quantity.
    """
    table = pa.table(segment) if isinstance(segment, pa.RecordBatch) else segment
    charges: list[pa.RecordBatch] = []
    for batch in table.select(_NEEDED).combine_chunks().to_batches():
        for price_id, rows in _by_price(batch):
            if price_id not in schedules:
                raise StoreError(f"the journal charges by price {price_id!r}, for which this run has no terms")
            charges += _charges(rows, schedules[price_id], run_id, run_date, tags, baseline)
    return _attempts(table, run_id), pa.Table.from_batches(charges, schema=CHARGES)


def charge_ids(attempt_ids: pa.Array, meter: Meter) -> pa.Array:
    """The charges' UUIDs (version 8), determined by attempt (binary(16)[n], no NULL) and meter.

    Mixes the two halves with splitmix64, one-to-one for each meter but for the six bits that mark a UUID.
    """
    halves = np.frombuffer(attempt_ids.buffers()[1], ">u8").astype(np.uint64).reshape(-1, 2)
    halves = halves[attempt_ids.offset : attempt_ids.offset + len(attempt_ids)]
    salt = np.uint64((METERS.index(meter) + 1) * _GOLDEN % 2**64)
    high = _splitmix64(halves[:, 0] ^ _splitmix64(halves[:, 1] + salt))
    low = _splitmix64(halves[:, 1] ^ high)
    high = (high & np.uint64(0xFFFFFFFFFFFF0FFF)) | np.uint64(0x8000)
    low = (low & np.uint64(0x3FFFFFFFFFFFFFFF)) | np.uint64(0x8000000000000000)
    mixed = pa.py_buffer(np.column_stack([high, low]).astype(">u8"))
    storage = pa.Array.from_buffers(pa.binary(16), len(attempt_ids), [None, mixed])
    return pa.ExtensionArray.from_storage(pa.uuid(), storage)


def _attempts(table: pa.Table, run_id: str) -> pa.Table:
    names = [name for name in ATTEMPTS.names if name != "run_id"]
    runs = constant(run_id, ATTEMPTS.field("run_id").type, table.num_rows)
    columns = [pa.chunked_array([runs]), *(table.column(name) for name in names)]
    return pa.Table.from_arrays(columns, schema=ATTEMPTS)


def _by_price(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of each price schedule, in the order in which the schedules first appear."""
    codes = batch.column("price_id")
    names = pc.unique(codes).to_pylist()
    if len(names) == 1:
        yield names[0], batch
        return
    for name in names:
        yield name, batch.filter(pc.equal(codes, name) if name is not None else pc.is_null(codes))


def _charges(
    rows: pa.RecordBatch, terms: Terms, run_id: str, run_date: date, tags: str | None, baseline: Baseline | None
) -> Iterator[pa.RecordBatch]:
    constants = {
        "run_id": run_id, "run_date": run_date, "pool": terms.pool, "currency": terms.price.currency,
        "fx_rate": terms.fx_rate, "fx_source": terms.fx_source, "fx_at": terms.fx_at,
        "price_id": terms.price.price_id, "tags": tags, "baseline": None if baseline is None else baseline.name,
    }  # fmt: skip
    filled = {name: constant(value, CHARGES.field(name).type, rows.num_rows) for name, value in constants.items()}
    saved_against = None if baseline is None else _baseline_costs(rows, baseline)
    unplaced = np.ones(rows.num_rows, np.bool_)
    for meter in METERS:
        quantity = rows.column(METER_COLUMNS[meter])
        if quantity.null_count == rows.num_rows:
            continue
        if meter not in terms.price.unit_prices:
            raise StoreError(f"the journal meters {meter} on pool {terms.pool!r}, whose schedule has no price for it")
        unit_price = terms.price.unit_prices[meter]
        charged: Bools = pc.is_valid(quantity).to_numpy(zero_copy_only=False)
        kept = None if quantity.null_count == 0 else pa.array(np.flatnonzero(charged))
        metered = rows if kept is None else rows.take(kept)
        count = metered.num_rows
        quantity = metered.column(METER_COLUMNS[meter])
        attempt_ids = metered.column("attempt_id")
        native = cost(quantity, unit_price)
        columns = {name: array.slice(0, count) for name, array in filled.items()}
        columns |= {
            "charge_id": charge_ids(attempt_ids.storage, meter),
            "request_id": metered.column("request_id"),
            "attempt_id": attempt_ids,
            "meter": constant(meter, CHARGES.field("meter").type, count),
            "quantity": quantity,
            "unit_price": constant(unit_price, CHARGES.field("unit_price").type, count),
            "cost_native": native,
            "cost": to_usd(native, terms.fx_rate),
            "baseline_cost": _once(saved_against, kept, unplaced[charged], CHARGES.field("baseline_cost").type, count),
            "charged_at": metered.column("finished_at"),
        }
        unplaced &= ~charged
        yield pa.RecordBatch.from_arrays([columns[name] for name in CHARGES.names], schema=CHARGES)


def _once(amounts: pa.Array | None, kept: pa.Array | None, unplaced: Bools, type_: pa.DataType, count: int) -> pa.Array:
    """``amounts`` of the kept rows where they stand on no earlier meter, else NULL."""
    if amounts is None or not unplaced.any():
        return pa.nulls(count, type_)
    taken = amounts if kept is None else amounts.take(kept)
    return taken if unplaced.all() else pc.if_else(pa.array(unplaced), taken, pa.scalar(None, type_))


def baseline_total(answers: pa.Table, baseline: Baseline) -> tuple[Decimal, int]:
    """What the baseline would have charged for these answers (SEGMENT rows, as often as each was used), in USD, and of
    how many of them that is not known."""
    total, unknown = Decimal(0), 0
    for batch in answers.combine_chunks().to_batches():
        costs = _baseline_costs(batch, baseline)
        total, unknown = total + sum_decimal(costs), unknown + costs.null_count
    return total, unknown


def _baseline_costs(rows: pa.RecordBatch, baseline: Baseline) -> pa.Array:
    """What the baseline would have charged each row (COST); NULL where it did not serve, its tokens are unknown, or the
    baseline has no price of its model.
    """
    if baseline.model is None:
        costs = _amounts(rows, baseline)
    else:
        models = rows.column("model").cast(pa.string())
        costs = pa.nulls(rows.num_rows, COST)
        for each in (baseline, *baseline.also):
            costs = pc.if_else(pc.equal(models, each.model).fill_null(False), _amounts(rows, each), costs)
    return pc.if_else(_with_known_usage(rows), costs, pa.scalar(None, COST))


def _amounts(rows: pa.RecordBatch, baseline: Baseline) -> pa.Array:
    """Every row's tokens at the baseline's prices (COST), unknown ones counted as none."""
    input_, cached, output = (
        rows.column(name).fill_null(0).to_numpy(zero_copy_only=False)
        for name in ("input_tokens", "cached_tokens", "output_tokens")
    )
    if baseline.cached_input is None:
        cached = np.zeros_like(cached)
    amounts = [
        cost(quantity_from_units(input_ - cached), baseline.input),
        cost(quantity_from_units(cached), baseline.cached_input or Decimal(0)),
        cost(quantity_from_units(output), baseline.output),
    ]
    if baseline.request is not None:
        amounts.append(cost(quantity_from_units(np.ones(rows.num_rows, np.int64)), baseline.request))
    return add_costs(amounts, rows.num_rows)


def serving(rows: pa.Table | pa.RecordBatch) -> pa.Array:
    """Which attempts (bool[n]) of SEGMENT rows served their request: answered ones that nothing else was meant by."""
    status, kind = (rows.column(name).cast(pa.string()) for name in ("status", "kind"))
    return pc.and_not(pc.equal(status, "ok"), pc.is_in(kind, _NOT_SERVING))


def served_rows(rows: pa.Table) -> int:
    """How many of the attempts in SEGMENT rows served their request."""
    return int(pc.sum(serving(rows)).as_py() or 0)


def _with_known_usage(rows: pa.RecordBatch) -> pa.Array:
    estimated = pc.equal(rows.column("usage_source"), "estimate").fill_null(True)
    counted = pc.and_(pc.is_valid(rows.column("input_tokens")), pc.is_valid(rows.column("output_tokens")))
    known = pc.and_(serving(rows), pc.and_not(counted, estimated))
    return known.fill_null(False)


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = values + np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
