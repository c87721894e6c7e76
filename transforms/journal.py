"""The journal: attempts settled so far, in create-only files called segments, so that no restart pays again.

A segment is one Arrow file with one record batch per range (and one for overhead, which belongs to no request), so
that publishing a range reads its own batches only. It carries the terms its charges were made under. Names come from
the plan: round, shift and a number that counts up; whoever finds a name taken by other content takes the next.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.checksums import FOOTER, check_bytes, with_checksum
from bidbeam.connectors.errors import AlreadyExists, StoreError
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.pools import PriceSchedule
from bidbeam.connectors.schemas import SEGMENT
from bidbeam.connectors.store import Store
from bidbeam.transforms.charging import served_rows
from bidbeam.transforms.settling import Terms

OVERHEAD = -1
"""The range of rows that belong to no request."""

_TERMS = b"bidbeam.terms"
_NAME = re.compile(r"start-\d+/segments/r\d+-s\d+-\d+\.arrow")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """One segment: where it is, and which record batch holds which range. ``name`` is relative to the journal."""

    name: str
    rows: int
    ranges: tuple[int, ...]
    """The range of each record batch, ascending; OVERHEAD for attempts without a request."""
    served: int
    cost: Decimal
    """USD that all of its attempts cost."""
    outcomes: tuple[tuple[str, int, int], ...] = field(default=(), compare=False)
    """Of a segment that was read back: each pool with how many requests it answered and failed. What was given up or
    lost says nothing of a pool."""


def spent_on(segments: Iterable[SegmentRef]) -> Decimal:
    """USD that these segments' attempts cost."""
    return sum((segment.cost for segment in segments), Decimal(0))


def terms_to_json(terms: Terms) -> dict[str, object]:
    price = terms.price
    return {
        "pool": terms.pool,
        "model": terms.model,
        "price_id": price.price_id,
        "unit_prices": {meter: str(value) for meter, value in price.unit_prices.items()},
        "currency": price.currency,
        "valid_from": price.valid_from.isoformat() if price.valid_from else None,
        "source": price.source,
        "valid_to": price.valid_to.isoformat() if price.valid_to else None,
        "fetched_at": price.fetched_at.isoformat() if price.fetched_at else None,
        "fx_rate": str(terms.fx_rate),
        "fx_source": terms.fx_source,
        "fx_at": terms.fx_at.isoformat() if terms.fx_at else None,
        "jurisdiction": terms.jurisdiction,
        "operator": terms.operator,
    }


def terms_from_json(data: Mapping[str, object]) -> Terms:
    def moment(value: object) -> datetime | None:
        return datetime.fromisoformat(str(value)) if value else None

    def text(key: str) -> str | None:
        value = data.get(key)
        return None if value is None else str(value)

    unit_prices = data["unit_prices"]
    if not isinstance(unit_prices, Mapping):
        raise TypeError("unit_prices: not a mapping")
    price = PriceSchedule(
        price_id=str(data["price_id"]),
        pool=str(data["pool"]),
        unit_prices={meter: Decimal(str(value)) for meter, value in unit_prices.items()},
        currency=str(data["currency"]),
        valid_from=moment(data["valid_from"]),
        source=str(data["source"]),
        valid_to=moment(data.get("valid_to")),
        fetched_at=moment(data.get("fetched_at")),
    )
    return Terms(
        pool=str(data["pool"]),
        model=str(data["model"]),
        price=price,
        fx_rate=Decimal(str(data["fx_rate"])),
        fx_source=text("fx_source"),
        fx_at=moment(data["fx_at"]),
        jurisdiction=text("jurisdiction"),
        operator=text("operator"),
    )


def write_segment(store: Store, prefix: str, number: int, rows: pa.Table, terms: Iterable[Terms]) -> SegmentRef:
    """Writes settled attempts (SEGMENT) durably under ``prefix`` and the first free number from ``number`` on.

    ``store`` is the journal; the returned name carries the number that was taken (see ``segment_number``).
    """
    by_range = _split_by_range(rows)
    metadata = {_TERMS: json.dumps([terms_to_json(t) for t in terms], sort_keys=True).encode()}
    schema = SEGMENT.with_metadata(metadata)
    sink = pa.BufferOutputStream()
    # Batches of one file share one dictionary a column.
    whole = pa.Table.from_batches([b for _, b in by_range], schema=SEGMENT).unify_dictionaries()
    # Mostly nulls and small numbers in wide decimals: compressed to a sixth for no more time than writing it all.
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, schema, options=options, metadata=FOOTER) as writer:
        for batch in whole.replace_schema_metadata(metadata).to_batches():
            writer.write_batch(batch)
    data = with_checksum(sink.getvalue())
    while True:
        name = f"{prefix}-{number:06d}.arrow"
        try:
            store.create(name, data)
        except AlreadyExists:
            # Another try of this bundle is at work. What we paid for is booked all the same.
            number += 1
            continue
        break
    return SegmentRef(
        name, rows.num_rows, tuple(r for r, _ in by_range), served_rows(rows), sum_decimal(rows.column("cost"))
    )


def segment_number(name: str) -> int:
    """The number in a segment's name."""
    return int(name.rsplit("-", 1)[1].split(".", 1)[0])


