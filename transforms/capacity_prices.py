"""What a second of each pool is worth where its room is scarce: the dual of the auction's linear program, by ascent.

For prices m >= 0 the dual is ``sum over l of min over p of (c + m a)  -  m K``; each of its values is a lower bound,
the highest is the linear program's own. Its minima are smoothed (a soft minimum at a temperature that falls), which
makes the gradient of each price what the pool is short of at these prices. An evaluation is a pass over the matrix, so
that a market of 20,000 lots and 100 pools takes seconds, where the linear program over single lots takes minutes.
"""

from __future__ import annotations

import numpy as np

from bidbeam.transforms.market import Floats, Market

_TEMPERATURES = (1e-1, 2e-2, 5e-3, 1e-3, 2e-4)
"""Relative to what a lot costs on the average."""
_STEPS = 30
_BALANCED = 1e-3
"""A pool is asked for no more than this much over its room: then the prices are good enough for a temperature."""
_STILL = 1e-9
_DAMPING, _LEAST_DAMPING = 1e-2, 1e-6
"""Levenberg and Marquardt's: a step that leads down is taken again shorter, and nearer to steepest ascent."""


class SoftMarket:
    """A market in which each lot is shared out among the pools that are nearly best for it at given prices."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._warm = market.cost - market.saving
        self._rooms = np.where(np.isfinite(market.room), market.room, 0.0)
        least = np.minimum(self._warm.min(axis=1, initial=np.inf), market.unserved_cost)
        self.unit = float(np.abs(least).mean()) if len(least) else 0.0
        """What a lot costs on the average (USD)."""

    def shares(self, prices: Floats, temperature: float) -> tuple[float, Floats]:
        """The smoothed dual (USD), and the share of each lot that each pool gets (lots, pools); what is missing to 1 is
        left unserved."""
        priced = self._warm + self._market.seconds * prices
        low = np.minimum(priced.min(axis=1), self._market.unserved_cost)
        shares = np.exp((low[:, None] - priced) / temperature)
        total = shares.sum(axis=1) + np.exp((low - self._market.unserved_cost) / temperature)
        shares /= total[:, None]
        value = float((low - temperature * np.log(total)).sum() - prices @ self._rooms)
        return value, shares


def ascend(market: Market, prices: Floats) -> tuple[Floats, Floats]:
    """Prices of the pools' seconds (pools,), begun at ``prices``, 0 where a pool has no bound; and the shares in which
    the lots would be dealt out at them (lots, pools). Newton's method, damped. Deterministic."""
    soft = SoftMarket(market)
    bounded = np.isfinite(market.room) & (market.room > 0)
    if soft.unit == 0 or not bounded.any():
        return prices, soft.shares(prices, _TEMPERATURES[-1] * (soft.unit or 1.0))[1]
    room, damping = np.where(bounded, market.room, 1.0), _DAMPING
    for temperature in (relative * soft.unit for relative in _TEMPERATURES):
        value, shares = soft.shares(prices, temperature)
        for _ in range(_STEPS):
            taken = shares * market.seconds
            short = np.where(bounded, (taken.sum(axis=0) - market.room) / room, 0.0)
            free = bounded & ((prices > 0) | (short > 0))
            if not free.any() or np.max(np.abs(short[free])) < _BALANCED:
                break
            part = taken[:, free] / room[free]
            # How the demand for each pool falls as prices rise, all in units of the pools' rooms.
            slope = np.diag((part * market.seconds[:, free]).sum(axis=0) / room[free]) - part.T @ part
            # Where no lot is undecided demand does not move at all: any step will do, and is taken shorter if it fails.
            slope[np.diag_indices_from(slope)] += damping * np.maximum(
                slope.diagonal(), max(slope.trace() / len(slope), _STILL)
            )
            step = np.zeros(len(prices))
            step[free] = np.linalg.solve(slope / temperature, short[free]) / room[free]
            tried = np.maximum(prices + step, 0.0)
            now, dealt = soft.shares(tried, temperature)
            if now > value:
                prices, value, shares, damping = tried, now, dealt, max(damping / 4, _LEAST_DAMPING)
            else:
                damping *= 8
    return prices, shares
