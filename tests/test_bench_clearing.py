"""Clearing beside plain greedy on the same bids: what the better allocation costs in time, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest
from markets import NOW, random_market
from pytest_benchmark.fixture import BenchmarkFixture

from bidbeam.transforms.bidding import make_bids
from bidbeam.transforms.clearing import _market, clear
from bidbeam.transforms.market import greedy

SIZES = [(200, 20), (1000, 50)]


@pytest.mark.parametrize(("lots", "pools"), SIZES)
def test_clear(benchmark: BenchmarkFixture, lots: int, pools: int) -> None:
    """Clears a market whose capacity binds, the bound included; reports the regret, and what greedy costs beside it."""
    table, states = random_market(lots, pools, seed=1)
    bids = make_bids(table, states, now=NOW)
    cleared = benchmark.pedantic(clear, (bids,), rounds=3, warmup_rounds=1)
    market, _ = _market(bids, 1.25)
    plain = market.regarded(greedy(market))
    benchmark.extra_info["regret"] = float(cleared.regret)
    benchmark.extra_info["greedy over cleared"] = plain / float(cleared.objective)
    assert np.all(cleared.pool_of >= 0)


@pytest.mark.parametrize(("lots", "pools"), SIZES)
def test_greedy(benchmark: BenchmarkFixture, lots: int, pools: int) -> None:
    """Plain greedy over the same market: the ratio to compare with."""
    table, states = random_market(lots, pools, seed=1)
    market, _ = _market(make_bids(table, states, now=NOW), 1.25)
    benchmark.pedantic(greedy, (market,), rounds=3, warmup_rounds=1)
