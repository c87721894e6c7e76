"""Payment rules: nobody is paid less than they ask, and where a rule promises it, the truth is the best bid."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import NOW, lots_of, pool, random_market
from small_jobs import make_job, prompts, remote, written

from bidbeam.pipelines.quote import quote_job
from bidbeam.pipelines.run import run
from bidbeam.pipelines.show import quote_text
from bidbeam.transforms.bidding import PoolState, make_bids
from bidbeam.transforms.clearing import Clearing, clear
from bidbeam.transforms.market import UNSERVED, Floats, Ints, Market
from bidbeam.transforms.payments import PAYMENT_RULES, Awarded, uniform, vcg

RULES = sorted(PAYMENT_RULES)


def paid(cleared: Clearing) -> list[tuple[str, Decimal, Decimal]]:
    """(pool, price paid, rent) of each award."""
    rows = cleared.awards_table(run_id="r", round_number=1).to_pylist()
    return [(row["pool"], row["price_paid"], row["rent"]) for row in rows]


def inside(states: list[PoolState]) -> list[PoolState]:
    """The same pools, every other one settled inside the house."""
    return [
        replace(state, spec=replace(state.spec, settlement=("internal", "external")[at % 2]))
        for at, state in enumerate(states)
    ]


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    lots=st.integers(1, 25),
    pools=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    seconds=st.none() | st.integers(100, 2000),
    budget=st.none() | st.decimals("0", "5", places=6),
)
def test_nobody_is_paid_less_than_they_ask(
    rule: str, lots: int, pools: int, seed: int, seconds: int | None, budget: Decimal | None
) -> None:
    """Individual rationality: the price paid is the expected bill and a rent of 0 or more, which only internal pools
    get; awards, reservations and what is committed are the same whatever the rule."""
    table, states = random_market(lots, pools, seed)
    deadline = None if seconds is None else NOW + timedelta(seconds=seconds)
    bids = make_bids(table, inside(states), now=NOW, deadline=deadline)
    plain, cleared = clear(bids, budget=budget), clear(bids, budget=budget, payment=rule)
    assert cleared.pool_of.tolist() == plain.pool_of.tolist()
    assert (cleared.reserved, cleared.committed) == (plain.reserved, plain.committed)
    by_name = {state.spec.name: state.spec.settlement for state in bids.pools}
    rows = cleared.awards_table(run_id="r", round_number=1).to_pylist()
    for row, (_, bill, _) in zip(rows, paid(plain), strict=True):
        assert row["rent"] >= 0
        assert row["price_paid"] == bill + row["rent"]
        if by_name[row["pool"]] == "external":
            assert (row["rent"], row["payment_rule"]) == (0, "pay_as_bid")
        else:
            assert row["payment_rule"] == rule


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    tenths=st.integers(1, 40),
    liar=st.integers(0, 4),
)
def test_with_second_score_the_truth_is_the_best_bid_for_a_single_lot(costs: list[int], tenths: int, liar: int) -> None:
    """Whatever a pool asks for the one lot there is, it never earns more than by asking what the lot costs it."""
    liar %= len(costs)

    def earned(asked: Decimal) -> Decimal:
        prices = [str(asked if at == liar else Decimal(cost)) for at, cost in enumerate(costs)]
        pools = [pool(f"p{at}", input=text, output=text, settlement="internal") for at, text in enumerate(prices)]
        cleared = clear(make_bids(lots_of({}), pools, now=NOW), payment="second_score")
        ((winner, price, _),) = paid(cleared)
        return price - Decimal(costs[liar]) * 1200 / 1_000_000 if winner == f"p{liar}" else Decimal(0)

    honest = earned(Decimal(costs[liar]))
    assert honest >= 0
    assert earned(Decimal(costs[liar]) * tenths / 10) <= honest


def test_second_score_pays_what_the_runner_up_would_have_cost() -> None:
    """To the last digit, and the bid itself where nobody else may serve the lot."""
    cheap, dear = pool("cheap", input="1", output="1", settlement="internal"), pool("dear", input="2", output="2")
    ((_, price, rent),) = paid(clear(make_bids(lots_of({}), [cheap, dear], now=NOW), payment="second_score"))
    assert (price, rent) == (Decimal("0.0024"), Decimal("0.0012"))
    ((_, price, rent),) = paid(clear(make_bids(lots_of({}), [cheap], now=NOW), payment="second_score"))
    assert (price, rent) == (Decimal("0.0012"), Decimal(0))


def test_uniform_pays_the_bid_where_room_is_plenty_and_one_price_a_second_where_it_is_scarce() -> None:
    """Without scarcity no rent; with it all seconds of a pool are paid alike, at most what the next pool asks."""
    lots = lots_of(*({"input_tokens": 1000 + 10 * at} for at in range(40)))
    pools = [
        pool("cheap", tokens_per_second=100, input="1", output="1", settlement="internal"),
        pool("dear", input="2", output="2", settlement="internal"),
    ]
    for seconds, scarce in ((1_000_000, False), (250, True)):
        bids = make_bids(lots, pools, now=NOW, deadline=NOW + timedelta(seconds=seconds))
        cleared = clear(bids, payment="uniform")
        won = cleared.lots_of["cheap"]
        rents = np.array([float(cleared.rent[lot] or 0) for lot in won])
        per_second = rents / bids.seconds[list(won), 0]
        assert (per_second.max() > 0) == scarce
        assert per_second == pytest.approx(per_second[0])
        for lot in won:
            dear = bids.score[lot, 1]
            assert float(cleared.price_paid[lot] or 0) <= dear * 1.01
        assert all(cleared.rent[lot] == 0 for lot in cleared.lots_of.get("dear", ()))


def solved_exactly(market: Market) -> Ints:
    """The best of all assignments, by enumeration."""
    lots, pools = market.cost.shape
    best, least = np.full(lots, UNSERVED), np.inf
    for choice in itertools.product(range(-1, pools), repeat=lots):
        pool_of = np.array(choice)
        if np.isfinite(market.value(pool_of)) and (market.load(pool_of) <= market.room).all():
            value = market.regarded(pool_of)
            if value < least:
                best, least = pool_of, value
    return best


def instance(cost: Floats, room: Floats) -> Market:
    lots = len(cost)
    return Market(
        cost=cost, saving=np.zeros(cost.shape), seconds=np.ones(cost.shape), room=room,
        unserved_cost=np.full(lots, 1000.0), profile=np.ones((lots, 1)), size=np.ones(lots),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), lots=st.integers(1, 3), pools=st.integers(2, 3), factor=st.floats(0.3, 3))
def test_with_vcg_the_truth_is_the_best_bid_where_markets_are_solved_exactly(
    seed: int, lots: int, pools: int, factor: float
) -> None:
    """A pool that bids anything but its costs, for all lots together or lot by lot, earns no more; and never loses.

    There is room for all lots without it, so that nobody is indispensable.
    """
    r = np.random.default_rng(seed)
    cost = r.uniform(1, 5, (lots, pools))
    room = r.integers(1, lots + 1, pools).astype(np.float64)
    room[-1] = room[-2] = lots
    internal = np.ones(pools, dtype=np.bool_)

    def earned(asked: Floats) -> float:
        market = instance(np.column_stack([asked, cost[:, 1:]]), room)
        pool_of = solved_exactly(market)
        chosen = market.cost[np.arange(lots), pool_of]
        scores = [Decimal(float(value)) for value in chosen]
        premiums = vcg(Awarded(market, pool_of, scores, [None] * lots, solve=solved_exactly), internal)
        mine = pool_of == 0
        return float(sum((premiums[lot] for lot in np.flatnonzero(mine)), Decimal(0))) + float(
            (chosen[mine] - cost[mine, 0]).sum()
        )

    honest = earned(cost[:, 0])
    assert honest >= -1e-9
    assert earned(cost[:, 0] * factor) <= honest + 1e-9
    assert earned(cost[:, 0] * r.uniform(0.3, 3, lots)) <= honest + 1e-9


def test_a_rule_that_finds_no_rent_pays_none() -> None:
    """Where all pools cost alike and have room, none is worth more than its bid, whatever the rule."""
    market = instance(np.full((4, 3), 2.0), np.full(3, 9.0))
    pool_of = np.zeros(4, dtype=np.int64)
    awarded = Awarded(market, pool_of, [Decimal(2)] * 4, [Decimal(2)] * 4)
    for rule in PAYMENT_RULES.values():
        assert rule(awarded, np.ones(3, dtype=np.bool_)) == [0] * 4
    assert uniform(awarded, np.zeros(3, dtype=np.bool_)) == [0] * 4


def test_the_jobs_rule_reaches_the_ledger_and_stays_out_of_the_bill(tmp_path: Path) -> None:
    """A run under second_score: the internal winner's rent stands with its awards; charges stay metered cost."""
    pools = [
        remote("near", settlement="internal"),
        remote("far", price={"input": "0.30", "output": "0.90"}),
    ]
    job = make_job(tmp_path, prompts(12), pools, auction={"payment": "second_score", "rounds": 2})
    quote = quote_job(job)
    assert quote.rent is not None
    assert quote.rent > 0
    assert "second_score: " in quote_text(quote)
    run(job, rehearse=True)
    found = written(job, rehearse=True)
    awards = found.rows("awards")
    assert {(row["pool"], row["payment_rule"]) for row in awards} == {("near", "second_score")}
    assert sum(row["rent"] for row in awards) == quote.rent
    assert sum(row["price_paid"] - row["rent"] for row in awards) == quote.expected_cost
    assert sum(row["cost"] for row in found.rows("charges")) <= quote.expected_cost


def test_a_rule_without_internal_pools_says_that_it_binds_nobody(tmp_path: Path) -> None:
    """The quote names the rule and why every pool is paid as it bids all the same."""
    job = make_job(tmp_path, prompts(3), [remote("near")], auction={"payment": "vcg"})
    quote = quote_job(job)
    assert quote.rent is None
    assert "vcg: no pool has settlement: internal" in quote_text(quote)
