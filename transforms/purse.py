"""A shift's purse: what its round reserved for pools that are paid by the token, and whether one more try fits in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal

import numpy as np
import pyarrow as pa

from bidbeam.transforms.lane import Lane, Lot, Tags, all_tags
from bidbeam.transforms.order import read_order
from bidbeam.transforms.retrying import worst_case_of
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms


class Purse:
    """``reserved`` USD (None: there is no budget) for all ``lanes`` together whose pools are paid by the token.

    Time is walled off by itself: see ``shift_task.Award.reserved_ms``.
    """

    def __init__(self, context: RunContext, reserved: Decimal | None, lanes: Callable[[], Iterable[Lane]]) -> None:
        self._context, self._reserved, self._all_lanes = context, reserved, lanes
        self._owed = Decimal(0)
        self._orders: dict[int, pa.Table] = {}
        self.before = Decimal(0)
        """USD of the reserve that earlier tries of the shift have spent."""

    @property
    def overspent(self) -> bool:
        """Whether more was charged than was reserved: only a provider that reports more than the worst case gets this
        far."""
        return self._reserved is not None and self._bought > self._reserved

    def reckon(self) -> None:
        """Counts anew what is out, or is still to be sent, at its worst: see ``promise``."""
        self._orders = {}
        self._owed = Decimal(0)
        if self._reserved is not None:
            parts = ((lane, *part) for lane in self._lanes() for part in lane.unsettled())
            self._owed = sum((self._worst(lane.terms, lot, tags) for lane, lot, tags in parts), Decimal(0))

    def promise(self, terms: Terms, lot: Lot, tags: Tags, instead_of: Terms | None = None) -> bool:
        """Whether asking for these requests of a lot under ``terms`` is paid for by what is left once all that was
        promised since ``reckon``, and all that was out then, has ended at its worst; if so, that is promised too.

        ``instead_of``: the terms under which they were to be asked when that was reckoned, and are not any more.
        """
        if self._reserved is None or terms.price.by_time:
            return True
        worst = self._worst(terms, lot, tags)
        if instead_of is not None and not instead_of.price.by_time:
            worst -= self._worst(instead_of, lot, tags)
        if self._bought + self._owed + worst > self._reserved:
            return False
        self._owed += worst
        return True

    def covered(
        self, lots: Sequence[Lot], terms: Sequence[Terms], others: Mapping[tuple[str, str], Terms], settled: Tags
    ) -> list[Lot | None]:
        """Each lot as far as what is left of the reserve covers those of its requests that are not ``settled``: with
        its runner-up, whose terms are in ``others``, without it, or (None) not at all. The winners come first.

        All of them are covered in the first try of a shift; an earlier one may have lost what was in flight.
        """
        tags = [left[~np.isin(left, settled)] for left in map(all_tags, lots)]
        won = [self.promise(*each) for each in zip(terms, lots, tags, strict=True)]
        found: list[Lot | None] = []
        for lot, left, ours in zip(lots, tags, won, strict=True):
            second = others.get((lot.get("runner_up") or "", lot["model"]))
            both = ours and (second is None or self.promise(second, lot, left))
            found.append(lot if both else {**lot, "runner_up": None} if ours else None)
        return found

    @property
    def _bought(self) -> Decimal:
        return sum((lane.cost for lane in self._lanes()), self.before)

    def _lanes(self) -> list[Lane]:
        return [lane for lane in self._all_lanes() if not lane.terms.price.by_time]

    def _worst(self, terms: Terms, lot: Lot, tags: Tags) -> Decimal:
        if lot["range"] not in self._orders:
            self._orders[lot["range"]] = read_order(self._context, lot["range"])
        order, estimated = self._orders[lot["range"]], bool(lot["tokens_estimated"])
        return worst_case_of(order, tags & 0xFFFFFFFF, estimated=estimated, terms=terms)
