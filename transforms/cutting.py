"""Cutting lots that nobody can serve whole, so that what fits into the time, money or context left is served."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.transforms.clearing import Clearing
from bidbeam.transforms.lots import LOT, lot_places, part_of_lot
from bidbeam.transforms.order import read_order
from bidbeam.transforms.prefix import Int64s
from bidbeam.transforms.pricing import as_floats
from bidbeam.transforms.run_context import RunContext

_FINE = 8
"""Into so many parts of what is left, at least, a lot is cut: the last one that does not fit is as small."""
_MOST = 64


def cut_to_fit(context: RunContext, lots: pa.Table, cleared: Clearing) -> pa.Table | None:
    """The lots (LOT) with those in parts that were left over for want of time, money or context although a part of them
    may fit; None where there are none such. Parts are contiguous, but for those cut by the length of their requests.

    What a pool has left is less than any lot that it might serve takes, so that no more lots are cut than there are
    pools: the cheapest per answer.
    """
    bids = cleared.bids
    ids = bids.lots.lot_id.to_pylist()
    left = np.array([cleared.unserved.get(lot_id) in ("deadline", "budget") for lot_id in ids], bool)
    left &= bids.lots.requests > 1
    size, parts = _parts(cleared), dict[int, int]()
    for at in _cheapest(cleared, left):
        if np.isfinite(size[at]) and len(parts) < len(bids.pools):
            parts[int(at)] = min(max(_FINE, math.ceil(_FINE * size[at])), _MOST, int(bids.lots.requests[at]))
    longest = {at: _longest(cleared, at) for at, lot_id in enumerate(ids) if cleared.unserved.get(lot_id) == "too_long"}
    if not parts and not longest:
        return None
    rows, orders = list[dict[str, Any]](), dict[int, pa.Table]()
    for at, lot in enumerate(lots.to_pylist()):
        if at not in parts and at not in longest:
            rows.append(lot)
            continue
        if lot["range"] not in orders:
            orders = {lot["range"]: read_order(context, lot["range"])}
        order, places = orders[lot["range"]], lot_places(lot["places"])
        cut = _by_tokens(order, places, parts[at]) if at in parts else _by_length(order, places, longest[at])
        for number, part in enumerate(cut, start=1):
            rows.append({**part_of_lot(context, lot, order, part), "lot_id": f"{lot['lot_id']}.{number}"})
    return pa.Table.from_pylist(rows, schema=LOT)


def _parts(cleared: Clearing) -> Any:
    """How many times too large each lot is for what is left, at the pool where it is least so (lots,); inf: nothing is
    left anywhere."""
    bids = cleared.bids
    least = np.full(len(bids.lots), np.inf)
    reserved = sum((part for part in cleared.reserved if part is not None), Decimal(0))
    for at, pool in enumerate(bids.pools):
        late = np.asarray(pc.fill_null(pc.equal(bids.reject[at], "deadline"), False))
        seconds = np.nan_to_num(bids.seconds[:, at], nan=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            over = np.where(seconds > 0, seconds / cleared.room[at], 0.0)
            if cleared.budget is not None and pool.spec.price.by_time:
                # What is reserved for fallbacks gives way to lots.
                money = float(cleared.budget - reserved)
                over = np.maximum(over, as_floats(bids.expected_cost(at)) / money) if money > 0 else over + np.inf
        least = np.where((bids.eligible[:, at] | late) & (over > 0), np.fmin(least, over), least)
    return least


def _cheapest(cleared: Clearing, left: Any) -> Int64s:
    """The rows of the lots that are ``left``, the cheapest per answer first; what nobody bids for comes last."""
    each = cleared.bids.score.min(axis=1, initial=np.inf) / np.maximum(cleared.bids.lots.requests, 1)
    order = np.argsort(each, kind="stable")
    return np.asarray(order[left[order]], dtype=np.int64)


def _longest(cleared: Clearing, lot: int) -> int:
    """The longest context (tokens) of the pools that a lot is merely too long for."""
    bids = cleared.bids
    contexts = [pool.context or 0 for at, pool in enumerate(bids.pools) if bids.reject[at][lot].as_py() == "too_long"]
    return max(contexts, default=0)


def _by_tokens(order: pa.Table, places: Int64s, parts: int) -> Iterator[Int64s]:
    """Contiguous parts of about as many tokens."""
    here = order.select(["input_tokens", "max_tokens", "n"]).take(pa.array(places))
    columns = (here.column(name).to_numpy().astype(np.int64) for name in here.column_names)
    tokens, answer, samples = columns
    total = np.cumsum(tokens + answer * samples)
    which = (total - 1) * parts // total[-1]
    return (part for part in np.split(places, np.flatnonzero(np.diff(which)) + 1) if len(part))


def _by_length(order: pa.Table, places: Int64s, context: int) -> Iterator[Int64s]:
    """Those that fit into a context, then the others."""
    here = order.select(["input_tokens", "max_tokens"]).take(pa.array(places))
    lengths = sum(here.column(name).to_numpy().astype(np.int64) for name in here.column_names)
    fits = lengths <= context
    return (part for part in (places[fits], places[~fits]) if len(part))
