"""What earlier starts of the run have settled, joined with this start's requests by content key.

The join is DuckDB's, which spills to disk: neither the keys of the journal nor those of the input need fit in memory.
Only where an answer stands is written down here; the answer itself stays in its segment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.schemas import SEGMENT
from bidbeam.transforms.charging import serving
from bidbeam.transforms.compaction import is_kept, kept_answers, read_kept
from bidbeam.transforms.journal import list_segments, read_segment
from bidbeam.transforms.merging import RangeRef, piece_starts, read_range
from bidbeam.transforms.order import live_places, read_order, split_group
from bidbeam.transforms.region_check import from_elsewhere
from bidbeam.transforms.run_context import RunContext, start_of
from bidbeam.transforms.spilling import SpillRef, layout_of

FOUND = pa.schema(
    [
        pa.field("range", pa.int32()),
        pa.field("place", pa.int32()),
        pa.field("segment", pa.int32()),  # in the order of ``earlier_segments``
        pa.field("row", pa.int32()),  # within that segment
    ]
)

_MATCH = "SELECT range, place, segment, row FROM asked JOIN attempts USING (key) ORDER BY ALL"
_MATCH_REPEATED = """
    WITH requests AS (SELECT *, count(*) OVER (PARTITION BY key) AS twins FROM asked)
    SELECT range, place, segment, row FROM requests JOIN attempts
    ON requests.key = attempts.key AND (twins = 1 OR requests.request_id = attempts.request_id) ORDER BY ALL
"""

FINAL_ALWAYS = ("caller", "policy")
FINAL_ONCE_ENDED = ("bad_output", "server", "timeout")
"""Errors after which a request is not tried again, once the start that met them has run to its end. A key or an account
is none of them: it is put right, and the same command goes on."""


def earlier_segments(context: RunContext) -> list[str]:
    """What all starts before this one have settled, oldest first: what they kept, and their segments."""
    segments = [name for name in list_segments(context.journal) if start_of(name) < context.start]
    return [*kept_answers(context), *(name for name in segments if name not in context.damaged)]


def _requests(
    context: RunContext, ranges: Sequence[RangeRef], spills: Sequence[SpillRef] | None
) -> Iterator[pa.RecordBatch]:
    """The requests of all ranges; with ``spills`` their ids too."""
    for ref in ranges:
        order = read_order(context, ref.range)
        # A place that died while the plan was made asks for nothing, even if its twin was answered.
        places = live_places(order)
        columns = {
            "range": pa.array(np.full(len(places), ref.range, np.int32)),
            "place": pa.array(places.astype(np.int32)),
            "key": order.column("key").combine_chunks().take(pa.array(places)),
        }
        if spills is not None:
            at = piece_starts(spills, ref.range)[order.column("piece").to_numpy()] + order.column("index").to_numpy()
            ids = read_range(context, spills, ref.range, [layout_of(context).index("request_id")]).column(0)
            columns["request_id"] = ids.combine_chunks().take(pa.array(at[places]))
        yield pa.record_batch(columns)


def _attempts(context: RunContext, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for number, name in enumerate(names):
        with context.journal.open_input(name) as source:
            rows = pa.ipc.open_file(source).read_all().select(["key", "request_id"]).combine_chunks()
        yield pa.record_batch(
            {
                "segment": pa.array(np.full(rows.num_rows, number, np.int32)),
                "row": pa.array(np.arange(rows.num_rows, dtype=np.int32)),
                "key": rows.column("key").combine_chunks(),
                "request_id": rows.column("request_id").combine_chunks(),
            }
        )


def _may_repeat(ranges: Sequence[RangeRef]) -> bool:
    """Whether two requests can have one key: it says nothing of placement, which keeps requests apart all the same."""
    groups = {name for ref in ranges for name in ref.groups}
    return len({(model, tenant) for model, _, tenant in map(split_group, groups)}) < len(groups)


def match_history(context: RunContext, ranges: Sequence[RangeRef], spills: Sequence[SpillRef]) -> list[int]:
    """Finds every earlier attempt at each request of this start; writes one small file per range that has any.

    An attempt belongs to one request: of requests with the same key, to the one of its id. Returns those ranges.
    """
    names = earlier_segments(context)
    repeat = _may_repeat(ranges)
    left = [("range", pa.int32()), ("place", pa.int32()), ("key", pa.binary(16))]
    right = [("segment", pa.int32()), ("row", pa.int32()), ("key", pa.binary(16)), ("request_id", pa.string())]
    requests = _requests(context, ranges, spills if repeat else None)
    left_schema = pa.schema([*left, ("request_id", pa.string())] if repeat else left)
    with tempfile.TemporaryDirectory() as spill, duckdb.connect(config={"temp_directory": spill}) as connection:
        connection.register("asked", pa.RecordBatchReader.from_batches(left_schema, requests))
        connection.register("attempts", pa.RecordBatchReader.from_batches(pa.schema(right), _attempts(context, names)))
        joined: pa.Table = connection.sql(_MATCH_REPEATED if repeat else _MATCH).to_arrow_table()
    found: pa.Table = joined.cast(FOUND)
    matched = []
    for range_ in pc.unique(found.column("range")).to_pylist():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, FOUND) as writer:
            writer.write_table(found.filter(pc.equal(found.column("range"), range_)))
        context.scratch.create(_name(range_), sink.getvalue(), durable=False)
        matched.append(int(range_))
    return matched


def _name(range_: int) -> str:
    return f"history/range-{range_:06d}.arrow"


def history_of(context: RunContext, range_: int) -> pa.Table | None:
    """Earlier attempts at a range's requests, as SEGMENT rows tagged with this start's places; None without any."""
    parts = [rows for _, rows in _parts(context, range_)]
    return pa.concat_tables(parts).unify_dictionaries() if parts else None


def _parts(context: RunContext, range_: int) -> Iterator[tuple[bool, pa.Table]]:
    """The same, file by file, each with whether the start that made the attempts has ended."""
    if not context.has_history or not context.scratch.exists(_name(range_)):
        return
    with context.scratch.open_input(_name(range_)) as source:
        found = pa.ipc.open_file(source).read_all()
    names = earlier_segments(context)
    for number in pc.unique(found.column("segment")).to_pylist():
        mine = found.filter(pc.equal(found.column("segment"), number))
        rows = _rows_of(context, names[number], mine.column("row"))
        tags = (np.int64(range_) << 32) | mine.column("place").to_numpy().astype(np.int64)
        yield is_kept(names[number]), rows.set_column(0, SEGMENT.field("tag"), pa.array(tags))


def _rows_of(context: RunContext, name: str, rows: pa.Array) -> pa.Table:
    if is_kept(name):
        return read_kept(context, name, rows)
    return read_segment(context.journal, name)[0].take(rows)


def settled_places(context: RunContext, range_: int, places: int) -> npt.NDArray[np.bool_]:
    """Which of a range's places need no further attempt: answered, or ended for good. Shape (places,)."""
    settled = np.zeros(places, bool)
    for ended, rows in _parts(context, range_):
        at = rows.column("tag").to_numpy() & 0xFFFFFFFF
        errors = rows.column("error_class").cast(pa.string())
        final = pa.array([*FINAL_ALWAYS, *(FINAL_ONCE_ENDED if ended else ())])
        failed = pc.and_not(
            pc.fill_null(pc.is_in(errors, value_set=final), False), from_elsewhere(rows.column("error_message"))
        )
        over = pc.or_(serving(rows), failed)
        settled[at[over.to_numpy()]] = True
    return settled
