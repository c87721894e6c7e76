"""Where rows came from first: a run of another's dead letters says of each the file and row of that run's input."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.store import Store

if TYPE_CHECKING:
    from bidbeam.connectors.inputs import Split
    from bidbeam.transforms.run_context import RunContext

ORIGIN = pa.schema([pa.field("source_file", pa.string()), pa.field("source_row", pa.int64())])
"""A row for each row of the file that it belongs to, in its order."""


def write_origins(store: Store, name: str, rows: pa.Table) -> None:
    """Writes ORIGIN rows. Writing the same again is no error."""
    sink = io.BytesIO()
    pq.write_table(rows.cast(ORIGIN), sink)
    store.create(name, sink.getvalue())


def origin_of(context: RunContext, split: Split) -> tuple[pa.Array, pa.Array] | None:
    """File (text[n]) and row (int64[n]) that a split's rows came from; None where that is the split itself."""
    url = context.origins.get(split.file)
    if url is None:
        return None
    store, name = Store.of_file(url, context.storage)
    with store.open_input(name) as source:
        rows = pq.read_table(source, schema=ORIGIN).slice(split.row_start, split.rows).combine_chunks()
    return rows.column(0).combine_chunks(), rows.column(1).combine_chunks()
