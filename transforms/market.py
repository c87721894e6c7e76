"""The market of one round as numbers, and the two simplest ways to clear it.

l in lots, p in pools   c[l,p] cost (inf: not eligible)   s[l,p] saved where p also has lot l-1
a[l,p] seconds          K[p] seconds that p has (inf: no bound)

minimise  sum c[l,p(l)] - sum s[l,p(l)] over p(l) = p(l-1)     subject to  sum over p(l)=p of a[l,p] <= K[p]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNSERVED = -1


@dataclass(frozen=True, slots=True, eq=False)
class Market:
    """One instance. ``cost`` inf: not eligible. ``seconds`` are finite; ``room`` may be inf. Shapes as above.

    ``unserved_cost`` (lots,) is what leaving a lot unserved counts as; ``profile`` (lots, features) says what a lot
    consists of, in shares, so that lots with like profiles have like costs per unit of ``size``.
    """

    cost: Floats
    saving: Floats
    seconds: Floats
    room: Floats
    unserved_cost: Floats
    profile: Floats
    size: Floats

    def value(self, pool_of: Ints) -> float:
        """What an assignment costs."""
        at = np.flatnonzero(pool_of >= 0)
        total = float(self.cost[at, pool_of[at]].sum())
        warm = at[(at > 0) & (pool_of[at - 1] == pool_of[at])]
        return total - float(self.saving[warm, pool_of[warm]].sum())

    def regarded(self, pool_of: Ints) -> float:
        """The same, with what its unserved lots count as."""
        return self.value(pool_of) + float(self.unserved_cost[pool_of < 0].sum())

    def load(self, pool_of: Ints) -> Floats:
        """Seconds that an assignment takes of each pool."""
        at = np.flatnonzero(pool_of >= 0)
        load: Floats = np.bincount(pool_of[at], self.seconds[at, pool_of[at]], minlength=len(self.room)).astype(
            np.float64
        )
        return load

    def within(self, room: Floats) -> Market:
        """The same instance with other room."""
        return replace(self, room=room)

    def only(self, lots: Ints) -> Market:
        """The instance with these lots alone (ascending); those whose neighbour is gone save nothing."""
        saving = self.saving[lots]
        saving[np.diff(lots, prepend=-2) != 1] = 0
        return Market(
            self.cost[lots],
            saving,
            self.seconds[lots],
            self.room,
            self.unserved_cost[lots],
            self.profile[lots],
            self.size[lots],
        )


def greedy(market: Market) -> Ints:
    """Each lot in turn to the cheapest eligible pool that has room."""
    pool_of = np.full(len(market.cost), UNSERVED, dtype=np.int64)
    left = market.room.copy()
    for lot in range(len(pool_of)):
        cost = np.where(market.seconds[lot] <= left, market.cost[lot], np.inf)
        before = pool_of[lot - 1] if lot else UNSERVED
        if before >= 0:
            cost[before] -= market.saving[lot, before]
        pool = int(np.argmin(cost))
        if cost[pool] < np.inf:
            pool_of[lot] = pool
            left[pool] -= market.seconds[lot, pool]
    return pool_of


def best_chain(cost: Floats, saving: Floats) -> tuple[Ints, float]:
    """The least costly assignment without regard to room, neighbours' savings included, and its value.

    Lots that nobody may serve stay UNSERVED, cost nothing and end a chain.
    """
    lots, pools = cost.shape
    served: Bools = np.asarray(np.isfinite(cost).any(axis=1)) if pools else np.zeros(lots, dtype=np.bool_)
    plain = np.argmin(cost, axis=1) if pools else np.zeros(lots, dtype=np.int64)
    if not np.any(saving[served] > 0):
        plain[~served] = UNSERVED
        return plain, float(cost[served, plain[served]].sum())
    # back[l,p]: whether the best way to lot l on pool p stays on p; anchor[l]: where it comes from otherwise.
    back = np.zeros((lots, pools), dtype=np.bool_)
    anchor = np.full(lots, UNSERVED, dtype=np.int64)
    reach, total = np.zeros(pools), 0.0
    ends: list[tuple[int, int]] = []
    for lot in range(lots):
        if not served[lot]:
            if lot and served[lot - 1]:
                ends.append((lot - 1, int(np.argmin(reach))))
                total += float(reach.min())
            reach = np.zeros(pools)
            continue
        if lot and served[lot - 1]:
            anchor[lot] = int(np.argmin(reach))
            stay = reach - saving[lot]
            jump = reach[anchor[lot]]
            back[lot] = stay <= jump
            reach = cost[lot] + np.where(back[lot], stay, jump)
        else:
            reach = cost[lot].copy()
    if lots and served[-1]:
        ends.append((lots - 1, int(np.argmin(reach))))
        total += float(reach.min())
    pool_of = np.full(lots, UNSERVED, dtype=np.int64)
    for end, last in ends:
        lot, pool = end, last
        while lot >= 0 and served[lot]:
            pool_of[lot] = pool
            if not back[lot, pool]:
                pool = int(anchor[lot])
            lot -= 1
    return pool_of, total


def unserved_cost(cost: Floats, requests: Ints) -> Floats:
    """So much per request that serving more requests always comes before serving them for less (lots,)."""
    weight = np.maximum(requests, 1).astype(np.float64)
    dearest = np.max(np.where(np.isfinite(cost), cost, 0.0), axis=1, initial=0.0)
    per_request = float(np.max(dearest / weight, initial=0.0))
    return weight * (10 * per_request or 1.0)
