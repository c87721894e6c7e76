"""What a budget pays for: which lots it covers, cheapest per answer first, and what the others may have of it.

Money is USD, exact. Worst cases are covered as far as it goes; beyond that lots are awarded on what others leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_DOWN, Context, Decimal

import numpy as np
import pyarrow as pa

from bidbeam.transforms.allocation import allocate
from bidbeam.transforms.bidding import BidMatrix
from bidbeam.transforms.market import UNSERVED, Ints, Market

_BY_TOKEN = -1
"""All pools paid by the token together, beside single pools paid by time."""
_NEXT_TO_NOTHING, _STEP = 1e-12, 1.1
"""USD per answer from which on lots are told apart by their price, and by how much."""


class Costs:
    """Exact costs of (lot, pool) pairs, in USD; a pool's are computed when first asked for."""

    def __init__(self, of_pool: Callable[[int], pa.Array]) -> None:
        self._of_pool, self._columns, self._known = of_pool, dict[int, pa.Array](), dict[int, list[Decimal]]()

    def __call__(self, lot: int, pool: int) -> Decimal:
        if pool not in self._known:
            self._known[pool] = self._column(pool).to_pylist()
        return self._known[pool][lot]

    def of(self, pool_of: Ints) -> list[Decimal | None]:
        """Those of an assignment, None where a lot is unserved."""
        costs: list[Decimal | None] = [None] * len(pool_of)
        for pool in np.unique(pool_of[pool_of >= 0]):
            lots = np.flatnonzero(pool_of == pool)
            for lot, cost in zip(lots, self._column(int(pool)).take(pa.array(lots)).to_pylist(), strict=True):
                costs[lot] = cost
        return costs

    def _column(self, pool: int) -> pa.Array:
        if pool not in self._columns:
            self._columns[pool] = self._of_pool(pool)
        return self._columns[pool]


def written(money: Decimal) -> Decimal:
    """So much of it as can be written down: what engines are held back leaves more places than that."""
    return money.quantize(Decimal("1e-18"), ROUND_DOWN, Context(prec=60))


def total(costs: Iterable[Decimal | None]) -> Decimal:
    return sum((cost for cost in costs if cost is not None), Decimal(0))


def within_budget(market: Market, bids: BidMatrix, pool_of: Ints, worst: Costs, budget: Decimal, soft: bool) -> Ints:
    """The assignment with what the budget cannot cover left out: the cheapest per answer are covered first.

    The lots are covered where they are, or dealt anew from the cheapest on, whichever serves more requests; what is
    then served is allocated once more, for the room that the others leave. ``soft`` room keeps no lot waiting.
    """
    asked = np.maximum(bids.lots.requests, 1)
    dealt = np.where(pool_of >= 0, bids.score[np.arange(len(pool_of)), pool_of], np.inf)
    nobody = np.full_like(pool_of, UNSERVED)
    cheapest = np.argsort(bids.score.min(axis=1) / asked, kind="stable")
    tried = [
        _cover(market, bids, nobody, pool_of, np.argsort(dealt / asked, kind="stable"), worst, budget),
        _cover(market, bids, nobody, nobody, cheapest, worst, budget),
    ]
    best = min(tried, key=market.regarded)
    served = np.flatnonzero(best >= 0)
    if len(served):
        anew = allocate(market.only(served)).pool_of
        if np.all(anew >= 0) and sum(map(worst, served, anew), Decimal(0)) <= budget:
            best[served] = anew
    # Dealt anew they may leave money or room for one more.
    rest = market.within(np.full(len(market.room), np.inf)) if soft else market
    return _cover(rest, bids, best, nobody, cheapest[best[cheapest] < 0], worst, budget)


