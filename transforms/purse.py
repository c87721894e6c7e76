"""A shift's purse: what its round reserved for pools that are paid by the token, and whether one more try fits in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal

import pyarrow as pa

from bidbeam.transforms.lane import Lane, Lot, Tags
from bidbeam.transforms.order import read_order
from bidbeam.transforms.retrying import worst_case_of
from bidbeam.transforms.run_context import RunContext


class Purse:
    """``reserved`` USD (None: there is no budget) for all ``lanes`` together whose pools are paid by the token.

    Time is walled off by itself: see ``shift_task.Award.reserved_ms``.
    """

    def __init__(self, context: RunContext, reserved: Decimal | None, lanes: Callable[[], Iterable[Lane]]) -> None:
        self._context, self._reserved, self._all_lanes = context, reserved, lanes
        self._owed = Decimal(0)
        self._orders: dict[int, pa.Table] = {}

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
            self._owed = sum((self._worst(*part) for part in parts), Decimal(0))

    def promise(self, lane: Lane, lot: Lot, tags: Tags, instead_of: Lane | None = None) -> bool:
        """Whether asking ``lane`` for these requests of a lot is paid for by what is left once all that was promised
        since ``reckon``, and all that was out then, has ended at its worst; if so, that is promised too.

        ``instead_of``: who was to be asked for them when that was reckoned, and is not any more.
        """
        if self._reserved is None or lane.terms.price.by_time:
            return True
        worst = self._worst(lane, lot, tags)
        if instead_of is not None and not instead_of.terms.price.by_time:
            worst -= self._worst(instead_of, lot, tags)
        if self._bought + self._owed + worst > self._reserved:
            return False
        self._owed += worst
        return True

    @property
    def _bought(self) -> Decimal:
        return sum((lane.cost for lane in self._lanes()), Decimal(0))

    def _lanes(self) -> list[Lane]:
        return [lane for lane in self._all_lanes() if not lane.terms.price.by_time]

    def _worst(self, lane: Lane, lot: Lot, tags: Tags) -> Decimal:
        if lot["range"] not in self._orders:
            self._orders[lot["range"]] = read_order(self._context, lot["range"])
        order, estimated = self._orders[lot["range"]], bool(lot["tokens_estimated"])
        return worst_case_of(order, tags & 0xFFFFFFFF, estimated=estimated, terms=lane.terms)
