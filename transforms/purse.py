"""A shift's purse: what its round reserved for pools that are paid by the token, and who may draw on it.

Where the reserve covers all lots and fallbacks at their worst, only second tries ask whether there is money for them.
Where it does not the round is *tight*: every request is paid for at its worst case before it is sent, and once its bill
is on the store what it did not cost pays for others. So the reserve turns over until the bills themselves have used
it up, and at no moment is more out and spent than it holds.

Lots that the reserve covers come first. Of the others those that are cheaper per answer do: a lot gets no money as long
as that is needed for cheaper ones of another pool which still have to be sent. Within a pool the queue is in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import Lasting
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.schemas import COST
from bidbeam.transforms.estimates import worst_input
from bidbeam.transforms.lane import Lane, Lot, all_tags
from bidbeam.transforms.lots import TAKEN_OVER
from bidbeam.transforms.order import read_order
from bidbeam.transforms.outstanding import Tags
from bidbeam.transforms.retrying import worst_case_of, worst_cases_of
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms, worst_case_cost
from bidbeam.transforms.shift_task import ShiftTask

_SUMMAND = pa.decimal128(37, 18)
LAST = 2**20
"""The rank of a lot at a pool that nothing is reserved for: all others come first."""


class Purse:
    """Of one shift, for all its ``lanes`` together whose pools are paid by the token; without a budget it says yes to
    everything. ``won`` names the pool that each lot was awarded.

    Time is walled off by itself: see ``shift_task.Award.reserved_ms``.
    """

    def __init__(
        self, context: RunContext, task: ShiftTask, lanes: Callable[[], Iterable[Lane]], won: Mapping[str, str]
    ) -> None:
        self._context, self._all_lanes, self._won = context, lanes, won
        self._reserved, self._adopted = task.reserved, task.adopted
        self.tight = task.tight and task.reserved is not None
        """Whether every request is paid for before it is sent."""
        self._before = self._owed = Decimal(0)
        self._orders: dict[int, pa.Table] = {}
        self._unwritten = deque[Decimal]()
        self._cheaper: dict[tuple[str, str, int], tuple[int, Decimal]] = {}
        self._abandoned = pa.table({"tag": pa.array([], pa.int64()), "worst": pa.array([], COST)})
        self._last_resort = False

    @property
    def overspent(self) -> bool:
        """Whether more was charged than was reserved: only a provider that reports more than the worst case gets this
        far."""
        return self._reserved is not None and self._bought > self._reserved

    def begun_before(self, rows: pa.Table) -> None:
        """An earlier try of the shift has left these in the journal (SEGMENT): they are paid, and what it had in flight
        is asked again beside them, so that from here on the round is tight."""
        timed = [spec.name for spec in self._context.pools if spec.price.by_time]
        pools = pc.is_in(rows.column("pool").cast(pa.string()), value_set=pa.array(timed, pa.string()))
        self._before += sum_decimal(rows.column("cost").filter(pc.invert(pools)))
        self.tight = self._reserved is not None

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

    # -- of a tight round ------------------------------------------------------------------------------------------

    @property
    def left(self) -> Decimal:
        """USD that nothing has cost, or may yet cost. What was taken over from an earlier start is paid for apart."""
        promised = sum((lane.promised + lane.freed for lane in self._lanes()), sum(self._unwritten, Decimal(0)))
        promised += sum_decimal(self._abandoned.column("worst"))
        return (self._reserved or Decimal(0)) - self._adopted - self._bought - promised

    def worst(self, lane: Lane, lot: Lot, info: pa.RecordBatch) -> pa.Array:
        """See ``drawing.Draws``."""
        if lot["lot_id"].endswith(TAKEN_OVER):
            return pa.repeat(pa.scalar(Decimal(0), COST), info.num_rows)
        tokens = info.column("input_tokens").cast(pa.int64())
        # As the auction reckons it: see ``expecting.worst_usage``.
        known = self._context.known.get((lane.pool, lane.model))
        counted = np.ceil(tokens.to_numpy() * max(known.input_ratio or 1.0, 1.0)) if known is not None else tokens
        ours = pc.max_element_wise(tokens, pa.array(counted).cast(pa.int64()))
        most = pc.if_else(info.column("tokens_exact"), ours, worst_input(tokens, info.column("tokens_exact")))
        at = info.schema.get_field_index("input_tokens")
        return worst_case_cost(info.set_column(at, "input_tokens", most), lane.terms)

    def grant(self, lane: Lane, lot: Lot, tags: pa.Array, worst: pa.Array) -> int:
        """See ``drawing.Draws``."""
        more, again = worst, self._abandoned.num_rows > 0
        if again:
            at = pc.index_in(tags, value_set=self._abandoned.column("tag").combine_chunks())
            held = pc.fill_null(self._abandoned.column("worst").combine_chunks().take(at), Decimal(0))
            more = pc.max_element_wise(
                pc.subtract(worst.cast(_SUMMAND), held.cast(_SUMMAND)), pa.scalar(Decimal(0), COST)
            )
        left = self.left
        if not self._last_resort:
            left -= self._kept_for_cheaper(lane, lot)
        count = _affordable(more, left)
        if again:
            granted = pc.is_in(self._abandoned.column("tag"), value_set=tags.slice(0, count))
            self._abandoned = self._abandoned.filter(pc.invert(granted))
        return count

    def abandon(self, tags: pa.Array, worst: pa.Array) -> None:
        """See ``drawing.Draws``."""
        self._abandoned = pa.concat_tables([self._abandoned, pa.table({"tag": tags, "worst": worst})])

    def settled(self) -> None:
        """A segment is about to be written. Until it is on the store, a crash would book all of it at its worst: what
        its bills leave is nobody's yet."""
        self._unwritten.append(sum((lane.freed for lane in self._lanes()), Decimal(0)))
        for lane in self._lanes():
            lane.freed = Decimal(0)

    def written(self) -> None:
        """The first of the segments that are not on the store is."""
        self._unwritten.popleft()

    @property
    def waits(self) -> bool:
        """Whether some request waits for money that what is out may leave."""
        return self.tight and any(lane.short for lane in self._lanes())

    @property
    def drained(self) -> bool:
        """Whether nothing is out that might yet come back soon: a batch takes hours."""
        return not any(lane.engine_in_flight for lane in self._lanes() if not isinstance(lane.engine, Lasting))

    @property
    def _quiet(self) -> bool:
        """Whether nothing can leave money soon, neither what is out nor what is about to go."""
        lanes = [lane for lane in self._lanes() if not isinstance(lane.engine, Lasting)]
        if any(self._unwritten) or any(lane.freed for lane in lanes):
            return False
        return self.drained and not any(lane.pending_results or (lane.waiting and not lane.short) for lane in lanes)

    def last_resort(self) -> list[tuple[Lot, Tags]]:
        """Once all is quiet: gives what is left to the cheapest that waits, dearer ones or not. Returns what even that
        does not pay for, (lot, tags not sent)."""
        unpaid = list[tuple[Lot, Tags]]()
        short = [lane for lane in self._lanes() if lane.short]
        if not short or not self._quiet:
            return unpaid
        lane = min(short, key=lambda each: 0 if each.unpaid is None else self._rank(each, each.unpaid[0]))
        with self._all_for_one():
            lane.fill()
            while lane.short and (isinstance(lane.engine, Lasting) or not lane.engine_in_flight):
                # What a batch leaves comes too late for this round.
                unpaid += lane.leftover() if isinstance(lane.engine, Lasting) else self._too_dear(lane)
                lane.fill()
        return unpaid

    @contextmanager
    def _all_for_one(self) -> Iterator[None]:
        self._last_resort = True
        try:
            yield
        finally:
            self._last_resort = False
            self._orders = {}

    def _too_dear(self, lane: Lane) -> list[tuple[Lot, Tags]]:
        """Takes out of a lane what comes next as long as nothing of it can be paid for."""
        left = self.left
        passed = lane.pass_over(left)
        while lane.unpaid is None and lane.queue:
            lot = lane.queue[0]
            tags = all_tags(lot)
            if lot["range"] not in self._orders:
                self._orders = {}
            here = worst_cases_of(*self._of_order(lot, tags), terms=lane.terms)
            if pc.min(here).as_py() <= left or lot["lot_id"].endswith(TAKEN_OVER):
                break
            passed.append((lane.queue.popleft(), tags))
        return passed

    def _kept_for_cheaper(self, lane: Lane, lot: Lot) -> Decimal:
        """USD that lots of other lanes which come before this one may yet cost."""
        rank = self._rank(lane, lot)
        kept = Decimal(0)
        for other in self._lanes() if rank else ():
            if other is lane or not other.open:
                continue
            if (opened := other.unpaid) is not None and self._rank(other, opened[0]) < rank:
                kept += opened[1]
            kept += self._queued(other, rank)
        return kept

    def _queued(self, lane: Lane, rank: int) -> Decimal:
        """USD that what is queued at a lane, of lower ranks, may cost; counted anew whenever the queue is another."""
        key, length = (lane.pool, lane.model, rank), len(lane.queue)
        if self._cheaper.get(key, (-1,))[0] != length:
            worst: Iterator[Decimal] = (
                each.get("worst") or Decimal(0) for each in lane.queue if self._rank(lane, each) < rank
            )
            self._cheaper[key] = length, sum(worst, Decimal(0))
        return self._cheaper[key][1]

    def _rank(self, lane: Lane, lot: Lot) -> int:
        """0: the reserve covers the lot on this lane; else the higher the dearer it is per answer."""
        mine = self._won.get(lot["lot_id"]) == lane.pool
        return int(lot.get("rank" if mine else "fallback_rank") or 0)

    # --------------------------------------------------------------------------------------------------------------

    @property
    def _bought(self) -> Decimal:
        return sum((lane.cost for lane in self._lanes()), self._before)

    def _lanes(self) -> list[Lane]:
        return [lane for lane in self._all_lanes() if not lane.terms.price.by_time]

    def _worst(self, terms: Terms, lot: Lot, tags: Tags) -> Decimal:
        return worst_case_of(*self._of_order(lot, tags), terms=terms)

    def _of_order(self, lot: Lot, tags: Tags) -> tuple[pa.Table, Tags, bool]:
        """The order that a lot is of, the places of these tags in it, and whether its tokens are estimates."""
        if lot["range"] not in self._orders:
            self._orders[lot["range"]] = read_order(self._context, lot["range"])
        return self._orders[lot["range"]], tags & 0xFFFFFFFF, bool(lot["tokens_estimated"])


def _affordable(worst: pa.Array, left: Decimal) -> int:
    """How many of these, from the first on, sum to no more than ``left`` (USD)."""
    low, high = 0, len(worst) + 1
    if sum_decimal(worst) <= left:
        return len(worst)
    while high - low > 1:
        middle = (low + high) // 2
        if sum_decimal(worst.slice(0, middle)) <= left:
            low = middle
        else:
            high = middle
    return low
