"""Publish: what was settled becomes outputs, dead letters and the ledger's request rows, range by range.

Outputs stand in the order of the plan. Every column of the input is in them, unchanged; ours follow. An input column
whose name is one of ours is kept as ``<name>_in``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bidbeam.connectors.ledger_writer import write_part
from bidbeam.connectors.schemas import COST, DEAD_LETTER_COLUMNS, LABEL, OUTPUT_COLUMNS, REQUESTS
from bidbeam.transforms.booking import book_rows
from bidbeam.transforms.charging import baseline_total, serving
from bidbeam.transforms.compaction import keep_attempts
from bidbeam.transforms.journal import SegmentRef, read_rows
from bidbeam.transforms.merging import piece_starts, read_piece, read_range
from bidbeam.transforms.order import read_order
from bidbeam.transforms.published import OutputFile, Published
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import constant
from bidbeam.transforms.spilling import SpillLayout, SpillRef, layout_of

REASON_OF_ERROR: Mapping[str, str] = {
    "caller": "refused", "policy": "refused", "bad_output": "bad_output", "rate": "capacity", "capacity": "capacity",
    "auth_funds": "no_eligible_pool", "server": "failed", "timeout": "failed",
}  # fmt: skip
"""A dead letter's reason, from the class of its last error. Reasons that the market gave stand for themselves."""

MESSAGE_OF_REASON: Mapping[str, str] = {
    "too_long": "longer than every eligible pool takes",
    "no_eligible_pool": "no pool could be used for it; see the bids in the ledger",
    "budget": "the budget left did not cover its worst case; raise budget.max_cost and run again",
    "deadline": "it could not be answered before the deadline; run again to go on",
    "capacity": "no pool had room for it; run again to go on",
    "refused": "the pool refused the request",
    "bad_output": "no usable answer came back",
    "failed": "every attempt failed",
}

ORIGINAL_NAME = b"bidbeam.name"
"""In the metadata of a column that an output calls otherwise: its name in the input."""

_CODEC = "snappy"
_NO_ATTEMPTS = np.zeros(0, np.int64)


def publish_range(
    context: RunContext,
    spills: Sequence[SpillRef],
    range_: int,
    segments: Sequence[SegmentRef],
    history: pa.Table | None,
    unserved: Iterable[pa.Table],
) -> Published:
    """Writes one range's outputs, dead letters and ledger rows: requests, and this start's attempts and charges.

    ``segments`` are this start's; ``history`` holds attempts of earlier starts as SEGMENT rows whose tags are this
    start's; ``unserved`` are LOT tables of what nobody served in the end.
    """
    order = read_order(context, range_)
    layout = layout_of(context)
    at = piece_starts(spills, range_)[order.column("piece").to_numpy()] + order.column("index").to_numpy()
    rows = read_range(context, spills, range_).take(pa.array(at))
    mine, terms = read_rows(context.journal, segments, range_)
    attempts = _attempts(mine, history)
    book = _Book.of(order, attempts)
    reasons, messages = _reasons(order, attempts, book, range_, unserved)

    served = np.flatnonzero(book.answer >= 0)
    dead = np.flatnonzero(book.answer < 0)
    name = f"part-{context.part_prefix}{range_:05d}.parquet"
    found = attempts.take(pa.array(book.answer[served]))
    baseline, unknown = (None, 0) if context.baseline is None else baseline_total(found, context.baseline)
    result = Published(
        served=len(served),
        dead=_counts(reasons, dead),
        input_tokens=_total(found, "input_tokens", book.leads[served]),
        cached_tokens=_total(found, "cached_tokens", book.leads[served]),
        output_tokens=_total(found, "output_tokens", book.leads[served]),
        truncated=_truncated(found),
        baseline_cost=baseline,
        baseline_unknown=unknown,
    )
    outputs: tuple[OutputFile, ...] = ()
    letters: tuple[OutputFile, ...] = ()
    if len(served):
        table = _outputs(context, layout, _rows(rows, served), found, book, served)
        outputs = (_write(context, f"outputs/{name}", table),)
    if len(dead):
        lost = _rows(rows, dead)
        extra = {
            "request_id": lost.column(layout.index("request_id")),
            "reason": reasons.take(pa.array(dead)),
            "message": messages.take(pa.array(dead)),
            "attempts": pa.array(book.attempts[dead].astype(np.int32)),
        }
        letters = (_write(context, f"dead_letters/{name}", _with_input(layout, lost, extra, DEAD_LETTER_COLUMNS)),)
    keep_attempts(context, range_, attempts, book.answer[served], outputs[0].path if outputs else None)
    requests = _requests(context, layout, rows, order, attempts, book, reasons)
    part = write_part(
        context.ledger, "requests", context.run_date, context.run_id, f"{context.part_prefix}r{range_:05d}", requests
    )
    booked = book_rows(context, f"s{context.start:03d}-r{range_:05d}", mine, terms)
    return result + Published(outputs, letters, (part,)) + booked


