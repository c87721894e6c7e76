"""How many of a range's rows a start has to get answered, noted on the scratch for whoever draws the progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.store import Store
from bidbeam.transforms.prefix import Int64s

_DIRECTORY = "planned"


@dataclass(frozen=True, slots=True)
class Planned:
    """Rows by what is to be done: ``rows`` = ``open`` + ``shared`` + ``before`` + ``invalid``."""

    rows: int = 0
    open: int = 0
    """Requests to be sent."""
    shared: int = 0
    """Rows that get the answer of one of those."""
    before: int = 0
    """Rows that earlier starts of the run settled."""
    invalid: int = 0
    """Rows that died while the plan was made."""


def planned_of(order: pa.Table, live: Int64s) -> Planned:
    """What is to be done of a range (ORDER), of which these places are to be sent."""
    leaders = order.column("leader").to_numpy().astype(np.int64)
    alive = pc.is_null(order.column("reason")).to_numpy(zero_copy_only=False)
    answered_now = int((np.isin(leaders, live) & alive).sum())
    return Planned(
        rows=order.num_rows,
        open=len(live),
        shared=answered_now - len(live),
        before=int(alive.sum()) - answered_now,
        invalid=int((~alive).sum()),
    )


def note_planned(scratch: Store, range_: int, planned: Planned) -> None:
    """Writes it down; a try of the same bundle before this one wrote the same."""
    counts: Mapping[str, int] = {name: getattr(planned, name) for name in Planned.__slots__}
    scratch.replace(f"{_DIRECTORY}/range-{range_:06d}.json", json.dumps(counts).encode())


def read_planned(scratch: Store) -> Planned:
    """The sum over the ranges that have been planned so far."""
    counts = [json.loads(scratch.read(entry.name)) for entry in scratch.list(f"{_DIRECTORY}/")]
    return Planned(**{name: sum(each[name] for each in counts) for name in Planned.__slots__})
