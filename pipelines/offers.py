"""What each pool offers a job, read from one cleared round: its price, its bill, its capacity, its part, or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.pools import METERS, PoolSpec
from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.quoted_rows import Behind
from bidbeam.pipelines.summary import QuotePool
from bidbeam.transforms.lots import TAKEN_OVER
from bidbeam.transforms.pricing import bill
from bidbeam.transforms.reputation import Reputation
from bidbeam.transforms.run_context import RunContext

if TYPE_CHECKING:
    from bidbeam.transforms.decisions import Decision
    from bidbeam.transforms.expecting import PoolState

_PPM = 1_000_000


def offers(context: RunContext, decision: Decision) -> tuple[QuotePool, ...]:
    """A row for each pool of the job, in the job's order."""
    awards, bids, lots = decision.tables["awards"], decision.tables["bids"], decision.tables["lots"]
    reasons = {
        reason for left in (decision.waiting, decision.refused) for reason in _texts(left, "last_error") if reason
    }
    beaten = "others bid less" if len(awards) else ", ".join(("no lot was awarded", *sorted(reasons)))
    poor = context.max_cost if not len(awards) and "budget" in reasons else None
    found = []
    for spec in context.pools:
        mine, offered = _of(awards, spec.name), _of(bids, spec.name)
        why_not = None if mine.num_rows else _why_not(offered, poor, beaten)
        found.append(replace(_offer(context, spec, mine, offered, lots), why_not=why_not))
    return tuple(found)


def least_budget(bids: pa.Table) -> Decimal:
    """USD that it takes to reserve every lot that anybody may serve, each at the pool where it may cost least."""
    worst = bids.filter(bids.column("eligible")).select(["lot_id", "worst_case_cost"])
    return sum_decimal(worst.group_by("lot_id").aggregate([("worst_case_cost", "min")]).column("worst_case_cost_min"))


def expected_bill(context: RunContext, decision: Decision) -> dict[str, Decimal]:
    """Pool -> what its awards are expected to cost in the end (USD): the bill, and its failures' second tries.

    A try that fails costs what such tries have cost, and the request is then bought again: from the same pool as often
    as that came to an answer before, else from the runner-up. An engine paid by time also loads and idles, as long as
    it did in earlier runs; a node that none of them rented comes up in the time that it declares.
    """
    awards, bids = decision.tables["awards"], decision.tables["bids"]
    asked = _by_lot_and_pool(bids, "expected_cost")
    lots = decision.tables["lots"]
    models = dict(zip(_texts(lots, "lot_id"), _texts(lots, "model"), strict=True))
    found: dict[str, Decimal] = {}
    columns = (_texts(awards, "lot_id"), _texts(awards, "pool"), _texts(awards, "runner_up"))
    for lot, pool, second in zip(*columns, strict=True):
        # Not the price paid: what a payment rule adds to it is a transfer inside the house, and no charge.
        paid = asked[lot, pool]
        known = context.known.get((pool, models[lot]), Reputation())
        shares = (known.seen_failure_rate, known.failed_cost, known.retried_here)
        fails, charged, here = (Decimal(round(share * _PPM)) / _PPM for share in shares)
        again = here * paid + (1 - here) * asked.get((lot, second), paid)
        found[pool] = found.get(pool, Decimal(0)) + paid * (1 - fails + fails * charged) + fails * again
    for spec in context.pools:
        if spec.name in found:
            found[spec.name] += _overhead_cost(context, spec)
    for spec, lots in _at_providers(context, decision):
        found[spec.name] = found.get(spec.name, Decimal(0)) + sum_decimal(_bills(context, spec, lots))
    return found


def _at_providers(context: RunContext, decision: Decision) -> Iterator[tuple[PoolSpec, pa.Table]]:
    """Pools with the lots (LOT) that earlier starts have handed them in batches: these are collected, not auctioned."""
    for task in decision.tasks:
        for award in task.awards:
            lots = award.lots.filter(pc.ends_with(award.lots.column("lot_id"), TAKEN_OVER))
            if lots.num_rows:
                yield next(spec for spec in context.pools if spec.name == award.pool), lots


