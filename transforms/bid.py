"""Bid: one round of the market. All lots that wait are auctioned at once; awards become shifts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.pvalue import AsList, PCollection, TaggedOutput

from bidbeam.connectors.lease_terms import LeaseTerms
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.schemas import COST, LOTS
from bidbeam.transforms import decisions
from bidbeam.transforms.adopting import adopt, with_adopted
from bidbeam.transforms.affinity import with_holders
from bidbeam.transforms.bidding import BidMatrix, PoolState, make_bids, prior_state
from bidbeam.transforms.clearing import Clearing, clear
from bidbeam.transforms.cutting import cut_to_fit
from bidbeam.transforms.decisions import Decision
from bidbeam.transforms.failures import reported
from bidbeam.transforms.heartbeat import so_far
from bidbeam.transforms.journal import SegmentRef, spent_on
from bidbeam.transforms.lots import LOT
from bidbeam.transforms.market import Ints
from bidbeam.transforms.next_best import next_best
from bidbeam.transforms.outage import wait_out
from bidbeam.transforms.region_check import believed
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms
from bidbeam.transforms.shift_task import Award, ShiftTask
from bidbeam.transforms.side_inputs import listed
from bidbeam.transforms.withdrawing import prefer_untried, without_pools, worth_setting_up

_WAITING, _REFUSED = "waiting", "refused"
_SETUP_HELD_S, _IDLE_HELD_S = 300.0, 60.0
_LOTS_TO_SHARE = 64
_NEVER = frozenset({"no_eligible_pool", "too_long"})
"""Reasons that no later round of this start can mend."""


class Market(NamedTuple):
    """What Bid gives."""

    shifts: PCollection[Any]
    """``ShiftTask``: each worker's pools with their lots in order."""
    waiting: PCollection[Any]
    """LOT tables: not awarded in this round (budget, deadline, capacity)."""
    refused: PCollection[Any]
    """LOT tables: nobody may serve these."""


class Bid(beam.PTransform[Any, Any]):
    """PCollection of LOT tables to ``Market``. ``spent`` are the segments of the rounds before, for the budget."""

    def __init__(self, context: RunContext, round_: int, spent: Sequence[PCollection[Any]]) -> None:
        super().__init__()
        self._context, self._round, self._spent = context, round_, spent

    def expand(self, lots: PCollection[Any]) -> Market:
        pipeline = lots.pipeline
        spent = (self._spent or (pipeline | "Nothing spent" >> beam.Create([], reshuffle=False),)) | (
            "Segments so far" >> beam.Flatten()
        )
        cleared = (
            pipeline
            | "Call for bids" >> beam.Create([self._round], reshuffle=False)
            | "Clear"
            >> beam.ParDo(_Clear(self._context), listed(lots, "All lots"), AsList(spent)).with_outputs(
                _WAITING, _REFUSED, main="shifts"
            )
        )
        return Market(cleared.shifts, cleared[_WAITING], cleared[_REFUSED])