def _split_by_range(rows: pa.Table) -> list[tuple[int, pa.RecordBatch]]:
    ranges = pc.fill_null(pc.shift_right(rows.column("tag"), 32), OVERHEAD).to_numpy().astype(np.int64)
    order = np.argsort(ranges, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        rows = rows.take(pa.array(order))
    batch = rows.unify_dictionaries().combine_chunks().to_batches()[0]
    cuts = [0, *(np.flatnonzero(np.diff(ranges[order])) + 1).tolist(), len(order)]
    return [(int(ranges[order[a]]), batch.slice(a, b - a)) for a, b in itertools.pairwise(cuts)]


def open_segment(store: Store, name: str) -> tuple[pa.ipc.RecordBatchFileReader, dict[str, Terms]]:
    """A reader of a segment and its terms by price id. Raises ValueError for one that is not what was written."""
    data = store.read(name)
    check_bytes(data)
    reader = pa.ipc.open_file(pa.BufferReader(data))
    return reader, _terms_of(reader)


def _terms_of(reader: pa.ipc.RecordBatchFileReader) -> dict[str, Terms]:
    terms = [terms_from_json(entry) for entry in json.loads(reader.schema.metadata[_TERMS])]
    return {t.price.price_id: t for t in terms}


def read_segment(store: Store, name: str) -> tuple[pa.Table, dict[str, Terms]]:
    """All rows of a segment (SEGMENT) and its terms by price id."""
    reader, terms = open_segment(store, name)
    return pa.Table.from_batches([_whole(batch) for batch in _batches(reader)], schema=SEGMENT), terms


def _batches(reader: pa.ipc.RecordBatchFileReader) -> Iterator[pa.RecordBatch]:
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _whole(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of a segment as SEGMENT; NULL in columns that were added since it was written."""
    batch = batch.replace_schema_metadata(None)
    if batch.schema.equals(SEGMENT):
        return batch
    columns = [
        batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
        for field in SEGMENT
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SEGMENT)


def read_rows(store: Store, segments: Iterable[SegmentRef], range_: int) -> tuple[pa.Table, dict[str, Terms]]:
    """One range's rows (SEGMENT) of all segments, in their order, and the terms of all price ids in them."""
    batches: list[pa.RecordBatch] = []
    terms: dict[str, Terms] = {}
    for segment in segments:
        wanted = [i for i, r in enumerate(segment.ranges) if r == range_]
        if wanted:
            with store.open_input(segment.name) as source:
                reader = pa.ipc.open_file(source)
                terms |= _terms_of(reader)
                batches += (_whole(reader.get_batch(i)) for i in wanted)
    return pa.Table.from_batches(batches, schema=SEGMENT).unify_dictionaries(), terms


def list_segments(journal: Store, prefix: str = "") -> list[str]:
    """Names, relative to the journal, of the segments of all starts, or of those below ``prefix``, oldest first."""
    return [entry.name for entry in journal.list(prefix) if _NAME.fullmatch(entry.name)]


def sound_segments(journal: Store) -> list[SegmentRef]:
    """The segments of all starts, oldest first. A damaged one is set aside with a warning, for nobody to meet again.

    Only who holds the run may call this.
    """
    found = []
    for name in list_segments(journal):
        try:
            found.append(segment_ref(journal, name))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            _log.warning(
                "%s is damaged (%s) and set aside; what it settled is asked for again",
                journal.url_of(name), type(error).__name__,
            )  # fmt: skip
            # One that was damaged under this name before makes way: its number was taken again meanwhile.
            journal.replace(f"{name}.damaged", journal.read(name), durable=True)
            journal.delete(name)
    return found


def segment_ref(journal: Store, name: str) -> SegmentRef:
    """What ``write_segment`` returned for a segment that is already there."""
    reader, _ = open_segment(journal, name)
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    ranges = tuple(
        OVERHEAD if b.column("tag")[0].as_py() is None else b.column("tag")[0].as_py() >> 32 for b in batches
    )
    rows = pa.Table.from_batches(batches)
    cost = sum_decimal(rows.column("cost"))
    return SegmentRef(name, rows.num_rows, ranges, served_rows(rows), cost, tuple(_outcomes(rows)))


def _outcomes(rows: pa.Table) -> Iterator[tuple[str, int, int]]:
    status = rows.column("status").cast(pa.string())
    asked = pa.table(
        {
            "pool": rows.column("pool").cast(pa.string()),
            "answered": pc.equal(status, "ok").cast(pa.int64()),
            "failed": pc.equal(status, "failed").cast(pa.int64()),
        }
    ).filter(pc.is_valid(rows.column("tag")))
    for row in asked.group_by("pool").aggregate([("answered", "sum"), ("failed", "sum")]).to_pylist():
        yield row["pool"], row["answered_sum"], row["failed_sum"]


def answered_and_failed(segments: Iterable[SegmentRef]) -> dict[str, tuple[int, int]]:
    """How many requests each pool answered and failed in segments that were read back."""
    found: dict[str, tuple[int, int]] = {}
    for pool, answered, failed in (each for segment in segments for each in segment.outcomes):
        before = found.get(pool, (0, 0))
        found[pool] = (before[0] + answered, before[1] + failed)
    return found
