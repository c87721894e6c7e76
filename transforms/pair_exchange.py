"""Two pools at a time: what both have won is dealt out between them anew, as well as their room allows.

Moving or exchanging single lots leaves an allocation where no such step helps, though several at once would. Over two
pools the best of all divisions is in reach: a knapsack, solved lot by lot over the seconds that one of them has used.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bidbeam.transforms.market import Floats, Ints, Market

_LEVELS = 256
_MOST_LOTS = 48
"""Of two pools' lots, those that it matters least which of the two has them: the others stay where they are."""
_STEPS = 20_000
_ENOUGH = 1e-12


def exchange_pairs(market: Market, pool_of: Ints, prices: Floats, steps: int = _STEPS) -> Ints:
    """An assignment that costs no more and serves the same lots within the same room. Deterministic.

    ``prices`` are those of the pools' seconds: a pool whose room is worth nothing has nothing to give to another such.
    ``steps`` bounds the work: lots looked at, summed over the pairs.
    """
    pool_of, left = pool_of.copy(), market.room - market.load(pool_of)
    value = market.value(pool_of)
    while steps > 0:
        before = value
        for one, other in _pairs(prices, left):
            divided, looked_at = _divide(market, pool_of, one, other, prices, left)
            steps -= looked_at
            if divided is not None and (now := market.value(divided)) < value - _ENOUGH * abs(value):
                load = market.load(divided)
                if np.all(load[[one, other]] <= market.room[[one, other]]):
                    pool_of, left, value = divided, market.room - load, now
            if steps <= 0:
                break
        if value >= before - _ENOUGH * abs(before):
            break
    return pool_of


def _pairs(prices: Floats, left: Floats) -> Iterator[tuple[int, int]]:
    """Pairs of which the first has scarce room; those first that leave most of it unused, in money."""
    scarce = np.flatnonzero(prices > 0)
    order = scarce[np.argsort(-prices[scarce] * left[scarce], kind="stable")]
    done = np.zeros(len(prices), dtype=np.bool_)
    for one in order:
        done[one] = True
        for other in np.flatnonzero(~done):
            yield int(one), int(other)


def _divide(
    market: Market, pool_of: Ints, one: int, other: int, prices: Floats, left: Floats
) -> tuple[Ints | None, int]:
    """The assignment with the lots of two pools divided anew, None where that gains nothing; and how many lots."""
    lots = np.flatnonzero((pool_of == one) | (pool_of == other))
    lots = lots[np.isfinite(market.cost[lots, one]) & np.isfinite(market.cost[lots, other])]
    if len(lots) < 2:
        return None, 1
    cost = market.cost[lots[:, None], [one, other]] - market.saving[lots[:, None], [one, other]]
    seconds = market.seconds[lots[:, None], [one, other]]
    if len(lots) > _MOST_LOTS:
        priced = cost + seconds * prices[[one, other]]
        kept = np.sort(np.argpartition(np.abs(priced[:, 0] - priced[:, 1]), _MOST_LOTS)[:_MOST_LOTS])
        lots, cost, seconds = lots[kept], cost[kept], seconds[kept]
    here = pool_of[lots] == one
    room = left[one] + seconds[here, 0].sum(), left[other] + seconds[~here, 1].sum()
    # The pairs begin with a pool whose room has a price, so it has a bound.
    grain = room[0] / (_LEVELS - 1)
    if grain <= 0:
        return None, 1
    levels = np.rint(seconds[:, 0] / grain).astype(np.int64)
    # state[:, level]: the cost, with the other pool's seconds at their price; seconds of the one; seconds of the other.
    state = np.zeros((3, _LEVELS + _MOST_LOTS // 2))
    state[0, 1:] = np.inf
    took = np.zeros((len(lots), state.shape[1]), dtype=np.bool_)
    taken = np.empty_like(state)
    to_other = np.column_stack([cost[:, 1] + seconds[:, 1] * prices[other], np.zeros(len(lots)), seconds[:, 1]])
    to_one = np.column_stack([cost[:, 0], seconds[:, 0], np.zeros(len(lots))])
    for at, step in enumerate(levels):
        kept_out = state + to_other[at][:, None]
        if step >= state.shape[1]:
            state = kept_out
            continue
        taken[:, :step] = np.inf
        taken[:, step:] = state[:, : state.shape[1] - step] + to_one[at][:, None]
        took[at] = (taken[0] < kept_out[0]) & (taken[1] <= room[0])
        state = np.where(took[at], taken, kept_out)
    fits = np.isfinite(state[0]) & (state[2] <= room[1])
    total = np.where(fits, state[0] - prices[other] * np.where(fits, state[2], 0.0), np.inf)
    level = int(np.argmin(total))
    if not total[level] < float(np.where(here, cost[:, 0], cost[:, 1]).sum()):
        return None, len(lots)
    divided = pool_of.copy()
    for at in range(len(lots) - 1, -1, -1):
        into = bool(took[at, level])
        divided[lots[at]] = one if into else other
        level -= int(levels[at]) if into else 0
    return divided, len(lots)
