"""Batches that an earlier start left at a provider: bought already, so no auction is held over what is in them.

A start finds them in the run's journal. Their requests go, as lots of their own, straight to the pool that has them;
the rest of a lot is auctioned as ever. What is in a batch and nobody asks for any more is booked when it comes back.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bidbeam.connectors.money import sum_decimal
from bidbeam.transforms.batches import batches_of, booked_rows
from bidbeam.transforms.decisions import Decision
from bidbeam.transforms.estimates import worst_input
from bidbeam.transforms.journal import terms_from_json
from bidbeam.transforms.lane import all_tags
from bidbeam.transforms.lots import LOT, TAKEN_OVER, part_of_lot
from bidbeam.transforms.order import read_order
from bidbeam.transforms.placement import eligible
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms, worst_case_cost
from bidbeam.transforms.shift_task import Award, ShiftTask

_log = logging.getLogger(__name__)

PoolModel = tuple[str, str]
TermsOf = Callable[[str, str], Terms]


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a start takes over: the lots that are in open batches, LOT by pool, and the batches' pools and models."""

    lots: Mapping[str, pa.Table]
    lanes: tuple[PoolModel, ...]
    reserved: Decimal
    """USD that the batches may yet cost."""


def adopt(context: RunContext, lots: pa.Table, terms: TermsOf) -> tuple[pa.Table, Adopted | None]:
    """Takes what is in open batches out of ``lots`` (LOT); gives the rest, and what was taken: None with no batch."""
    specs = {spec.name: spec for spec in context.pools if spec.kind == "batch"}
    waiting: dict[PoolModel, Counter[bytes]] = defaultdict(Counter)
    reserved = Decimal(0)
    for intent in batches_of(context).open():
        spec = specs.get(intent.pool)
        if intent.creating_at is None:
            continue
        if spec is None or intent.model not in spec.models:
            _log.warning(
                "a batch of pool %s with model %s is at its provider, but the pools file has no such pool now: its "
                "%d requests are bought anew, and its bill is not in the ledger",
                intent.pool, intent.model, intent.rows.num_rows,
            )  # fmt: skip
            continue
        left = intent.rows.filter(pa.array(~booked_rows(context, intent)))
        waiting[intent.pool, intent.model].update(left.column("key").to_pylist())
        agreed = terms(intent.pool, intent.model) if intent.terms is None else terms_from_json(json.loads(intent.terms))
        reserved += _worst_case(left, agreed)
    if not waiting:
        return lots, None
    orders: dict[int, pa.Table] = {}
    rest: list[dict[str, Any]] = []
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for lot in lots.to_pylist():
        if lot["range"] not in orders:
            orders[lot["range"]] = read_order(context, lot["range"])
        order, places = orders[lot["range"]], all_tags(lot) & 0xFFFFFFFF
        for (pool, model), keys in waiting.items():
            text = lot["placement"]
            if model != lot["model"] or not eligible(json.loads(text) if text else None, specs[pool].placement)[0]:
                continue
            here = _take(order.column("key").take(pa.array(places)).to_pylist(), keys)
            if here.any():
                part = part_of_lot(context, lot, order, places[here])
                taken[pool].append(part | {"lot_id": lot["lot_id"] + TAKEN_OVER})
                places = places[~here]
        if len(places) == lot["requests"]:
            rest.append(lot)
        elif len(places):
            rest.append(part_of_lot(context, lot, order, places))
    tables = {pool: pa.Table.from_pylist(parts, schema=LOT) for pool, parts in taken.items()}
    return pa.Table.from_pylist(rest, schema=LOT), Adopted(tables, tuple(waiting), reserved)


def _take(keys: Iterable[bytes], waiting: Counter[bytes]) -> npt.NDArray[np.bool_]:
    """Which of these keys are waiting, each as often as it is; those are taken out."""
    found = []
    for key in keys:
        there = waiting[key] > 0
        waiting[key] -= there
        found.append(there)
    return np.array(found, np.bool_)


def _worst_case(rows: pa.Table, terms: Terms) -> Decimal:
    """USD that rows of a batch (INTENT_ROWS) may cost at most."""
    requests = pa.table(
        {
            "input_tokens": worst_input(rows.column("input_tokens"), rows.column("tokens_exact")),
            "max_tokens": rows.column("max_tokens"),
            "n": rows.column("n"),
        }
    ).combine_chunks()
    return sum((sum_decimal(worst_case_cost(batch, terms)) for batch in requests.to_batches()), Decimal(0))


def with_adopted(
    context: RunContext,
    round_: int,
    decision: Decision | None,
    adopted: Adopted,
    terms: TermsOf,
    lots_table: Callable[[RunContext, pa.Table], pa.Table],
) -> Decision:
    """A round's decision (None: there was nothing to auction) with what the start takes over, in its first shift.

    ``lots_table`` makes the ledger's rows of LOT ones.
    """
    if decision is None:
        decision = Decision(round_, (), LOT.empty_table(), LOT.empty_table(), {}, Decimal(0))
    every = {(spec.name, model): terms(spec.name, model) for spec in context.pools for model in spec.models}
    awards = [
        Award(
            pool=pool,
            replica=0,
            lots=lots.append_column("runner_up", pa.nulls(lots.num_rows, pa.string())),
            terms={model: each for (name, model), each in every.items() if name == pool},
            reserved_ms=None,
        )
        for pool, lots in adopted.lots.items()
    ]
    first = next((task for task in decision.tasks if task.shift == 0), None)
    reserved = None if context.max_cost is None else adopted.reserved + ((first.reserved or 0) if first else 0)
    task = ShiftTask(
        round=round_,
        shift=0,
        awards=(*awards, *(first.awards if first else ())),
        runner_up_terms=every,
        reserved=None if reserved is None else Decimal(reserved),
        tight=first is not None and first.tight,
        adopted=adopted.reserved,
        adopts=adopted.lanes,
    )
    # No award: there was no auction. The lots are told apart by their names.
    taken = [lots_table(context, lots) for lots in adopted.lots.values()]
    before = [decision.tables["lots"]] if "lots" in decision.tables else []
    tables = dict(decision.tables)
    if before or taken:
        tables["lots"] = pa.concat_tables([*before, *taken]).unify_dictionaries()
    return replace(decision, tasks=(task, *(t for t in decision.tasks if t.shift != 0)), tables=tables)