def _bills(context: RunContext, spec: PoolSpec, lots: pa.Table, *, worst: bool = False) -> pa.Array:
    """What each of these lots (LOT) may be expected to cost on a pool, or would cost at worst (COST)."""
    from bidbeam.transforms.expecting import LotColumns, expected_usage, worst_usage

    usage = (worst_usage if worst else expected_usage)(LotColumns.of(lots), _state(context, spec))
    return bill(usage, spec.price, context.fx_rates.get(spec.price.currency, Decimal(1)))


def overhead_unknown(context: RunContext, pool: str) -> bool:
    """Whether a pool is an engine of which nothing says how long it loads and idles: no bill of it has that in it."""
    spec = next(each for each in context.pools if each.name == pool)
    seen = (context.known.get((pool, model), Reputation()) for model in spec.models)
    return spec.price.by_time and spec.kind == "vllm" and all(each.overhead_s is None for each in seen)


def _overhead_cost(context: RunContext, spec: PoolSpec) -> Decimal:
    seen = [known.overhead_s for model in spec.models if (known := context.known.get((spec.name, model)))]
    # A node that was never rented takes as long to come up as it is said to.
    seconds = max((each for each in seen if each is not None), default=_state(context, spec).setup_s)
    rate = context.fx_rates.get(spec.price.currency, Decimal(1))
    return spec.price.unit_prices.get("accelerator_second", Decimal(0)) * Decimal(f"{seconds:.3f}") * rate


def worst_bill(context: RunContext, decision: Decision, rounds: int) -> Decimal | None:
    """The most that all rounds can cost (USD): each request may fail, at its full price, in every round but the last;
    None where nothing bounds it.

    In a round it may be charged ``CHARGED_TRIES`` times by the pool that won it and as often by the runner-up, where
    there is one; whoever serves it asks at most the dearest of the lot's worst cases. Engines paid by time may load and
    idle for as long as a budget lets them; without a budget nothing bounds the time of one that may serve a lot. A
    budget, as far as earlier starts have left of it, bounds it all.
    """
    from bidbeam.transforms.bid import held_s
    from bidbeam.transforms.retrying import CHARGED_TRIES

    awards, bids = decision.tables["awards"], decision.tables["bids"]
    timed = [spec for spec in context.pools if spec.price.by_time]
    if context.max_cost is None and any(pc.any(_of(bids, spec.name).column("eligible")).as_py() for spec in timed):
        return None
    worst_of = _by_lot_and_pool(bids, "worst_case_cost")
    won = zip(_texts(awards, "lot_id"), _texts(awards, "pool"), strict=True)
    total = sum((worst_of[each] for each in won), Decimal(0))
    if bids.num_rows:
        worst = bids.select(["lot_id", "worst_case_cost"]).group_by("lot_id")
        worst = worst.aggregate([("worst_case_cost", "max"), ("worst_case_cost", "count")])
        dearest = worst.column("worst_case_cost_max").combine_chunks()
        several = pc.greater(worst.column("worst_case_cost_count"), 1).combine_chunks()
        total += (rounds - 1) * sum_decimal(dearest.drop_null())
        total += rounds * sum_decimal(dearest.filter(several))
    total *= CHARGED_TRIES
    for spec, lots in _at_providers(context, decision):
        total += sum_decimal(_bills(context, spec, lots, worst=True))
        # What the batch does not answer is bought in the rounds after this one.
        anew = [_bills(context, each, lots, worst=True) for each in context.pools if not each.price.by_time]
        total += (rounds - 1) * 2 * CHARGED_TRIES * sum_decimal(pc.max_element_wise(*anew))
    if context.max_cost is None:
        return total
    for spec in timed:
        rate = context.fx_rates.get(spec.price.currency, Decimal(1))
        seconds = sum(held_s(number, spec) for number in range(1, rounds + 1)) * spec.capacity.workers
        # Each model is loaded by engines of its own.
        seconds *= sum(model in context.models for model in spec.models)
        total += spec.price.unit_prices["accelerator_second"] * Decimal(seconds) * rate
    return min(total, max(context.max_cost - context.spent, Decimal(0)))


