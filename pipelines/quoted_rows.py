"""What becomes of the rows of a quoted job: which are still to be asked, and which others live on their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.transforms.lots import LOT, lot_places
from bidbeam.transforms.order import read_order
from bidbeam.transforms.prefix import Int64s
from bidbeam.transforms.run_context import RunContext


@dataclass(frozen=True, slots=True)
class Behind:
    """What the rows that share the answers of one lot's requests come to, beside these requests themselves."""

    rows: int = 0
    input_tokens: int = 0
    max_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RowCount:
    """The planned rows of a job by what becomes of them; those that were bad when they were read are not among them."""

    repeated: int
    """Invalid: an earlier row has the same id."""
    settled: int
    """Answered, or ended for good, by earlier starts of the run."""
    shared: int
    """Answered by another row's request that is still to be asked."""
    behind: Mapping[str, Behind]
    """By lot, where any row shares an answer."""

    def unserved(self, tables: Iterable[pa.Table]) -> dict[str, int]:
        """Rows of LOT tables that nobody took, by reason."""
        found: Counter[str] = Counter()
        for table in tables:
            columns = (table.column(name).to_pylist() for name in ("lot_id", "last_error", "requests"))
            for lot_id, reason, requests in zip(*columns, strict=True):
                found[reason] += requests + self.behind.get(lot_id, Behind()).rows
        return dict(found)


def count_rows(context: RunContext, ranges: Sequence[int], lots: Sequence[pa.Table]) -> RowCount:
    """``ranges`` are those that have an order; ``lots`` (LOT) hold every request that is still to be asked, once."""
    asked = pa.concat_tables([LOT.empty_table(), *(table.select(LOT.names) for table in lots)])
    repeated = settled = shared = 0
    behind: dict[str, Behind] = {}
    for range_ in ranges:
        order = read_order(context, range_)
        leader = order.column("leader").to_numpy().astype(np.int64)
        dead = pc.is_valid(order.column("reason")).to_numpy(zero_copy_only=False)
        others = np.bincount(leader[~dead & (leader != np.arange(len(leader)))], minlength=len(leader))
        here = asked.filter(pc.equal(asked.column("range"), range_)).select(["lot_id", "places"]).to_pylist()
        wanted = np.zeros(len(leader), np.bool_)
        for lot in here:
            places = lot_places(lot["places"])
            wanted[places] = True
            if others[places].any():
                behind[lot["lot_id"]] = _behind(order, places, others[places])
        repeated += int(dead.sum())
        settled += int((~dead & ~wanted[leader]).sum())
        shared += int(others[wanted].sum())
    return RowCount(repeated, settled, shared, behind)


def _behind(order: pa.Table, places: Int64s, others: Int64s) -> Behind:
    tokens, most, samples = (
        order.column(name).to_numpy().astype(np.int64)[places] for name in ("input_tokens", "max_tokens", "n")
    )
    return Behind(int(others.sum()), int((others * tokens).sum()), int((others * most * samples).sum()))
