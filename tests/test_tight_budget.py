"""A budget below the worst case: what fits is served, request by request, and the wall holds at every moment."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_jobs import check_conserved, make_job, prompts, remote, total, written
from small_plans import AT, make_context, make_plan, write_input
from test_hedging import ROWS as HEDGED
from test_hedging import Slow
from test_shift import HOURS, Scripted, Stage, places, pool, tags

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.pools import Capacity
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms import bid, breaker, dispatch, shift
from bidbeam.transforms.journal import list_segments, segment_ref, spent_on
from bidbeam.transforms.retrying import worst_cases_of
from bidbeam.transforms.shift_task import ShiftTask

DEAR = {"uncached_input": Decimal("2E-7"), "output": Decimal("8E-7")}
ROWS = 24
EXAMPLES = int(os.environ.get("BIDBEAM_RUNS", "300")) // 40
WORST, BILL = Decimal("1E-5"), Decimal("1.8E-6")
"""Of a request that is 5 tokens by our estimate, 84 at worst, 10 as the pool reports; with an answer of 2 out of 4."""


def test_a_job_whose_bill_fits_in_the_budget_is_served_although_its_worst_case_does_not(tmp_path: Path) -> None:
    """What answers leave of their worst case pays for the next ones, in one round."""
    with EndpointDouble(["tiny"]) as double:
        pools = [remote("near", double.base_url, context=4096)]
        terms: dict[str, Any] = {"sampling": {"max_tokens": 64, "temperature": 0}, "auction": {"rounds": 1}}
        job = make_job(tmp_path, prompts(80), pools, budget={"max_cost": "0.0015"}, **terms)
        summary = run(job)
    found = written(job)
    check_conserved(found, 80)
    assert (summary.served, summary.exit_code) == (80, 0)
    assert total(found.rows("awards"), "reserved") == Decimal("0.0015") < total(found.rows("bids"), "worst_case_cost")
    assert total(found.rows("charges")) <= Decimal("0.0015")
    assert verify_ledger(job.ledger).ok


class Watched(Scripted):
    """Whenever it is sent something, ``look`` is called first."""

    look: Callable[[], None] = staticmethod(lambda: None)

    def submit(self, requests: pa.RecordBatch) -> None:
        self.look()
        super().submit(requests)


def tight(stage: Stage, budget: Decimal) -> tuple[Stage, ShiftTask]:
    """The stage with a budget, and the one shift that the market then makes of its lots."""
    stage.context = replace(stage.context, max_cost=budget)
    decision = bid.decide(stage.context, 1, stage.plan.lots, Decimal(0), AT)
    (task,) = decision.tasks or (ShiftTask(1, 0, (), reserved=Decimal(0)),)
    return stage, task


def costs(rows: pa.Table) -> Decimal:
    return sum_decimal(rows.column("cost"))


def worst_of(stage: Stage, name: str = "near") -> list[Decimal]:
    """What each request may cost at most on a pool, by place."""
    terms = bid.terms_of(stage.context, next(each for each in stage.pools if each.name == name), "m")
    return worst_cases_of(stage.plan.orders[0], np.arange(ROWS), True, terms=terms).to_pylist()


def may_cost(stage: Stage) -> Decimal:
    """USD that the shift may have cost, were it cut short now: what is in its journal, and at worst all that was about
    to be sent."""
    journal, scratch = stage.context.journal, stage.context.scratch_name
    segments = list_segments(journal, f"{scratch}/segments/")
    records = sorted(entry.name for entry in journal.list(f"{dispatch.directory(scratch)}/r001-s000-t"))
    lost, _ = dispatch._lost(journal, scratch, "r001-s000", records, segments)
    spent = spent_on(segment_ref(journal, name) for name in segments)
    rows = [] if lost is None else lost.select(["tag", "pool", "cost"]).to_pylist()
    worst = {name: worst_of(stage, name) for name in {row["pool"] for row in rows}}
    assert all(row["cost"] <= worst[row["pool"]][row["tag"]] for row in rows)
    return spent + sum((worst[row["pool"]][row["tag"]] for row in rows), Decimal(0))


@pytest.fixture(autouse=True)
def _slow_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals take a moment to be written, as on an object store."""
    write = shift.write_segment

    def slowly(*given: Any) -> Any:
        time.sleep(0.01)
        return write(*given)

    monkeypatch.setattr(shift, "write_segment", slowly)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1),
    window=st.integers(1, 8),
    used=st.lists(st.tuples(st.integers(1, 84), st.integers(1, 4)), min_size=ROWS, max_size=ROWS),
)
def test_as_much_is_served_as_if_each_answer_were_waited_for(
    tmp_path_factory: Any, share: float, window: int, used: list[tuple[int, int]]
) -> None:
    """With any budget from nothing to the worst case, however many requests are out at a time: exactly those are served
    that would be were they sent one by one, in order, and no crash at any moment would have broken the budget."""
    stage = Stage(tmp_path_factory.mktemp("tight"), ROWS, (pool("near"),))
    worst = worst_of(stage)
    budget = (sum(worst, Decimal(0)) * Decimal(share)).quantize(Decimal("1E-9"))
    stage, task = tight(stage, budget)
    near = Watched(window, lambda tag: {"input_tokens": used[tag][0], "output_tokens": used[tag][1]})
    seen: list[Decimal] = []
    near.look = lambda: seen.append(may_cost(stage))
    rows, unserved = stage.run(task, {"near": near}) if task.awards else (None, stage.plan.lots)

    left, sequential = budget, []
    for lot in (lot for award in task.awards for lot in award.lots.to_pylist()):
        for place in np.frombuffer(lot["places"], "<u4").tolist():
            if worst[place] <= left:
                left -= used[place][0] * Decimal("1E-7") + used[place][1] * Decimal("4E-7")
                sequential.append(place)
    served = [] if rows is None else tags(rows, status="ok")
    assert served == sorted(sequential)
    assert sorted([*served, *places(unserved)]) == list(range(ROWS))
    assert max(seen, default=Decimal(0)) <= budget
    assert budget - left == may_cost(stage) <= budget


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 2),
    deaths=st.lists(st.none() | st.integers(1, 12), min_size=2, max_size=2),
)
def test_no_crash_breaks_a_small_budget_whatever_pools_do(
    tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, seed: int, share: float, deaths: list[int | None]
) -> None:
    """With pools that fail, charge for failures, die and give back what they were sent: at every moment what is spent
    and what a crash would book fit in the budget, and every request is served once or left with a reason."""
    chance = np.random.default_rng(seed)
    stage = Stage(tmp_path_factory.mktemp("tight"), ROWS, (pool("near"), pool("far", DEAR)))
    budget = (sum(worst_of(stage), Decimal(0)) * Decimal(share)).quantize(Decimal("1E-9"))
    stage, task = tight(stage, budget)
    monkeypatch.setattr(breaker, "FIRST_OPEN_S", 0.0)
    seen: list[Decimal] = []

    def outcome(tag: int) -> dict[str, Any]:
        used = {"input_tokens": int(chance.integers(1, 85)), "output_tokens": int(chance.integers(1, 5))}
        ends: list[dict[str, Any]] = [
            used, used, used, {"status": "failed", "error_class": "server"}, {**used, "output": " "},
            {"status": "failed", "error_class": "bad_output", **used}, {"input_tokens": None, "output_tokens": None},
        ]  # fmt: skip
        return ends[int(chance.integers(len(ends)))]

    engines = {}
    for name, dies in zip(("near", "far"), deaths, strict=True):
        how = "gone" if chance.random() < 0.5 else "falls"
        engines[name] = Watched(int(chance.integers(1, 7)), outcome, dies, how)
        engines[name].look = lambda: seen.append(may_cost(stage))
    rows, unserved = stage.run(task, {**engines}) if task.awards else (None, stage.plan.lots)
    served = [] if rows is None else tags(rows, status="ok")
    assert sorted([*served, *places(unserved)]) == list(range(ROWS))
    assert max(seen, default=Decimal(0)) <= budget
    assert rows is None or costs(rows) <= budget


