"""The order of a range: which request stands at which place, and what it shares with the one before.

The prompts stay where they were spilled. The order is the small table that lots, shifts and outputs refer to.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.schemas import LABEL
from bidbeam.transforms.prefix import Int64s
from bidbeam.transforms.run_context import RunContext

ORDER = pa.schema(
    [
        pa.field("piece", pa.int32()),  # which spill of the range (its place in the split order)
        pa.field("index", pa.int32()),  # row within that piece
        pa.field("group", pa.int32()),  # model, placement and tenant: prefixes are shared within one only
        pa.field("key", pa.binary(16)),  # content key, occurrence included
        pa.field("shared_tokens", pa.int32()),  # leading tokens in common with the place before, in one group
        pa.field("input_tokens", pa.int32()),
        pa.field("max_tokens", pa.int32()),
        pa.field("n", pa.int32()),
        pa.field("leader", pa.int32()),  # the place that answers for this one; itself unless a duplicate
        pa.field("reason", LABEL),  # null unless it died while the plan was made
        pa.field("message", pa.string()),
    ]
)


def write_order(context: RunContext, range_: int, order: pa.Table) -> str:
    name = f"order/range-{range_:06d}.arrow"
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, order.schema) as writer:
        writer.write_table(order.combine_chunks())
    context.scratch.create(name, sink.getvalue(), durable=False)
    return name


def read_order(context: RunContext, range_: int) -> pa.Table:
    """The order of a range, ORDER, one chunk a column."""
    with context.scratch.open_input(f"order/range-{range_:06d}.arrow") as source:
        return pa.ipc.open_file(source).read_all().combine_chunks()


def live_places(order: pa.Table, settled: npt.NDArray[np.bool_] | None = None) -> Int64s:
    """The places of a range that need an answer: leaders that are neither dead nor settled. Ascending."""
    n = order.num_rows
    leader = order.column("leader").to_numpy().astype(np.int64)
    live = (leader == np.arange(n)) & pc.is_null(order.column("reason")).to_numpy(zero_copy_only=False)
    if settled is not None:
        live &= ~settled
    return np.flatnonzero(live)


def shared_with_previous(order: pa.Table, places: Int64s) -> Int64s:
    """Tokens that each of these places shares with the one before it in ``places``; 0 for the first. Shape (n,)."""
    if len(places) == 0:
        return np.zeros(0, np.int64)
    shared = order.column("shared_tokens").to_numpy().astype(np.int64)[: places[-1] + 1]
    # In sorted order the common prefix of two rows is the least one between neighbours on the way.
    starts = np.concatenate([[places[0]], places[:-1] + 1])
    least: Int64s = np.minimum.reduceat(shared, starts)
    least[0] = 0
    return least


def split_group(name: str) -> tuple[str, str | None, str | None]:
    """Model, placement and tenant of a group's name (see ``group_codes``)."""
    model, placement, tenant = (part[1:] if part.startswith("\x01") else None for part in name.split("\x1f", 2))
    return model or "", placement, tenant