def baseline_bill(context: RunContext, decision: Decision, behind: Mapping[str, Behind]) -> Decimal | None:
    """The baseline's bill (USD) for what the awards are expected to use, and again for the rows ``behind`` each lot,
    which share its answers; None where there is no baseline, no award, or no price of a model."""
    awards, bids, lots = (decision.tables[name] for name in ("awards", "bids", "lots"))
    if context.baseline is None or not awards.num_rows:
        return None
    by_lot = {lot["lot_id"]: lot for lot in lots.to_pylist()}
    cached, output = (_by_lot_and_pool(bids, name) for name in ("expected_cached_tokens", "expected_output_tokens"))
    total = Decimal(0)
    for won in zip(_texts(awards, "lot_id"), _texts(awards, "pool"), strict=True):
        lot, more = by_lot[won[0]], behind.get(won[0], Behind())
        baseline = context.baseline.of(lot["model"])
        if baseline is None:
            return None
        input_, answers = lot["input_tokens"] + more.input_tokens, lot["requests"] + more.rows
        # Whoever shares an answer is counted as who got it: with as much of it from the cache, and as long.
        reused = 0 if baseline.cached_input is None else cached[won] * input_ // max(lot["input_tokens"], 1)
        most = lot["max_output_tokens"]
        told = output[won] * (most + more.max_output_tokens) // max(most, 1)
        total += (input_ - reused) * baseline.input + reused * (baseline.cached_input or 0) + told * baseline.output
        total += answers * (baseline.request or 0)
    return total


def coverage(decision: Decision) -> tuple[int, int]:
    """How many requests of the awards the budget does not cover at their worst, and how many are expected to be served.

    Of a lot that is covered in part so many of its requests count as the part of its worst case that is reserved. The
    lots are served in the order of ``clearing``, until their expected bills have used up what there was to reserve.
    """
    awards, bids, lots = (decision.tables[name] for name in ("awards", "bids", "lots"))
    budget = next(iter(decision.tables["auctions"].column("budget").to_pylist()), None)
    requests = dict(zip(_texts(lots, "lot_id"), lots.column("requests").to_pylist(), strict=True))
    expected, worst = (_by_lot_and_pool(bids, name) for name in ("expected_cost", "worst_case_cost"))
    uncovered = served = 0
    left, waiting = budget, list[tuple[Decimal, int, Decimal]]()
    for lot, pool, reserved, score in zip(
        _texts(awards, "lot_id"),
        _texts(awards, "pool"),
        *(awards.column(name).to_pylist() for name in ("reserved", "score")),
        strict=True,
    ):
        count, bill, most = requests[lot], expected[lot, pool], worst[lot, pool]
        if reserved == most:
            served += count
            left = None if left is None else max(left - bill, Decimal(0))
        else:
            uncovered += count - int(count * reserved / most)
            waiting.append((score / max(count, 1), count, bill))
    for _, count, bill in sorted(waiting):
        served += count if left is None or bill <= left else int(count * left / bill)
        left = None if left is None else max(left - bill, Decimal(0))
    return uncovered, served


def _offer(context: RunContext, spec: PoolSpec, mine: pa.Table, offered: pa.Table, lots: pa.Table) -> QuotePool:
    won = mine.column("lot_id").combine_chunks()
    may = offered.filter(offered.column("eligible"))
    known = [context.known[spec.name, model] for model in spec.models if (spec.name, model) in context.known]
    seen = max(known, key=lambda each: each.answers, default=Reputation())
    failing = [each.seen_failure_rate for each in known if each.successes + each.failures]
    return QuotePool(
        pool=spec.name,
        price=price_text(spec),
        lots=mine.num_rows,
        requests=pc.sum(lots.column("requests").filter(pc.is_in(lots.column("lot_id"), value_set=won))).as_py() or 0,
        expected_cost=sum_decimal(mine.column("price_paid")),
        worst_case_cost=sum_decimal(mine.column("reserved")),
        finish_s=_finish_s(context, spec, won, lots) if mine.num_rows else None,
        capacity=capacity_text(spec, seen.tokens_per_second),
        asks=sum_decimal(may.column("expected_cost")) if may.num_rows else None,
        asks_lots=may.num_rows,
        answers=sum(each.answers for each in known),
        failure_rate=max(failing) if failing else None,
        uptime=seen.uptime,
        latency_p95_s=seen.latency_p95_s,
        tokens_per_second=seen.tokens_per_second,
        cache_share=seen.cache_share,
        output_share=seen.output_share,
        output_share_p95=seen.output_share_p95,
        excess=seen.excess,
        misnamed=seen.misnamed,
        newcomer=any(each.newcomer for each in known),
    )


