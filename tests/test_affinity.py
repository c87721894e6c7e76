"""Prefix affinity: who bids warm for a lot, in the round in which its neighbour is sold and in later ones."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from markets import NOW, pool
from small_plans import Planned, make_context, make_plan, write_input
from test_shift import AT, Scripted, Stage

from bidbeam.connectors.pools import Capacity
from bidbeam.transforms.affinity import follows, with_holders
from bidbeam.transforms.bid import decide
from bidbeam.transforms.bidding import make_bids
from bidbeam.transforms.lots import LOT, lot_places, part_of_lot


@pytest.fixture
def plan(tmp_path: Path) -> Planned:
    """Lots of a few prompts each with one long beginning; some prompts are asked twice."""
    texts = [f"shared beginning of them all {n // 2 if n % 6 == 0 else n:03d}" for n in range(24)]
    source = write_input(tmp_path, {"a.parquet": pa.table({"prompt": texts})}, 24)
    return make_plan(make_context(tmp_path, source, lot_tokens=60), source)


def test_lots_follow_one_another_in_the_plan_and_not_over_a_gap(plan: Planned) -> None:
    """In the first round each follows the one before; once lots are gone their neighbours stand alone."""
    lots = plan.lots
    assert lots.num_rows >= 4
    assert follows(lots).tolist() == [False] + [True] * (lots.num_rows - 1)
    left = pa.concat_tables([lots.slice(0, 2), lots.slice(3)])
    assert follows(left).tolist() == [False, True, False] + [True] * (left.num_rows - 3)
    assert follows(lots.slice(0, 0)).tolist() == []


def test_what_a_pool_was_awarded_it_holds_in_later_rounds(plan: Planned) -> None:
    """The next lot remembers who that was; without news it keeps what it remembers."""
    lots = plan.lots.slice(0, 4)
    once = with_holders(lots, np.array([0, 1, -1, 1]), ["a", "b"])
    assert once.column("held_by").to_pylist() == [None, "a", "b", None]
    again = with_holders(once.slice(1), np.array([-1, 0, -1]), ["c"])
    assert again.column("held_by").to_pylist() == ["a", "b", "c"]


def test_a_pool_that_holds_a_prefix_bids_warm_for_it(plan: Planned) -> None:
    """Its cold bid counts the tokens that are warm already, and winning the neighbour too makes it no warmer."""
    lots = with_holders(plan.lots.slice(0, 3), np.array([0, -1, -1]), ["a"])
    pools = [pool(name, input="1", cached="0", output="2", state={"cache_share": 1.0}) for name in ("a", "b")]
    bids = make_bids(lots, pools, now=NOW)
    warm = lots.column("warm_tokens").to_pylist()
    assert warm[1] > 0
    a, b = bids.score[:, 0], bids.score[:, 1]
    assert b[1] - a[1] == pytest.approx(warm[1] / 1e6)
    assert (bids.saving[1, 0], bids.saving[1, 1]) == (0.0, pytest.approx(warm[1] / 1e6))
    assert a[2] == b[2]
    rows = bids.to_table(run_id="r", round_number=2).to_pylist()
    assert rows[1]["expected_cached_tokens"] - rows[4]["expected_cached_tokens"] == warm[1]


def test_a_pool_wins_nothing_warm_over_a_gap(plan: Planned) -> None:
    """The row before is a neighbour only where the plan says so."""
    lots = pa.concat_tables([plan.lots.slice(0, 1), plan.lots.slice(2, 2)])
    state = {"cache_share": 1.0}
    bids = make_bids(lots, [pool("a", input="1", cached="0", output="2", state=state)], now=NOW)
    assert bids.saving[:, 0].tolist()[:2] == [0.0, 0.0]
    assert bids.saving[2, 0] > 0
    assert bids.warm_where(np.array([0, 0, 0]))[:, 0].tolist() == [False, False, True]


def test_a_part_of_a_lot_begins_warm_behind_what_comes_before_it(plan: Planned) -> None:
    """Its first request shares with the place before it in the plan, whoever answers that."""
    lot = plan.lots.to_pylist()[1]
    order, whole = plan.orders[lot["range"]], lot_places(lot["places"])
    part = part_of_lot(plan.context, lot, order, whole[2:])
    assert (part["before"], part["start"]) == (whole[1], whole[2])
    assert 0 < part["warm_tokens"] <= part["ideal_cached_tokens"]
    same = part_of_lot(plan.context, lot, order, whole)
    assert {name: same[name] for name in ("before", "warm_tokens", "ideal_cached_tokens")} == {
        name: lot[name] for name in ("before", "warm_tokens", "ideal_cached_tokens")
    }


def test_a_round_of_the_market_tells_the_next_who_had_the_lot_before(tmp_path: Path) -> None:
    """What has no time left behind an awarded lot goes on as held by its winner, and so does what was awarded: a shift
    may leave some of it over."""
    stage = Stage(tmp_path)
    lots = stage.plan.lots
    tokens = sum(lots.column("input_tokens").to_pylist() + lots.column("max_output_tokens").to_pylist())
    near = replace(stage.context.pools[0], capacity=Capacity(4, tokens_per_second=tokens / 60))
    context = replace(stage.context, pools=(near,), deadline_at=AT + timedelta(seconds=40))
    decision = decide(context, 1, lots, Decimal(0), AT)
    ((award,),) = (task.awards for task in decision.tasks)
    every = pa.concat_tables([award.lots.select(LOT.names), decision.waiting])
    ids = every.sort_by("start").column("lot_id").to_pylist()
    after = dict(zip(ids[1:], ids[:-1], strict=True))
    won = set(award.lots.column("lot_id").to_pylist())
    assert won
    for lot in every.to_pylist():
        assert lot["held_by"] == (award.pool if after.get(lot["lot_id"]) in won else None)
    assert award.pool in decision.waiting.column("held_by").to_pylist()


def test_what_a_shift_leaves_over_is_held_by_who_had_the_lot(tmp_path: Path) -> None:
    """A remainder follows the rest of its lot, which its pool has answered; a whole lot what was known of it."""
    stage = Stage(tmp_path)
    near = Scripted(4, dies_after=5)
    _, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}), {"near": near})
    whole = {lot["lot_id"]: lot["start"] for lot in stage.plan.lots.to_pylist()}
    for lot in unserved.to_pylist():
        begun = lot["start"] > whole[lot["lot_id"].partition("~")[0]]
        assert lot["held_by"] == ("near" if begun else None)
