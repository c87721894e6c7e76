"""Quote: plans the run in a scratch directory of this machine and clears one round of the market; sends nothing."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bidbeam.connectors.inputs import plan_input
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.store import Store
from bidbeam.pipelines.begin import make_context, model_facts, places, prepare_models, render_spec
from bidbeam.pipelines.job import Job, check_fx
from bidbeam.pipelines.known import known_pools
from bidbeam.pipelines.offers import coverage, expected_bill, offers, worst_bill
from bidbeam.pipelines.resolving import resolve
from bidbeam.pipelines.summary import Quote
from bidbeam.transforms.rendering import check_columns
from bidbeam.transforms.run_context import RunContext

if TYPE_CHECKING:
    from bidbeam.connectors.inputs import InputPlan
    from bidbeam.transforms.decisions import Decision


def quote_job(job: Job, *, rehearse: bool = False, now: datetime | None = None) -> Quote:
    """What the run would buy, from whom, for how much and by when; ``rehearse``: what its rehearsal would.

    Rests on what the ledger's earlier runs showed of the pools. Raises UsageError as the run itself would.
    """
    started_at = now or datetime.now(UTC)
    job = resolve(job, started_at)
    check_fx(job, started_at)
    with tempfile.TemporaryDirectory(prefix="bidbeam-quote-") as scratch, ThreadPoolExecutor(4) as workers:
        models = prepare_models(job, workers)
        plan = plan_input(job.input, job.storage)
        spec = render_spec(job, plan)
        check_columns(spec, plan.schema)
        facts = model_facts(job, {name: future.result() for name, future in models.items()}, rehearse=True)
        context = make_context(
            job, plan, spec, facts, Store.at(scratch), Store.at(f"{scratch}/ledger"), started_at,
            rehearse=True, manifest=None,
        )  # fmt: skip
        context = replace(context, known=known_pools(job, places(job, rehearse=rehearse)[1], started_at))
        counts, decision = _plan(replace(context, rounds=1), plan)
        return _quote(job, context, counts, decision)


def _plan(context: RunContext, plan: InputPlan) -> tuple[Counter[str], Decision | None]:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    from bidbeam.transforms import decisions
    from bidbeam.transforms.bid import Bid
    from bidbeam.transforms.failures import failure_of
    from bidbeam.transforms.plan_lots import PlanLots
    from bidbeam.transforms.read_prompts import ReadPrompts

    found: Counter[str] = Counter()
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
    if context.scratch.exists(_COUNTS):
        found.update(read_counts(context.scratch.read(_COUNTS)))
    return found, decisions.load(context, 1)


_COUNTS = "counts.json"


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: Beam wraps whatever passes through a stage."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_counts(data: bytes) -> dict[str, int]:
    """The counts that ``_write_counts`` wrote."""
    import json

    counts: dict[str, int] = json.loads(data)
    return counts


def _write_counts(context: RunContext, spills: Sequence[Any], ranges: Sequence[Any]) -> Iterator[None]:
    import json

    counts = {
        "dead": sum(spill.dead for spill in spills),
        "input_tokens": sum(spill.input_tokens for spill in spills),
        "ideal_cached_tokens": sum(ref.ideal_cached_tokens for ref in ranges),
    }
    context.scratch.replace(_COUNTS, json.dumps(counts).encode())
    yield from ()


def _quote(job: Job, context: RunContext, counts: Counter[str], decision: Decision | None) -> Quote:
    estimated = any(facts.directory is None for facts in context.models.values())
    common: dict[str, Any] = {
        "run_id": job.run_id,
        "requests": context.rows,
        "input_tokens": counts["input_tokens"],
        "ideal_cached_tokens": counts["ideal_cached_tokens"],
        "estimated": estimated,
        "dead_invalid": counts["dead"],
        "deadline_at": context.deadline_at,
        "budget": context.max_cost,
    }
    if decision is None:
        return Quote(expected_cost=Decimal(0), worst_case_cost=Decimal(0), **common)
    awards, bids, lots = decision.tables["awards"], decision.tables["bids"], decision.tables["lots"]
    auction = decision.tables["auctions"].to_pylist()[0]
    internal = any(pool.settlement == "internal" for pool in context.pools)
    bill = expected_bill(context, decision)
    pools = tuple(replace(offer, expected_cost=bill.get(offer.pool, Decimal(0))) for offer in offers(context, decision))
    finishes = [pool.finish_s for pool in pools if pool.lots]
    unserved: Counter[str] = Counter()
    for table in (decision.waiting, decision.refused):
        for reason, requests in zip(
            table.column("last_error").to_pylist(), table.column("requests").to_pylist(), strict=True
        ):
            unserved[reason] += requests
    uncovered, served = coverage(decision)
    expected = sum(bill.values(), Decimal(0))
    return Quote(
        expected_cost=expected if context.max_cost is None else min(expected, context.max_cost),
        uncovered=uncovered,
        expected_served=served,
        worst_case_cost=worst_bill(context, decision, job.auction.rounds),
        reserved_cost=sum_decimal(awards.column("reserved")),
        pools=pools,
        lots=lots.num_rows,
        unserved=dict(unserved),
        lp_bound=auction["lp_bound"],
        regret=auction["regret"],
        payment=context.payment,
        rent=sum_decimal(awards.column("rent")) if internal else None,
        finish_at=_latest(context, finishes),
        baseline_cost=_baseline(context, lots, bids, awards),
        **common,
    )


def _latest(context: RunContext, finishes: Sequence[float | None]) -> datetime | None:
    known = [finish for finish in finishes if finish is not None]
    if not known or len(known) < len(finishes):
        return None
    return context.started_at + timedelta(seconds=max(known))


def _baseline(context: RunContext, lots: pa.Table, bids: pa.Table, awards: pa.Table) -> Decimal | None:
    """The baseline's bill for what the awards are expected to use."""
    if context.baseline is None or not awards.num_rows:
        return None
    pairs = set(
        zip(awards.column("lot_id").to_pylist(), awards.column("pool").cast(pa.string()).to_pylist(), strict=True)
    )
    lot_ids = lots.column("lot_id").to_pylist()
    inputs = dict(zip(lot_ids, lots.column("input_tokens").to_pylist(), strict=True))
    models = dict(zip(lot_ids, lots.column("model").cast(pa.string()).to_pylist(), strict=True))
    requests = dict(zip(lot_ids, lots.column("requests").to_pylist(), strict=True))
    total = Decimal(0)
    columns = ("lot_id", "pool", "expected_cached_tokens", "expected_output_tokens")
    for lot, pool, cached, output in zip(
        *(bids.column(c).cast(pa.string() if c == "pool" else bids.column(c).type).to_pylist() for c in columns),
        strict=True,
    ):
        if (lot, pool) in pairs:
            baseline = context.baseline.of(models[lot])
            if baseline is None:
                return None
            price = baseline.cached_input
            reused = cached if price is not None else 0
            total += (inputs[lot] - reused) * baseline.input + reused * (price or 0) + output * baseline.output
            total += requests[lot] * (baseline.request or 0)
    return total