def publish_dead_split(context: RunContext, spill: SpillRef) -> Published:
    """Writes the dead letters and request rows of the rows of one split that were bad when they were read."""
    if not spill.dead:
        return Published()
    layout = layout_of(context)
    batch = read_piece(context.scratch, spill, context.ranges)
    rows = pa.Table.from_batches([batch])
    n = rows.num_rows
    reasons = rows.column(layout.index("reason")).combine_chunks().cast(pa.string())
    extra = {
        "request_id": rows.column(layout.index("request_id")),
        "reason": reasons,
        "message": rows.column(layout.index("message")),
        "attempts": pa.array(np.zeros(n, np.int32)),
    }
    table = _with_input(layout, rows, extra, DEAD_LETTER_COLUMNS)
    name = f"part-{context.part_prefix}unread-{spill.split:05d}.parquet"
    letters = _write(context, f"dead_letters/{name}", table)
    columns = _request_columns(context, layout, rows, "dead")
    columns["reason"] = reasons.dictionary_encode().cast(LABEL)
    columns["cost"] = pa.array([Decimal(0)], COST).take(pa.array(np.zeros(n, np.int8)))
    requests = _as_requests(columns, n)
    part = write_part(
        context.ledger,
        "requests",
        context.run_date,
        context.run_id,
        f"{context.part_prefix}d{spill.split:05d}",
        requests,
    )
    counts = {item["values"]: item["counts"] for item in pc.value_counts(reasons).to_pylist()}
    return Published(dead_letters=(letters,), parts=(part,), dead=counts)


@dataclass(frozen=True, slots=True)
class _Book:
    """Per place of a range: what became of it. All of shape (places,)."""

    answer: npt.NDArray[np.int64]  # row of the attempt that served it, or its leader; -1: none
    last: npt.NDArray[np.int64]  # row of the last attempt of its leader; -1: none
    attempts: npt.NDArray[np.int64]  # how many it had itself
    cost: pa.Array  # COST, of its own attempts
    leader: npt.NDArray[np.int64]
    leads: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, order: pa.Table, attempts: pa.Table) -> _Book:
        n = order.num_rows
        leader = order.column("leader").to_numpy().astype(np.int64)
        place = (attempts.column("tag").to_numpy() & 0xFFFFFFFF) if attempts.num_rows else _NO_ATTEMPTS
        number = np.bincount(place, minlength=n).astype(np.int64)
        answer, last = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
        rows = np.arange(len(place))
        last[place] = rows
        # Backwards, so that the first answer wins.
        good = rows[serving(attempts).to_numpy()][::-1]
        answer[place[good]] = good
        return cls(
            answer[leader],
            last[leader],
            number,
            _cost_by_place(attempts, place, number),
            leader,
            leader == np.arange(n),
        )


def _cost_by_place(attempts: pa.Table, place: npt.NDArray[np.int64], number: npt.NDArray[np.int64]) -> pa.Array:
    zero = pa.scalar(Decimal(0), COST)
    if len(place) and number.max() == 1:
        where = np.full(len(number), -1, np.int64)
        where[place] = np.arange(len(place))
        found = attempts.column("cost").combine_chunks().take(pa.array(where, mask=where < 0))
        return pc.fill_null(found, zero)
    summed = (
        pa.table({"place": pa.array(place), "cost": attempts.column("cost")})
        .group_by("place")
        .aggregate([("cost", "sum")])
    )
    where = np.full(len(number), -1, np.int64)
    where[summed.column("place").to_numpy()] = np.arange(summed.num_rows)
    costs = summed.column("cost_sum").combine_chunks().cast(COST)
    return pc.fill_null(costs.take(pa.array(where, mask=where < 0)), zero)


