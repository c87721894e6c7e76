"""Small changes that make an allocation better: moving one lot, exchanging two, or moving one into the room that
another gives up."""

from __future__ import annotations

import numpy as np

from bidbeam.transforms.market import Bools, Floats, Ints, Market

_PASSES = 8
_TRADES = 300
_SWAPPED = 600
_SWAPS = 5_000
_ENOUGH = 1e-12


def improve(market: Market, pool_of: Ints) -> Ints:
    """An assignment that costs no more and serves no lot less, within the same room. Deterministic."""
    pool_of = pool_of.copy()
    for _ in range(_PASSES):
        if not _move(market, pool_of) + _swap(market, pool_of) + _trade(market, pool_of):
            break
    return pool_of


def _gains(market: Market, pool_of: Ints) -> Floats:
    """What moving each lot to each pool adds to the cost, all others where they are (lots, pools)."""
    lots = np.arange(len(pool_of))
    cost = market.cost.copy()
    after = np.flatnonzero(pool_of[:-1] >= 0)
    cost[after + 1, pool_of[after]] -= market.saving[after + 1, pool_of[after]]
    before = np.flatnonzero(pool_of[1:] >= 0)
    cost[before, pool_of[before + 1]] -= market.saving[before + 1, pool_of[before + 1]]
    here = np.where(pool_of >= 0, cost[lots, pool_of], market.unserved_cost)
    gains: Floats = cost - np.where(np.isfinite(here), here, 0.0)[:, None]
    return gains


def _move(market: Market, pool_of: Ints) -> int:
    """Moves lots to better pools with room, the best first; a lot waits where its neighbour has just moved."""
    gains = _gains(market, pool_of)
    left = market.room - market.load(pool_of)
    gains[market.seconds > left] = np.inf
    best = np.argmin(gains, axis=1)
    gain = gains[np.arange(len(best)), best]
    floor = -_ENOUGH * market.regarded(pool_of)
    moved, touched = 0, np.zeros(len(pool_of) + 2, dtype=np.bool_)
    for lot in np.argsort(gain, kind="stable"):
        if gain[lot] >= floor:
            break
        pool, here = best[lot], pool_of[lot]
        if touched[lot : lot + 3].any() or market.seconds[lot, pool] > left[pool]:
            continue
        left[pool] -= market.seconds[lot, pool]
        if here >= 0:
            left[here] += market.seconds[lot, here]
        pool_of[lot] = pool
        touched[lot + 1] = True
        moved += 1
    return moved


def _swap(market: Market, pool_of: Ints) -> int:
    """Exchanges the pools of two lots where that costs less, the best first; among the lots that wish most to move."""
    gains = _gains(market, pool_of)
    served = np.flatnonzero(pool_of >= 0)
    if len(served) < 2:
        return 0
    wish = gains[served].min(axis=1)
    lots = np.sort(served[np.argsort(wish, kind="stable")[:_SWAPPED]])
    here = pool_of[lots]
    left = market.room - market.load(pool_of)
    change = gains[np.ix_(lots, here)]
    change = change + change.T
    need = market.seconds[np.ix_(lots, here)] - market.seconds[lots, here][None, :]
    fits = need <= left[here][None, :]
    change[~(fits & fits.T) | (np.abs(lots[:, None] - lots[None, :]) <= 1)] = np.inf
    change[np.tril_indices(len(lots))] = np.inf
    floor = -_ENOUGH * market.regarded(pool_of)
    ones, others = np.nonzero(change < floor)
    swapped, touched = 0, np.zeros(len(pool_of) + 2, dtype=np.bool_)
    for at in np.argsort(change[ones, others], kind="stable")[:_SWAPS]:
        one, other = int(lots[ones[at]]), int(lots[others[at]])
        if touched[one : one + 3].any() or touched[other : other + 3].any():
            continue
        p, q = int(pool_of[one]), int(pool_of[other])
        into_p = market.seconds[other, p] - market.seconds[one, p]
        into_q = market.seconds[one, q] - market.seconds[other, q]
        if into_p > left[p] or into_q > left[q]:
            continue
        left[p] -= into_p
        left[q] -= into_q
        pool_of[one], pool_of[other] = q, p
        touched[[one + 1, other + 1]] = True
        swapped += 1
    return swapped


def _trade(market: Market, pool_of: Ints) -> int:
    """Lots that want into a full pool take the room of one that loses less by leaving it."""
    gains = _gains(market, pool_of)
    left = market.room - market.load(pool_of)
    # The target is where it gains most with regard to nothing; a full pool, or _move had taken it.
    target = np.argmin(gains, axis=1)
    wish = gains[np.arange(len(target)), target]
    floor = -_ENOUGH * market.regarded(pool_of)
    traded, touched = 0, np.zeros(len(pool_of) + 2, dtype=np.bool_)
    for lot in np.argsort(wish, kind="stable")[:_TRADES]:
        if wish[lot] >= floor:
            break
        if touched[lot : lot + 3].any():
            continue
        pool, here = int(target[lot]), int(pool_of[lot])
        need = market.seconds[lot, pool] - left[pool]
        inside = np.flatnonzero((pool_of == pool) & (market.seconds[:, pool] >= need))
        inside = inside[~_near(inside, lot, touched)]
        if len(inside) == 0:
            continue
        freed = left.copy()
        if here >= 0:
            freed[here] += market.seconds[lot, here]
        leave = np.where(market.seconds[inside] <= freed, gains[inside], np.inf)
        leave[:, pool] = np.inf
        other, goes = np.unravel_index(int(np.argmin(leave)), leave.shape)
        if wish[lot] + leave[other, goes] >= floor:
            continue
        out = inside[other]
        left[pool] += market.seconds[out, pool] - market.seconds[lot, pool]
        if here >= 0:
            left[here] += market.seconds[lot, here]
        left[goes] -= market.seconds[out, goes]
        pool_of[lot], pool_of[out] = pool, goes
        touched[[lot + 1, out + 1]] = True
        traded += 1
    return traded


def _near(lots: Ints, lot: int, touched: Bools) -> Bools:
    """Which of the lots stand beside ``lot`` or beside one that has just changed: their gains are out of date."""
    near: Bools = (np.abs(lots - lot) <= 1) | touched[lots] | touched[lots + 1] | touched[lots + 2]
    return near
