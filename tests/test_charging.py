"""Charging: attempts and charges that add up to the last digit, with ids that a second reading gives again."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.money import hourly_to_second, sum_decimal
from bidbeam.connectors.pools import METERS, Meter, PriceSchedule
from bidbeam.connectors.schemas import ATTEMPTS, CHARGES, LABEL, METER_COLUMNS
from bidbeam.transforms.charging import Baseline, charge_ids, explode
from bidbeam.transforms.settling import Terms, book_lost, overhead_row, settle

AT = datetime(2026, 3, 1, 6, tzinfo=UTC)
RUN = {"run_id": "copy-2026-03-01-0a1b2c3d", "run_date": date(2026, 3, 1)}
EXACT = Context(prec=200, rounding=ROUND_HALF_EVEN)

SECOND = hourly_to_second(Decimal("0.71"))
POOLS = {
    "tokens": Terms(
        "tokens",
        "tiny",
        PriceSchedule(
            "p-tokens",
            "tokens",
            {"uncached_input": Decimal("1E-7"), "cached_input": Decimal("1E-8"), "output": Decimal("4E-7")},
        ),
    ),
    "foreign": Terms(
        "foreign",
        "tiny",
        PriceSchedule(
            "p-foreign",
            "foreign",
            {"uncached_input": Decimal("1.7E-13"), "output": Decimal("4.1E-13"), "request": Decimal("1E-15")},
            currency="TAO",
        ),
        Decimal("312.471207"),
        "a feed",
        AT,
    ),
    "engine": Terms(
        "engine",
        "tiny",
        PriceSchedule(
            "p-engine",
            "engine",
            {"accelerator_second": SECOND, "accelerator_idle_second": SECOND, "setup": SECOND},
        ),
    ),
}
SCHEDULES = {agreed.price.price_id: agreed for agreed in POOLS.values()}

tokens = st.one_of(st.none(), st.integers(0, 3000))
attempts = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["ok", "ok", "failed", "cancelled"]),
        "kind": st.sampled_from(["primary", "retry", "hedge", "audit", "probe"]),
        "input_tokens": tokens,
        "cached_tokens": tokens,
        "output_tokens": tokens,
    }
)
batches = st.lists(st.tuples(st.sampled_from(sorted(POOLS)), st.lists(attempts, min_size=1, max_size=6)), max_size=5)


def requests(rows: list[dict[str, Any]], first: int = 0) -> pa.RecordBatch:
    numbers = range(first, first + len(rows))
    return pa.record_batch(
        {
            "tag": pa.array(numbers, pa.int64()),
            "key": pa.array([bytes(16) for _ in numbers], pa.binary(16)),
            "attempt_id": pa.array([number.to_bytes(16, "big") for number in numbers], pa.binary(16)),
            "request_id": [f"r{number}" for number in numbers],
            "lot_id": pa.array(["lot-0" for _ in numbers]).cast(LABEL),
            "round": pa.array([1 for _ in numbers], pa.int16()),
            "attempt_no": pa.array([1 for _ in numbers], pa.int16()),
            "kind": pa.array([row.get("kind", "primary") for row in rows]).cast(LABEL),
            "input_tokens": pa.array([3000 for _ in numbers], pa.int32()),
            "tokens_exact": pa.array([True for _ in numbers], pa.bool_()),
            "max_tokens": pa.array([3000 for _ in numbers], pa.int32()),
            "n": pa.array([1 for _ in numbers], pa.int16()),
        }
    )


def segment(pool: str, rows: list[dict[str, Any]], first: int = 0) -> pa.RecordBatch:
    told = {"status": "ok", "started_at": AT, "finished_at": AT + timedelta(seconds=1)}
    results = pa.RecordBatch.from_pylist(
        [
            {**told, "tag": first + i, **{name: value for name, value in row.items() if name != "kind"}}
            for i, row in enumerate(rows)
        ],
        schema=RESULT_SCHEMA,
    )
    return settle(requests(rows, first), results, POOLS[pool], accelerator_ms=1234 if pool == "engine" else None)


def journal(parts: list[tuple[str, list[dict[str, Any]]]]) -> pa.Table:
    """Settled attempts of several pools, lost ones of each, and the engine's overhead."""
    made: list[pa.RecordBatch] = []
    first = 0
    for pool, rows in parts:
        made.append(segment(pool, rows, first))
        first += len(rows)
    for number, (_, agreed) in enumerate(sorted(POOLS.items())):
        lost = requests([{}], first + number)
        made.append(book_lost(lost, agreed, AT, accelerator_ms=99 if agreed.price.by_time else None))
    for number, meter in enumerate(("accelerator_idle_second", "setup")):
        name = (1 << 64 | number).to_bytes(16, "big")
        made.append(overhead_row(POOLS["engine"], meter=meter, millis=501, at=AT, attempt_id=name))
    return pa.Table.from_batches(made)


