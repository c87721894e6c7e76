"""Bids that are taken back: of pools that a lot has failed on, and of engines that are not worth setting up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.transforms.bidding import BidMatrix
from bidbeam.transforms.clearing import Clearing
from bidbeam.transforms.market import Bools
from bidbeam.transforms.pricing import as_floats


def prefer_untried(bids: BidMatrix, failed_on: Sequence[Sequence[str] | None], down: Collection[str] = ()) -> BidMatrix:
    """The bids without those of pools that went ``down`` in this run, nor those of pools that a lot's requests have
    failed on, wherever another pool may serve the lot.

    ``failed_on`` names those pools, by lot. A bid that is taken back is rejected as ``down`` or ``failed``.
    """
    gone = np.array([pool.spec.name in down for pool in bids.pools], bool)
    tried = np.array([[pool.spec.name in (names or ()) for pool in bids.pools] for names in failed_on], bool)
    for why, out in (("down", np.broadcast_to(gone, tried.shape)), ("failed", tried)):
        bids = _without(bids, out, why)
    return bids


def _without(bids: BidMatrix, out: Bools, why: str) -> BidMatrix:
    """The bids without some, (lots, pools), wherever another is left for the lot."""
    out = out & bids.eligible & (bids.eligible & ~out).any(axis=1, keepdims=True)
    return _taken_back(bids, out, why) if out.any() else bids


def _taken_back(bids: BidMatrix, out: Bools, why: str) -> BidMatrix:
    """The bids without some, (lots, pools), which are eligible."""
    return replace(
        bids,
        reject=tuple(pc.if_else(pa.array(out[:, at]), why, reason) for at, reason in enumerate(bids.reject)),
        eligible=bids.eligible & ~out,
        score=np.where(out, np.inf, bids.score),
        saving=np.where(out, 0.0, bids.saving),
    )


def without_pools(bids: BidMatrix, names: Collection[str], why: str) -> BidMatrix:
    """The bids without those of these pools."""
    gone = np.array([pool.spec.name in names for pool in bids.pools], bool)
    return _taken_back(bids, bids.eligible & gone, why)


def worth_setting_up(cleared: Clearing, clear: Callable[[BidMatrix], Clearing]) -> Clearing:
    """The clearing without the pools whose lots would cost less elsewhere than it costs to set the pool up.

    Each bid bears its share of the pool's set-up; a pool that won only some of its lots leaves the rest uncovered. No
    lot is left unserved for it, or served for less certain, nor does one wait that the pool might serve.
    """
    while True:
        uncovered = _uncovered(cleared)
        doubtful = [name for name, cost in uncovered.items() if cost > _least_elsewhere(cleared, name)]
        tried = [
            again
            for name in doubtful
            if (again := clear(without_pools(cleared.bids, [name], "setup"))).unserved.keys() <= cleared.unserved.keys()
            and again.short <= cleared.short
            and not cleared.bids.eligible[again.pool_of < 0, _place(cleared.bids, name)].any()
        ]
        best = min(tried, key=_whole_cost, default=cleared)
        if _whole_cost(best) >= _whole_cost(cleared):
            return cleared
        cleared = best


def _whole_cost(cleared: Clearing) -> float:
    return float(cleared.objective) + sum(_uncovered(cleared).values())


def _least_elsewhere(cleared: Clearing, name: str) -> float:
    """USD that a pool's lots cost more elsewhere, at least: as if there were room for all; inf where one has none."""
    bids, won = cleared.bids, np.array(cleared.lots_of[name])
    at = _place(bids, name)
    warm = (bids.score - bids.saving)[won]
    others = np.delete(warm, at, axis=1).min(axis=1, initial=np.inf)
    return float((others - bids.score[won, at]).sum())


def _uncovered(cleared: Clearing) -> dict[str, float]:
    """Pool -> USD of its set-up that the lots it won do not bear; only pools that won something."""
    bids, found = cleared.bids, dict[str, float]()
    for name, won in cleared.lots_of.items():
        at = _place(bids, name)
        if bids.setup_ppm[at]:
            shares = as_floats(bids.setup_cost(at, bids.expected_cost(at)))
            lost = np.setdiff1d(np.flatnonzero(bids.eligible[:, at]), won)
            found[name] = float(shares[lost].sum())
    return found


def _place(bids: BidMatrix, name: str) -> int:
    return next(at for at, pool in enumerate(bids.pools) if pool.spec.name == name)
