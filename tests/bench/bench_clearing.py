"""Clearing: seconds and regret on random markets whose capacity binds, beside plain greedy; and each payment rule."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from markets import NOW, random_market

from bidbeam.transforms.bidding import BidMatrix, make_bids
from bidbeam.transforms.clearing import DEFAULT_SLACK, _market, clear
from bidbeam.transforms.market import greedy
from bidbeam.transforms.payments import PAYMENT_RULES

_MOST_REGRET = 0.005


def _bids(lots: int, pools: int, *, seed: int = 1, internal: int = 0) -> BidMatrix:
    """A random market; the first ``internal`` pools are settled inside the house."""
    table, states = random_market(lots, pools, seed)
    states = [
        replace(state, spec=replace(state.spec, settlement="internal")) if at < internal else state
        for at, state in enumerate(states)
    ]
    return make_bids(table, states, now=NOW)


@pytest.mark.parametrize(("lots", "pools", "most_s"), [(200, 20, None), (1_000, 50, 1.0), (20_000, 100, 10.0)])
def test_clear(
    benchmark: Any,
    figure: Callable[..., None],
    scaled: Callable[[int], int],
    lots: int,
    pools: int,
    most_s: float | None,
) -> None:
    """The best of three clearings, bound included, its regret, and what plain greedy costs on the same bids."""
    lots = scaled(lots)
    bids = _bids(lots, pools)
    clear(_bids(60, 6))  # SciPy is imported once in a process
    cleared = benchmark.pedantic(clear, (bids,), rounds=3)
    market, _ = _market(bids, DEFAULT_SLACK)
    plain = market.regarded(greedy(market)) / float(cleared.objective)
    name = f"{lots:,} lots x {pools} pools"
    figure(f"clear {name}", benchmark.stats.stats.min, "seconds", most=most_s)
    most_regret = _MOST_REGRET if most_s is not None else None
    figure(f"regret {name}", float(cleared.regret), f"of the bound; greedy costs {plain:.2f} times", most=most_regret)


@pytest.mark.parametrize("rule", sorted(PAYMENT_RULES))
def test_payment(benchmark: Any, figure: Callable[..., None], scaled: Callable[[int], int], rule: str) -> None:
    """What each rule adds to the bill, and how long clearing takes with it: ten of fifty pools are internal."""
    lots = scaled(1_000)
    bids = _bids(lots, 50, internal=10)

    def cleared() -> Any:
        return clear(bids, payment=rule)

    outcome = benchmark.pedantic(cleared, rounds=1)
    started = time.perf_counter()
    again = cleared()
    seconds = time.perf_counter() - started
    assert again.price_paid == outcome.price_paid
    rent = sum(float(each) for each in outcome.rent if each is not None)
    bill = sum(float(paid) for paid in outcome.price_paid if paid is not None) - rent
    figure(f"rent under {rule}", rent / bill, f"of the expected bill, {lots:,} lots x 50 pools; {seconds:.2f} s")