@pytest.mark.parametrize("how", ["gone", "falls"])
def test_in_a_tight_budget_too_a_dead_pool_hands_its_lots_over(tmp_path: Path, how: str) -> None:
    """The runner-up serves them in the same shift, from what is left once what the dead pool had is written off."""
    stage = Stage(tmp_path, ROWS, (pool("near"), pool("far", DEAR)))
    stage, task = tight(stage, WORST * 12)
    assert task.tight
    near, far = Scripted(4, dies_after=5, how=how), Scripted()
    rows, unserved = stage.run(task, {"near": near, "far": far})
    lost = tags(rows, status="lost")
    assert 1 <= len(lost) <= 4
    assert set(lost) <= set(near.tags[5:])
    assert places(unserved) == lost
    assert set(far.tags) == set(range(ROWS)) - set(near.tags[:5]) - set(lost)
    assert costs(rows) <= WORST * 12


def test_a_straggler_is_hedged_in_a_tight_budget_once_there_is_money_for_it(tmp_path: Path) -> None:
    """Its worst case on the runner-up is paid from what the others have left."""
    stage = Stage(tmp_path, HEDGED, (pool("near"), pool("far", DEAR)))
    stage, task = tight(stage, WORST * 24)
    assert task.tight
    near, far = Slow({HEDGED - 1: None}), Slow()
    rows, unserved = stage.run(task, {"near": near, "far": far})
    assert (far.tags, unserved.num_rows) == ([HEDGED - 1], 0)
    assert tags(rows, status="ok") == list(range(HEDGED))
    assert costs(rows) <= WORST * 24


