"""Booking: the journal's segments become the ledger's attempts and charges, a group of segments a part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.ledger_writer import write_part
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.schemas import LEDGER_VERSION, PRICES, SEGMENT
from bidbeam.transforms.charging import explode, serving
from bidbeam.transforms.journal import SegmentRef, read_segment
from bidbeam.transforms.published import PoolCount, Published
from bidbeam.transforms.run_context import RunContext, start_of
from bidbeam.transforms.settling import Terms, constant

_GROUP_ROWS = 131_072


def segment_groups(segments: Sequence[SegmentRef]) -> Iterator[tuple[str, tuple[SegmentRef, ...]]]:
    """Groups of neighbouring segments of one start, each with the name of its part: the same ones in every start.

    Only finished starts' groups can recur, so a part that an earlier start wrote is met again with the same content.
    """
    by_start: dict[int, list[SegmentRef]] = {}
    for segment in sorted(segments, key=lambda s: s.name):
        by_start.setdefault(start_of(segment.name), []).append(segment)
    for start, mine in by_start.items():
        group: list[SegmentRef] = []
        number = rows = 0
        for segment in mine:
            group.append(segment)
            rows += segment.rows
            if rows >= _GROUP_ROWS:
                yield f"s{start:03d}-{number:05d}", tuple(group)
                group, number, rows = [], number + 1, 0
        if group:
            yield f"s{start:03d}-{number:05d}", tuple(group)


def book(context: RunContext, part: str, segments: Sequence[SegmentRef]) -> Published:
    """Writes the attempts and charges of a group of segments (see ``book_rows``)."""
    tables, terms = [], dict[str, Terms]()
    for segment in segments:
        rows, mine = read_segment(context.journal, segment.name)
        tables.append(rows)
        terms |= mine
    return book_rows(context, part, pa.concat_tables(tables).unify_dictionaries(), terms)


def book_rows(context: RunContext, part: str, rows: pa.Table, terms: Mapping[str, Terms]) -> Published:
    """Writes the attempts and charges of SEGMENT rows; ``cost`` of the result is their sum in USD."""
    rows = _settled_once(rows)
    if not rows.num_rows:
        return Published()
    attempts, charges = explode(
        rows,
        schedules=terms,
        run_id=context.run_id,
        run_date=context.run_date,
        tags=context.tags,
        baseline=context.baseline,
    )
    # The same rows under other tags or another baseline are other charges, and have other columns in another version
    # of the ledger: in a part of their own.
    told = repr((LEDGER_VERSION, context.tags, context.baseline))
    part = f"{part}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    tables = {"attempts": attempts, "charges": charges, "prices": price_rows(terms)}
    parts = tuple(
        write_part(context.ledger, name, context.run_date, context.run_id, part, table)
        for name, table in tables.items()
    )
    cost = sum_decimal(rows.column("cost"))
    # Adding to nothing merges the counts of one pool, and names only the most common of other models.
    return Published() + Published(
        parts=parts,
        cost=cost,
        pools=tuple(pool_counts(rows)),
        wasted=wasted_cost(rows),
        other_models=other_models(rows),
        estimated=estimated_answers(rows),
    )


def book_strays(context: RunContext, names: Sequence[str], known: Sequence[SegmentRef]) -> Published:
    """Writes the attempts of segments that no bundle told of: of a try that went on after another had taken its place.

    They were paid for, and serve nobody: as overhead they are no request's. What was given up for lost meanwhile, in
    the segments that are ``known``, is booked there already.
    """
    booked = pa.chunked_array(
        [ids for each in known for ids in read_segment(context.journal, each.name)[0].column("attempt_id").chunks],
        SEGMENT.field("attempt_id").type,
    )
    tables, terms = [], dict[str, Terms]()
    for name in names:
        rows, mine = read_segment(context.journal, name)
        tables.append(rows)
        terms |= mine
    rows = pa.concat_tables(tables).unify_dictionaries()
    rows = rows.filter(pc.invert(pc.is_in(_plain(rows.column("attempt_id")), value_set=_plain(booked))))
    for column in ("tag", "request_id", "lot_id"):
        at = SEGMENT.get_field_index(column)
        rows = rows.set_column(at, SEGMENT.field(at), pa.nulls(rows.num_rows, SEGMENT.field(at).type))
    at = SEGMENT.get_field_index("kind")
    rows = rows.set_column(at, SEGMENT.field(at), constant("overhead", SEGMENT.field(at).type, rows.num_rows))
    return book_rows(context, f"s{context.start:03d}-strays", rows, terms)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.storage if isinstance(whole, pa.ExtensionArray) else whole


def _settled_once(rows: pa.Table) -> pa.Table:
    """The rows without those that were given up for lost and came back after all: each attempt is booked once."""
    lost = pc.equal(rows.column("status").cast(pa.string()), "lost")
    if not pc.any(lost).as_py():
        return rows
    ids = _plain(rows.column("attempt_id"))
    back = pc.is_in(ids, value_set=ids.filter(pc.invert(lost).combine_chunks()))
    return rows.filter(pc.invert(pc.and_(lost, back)))


def pool_counts(rows: pa.Table) -> list[PoolCount]:
    """Served requests, tokens and cost by pool, of SEGMENT rows."""
    plain = pa.table(
        {
            "pool": rows.column("pool").cast(pa.string()),
            "served": pc.and_(serving(rows), pc.is_valid(rows.column("tag"))).cast(pa.int64()),
            **{name: rows.column(name) for name in ("input_tokens", "cached_tokens", "output_tokens", "cost")},
            "other_model": rows.column("other_model").cast(pa.int64()),
        }
    )
    sums = plain.group_by("pool").aggregate([(name, "sum") for name in plain.column_names[1:]]).to_pylist()
    return [
        PoolCount(
            row["pool"],
            row["served_sum"] or 0,
            row["input_tokens_sum"] or 0,
            row["cached_tokens_sum"] or 0,
            row["output_tokens_sum"] or 0,
            row["cost_sum"] or Decimal(0),
            row["other_model_sum"] or 0,
        )
        for row in sums
    ]


def wasted_cost(rows: pa.Table) -> Decimal:
    """USD of SEGMENT rows that served no request."""
    served = pc.and_(serving(rows), pc.is_valid(rows.column("tag")))
    return Decimal(0) if pc.all(served).as_py() else sum_decimal(rows.filter(pc.invert(served)).column("cost"))


def other_models(rows: pa.Table) -> dict[str, int]:
    """How many SEGMENT rows plainly name another model than was asked for, by that name."""
    if not pc.any(rows.column("other_model")).as_py():
        return {}
    names = rows.filter(rows.column("other_model")).column("model_returned").cast(pa.string())
    return {each["values"]: each["counts"] for each in pc.value_counts(names).to_pylist()}


def estimated_answers(rows: pa.Table) -> int:
    """How many SEGMENT rows answered without anybody's count of what they used."""
    sources = rows.column("usage_source").unify_dictionaries().combine_chunks()
    guess = sources.dictionary.index("estimate").as_py()
    if guess < 0 or not pc.any(guessed := pc.equal(sources.indices, guess)).as_py():
        return 0
    answered = pc.equal(rows.filter(guessed).column("status").cast(pa.string()), "ok")
    return int(pc.sum(answered).as_py() or 0)


def price_rows(terms: Mapping[str, Terms]) -> pa.Table:
    """PRICES: one row per price schedule and meter."""
    rows = [
        {
            "price_id": price_id,
            "pool": t.price.pool,
            "meter": meter,
            "unit_price": unit_price,
            "currency": t.price.currency,
            "valid_from": t.price.valid_from,
            "source": t.price.source,
            "valid_to": t.price.valid_to,
            "fetched_at": t.price.fetched_at,
        }
        for price_id, t in sorted(terms.items())
        for meter, unit_price in sorted(t.price.unit_prices.items())
    ]
    return pa.Table.from_pylist(rows, schema=PRICES)
