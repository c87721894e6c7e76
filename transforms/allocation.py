"""Which lot goes to which pool: near the least cost under each pool's seconds, with a bound that says how near.

In the letters of ``market``: for any prices m >= 0 on the pools' seconds, the least of ``c - s + m a`` over all
assignments, which a chain of minima finds exactly, less ``m K``, is a lower bound: the linear program's dual, with the
savings of neighbours exact. The prices begin as those of the linear program over *classes* of lots alike and are raised
to those of the single lots (``capacity_prices``). The assignment is the best of three, improved by local search and by
dividing two pools' lots anew: the shares that the lots have at those prices rounded so that no pool gets more than it
has room for, the classes' shares dealt out in long runs of neighbours, and plain greedy.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from bidbeam.transforms.capacity_prices import ascend
from bidbeam.transforms.linear_program import least_makespan, transport
from bidbeam.transforms.local_search import improve
from bidbeam.transforms.market import UNSERVED, Bools, Floats, Ints, Market, best_chain, greedy
from bidbeam.transforms.pair_exchange import exchange_pairs

_CLASS_VARIABLES = 12_000
_GOOD_ENOUGH = 1e-4
_FEW_LOTS = 500
"""Up to so many lots the second best start is improved too: with more of them the best one always ended better."""
_SHARED = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """The pool of each lot (lots,), UNSERVED where none has room for it, and the prices of the pools' seconds that it
    was found with (pools,)."""

    pool_of: Ints
    prices: Floats


def allocate(market: Market) -> Allocation:
    """Deals the lots out; never worse than ``greedy``. Deterministic.

    As many requests as possible come first, then cost. Whatever is left unserved fits into no eligible pool's room.
    """
    free, _ = best_chain(market.cost, market.saving)
    if np.all(market.load(free) <= market.room):
        return Allocation(free, np.zeros(len(market.room)))
    prices, shares = class_prices(market)
    # The classes' prices are near; from there it is a short way to those of the single lots.
    prices, near = ascend(market, prices)
    tried = [
        greedy(market),
        _fill(market, prices, shares, _classes(market)),
        _fill_rest(market, prices, _diffused(market, near)),
    ]
    tried = sorted(tried, key=market.regarded)[: 2 if len(market.cost) <= _FEW_LOTS else 1]
    best = min((improve(market, pool_of) for pool_of in tried), key=market.regarded)
    best = improve(market, exchange_pairs(market, best, prices))
    return Allocation(_fill_rest(market, prices, best), prices)


def lower_bound(market: Market, pool_of: Ints, prices: Floats | None = None) -> float:
    """No assignment of the same lots within the same room costs less than this. ``pool_of`` serves all of them.

    ``prices`` are those of an allocation of just these lots; without them they are found anew.
    """
    value = market.value(pool_of)
    bound = _dual_value(market, np.zeros(len(market.room)))
    if value - bound > _GOOD_ENOUGH * abs(value) and np.isfinite(market.room).any():
        bound = max(
            bound, _dual_value(market, ascend(market, class_prices(market)[0])[0] if prices is None else prices)
        )
    return min(bound, value)


def _dual_value(market: Market, prices: Floats) -> float:
    _, least = best_chain(market.cost + market.seconds * prices, market.saving)
    bounded = np.isfinite(market.room)
    return least - float(prices[bounded] @ market.room[bounded])


def shortest_horizon(market: Market, timed: Bools) -> float:
    """Seconds in which the ``timed`` pools together could serve all that they may serve, were lots divisible; 0 where
    they may serve nothing."""
    classes = _classes(market)
    eligible = np.isfinite(market.cost)
    may = np.zeros((int(classes.max()) + 1, len(timed)), dtype=np.bool_)
    may[classes] = eligible & timed
    seconds = np.zeros(may.shape)
    np.add.at(seconds, classes, np.where(eligible, market.seconds, 0.0))
    rows, columns = np.nonzero(may)
    return least_makespan(rows, columns, seconds[rows, columns])


def _classes(market: Market) -> Ints:
    """The class of each lot, (lots,): the same eligible pools and like profiles. Splits the largest spread in two."""
    eligible = np.isfinite(market.cost)
    _, pattern = np.unique(np.packbits(eligible, axis=1), axis=0, return_inverse=True)
    groups = [np.flatnonzero(pattern.ravel() == code) for code in range(int(pattern.max()) + 1)]
    limit = max(_CLASS_VARIABLES // max(market.cost.shape[1], 1), 20)

    def spread(rows: Ints) -> tuple[float, int]:
        widths = np.ptp(market.profile[rows], axis=0)
        feature = int(np.argmax(widths))
        return -float(widths[feature] * market.size[rows].sum()), feature

    heap = [(*spread(rows), at) for at, rows in enumerate(groups)]
    heapq.heapify(heap)
    while heap and len(groups) < limit:
        width, feature, at = heapq.heappop(heap)
        if width == 0:
            break
        rows = groups[at]
        values = market.profile[rows, feature]
        high = values > (values.min() + values.max()) / 2
        groups[at] = rows[~high]
        groups.append(rows[high])
        for part in (at, len(groups) - 1):
            heapq.heappush(heap, (*spread(groups[part]), part))
    classes = np.zeros(len(market.cost), dtype=np.int64)
    for code, rows in enumerate(groups):
        classes[rows] = code
    return classes


def class_prices(market: Market) -> tuple[Floats, Floats]:
    """Prices of the pools' seconds (pools,), and the share of each class that each pool gets (classes, pools)."""
    classes = _classes(market)
    count = int(classes.max()) + 1
    eligible = np.isfinite(market.cost)

    def summed(values: Floats) -> Floats:
        total = np.zeros((count, values.shape[1]))
        np.add.at(total, classes, values)
        return total

    cost = summed(np.where(eligible, market.cost - market.saving, 0.0))
    seconds = summed(np.where(eligible, market.seconds, 0.0))
    may = np.zeros(cost.shape, dtype=np.bool_)
    may[classes] = eligible
    unserved = np.bincount(classes, market.unserved_cost, minlength=count).astype(np.float64)
    rows, columns = np.nonzero(may)
    shares, prices = transport(rows, columns, cost[rows, columns], seconds[rows, columns], unserved, market.room)
    spread = np.zeros(cost.shape)
    spread[rows, columns] = shares
    return prices, spread


