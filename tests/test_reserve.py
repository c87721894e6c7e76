"""The reserve: what a lot is worth in a round, which rises as its slack shrinks, and moves it to pools that answer."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import NOW, lots_of, pool, random_market

from bidbeam.connectors.schemas import COST
from bidbeam.transforms.bidding import PoolState, make_bids
from bidbeam.transforms.clearing import Clearing, clear
from bidbeam.transforms.reputation import Reputation
from bidbeam.transforms.scoring import LATENESS_WORTH, urgency

SLOW = {"tokens_per_second": 100, "input": "1", "output": "1"}


def known(state: PoolState, **fields: Any) -> PoolState:
    return replace(state, of_model={"m": Reputation(**fields)})


def reserves(cleared: Clearing) -> list[Decimal | None]:
    assert cleared.reserve.type == COST
    found: list[Decimal | None] = cleared.reserve.to_pylist()
    return found


@settings(max_examples=60, deadline=None)
@given(
    lots=st.integers(1, 10),
    pools=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    timed=st.sampled_from([0.0, 0.5, 1.0]),
    whole_s=st.integers(50, 4_000),
    passed=st.lists(st.floats(0, 1.1), min_size=2, max_size=3),
    sooner_s=st.integers(0, 2_000),
)
def test_the_reserve_rises_as_the_slack_shrinks(
    lots: int, pools: int, seed: int, timed: float, whole_s: int, passed: list[float], sooner_s: int
) -> None:
    """As the clock runs towards the deadline, or the deadline comes nearer, no lot's urgency falls and no reserve does;
    it is 1 to LATENESS_WORTH times the lowest score, and the lowest score without a deadline."""
    table, states = random_market(lots, pools, seed, timed=timed)
    states = [known(state, successes=20.0, failures=float(at)) for at, state in enumerate(states)]

    def cleared(now: datetime, deadline: datetime | None) -> Clearing:
        return clear(make_bids(table, states, now=now, deadline=deadline, started_at=NOW))

    deadline = NOW + timedelta(seconds=whole_s)
    by_clock = [cleared(NOW + timedelta(seconds=whole_s * share), deadline) for share in sorted(passed)]
    by_deadline = [cleared(NOW, deadline + timedelta(seconds=more)) for more in (sooner_s, 0)]
    for course in (by_clock, by_deadline):
        for before, after in itertools.pairwise(course):
            assert (before.bids.urgency <= after.bids.urgency).all()
            for low, high in zip(reserves(before), reserves(after), strict=True):
                assert low is None or high is None or low <= high
    for each in (*by_clock, *by_deadline, cleared(NOW, None)):
        assert ((each.bids.urgency >= 0) & (each.bids.urgency <= 1)).all()
        for lot, reserve in enumerate(reserves(each)):
            assert (reserve is None) == (not each.bids.eligible[lot].any())
            if reserve is not None:
                lowest = each.bids.score[lot].min()
                multiple = 1 + (LATENESS_WORTH - 1) * each.bids.urgency[lot]
                assert float(reserve) == pytest.approx(lowest * multiple, rel=1e-5)
    assert (cleared(NOW, None).bids.urgency == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    lots=st.integers(1, 25),
    pools=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    seconds=st.integers(10, 2_000),
    gone=st.floats(0, 0.99),
    budget=st.decimals("0", "5", places=6),
)
def test_no_lot_waits_for_its_reserve(
    lots: int, pools: int, seed: int, seconds: int, gone: float, budget: Decimal
) -> None:
    """A lot is left only where no pool that may serve it has the seconds or the budget the money, however far above
    the reserve it asks; no reserve is more than there is to spend."""
    table, states = random_market(lots, pools, seed)
    bids = make_bids(
        table, states, now=NOW, deadline=NOW + timedelta(seconds=seconds),
        started_at=NOW - timedelta(seconds=seconds * gone / (1 - gone)),
    )  # fmt: skip
    cleared = clear(bids, budget=budget)
    left = budget - sum((cost for cost in cleared.reserved if cost is not None), Decimal(0))
    won = np.flatnonzero(cleared.pool_of >= 0)
    load = np.bincount(cleared.pool_of[won], bids.seconds[won, cleared.pool_of[won]], minlength=pools)
    for lot in np.flatnonzero(cleared.pool_of < 0):
        for at in np.flatnonzero(bids.eligible[lot]):
            fits = load[at] + bids.seconds[lot, at] <= seconds * (1 - 1e-9)
            assert not (fits and bids.worst_case_cost(int(at))[int(lot)].as_py() <= left)
    assert all(reserve is None or reserve <= budget for reserve in reserves(cleared))


def test_as_slack_shrinks_lots_go_to_pools_that_answer() -> None:
    """A cheap pool that fails now and then serves while there is time to buy again, and no more when there is none; a
    failure is then worth a dead letter."""
    flaky = known(pool("flaky", input="1", output="1"), successes=1e9, failures=1e9 / 19, spread=0.0)
    sure = known(pool("sure", input="1.2", output="1.2"), successes=1e9, spread=0.0)
    hour = timedelta(hours=1)
    rows = []
    for passed in (0.0, 0.2, 0.9):
        bids = make_bids(lots_of({}), [flaky, sure], now=NOW + hour * passed, deadline=NOW + hour, started_at=NOW)
        rows.append((set(clear(bids).lots_of), bids.to_table(run_id="r", round_number=1).to_pylist()[0]))
    assert [won for won, _ in rows] == [{"flaky"}, {"flaky"}, {"sure"}]
    shares = [row["risk_cost"] / row["expected_cost"] for _, row in rows]
    assert shares == [pytest.approx(Decimal(due), rel=Decimal("1e-4")) for due in ("0.05", "0.14", "0.455")]


def test_urgency_is_the_share_of_the_time_left_that_the_work_takes() -> None:
    """Work is dealt to pools by their speed; one of unknown speed takes it at once, one that starts late counts with
    its wait, and what is gone counts where it is more."""
    seconds = np.array([[10.0, 30.0], [10.0, 30.0], [np.nan, 30.0]])
    may = np.array([[True, True], [True, True], [False, True]])
    # Two lots of 7.5 seconds for both at once; the third keeps the second pool for 30 more.
    both = urgency(seconds, np.zeros(2), may, left_s=60.0, gone=0.0)
    assert both == pytest.approx([15 / 60, 15 / 60, 45 / 60])
    assert urgency(seconds, np.zeros(2), may, left_s=60.0, gone=0.5) == pytest.approx([0.5, 0.5, 0.75])
    assert urgency(seconds, np.array([9.0, 0.0]), may, left_s=60.0, gone=0.0) == pytest.approx([0.4, 0.4, 0.75])
    assert urgency(seconds, np.zeros(2), may, left_s=10.0, gone=0.0).tolist() == [1, 1, 1]
    unknown = np.where(np.arange(2) == 1, np.nan, seconds)
    assert urgency(unknown, np.zeros(2), may, left_s=60.0, gone=0.0).tolist() == [0, 0, 0]
    assert urgency(seconds, np.zeros(2), may, left_s=None, gone=1.0).tolist() == [0, 0, 0]
    assert urgency(seconds, np.zeros(2), np.zeros_like(may), left_s=0.0, gone=0.0).tolist() == [0, 0, 0]


def test_no_pool_moves_anothers_score_by_what_it_asks() -> None:
    """Another pool at any price leaves a bid as it is, the deadline near or far."""
    mine = known(pool("mine", **SLOW), successes=5.0, failures=3.0)
    for seconds in (30, 3_000):
        rows = [
            make_bids(
                lots_of({}, {}), [mine, pool("other", tokens_per_second=50, input=text, output=text)],
                now=NOW, deadline=NOW + timedelta(seconds=seconds),
            ).to_table(run_id="r", round_number=1).to_pylist()[:2]
            for text in ("0.1", "9")
        ]  # fmt: skip
        assert rows[0] == rows[1]


def test_the_reserve_is_published_with_the_rule() -> None:
    """The rule of every auction says how the reserve comes about."""
    rule = json.loads(make_bids(lots_of({}), [pool("p", **SLOW)], now=NOW).rule)
    assert "urgency" in rule["reserve"]
