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
from bidbeam.transforms.journal import list_segments, open_segment
from bidbeam.transforms.merging import RangeRef
from bidbeam.transforms.order import read_order
from bidbeam.transforms.run_context import RunContext, start_of

FOUND = pa.schema(
    [
        pa.field("range", pa.int32()),
        pa.field("place", pa.int32()),
        pa.field("segment", pa.int32()),  # in the order of ``earlier_segments``
        pa.field("row", pa.int32()),  # within that segment
    ]
)

FINAL_ALWAYS = ("caller", "policy")
FINAL_ONCE_ENDED = ("bad_output", "auth_funds", "server", "timeout")
"""Errors after which a request is not tried again by a start that follows one which ran to its end."""


def earlier_segments(context: RunContext) -> list[str]:
    """The segments of all starts before this one, oldest first."""
    return [name for name in list_segments(context.journal) if start_of(name) < context.start]


def _requests(context: RunContext, ranges: Sequence[RangeRef]) -> Iterator[pa.RecordBatch]:
    for ref in ranges:
        order = read_order(context, ref.range)
        place = np.arange(order.num_rows, dtype=np.int32)
        leads = order.column("leader").to_numpy() == place
        yield pa.record_batch(
            {
                "range": pa.array(np.full(int(leads.sum()), ref.range, np.int32)),
                "place": pa.array(place[leads]),
                "key": order.column("key").combine_chunks().filter(pa.array(leads)),
            }
        )


def _attempts(context: RunContext, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for number, name in enumerate(names):
        reader, _ = open_segment(context.journal, name)
        keys = reader.read_all().column("key")
        yield pa.record_batch(
            {
                "segment": pa.array(np.full(len(keys), number, np.int32)),
                "row": pa.array(np.arange(len(keys), dtype=np.int32)),
                "key": keys.combine_chunks(),
            }
        )


def match_history(context: RunContext, ranges: Sequence[RangeRef]) -> list[int]:
    """Finds every earlier attempt at each request of this start; writes one small file per range that has any.

    Returns those ranges.
    """
    names = earlier_segments(context)
    left_schema = pa.schema([("range", pa.int32()), ("place", pa.int32()), ("key", pa.binary(16))])
    right_schema = pa.schema([("segment", pa.int32()), ("row", pa.int32()), ("key", pa.binary(16))])
    with tempfile.TemporaryDirectory() as spill, duckdb.connect(config={"temp_directory": spill}) as connection:
        connection.register("requests", pa.RecordBatchReader.from_batches(left_schema, _requests(context, ranges)))
        connection.register("attempts", pa.RecordBatchReader.from_batches(right_schema, _attempts(context, names)))
        joined: pa.Table = connection.execute(
            "SELECT range, place, segment, row FROM requests JOIN attempts USING (key) ORDER BY ALL"
        ).to_arrow_table()
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
    if not context.has_history or not context.scratch.exists(_name(range_)):
        return None
    with context.scratch.open_input(_name(range_)) as source:
        found = pa.ipc.open_file(source).read_all()
    names = earlier_segments(context)
    parts = []
    for number in pc.unique(found.column("segment")).to_pylist():
        mine = found.filter(pc.equal(found.column("segment"), number))
        reader, _ = open_segment(context.journal, names[number])
        rows = reader.read_all().replace_schema_metadata(None).take(mine.column("row"))
        tags = (np.int64(range_) << 32) | mine.column("place").to_numpy().astype(np.int64)
        parts.append(rows.set_column(0, SEGMENT.field("tag"), pa.array(tags)))
    return pa.concat_tables(parts).unify_dictionaries()


def settled_places(context: RunContext, places: int, history: pa.Table | None) -> npt.NDArray[np.bool_]:
    """Which of a range's places need no further attempt: answered, or ended for good. Shape (places,)."""
    settled = np.zeros(places, bool)
    if history is None:
        return settled
    at = history.column("tag").to_numpy() & 0xFFFFFFFF
    status = history.column("status").cast(pa.string())
    errors = history.column("error_class").cast(pa.string())
    final = pa.array([*FINAL_ALWAYS, *(FINAL_ONCE_ENDED if context.ended_before else ())])
    over = pc.or_(pc.equal(status, "ok"), pc.fill_null(pc.is_in(errors, value_set=final), False))
    settled[at[over.to_numpy()]] = True
    return settled
