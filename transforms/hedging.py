"""Hedging: the last few requests of a shift that take unusually long at a remote pool are asked of another one too.

Only the tail is hedged: nothing is left to send anywhere, and at most one request in ``TAIL`` is still out. Then what
has been out for longer than the pool's own 95th percentile may go to a second pool. The first usable answer wins; the
other attempt is called off, and what it cost is booked under the kind ``hedge``: the price of not having waited.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

HEDGE = "hedge"
TAIL = 20
"""Of so many requests that were sent at most one is still out when hedging begins."""
LEAST_S = 1.0
"""Seconds that a request has been out at least: to save less than that is not worth paying twice."""
_ENOUGH = 20
"""Answers that a percentile needs."""
_KEPT = 1_000

CALLED_OFF = "another pool answered first; it may have been served, so it is booked at its worst case"


class Latencies:
    """How long a pool's last 1,000 answers took, in seconds."""

    def __init__(self) -> None:
        self._seconds = np.zeros(_KEPT)
        self._seen = 0

    def add(self, results: pa.RecordBatch) -> None:
        """Takes those of ``results`` (RESULT_SCHEMA) that are answers."""
        answers = results.filter(pc.equal(results.column("status"), "ok"))
        took = pc.subtract(answers.column("finished_at"), answers.column("started_at")).cast(pa.int64()).to_numpy()
        places = (self._seen + np.arange(len(took))) % _KEPT
        self._seconds[places] = took / 1e6
        self._seen += len(took)

    @property
    def p95_s(self) -> float | None:
        """The 95th percentile; None while fewer than 20 answers are known."""
        return float(np.quantile(self._seconds[: self._seen], 0.95)) if self._seen >= _ENOUGH else None


@dataclass(slots=True)
class Hedge:
    """One request that two pools were asked for."""

    tag: int
    pools: tuple[str, str]
    """Who was asked first, and who second."""
    kind: str
    """Of the first attempt: what the attempt that serves the request is booked as."""
    attempt_no: int
    """Of the second attempt."""
    out: set[str] = field(default_factory=set)
    """Which of them still owes an outcome."""
    answered: str | None = None
    held: pa.Table | None = None
    """The failure (SEGMENT) of the one that ended first; it counts once the other has failed too."""


@dataclass(frozen=True, slots=True)
class Ruled:
    """Settled rows (SEGMENT) as they are to be written; which failures count; and whose attempts do not count at all:
    (pool, model, whether it answered)."""

    rows: pa.Table
    failed: pa.Table
    passed_over: Sequence[tuple[str, str, bool]] = ()


class Hedges:
    """The hedged requests of a shift that are not over."""

    def __init__(self) -> None:
        self._open: dict[int, Hedge] = {}
        self._ever: set[int] = set()

    @property
    def tags(self) -> npt.NDArray[np.int64]:
        """Of all that are not over."""
        return np.fromiter(self._open, np.int64, len(self._open))

    def knows(self, tag: int) -> bool:
        """Whether the request was ever hedged: none is hedged twice."""
        return tag in self._ever

    def add(self, hedge: Hedge) -> None:
        """A second pool is to be asked."""
        hedge.out = set(hedge.pools)
        self._open[hedge.tag] = hedge
        self._ever.add(hedge.tag)

    def superfluous(self) -> list[tuple[int, str]]:
        """(tag, pool) of the attempts that are still out although the other was answered."""
        return [(tag, pool) for tag, hedge in self._open.items() if hedge.answered for pool in hedge.out]

    def unsent(self, tags: Iterable[int]) -> tuple[list[pa.Table], list[Hedge]]:
        """The second pool was not asked after all. Returns the failures that were waiting for it, and those that the
        first pool has given back unsent meanwhile: nobody is at them any more."""
        released, dropped = [], []
        for tag in tags:
            hedge = self._open.pop(tag, None)
            if hedge is None or hedge.answered is not None or hedge.pools[0] in hedge.out:
                # Where the first is out still all is as if there had been no hedge.
                continue
            if hedge.held is not None:
                released.append(hedge.held)
            else:
                dropped.append(hedge)
        return released, dropped

    def given_back(self, pool: str, tags: Iterable[int]) -> tuple[list[int], list[pa.Table]]:
        """The first pool gives these back unsent. Returns those that were never hedged, or whose hedge is over, and
        the failures of second pools that were waiting for it; what is left is the second pool's to answer."""
        others, released = list[int](), []
        for tag in tags:
            if (hedge := self._open.get(tag)) is None or pool not in hedge.out:
                others.append(tag)
                continue
            hedge.out.discard(pool)
            if not hedge.out:
                del self._open[tag]
                if hedge.held is not None and hedge.answered is None:
                    released.append(hedge.held)
        return others, released

    def rule(self, rows: pa.Table) -> Ruled:
        """Says of settled rows which attempt of a hedged request counts, and how the other is booked."""
        failed = pc.not_equal(rows.column("status").cast(pa.string()), "ok")
        mine = np.isin(pc.fill_null(rows.column("tag"), -1).to_numpy(), self.tags) if self._open else np.zeros(0, bool)
        if not mine.any():
            return Ruled(rows, rows.filter(failed))
        columns = {name: rows.column(name).cast(pa.string()).to_pylist() for name in _CHANGED}
        pools, models = (rows.column(name).cast(pa.string()).to_pylist() for name in ("pool", "model"))
        tags = rows.column("tag").to_pylist()
        counts = failed.to_numpy().copy()
        beaten, released = list[tuple[str, str, bool]](), list[pa.Table]()
        places = np.flatnonzero(mine)
        ends = rows.column("finished_at").cast(pa.int64()).to_numpy()
        for row in places[np.argsort(ends[places], kind="stable")].tolist():
            hedge, pool, ok = self._open[tags[row]], pools[row], columns["status"][row] == "ok"
            hedge.out.discard(pool)
            if hedge.answered is not None:
                counts[row] = False
                beaten.append((pool, models[row], ok))
                columns["kind"][row] = HEDGE
                if columns["status"][row] == "lost":
                    columns["status"][row], columns["error_class"][row] = "cancelled", None
                    columns["error_message"][row] = CALLED_OFF
            elif ok:
                hedge.answered = pool
                if pool == hedge.pools[1]:
                    columns["kind"][row] = hedge.kind if hedge.held is None else "retry"
            elif hedge.out:
                counts[row] = False
                hedge.held = rows.slice(row, 1)
            else:
                # Both failed: whatever comes next is numbered after the later of them.
                counts[row] = False
                both = (hedge.held, rows.slice(row, 1))
                released += [_numbered(each, hedge.attempt_no) for each in both if each is not None]
            if not hedge.out:
                del self._open[hedge.tag]
        written = rows
        for name, values in columns.items():
            at = rows.schema.get_field_index(name)
            written = written.set_column(at, rows.schema.field(at), pa.array(values, pa.string()).dictionary_encode())
        return Ruled(written, pa.concat_tables([written.filter(pa.array(counts)), *released]), beaten)


_CHANGED = ("kind", "status", "error_class", "error_message")


def _numbered(rows: pa.Table, attempt_no: int) -> pa.Table:
    at = rows.schema.get_field_index("attempt_no")
    return rows.set_column(at, rows.schema.field(at), pa.array([attempt_no] * rows.num_rows, pa.int16()))
