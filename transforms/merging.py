"""Merge: the spilled pieces of one range become its order, the small table that everything after refers to.

The prompts stay where they were spilled; see ``order`` for what it says of each place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.schemas import LABEL
from bidbeam.connectors.store import Store
from bidbeam.transforms.order import ORDER, live_places, shared_with_previous, split_group, write_order
from bidbeam.transforms.prefix import cacheable_tokens, common_prefix_bytes
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.spilling import SpillRef, group_codes, layout_of, sorted_order

BYTES_PER_TOKEN = 4
"""What an estimate takes one token of text to be, where the model has no tokenizer."""


@dataclass(frozen=True, slots=True)
class RangeRef:
    """One merged range: its order file and the sizes of what is in it. ``groups`` are the names by group code;
    ``ideal_cached_tokens`` is what an unbounded cache would have of all its requests, settled ones too."""

    range: int
    order_name: str
    rows: int
    groups: tuple[str, ...]
    ideal_cached_tokens: int


def pieces_of(spills: Sequence[SpillRef], range_: int) -> list[SpillRef]:
    """The spills that hold rows of a range, in split order: what ``ORDER.piece`` counts."""
    return sorted((s for s in spills if s.rows_per_range[range_]), key=lambda s: s.split)


def read_piece(store: Store, spill: SpillRef, batch: int, columns: Sequence[int] | None = None) -> pa.RecordBatch:
    """One record batch of a spill file, or only some of its columns (by position)."""
    options = pa.ipc.IpcReadOptions(included_fields=list(columns)) if columns is not None else None
    with store.open_input(spill.name) as source:
        return pa.ipc.open_file(source, options=options).get_batch(batch)


def read_range(
    context: RunContext, spills: Sequence[SpillRef], range_: int, columns: Sequence[int] | None = None
) -> pa.Table:
    """The spilled rows of a range, piece after piece, before they are put in order."""
    layout = layout_of(context)
    # Reading keeps the file's column order, whatever order was asked for.
    wanted = layout.schema if columns is None else pa.schema([layout.schema.field(i) for i in sorted(columns)])
    batches = [read_piece(context.scratch, s, range_, columns) for s in pieces_of(spills, range_)]
    return pa.Table.from_batches(batches, schema=wanted).unify_dictionaries()


def piece_starts(spills: Sequence[SpillRef], range_: int) -> npt.NDArray[np.int64]:
    """Where each piece of the range begins in ``read_range``'s table. Shape (pieces,)."""
    counts = [s.rows_per_range[range_] for s in pieces_of(spills, range_)]
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if counts else np.zeros(0, np.int64)


def order_rows(
    context: RunContext, spills: Sequence[SpillRef], range_: int, repeated_ids: Mapping[int, Collection[int]]
) -> tuple[pa.Table, tuple[str, ...]]:
    """The order of a range (ORDER) and the names of its groups.

    ``repeated_ids`` holds, by split, the source rows whose id an earlier row has taken: they die as ``invalid``.
    """
    layout = layout_of(context)
    names = ("key", "model", "placement", "tenant", "content", "input_tokens", "max_tokens", "n", "greedy", "key_width")
    columns = sorted({layout.index(name) for name in names} | {layout.index("row")})
    rows = read_range(context, spills, range_, columns).combine_chunks()
    at = {name: columns.index(layout.index(name)) for name in (*names, "row")}
    column = {name: _one(rows.column(i)) for name, i in at.items()}

    groups, group_names = group_codes(column["model"], column["placement"], column["tenant"])
    order = sorted_order(column["key"], groups)
    take = pa.array(order)
    groups = groups[order]
    starts = piece_starts(spills, range_)
    piece = np.searchsorted(starts, order, side="right") - 1

    dead = _repeated(spills, range_, column["row"], repeated_ids)[order]
    content = column["content"].take(take)
    greedy = column["greedy"].take(take).to_numpy(zero_copy_only=False)
    common = common_prefix_bytes(column["key"], order, groups)
    shared = _shared_tokens(common, column["key_width"].take(take), groups)
    lengths = pc.binary_length(column["key"]).to_numpy().astype(np.int64)[order]
    keys, leader = _occurrences(content, groups, greedy, dead, _has_equal_neighbours(common, lengths))
    n_dead = int(dead.sum())
    reason = (
        pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(len(order), np.int32), mask=~dead), pa.array(["invalid"] if n_dead else [], pa.string())
        )
        if n_dead
        else pa.nulls(len(order), LABEL)
    )
    message = pc.if_else(
        pa.array(dead),
        pa.scalar(f"column {context.render.prompt.id!r}: an earlier row has the same id"),
        pa.scalar(None, pa.string()),
    )
    table = pa.table(
        [
            pa.array(piece.astype(np.int32)),
            pa.array((order - starts[piece]).astype(np.int32)),
            pa.array(groups.astype(np.int32)),
            keys,
            pa.array(shared.astype(np.int32)),
            column["input_tokens"].take(take),
            column["max_tokens"].take(take),
            column["n"].take(take).cast(pa.int32()),
            pa.array(leader.astype(np.int32)),
            reason,
            message,
        ],
        schema=ORDER,
    )
    return table, tuple(group_names)