def _attempts(mine: pa.Table, history: pa.Table | None) -> pa.Table:
    # Earlier starts came first: their answers win, their attempts are counted first.
    table = mine if history is None or not history.num_rows else pa.concat_tables([history, mine])
    return table.unify_dictionaries().combine_chunks()


def _reasons(
    order: pa.Table, attempts: pa.Table, book: _Book, range_: int, unserved: Iterable[pa.Table]
) -> tuple[pa.Array, pa.Array]:
    """Reason and message per place, of those that have no answer; the leader's for its duplicates."""
    n = order.num_rows
    known: list[str | None] = order.column("reason").cast(pa.string()).to_pylist() if n else []
    messages: list[str | None] = order.column("message").to_pylist() if n else []
    open_places = [int(p) for p in np.flatnonzero(book.answer < 0) if known[p] is None]
    if not open_places:
        return pa.array(known, pa.string()), pa.array(messages, pa.string())
    market: dict[int, str] = {}
    for table in unserved:
        for lot in table.filter(pc.equal(table.column("range"), range_)).select(["places", "last_error"]).to_pylist():
            error = lot["last_error"] or "capacity"
            market.update(dict.fromkeys(np.frombuffer(lot["places"], "<u4").tolist(), error))
    errors = attempts.column("error_class").cast(pa.string()).to_pylist() if attempts.num_rows else []
    details = attempts.column("error_message").cast(pa.string()).to_pylist() if attempts.num_rows else []
    for place in open_places:
        leader, last = int(book.leader[place]), int(book.last[place])
        tried = errors[last] if last >= 0 else None
        error = market.get(leader) or tried or "server"
        if error in REASON_OF_ERROR:
            # Why it was sent nowhere in the end says less than how its last attempt ended.
            error = tried or error
        reason = REASON_OF_ERROR.get(error, error)
        if reason not in MESSAGE_OF_REASON:
            reason = "failed"
        if reason == "failed" and last < 0:
            # It was sent nowhere: its pools went down before.
            reason = "capacity"
        detail = details[last] if last >= 0 else None
        known[place] = reason
        messages[place] = f"{MESSAGE_OF_REASON[reason]}: {detail}" if detail else MESSAGE_OF_REASON[reason]
    return pa.array(known, pa.string()), pa.array(messages, pa.string())


def _outputs(
    context: RunContext,
    layout: SpillLayout,
    rows: pa.Table,
    found: pa.Table,
    book: _Book,
    served: npt.NDArray[np.int64],
) -> pa.Table:
    extra = {
        "request_id": rows.column(layout.index("request_id")),
        **{name: found.column(name) for name in ("output", "input_tokens", "cached_tokens", "output_tokens")},
        **{name: found.column(name).cast(pa.string()) for name in ("finish_reason", "model", "pool")},
        "cost": pc.if_else(pa.array(book.leads[served]), book.cost.take(pa.array(served)), pa.scalar(Decimal(0), COST)),
        "attempts": pa.array(book.attempts[served].astype(np.int32)),
    }
    columns = list(OUTPUT_COLUMNS)
    if context.samples:
        extra["samples"] = found.column("samples")
        columns.append(("samples", pa.list_(pa.large_string())))
    return _with_input(layout, rows, extra, columns)


def _with_input(
    layout: SpillLayout, rows: pa.Table, extra: Mapping[str, pa.Array], columns: Sequence[tuple[str, pa.DataType]]
) -> pa.Table:
    taken = {name for name, _ in columns}
    inputs = layout.input_table(rows)
    names = []
    for original in inputs.column_names:
        name = original
        while name in taken:
            name = f"{name}_in"
        taken.add(name)
        names.append(name)
    fields = [_renamed(field, name) for field, name in zip(layout.input_schema, names, strict=True)]
    schema = pa.schema([*fields, *(pa.field(name, type_) for name, type_ in columns)])
    return pa.Table.from_arrays([*inputs.columns, *(extra[name] for name, _ in columns)], schema=schema)


def _renamed(field: pa.Field, name: str) -> pa.Field:
    """The field under another name, its own kept beside it, so that dead letters can become input again."""
    if name == field.name:
        return field
    return field.with_name(name).with_metadata({**(field.metadata or {}), ORIGINAL_NAME: field.name.encode()})


