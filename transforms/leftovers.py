"""What a shift could not get answered: which requests, why, at whose fault, and how they go on to the next round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.transforms.lane import Lane, Lot
from bidbeam.transforms.lots import LOT, part_of_lot
from bidbeam.transforms.order import read_order
from bidbeam.transforms.outstanding import Tags
from bidbeam.transforms.region_check import from_elsewhere
from bidbeam.transforms.retrying import Retries
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms

NO_SECOND_TRY = frozenset({"caller", "policy"})
"""Classes of error that another pool would answer the same way: final at once."""

_LotTry = tuple[str, int]
"""A lot's id and the number of the attempt at its requests."""


@dataclass(slots=True)
class _Left:
    """Requests of one lot that got no answer: their tags, the last reason, and the pools whose fault it was."""

    lot: Lot
    tags: list[Tags] = field(default_factory=list)
    why: str = ""
    pools: set[str] = field(default_factory=set)

    def add(self, tags: Tags, why: str, pool: str | None) -> None:
        self.tags.append(tags)
        self.why = why
        if pool is not None:
            self.pools.add(pool)


class Leftovers:
    """Of the shift of one round. ``lots`` are all lots that it was given, by id, filled in as it opens them; ``won``
    says which pool was awarded each."""

    def __init__(self, context: RunContext, round_: int, lots: Mapping[str, Lot], won: Mapping[str, str]) -> None:
        self._context, self._round, self._lots, self._won = context, round_, lots, won
        self._failed: dict[_LotTry, _Left] = {}
        self._unsent: dict[_LotTry, _Left] = {}
        self._retries = Retries()
        self.settled: Tags = np.zeros(0, np.int64)
        """The requests (ascending) that an earlier try of the shift has settled."""

    def failed_on(self, tag: int) -> set[str]:
        """The pools that a request has failed on in this shift."""
        return self._retries.pools(tag)

    def keep_unsent(self, lot: Lot, tags: Tags, why: str, pool: str | None = None) -> None:
        """These requests of a lot were sent nowhere, at the fault of ``pool`` (None: nobody's)."""
        tags = tags[~np.isin(tags, self.settled)]
        if len(tags):
            self._unsent.setdefault((lot["lot_id"], lot["attempt_no"]), _Left(lot)).add(tags, why, pool)

    def note_failures(
        self, rows: pa.Table, stopped: Mapping[str, str], repeating: Mapping[str, Collection[int]]
    ) -> None:
        """Attempts (SEGMENT) that gave no answer; ``stopped`` are the pools that get no more, with why, and
        ``repeating`` says by pool which requests it would fail in the same way again."""
        rows = rows.filter(pc.is_valid(rows.column("tag")))
        if rows.num_rows == 0:
            return
        tags = rows.column("tag").to_numpy()
        lots, classes, pools = (
            rows.column(name).cast(pa.string()).to_pylist() for name in ("lot_id", "error_class", "pool")
        )
        numbers = rows.column("attempt_no").to_pylist()
        paid = pc.greater(rows.column("cost"), 0).to_pylist()
        gone = pc.equal(rows.column("status").cast(pa.string()), "lost").to_pylist()
        astray = from_elsewhere(rows.column("error_message")).to_pylist()
        for tag, lot_id, number, error, pool, charged, lost, elsewhere in zip(
            tags, lots, numbers, classes, pools, paid, gone, astray, strict=True
        ):
            if error in NO_SECOND_TRY and not elsewhere:
                continue
            # What we cancelled ourselves is no fault of the pool's.
            ours = error is None and pool in stopped
            if not ours:
                repeats = tag in repeating.get(pool, ())
                self._retries.note(tag, pool, charged=charged, lost=lost, repeats=repeats)
            left = self._failed.setdefault((lot_id, number), _Left({**self._lots[lot_id], "attempt_no": number}))
            left.add(np.array([tag]), stopped[pool] if ours else error or "server", None if ours else pool)
            left.pools |= self._retries.pools(tag)

    def try_again(
        self, lanes_for: Callable[[Lot], Iterable[Lane]], promise: Callable[[Terms, Lot, Tags], bool]
    ) -> Iterator[tuple[Lane, Lot]]:
        """What may be asked once more in this round, lot by lot, and of whom.

        ``lanes_for`` gives those that may have a lot, the best first; ``promise`` says whether it can be paid for.
        """
        for (lot_id, number), left in list(self._failed.items()):
            tags = np.unique(np.concatenate(left.tags))
            lanes = {lane.pool: lane for lane in lanes_for(left.lot)}
            # Of what an earlier try of this bundle has settled nobody here knows how often it was tried.
            chosen = [None if settled else self._retries.next_pool(tag, list(lanes)) for tag, settled in zip(
                tags.tolist(), np.isin(tags, self.settled).tolist(), strict=True
            )]  # fmt: skip
            for pool, lane in lanes.items():
                mine = tags[np.array([each == pool for each in chosen], bool)]
                if not len(mine) or not promise(lane.terms, left.lot, mine):
                    continue
                tags = tags[~np.isin(tags, mine)]
                chosen = [each for each in chosen if each != pool]
                places = (mine & 0xFFFFFFFF).astype("<u4").tobytes()
                yield lane, {**left.lot, "attempt_no": number + 1, "places": places, "runner_up": None}
            left.tags = [tags]
            if not len(tags):
                del self._failed[lot_id, number]

    def unserved(self) -> pa.Table:
        """What goes to the next round, as lots: failed requests one attempt further, unsent ones where they were."""
        orders: dict[int, pa.Table] = {}
        rows = [self._remainder(left, orders, tried=True) for left in self._failed.values()]
        rows += [self._remainder(left, orders, tried=False) for left in self._unsent.values()]
        parts: Counter[str] = Counter()
        for row in rows:
            lot_id = row["lot_id"]
            if parts[lot_id]:
                # Parts of one lot are lots of their own from here on.
                row["lot_id"] = f"{lot_id}~{self._round + 1}" + (f"-{parts[lot_id]}" if parts[lot_id] > 1 else "")
            parts[lot_id] += 1
        return pa.Table.from_pylist(rows, schema=LOT)

    def _remainder(self, left: _Left, orders: dict[int, pa.Table], *, tried: bool) -> dict[str, Any]:
        lot = left.lot
        if lot["range"] not in orders:
            orders[lot["range"]] = read_order(self._context, lot["range"])
        order = orders[lot["range"]]
        places = np.unique(np.concatenate(left.tags)) & 0xFFFFFFFF
        part = part_of_lot(self._context, lot, order, places)
        # What comes before a part of a lot is the rest of it.
        held_by = lot["held_by"] if part["before"] == lot["before"] else self._won.get(lot["lot_id"])
        return {
            **part,
            "held_by": held_by,
            "round": self._round + 1,
            "attempt_no": lot["attempt_no"] + (1 if tried else 0),
            "last_error": left.why,
            "failed_on": sorted({*(lot["failed_on"] or ()), *left.pools}),
        }
