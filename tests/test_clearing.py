"""Clearing: awards within every wall, near the least cost, and a reason for each lot that nobody gets."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import NOW, lots_of, pool, random_market

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import AUCTIONS, AWARDS, BIDS, DEAD_REASONS
from bidbeam.transforms.allocation import allocate, lower_bound
from bidbeam.transforms.bidding import make_bids
from bidbeam.transforms.capacity_prices import ascend
from bidbeam.transforms.clearing import _market as _market_of
from bidbeam.transforms.clearing import clear
from bidbeam.transforms.market import UNSERVED, Market, best_chain, greedy, unserved_cost
from bidbeam.transforms.next_best import next_best
from bidbeam.transforms.pair_exchange import exchange_pairs
from bidbeam.transforms.scoring import rule_text

CHEAP = {"input": "1", "output": "1"}
DEAR = {"input": "2", "output": "2"}


def test_the_lowest_bill_wins_although_its_list_price_is_not_the_lowest() -> None:
    """Cached prefixes decide: the pool that lists dearer input wins the lot, and the runner-up is the next bill."""
    rows = 10_000
    lots = lots_of(
        {
            "requests": rows,
            "input_tokens": rows * 2300,
            "ideal_cached_tokens": rows * 2000,
            "max_output_tokens": rows * 400,
        }
    )
    state = {"cache_share": 0.95}
    pools = [
        pool("azure", input="0.58", output="1.68", state=state),
        pool("chutes", input="1.00", output="1.00", cached="0.10", state=state),
        pool("vertex", input="0.56", output="1.68", cached="0.056", state=state),
    ]
    award = clear(make_bids(lots, pools, now=NOW)).awards_table(run_id="r", round_number=1).to_pylist()[0]
    assert (award["pool"], award["runner_up"]) == ("chutes", "vertex")
    assert award["price_paid"] == award["score"] == Decimal("9.90")
    assert award["reserved"] == Decimal(27)
    assert (award["payment_rule"], award["fx_rate"]) == ("pay_as_bid", 1)


def test_a_lot_names_who_may_take_it_over_best_first() -> None:
    """Of the pools besides winner and fallback three, by their score; none that may not serve the lot."""
    names = ("a", "b", "c", "d", "e", "f")
    pools = [pool(name, input=str(1 + at), output="1") for at, name in enumerate(names)]
    pools.append(pool("narrow", context=10, **CHEAP))
    bids = make_bids(lots_of({}), pools, now=NOW)
    assert next_best(clear(bids)).to_pylist() == [["c", "d", "e"]]
    alone = make_bids(lots_of({}), pools[:2], now=NOW)
    assert next_best(clear(alone)).to_pylist() == [[]]


def test_the_cheap_pool_fills_first_and_the_rest_overflows() -> None:
    """Before a deadline the cheapest pool gets as many lots as it has seconds for, and the next one the others."""
    lots = lots_of(*({} for _ in range(5)))  # 1,200 tokens each
    pools = [pool("dear", tokens_per_second=1000, **DEAR), pool("cheap", tokens_per_second=100, **CHEAP)]
    bids = make_bids(lots, pools, now=NOW, deadline=NOW + timedelta(seconds=25))
    cleared = clear(bids)
    assert {name: len(lots) for name, lots in cleared.lots_of.items()} == {"dear": 3, "cheap": 2}
    assert cleared.finish_at == {"cheap": NOW + timedelta(seconds=24), "dear": NOW + timedelta(seconds=3.6)}
    assert (cleared.unserved, cleared.objective) == ({}, 2 * Decimal("0.0012") + 3 * Decimal("0.0024"))


def test_without_a_deadline_pools_of_known_speed_share_the_work() -> None:
    """The default horizon saturates the cheap pool and hands the rest on; without it the cheap one gets everything."""
    lots = lots_of(*({} for _ in range(40)))
    pools = [pool("dear", tokens_per_second=1000, **DEAR), pool("cheap", tokens_per_second=1000, **CHEAP)]
    bids = make_bids(lots, pools, now=NOW)
    assert {name: len(lots) for name, lots in clear(bids).lots_of.items()} == {"cheap": 25, "dear": 15}
    assert set(clear(bids, slack=None).lots_of) == {"cheap"}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([0.5, 1.0]))
def test_without_a_deadline_no_lot_is_left_for_want_of_time(lots: int, pools: int, seed: int, timed: float) -> None:
    """The default horizon only spreads the work: what does not fit goes to the pool that is done with it first."""
    table, states = random_market(lots, pools, seed, timed=timed)
    bids = make_bids(table, states, now=NOW)
    served = bids.eligible.any(axis=1)
    cleared = clear(bids)
    assert (cleared.pool_of >= 0).tolist() == served.tolist()
    assert set(cleared.unserved.values()) <= {"no_eligible_pool", "too_long"}
    # One lot does not fit the horizon that two equal pools would share; of these the faster takes it.
    pair = [pool("slow", tokens_per_second=100, **CHEAP), pool("fast", tokens_per_second=110, **DEAR)]
    assert set(clear(make_bids(lots_of({}), pair, now=NOW)).lots_of) == {"fast"}


def test_a_pool_of_unknown_speed_has_no_bound() -> None:
    """The cheapest pool gets every lot where its speed is not known, deadline or not."""
    lots = lots_of(*({} for _ in range(40)))
    pools = [pool("dear", tokens_per_second=1000, **DEAR), pool("cheap", **CHEAP)]
    for deadline in (None, NOW + timedelta(seconds=10)):
        assert set(clear(make_bids(lots, pools, now=NOW, deadline=deadline)).lots_of) == {"cheap"}


def test_neighbours_stay_together_in_order() -> None:
    """Of two equal pools each gets one run of neighbours, whose prefixes then are warm, in prefix order."""
    rows = ({"ideal_cached_tokens": 300, "warm_tokens": 100 if at else 0} for at in range(20))
    prices = {"input": "1", "cached": "0.1", "output": "1", "state": {"cache_share": 1.0, "tokens_per_second": 100.0}}
    pools = [pool("a", **prices), pool("b", **prices)]
    cleared = clear(make_bids(lots_of(*rows), pools, now=NOW))
    assert np.count_nonzero(np.diff(cleared.pool_of)) == 1
    assert all(list(lots) == sorted(lots) for lots in cleared.lots_of.values())
    bids = cleared.bids_table(run_id="r", round_number=1).to_pylist()
    assert [row["expected_cached_tokens"] for row in bids].count(300) == 2 + 19


def test_the_budget_covers_the_cheapest_answers_first() -> None:
    """Worst cases fill the budget from the lowest cost per answer on; what it does not cover is awarded on what the
    others leave, dearest last, and nothing is where no request could be paid for."""
    lots = lots_of({"requests": 5}, {"requests": 50}, {"requests": 20}, {"requests": 10})
    bids = make_bids(lots, [pool("p", **CHEAP)], now=NOW)
    cleared = clear(bids, budget=Decimal("0.0036"))
    assert (cleared.unserved, cleared.short) == ({}, {"l0"})
    assert cleared.reserved == (0, *(Decimal("0.0012"),) * 3)
    assert cleared.committed == Decimal("0.0036")
    less = clear(bids, budget=Decimal("0.0018"))
    assert less.reserved == (0, Decimal("0.0012"), Decimal("0.0006"), 0)
    assert less.rank[1] == 0 < less.rank[2] < less.rank[3] < less.rank[0]
    enough = clear(bids, budget=Decimal("0.0048"))
    assert (enough.unserved, enough.short, enough.rank.any()) == ({}, frozenset(), False)
    # A request of the first lot may cost 0.00024, one of the second a tenth of that.
    assert clear(bids, budget=Decimal("0.0002")).unserved == {"l0": "budget"}
    assert set(clear(bids, budget=Decimal(0)).unserved.values()) == {"budget"}


def test_a_pool_paid_by_time_gets_no_more_than_it_is_expected_to_do_in_what_is_reserved() -> None:
    """It would be cancelled with everything in flight. Beyond the worst case that the budget covers, lots are awarded
    on what they are expected to take."""
    lots = lots_of({}, {})
    bids = make_bids(lots, [pool("own", hour="3.6", tokens_per_second=100)], now=NOW)
    expected, worst = bids.expected_cost(0)[0].as_py(), bids.worst_case_cost(0)[0].as_py()
    assert worst == 4 * expected
    for budget, reserved, rank in ((worst, (worst, 0), (0, 1)), (2 * expected, (2 * expected, 0), (1, 1))):
        some = clear(bids, budget=budget)
        assert (some.reserved, tuple(np.minimum(some.rank, 1)), some.unserved) == (reserved, rank, {})
    less = clear(bids, budget=expected * Decimal("1.9"))
    assert (less.reserved, less.unserved) == ((expected * Decimal("1.9"), None), {"l1": "budget"})
    assert set(clear(bids, budget=expected * Decimal("0.9")).unserved.values()) == {"budget"}


def test_a_lot_that_the_budget_refuses_on_one_pool_may_go_to_another() -> None:
    """What counts against the budget is the worst case: a dearer bid with a lower worst case still serves."""
    lots = lots_of({"input_tokens": 1000, "ideal_cached_tokens": 900, "max_output_tokens": 0})
    pools = [
        pool("caching", input="10", cached="0.01", output="1", state={"cache_share": 1.0}),
        pool("plain", input="2", output="1"),
    ]
    bids = make_bids(lots, pools, now=NOW)
    assert set(clear(bids).lots_of) == {"caching"}
    assert set(clear(bids, budget=Decimal("0.005")).lots_of) == {"plain"}


def test_runners_up_take_over_covered_by_the_budget_or_after_the_lots_that_are() -> None:
    """The runner-up is always named and may take over; where the budget does not cover its worst case as well, what it
    takes over waits for what others leave. A pool paid by time is no fallback under a budget."""
    pools = [pool("cheap", **CHEAP), pool("dear", **DEAR)]
    bids = make_bids(lots_of({}, {}), pools, now=NOW)
    assert clear(bids).fallback.tolist() == [1, 1]
    tight = clear(bids, budget=Decimal("0.0048"))
    assert (tight.runner_up.tolist(), tight.fallback.tolist()) == ([1, 1], [1, 1])
    assert tight.fallback_reserved == (Decimal("0.0024"), 0)
    assert (tight.rank.any(), tight.fallback_rank[0]) == (False, 0) < (False, tight.fallback_rank[1])
    assert tight.committed == Decimal("0.0048")
    less = clear(bids, budget=Decimal("0.0020"))
    assert (less.fallback.tolist(), less.committed) == ([1, 1], Decimal("0.0020"))
    # What is dearer per answer comes later.
    assert 0 < less.rank.max() < less.fallback_rank.min()
    by_time = clear(make_bids(lots_of({}), [pools[1], pool("own", hour="3.6")], now=NOW), budget=Decimal(9))
    assert (by_time.runner_up.tolist(), by_time.fallback.tolist()) == ([1], [UNSERVED])


def test_why_a_lot_is_unserved() -> None:
    """Every lot that nobody gets has the reason of a dead letter."""
    lots = lots_of({}, {"model": "x"}, {"longest_tokens": 999}, {"input_tokens": 10**6}, {}, {})
    state = pool("p", tokens_per_second=1000, context=512, **CHEAP)
    cleared = clear(make_bids(lots, [state], now=NOW, deadline=NOW + timedelta(seconds=3)))
    certain = {"l1": "no_eligible_pool", "l2": "too_long", "l3": "deadline"}
    assert certain.items() <= cleared.unserved.items()
    # Of the other three, two fit into the three seconds.
    assert [why for lot, why in cleared.unserved.items() if lot not in certain] == ["deadline"]
    assert set(cleared.unserved.values()) <= set(DEAD_REASONS)


def test_regret_is_unknown_where_the_bound_is_nothing() -> None:
    """A market that costs nothing has no regret to speak of, and one without awards no bound either."""
    free = clear(make_bids(lots_of({}), [pool("p", input="0", output="0")], now=NOW))
    assert (free.objective, free.lp_bound, free.regret) == (0, 0, None)
    nobody = clear(make_bids(lots_of({}), [], now=NOW))
    assert (nobody.objective, nobody.lp_bound, nobody.regret) == (0, None, None)
    assert nobody.unserved == {"l0": "no_eligible_pool"}


def test_an_unknown_payment_rule_is_refused() -> None:
    """A payment rule that is not there is an error that names those that are."""
    with pytest.raises(ConfigError, match="pay_as_bid"):
        clear(make_bids(lots_of({}), [], now=NOW), payment="lottery")


def test_tables_have_the_ledgers_schemas() -> None:
    """Bids, awards and auctions come in the ledger's schemas, also when there are no lots."""
    for lots in (lots_of(), lots_of({}, {"model": "x"})):
        cleared = clear(make_bids(lots, [pool("p", **CHEAP), pool("own", hour="1")], now=NOW))
        assert cleared.bids_table(run_id="r", round_number=1).schema == BIDS
        assert cleared.awards_table(run_id="r", round_number=1).schema == AWARDS
        auction = cleared.auction_table(run_id="r", round_number=3)
        assert auction.schema == AUCTIONS
        assert auction.to_pylist()[0] | {"objective": 0, "lp_bound": 0, "regret": 0} == {
            "run_id": "r", "round": 3, "lots": lots.num_rows, "pools": 2, "objective": 0, "lp_bound": 0, "regret": 0,
            "awarded": min(lots.num_rows, 1), "cleared_at": NOW, "rule": rule_text(),
            "budget": None,
        }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    lots=st.integers(0, 30),
    pools=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    timed=st.sampled_from([0.0, 0.5, 1.0]),
    seconds=st.none() | st.integers(0, 2000),
    budget=st.none() | st.decimals("0", "5", places=6),
)
def test_no_wall_is_ever_passed(
    lots: int, pools: int, seed: int, timed: float, seconds: int | None, budget: Decimal | None
) -> None:
    """Every lot is awarded or unserved, once; awards only to eligible pools, within seconds and budget, all of it
    reserved where that is less than the worst cases, at a cost no lower than the bound; and the same market clears the
    same way again."""
    table, states = random_market(lots, pools, seed, timed=timed)
    deadline = None if seconds is None else NOW + timedelta(seconds=seconds)
    bids = make_bids(table, states, now=NOW, deadline=deadline)
    cleared = clear(bids, budget=budget)

    ids = table.column("lot_id").to_pylist()
    awarded = [ids[lot] for rows in cleared.lots_of.values() for lot in rows]
    assert sorted(awarded + list(cleared.unserved)) == sorted(ids)
    won = np.flatnonzero(cleared.pool_of >= 0)
    assert bids.eligible[won, cleared.pool_of[won]].all()
    assert set(cleared.unserved.values()) <= set(DEAD_REASONS)
    assert all(bids.eligible[lot, at] for lot, at in enumerate(cleared.runner_up) if at >= 0)

    if seconds is not None:
        load = np.bincount(
            cleared.pool_of[won], np.nan_to_num(bids.seconds[won, cleared.pool_of[won]]), minlength=pools
        )
        assert (load <= seconds * (1 + 1e-9)).all()
    else:
        assert "deadline" not in cleared.unserved.values()
    if budget is not None:
        assert sum((cost for cost in cleared.reserved if cost is not None), Decimal(0)) <= cleared.committed
        assert cleared.committed <= budget
    else:
        assert "budget" not in cleared.unserved.values()

    awards = cleared.awards_table(run_id="r", round_number=1).to_pylist()
    by_bid = {(row["lot_id"], row["pool"]): row for row in cleared.bids_table(run_id="r", round_number=1).to_pylist()}
    for award in awards:
        bid = by_bid[award["lot_id"], award["pool"]]
        assert (award["score"], award["price_paid"]) == (bid["score"], bid["expected_cost"])
        assert award["price_paid"] <= bid["worst_case_cost"]
        assert award["reserved"] == bid["worst_case_cost"] or award["lot_id"] in cleared.short
        assert 0 <= award["reserved"] <= bid["worst_case_cost"]
    if budget is None:
        assert cleared.short == cleared.unserved.keys()
    elif cleared.rank.any():
        # Whatever is left over would not cover another lot, nor is any of it reserved for a fallback.
        reserved = sum((cost for cost in cleared.reserved if cost is not None), Decimal(0))
        by_time = [states[at].spec.price.by_time for at in cleared.pool_of if at >= 0]
        assert reserved == budget or any(by_time)
    assert cleared.objective == sum((award["score"] for award in awards), Decimal(0))
    assert cleared.lp_bound is None or 0 <= cleared.lp_bound <= cleared.objective
    assert clear(bids, budget=budget).awards_table(run_id="r", round_number=1).to_pylist() == awards