def _diffused(market: Market, shares: Floats) -> Ints:
    """Each lot wholly to one of the pools that share it (lots, pools).

    What one lot takes too much of a pool's seconds the next take less: pools end with about what their shares need.
    """
    # A pool of unknown speed has no seconds: there lots are counted.
    each = np.where(market.seconds > 0, market.seconds, 1.0)
    taken = shares * each
    pool_of = np.full(len(shares), UNSERVED, dtype=np.int64)
    due = np.zeros(shares.shape[1])
    for lot in np.flatnonzero(shares.max(axis=1, initial=0.0) > _SHARED):
        due += taken[lot]
        pool = int(np.argmax(np.where(shares[lot] > _SHARED, due / each[lot], -np.inf)))
        pool_of[lot] = pool
        due[pool] -= each[lot, pool]
    return pool_of


def _fill(market: Market, prices: Floats, shares: Floats, classes: Ints) -> Ints:
    """Deals out each class as the linear program shared it, in order and in long runs, then places what is left."""
    sizes = np.bincount(classes, market.size, minlength=len(shares))
    quota = shares * sizes[:, None]
    left = market.room.copy()
    pool_of = np.full(len(classes), UNSERVED, dtype=np.int64)
    for lot, kind in enumerate(classes):
        due = quota[kind]
        before = pool_of[lot - 1] if lot else UNSERVED
        half = market.size[lot] / 2
        if before < 0 or due[before] < half or market.seconds[lot, before] > left[before]:
            before = int(np.argmax(np.where(market.seconds[lot] <= left, due, -1.0)))
        if due[before] >= half and market.seconds[lot, before] <= left[before]:
            pool_of[lot] = before
            due[before] -= market.size[lot]
            left[before] -= market.seconds[lot, before]
    return _fill_rest(market, prices, pool_of)


def repaired(market: Market, pool_of: Ints) -> Ints:
    """An assignment within the room of the market, whose unserved lots go where there is room left for them."""
    return _fill_rest(market, np.zeros(len(market.room)), pool_of)


def _fill_rest(market: Market, prices: Floats, pool_of: Ints) -> Ints:
    """Gives each unserved lot its cheapest pool with room, those first that lose most by the second choice."""
    pool_of = pool_of.copy()
    left = market.room - market.load(pool_of)
    for pool in np.flatnonzero(left < 0):
        # More was dealt than there is room for: the smallest lots go back until the rest fits.
        for lot in sorted(np.flatnonzero(pool_of == pool), key=lambda lot: market.seconds[lot, pool]):
            if left[pool] >= 0:
                break
            pool_of[lot] = UNSERVED
            left[pool] += market.seconds[lot, pool]
    waiting = np.flatnonzero((pool_of < 0) & np.isfinite(market.cost).any(axis=1))
    priced = market.cost[waiting] + market.seconds[waiting] * prices
    ranked = np.sort(priced, axis=1)
    second = ranked[:, 1] if ranked.shape[1] > 1 else np.full(len(waiting), np.inf)
    for at in np.argsort(-(second - ranked[:, 0]), kind="stable"):
        lot = waiting[at]
        cost = np.where(market.seconds[lot] <= left, priced[at], np.inf)
        pool = int(np.argmin(cost))
        if cost[pool] < np.inf:
            pool_of[lot] = pool
            left[pool] -= market.seconds[lot, pool]
    return pool_of
