"""What the market decided in a round, kept in the journal: a retried bundle must not decide otherwise."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from bidbeam.connectors.errors import AlreadyExists
from bidbeam.connectors.ledger_manifest import PartFile
from bidbeam.connectors.ledger_writer import write_part
from bidbeam.connectors.schemas import LEDGER_VERSION, START
from bidbeam.transforms.run_context import RunContext, start_of
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


_MOVED = {("bidbeam.transforms.shift", each.__name__): each for each in (Award, ShiftTask)}
"""Where classes stood when a decision was kept by an earlier version, which a later start of its run still reads."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _MOVED.get((module, name)) or super().find_class(module, name)


def _read(data: bytes) -> Any:
    # Written by our own workers.
    return _Unpickler(io.BytesIO(data)).load()


def _name(round_: int) -> str:
    return f"market/round-{round_:03d}.pickle"


def load(context: RunContext, round_: int) -> Decision | None:
    """The decision of a round that an earlier try of the bundle made; None where there is none."""
    if not context.scratch.exists(_name(round_)):
        return None
    decision: Any = _read(context.scratch.read(_name(round_)))
    if not isinstance(decision, Decision):
        raise TypeError(f"{_name(round_)} holds no decision")
    return decision


def keep(context: RunContext, decision: Decision) -> Decision:
    """Keeps a decision, and returns the one that counts: the first that was kept."""
    data = io.BytesIO()
    pickle.dump(decision, data)
    try:
        context.scratch.create(_name(decision.round), data.getvalue())
    except AlreadyExists:
        kept = load(context, decision.round)
        return decision if kept is None else kept
    return decision


def market_parts(context: RunContext) -> list[PartFile]:
    """The ledger parts of every round of every start, from the decisions that were kept."""
    parts: list[PartFile] = []
    names = [e.name for e in context.journal.list() if "/market/round-" in e.name and e.name.endswith(".pickle")]
    for name in names:
        decision: Any = _read(context.journal.read(name))
        start = start_of(name)
        for table, rows in decision.tables.items():
            # An earlier version may have written them, with fewer columns, before its start was cut short.
            part = f"s{start:03d}-k{decision.round:02d}-v{LEDGER_VERSION}"
            starts = pa.chunked_array([pa.repeat(pa.scalar(start, START.type), rows.num_rows)])
            told = rows.append_column(START, starts)
            parts.append(write_part(context.ledger, table, context.run_date, context.run_id, part, told))
    return parts