def _market(lots: int, pools: int, seed: int, tightness: float) -> Market:
    """A random market in which each pool has the same seconds, few enough to bind."""
    r = np.random.default_rng(seed)
    cost = r.uniform(1, 5, (lots, pools))
    cost[r.random(cost.shape) < 0.3] = np.inf
    size = r.uniform(1, 10, lots)
    seconds = size[:, None] * r.uniform(0.5, 2, pools)
    saving = np.where(np.isfinite(cost), r.uniform(0, 0.2, cost.shape), 0.0)
    saving[:1] = 0
    room = np.full(pools, tightness * seconds.min(axis=1).sum() / pools)
    requests = r.integers(1, 100, lots)
    return Market(cost, saving, seconds, room, unserved_cost(cost, requests), np.ones((lots, 1)), size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 1.5, 4.0]))
def test_never_worse_than_greedy(lots: int, pools: int, seed: int, tightness: float) -> None:
    """The allocation serves as much as plain greedy does and costs no more; no lot waits where a pool has room; and
    the bound is below every assignment of the same lots."""
    market = _market(lots, pools, seed, tightness)
    pool_of, plain = allocate(market).pool_of, greedy(market)
    assert market.regarded(pool_of) <= market.regarded(plain) * (1 + 1e-12)
    load = market.load(pool_of)
    assert (load <= market.room * (1 + 1e-9)).all()
    waiting = np.flatnonzero(pool_of < 0)
    fits = np.isfinite(market.cost[waiting]) & (market.seconds[waiting] <= market.room - load)
    assert not fits.any()
    served = np.flatnonzero(pool_of >= 0)
    if len(served):
        assert lower_bound(market.only(served), pool_of[served]) <= market.value(pool_of) * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 10_000), st.sampled_from([0.7, 1.0, 2.0]))