def test_money_goes_to_the_cheaper_answers_first(tmp_path: Path) -> None:
    """Lots that the budget covers keep what they may cost, however slow their pool is; a dearer pool's get what those
    leave."""
    stage = Stage(tmp_path, ROWS, (pool("near"), pool("far", DEAR)))
    task = stage.task({"near": stage.plan.lots.num_rows - 1, "far": 1})
    awards = []
    for rank, award in enumerate(task.awards):
        worst = [WORST * (1 + rank) * n for n in award.lots.column("requests").to_pylist()]
        lots = award.lots.append_column("rank", pa.array([rank] * len(worst)))
        awards.append(replace(award, lots=lots.append_column("worst", pa.array(worst))))
    first: int = sum(awards[0].lots.column("requests").to_pylist())
    task = replace(task, awards=tuple(awards), tight=True)

    class Sluggish(Scripted):
        begun_s = math.inf

        def poll(self) -> list[pa.RecordBatch]:
            self.begun_s = min(self.begun_s, time.monotonic())
            return super().poll() if time.monotonic() > self.begun_s + 0.2 else []

    def served(near: Scripted, far: Watched, reserved: Decimal) -> tuple[list[int], list[int]]:
        rows, unserved = stage.run(replace(task, reserved=reserved), {"near": near, "far": far})
        assert costs(rows) <= reserved
        assert {lot["last_error"] for lot in unserved.to_pylist()} <= {"budget"}
        return tags(rows, pool="near", status="ok"), tags(rows, pool="far", status="ok")

    near, far, seen = Sluggish(1), Watched(8), list[int]()
    far.look = lambda: seen.append(near.answered)
    assert served(near, far, WORST * first) == (list(range(first)), list(range(first, ROWS)))
    # One of far's may cost as much as two of near's.
    assert seen[0] * (WORST - BILL) >= 2 * WORST
    stage = Stage(tmp_path / "few", ROWS, stage.pools)
    assert served(Scripted(1), Watched(8), BILL * (first - 1) + WORST) == (list(range(first)), [])


def test_a_retried_bundle_pays_again_only_within_its_reserve(tmp_path: Path) -> None:
    """What an earlier try of the shift has cost, and what it had in flight, counts."""
    stage = Stage(tmp_path, ROWS)
    stage, task = tight(stage, WORST * ROWS * 3)
    assert not task.tight
    task = replace(task, reserved=WORST * ROWS)
    near = Scripted(8, outcome=lambda tag: {"input_tokens": 84, "output_tokens": 4} if tag < 10 else crash())

    def crash() -> Any:
        raise RuntimeError("the worker is gone")

    with pytest.raises(RuntimeError):
        stage.run(task, {"near": near, "far": Scripted()})
    again = Scripted(8, outcome=lambda tag: {"input_tokens": 84, "output_tokens": 4})
    rows, unserved = stage.run(task, {"near": again, "far": Scripted()})
    assert costs(rows) <= WORST * ROWS
    served = tags(rows, status="ok")
    assert sorted({*served, *places(unserved)}) == list(range(ROWS))
    # What was lost is booked at our own estimate.
    assert len(served) < ROWS
    assert {lot["last_error"] for lot in unserved.to_pylist()} == {"budget"}