def _requests(
    context: RunContext,
    layout: SpillLayout,
    rows: pa.Table,
    order: pa.Table,
    attempts: pa.Table,
    book: _Book,
    reasons: pa.Array,
) -> pa.Table:
    n = order.num_rows
    has_answer = pa.array(book.answer >= 0)
    attempt = np.where(book.answer >= 0, book.answer, book.last)
    where = pa.array(attempt, mask=attempt < 0)
    columns = _request_columns(context, layout, rows, "served")
    columns["status"] = pa.DictionaryArray.from_arrays(
        pa.array((book.answer < 0).astype(np.int32)), pa.array(["served", "dead"])
    )
    columns["reason"] = pc.if_else(has_answer, pa.scalar(None, pa.string()), reasons).dictionary_encode().cast(LABEL)
    for name in ("lot_id", "round"):
        columns[name] = attempts.column(name).take(where)
    columns["attempt_id"] = attempts.column("attempt_id").combine_chunks().take(where)
    ids = columns["request_id"]
    follows = ~book.leads
    if follows.any():
        columns["shared_with"] = ids.take(pa.array(book.leader, mask=~follows))
    columns["cost"] = pc.if_else(pa.array(book.leads), book.cost, pa.scalar(Decimal(0), COST))
    return _as_requests(columns, n)


def _request_columns(context: RunContext, layout: SpillLayout, rows: pa.Table, status: str) -> dict[str, pa.Array]:
    n = rows.num_rows
    return {
        "run_id": constant(context.run_id, LABEL, n),
        "request_id": rows.column(layout.index("request_id")),
        "source_file": rows.column(layout.index("file")),
        "source_row": rows.column(layout.index("row")),
        "tenant": rows.column(layout.index("tenant")),
        "placement": rows.column(layout.index("placement")),
        "status": constant(status, LABEL, n),
        "tags": constant(context.tags, LABEL, n),
    }


def _as_requests(columns: Mapping[str, pa.Array], n: int) -> pa.Table:
    return pa.Table.from_arrays(
        [columns[f.name] if f.name in columns else pa.nulls(n, f.type) for f in REQUESTS], schema=REQUESTS
    )


def _rows(rows: pa.Table, chosen: npt.NDArray[np.int64]) -> pa.Table:
    return rows if len(chosen) == rows.num_rows else rows.take(pa.array(chosen))


def _counts(reasons: pa.Array, dead: npt.NDArray[np.int64]) -> dict[str, int]:
    if not len(dead):
        return {}
    return {item["values"]: item["counts"] for item in pc.value_counts(reasons.take(pa.array(dead))).to_pylist()}


def _total(found: pa.Table, name: str, leads: npt.NDArray[np.bool_]) -> int:
    column = found.column(name)
    if not leads.all():
        column = column.filter(pa.array(leads))
    return int(pc.sum(column).as_py() or 0)


def _truncated(found: pa.Table) -> int:
    """How many of the answers were cut off at max_tokens."""
    reasons = found.column("finish_reason").combine_chunks()
    cut = reasons.dictionary.index("length").as_py()
    return 0 if cut < 0 else int(pc.sum(pc.equal(reasons.indices, cut)).as_py() or 0)


def _write(context: RunContext, path: str, table: pa.Table) -> OutputFile:
    """Writes a Parquet file create-only under the run's directory."""
    # Text that is nearly all distinct gains nothing from a dictionary and pays for the attempt.
    plain = [f.name for f in table.schema if not _repeats(f.type)]
    dictionary = [
        f.name for f in table.schema if f.name not in plain or f.name in {"finish_reason", "model", "pool", "reason"}
    ]
    with context.run_dir.scratch_file() as scratch:
        pq.write_table(table, scratch, compression=_CODEC, use_dictionary=dictionary, write_statistics=dictionary)
        with Path(scratch).open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        size = Path(scratch).stat().st_size
        context.run_dir.create_from(path, scratch)
    return OutputFile(path, table.num_rows, size, digest)


def _repeats(type_: pa.DataType) -> bool:
    return not (
        pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_) or pa.types.is_floating(type_) or pa.types.is_nested(type_)
    )  # fmt: skip
