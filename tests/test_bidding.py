"""Bids: what a pool asks for a lot, or why it may not serve it."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import NOW, lots_of, pool, random_market

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import BIDS
from bidbeam.transforms.bidding import DEFAULT_TOKENS_PER_SECOND, WORST_SLOWDOWN, make_bids

CHEAP = {"input": "1", "output": "2"}


def _reason(lot: dict[str, Any], state: Any, **terms: Any) -> str | None:
    return make_bids(lots_of(lot), [state], now=NOW, **terms).reject[0][0].as_py()


def test_a_token_pool_bids_by_its_cache_and_its_answers() -> None:
    """Cached tokens are the measured share of the ideal, output the measured share of the most; money follows."""
    lot = {"input_tokens": 1_000_000, "ideal_cached_tokens": 800_000, "max_output_tokens": 100_000}
    state = pool(
        "p", input="1", cached="0.1", output="2", request="5", state={"cache_share": 0.5, "output_share": 0.25}
    )
    row = make_bids(lots_of(lot), [state], now=NOW).to_table(run_id="r", round_number=2).to_pylist()[0]
    assert row["expected_cached_tokens"] == 400_000
    assert row["expected_output_tokens"] == 25_000
    assert row["expected_cost"] == Decimal("0.6") + Decimal("0.04") + Decimal("0.05") + Decimal("0.00005")
    assert row["worst_case_cost"] == Decimal(1) + Decimal("0.2") + Decimal("0.00005")
    assert row["score"] == row["expected_cost"]
    assert (row["risk_cost"], row["lateness_cost"]) == (0, 0)
    assert (row["eligible"], row["reject_reason"], row["finish_at"]) == (True, None, None)
    assert (row["run_id"], row["round"], row["price_id"]) == ("r", 2, "price-p")


def test_a_pool_paid_by_time_bids_by_its_speed() -> None:
    """Seconds are uncached input plus output over the pool's speed; the worst case is so many times slower and cold."""
    lot = {"input_tokens": 9_000, "ideal_cached_tokens": 4_000, "max_output_tokens": 1_000}
    bids = make_bids(lots_of(lot), [pool("own", hour="3.60", tokens_per_second=1000)], now=NOW)
    row = bids.to_table(run_id="r", round_number=1).to_pylist()[0]
    assert row["expected_cost"] == Decimal("0.006")
    assert row["worst_case_cost"] == Decimal("0.010") * WORST_SLOWDOWN
    assert row["finish_at"] == NOW + timedelta(seconds=6)
    assert bids.worst_case_seconds(0)[0] == 10 * WORST_SLOWDOWN


def test_a_pool_of_unknown_speed_is_priced_at_a_careful_one() -> None:
    """A bill by time needs a speed: where none is known the default stands in, and the finish time stays unknown."""
    lot = {"input_tokens": int(DEFAULT_TOKENS_PER_SECOND[False]) * 9, "max_output_tokens": 200}
    row = (
        make_bids(lots_of(lot), [pool("own", hour="3.60")], now=NOW).to_table(run_id="r", round_number=1).to_pylist()[0]
    )
    assert row["expected_cost"] == Decimal("0.010")
    assert row["finish_at"] is None


def test_warm_bids_count_what_the_lot_before_left_in_the_cache() -> None:
    """Warm tokens are in the bid of the pool that also won the lot before, and in no other."""
    table = lots_of({}, {"ideal_cached_tokens": 600, "warm_tokens": 100})
    state = {"cache_share": 1.0}
    pools = [pool(name, input="1", cached="0", output="2", state=state) for name in ("a", "b")]
    bids = make_bids(table, pools, now=NOW)
    rows = bids.to_table(run_id="r", round_number=1, warm=bids.warm_where(np.array([0, 0]))).to_pylist()
    assert [row["expected_cached_tokens"] for row in rows] == [0, 600, 0, 500]
    assert bids.saving[1] == pytest.approx([1e-4, 1e-4])
    assert not bids.saving[0].any()