def test_a_lot_that_is_too_much_for_the_time_is_served_in_part(tmp_path: Path) -> None:
    """Where no pool is done with it before the deadline, as much of it as fits is awarded; the rest waits for time."""
    fast = replace(pool("near"), capacity=Capacity(4, tokens_per_second=10.0))
    stage = Stage(tmp_path, ROWS, (fast,), lot_tokens=10_000)
    (lot,) = stage.plan.lots.to_pylist()
    seconds = (lot["input_tokens"] + lot["max_output_tokens"]) / 10
    context = replace(stage.context, deadline_at=AT + timedelta(seconds=seconds / 2))
    decision = bid.decide(context, 1, stage.plan.lots, Decimal(0), AT)
    awarded = sum(
        award.lots.column("requests").to_pylist()[at]
        for task in decision.tasks
        for award in task.awards
        for at in range(award.lots.num_rows)
    )
    assert ROWS * 3 // 8 <= awarded <= ROWS // 2
    assert set(decision.waiting.column("last_error").to_pylist()) == {"deadline"}
    parts = [table for task in decision.tasks for award in task.awards for table in [award.lots]]
    assert sorted([*places(pa.concat_tables(parts)), *places(decision.waiting)]) == list(range(ROWS))
    assert all(
        lot_id.startswith(f"{lot['lot_id']}.") for lot_id in decision.tables["lots"].column("lot_id").to_pylist()
    )
    # Time for less than one request.
    late = replace(stage.context, deadline_at=AT + timedelta(seconds=seconds / ROWS / 2))
    assert bid.decide(late, 1, stage.plan.lots, Decimal(0), AT).tasks == ()


def test_a_lot_that_is_too_much_for_the_money_of_an_engine_is_served_in_part(tmp_path: Path) -> None:
    """An engine paid by time gets as many requests as the budget covers the expected time of."""
    own = replace(pool("own", HOURS), capacity=Capacity(4, tokens_per_second=10.0))
    stage = Stage(tmp_path, ROWS, (own,), lot_tokens=10_000)
    (lot,) = stage.plan.lots.to_pylist()
    second = HOURS["accelerator_second"]
    expected = Decimal(lot["input_tokens"] + lot["max_output_tokens"]) / 10 * second
    held = Decimal(bid.held_s(1, own)) * second
    context = replace(stage.context, max_cost=held + expected / 2)
    decision = bid.decide(context, 1, stage.plan.lots, Decimal(0), AT)
    ((award,),) = (task.awards for task in decision.tasks)
    assert ROWS * 3 // 8 <= sum(award.lots.column("requests").to_pylist()) < ROWS
    assert award.reserved_ms is not None
    asked = total(decision.tables["awards"].to_pylist(), "price_paid")
    assert expected / 3 <= asked <= Decimal(award.reserved_ms) / 1000 * second - held <= expected / 2
    assert set(decision.waiting.column("last_error").to_pylist()) == {"budget"}


def test_what_fits_in_a_lot_that_is_too_long_for_a_pool_is_served(tmp_path: Path) -> None:
    """A request that no eligible pool has the context for keeps the others of its lot from nobody."""
    table = pa.table({"prompt": ["short 1", "short 2", "long " * 40, "short 3"]})
    found = write_input(tmp_path, {"a.parquet": table}, 4)
    plan = make_plan(
        make_context(tmp_path, found, lot_tokens=10_000, pools=(replace(pool("near"), context=16),)), found
    )
    assert plan.lots.num_rows == 1
    decision = bid.decide(plan.context, 1, plan.lots, Decimal(0), AT)
    ((award,),) = (task.awards for task in decision.tasks)
    long = [place for place, tokens in enumerate(plan.orders[0].column("input_tokens").to_pylist()) if tokens > 16]
    assert (len(long), places(decision.refused)) == (1, long)
    assert decision.refused.column("last_error").to_pylist() == ["too_long"]
    assert places(award.lots) == sorted(set(range(4)) - set(long))
    assert decision.waiting.num_rows == 0
