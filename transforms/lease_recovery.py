"""Leases that an earlier start left: given back before anything else is done, and their time booked.

A start that was killed could not give its nodes back; what it wrote down before it asked for them says which they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.leases import LeaseBook, LeaseRecord, NodeApi, give_back, utc_now
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.pools import Meter, PoolSpec
from bidbeam.connectors.schemas import METER_COLUMNS
from bidbeam.connectors.store import Store
from bidbeam.transforms.journal import list_segments, read_segment, write_segment
from bidbeam.transforms.run_context import FxQuote, start_of
from bidbeam.transforms.settling import Terms, overhead_row

_TIME: tuple[Meter, ...] = ("accelerator_second", "accelerator_idle_second", "setup")
_LATE = timedelta(seconds=5)
"""How long after a node was given back the last of its time may have been written into the journal."""
_log = logging.getLogger("bidbeam.leases")


def recover_leases(
    journal: Store, pools: Sequence[PoolSpec], fx: Mapping[str, FxQuote], *, ended_start: int | None = None
) -> None:
    """Gives back every node that stands in the journal, and books what of its time no segment has.

    Only who holds the run may call this. What cannot be given back is said loudly and stays for the next start.
    """
    book = LeaseBook(journal)
    specs = {spec.name: spec for spec in pools if spec.kind == "lease"}
    for found in book.open():
        record = found
        spec = specs.get(record.pool)
        api = None if spec is None else NodeApi(spec)
        if spec is None or api is None or api.host != record.host:
            _log.critical(
                "an earlier start rented %s for pool %s at %s, and the pools file no longer says how to give it back; "
                "see that it ends",
                record.node_id or f"a node named {record.name}", record.pool, record.host,
            )  # fmt: skip
            continue
        existed = True
        if record.released_at is None:
            existed, problem = give_back(api, record)
            if problem is not None:
                continue
            record = replace(record, released_at=utc_now())
            book.note(record)
            if existed:
                _log.warning("pool %s: node %s of an earlier start was given back", record.pool, record.node_id)
        if existed:
            _book(journal, record, spec, fx, (ended_start or 0) + 1)
        book.strike(record.name)


def _book(journal: Store, record: LeaseRecord, spec: PoolSpec, fx: Mapping[str, FxQuote], first_start: int) -> None:
    """Writes what is missing of a lease's time as overhead, into a start whose segments still count."""
    asked_at = datetime.fromisoformat(record.asked_at)
    released_at = datetime.fromisoformat(str(record.released_at))
    booked, terms = _booked_s(journal, record, asked_at, released_at + _LATE)
    missing = round(((released_at - asked_at).total_seconds() - float(booked)) * 1000)
    if missing <= 0:
        return
    meter: Meter = "accelerator_idle_second" if booked else "setup"
    row = overhead_row(
        terms or _terms(spec, record.model, fx),
        meter=meter,
        millis=missing,
        at=released_at,
        attempt_id=hashlib.sha256(f"lease|{record.name}".encode()).digest()[:16],
    )
    prefix = f"start-{max(record.start, first_start):03d}/segments/r0-s000"
    write_segment(journal, prefix, 0, pa.Table.from_batches([row]), [terms or _terms(spec, record.model, fx)])


def _booked_s(journal: Store, record: LeaseRecord, after: datetime, until: datetime) -> tuple[Decimal, Terms | None]:
    """Seconds of the lease that segments hold, and the terms they were booked under."""
    seconds, found = Decimal(0), None
    for name in list_segments(journal):
        if start_of(name) < record.start:
            continue
        rows, terms = read_segment(journal, name)
        mine = pc.and_(
            pc.and_(
                pc.equal(rows.column("pool").cast(pa.string()), record.pool),
                pc.equal(rows.column("model").cast(pa.string()), record.model),
            ),
            pc.and_(
                pc.greater(rows.column("finished_at"), pa.scalar(after, pa.timestamp("us", "UTC"))),
                pc.less_equal(rows.column("finished_at"), pa.scalar(until, pa.timestamp("us", "UTC"))),
            ),
        )
        rows = rows.filter(mine)
        if rows.num_rows:
            seconds += sum((sum_decimal(rows.column(METER_COLUMNS[meter])) for meter in _TIME), Decimal(0))
            found = next((each for each in terms.values() if each.pool == record.pool), found)
    return seconds, found


def _terms(spec: PoolSpec, model: str, fx: Mapping[str, FxQuote]) -> Terms:
    quote = fx.get(spec.price.currency)
    return Terms(
        pool=spec.name,
        model=model,
        price=spec.price,
        fx_rate=Decimal(1) if quote is None else quote.rate,
        fx_source=None if quote is None else quote.source,
        fx_at=None if quote is None else quote.at,
        jurisdiction=spec.placement.get("jurisdiction"),
        operator=spec.placement.get("operator"),
    )
