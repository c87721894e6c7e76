"""What the market decided in a round, kept in the journal: a retried bundle must not decide otherwise."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from bidbeam.connectors.errors import AlreadyExists, UsageError
from bidbeam.connectors.ledger_manifest import PartFile
from bidbeam.connectors.ledger_writer import write_part
from bidbeam.connectors.schemas import LEDGER_VERSION, START
from bidbeam.connectors.store import Store
from bidbeam.transforms.journal import terms_from_json, terms_to_json
from bidbeam.transforms.run_context import RunContext, start_of
from bidbeam.transforms.settling import Terms
from bidbeam.transforms.shift_task import Award, ShiftTask


@dataclass(frozen=True, slots=True)
class Decision:
    """One round's outcome. ``tables`` are the ledger's (lots, bids, awards, auctions); LOT tables are what is left."""

    round: int
    tasks: tuple[ShiftTask, ...]
    waiting: pa.Table
    """LOT: not awarded now, auctioned again next round."""
    refused: pa.Table
    """LOT: nobody may ever serve these."""
    tables: dict[str, pa.Table]
    reserved: Decimal
    """USD reserved for the awards, at their worst case."""


_HEAD, _CHECKSUM = b"bidbeam.decision", 8
_log = logging.getLogger(__name__)


def _name(round_: int) -> str:
    return f"market/round-{round_:03d}.arrow"


def load(context: RunContext, round_: int) -> Decision | None:
    """The decision of a round that an earlier try of the bundle made; None where there is none."""
    if not context.scratch.exists(_name(round_)):
        return None
    return from_bytes(context.scratch.read(_name(round_)))


def keep(context: RunContext, decision: Decision) -> Decision:
    """Keeps a decision, and returns the one that counts: the first that was kept."""
    try:
        context.scratch.create(_name(decision.round), to_bytes(decision))
    except AlreadyExists:
        kept = load(context, decision.round)
        return decision if kept is None else kept
    return decision


def to_bytes(decision: Decision) -> bytes:
    """A decision as Arrow streams, one after the other: an empty one with all that is no table, as JSON, then one for
    each table in the order that the first one names, then a checksum."""
    tables = {"waiting": decision.waiting, "refused": decision.refused}
    tables |= {f"ledger/{name}": table for name, table in decision.tables.items()}
    tasks = []
    for number, task in enumerate(decision.tasks):
        awards = []
        for place, award in enumerate(task.awards):
            tables[f"lots/{number}/{place}"] = award.lots
            awards.append(
                {
                    "pool": award.pool,
                    "replica": award.replica,
                    "terms": _terms_list(award.terms.values()),
                    "reserved_ms": award.reserved_ms,
                }
            )
        tasks.append(
            {
                "round": task.round,
                "shift": task.shift,
                "awards": awards,
                "runner_up_terms": _terms_list(task.runner_up_terms.values()),
                "reserved": None if task.reserved is None else str(task.reserved),
                "tight": task.tight,
                "adopted": str(task.adopted),
                "adopts": task.adopts,
            }
        )
    head = {"round": decision.round, "tasks": tasks, "reserved": str(decision.reserved), "tables": list(tables)}
    sink = pa.BufferOutputStream()
    _write_stream(sink, pa.schema([], {_HEAD: json.dumps(head).encode()}).empty_table())
    for table in tables.values():
        _write_stream(sink, table)
    content = sink.getvalue()
    return b"".join((memoryview(content), _checksum(memoryview(content))))


def from_bytes(data: bytes) -> Decision:
    """The decision that ``to_bytes`` wrote. Raises ValueError for whatever else the bytes are."""
    content = memoryview(data)[:-_CHECKSUM]
    if data[-_CHECKSUM:] != _checksum(content):
        raise ValueError("it is not what was written")
    try:
        source = pa.BufferReader(pa.py_buffer(content))
        head = json.loads(pa.ipc.open_stream(source).read_all().schema.metadata[_HEAD])
        tables = {str(name): pa.ipc.open_stream(source).read_all() for name in head["tables"]}
        return Decision(
            round=int(head["round"]),
            tasks=tuple(_task_of(task, number, tables) for number, task in enumerate(head["tasks"])),
            waiting=tables["waiting"],
            refused=tables["refused"],
            tables={name.removeprefix("ledger/"): each for name, each in tables.items() if name.startswith("ledger/")},
            reserved=Decimal(head["reserved"]),
        )
    except (pa.ArrowException, OSError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"no decision: {type(error).__name__}") from error


def _checksum(content: memoryview) -> bytes:
    return b"%08x" % zlib.crc32(content)


def _write_stream(sink: pa.BufferOutputStream, table: pa.Table) -> None:
    # Bids repeat themselves: compressed for less time than writing it all takes.
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)


def _terms_list(terms: Iterable[Terms]) -> list[dict[str, object]]:
    return [terms_to_json(each) for each in terms]


def _task_of(task: Mapping[str, Any], number: int, tables: Mapping[str, pa.Table]) -> ShiftTask:
    runners_up = [terms_from_json(each) for each in task["runner_up_terms"]]
    awards = []
    for place, award in enumerate(task["awards"]):
        terms = [terms_from_json(each) for each in award["terms"]]
        awards.append(
            Award(
                pool=str(award["pool"]),
                replica=int(award["replica"]),
                lots=tables[f"lots/{number}/{place}"],
                terms={each.model: each for each in terms},
                reserved_ms=None if award["reserved_ms"] is None else int(award["reserved_ms"]),
            )
        )
    return ShiftTask(
        round=int(task["round"]),
        shift=int(task["shift"]),
        awards=tuple(awards),
        runner_up_terms={(each.pool, each.model): each for each in runners_up},
        reserved=None if task["reserved"] is None else Decimal(task["reserved"]),
        tight=bool(task["tight"]),
        adopted=Decimal(task["adopted"]),
        adopts=tuple((str(pool), str(model)) for pool, model in task["adopts"]),
    )


def refuse_pickles(journal: Store, run_id: str) -> None:
    """Raises UsageError where a start of an earlier version kept its decisions as pickles: whoever can write there
    would run code here, so nothing opens them."""
    names = [e.name for e in journal.list() if "/market/round-" in e.name and e.name.endswith(".pickle")]
    if names:
        raise UsageError(
            f"run {run_id} was begun by an earlier version, which kept what its market decided as a pickle "
            f"({journal.url_of(names[0])}{f' and {len(names) - 1} more' if len(names) > 1 else ''}); this version "
            "opens none. Finish the run with the version that began it, or delete these files and start again: what "
            "was answered stays and is not paid again, but the ledger will lack the lots, bids and awards of that start"
        )


def market_parts(context: RunContext) -> list[PartFile]:
    """The ledger parts of every round of every start, from the decisions that were kept."""
    parts: list[PartFile] = []
    names = [e.name for e in context.journal.list() if "/market/round-" in e.name and e.name.endswith(".arrow")]
    for name in names:
        try:
            decision = from_bytes(context.journal.read(name))
        except ValueError as error:
            # What was answered and paid stands elsewhere: that is no reason not to end.
            _log.warning("%s is damaged (%s): the ledger lacks its lots and bids", context.journal.url_of(name), error)
            continue
        start = start_of(name)
        for table, rows in decision.tables.items():
            # An earlier version may have written them, with fewer columns, before its start was cut short.
            part = f"s{start:03d}-k{decision.round:02d}-v{LEDGER_VERSION}"
            starts = pa.chunked_array([pa.repeat(pa.scalar(start, START.type), rows.num_rows)])
            told = rows.append_column(START, starts)
            parts.append(write_part(context.ledger, table, context.run_date, context.run_id, part, told))
    return parts
