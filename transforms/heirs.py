"""Who may take over what another pool won, and which of them does: the market's next best first, within the reserve."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping

from bidbeam.connectors.engine import Lasting
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.pools import PoolSpec
from bidbeam.transforms.hedging import HEDGE
from bidbeam.transforms.lane import Lane, Lot
from bidbeam.transforms.outstanding import Tags
from bidbeam.transforms.placement import eligible
from bidbeam.transforms.purse import LAST, Purse
from bidbeam.transforms.settling import Terms

LONG_S, LONGEST_S = 10.0, 30.0
"""Seconds without an answer after which a pool holds up what waits for it, at least; and where nothing is known of how
long its answers take."""
_TIMES = 5
"""Times what 95 % of its answers took, if that is more."""

_EVERY_S = 0.5
"""How often a pool that holds others up is relieved of a lot."""

LaneKey = tuple[str, str, int]
"""Pool, model and replica."""


class Heirs:
    """Of one shift. ``specs`` are the pools as they are believed now, ``lanes`` those at work, ``terms`` those of all
    pools and models, ``won`` says which pool was awarded each lot, and ``open_lane`` opens one more."""

    def __init__(
        self,
        specs: Mapping[str, PoolSpec],
        lanes: Mapping[LaneKey, Lane],
        terms: Mapping[tuple[str, str], Terms],
        won: Mapping[str, str],
        purse: Purse,
        open_lane: Callable[[str, str, Terms], Lane],
        *,
        walled: bool,
    ) -> None:
        self._specs, self._lanes, self._terms, self._won = specs, lanes, terms, won
        self._purse, self._open_lane, self._walled = purse, open_lane, walled
        self._looked: dict[tuple[str, str], float] = {}

    def may(self, pool: str, lot: Lot) -> bool:
        """Placement's second wall: whatever the market said, nothing goes where it may not."""
        text = lot["placement"]
        return eligible(json.loads(text) if text else None, self._specs[pool].placement)[0]

    def taker(self, lot: Lot, tags: Tags, instead_of: Lane | None = None) -> Lane | None:
        """The lane that takes these requests of a lot over, paid for by the reserve: the market's next best first.

        ``instead_of`` has them still to send; what it would owe for them is free again, and only who answers gets them.
        """
        lanes = [lane for pool in after_winner(lot) if (lane := self._lane_for(pool, lot)) is not None]
        well = [lane for lane in lanes if lane.breaker.closed and lane is not instead_of]
        others = [] if instead_of is not None else [lane for lane in lanes if not lane.breaker.closed]
        before = None if instead_of is None else instead_of.terms
        return next((lane for lane in (*well, *others) if self._paid(lane, lot, tags, before)), None)

    def at_work(self, lot: Lot) -> Iterator[Lane]:
        """The lanes that the market found good for a lot, its own first, as far as they take requests at once."""
        for pool in (self._won.get(lot["lot_id"]), *after_winner(lot)):
            lane = next((each for each in self._open_lanes(pool or "", lot["model"]) if each.breaker.closed), None)
            # What is gathered for a batch takes hours to come back: that is for the next round to weigh.
            if lane is not None and not isinstance(lane.engine, Lasting):
                yield lane

    def second(self, lane: Lane, lot: Lot, failed_on: Collection[str]) -> Lane | None:
        """The best other pool for a lot, by the market's judgement, that is well and at hand."""
        for pool in (self._won.get(lot["lot_id"]), *after_winner(lot)):
            if pool is None or pool == lane.pool or pool in failed_on:
                continue
            if not self._open_lanes(pool, lot["model"]) and self._specs[pool].kind != "openai":
                # No engine is loaded, no node rented, no batch sent for the sake of a hedge.
                continue
            target = self._lane_for(pool, lot)
            if target is not None and target.takes_at_once:
                return target
        return None

    def relieve(self, lane: Lane) -> None:
        """Gives one lot that waits at a pool which sits on all that it was sent to one that has nothing to do."""
        if self._specs[lane.pool].kind != "openai" or not _holds_up(lane):
            return
        key = lane.pool, lane.model
        if lane.clock() - self._looked.get(key, -_EVERY_S) < _EVERY_S:
            return
        self._looked[key] = lane.clock()
        lot = lane.last_waiting
        target = None if lot is None else self.second(lane, lot, ())
        if lot is None or target is None or not target.idle:
            return
        parts = [({**each, "places": places_of(tags)}, tags) for each, tags in lane.leftover()]
        # All of it is owed until it is promised elsewhere.
        lane.queue.extend(part for part, _ in parts)
        self._purse.reckon()
        # A hedge of the same lot is its second pool's alone.
        mine = [each for each in parts if each[0]["lot_id"] == lot["lot_id"] and each[0].get("kind") != HEDGE]
        part, tags = mine[-1] if mine else (None, None)
        if part is not None and tags is not None and self._paid(target, part, tags, lane.terms):
            lane.queue = deque(each for each in lane.queue if each is not part)
            target.queue.append(handed_on(part, tags, target.pool))

    def _paid(self, lane: Lane, lot: Lot, tags: Tags, before: Terms | None = None) -> bool:
        # Where money is tight each of them is paid for before it is sent, whoever sends it.
        return self._purse.tight or self._purse.promise(lane.terms, lot, tags, instead_of=before)

    def _lane_for(self, pool: str, lot: Lot) -> Lane | None:
        """A pool's lane, opened where need be, if it may have a lot that another pool won, and takes requests."""
        terms = self._terms.get((pool, lot["model"]))
        if terms is None or not self.may(pool, lot):
            return None
        there = self._open_lanes(pool, lot["model"])
        if self._walled and terms.price.by_time:
            # Its time is reserved by the award: without one in this shift nobody would stop it.
            return next((lane for lane in there if lane.reserved_ms is not None), None)
        if there:
            return there[0]
        if pool != lot.get("runner_up") and self._specs[pool].kind != "openai":
            # No engine is loaded, no node rented, no batch sent at a pool that the market did not choose for it.
            return None
        try:
            lane = self._open_lane(pool, lot["model"], terms)
        except PoolDown:
            return None
        return lane if lane.open else None

    def _open_lanes(self, pool: str, model: str) -> list[Lane]:
        return [lane for key, lane in self._lanes.items() if key[:2] == (pool, model) and lane.open]


def _holds_up(lane: Lane) -> bool:
    """Whether nothing has come back for long although requests are out."""
    if not lane.open or not lane.waiting or not lane.engine_in_flight or isinstance(lane.engine, Lasting):
        return False
    usual_s = lane.latencies.p95_s
    return lane.still_s >= (LONGEST_S if usual_s is None else max(LONG_S, _TIMES * usual_s))


def after_winner(lot: Lot) -> list[str]:
    """The pools that the market would give a lot to after its winner, the best first."""
    runner_up = lot.get("runner_up")
    return [*([] if runner_up is None else [runner_up]), *(lot.get("next_best") or ())]


def handed_on(lot: Lot, tags: Tags, pool: str) -> Lot:
    """These requests of a lot as ``pool`` gets them from another; who comes after it stays known."""
    left = [name for name in after_winner(lot) if name != pool]
    # Only for the runner-up may anything be reserved.
    rank = lot.get("fallback_rank") if pool == lot.get("runner_up") else LAST
    return {**lot, "places": places_of(tags), "runner_up": None, "next_best": left, "fallback_rank": rank}


def places_of(tags: Tags) -> bytes:
    """A lot's places as its tags give them."""
    return (tags & 0xFFFFFFFF).astype("<u4").tobytes()