class _Clear(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(
        self, round_: int, lots: Sequence[pa.Table], segments: Sequence[SegmentRef]
    ) -> Iterator[ShiftTask | TaggedOutput[str, Any]]:
        with reported(self._context):
            found = [table for table in lots if table.num_rows]
            if not found and not self._may_adopt(round_):
                return
            decision = decisions.load(self._context, round_)
            if decision is None:
                ordered = pa.concat_tables(found or [LOT.empty_table()])
                ordered = ordered.sort_by([("range", "ascending"), ("start", "ascending")])
                wait_out(self._context, round_, ordered)
                spent = self._context.spent + spent_on(segments)
                decision = self._decide(round_, ordered, spent)
                if decision is None:
                    return
                decision = decisions.keep(self._context, decision)
            yield from decision.tasks
            if decision.waiting.num_rows:
                yield TaggedOutput(_WAITING, decision.waiting)
            if decision.refused.num_rows:
                yield TaggedOutput(_REFUSED, decision.refused)

    def _may_adopt(self, round_: int) -> bool:
        """Whether an earlier start can have left something at a provider."""
        return round_ == 1 and self._context.start > 1

    def _decide(self, round_: int, lots: pa.Table, spent: Decimal) -> Decision | None:
        """The round's decision; None where there is nothing to decide on."""
        context = self._context
        adopted = None
        if self._may_adopt(round_):
            lots, adopted = adopt(context, lots, partial(_terms_by_name, context))
            spent += adopted.reserved if adopted is not None else Decimal(0)
        decision = decide(context, round_, lots, spent, datetime.now(UTC)) if lots.num_rows else None
        if adopted is None:
            return decision
        return with_adopted(context, round_, decision, adopted, partial(_terms_by_name, context), lots_table)


def pool_states(context: RunContext, now: datetime, round_: int = 1) -> list[PoolState]:
    """What the auction of a round knows of each pool."""
    states = []
    for spec in context.pools:
        blocks = [context.models[model].cache_block for model in spec.models if model in context.models]
        contexts = [context.render.longest_context.get(model) for model in spec.models]
        known = [length for length in contexts if length is not None]
        state = prior_state(
            spec,
            now=now,
            context=spec.context
            if spec.context is not None
            else (min(known) if spec.kind == "vllm" and known else None),
            cache_block=blocks[0] if blocks and spec.kind == "vllm" else None,
        )
        states.append(_setting_up(context, _with_history(context, state), now, round_))
    return states


def _with_history(context: RunContext, state: PoolState) -> PoolState:
    """The pool with what the ledger's earlier runs taught of it.

    A speed that nobody declared bounds a pool only where it refused more than that, and only before a deadline:
    without one it would spread the lots over dearer pools to no one's use.
    """
    spec = state.spec
    of_model = {model: context.known[spec.name, model] for model in spec.models if (spec.name, model) in context.known}
    limits = [known.limit_tokens_per_second for known in of_model.values() if known.limit_tokens_per_second]
    walled = context.deadline_at is not None and state.tokens_per_second is None and limits
    return replace(state, of_model=of_model, tokens_per_second=max(limits) if walled else state.tokens_per_second)


def _setting_up(context: RunContext, state: PoolState, now: datetime, round_: int) -> PoolState:
    """The pool with how long it takes until it serves, where earlier runs have seen that.

    A node is rented anew in every round. An engine of ours loads once, from the run's start on.
    """
    seen = max((known.setup_s for known in state.of_model.values() if known.setup_s is not None), default=None)
    if seen is None:
        return state
    if state.spec.kind == "lease":
        return replace(state, turnaround_s=seen, setup_s=seen)
    if state.spec.kind != "vllm" or round_ > 1:
        return state
    passed = (now - context.started_at).total_seconds()
    return replace(state, loading_s=max(seen - passed, 0.0), setup_s=seen)


def decide(context: RunContext, round_: int, lots: pa.Table, spent: Decimal, now: datetime) -> Decision:
    """One round of the market over LOT rows in prefix order, with what is left of the budget. Writes nothing."""
    lots = lots.set_column(
        lots.schema.get_field_index("round"),
        LOT.field("round"),
        pa.repeat(pa.scalar(round_, pa.int16()), lots.num_rows),
    )
    budget = None if context.max_cost is None else max(context.max_cost - spent, Decimal(0))
    wanted = set(lots.column("model").to_pylist())
    before = so_far(context.scratch, round_) if round_ > 1 else {}
    if round_ > 1:
        # Who answered from elsewhere declares nothing any more: what restricts where it goes does not go there again.
        context = replace(context, pools=believed(context.journal, context.pools))
    states = pool_states(context, now, round_)
    pools, held = _afford_engines(context, round_, states, wanted, budget)

    def bids_for(lots: pa.Table) -> BidMatrix:
        return prefer_untried(
            make_bids(
                lots,
                pools,
                now=now,
                deadline=context.deadline_at,
                # What planning took is no part of the market's time.
                started_at=context.started_at if round_ > 1 else now,
                rates=context.fx_rates,
            ),
            lots.column("failed_on").to_pylist(),
            {name for name, pool in before.items() if pool.down},
        )

    def settled(first: Clearing) -> Clearing:
        def without_idle(cleared: Clearing) -> Clearing:
            return _without_idle(cleared, budget, held, context.payment)

        return worth_setting_up(
            without_idle(first), lambda fewer: without_idle(_cleared(fewer, budget, held, context.payment))
        )

    first = _cleared(bids_for(lots), budget, held, context.payment)
    cleared = settled(first)
    if (parts := cut_to_fit(context, lots, first)) is not None:
        again = settled(_cleared(bids_for(parts), budget, held, context.payment))
        if again.requests > cleared.requests:
            lots, cleared = parts, again
    lots = with_holders(lots, cleared.pool_of, [pool.spec.name for pool in cleared.bids.pools])
    reasons = [cleared.unserved.get(lot_id) for lot_id in lots.column("lot_id").to_pylist()]
    final = [reason in _NEVER for reason in reasons]
    left = lots.set_column(
        lots.schema.get_field_index("last_error"), LOT.field("last_error"), pa.array(reasons, pa.string())
    )
    return Decision(
        round=round_,
        tasks=tuple(shifts_of(context, round_, lots, cleared)),
        waiting=left.filter(pa.array([reason is not None and not f for reason, f in zip(reasons, final, strict=True)])),
        refused=left.filter(pa.array(final)),
        tables={
            "lots": lots_table(context, lots, cleared),
            "bids": cleared.bids_table(run_id=context.run_id, round_number=round_),
            "awards": cleared.awards_table(run_id=context.run_id, round_number=round_),
            "auctions": cleared.auction_table(run_id=context.run_id, round_number=round_),
        },
        reserved=cleared.committed,
    )


def _cleared(bids: BidMatrix, budget: Decimal | None, held: dict[str, Decimal], payment: str) -> Clearing:
    """Clears with what is left of the budget (USD) beside what engines are ``held`` for, by pool."""
    return clear(bids, budget=None if budget is None else budget - _held_for(bids, held), payment=payment)


def _held_for(bids: BidMatrix, held: dict[str, Decimal]) -> Decimal:
    bidding = {pool.spec.name for at, pool in enumerate(bids.pools) if bids.eligible[:, at].any()}
    return sum((cost for name, cost in held.items() if name in bidding), Decimal(0))


def _without_idle(cleared: Clearing, budget: Decimal | None, held: dict[str, Decimal], payment: str) -> Clearing:
    """Where lots wait for money, the clearing without the engines that won nothing, until what is held is held for
    those that work."""
    while cleared.rank.any() or "budget" in cleared.unserved.values():
        bids = cleared.bids
        bidding = [pool.spec.name for at, pool in enumerate(bids.pools) if bids.eligible[:, at].any()]
        idle = [name for name in bidding if held.get(name) and name not in cleared.lots_of]
        if not idle:
            break
        cleared = _cleared(without_pools(bids, idle, "capacity"), budget, held, payment)
    return cleared


def _terms_by_name(context: RunContext, pool: str, model: str) -> Terms:
    return terms_of(context, next(spec for spec in context.pools if spec.name == pool), model)


def terms_of(context: RunContext, spec: PoolSpec, model: str) -> Terms:
    """The terms of one pool and model, frozen for this start."""
    quote = context.fx.get(spec.price.currency)
    return Terms(
        pool=spec.name,
        model=model,
        price=spec.price,
        fx_rate=Decimal(1) if quote is None else quote.rate,
        fx_source=None if quote is None else quote.source,
        fx_at=None if quote is None else quote.at,
        jurisdiction=spec.placement.get("jurisdiction"),
        operator=spec.placement.get("operator"),
    )


def shifts_of(context: RunContext, round_: int, lots: pa.Table, cleared: Clearing) -> Iterator[ShiftTask]:
    """One shift per set of engines that can be driven together: remote pools and first engines share shift 0.

    A pool with several engines of ours has its lots cut into as many contiguous parts, one a shift; each model has
    engines of its own. What may be spent is each shift's own: they run side by side and cannot see each other's bills.
    """
    specs = {spec.name: spec for spec in context.pools}
    names = [state.spec.name for state in cleared.bids.pools]
    fallback = pa.array([names[at] if at >= 0 else None for at in cleared.fallback], pa.string())
    offered = lots.append_column("runner_up", fallback).append_column("next_best", next_best(cleared))
    for column, values in (("rank", cleared.rank), ("fallback_rank", cleared.fallback_rank)):
        offered = offered.append_column(column, pa.array(values))
    offered = offered.append_column("worst", pa.array(cleared.worst, COST))
    terms = {(name, model): terms_of(context, spec, model) for name, spec in specs.items() for model in spec.models}
    models, by_shift = lots.column("model").to_pylist(), dict[int, list[Award]]()
    may_cost, bound = _may_cost(cleared), dict[int, Decimal]()
    tight = set[int]()
    for name, won in cleared.lots_of.items():
        spec = specs[name]
        engines = spec.capacity.workers if spec.kind == "vllm" else 1
        if context.rehearse and len(won) >= _LOTS_TO_SHARE:
            # Stand-ins keep a core busy each: a large rehearsal takes two.
            engines = max(engines, 2)
        # Only a budget makes time a wall: without one a slow engine may take as long as it takes.
        walled = spec.price.by_time and context.max_cost is not None
        millis = _reserved_ms(cleared, names.index(name)) if walled else None
        for model in sorted({models[row] for row in won}):
            rows = [row for row in won if models[row] == model]
            for replica, part in enumerate(_contiguous(rows, engines, offered)):
                held = held_s(round_, spec)
                award = Award(
                    pool=name,
                    replica=replica,
                    # What is covered comes first, then what is cheapest, each in prefix order.
                    lots=offered.take(pa.array(sorted(part, key=cleared.rank.__getitem__))),
                    terms={model: terms[name, model]},
                    reserved_ms=None if millis is None else int(millis[part].sum()) + round(held * 1000),
                )
                if cleared.rank[part].any() or cleared.fallback_rank[part].any():
                    tight.add(replica)
                by_shift.setdefault(replica, []).append(award)
                bound[replica] = sum((may_cost[row] for row in part), bound.get(replica, Decimal(0)))
    for number, awards in sorted(by_shift.items()):
        reserved = None if context.max_cost is None else bound[number]
        yield ShiftTask(round_, number, tuple(awards), terms, reserved, tight=reserved is not None and number in tight)


def _may_cost(cleared: Clearing) -> list[Decimal]:
    """USD reserved for each lot in this round on pools paid by the token: on its winner and on its fallback."""
    timed = [pool.spec.price.by_time for pool in cleared.bids.pools]
    return [
        beside + (0 if cost is None or timed[pool] else cost)
        for pool, cost, beside in zip(cleared.pool_of, cleared.reserved, cleared.fallback_reserved, strict=True)
    ]


def _reserved_ms(cleared: Clearing, at: int) -> Ints:
    """Milliseconds of a pool paid by time that what is reserved for each of its lots pays for."""
    share = [
        float(part / whole) if pool == at and part is not None and whole else 1.0
        for pool, part, whole in zip(cleared.pool_of, cleared.reserved, cleared.worst, strict=True)
    ]
    worst = np.round(cleared.bids.worst_case_seconds(at) * 1000)
    millis: Ints = np.floor(worst * np.array(share)).astype(np.int64)
    return millis


def _contiguous(rows: Sequence[int], parts: int, lots: pa.Table) -> list[list[int]]:
    """Cuts a pool's lots into contiguous parts of about equal tokens; fewer where there are fewer lots."""
    tokens = pc.add(lots.column("input_tokens"), lots.column("max_output_tokens")).to_pylist()
    total = sum(tokens[row] for row in rows)
    cut: list[list[int]] = [[] for _ in range(parts)]
    before = 0
    for row in rows:
        cut[min(before * parts // max(total, 1), parts - 1)].append(row)
        before += tokens[row]
    return [part for part in cut if part]


def held_s(round_: int, spec: PoolSpec) -> float:
    """Seconds of each engine that a budget holds back in a round for what no lot's bill covers: loading and idling.

    A node is rented anew in every round, and given back before it takes longer than this.
    """
    if spec.kind == "lease":
        return LeaseTerms.of(spec).held_s
    return _SETUP_HELD_S if round_ == 1 else _IDLE_HELD_S


def _afford_engines(
    context: RunContext, round_: int, states: list[PoolState], wanted: Collection[str], budget: Decimal | None
) -> tuple[list[PoolState], dict[str, Decimal]]:
    """The pools, and what to hold back of the budget (USD) for the engines of each that is paid by time: those of each
    model that is ``wanted``.

    An engine whose mere loading would take the budget is left out: it bids with no capacity.
    """
    if budget is None:
        return states, {}
    kept, held = list(states), dict[str, Decimal]()
    for at, state in enumerate(states):
        price = state.spec.price
        if not price.by_time:
            continue
        rate = context.fx_rates.get(price.currency, Decimal(1))
        engines = state.spec.capacity.workers * sum(model in wanted for model in state.spec.models)
        seconds = Decimal(held_s(round_, state.spec)) * engines
        cost = price.unit_prices["accelerator_second"] * seconds * rate
        if sum(held.values(), cost) <= budget:
            held[state.spec.name] = cost
        else:
            kept[at] = replace(state, tokens_per_second=0.0)
    return kept, held


def lots_table(context: RunContext, lots: pa.Table, cleared: Clearing | None = None) -> pa.Table:
    """The ledger's LOTS of one round; ``cleared`` None: they were not auctioned."""
    nothing = pa.nulls(lots.num_rows)
    given = {
        "run_id": pa.repeat(context.run_id, lots.num_rows),
        "reserve": nothing if cleared is None else cleared.reserve,
        "urgency": nothing if cleared is None else pa.array(np.round(cleared.bids.urgency, 6)),
    }
    columns = [
        (pa.chunked_array([given[field.name]]) if field.name in given else lots.column(field.name)).cast(field.type)
        for field in LOTS
    ]
    return pa.Table.from_arrays(columns, schema=LOTS)