@given(batches)
def test_charges_sum_to_every_attempt_and_every_bill(parts: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Charges are exact one by one and sum to each attempt's cost and each pool's bill, to the last digit."""
    table = journal(parts)
    made, charges = explode(table, schedules=SCHEDULES, **RUN)
    made.validate(full=True)
    charges.validate(full=True)
    assert made.schema.equals(ATTEMPTS)
    assert charges.schema.equals(CHARGES)
    assert made.num_rows == table.num_rows
    by_attempt: dict[Any, Decimal] = defaultdict(Decimal)
    bills: dict[str, Decimal] = defaultdict(Decimal)
    with localcontext(EXACT):
        for charge in charges.to_pylist():
            agreed = SCHEDULES[charge["price_id"]]
            assert charge["unit_price"] == agreed.price.unit_prices[charge["meter"]]
            assert charge["cost_native"] == charge["quantity"] * charge["unit_price"]
            assert charge["cost"] == (charge["cost_native"] * charge["fx_rate"]).quantize(Decimal("1E-18"))
            assert (charge["pool"], charge["currency"]) == (agreed.pool, agreed.price.currency)
            assert (charge["fx_source"], charge["fx_at"]) == (agreed.fx_source, agreed.fx_at)
            by_attempt[charge["attempt_id"]] += charge["cost"]
            bills[charge["pool"]] += charge["cost"]
        for attempt in table.to_pylist():
            assert by_attempt[attempt["attempt_id"]] == attempt["cost"]
            bills[attempt["pool"]] -= attempt["cost"]
    assert not any(bills.values())
    assert sum_decimal(charges["cost"]) == sum_decimal(table["cost"])


@given(batches)
def test_there_is_one_charge_for_each_known_quantity(parts: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Each attempt has a charge on each meter whose quantity is known, and no other; no id comes twice."""
    table = journal(parts)
    _, charges = explode(table, schedules=SCHEDULES, **RUN)
    expected = {
        (row["attempt_id"], meter): row[column]
        for row in table.to_pylist()
        for meter, column in METER_COLUMNS.items()
        if row[column] is not None
    }
    rows = charges.to_pylist()
    assert {(row["attempt_id"], row["meter"]): row["quantity"] for row in rows} == expected
    assert len(rows) == len(expected) == len({row["charge_id"] for row in rows})


@given(batches)
def test_a_second_reading_gives_the_same_charges(parts: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """The same segments give the same rows in the same order; read by batches they give the same charges."""
    table = journal(parts)
    _, once = explode(table, schedules=SCHEDULES, **RUN)
    _, again = explode(table, schedules=SCHEDULES, **RUN)
    assert once.to_pylist() == again.to_pylist()
    apart = [explode(batch, schedules=SCHEDULES, **RUN)[1] for batch in table.to_batches(max_chunksize=3)]

    def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda row: str(row["charge_id"]))

    assert in_order(pa.concat_tables(apart).to_pylist()) == in_order(once.to_pylist())


def test_rows_carry_the_run_and_its_tags() -> None:
    """Attempts and charges name the run; charges carry its date, its tags and when the attempt finished."""
    table = segment("tokens", [{"input_tokens": 10, "output_tokens": 2}])
    made, charges = explode(table, schedules=SCHEDULES, **RUN, tags='{"team": "growth"}')
    assert made["run_id"].to_pylist() == [RUN["run_id"]]
    assert made["request_id"].to_pylist() == ["r0"]
    for charge in charges.to_pylist():
        assert (charge["run_id"], charge["run_date"]) == (RUN["run_id"], RUN["run_date"])
        assert (charge["tags"], charge["request_id"]) == ('{"team": "growth"}', "r0")
        assert charge["charged_at"] == AT + timedelta(seconds=1)


def test_nothing_makes_no_charges() -> None:
    """An empty segment, and one on which nothing is metered, give tables without charges."""
    made, charges = explode(segment("tokens", []), schedules=SCHEDULES, **RUN)
    assert (made.num_rows, charges.num_rows) == (0, 0)
    made, charges = explode(segment("tokens", [{"status": "failed"}]), schedules=SCHEDULES, **RUN)
    assert (made.num_rows, charges.num_rows) == (1, 0)


def test_unknown_prices_are_refused() -> None:
    """A segment charged by a price that the run does not know, or does not have, is an error and not a free ride."""
    table = segment("tokens", [{"input_tokens": 10, "output_tokens": 2}])
    with pytest.raises(StoreError, match="p-tokens"):
        explode(table, schedules={}, **RUN)
    with pytest.raises(StoreError, match="no price for it"):
        explode(table, schedules={"p-tokens": POOLS["engine"]}, **RUN)


BASELINE = Baseline("list", Decimal("2E-6"), Decimal("8E-6"), Decimal("5E-7"))
USED = {"input_tokens": 100, "cached_tokens": 60, "output_tokens": 10}


@pytest.mark.parametrize("pool", sorted(POOLS))
def test_the_baseline_stands_once_on_the_attempt_that_served(pool: str) -> None:
    """The baseline's cost of the actual tokens stands on the first charge of a serving attempt and nowhere else."""
    rows = [USED, {**USED, "status": "failed"}, {**USED, "kind": "audit"}, {**USED, "kind": "retry"}]
    _, charges = explode(segment(pool, rows), schedules=SCHEDULES, **RUN, baseline=BASELINE)
    found = [
        (row["request_id"], row["baseline_cost"]) for row in charges.to_pylist() if row["baseline_cost"] is not None
    ]
    expected = 40 * Decimal("2E-6") + 60 * Decimal("5E-7") + 10 * Decimal("8E-6")
    assert found == [("r0", expected), ("r3", expected)]


@pytest.mark.parametrize(
    ("row", "baseline", "expected"),
    [
        ({**USED, "cached_tokens": None}, BASELINE, Decimal("0.00028")),
        (USED, Baseline("flat", Decimal("2E-6"), Decimal("8E-6")), Decimal("0.00028")),
        ({"input_tokens": 100}, BASELINE, None),
        ({}, BASELINE, None),
        (USED, None, None),
    ],
)
def test_a_baseline_needs_known_tokens(
    row: dict[str, Any], baseline: Baseline | None, expected: Decimal | None
) -> None:
    """Unreported cached tokens count as input; estimated tokens save nothing, for nobody knows what they were."""
    _, charges = explode(segment("tokens", [row]), schedules=SCHEDULES, **RUN, baseline=baseline)
    assert [value for value in charges["baseline_cost"].to_pylist() if value is not None] == (
        [expected] if expected else []
    )


def test_charge_ids_are_unique_and_fixed() -> None:
    """A charge's id depends on attempt and meter alone, is a version 8 UUID, and never collides nearby."""
    halves = np.zeros((20_000, 2), ">u8")
    halves[:10_000, 0] = halves[10_000:, 1] = np.arange(1, 10_001)
    ids = pa.Array.from_buffers(pa.binary(16), len(halves), [None, pa.py_buffer(halves)])
    made = [charge_ids(ids, meter) for meter in METERS]
    seen = {value for array in made for value in array.storage.to_pylist()}
    assert len(seen) == len(METERS) * len(halves)
    assert {value.as_py().version for value in made[0][:50]} == {8}
    assert {value.as_py().variant for value in made[0][:50]} == {"specified in RFC 4122"}
    assert charge_ids(ids.slice(7, 3), "output").equals(charge_ids(ids, "output").slice(7, 3))
    assert str(charge_ids(ids.slice(0, 1), "output")[0].as_py()) == "88031bed-db36-8f6b-b665-94ac7165bb08"


def test_several_prices_keep_their_meters_apart() -> None:
    """Pools with different meters in one segment are each charged by their own schedule only."""
    table = pa.Table.from_batches(
        [segment("tokens", [USED]), segment("engine", [USED], 1), segment("foreign", [USED], 2)]
    )
    _, charges = explode(table, schedules=SCHEDULES, **RUN)
    found: dict[str, list[Meter]] = defaultdict(list)
    for row in charges.to_pylist():
        found[row["pool"]].append(row["meter"])
    assert found == {
        "tokens": ["uncached_input", "cached_input", "output"],
        "engine": ["accelerator_second"],
        "foreign": ["uncached_input", "output", "request"],
    }