def on_what_is_left(
    market: Market, bids: BidMatrix, covered: Ints, pool_of: Ints, worst: Costs, budget: Decimal
) -> tuple[Ints, list[Decimal | None]]:
    """The assignment with the lots that the budget does not cover, the cheapest per answer first, each on its pool in
    ``pool_of`` or else the cheapest with room; and what is reserved of each lot's worst case (USD).

    Such a lot is paid from what others leave, so that nothing of it need be reserved: of pools paid by the token, as
    long as they hold together what one of its requests may cost; of one paid by time, which is cancelled with all that
    it is at when its time is up, as long as that is enough for all of its lots as they are expected to go.
    """
    pool_of, dealt = covered.copy(), pool_of
    reserved = worst.of(covered)
    left = budget - total(reserved)
    by_time = np.array([pool.spec.price.by_time for pool in bids.pools], dtype=np.bool_)
    expected = Costs(bids.expected_cost)
    held = dict.fromkeys([_BY_TOKEN, *np.flatnonzero(by_time).tolist()], Decimal(0))
    busy = dict.fromkeys(held, Decimal(0))
    for lot in np.flatnonzero(covered >= 0):
        at = int(covered[lot]) if by_time[covered[lot]] else _BY_TOKEN
        held[at] += reserved[lot] or 0
        busy[at] += expected(int(lot), at) if at >= 0 else 0
    room = market.room - market.load(covered)
    order = np.argsort(bids.score.min(axis=1) / np.maximum(bids.lots.requests, 1), kind="stable")
    for lot in order[covered[order] < 0]:
        here = int(dealt[lot])
        ranked = np.argsort(bids.score[lot], kind="stable")[: np.count_nonzero(bids.eligible[lot])].tolist()
        for pool in [*([here] if here >= 0 else []), *ranked]:
            cost = worst(lot, pool)
            at = pool if by_time[pool] else _BY_TOKEN
            needs = busy[at] + expected(lot, pool) if at >= 0 else cost / int(max(bids.lots.requests[lot], 1))
            if market.seconds[lot, pool] <= room[pool] and needs <= held[at] + left:
                part = min(cost, left)
                pool_of[lot], reserved[lot] = pool, part
                left -= part
                held[at] += part
                busy[at] += expected(lot, pool) if at >= 0 else 0
                room[pool] -= market.seconds[lot, pool]
                break
    return pool_of, reserved


def _cover(
    market: Market, bids: BidMatrix, covered: Ints, pool_of: Ints, order: Ints, worst: Costs, budget: Decimal
) -> Ints:
    """What is ``covered`` already, and lots in this order, each on its pool in ``pool_of`` or else the cheapest with
    room, as far as the budget goes."""
    left, covered = budget - total(worst.of(covered)), covered.copy()
    wanted = np.where(covered >= 0, covered, pool_of)
    room = market.room - market.load(wanted)
    for lot in order:
        here = int(pool_of[lot])
        if here >= 0:
            room[here] += market.seconds[lot, here]
        ranked = np.argsort(bids.score[lot], kind="stable")
        for pool in [*([here] if here >= 0 else []), *ranked[: np.count_nonzero(bids.eligible[lot])].tolist()]:
            if market.seconds[lot, pool] <= room[pool] and worst(lot, pool) <= left:
                covered[lot] = pool
                left -= worst(lot, pool)
                room[pool] -= market.seconds[lot, pool]
                break
    return covered


def fallbacks(
    bids: BidMatrix, runner_up: Ints, worst: Costs, budget: Decimal | None, committed: Decimal
) -> tuple[Ints, list[Decimal]]:
    """The runners-up that may take over, and what is reserved for each (USD) beside the ``committed`` awards.

    A winner may go down when part of a lot is paid for, so both worst cases are covered as far as the budget goes. A
    pool paid by time is no fallback under a budget: what bounds it are the seconds of its own awards.
    """
    beside = [Decimal(0)] * len(runner_up)
    if budget is None:
        return runner_up, beside
    fallback, left = runner_up.copy(), budget - committed
    for lot in np.flatnonzero(runner_up >= 0):
        pool = int(runner_up[lot])
        if bids.pools[pool].spec.price.by_time:
            fallback[lot] = UNSERVED
        else:
            beside[lot] = min(worst(lot, pool), left)
            left -= beside[lot]
    return fallback, beside


def ranks(bids: BidMatrix, pool_of: Ints, covered: Sequence[bool]) -> Ints:
    """In which order lots on these pools are paid for: 0 what is ``covered``, then the cheapest per answer, a tenth
    more from each rank to the next. Lots of about the same price keep the order that their prefixes are in."""
    rank = np.zeros(len(pool_of), dtype=np.int64)
    lots = np.flatnonzero((pool_of >= 0) & ~np.array(covered, dtype=np.bool_))
    if len(lots):
        each = np.maximum(bids.score[lots, pool_of[lots]], 0.0) / np.maximum(bids.lots.requests[lots], 1)
        paid = each > 0
        rank[lots] = 1
        # From a fixed price on, so that ranks on different pools compare.
        rank[lots[paid]] = 1 + np.maximum(np.ceil(np.log(each[paid] / _NEXT_TO_NOTHING) / np.log(_STEP)), 1)
    return rank
