"""Lots: contiguous ranges of the order with one model, placement and tenant, cut at a token budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bidbeam.transforms.order import shared_with_previous, split_group
from bidbeam.transforms.prefix import Int64s, cacheable_tokens
from bidbeam.transforms.run_context import RunContext

LOT = pa.schema(
    [
        pa.field("lot_id", pa.string()),
        pa.field("round", pa.int16()),
        pa.field("model", pa.string()),
        pa.field("placement", pa.string()),  # canonical JSON of job and row constraint; null: none
        pa.field("tenant", pa.string()),
        pa.field("requests", pa.int64()),
        pa.field("input_tokens", pa.int64()),
        pa.field("max_input_tokens", pa.int64()),
        pa.field("ideal_cached_tokens", pa.int64()),
        pa.field("warm_tokens", pa.int64()),  # the part of it that only a pool has which just served the lot before
        pa.field("max_output_tokens", pa.int64()),
        pa.field("longest_tokens", pa.int64()),  # longest prompt plus its answer
        pa.field("tokens_estimated", pa.bool_()),
        pa.field("range", pa.int32()),
        pa.field("start", pa.int32()),
        pa.field("end", pa.int32()),
        pa.field("before", pa.int32()),  # the place that comes before it in the plan; -1: none in its range
        pa.field("held_by", pa.string()),  # the pool that was awarded that place in an earlier round; null: nobody
        pa.field("places", pa.large_binary()),  # little-endian uint32 places of the range, in order
        pa.field("attempt_no", pa.int16()),  # which attempt at each of its requests comes next, from 1
        pa.field("last_error", pa.string()),  # the class of error that left it unserved in the round before
        pa.field("failed_on", pa.list_(pa.string())),  # pools that its requests have failed on
    ]
)

TAKEN_OVER = "~batch"
"""Ends the name of a lot that no auction was held over: an earlier start had it at a provider already."""

_MAX_LOT_ROWS = 65_536
_SLACK = 0.25
"""A cut may move by this share of the budget to fall where little is shared."""


def cut_points(tokens: Int64s, shared: Int64s, groups: Int64s, budget: int, max_rows: int = _MAX_LOT_ROWS) -> list[int]:
    """Where lots begin: 0, then the cuts, then n. A lot holds one group and about ``budget`` tokens.

    Within a quarter of the budget the cut falls where neighbours share least, so that a prefix is not torn in two.
    """
    n = len(tokens)
    if n == 0:
        return [0]
    total = np.cumsum(tokens)
    group_ends = [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), n]
    cuts = [0]
    for group_end in group_ends:
        at = cuts[-1]
        while at < group_end:
            before = int(total[at - 1]) if at else 0
            low = int(np.searchsorted(total, before + budget * (1 - _SLACK))) + 1
            high = int(np.searchsorted(total, before + budget * (1 + _SLACK))) + 1
            low, high = min(max(low, at + 1), at + max_rows), min(max(high, at + 1), at + max_rows)
            if high >= group_end:
                at = group_end
            else:
                window = shared[low : high + 1]
                # The last of the least keeps lots near the budget from above.
                at = low + len(window) - 1 - int(np.argmin(window[::-1]))
            cuts.append(at)
    return cuts


def lots_of_places(
    context: RunContext, range_: int, groups: Sequence[str], order: pa.Table, places: Int64s
) -> pa.Table:
    """Cuts the given places of a range into lots (LOT), in order."""
    shared = shared_with_previous(order, places)
    take = pa.array(places)
    group = order.column("group").take(take).to_numpy().astype(np.int64)
    tokens = order.column("input_tokens").take(take).to_numpy().astype(np.int64)
    answer = order.column("max_tokens").take(take).to_numpy().astype(np.int64)
    output = answer * order.column("n").take(take).to_numpy().astype(np.int64)
    cuts = cut_points(tokens + output, shared, group, context.lot_tokens)
    parts = [split_group(name) for name in groups]
    rows: list[dict[str, Any]] = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        model, placement, tenant = parts[int(group[start])]
        statistics = lot_statistics(
            tokens[start:end],
            answer[start:end],
            output[start:end],
            shared[start:end],
            context.models[model].cache_block,
        )
        rows.append(
            {
                "lot_id": f"s{context.start}-r{range_:05d}-l{number:05d}",
                "round": 1,
                "model": model,
                "placement": placement,
                "tenant": tenant,
                **statistics,
                "tokens_estimated": context.models[model].directory is None,
                "range": range_,
                "start": int(places[start]),
                "end": int(places[end - 1]) + 1,
                "before": int(places[start - 1]) if start else -1,
                "held_by": None,
                "places": places[start:end].astype("<u4").tobytes(),
                "attempt_no": 1,
                "last_error": None,
                "failed_on": [],
            }
        )
    return pa.Table.from_pylist(rows, schema=LOT)


def part_of_lot(context: RunContext, lot: Mapping[str, Any], order: pa.Table, places: Int64s) -> dict[str, Any]:
    """The row of a LOT table for some places of a lot, ascending, with its other columns as they are."""
    whole = lot_places(lot["places"])
    first = int(np.searchsorted(whole, places[0]))
    before = int(whole[first - 1]) if first else lot["before"]
    shared = shared_with_previous(order, places if before < 0 else np.concatenate([[before], places]))
    here = order.take(pa.array(places))
    tokens = here.column("input_tokens").to_numpy().astype(np.int64)
    answer = here.column("max_tokens").to_numpy().astype(np.int64)
    output = answer * here.column("n").to_numpy().astype(np.int64)
    block = context.models[lot["model"]].cache_block
    return {
        **{field.name: lot[field.name] for field in LOT},
        **lot_statistics(tokens, answer, output, shared[-len(places) :], block),
        "start": int(places[0]),
        "end": int(places[-1]) + 1,
        "before": before,
        "places": places.astype("<u4").tobytes(),
    }


def lot_statistics(tokens: Int64s, answer: Int64s, output: Int64s, shared: Int64s, block: int) -> dict[str, int]:
    """The counts of one lot, from its requests in order. ``shared[0]`` is with the last request of the lot before."""
    ideal = cacheable_tokens(shared, tokens, block)
    return {
        "requests": len(tokens),
        "input_tokens": int(tokens.sum()),
        "max_input_tokens": int(tokens.max()),
        "ideal_cached_tokens": int(ideal.sum()),
        "warm_tokens": int(ideal[0]),
        "max_output_tokens": int(output.sum()),
        "longest_tokens": int((tokens + answer).max()),
    }


def lot_places(places: bytes) -> Int64s:
    """The places of a lot, ascending."""
    return np.frombuffer(places, "<u4").astype(np.int64)
