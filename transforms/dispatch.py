"""Dispatch: what is about to be sent is written down first, so that a crash takes no attempt out of the books.

A record is one small Arrow file with a row for each request and the terms it goes out under. A shift that ends leaves a
marker behind its records: everything in them is settled, or was never sent. Where the marker is missing the shift was
cut short, and what its records name and its segments do not is ``lost``: perhaps served, so booked at its worst case.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.checksums import FOOTER, check_bytes, with_checksum
from bidbeam.connectors.errors import AlreadyExists, StoreError
from bidbeam.connectors.store import Store
from bidbeam.transforms.heartbeat import last_sign
from bidbeam.transforms.journal import (
    SegmentRef,
    list_segments,
    read_segment,
    segment_number,
    terms_from_json,
    terms_to_json,
    write_segment,
)
from bidbeam.transforms.settling import Terms, book_lost

_TERMS, _AT, _SETUP = b"bidbeam.terms", b"bidbeam.at", b"bidbeam.setup_ms"
_RECORD = re.compile(r"start-\d+/dispatched/(?P<shift>r\d+-s\d+)-t(?P<try>\d+)-(?P<number>\d+)\.arrow")
_CLOSED = "closed"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dispatched:
    """One record: the requests (as ``settling.settle`` asks for them), their terms, and when they were about to go.

    ``setup_ms`` is the loading of the pool's engine that nothing had been charged for by then.
    """

    requests: pa.RecordBatch
    terms: Terms
    at: datetime
    setup_ms: int


def directory(scratch_name: str) -> str:
    """Where a start's records stand, relative to the journal."""
    return f"{scratch_name}/dispatched"


def write_dispatch(journal: Store, name: str, requests: pa.RecordBatch, terms: Terms, setup_ms: int = 0) -> None:
    """Writes a record, durably: once this returns the requests may be sent."""
    metadata = {
        _TERMS: json.dumps(terms_to_json(terms)).encode(),
        _AT: datetime.now(UTC).isoformat().encode(),
        _SETUP: str(setup_ms).encode(),
    }
    sink = pa.BufferOutputStream()
    schema = requests.schema.with_metadata(metadata)
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"), metadata=FOOTER) as writer:
        writer.write_batch(requests.replace_schema_metadata(metadata))
    journal.create(name, with_checksum(sink.getvalue()))


def read_dispatch(journal: Store, name: str) -> Dispatched:
    """Raises ValueError or ArrowException for a record that is not what was written."""
    data = journal.read(name)
    check_bytes(data)
    reader = pa.ipc.open_file(pa.BufferReader(data))
    metadata = reader.schema.metadata
    return Dispatched(
        reader.read_all().replace_schema_metadata(None).combine_chunks().to_batches()[0],
        terms_from_json(json.loads(metadata[_TERMS])),
        datetime.fromisoformat(metadata[_AT].decode()),
        int(metadata[_SETUP]),
    )


def close(journal: Store, scratch_name: str, shift: str) -> None:
    """Says that nothing a shift dispatched is open any more. Safe to call again."""
    try:
        journal.create(f"{directory(scratch_name)}/{shift}-{_CLOSED}", b"")
    except AlreadyExists:
        return


def tries(journal: Store, scratch_name: str, shift: str) -> int:
    """How often the shift has begun to send before."""
    found = [_RECORD.fullmatch(entry.name) for entry in journal.list(f"{directory(scratch_name)}/{shift}-t")]
    return max((int(match["try"]) + 1 for match in found if match), default=0)


def book_open(journal: Store, scratch_name: str, shifts: Sequence[str] | None = None) -> Iterator[SegmentRef]:
    """Books what was in flight when shifts of a start were cut short, as one segment each; all of them by default.

    Who calls it knows that they send no more, or takes it that they do not: an attempt that is settled after all
    counts as settled (see ``booking.book_rows``).
    """
    for prefix, number, rows, terms in open_rows(journal, scratch_name, shifts):
        yield write_segment(journal, prefix, number, rows, terms)


def open_rows(
    journal: Store, scratch_name: str, shifts: Sequence[str] | None = None
) -> Iterator[tuple[str, int, pa.Table, list[Terms]]]:
    """The segments that ``book_open`` writes, as ``journal.write_segment`` takes them; writes nothing."""
    names = [entry.name for entry in journal.list(f"{directory(scratch_name)}/")]
    closed = {name.rsplit("/", 1)[1].removesuffix(f"-{_CLOSED}") for name in names if name.endswith(f"-{_CLOSED}")}
    by_shift: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _RECORD.fullmatch(name)
        if match is not None and match["shift"] not in closed and (shifts is None or match["shift"] in shifts):
            by_shift.setdefault(match["shift"], []).append(name)
    for shift, records in by_shift.items():
        prefix = f"{scratch_name}/segments/{shift}"
        segments = list_segments(journal, f"{prefix}-")
        rows, terms = _lost(journal, scratch_name, shift, records, segments)
        if rows is not None:
            yield prefix, max((segment_number(name) + 1 for name in segments), default=0), rows, terms


