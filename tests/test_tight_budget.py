"""A budget below the worst case: what fits is served, request by request, and the wall holds at every moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_jobs import check_conserved, make_job, prompts, remote, total, written
from small_plans import AT
from test_shift import Scripted, Stage, places, pool, tags

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.connectors.money import sum_decimal
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms import bid, dispatch
from bidbeam.transforms.journal import list_segments, segment_ref, spent_on
from bidbeam.transforms.retrying import worst_cases_of
from bidbeam.transforms.shift_task import ShiftTask

DEAR = {"uncached_input": Decimal("2E-7"), "output": Decimal("8E-7")}
ROWS = 24


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


def worst_of(stage: Stage, price: Any) -> list[Decimal]:
    """What each request may cost at most, by place."""
    terms = bid.terms_of(
        stage.context, replace(stage.pools[0], price=replace(stage.pools[0].price, unit_prices=price)), "m"
    )
    return worst_cases_of(stage.plan.orders[0], np.arange(ROWS), True, terms=terms).to_pylist()


def after_a_crash(stage: Stage) -> Decimal:
    """What the shift would have cost, were it cut short now."""
    journal, scratch = stage.context.journal, stage.context.scratch_name
    segments = list_segments(journal, f"{scratch}/segments/")
    records = sorted(entry.name for entry in journal.list(f"{dispatch.directory(scratch)}/r001-s000-t"))
    lost, _ = dispatch._lost(journal, scratch, "r001-s000", records, segments)
    spent = spent_on(segment_ref(journal, name) for name in segments)
    return spent + (Decimal(0) if lost is None else sum_decimal(lost.column("cost")))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    worst = worst_of(stage, stage.pools[0].price.unit_prices)
    budget = (sum(worst, Decimal(0)) * Decimal(share)).quantize(Decimal("1E-9"))
    stage, task = tight(stage, budget)
    near = Watched(window, lambda tag: {"input_tokens": used[tag][0], "output_tokens": used[tag][1]})
    seen: list[Decimal] = []
    near.look = lambda: seen.append(after_a_crash(stage))
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
    assert budget - left == after_a_crash(stage) <= budget
