"""What it takes to set a pool up: its bids bear it, the quote names it, and no pool is set up that is not worth it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import NOW, lots_of, pool
from small_jobs import make_job, prompts, remote

from bidbeam.connectors.pools import PoolSpec
from bidbeam.pipelines.quote import quote_job
from bidbeam.transforms.bidding import PoolState, make_bids, prior_state
from bidbeam.transforms.clearing import Clearing, clear
from bidbeam.transforms.withdrawing import worth_setting_up

OPTIONS = {"gpu_tier": "premium", "image": "ghcr.io/example/vllm"}


def node(name: str = "node", *, setup_s: float = 60.0, hour: str = "3.60", speed: float = 1_200) -> PoolState:
    """A rented node at a tenth of a cent a second; a lot of ``lots_of`` takes a second there."""
    state = pool(name, hour=hour, tokens_per_second=speed)
    spec = PoolSpec(name, "lease", state.spec.models, state.spec.price, state.spec.capacity, options=OPTIONS)
    return replace(prior_state(spec, now=NOW), turnaround_s=setup_s, setup_s=setup_s)


def cleared(count: int, pools: list[PoolState], **terms: Any) -> Clearing:
    bids = make_bids(lots_of(*({} for _ in range(count))), pools, now=NOW, **terms)
    return worth_setting_up(clear(bids), clear)


def test_every_lot_bears_its_share_of_the_set_up() -> None:
    """Sixty seconds among ten lots of a second each make each bid seven times its bill, and no charge of it more."""
    bids = make_bids(lots_of(*({} for _ in range(10))), [node()], now=NOW)
    rows = bids.to_table(run_id="r", round_number=1).to_pylist()
    assert {row["expected_cost"] for row in rows} == {Decimal("0.001")}
    assert {row["setup_cost"] for row in rows} == {Decimal("0.006")}
    assert {row["score"] for row in rows} == {Decimal("0.007")}
    assert {row["finish_at"] for row in rows} == {NOW + timedelta(seconds=61)}
    assert sum(
        row["price_paid"] for row in clear(bids).awards_table(run_id="r", round_number=1).to_pylist()
    ) == Decimal("0.010")


def test_each_engine_of_each_model_is_set_up() -> None:
    """Three engines for two models load six times; a pool paid by the token has nothing to set up."""
    own = pool("own", hour="3.60", tokens_per_second=1_200, models=("m", "k"), state={"setup_s": 10.0})
    own = replace(own, spec=replace(own.spec, capacity=replace(own.spec.capacity, workers=3)))
    table = lots_of({}, {"model": "k"})
    row = make_bids(table, [own], now=NOW).to_table(run_id="r", round_number=1).to_pylist()[0]
    assert row["setup_cost"] == Decimal("0.030")
    posted = pool("posted", input="1", output="1", state={"setup_s": 10.0})
    assert make_bids(table, [posted], now=NOW).setup_ppm.tolist() == [0]


def test_a_node_is_rented_where_there_is_enough_to_do() -> None:
    """At half the price of the other pool a node is worth a minute's rent for many lots, and not for few."""
    dear = pool("dear", input="2", output="2")
    for count, winner in ((20, "dear"), (200, "node")):
        assert set(cleared(count, [node(speed=1_000_000, hour="3600"), dear]).lots_of) == {"dear"}
        assert set(cleared(count, [node(), dear]).lots_of) == {winner}


def test_a_node_that_wins_too_little_is_not_rented_for_it() -> None:
    """Where most of the lots go elsewhere, the few that are left do not bear the set-up, and it says so; where nobody
    else may serve them, it is rented all the same."""
    dear, cheap = pool("dear", input="2", output="2"), pool("cheap", input="0.5", output="0.5", context=1_000)
    lots = [{"longest_tokens": 4_000 if at % 20 == 0 else 100} for at in range(200)]
    bids = make_bids(lots_of(*lots), [node(), dear, cheap], now=NOW)
    plain = clear(bids)
    assert {name: len(won) for name, won in plain.lots_of.items()} == {"node": 10, "cheap": 190}
    better = worth_setting_up(plain, clear)
    assert {name: len(won) for name, won in better.lots_of.items()} == {"dear": 10, "cheap": 190}
    assert set(better.bids.reject[0].to_pylist()) == {"setup"}
    alone = make_bids(lots_of(*lots), [node(), cheap], now=NOW)
    assert {name: len(won) for name, won in worth_setting_up(clear(alone), clear).lots_of.items()} == {
        "node": 10,
        "cheap": 190,
    }


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 30),
    setups=st.lists(st.floats(0, 200), min_size=1, max_size=3),
    price=st.decimals("0.1", "5", places=2),
    seconds=st.none() | st.integers(100, 400),
)
def test_what_is_set_up_is_worth_it_and_leaves_no_lot_behind(
    count: int, setups: list[float], price: Decimal, seconds: int | None
) -> None:
    """Doing without pools never costs more, set-up included, and every lot that somebody served is served."""
    nodes = [node(f"n{at}", setup_s=each) for at, each in enumerate(setups)]
    other = pool("other", tokens_per_second=200, input=str(price), output=str(price))
    deadline = None if seconds is None else NOW + timedelta(seconds=seconds)
    bids = make_bids(lots_of(*({} for _ in range(count))), [*nodes, other], now=NOW, deadline=deadline)
    plain = clear(bids)
    better = worth_setting_up(plain, clear)

    def whole(of: Clearing) -> float:
        rented = [at for at, each in enumerate(nodes) if each.spec.name in of.lots_of]
        scores = [float(bids.score[lot, at]) for lot, at in enumerate(of.pool_of) if at >= 0]
        shares = [0.001 * bids.setup_ppm[at] / 1e6 for at in of.pool_of if 0 <= at < len(nodes)]
        return sum(scores) - sum(shares) + sum(0.001 * setups[at] for at in rented)

    assert better.unserved.keys() <= plain.unserved.keys()
    if better.unserved.keys() == plain.unserved.keys():
        assert whole(better) <= whole(plain) + 1e-6


def test_a_quote_names_a_nodes_coming_up(tmp_path: Path) -> None:
    """In what it costs and when it is done, before any run has rented one: as long as the pool says that it takes."""
    lease: dict[str, Any] = {
        "name": "render", "kind": "lease", "profile": "render", "base_url": "http://127.0.0.1:9",
        "models": ["tiny"], "price": {"accelerator_hour": "3.60"}, "context": 4096, "api_key_env": "SOME_KEY",
        "capacity": {"concurrency": 4, "tokens_per_second": 2000},
        "options": {**OPTIONS, "address": "http://127.0.0.1:9/v1", "turnaround": "120"},
    }  # fmt: skip
    quote = quote_job(make_job(tmp_path / "alone", prompts(12), [lease]))
    (offered,) = quote.pools
    assert offered.finish_s is not None
    assert 120 < offered.finish_s < 125
    assert float(quote.expected_cost) == pytest.approx(offered.finish_s * 0.001, rel=1e-3)
    # Nobody rents it for twelve prompts where another pool serves them for less than it takes to come up.
    quote = quote_job(make_job(tmp_path / "both", prompts(12), [lease, remote("other")]))
    assert [(each.pool, each.lots > 0) for each in quote.pools] == [("render", False), ("other", True)]