def _lost(
    journal: Store, scratch_name: str, shift: str, records: Sequence[str], segments: Sequence[str]
) -> tuple[pa.Table | None, list[Terms]]:
    """SEGMENT rows of what the records name and no segment has, and their terms."""
    known, until = _settled(journal, segments)
    open_: dict[tuple[str, str], list[Dispatched]] = {}
    for name, unsettled in _unsettled(journal, records, known):
        record = read_dispatch(journal, name)
        requests = record.requests.filter(unsettled)
        key = (record.terms.pool, record.terms.model)
        open_.setdefault(key, []).append(Dispatched(requests, record.terms, record.at, record.setup_ms))
    ended = last_sign(journal, scratch_name, shift)
    lost: list[pa.RecordBatch] = []
    for (pool, _model), found in open_.items():
        terms, began = found[-1].terms, found[0].at
        requests = pa.Table.from_batches([each.requests for each in found]).unify_dictionaries().combine_chunks()
        batch = requests.to_batches()[0]
        stamps = np.repeat([np.datetime64(each.at.replace(tzinfo=None), "us") for each in found], [
            each.requests.num_rows for each in found
        ])  # fmt: skip
        batch = batch.append_column("started_at", pa.array(stamps).cast(pa.timestamp("us", "UTC")))
        at = max(ended or began, found[-1].at)
        ran_ms = None
        if terms.price.by_time:
            # From what was last charged, or else from when it was loaded, to the last sign of life.
            since = max(began, until.get(pool, began))
            ran_ms = max(round((at - since).total_seconds() * 1000), 0) + (0 if pool in until else found[0].setup_ms)
        lost.append(book_lost(batch, terms, at, accelerator_ms=ran_ms))
    if not lost:
        return None, []
    return pa.Table.from_batches(lost).unify_dictionaries(), [found[-1].terms for found in open_.values()]


def _settled(journal: Store, segments: Sequence[str]) -> tuple[pa.Array, dict[str, datetime]]:
    """The ids of all attempts in the segments (binary(16)), and when each pool's last one finished."""
    ids = [pa.array([], pa.binary(16))]
    until: dict[str, datetime] = {}
    for name in segments:
        rows, _ = read_segment(journal, name)
        ids.append(_bytes_of(rows.column("attempt_id")))
        last = pa.table({"pool": rows.column("pool").cast(pa.string()), "at": rows.column("finished_at")})
        for row in last.group_by("pool").aggregate([("at", "max")]).to_pylist():
            until[row["pool"]] = max(until.get(row["pool"], row["at_max"]), row["at_max"])
    return pa.concat_arrays(ids), until


def _unsettled(journal: Store, records: Sequence[str], known: pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """The records that name attempts which are not ``known``, each with which of its rows these are (bool[n]).

    What was written down for one pool, and then for another before it was sent, was sent by the last. Holds no more of
    the records than their ids.
    """
    names, ids = [], []
    for name in records:
        try:
            ids.append(read_dispatch(journal, name).requests.column("attempt_id").cast(pa.binary(16)))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            # A record that was not written whole let nothing through; one that was damaged since may have.
            _log.warning(
                "%s is damaged (%s): what it said was about to be sent is not booked, should no answer of it be known",
                journal.url_of(name), type(error).__name__,
            )  # fmt: skip
            continue
        names.append(name)
    if not names:
        return
    every = pa.concat_arrays(ids)
    rows = pa.table({"id": every, "row": pa.array(np.arange(len(every)))})
    last = rows.group_by("id").aggregate([("row", "max")]).column("row_max").to_numpy()
    unsettled = np.zeros(len(every), bool)
    unsettled[last] = True
    unsettled &= ~pc.is_in(every, value_set=known).to_numpy(zero_copy_only=False)
    ends = np.cumsum([len(each) for each in ids])
    for name, mine in zip(names, np.split(unsettled, ends[:-1]), strict=True):
        if mine.any():
            yield name, pa.array(mine)


def _bytes_of(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.storage if isinstance(whole, pa.ExtensionArray) else whole.cast(pa.binary(16))
