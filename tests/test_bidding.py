"""Bids: what a pool asks for a lot, or why it may not serve it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
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
from bidbeam.connectors.pools import Demand
from bidbeam.connectors.schemas import BIDS
from bidbeam.transforms.bidding import DEFAULT_TOKENS_PER_SECOND, WORST_SLOWDOWN, PoolState, make_bids
from bidbeam.transforms.clearing import clear
from bidbeam.transforms.reputation import HALF_LIFE_DAYS, Reputation
from bidbeam.transforms.scoring import demand_ppm

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
        "demand_cost", "setup_cost",
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


def _known(**fields: Any) -> dict[str, Any]:
    """The state of a pool with a reputation for model ``m``; what is not said is beyond doubt."""
    sure: dict[str, Any] = {"successes": 1e12, "spread": 0.0}
    return {"of_model": {"m": Reputation(**(sure | fields))}}


def _row(state: PoolState, lot: dict[str, Any] | None = None, **terms: Any) -> dict[str, Any]:
    bids = make_bids(lots_of(lot or {}), [state], now=NOW, **terms)
    row: dict[str, Any] = bids.to_table(run_id="r", round_number=1).to_pylist()[0]
    return row


def test_bids_are_made_with_what_the_ledger_measured() -> None:
    """The pool's own count of the input, its cache and its answers, per model; another model's change nothing."""
    state = pool("p", input="1", cached="0.1", output="2", state=_known(
        cache_share=0.25, output_share=0.1, input_ratio=1.2
    ))  # fmt: skip
    lot = {"input_tokens": 1_000, "ideal_cached_tokens": 800, "max_output_tokens": 500}
    row = _row(state, lot)
    assert (row["expected_cached_tokens"], row["expected_output_tokens"]) == (200, 50)
    assert row["expected_cost"] == (1_000 + 20 + 100) * Decimal("1e-6")
    # More than our exact count was reported before: it may be again.
    assert row["worst_case_cost"] == (1_200 + 1_000) * Decimal("1e-6")
    both = replace(state, spec=replace(state.spec, models={"m": "m", "n": "n"}))
    assert _row(both, lot | {"model": "n"})["expected_output_tokens"] == 500


def test_a_failing_pool_bids_what_failures_cost() -> None:
    """P(fail) times the bill once more and what failed attempts are charged."""
    row = _row(pool("p", **CHEAP, state=_known(successes=149.0, failures=49.0, failed_cost=0.5)))
    share = Decimal(50) / Decimal(248) * Decimal("1.5")
    assert row["risk_cost"] == row["expected_cost"] * share.quantize(Decimal("1e-6"))


def test_lateness_is_priced_as_the_finish_nears_the_deadline() -> None:
    """With twice the time there is none to speak of; on the very deadline half of ten times the bill."""
    lot, state = {"input_tokens": 900, "max_output_tokens": 100}, _known(spread=0.2)
    slow = pool("p", tokens_per_second=100, **CHEAP, state=state)
    costs = [
        _row(slow, lot, deadline=NOW + timedelta(seconds=seconds))["lateness_cost"] for seconds in (10, 12, 15, 20, 40)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 5 * _row(slow, lot)["expected_cost"]
    assert costs[-1] == 0
    assert _row(slow, lot)["lateness_cost"] == 0
    # However fast in all, a lot is not done before its requests are.
    patient = pool("p", **CHEAP, state=_known(spread=0.2, latency_p95_s=10.0))
    assert _row(patient, lot, deadline=NOW + timedelta(seconds=10))["lateness_cost"] == costs[0]


def test_a_measured_speed_makes_a_bid_dear_but_keeps_no_pool_out() -> None:
    """What a pool was seen to do tells when it would be done; only a declared or proven limit is a wall."""
    state = _known(tokens_per_second=10.0, spread=0.2)
    row = _row(pool("p", **CHEAP, state=state), deadline=NOW + timedelta(seconds=60))
    assert row["eligible"]
    assert row["finish_at"] == NOW + timedelta(seconds=120)
    assert row["lateness_cost"] > 9 * row["expected_cost"]


def test_a_pool_of_doubtful_reports_bids_its_audit() -> None:
    """Four tokens in a hundred too many are worth a second opinion on twenty answers of a hundred, at most on all."""
    for excess, share in ((None, "0"), (0.0, "0"), (0.04, "0.2"), (3.0, "1")):
        row = _row(pool("p", **CHEAP, state=_known(excess=excess)))
        assert row == _row(pool("p", **CHEAP, state=_known(excess=None if excess is None else 0.0, misnamed=excess)))
        assert row["audit_cost"] == row["expected_cost"] * Decimal(share)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 150), st.integers(1, 4))
def test_newcomers_share_one_lot_in_twenty_at_a_discount(lots: int, newcomers: int) -> None:
    """Together they have a discount of a fifth on every twentieth lot that they may serve, never two on one lot."""
    table = lots_of(*({"longest_tokens": 5000 if at % 7 == 0 else 100} for at in range(lots)))
    new = _known(newcomer=True)
    pools = [pool("old", **CHEAP, state=_known())]
    pools += [pool(f"new{at}", **CHEAP, context=4096, state=new) for at in range(newcomers)]
    bids = make_bids(table, pools, now=NOW)
    rows = bids.to_table(run_id="r", round_number=1).to_pylist()
    given_ = [row for row in rows if row["exploration_credit"]]
    assert len({row["lot_id"] for row in given_}) == len(given_) <= lots // 20
    assert all(row["pool"] != "old" and row["eligible"] for row in given_)
    assert all(row["exploration_credit"] == row["expected_cost"] * Decimal("0.2") for row in given_)
    offered = {f"l{at}" for at in range(19, lots, 20) if at % 7}
    assert {row["lot_id"] for row in given_} == offered
    won = clear(bids).lots_of
    assert {f"l{at}" for name, mine in won.items() if name != "old" for at in mine} == offered
    # A pool that is much dearer than that is not bought from for the sake of knowing it.
    dear = [pools[0], pool("dear", input="2", output="4", state=new)]
    assert set(clear(make_bids(table, dear, now=NOW)).lots_of) <= {"old"}


@settings(max_examples=50, deadline=None)
@given(st.decimals("0.5", 1, places=2), st.decimals(1, 10, places=2), st.integers(1, 40), st.integers(1, 400))
def test_an_engine_bids_more_as_its_time_is_asked_for_and_charges_the_same(
    least: Decimal, most: Decimal, lots: int, deadline_s: int
) -> None:
    """Between the least and the most, never falling with demand; bill and reservation stay those of its price."""
    plain = pool("own", hour="3.60", tokens_per_second=1200)
    priced = replace(plain.spec.price, demand=Demand(least, most))
    eager = replace(plain, spec=replace(plain.spec, price=priced))
    deadline = NOW + timedelta(seconds=deadline_s)
    asked = []
    for count in (1, lots, lots + 1):
        table = lots_of(*({} for _ in range(count)))  # a second each
        row, same = (
            make_bids(table, [state], now=NOW, deadline=deadline).to_table(run_id="r", round_number=1).to_pylist()[0]
            for state in (eager, plain)
        )
        factor = 1 + row["demand_cost"] / row["expected_cost"]
        assert least <= factor <= most
        assert same["demand_cost"] == 0
        assert (row["expected_cost"], row["worst_case_cost"]) == (same["expected_cost"], same["worst_case_cost"])
        asked.append(factor)
    assert asked == sorted(asked)
    if lots >= deadline_s:
        assert asked[-1] == most
    assert _row(eager)["demand_cost"] == _row(eager)["expected_cost"] * (least - 1)


_ADDED = ("expected_cost", "risk_cost", "lateness_cost", "audit_cost", "demand_cost", "setup_cost")


def test_the_supply_curve_is_bounded_and_smooth() -> None:
    """It rises from least to most as the time left is asked for, and stays there; at both ends it has no kink."""
    demand = Demand(Decimal("0.8"), Decimal(2))
    asked = [demand_ppm(demand, used, 100.0) for used in (0, 1, 25, 50, 75, 99, 100, 1000)]
    assert asked == sorted(asked)
    assert (asked[0], asked[3], asked[-2], asked[-1]) == (-200_000, 400_000, 1_000_000, 1_000_000)
    assert max(asked[1] - asked[0], asked[-2] - asked[-3]) < 12_000 / 10
    assert (demand_ppm(demand, 5.0, None), demand_ppm(demand, 5.0, 0.0)) == (-200_000, 1_000_000)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0, 5), st.floats(0, 1), st.floats(0, 2), st.booleans(),
    st.integers(0, 10_000),
)  # fmt: skip
def test_the_score_is_the_exact_sum_of_its_terms(
    good: float, bad: float, charged: float, excess: float, spread: float, newcomer: bool, seed: int
) -> None:
    """Expected + risk + lateness + audit - exploration, to the last digit, on every bid, as the optimiser saw it."""
    table, states = random_market(25, 3, seed)
    known = Reputation(
        successes=good, failures=bad, failed_cost=charged, excess=excess, spread=spread, newcomer=newcomer
    )
    states = [replace(state, of_model={"m": known}) for state in states[:2]] + states[2:]
    own = states[0].spec
    priced = replace(own.price, demand=Demand(Decimal("0.8"), Decimal(2)))
    states[0] = replace(states[0], spec=replace(own, price=priced))
    bids = make_bids(table, states, now=NOW, deadline=NOW + timedelta(seconds=900))
    for at, row in enumerate(bids.to_table(run_id="r", round_number=1).to_pylist()):
        if row["eligible"]:
            terms = sum(row[name] for name in _ADDED)
            assert row["score"] == terms - row["exploration_credit"]
            assert bids.score[at % 25, at // 25] == pytest.approx(float(row["score"]), rel=1e-9)
            assert min(row["risk_cost"], row["lateness_cost"], row["audit_cost"], row["score"]) >= 0


def test_the_rule_is_published_with_a_digest_of_itself() -> None:
    """Every auction carries the parameters that its bids were scored by, and what to hold them against."""
    auction = clear(make_bids(lots_of({}), [pool("p", **CHEAP)], now=NOW)).auction_table(run_id="r", round_number=1)
    rule = json.loads(auction.column("rule")[0].as_py())
    digest = rule.pop("sha256")
    assert hashlib.sha256(json.dumps(rule, sort_keys=True).encode()).hexdigest() == digest
    assert rule["half_life_days"] == HALF_LIFE_DAYS


def test_the_award_goes_to_the_least_expected_bill_not_to_the_least_list_price() -> None:
    """10,000 rows of 2,000 shared and 300 own tokens in and 400 out, at 95 % hits: the dearest list serves cheapest.

    The prices are those that Azure, Vertex and Chutes published for one open model; what share of the prefix each
    of them found in its cache is what the ledger measured.
    """
    prices = {
        "azure": {"input": "0.58", "output": "1.68"},
        "vertex": {"input": "0.56", "output": "1.68", "cached": "0.056"},
        "chutes": {"input": "1.00", "output": "1.00", "cached": "0.10"},
    }
    rows, lots = 10_000, 40
    lot = {
        "requests": rows // lots,
        "input_tokens": rows // lots * 2_300,
        "ideal_cached_tokens": rows // lots * 2_000,
        "warm_tokens": 2_000,
        "max_output_tokens": rows // lots * 1_024,
    }
    table = lots_of({**lot, "warm_tokens": 0}, *([lot] * (lots - 1)))
    measured = {"cache_share": 0.95, "output_share": 400 / 1_024, "successes": 10_000.0, "answers": 10_000}
    bids = make_bids(table, [pool(name, **list_, state=_known(**measured)) for name, list_ in prices.items()], now=NOW)
    cleared = clear(bids)
    assert {name: len(won) for name, won in cleared.lots_of.items()} == {"chutes": lots}
    bills = {
        name: round(sum(bids.expected_cost(at, np.ones(lots, bool)).to_pylist()), 2) for at, name in enumerate(prices)
    }
    assert bills == {"azure": Decimal("20.06"), "vertex": Decimal("10.02"), "chutes": Decimal("9.90")}
    by_list = {name: 2_300 * Decimal(p["input"]) + 400 * Decimal(p["output"]) for name, p in prices.items()}
    assert max(by_list, key=by_list.__getitem__) == "chutes"
    assert min(by_list, key=by_list.__getitem__) == "vertex"


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
