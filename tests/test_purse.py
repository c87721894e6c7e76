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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_hedging import Queued, Slow
from test_shift import HOURS, Stage, pool

from bidbeam.transforms import breaker, hedging, lane, shift
from bidbeam.transforms.engines import Slot
from bidbeam.transforms.estimates import WORST_ESTIMATE, WORST_TEMPLATE_TOKENS
from bidbeam.transforms.lots import lot_places
from bidbeam.transforms.order import read_order
from bidbeam.transforms.retrying import worst_case_of
from bidbeam.transforms.shift import Shift
from bidbeam.transforms.shift_task import ShiftTask

ROWS = 20
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
        return failed | (used if self.random.random() < 0.95 else {})


class Crash(BaseException):
    """Takes the worker away."""


class Crashing(Slow):
    """Takes its worker away at the ``crash``-th poll."""

    crash = 0

    def poll(self) -> list[pa.RecordBatch]:
        if self.polls == self.crash:
            raise Crash
        return super().poll()


def shift_of(stage: Stage, covered: int) -> ShiftTask:
    """All lots to ``near``, with as much reserved as that may cost; for the first ones ``far`` is reserved too, for the
    others it is next best, as far as the money goes."""
    lots = stage.plan.lots.num_rows
    task = stage.task({"near": lots}, "far")
    ((award,),) = (task.awards,)
    offered = award.lots.drop_columns(["runner_up", "next_best"])
    offered = offered.append_column(
        "runner_up", pa.array(["far" if at < covered else None for at in range(lots)], pa.string())
    )
    next_best = pa.array([[] if at < covered else ["far"] for at in range(lots)], pa.list_(pa.string()))
    offered = offered.append_column("next_best", next_best)
    reserved = worst_of(stage, "near", lots) + worst_of(stage, "far", covered)
    return replace(task, awards=(replace(award, lots=offered),), reserved=reserved)


def worked(stage: Stage, task: ShiftTask, engines: dict[str, Slow]) -> tuple[Decimal, pa.Table]:
    """What the shift has spent by its end, earlier tries included, and what it left."""
    rows, left = stage.run(task, {**engines}, context=replace(stage.context, max_cost=task.reserved))
    return sum((row["cost"] for row in rows.to_pylist()), Decimal(0)), left


def clear_up(stage: Stage) -> None:
    for left in ("segments", "dispatched", "progress"):
        shutil.rmtree(Path(stage.context.scratch.url) / left, ignore_errors=True)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    fails=st.tuples(*[st.sampled_from([0.0, 0.3, 0.45])] * 2),
    dies_after=st.none() | st.integers(1, ROWS),
    how=st.sampled_from(["gone", "falls"]),
    kind=st.sampled_from([Slow, Slow, Queued]),
    spare=st.sampled_from(["nothing", "half", "all"]),
)
@example(seed=1, fails=(0.45, 0.45), dies_after=None, how="gone", kind=Slow, spare="nothing")
@example(seed=2, fails=(0.45, 0.45), dies_after=2, how="falls", kind=Slow, spare="all")
@example(seed=3, fails=(0.0, 0.0), dies_after=2, how="falls", kind=Slow, spare="nothing")
def test_no_hand_over_hedge_or_retry_passes_the_reserve(
    stage: Stage,
    seed: int,
    fails: tuple[float, float],
    dies_after: int | None,
    how: str,
    kind: type[Slow],
    spare: str,
) -> None:
    """The runner-up asks ten times the price, and what is charged is all that may be: pools that fail, give back what
    they were not sent, die or sit on requests make a shift cost no more than its awards and their runners-up."""
    clear_up(stage)
    chance, lots = np.random.default_rng(seed), stage.plan.lots.num_rows
    task = shift_of(stage, {"nothing": 0, "half": lots // 2, "all": lots}[spare])
    engines: dict[str, Slow] = {}
    for at, name in enumerate(("near", "far")):
        sits = {int(tag): int(chance.integers(1, 30)) for tag in chance.choice(ROWS, 2, replace=False)}
        gone_after = int(chance.choice([9, 1_000, 1_000]))
        engines[name] = kind(sits, outcome=Charging(stage, seed + at, fails[at]), gone_after=gone_after)
        engines[name].how = how
    engines["near"].dies_after = dies_after
    spent, _ = worked(stage, task, engines)
    assert task.reserved is not None
    assert spent <= task.reserved


@pytest.mark.parametrize("crash", [1, 6, 18])
def test_a_bundle_that_is_tried_again_has_what_the_first_try_left(stage: Stage, crash: int) -> None:
    """What a crash took is booked, and asked again only as far as the reserve goes; the rest waits for a round that
    knows what is left."""
    clear_up(stage)
    task = shift_of(stage, 0)
    assert task.reserved is not None
    first = Crashing(outcome=Charging(stage, 1, 0.0))
    first.crash, first.window = crash, ROWS
    context = replace(stage.context, max_cost=task.reserved)
    working = Shift(task, context, stage.plan.spills, slot=lambda *_: Slot(first))
    with pytest.raises(Crash):
        list(working.run())
    # A worker that is gone writes nothing any more; this one's threads are still here.
    working._dispatcher.shutdown()
    working._writer.shutdown()
    again = Slow(outcome=Charging(stage, 2, 0.0))
    spent, left = worked(stage, task, {"near": again, "far": Slow()})
    assert spent <= task.reserved
    assert again.tags
    assert set(left.column("last_error").to_pylist()) == {"budget"}


def test_time_that_an_earlier_try_has_used_is_gone(tmp_path: Path) -> None:
    """An engine paid by the second has what its first try left of its reserve, loading and idling counted."""
    stage = Stage(tmp_path, ROWS, (pool("own", HOURS), pool("far")))
    task = stage.task({"own": stage.plan.lots.num_rows})
    rows, _ = stage.run(task, {"own": Slow()})
    used = sum(row["cost"] for row in rows.to_pylist()) / HOURS["setup"] * 1000
    assert used >= 7
    again = Shift(task, stage.context, stage.plan.spills, slot=lambda *_: Slot(Slow()))
    list(again.run())
    assert [lane.used_ms for lane in again._lanes.values()] == [used]
