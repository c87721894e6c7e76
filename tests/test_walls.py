"""The walls: no generated run spends more than its budget, shows a prompt to a pool that it may not go to, buys after
its deadline, or loses a row.

Each run is driven round after round through the product's own market and shifts. ``BIDBEAM_RUNS`` says how many.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from generated_runs import IDLING_S, LOADING_S, Ground, Run, draw, ground

from bidbeam.connectors.pools import PoolSpec
from bidbeam.transforms import bid, breaker, engines, shift
from bidbeam.transforms.decisions import Decision
from bidbeam.transforms.estimates import WORST_ESTIMATE, WORST_TEMPLATE_TOKENS
from bidbeam.transforms.journal import SegmentRef, read_segment, spent_on
from bidbeam.transforms.leftovers import NO_SECOND_TRY
from bidbeam.transforms.shift import Shift
from bidbeam.transforms.shift_task import ShiftTask

RUNS = int(os.environ.get("BIDBEAM_RUNS", "300"))
BATCHES = 20


@pytest.fixture(scope="module")
def grounds() -> Iterator[list[Ground]]:
    """The same rows planned for jobs that ask for nothing, for the EEA, and for no training and short retention."""
    memory = Path("/dev/shm")  # noqa: S108 # a directory of our own in it
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as home:
        yield [ground(Path(home) / str(job), job) for job in (0, 1, 5)]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_run_breaks_a_wall(grounds: list[Ground], batch: int) -> None:
    """Budget, placement, deadline, reservations and rows hold in runs with failing, dying, slow and lying pools."""
    for seed in range(batch, RUNS, BATCHES):
        try:
            drive(draw(grounds[seed % len(grounds)], seed))
        except Exception as error:
            error.add_note(f"in the generated run of seed {seed}")
            raise


def drive(run: Run) -> None:
    """Runs all rounds and checks each, then the whole."""
    context = run.context
    patch = pytest.MonkeyPatch()
    patch.setattr(bid, "_SETUP_HELD_S", LOADING_S)
    patch.setattr(bid, "_IDLE_HELD_S", IDLING_S)
    patch.setattr(breaker, "FIRST_OPEN_S", 0.0)
    patch.setattr(engines, "clock_ms", run.clock)
    patch.setattr(shift, "time", SimpleNamespace(monotonic=run.clock.seconds))
    if run.prompt:
        patch.setattr(shift, "_SEGMENT_S", 0.0)
    lots, segments, refused, attempts = run.lots, [], [], []
    try:
        for round_ in range(1, context.rounds + 1):
            if not lots.num_rows:
                break
            spent = spent_on(segments)
            decision = bid.decide(context, round_, lots, spent, run.clock.now())
            check_auction(run, decision, lots, spent)
            left, rows = [decision.waiting], []
            for task in decision.tasks:
                done, unserved = run_shift(run, task)
                segments += done
                left.append(unserved)
                if done:
                    rows.append(pa.concat_tables(read_segment(context.journal, one.name)[0] for one in done))
            if rows:
                attempts.append(pa.concat_tables(rows))
                check_round(run, decision, attempts[-1])
            refused.append(decision.refused)
            lots = pa.concat_tables(left)
            run.clock.ms += 0 if run.prompt else int(run.random.integers(0, 100))
    finally:
        patch.undo()
        shutil.rmtree(Path(context.scratch.url) / "segments", ignore_errors=True)
        shutil.rmtree(Path(context.scratch.url) / "progress", ignore_errors=True)
    check_run(run, pa.concat_tables(attempts) if attempts else None, pa.concat_tables([*refused, lots]))


def run_shift(run: Run, task: ShiftTask) -> tuple[list[SegmentRef], pa.Table]:
    run.task, run.seen = task, Decimal(0)
    segments, unserved = [], None
    for result in Shift(task, run.context, run.ground.plan.spills, slot=run.slot, now=run.clock.now).run():
        if result.segment is not None:
            segments.append(result.segment)
        if result.unserved is not None:
            unserved = result.unserved
    assert unserved is not None
    return segments, unserved


# -- what must hold --------------------------------------------------------------------------------------------------


def places_of(lots: pa.Table) -> list[int]:
    """The tags of all requests of LOT rows, with repetitions."""
    return [
        (lot["range"] << 32) | int(place)
        for lot in lots.select(["range", "places"]).to_pylist()
        for place in np.frombuffer(lot["places"], "<u4")
    ]


def check_auction(run: Run, decision: Decision, lots: pa.Table, spent: Decimal) -> None:
    """Every lot is awarded, waits or is refused; what is reserved fits the budget; none waits where there is room."""
    context = run.context
    awards = decision.tables["awards"].select(["lot_id", "pool", "reserved"]).to_pylist()
    won = {award["lot_id"]: award["pool"] for award in awards}
    dealt = [*won, *decision.waiting.column("lot_id").to_pylist(), *decision.refused.column("lot_id").to_pylist()]
    assert sorted(dealt) == sorted(decision.tables["lots"].column("lot_id").to_pylist())
    tables = [award.lots for task in decision.tasks for award in task.awards]
    parts = [place for table in (*tables, decision.waiting, decision.refused) for place in places_of(table)]
    assert sorted(parts) == sorted(places_of(lots))
    bids = {
        (row["lot_id"], row["pool"]): row
        for row in decision.tables["bids"]
        .select(["lot_id", "pool", "eligible", "reject_reason", "worst_case_cost", "finish_at"])
        .to_pylist()
    }
    now, left = run.clock.now(), None
    if context.max_cost is not None:
        left = max(context.max_cost - spent, Decimal(0))
        for spec in context.pools:
            if spec.price.by_time and any(row["eligible"] for (_, pool), row in bids.items() if pool == spec.name):
                left -= held(run, spec, decision.round, set(lots.column("model").to_pylist()))
        assert decision.reserved <= max(left, Decimal(0)), "more is reserved than there is"
        shared = sum((task.reserved or Decimal(0) for task in decision.tasks), Decimal(0))
        assert shared <= decision.reserved, "shifts that run side by side may spend the same money"
        left -= sum((award["reserved"] for award in awards), Decimal(0))
    for reserve in decision.tables["lots"].column("reserve").to_pylist():
        assert reserve is None or context.max_cost is None or reserve <= max(context.max_cost - spent, 0)
    load: dict[str, float] = dict.fromkeys((spec.name for spec in context.pools), 0.0)

    def seconds(lot_id: str, pool: str) -> float:
        finish = bids[lot_id, pool]["finish_at"]
        return 0.0 if finish is None else (finish - now).total_seconds()

    for lot_id, pool in won.items():
        assert bids[lot_id, pool]["eligible"]
        load[pool] += seconds(lot_id, pool)
    room = dict.fromkeys(load, math.inf)
    if context.deadline_at is not None:
        until = max((context.deadline_at - now).total_seconds(), 0.0)
        room |= {spec.name: until for spec in context.pools if spec.capacity.tokens_per_second}
    for pool in load:
        assert load[pool] <= room[pool] * (1 + 1e-9) + 1e-4, f"{pool} is awarded more than it can do in time"
    for lot in decision.waiting.select(["lot_id", "last_error"]).to_pylist():
        for spec in context.pools:
            offer = bids[lot["lot_id"], spec.name]
            if not offer["eligible"]:
                continue
            fits = load[spec.name] + seconds(lot["lot_id"], spec.name) <= room[spec.name] - 1e-4
            afford = left is None or offer["worst_case_cost"] <= left
            assert not (fits and afford), f"{lot} waits although {spec.name} has room and the budget covers it"


def held(run: Run, spec: PoolSpec, round_: int, wanted: set[str]) -> Decimal:
    """USD that the budget holds back for a pool's engines."""
    seconds = LOADING_S if round_ == 1 else IDLING_S
    engines = spec.capacity.workers * len(spec.models.keys() & wanted)
    return Decimal(seconds) * engines * spec.price.unit_prices["accelerator_second"] * run.rate(spec)


