"""The purse: whoever takes over what, and however often it is tried, a shift spends no more than it was reserved."""

from __future__ import annotations

import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hedging import Queued, Slow
from test_shift import Stage, pool

from bidbeam.transforms import breaker, hedging, lane, shift
from bidbeam.transforms.bidding import WORST_ESTIMATE, WORST_TEMPLATE_TOKENS
from bidbeam.transforms.lots import lot_places
from bidbeam.transforms.order import read_order
from bidbeam.transforms.retrying import worst_case_of

ROWS = 24
CHEAP = {"uncached_input": Decimal("1E-7"), "output": Decimal("4E-7")}
DEAR = {meter: price * 10 for meter, price in CHEAP.items()}


def worst_of(stage: Stage, name: str, lots: int) -> Decimal:
    """What the first lots may cost on a pool, once, as the market reserves it."""
    terms = stage.task({"near": stage.plan.lots.num_rows}).runner_up_terms[name, "m"]
    found = Decimal(0)
    for lot in stage.plan.lots.slice(0, lots).to_pylist():
        order = read_order(stage.context, lot["range"])
        found += worst_case_of(order, lot_places(lot["places"]), estimated=True, terms=terms)
    return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("purse"), ROWS, (pool("near", CHEAP), pool("far", DEAR)))


@pytest.fixture(autouse=True)
def _hedging_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not answered at once is late, with half of what was sent still out; breakers close at once."""
    monkeypatch.setattr(lane, "LEAST_S", 0.0)
    monkeypatch.setattr(hedging, "_ENOUGH", 2)
    monkeypatch.setattr(shift, "TAIL", 2)
    monkeypatch.setattr(shift, "_TICK_S", 0.01)
    monkeypatch.setattr(breaker, "FIRST_OPEN_S", 0.0)


class Charging:
    """How requests end, as drawn: most are charged all that they may cost, some of them for nothing."""

    def __init__(self, stage: Stage, seed: int, fails: float) -> None:
        order = read_order(stage.context, 0)
        self.tokens = order.column("input_tokens").to_pylist()
        self.most = order.column("max_tokens").to_pylist()
        self.random, self.fails = np.random.default_rng(seed), fails

    def __call__(self, tag: int) -> dict[str, Any]:
        place = tag & 0xFFFFFFFF
        used = {
            "input_tokens": WORST_ESTIMATE * self.tokens[place] + WORST_TEMPLATE_TOKENS,
            "output_tokens": self.most[place],
            "usage_source": "reported",
        }
        if self.random.random() >= self.fails:
            return used
        failed = {"status": "failed", "error_class": str(self.random.choice(["server", "timeout", "bad_output"]))}
        return failed | (used if self.random.random() < 0.8 else {})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    fails=st.tuples(*[st.sampled_from([0.0, 0.2, 0.5])] * 2),
    dies=st.tuples(*[st.none() | st.integers(1, ROWS)] * 2),
    how=st.sampled_from(["gone", "falls"]),
    queued=st.booleans(),
    spare=st.sampled_from(["nothing", "half", "all"]),
)
def test_no_hand_over_hedge_or_retry_passes_the_reserve(
    stage: Stage,
    seed: int,
    fails: tuple[float, float],
    dies: tuple[int | None, int | None],
    how: str,
    queued: bool,
    spare: str,
) -> None:
    """The runner-up asks ten times the price, and what is charged is all that may be: pools that fail, give back what
    they were not sent, die or sit on requests make a shift cost no more than its awards and their runners-up."""
    chance = np.random.default_rng(seed)
    # The market names a runner-up for the lots that the budget covers on both pools.
    lots = stage.plan.lots.num_rows
    covered = {"nothing": 0, "half": lots // 2, "all": lots}[spare]
    task = stage.task({"near": lots}, "far")
    ((award,),) = (task.awards,)
    names = pa.array(["far" if at < covered else None for at in range(lots)], pa.string())
    offered = award.lots.set_column(award.lots.schema.get_field_index("runner_up"), "runner_up", names)
    reserved = worst_of(stage, "near", lots) + worst_of(stage, "far", covered)
    task = replace(task, awards=(replace(award, lots=offered),), reserved=reserved)
    engines: dict[str, Slow] = {}
    for at, name in enumerate(("near", "far")):
        sits = {int(tag): int(chance.integers(1, 60)) for tag in chance.choice(ROWS, 4, replace=False)}
        kind = Queued if queued else Slow
        engines[name] = kind(
            sits, outcome=Charging(stage, seed + at, fails[at]), gone_after=int(chance.integers(5, 90))
        )
        engines[name].dies_after, engines[name].how = dies[at], how
    context = replace(stage.context, max_cost=reserved)
    rows, _ = stage.run(task, {**engines}, context=context)
    for left in ("segments", "dispatched", "progress"):
        shutil.rmtree(Path(context.scratch.url) / left, ignore_errors=True)
    assert sum((row["cost"] for row in rows.to_pylist()), Decimal(0)) <= reserved
