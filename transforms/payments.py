"""Payment rules: what a lot that was awarded counts as paid, beside what it costs on the meter.

A pool with a posted price is paid that price and nothing else: ``pay_as_bid``. Pools of one's own house or of partners
(``settlement: internal``) may be paid by a rule that makes it their best course to bid what a lot costs them. What they
get beyond their bid is the *information rent*, ``price_paid`` less the expected bill. It is a transfer inside the
house, recorded with the award: the charges of such a pool stay metered cost, and neither budget nor bill know of it.

A rule is a pure function from ``Awarded`` to one premium (USD, 0 or more) for each awarded lot. Bids are never paid
less than they ask, whatever the rule (individual rationality). Which promise the truth:

- ``second_score``: up to the runner-up's score. Truthful for pools that bid for a single lot with room for it.
- ``uniform``: the price of the pool's own scarce seconds on top, from the duals; the bid itself where room is plenty.
- ``vcg``: what the others' service costs more without the pool. Truthful where both markets are solved exactly; here
  they are solved within the regret that the auction publishes, so it is truthful within as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from bidbeam.transforms.allocation import allocate, class_prices, repaired
from bidbeam.transforms.bidding import BidMatrix
from bidbeam.transforms.capacity_prices import ascend
from bidbeam.transforms.local_search import improve
from bidbeam.transforms.market import UNSERVED, Bools, Floats, Ints, Market, best_chain

_PLACE = Decimal("1e-18")
_SOLVED_ANEW = 4_000
"""Lots times pools up to which ``vcg`` allocates anew without each winner; beyond, it repairs the allocation."""

Solver = Callable[[Market], Ints]
"""The pool of each lot of a market, -1 where it has room for none."""


@dataclass(frozen=True, slots=True, eq=False)
class Awarded:
    """The awards of one clearing: arrays of shape (awarded lots,), pools as indices."""

    market: Market
    """Of the awarded lots alone, within the room that they were awarded in."""
    pool_of: Ints
    scores: Sequence[Decimal]
    runner_up_scores: Sequence[Decimal | None]
    """None where nobody else may serve the lot."""
    solve: Solver | None = None
    """How ``vcg`` clears a market without one pool; None: as the auction itself does."""


PaymentRule = Callable[[Awarded, Bools], list[Decimal]]
"""The premium of each awarded lot (USD), 0 where its pool is not of the internal ones (pools,)."""


def pay_as_bid(awarded: Awarded, internal: Bools) -> list[Decimal]:  # noqa: ARG001 # as all rules are called
    """Nothing beyond the bid."""
    return [Decimal(0)] * len(awarded.pool_of)


def second_score(awarded: Awarded, internal: Bools) -> list[Decimal]:
    """As much as the winner might have asked more and still have won: up to the runner-up's score, exactly.

    Where nobody else may serve the lot there is no second score, and the bid is paid.
    """
    return [
        max(second - score, Decimal(0)) if internal[pool] and second is not None else Decimal(0)
        for pool, score, second in zip(awarded.pool_of, awarded.scores, awarded.runner_up_scores, strict=True)
    ]


def uniform(awarded: Awarded, internal: Bools) -> list[Decimal]:
    """Each pool's seconds at one price for all that it won: the dual of its room, 0 where it has more than enough."""
    market, pool_of = awarded.market, awarded.pool_of
    prices = _scarcity(market)
    at = np.arange(len(pool_of))
    rent = np.where(internal[pool_of], prices[pool_of] * market.seconds[at, pool_of], 0.0)
    return [_money(value) for value in rent]


def vcg(awarded: Awarded, internal: Bools) -> list[Decimal]:
    """What all others would cost more were the pool not there, shared over its lots by what they would cost elsewhere.

    Left out are lots that no other pool may serve: against them there is nothing to measure, and they are paid as bid.
    A lot that only lacks room elsewhere counts at the market's price for a lot unserved.
    """
    premiums = [Decimal(0)] * len(awarded.pool_of)
    for pool in np.unique(awarded.pool_of):
        if internal[pool]:
            mine = np.flatnonzero(awarded.pool_of == pool)
            total = _money(_externality(awarded, int(pool)))
            for lot, part in zip(mine, _shared(total, awarded.market.size[mine]), strict=True):
                premiums[lot] = part
    return premiums


PAYMENT_RULES: Mapping[str, PaymentRule] = {
    "pay_as_bid": pay_as_bid,
    "second_score": second_score,
    "uniform": uniform,
    "vcg": vcg,
}


def _scarcity(market: Market) -> Floats:
    """The prices of the pools' seconds, all 0 where everybody's first choice has room."""
    free, _ = best_chain(market.cost, market.saving)
    if not len(free) or np.all(market.load(free) <= market.room):
        return np.zeros(len(market.room))
    return ascend(market, class_prices(market)[0])[0]


def _externality(awarded: Awarded, pool: int) -> float:
    """How much more the lots that others may serve cost without ``pool``."""
    cost = awarded.market.cost.copy()
    cost[:, pool] = np.inf
    contested = np.isfinite(cost).any(axis=1)
    kept = np.flatnonzero(contested)
    if len(kept) == 0:
        return 0.0
    # What the pool's own lots that nobody else may serve take of its room does not matter: it is gone.
    market = awarded.market.only(kept)
    pool_of = awarded.pool_of[kept]
    # A lot unserved counts as it does to the others alone, lest a pool's own bid move what it is paid.
    dearest = np.where(np.isfinite(cost[kept]), cost[kept], 0.0).max(axis=1)
    market = replace(market, unserved_cost=np.maximum(dearest, 0.0) * 2)
    alone = replace(market, cost=cost[kept], saving=np.where(np.arange(cost.shape[1]) == pool, 0.0, market.saving))
    return max(alone.regarded(_without(awarded, alone, pool_of, pool)) - market.regarded(pool_of), 0.0)


def _without(awarded: Awarded, alone: Market, pool_of: Ints, pool: int) -> Ints:
    if awarded.solve is not None:
        return awarded.solve(alone)
    left_over = np.where(pool_of == pool, UNSERVED, pool_of)
    mended = improve(alone, repaired(alone, left_over))
    if alone.cost.size > _SOLVED_ANEW:
        return mended
    return min((mended, allocate(alone).pool_of), key=alone.regarded)


def _shared(total: Decimal, weights: Floats) -> list[Decimal]:
    """``total`` in shares that sum to it exactly."""
    whole = float(weights.sum())
    bounds = [
        Decimal(0),
        *((total * Decimal(float(w) / whole)).quantize(_PLACE) for w in np.cumsum(weights)[:-1]),
        total,
    ]
    return [high - low for low, high in pairwise(bounds)]


def _money(value: float) -> Decimal:
    return Decimal(max(value, 0.0)).quantize(_PLACE, rounding=ROUND_DOWN)


def exact(bids: BidMatrix, which: Ints, pool_of: Ints, what: str) -> list[Decimal | None]:
    """Exact ``expected`` bill or ``score`` (USD) of each lot's bid by the pool in ``which``, None for -1.

    A bid is warm where its pool has been awarded the lot before in ``pool_of``.
    """
    warm = bids.warm_where(pool_of)
    values: list[Decimal | None] = [None] * len(which)
    for pool in np.unique(which[which >= 0]):
        lots = np.flatnonzero(which == pool)
        cost = bids.expected_cost(int(pool), warm[:, pool])
        column: Any = cost if what == "expected" else bids.score_of(int(pool), cost)
        for lot, value in zip(lots, column.take(pa.array(lots)).to_pylist(), strict=True):
            values[lot] = value
    return values