def test_the_bound_holds_against_every_assignment(lots: int, pools: int, seed: int, tightness: float) -> None:
    """By enumeration: no feasible assignment of all lots costs less than the bound; the chain of minima is exact."""
    market = _market(lots, pools, seed, tightness)
    feasible, free = [], []
    for code in range(pools**lots):
        pool_of = np.array([code // pools**lot % pools for lot in range(lots)])
        if np.isfinite(market.cost[np.arange(lots), pool_of]).all():
            free.append(market.value(pool_of))
            if (market.load(pool_of) <= market.room).all():
                feasible.append((market.value(pool_of), pool_of))
    if free:
        assert best_chain(market.cost, market.saving)[1] == pytest.approx(min(free))
    if feasible:
        least, dearest = (pick(feasible, key=lambda found: found[0]) for pick in (min, max))
        # Whatever was awarded, the bound is of what might have been.
        assert max(lower_bound(market, pool_of) for _, pool_of in (least, dearest)) <= least[0] + 1e-9


@pytest.mark.parametrize(("lots", "pools", "seed"), [(300, 12, 0), (300, 12, 1), (300, 12, 2), (1000, 50, 1)])
def test_regret_is_small_where_capacity_binds(lots: int, pools: int, seed: int) -> None:
    """On random markets with binding seconds the award is within 0.5 % of the bound, far below plain greedy."""
    table, states = random_market(lots, pools, seed)
    bids = make_bids(table, states, now=NOW)
    cleared = clear(bids)
    assert cleared.regret is not None
    assert cleared.regret <= Decimal("0.005")
    assert cleared.unserved == {}
    market, _ = _market_of(bids, 1.25)
    assert market.regarded(greedy(market)) > 1.2 * float(cleared.objective)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(2, 6), st.integers(0, 10_000), st.sampled_from([0.7, 1.0, 1.5]))
def test_dividing_two_pools_anew_never_costs_more(lots: int, pools: int, seed: int, tightness: float) -> None:
    """The exchange of whole pools serves the same lots within the same room, and costs no more."""
    market = _market(lots, pools, seed, tightness)
    before = greedy(market)
    after = exchange_pairs(market, before, np.ones(pools))
    assert market.value(after) <= market.value(before) * (1 + 1e-12)
    assert ((after >= 0) == (before >= 0)).all()
    assert (market.load(after) <= market.room * (1 + 1e-9)).all()
    assert np.isfinite(market.cost[after >= 0, after[after >= 0]]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.0, 0.7, 1.5]))
def test_capacity_prices_are_prices(lots: int, pools: int, seed: int, tightness: float) -> None:
    """Prices are finite and not negative, nothing where room is without bound; shares are shares of eligible pools."""
    market = _market(lots, pools, seed, tightness)
    market = market.within(np.where(np.arange(pools) % 3 == 2, np.inf, market.room))
    prices, shares = ascend(market, np.zeros(pools))
    assert np.isfinite(prices).all()
    assert (prices >= 0).all()
    assert (prices[np.isinf(market.room)] == 0).all()
    assert (shares >= 0).all()
    assert (shares.sum(axis=1) <= 1 + 1e-9).all()
    assert (shares[np.isinf(market.cost)] == 0).all()