def _one(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _repeated(
    spills: Sequence[SpillRef], range_: int, source_rows: pa.Array, repeated: Mapping[int, Collection[int]]
) -> npt.NDArray[np.bool_]:
    dead = np.zeros(len(source_rows), bool)
    if not repeated:
        return dead
    rows = source_rows.to_numpy()
    at = 0
    for spill in pieces_of(spills, range_):
        count = spill.rows_per_range[range_]
        if taken := repeated.get(spill.split):
            dead[at : at + count] = np.isin(rows[at : at + count], np.fromiter(taken, np.int64))
        at += count
    return dead


def _occurrences(
    content: pa.Array,
    groups: npt.NDArray[np.int64],
    greedy: npt.NDArray[np.bool_],
    dead: npt.NDArray[np.bool_],
    may_repeat: bool,
) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Content keys with the occurrence mixed in, and each place's leader.

    Equal content in one group is one request if it is greedy: the first place answers for all. Otherwise its n-th
    occurrence is a request of its own, under a key of its own. Shapes (n,).
    """
    n = len(content)
    if not may_repeat:
        return content, np.arange(n)
    halves = np.frombuffer(content.buffers()[1], "<u8", count=2 * n, offset=16 * content.offset).reshape(n, 2).copy()
    places = np.arange(n)
    # Dead places answer for nobody: they form groups that no live one joins.
    by = np.lexsort((places, halves[:, 0], halves[:, 1], groups, dead))
    same = np.zeros(n, bool)
    if n > 1:
        left, right = by[:-1], by[1:]
        same[1:] = (
            (halves[left] == halves[right]).all(axis=1) & (groups[left] == groups[right]) & ~dead[left] & ~dead[right]
        )
    run_start = np.maximum.accumulate(np.where(same, 0, places))
    leader = places.copy()
    shared = greedy[by]
    leader[by] = np.where(shared, by[run_start], by) if n else by
    occurrence = np.zeros(n, np.uint64)
    occurrence[by] = np.where(shared, 0, places - run_start).astype(np.uint64)
    # An odd multiplier keeps different occurrences of one content different.
    halves[:, 0] ^= occurrence * np.uint64(0x9E3779B97F4A7C15)
    keys = pa.Array.from_buffers(pa.binary(16), n, [None, pa.py_buffer(halves.tobytes())])
    return keys, leader


def _has_equal_neighbours(common: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> bool:
    """Whether any two neighbours have the same key. Equal content means equal keys, and those stand together."""
    return bool(((common[1:] == lengths[1:]) & (common[1:] == lengths[:-1])).any())


def _shared_tokens(
    common_bytes: npt.NDArray[np.int64], widths: pa.Array, groups: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    width: npt.NDArray[np.int64] = widths.to_numpy().astype(np.int64)
    # A width of one marks text: its tokens are estimates.
    shared: npt.NDArray[np.int64] = common_bytes // np.where(width == 1, BYTES_PER_TOKEN, width)
    if len(groups):
        shared[1:][groups[1:] != groups[:-1]] = 0
    return shared


def ideal_of(context: RunContext, order: pa.Table, groups: Sequence[str]) -> int:
    """Ideal cached tokens of all requests of an order: whole blocks of what each shares with one before it."""
    blocks = np.array([context.models[split_group(name)[0]].cache_block for name in groups] or [1])
    places = live_places(order)
    lengths = order.column("input_tokens").to_numpy().astype(np.int64)[places]
    block = blocks[order.column("group").to_numpy()[places]]
    return int(cacheable_tokens(shared_with_previous(order, places), lengths, block).sum())


def merge_range(
    context: RunContext, spills: Sequence[SpillRef], range_: int, repeated_ids: Mapping[int, Collection[int]]
) -> RangeRef:
    """Merges one range and writes its order; the same bytes when a bundle is tried again."""
    order, groups = order_rows(context, spills, range_, repeated_ids)
    return RangeRef(
        range_, write_order(context, range_, order), order.num_rows, groups, ideal_of(context, order, groups)
    )
