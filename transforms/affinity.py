"""Prefix affinity: who has the prefix that a lot begins with in its cache already.

A lot begins where the one before it in the plan's order ends, and shares a prefix with it. The pool that also serves
that one bids warm; so does the pool that served it in an earlier round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bools = npt.NDArray[np.bool_]


def follows(lots: pa.Table) -> Bools:
    """Which lots (LOT, bool[n]) begin right behind the row before them; the first does not."""
    n = lots.num_rows
    found = np.zeros(n, np.bool_)
    if n > 1:
        ranges, ends, before = (lots.column(name).to_numpy() for name in ("range", "end", "before"))
        found[1:] = (ranges[1:] == ranges[:-1]) & (before[1:] == ends[:-1] - 1)
    return found


def with_holders(lots: pa.Table, pool_of: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
    """The lots (LOT) with ``held_by`` after an auction: the pool, of ``names``, that was awarded what each follows.

    ``pool_of`` (n,) is -1 where nobody was. What follows nothing that was awarded keeps what was known.
    """
    awarded = np.concatenate([[-1], pool_of[:-1]]) if lots.num_rows else pool_of
    awarded = np.where(follows(lots), awarded, -1)
    won = pa.array(list(names), pa.string()).take(pa.array(awarded, mask=awarded < 0))
    at = lots.schema.get_field_index("held_by")
    return lots.set_column(at, lots.schema.field(at), pc.coalesce(won, lots.column("held_by")))