def _finish_s(context: RunContext, spec: PoolSpec, won: pa.Array, lots: pa.Table) -> float | None:
    """Seconds from now until the pool is done with its lots; None where its speed is unknown."""
    from bidbeam.transforms.bidding import LotColumns, expected_usage, speed_of

    state = _state(context, spec)
    here = lots.filter(pc.is_in(lots.column("lot_id"), value_set=won))
    # The ledger's lots have no need of the longest request; it decides nothing here.
    columns = LotColumns.of(here.append_column("longest_tokens", here.column("max_input_tokens")))
    usage = expected_usage(columns, state)
    seconds = (usage.uncached + usage.output) / speed_of(columns, state)
    if spec.kind == "batch":
        seconds = np.nan_to_num(seconds, nan=0.0)
    return None if np.isnan(seconds).any() else float(seconds.sum()) + state.turnaround_s + state.loading_s


def _state(context: RunContext, spec: PoolSpec) -> PoolState:
    """The pool as the first round's auction sees it."""
    from bidbeam.transforms.bid import pool_states

    return next(each for each in pool_states(context, context.started_at) if each.spec.name == spec.name)


def _why_not(offered: pa.Table, poor: Decimal | None, beaten: str) -> str:
    """Why a pool was awarded nothing; ``poor`` is the budget where that covers no lot at all."""
    may = offered.filter(offered.column("eligible"))
    if poor is not None and may.num_rows:
        least = usd(pc.min(may.column("worst_case_cost")).as_py())
        return f"the budget of {usd(poor)} covers no lot: one reserves {least} or more"
    reasons = [reason for reason in _texts(offered, "reject_reason") if reason]
    if reasons:
        reason, count = Counter(reasons).most_common(1)[0]
        return f"{reason} ({count} of {offered.num_rows} lots)" if count < offered.num_rows else reason
    return beaten


def capacity_text(spec: PoolSpec, measured: float | None) -> str:
    """How much a pool takes at once and how fast it is, as people read it; ``seen`` marks what the ledger measured."""
    parts = []
    if spec.kind == "vllm" and spec.capacity.workers > 1:
        parts.append(f"{spec.capacity.workers} engines")
    if spec.capacity.concurrency is not None:
        parts.append(f"{spec.capacity.concurrency:,} at once")
    if measured is not None:
        parts.append(f"{measured:,.0f} tokens/s seen")
    elif spec.capacity.tokens_per_second is not None:
        parts.append(f"{spec.capacity.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)


def price_text(spec: PoolSpec) -> str:
    """A pool's price as people read it."""
    prices = spec.price.unit_prices
    currency = spec.price.currency
    if spec.price.by_time:
        return f"{(prices['accelerator_second'] * 3600).quantize(Decimal('0.0001')).normalize():f} {currency} per hour"
    named = {"uncached_input": "input", "cached_input": "cached", "output": "output"}
    meters = [meter for meter in METERS if meter in named and meter in prices]
    million = " / ".join(f"{(prices[meter] * 1_000_000).normalize():f}" for meter in meters)
    text = f"{million} {currency} per 1M {' / '.join(named[meter] for meter in meters)} tokens"
    return text + (f" + {prices['request'].normalize():f} a request" if "request" in prices else "")


def _of(table: pa.Table, pool: str) -> pa.Table:
    return table.filter(pc.equal(table.column("pool").cast(pa.string()), pool))


def _texts(table: pa.Table, column: str) -> Sequence[str]:
    texts: list[str] = table.column(column).cast(pa.string()).to_pylist()
    return texts


def _by_lot_and_pool(bids: pa.Table, column: str) -> dict[tuple[str, str], Any]:
    may = bids.filter(bids.column("eligible"))
    keys = zip(_texts(may, "lot_id"), _texts(may, "pool"), strict=True)
    return dict(zip(keys, may.column(column).to_pylist(), strict=True))
