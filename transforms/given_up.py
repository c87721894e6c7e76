"""Requests that a pool was handed and that it gave no outcome for: given up in flight, or gone with the pool."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.transforms.outstanding import Tags
from bidbeam.transforms.settling import Terms, book_lost, constant

_LOST = "given up in flight: it may have been served, so it is booked at its worst case"


def outcome_unknown(results: pa.RecordBatch) -> pa.Array | None:
    """Which results were given up in flight without a word of their usage (bool[n]); None where none was."""
    cancelled = pc.equal(results.column("status"), "cancelled")
    if not pc.any(cancelled).as_py():
        return None
    unknown = pc.and_(pc.is_null(results.column("input_tokens")), pc.is_null(results.column("output_tokens")))
    return pc.and_(cancelled, unknown)


def lost_rows(
    requests: pa.RecordBatch, terms: Terms, now: datetime, started_at: pa.Array | None = None
) -> pa.RecordBatch:
    """SEGMENT rows of requests that the pool was handed and of whose outcome nothing is known."""
    if started_at is not None:
        requests = requests.append_column("started_at", started_at)
    rows = book_lost(requests, terms, now)
    for name, value in (("error_class", "server"), ("error_message", _LOST)):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), constant(value, rows.schema.field(at).type, rows.num_rows))
    return rows


def died_with_the_pool(tags: Tags, why: str, now: datetime) -> pa.RecordBatch:
    """Results (RESULT_SCHEMA) of requests that were outstanding when a pool that is paid by time died."""
    columns: Mapping[str, Any] = {
        "tag": pa.array(tags),
        "status": pa.repeat("failed", len(tags)),
        "error_class": pa.repeat("server", len(tags)),
        "error_message": pa.repeat(f"the pool went down: {why}"[:200], len(tags)),
        "started_at": pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), len(tags)),
        "finished_at": pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), len(tags)),
    }
    return pa.RecordBatch.from_arrays(
        [columns[f.name] if f.name in columns else pa.nulls(len(tags), f.type) for f in RESULT_SCHEMA],
        schema=RESULT_SCHEMA,
    )