def check_round(run: Run, decision: Decision, rows: pa.Table) -> None:
    """What each kind of pool has cost in the round is no more than was reserved for it."""
    if run.context.max_cost is None:
        return
    cost: dict[str, Decimal] = dict.fromkeys((spec.name for spec in run.context.pools), Decimal(0))
    for row in rows.select(["pool", "cost"]).to_pylist():
        cost[row["pool"]] += row["cost"]
    by_time = {spec.name for spec in run.context.pools if spec.price.by_time}
    timed = {name: Decimal(0) for name in by_time}
    for task in decision.tasks:
        for award in task.awards:
            if award.pool in by_time:
                assert award.reserved_ms is not None
                spec = run.spec(award.pool)
                price = spec.price.unit_prices["accelerator_second"]
                timed[award.pool] += Decimal(award.reserved_ms) / 1000 * price * run.rate(spec)
    for name in by_time:
        assert cost[name] <= timed[name] + Decimal("1e-12"), f"{name} has run for longer than was reserved"
    if not run.lies:
        tokens = sum((spent for name, spent in cost.items() if name not in by_time), Decimal(0))
        assert tokens <= decision.reserved, f"{tokens} is spent of {decision.reserved} reserved"


def check_run(run: Run, rows: pa.Table | None, left: pa.Table) -> None:
    """The budget holds, every attempt was where it might be, and every row has one answer or a reason."""
    unanswered = places_of(left)
    reasons = left.column("last_error").to_pylist()
    assert all(reasons), "a lot is left without a reason"
    if rows is None:
        assert sorted(unanswered) == sorted(places_of(run.lots))
        return
    entries = rows.select(["tag", "request_id", "pool", "status", "error_class", "cost"]).to_pylist()
    for row in entries:
        if row["tag"] is not None:
            assert row["request_id"] == run.ground.request_of[row["tag"]]
            assert run.may(row["pool"], row["request_id"]), f"{row['request_id']} was tried on {row['pool']}"
    answered = [row["tag"] for row in entries if row["status"] == "ok" and row["tag"] is not None]
    final = {row["tag"] for row in entries if row["status"] == "failed" and row["error_class"] in NO_SECOND_TRY}
    assert sorted([*answered, *final, *unanswered]) == sorted(places_of(run.lots)), "rows are not conserved"
    budget = run.context.max_cost
    if budget is not None:
        total = sum((row["cost"] for row in entries), Decimal(0))
        surplus = sum((lied(run, row) for row in rows.to_pylist()), Decimal(0)) if run.lies else Decimal(0)
        assert total - surplus <= budget, f"{total} is spent of {budget}, of which {surplus} by lies"


def lied(run: Run, row: dict[str, Any]) -> Decimal:
    """USD by which an attempt cost more than its worst case: nothing but what was in flight when it was seen."""
    spec = run.spec(row["pool"])
    prices = spec.price.unit_prices
    if run.ways[spec.name].usage != "lies" or row["usage_source"] != "reported":
        return Decimal(0)
    # A liar says 50 times the input and 5,000, where 4 times it and 64 is the worst, and 3 times the output.
    ours = (row["input_tokens"] - 5_000) // 50
    dearest = max(prices.get(meter, Decimal(0)) for meter in ("uncached_input", "cached_input", "cache_write"))
    worst = (WORST_ESTIMATE * ours + WORST_TEMPLATE_TOKENS) * dearest + row["output_tokens"] // 3 * prices["output"]
    worst += prices.get("request", Decimal(0))
    return max(row["cost"] - worst * run.rate(spec), Decimal(0))