@pytest.mark.parametrize(
    ("lot", "state", "terms", "reason"),
    [
        ({}, {}, {}, None),
        ({"model": "other"}, {}, {}, "model"),
        ({"placement": '{"zdr":true}'}, {}, {}, "placement:zdr (undeclared)"),
        ({"placement": '{"zdr":true}'}, {"placement": {"zdr": False}}, {}, "placement:zdr"),
        ({"longest_tokens": 513}, {"context": 512}, {}, "too_long"),
        ({"longest_tokens": 512}, {"context": 512}, {}, None),
        ({}, {"currency": "TAO"}, {}, "price"),
        ({}, {"currency": "TAO"}, {"rates": {"TAO": Decimal(400)}}, None),
        ({}, {"tokens_per_second": 100}, {"deadline": NOW + timedelta(seconds=11)}, "deadline"),
        ({}, {"tokens_per_second": 100}, {"deadline": NOW + timedelta(seconds=12)}, None),
        ({}, {}, {"deadline": NOW - timedelta(seconds=1)}, "deadline"),
        ({}, {"state": {"tokens_per_second": 0.0}}, {}, "capacity"),
        (
            {},
            {"tokens_per_second": 100, "state": {"available_from": NOW + timedelta(seconds=1)}},
            {"deadline": NOW + timedelta(seconds=12)},
            "deadline",
        ),
    ],
)
def test_why_a_pool_may_not_serve(
    lot: dict[str, Any], state: dict[str, Any], terms: dict[str, Any], reason: str | None
) -> None:
    """Each wall has its reason, and a pool that stands before none of them is eligible."""
    assert _reason(lot, pool("p", **CHEAP, **state), **terms) == reason


def test_a_rejected_bid_has_a_row_without_money() -> None:
    """Bids that may not be are listed with the reason, and NULL for everything they would have offered."""
    row = make_bids(lots_of({"model": "x"}), [pool("p", **CHEAP)], now=NOW).to_table(run_id="r", round_number=1)
    assert row.schema == BIDS
    unknown = {name for name, value in row.to_pylist()[0].items() if value is None}
    assert unknown == {
        "expected_cached_tokens", "expected_output_tokens", "expected_cost", "worst_case_cost", "risk_cost",
        "lateness_cost", "finish_at", "score", "audit_cost", "exploration_credit",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contexts", "zdr", "reason"),
    [
        ([100, 110], (None, None), "too_long"),
        ([100, None], (None, False), "too_long"),
        ([None], (False,), "no_eligible_pool"),
    ],
)
def test_why_nobody_may_serve(contexts: list[int | None], zdr: tuple[bool | None, ...], reason: str) -> None:
    """A lot is too long where every pool that may otherwise serve it is too short, else it has no eligible pool."""
    pools = [
        pool(f"p{at}", **CHEAP, context=context, placement={"zdr": True if declared is None else declared})
        for at, (context, declared) in enumerate(zip(contexts, zdr, strict=True))
    ]
    assert make_bids(lots_of({"placement": '{"zdr":true}'}), pools, now=NOW).unserved_reason(0) == reason


def test_currency_is_converted_exactly() -> None:
    """A price in another currency is worth its rate, in the bill and in what is reserved."""
    bids = make_bids(
        lots_of({"input_tokens": 1_000_000, "max_output_tokens": 0}),
        [pool("p", input="0.0025", output="1", currency="TAO")],
        now=NOW,
        rates={"TAO": Decimal("431.123456789012345678")},
    )
    exact = Decimal("1.077808641972530864")  # 0.0025 x 431.123456789012345678, half-even
    assert bids.expected_cost(0)[0].as_py() == exact
    assert bids.worst_case_cost(0)[0].as_py() >= exact


def test_failures_are_priced() -> None:
    """A pool that failed before bids its bill and the expected cost of paying it again."""
    state = pool("p", **CHEAP, state={"successes": 8, "failures": 1})
    row = make_bids(lots_of({}), [state], now=NOW).to_table(run_id="r", round_number=1).to_pylist()[0]
    assert row["risk_cost"] == row["expected_cost"] / 10
    assert row["score"] == row["expected_cost"] + row["risk_cost"]


def test_two_pools_of_one_name_are_refused() -> None:
    """Names identify pools in every table, so they differ."""
    with pytest.raises(ConfigError, match="same name"):
        make_bids(lots_of({}), [pool("p", **CHEAP), pool("p", **CHEAP)], now=NOW)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 6), st.integers(0, 1000), st.booleans())
def test_worst_case_covers_the_expected_bill(lots: int, pools: int, seed: int, estimated: bool) -> None:
    """On every bid the worst case is at least the expected bill, warm or cold, and the float score is the exact one."""
    table, states = random_market(lots, pools, seed, timed=0.5)
    column = table.schema.get_field_index("tokens_estimated")
    table = table.set_column(column, "tokens_estimated", pa.array([estimated] * lots, pa.bool_()))
    bids = make_bids(table, states, now=NOW)
    rows = bids.to_table(run_id="r", round_number=1).to_pylist()
    assert len(rows) == lots * pools
    for at, row in enumerate(rows):
        if row["eligible"]:
            assert row["worst_case_cost"] >= row["expected_cost"]
            assert bids.score[at % lots, at // lots] == pytest.approx(float(row["score"]), rel=1e-9)
        else:
            assert bids.score[at % lots, at // lots] == np.inf
