"""Quote: plans the run in a scratch directory of this machine and clears one round of the market; sends nothing.

What earlier starts of the run have settled is looked up in its journal, as the run would, and not priced again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.inputs import plan_input
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.schemas import AUCTIONS, AWARDS, BIDS, LOTS
from bidbeam.connectors.store import Store
from bidbeam.pipelines.begin import make_context, model_facts, more_to_do, places, prepare_models, render_spec
from bidbeam.pipelines.earlier import look_at
from bidbeam.pipelines.job import Job, check_fx, check_input
from bidbeam.pipelines.known import known_pools
from bidbeam.pipelines.offers import (
    baseline_bill,
    coverage,
    expected_bill,
    least_budget,
    offers,
    overhead_unknown,
    worst_bill,
)
from bidbeam.pipelines.quoted_rows import count_rows
from bidbeam.pipelines.resolving import resolve
from bidbeam.pipelines.summary import Quote
from bidbeam.transforms.finishing import read_manifest
from bidbeam.transforms.run_context import RunContext

if TYPE_CHECKING:
    from bidbeam.connectors.inputs import InputPlan
    from bidbeam.transforms.decisions import Decision
    from bidbeam.transforms.merging import RangeRef
    from bidbeam.transforms.spilling import SpillRef

_MARKET = {"lots": LOTS, "bids": BIDS, "awards": AWARDS, "auctions": AUCTIONS}


def quote_job(job: Job, *, rehearse: bool = False, now: datetime | None = None) -> Quote:
    """What the run would still buy, from whom, for how much and by when; ``rehearse``: what its rehearsal would.

    Rests on what the ledger's earlier runs showed of the pools, and on what earlier starts of this run have settled.
    Raises UsageError as the run itself would.
    """
    started_at = now or datetime.now(UTC)
    job = resolve(job, started_at)
    check_fx(job, started_at)
    with tempfile.TemporaryDirectory(prefix="bidbeam-quote-") as scratch, ThreadPoolExecutor(4) as workers:
        models = prepare_models(job, workers)
        plan = plan_input(job.input, job.storage)
        spec = render_spec(job, plan)
        check_input(job, spec, plan.schema)
        facts = model_facts(job, {name: future.result() for name, future in models.items()}, rehearse=True)
        run_dir, ledger = places(job, rehearse=rehearse)
        manifest = read_manifest(run_dir)
        context = make_context(
            job, plan, spec, facts, run_dir, Store.at(f"{scratch}/ledger"), started_at,
            rehearse=True, earlier=look_at(run_dir.child("_journal"), manifest),
        )  # fmt: skip
        if manifest is not None and not more_to_do(manifest, plan):
            return _nothing_to_do(context, manifest)
        known = known_pools(job, ledger, started_at)
        context = replace(context, known=known, scratch_home=Store.at(scratch))
        planned, decision = _plan(replace(context, rounds=1), plan)
        return _quote(job, context, planned, decision)


def _nothing_to_do(context: RunContext, manifest: Mapping[str, Any]) -> Quote:
    return Quote(
        run_id=context.run_id,
        requests=context.rows,
        input_tokens=0,
        ideal_cached_tokens=0,
        estimated=False,
        dead_invalid=manifest["dead"].get("invalid", 0),
        settled=context.rows - manifest["dead"].get("invalid", 0),
        expected_cost=Decimal(0),
        worst_case_cost=Decimal(0),
        spent=context.spent,
        budget=context.max_cost,
    )


class _Planned(NamedTuple):
    """What planning found: rows that were bad when they were read, and the ranges that have an order."""

    unread: int
    ranges: Sequence[int]


def _plan(context: RunContext, plan: InputPlan) -> tuple[_Planned, Decision | None]:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    from bidbeam.transforms import decisions
    from bidbeam.transforms.bid import Bid
    from bidbeam.transforms.failures import failure_of
    from bidbeam.transforms.plan_lots import PlanLots
    from bidbeam.transforms.read_prompts import ReadPrompts

    try:
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            planned = pipeline | "Read" >> ReadPrompts(plan.splits) | "Plan" >> PlanLots(context, plan.splits)
            _ = planned.lots | "Bid" >> Bid(context, 1, ())
            _ = (
                pipeline
                | "Count" >> beam.Create([context], reshuffle=False)
                | "Write counts" >> beam.FlatMap(_write_counts, planned.all_spills, planned.all_ranges)
            )
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from None
        cause = failure_of(context.scratch)
        if cause is not None:
            raise cause from error
        raise
    return _Planned(**json.loads(context.scratch.read(_COUNTS))), decisions.load(context, 1)


_COUNTS = "counts.json"


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: Beam wraps whatever passes through a stage."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_counts(context: RunContext, spills: Sequence[SpillRef], ranges: Sequence[RangeRef]) -> Iterator[None]:
    counts = _Planned(sum(spill.dead for spill in spills), sorted(ref.range for ref in ranges))
    context.scratch.replace(_COUNTS, json.dumps(counts._asdict()).encode())
    yield from ()


def _quote(job: Job, context: RunContext, planned: _Planned, decision: Decision | None) -> Quote:
    tables: dict[str, pa.Table] = {name: schema.empty_table() for name, schema in _MARKET.items()}
    found: list[pa.Table] = []
    if decision is not None:
        # Where all that is left is at providers already, there was no auction.
        decision = replace(decision, tables=tables | decision.tables)
        tables = decision.tables
        found = [award.lots for task in decision.tasks for award in task.awards]
        found += [decision.waiting, decision.refused]
    rows = count_rows(context, planned.ranges, found)
    common: dict[str, Any] = {
        "run_id": job.run_id,
        "requests": context.rows,
        "to_ask": sum(pc.sum(table.column("requests")).as_py() or 0 for table in found),
        "settled": rows.settled,
        "shared": rows.shared,
        "input_tokens": pc.sum(tables["lots"].column("input_tokens")).as_py() or 0,
        "ideal_cached_tokens": pc.sum(tables["lots"].column("ideal_cached_tokens")).as_py() or 0,
        "estimated": any(facts.directory is None for facts in context.models.values()),
        "dead_invalid": planned.unread + rows.repeated,
        "deadline_at": context.deadline_at,
        "budget": context.max_cost,
        "spent": context.spent,
    }
    if decision is None:
        return Quote(expected_cost=Decimal(0), worst_case_cost=Decimal(0), **common)
    awards = tables["awards"]
    auction: dict[str, Any] = next(iter(tables["auctions"].to_pylist()), {})
    internal = any(pool.settlement == "internal" for pool in context.pools)
    bill = expected_bill(context, decision)
    pools = tuple(replace(offer, expected_cost=bill.get(offer.pool, Decimal(0))) for offer in offers(context, decision))
    finishes = [pool.finish_s for pool in pools if pool.lots]
    unserved = rows.unserved((decision.waiting, decision.refused))
    uncovered, served = coverage(decision)
    expected = sum(bill.values(), Decimal(0))
    budget = None if context.max_cost is None else max(context.max_cost - context.spent, Decimal(0))
    return Quote(
        expected_cost=expected if budget is None else min(expected, budget),
        uncovered=uncovered,
        expected_served=served,
        worst_case_cost=worst_bill(context, decision, job.auction.rounds),
        reserved_cost=sum_decimal(awards.column("reserved")),
        pools=pools,
        lots=tables["lots"].num_rows,
        unserved=unserved,
        needed=least_budget(tables["bids"]) if unserved.get("budget") else None,
        lp_bound=auction.get("lp_bound"),
        regret=auction.get("regret"),
        payment=context.payment,
        rent=sum_decimal(awards.column("rent")) if internal else None,
        finish_at=_latest(context, finishes),
        baseline_cost=baseline_bill(context, decision, rows.behind),
        overhead_unknown=tuple(pool.pool for pool in pools if pool.lots and overhead_unknown(context, pool.pool)),
        **common,
    )


def _latest(context: RunContext, finishes: Sequence[float | None]) -> datetime | None:
    known = [finish for finish in finishes if finish is not None]
    if not known or len(known) < len(finishes):
        return None
    return context.started_at + timedelta(seconds=max(known))
