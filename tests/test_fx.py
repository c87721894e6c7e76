"""Exchange rates: written down or fetched, never stale, frozen when a run starts, in the ledger with their source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.fetch import FeedError
from bidbeam.connectors.front_server import Call, FrontServer
from bidbeam.connectors.fx_feeds import fetch_rate, usable_rate
from bidbeam.pipelines.begin import begin
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.resolving import resolve
from bidbeam.pipelines.run import run
from tests.small_jobs import DAY, check_conserved, prompts, remote, write_job, written

NOW = datetime(2026, 11, 23, 6, tzinfo=UTC)
KRAKEN = {"error": [], "result": {"TAOUSD": {"a": ["412.1"], "b": ["411.9"], "c": ["412.0300", "0.5"]}}}


class Ticker(FrontServer):
    """Answers by path: ``/kraken`` and ``/coingecko``."""

    def __init__(self, kraken: object = KRAKEN, coingecko: object = None) -> None:
        super().__init__()
        self.told = {"/kraken": kraken, "/coingecko": coingecko}

    def answer(self, call: Call) -> Reply:
        self.calls.append(call)
        told = self.told.get(call.path)
        return told if isinstance(told, Reply) else Reply(body=json.dumps(told).encode())


def gecko(rate: object, at: datetime = NOW) -> dict[str, Any]:
    return {"bittensor": {"usd": rate, "last_updated_at": int(at.timestamp())}}


def job_of(home: Path, fx: Mapping[str, Any], *pools: dict[str, Any], **keys: Any) -> Job:
    tao = remote("far", price={"input": "0.00025", "output": "0.001", "currency": "TAO"})
    path = write_job(home, prompts(3), pools or [tao], **keys)
    bought = json.loads((home / "pools.yaml").read_text())
    (home / "pools.yaml").write_text(json.dumps({**bought, "fx": fx}))
    return Job.from_yaml(path, run_date=DAY)


def refusal(home: Path, fx: Mapping[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(job_of(home, fx), NOW)
    assert caught.value.exit_code == 2
    assert caught.value.line is not None
    return str(caught.value)


def test_krakens_last_trade_is_the_rate_as_of_now(tmp_path: Path) -> None:
    """The pair is the currency in dollars; Kraken's digits are kept."""
    with Ticker() as ticker:
        job = resolve(job_of(tmp_path, {"TAO": {"source": "kraken", "url": f"{ticker.url}/kraken"}}), NOW)
        assert ticker.calls[0].query == {"pair": "TAOUSD"}
    rate = job.fx["TAO"]
    assert (rate.rate, rate.at) == (Decimal("412.03"), NOW)
    assert rate.source == f"kraken TAOUSD {ticker.url}/kraken"
    assert rate.max_age == timedelta(hours=1)


def test_krakens_own_name_of_a_pair_does_not_matter() -> None:
    """XBTUSD is answered as XXBTZUSD."""
    told = {"error": [], "result": {"XXBTZUSD": {"c": ["97000.10", "1"]}}}
    with Ticker(told) as ticker:
        rate = fetch_rate("kraken", "BTC", NOW, url=f"{ticker.url}/kraken")
        assert ticker.calls[0].query == {"pair": "XBTUSD"}
    assert rate.rate == Decimal("97000.10")


def test_coingeckos_rate_is_as_of_when_it_says(tmp_path: Path) -> None:
    """A JSON number is read exactly, and its own time is kept."""
    at = NOW - timedelta(minutes=7)
    with Ticker(coingecko=gecko(411.123456789012, at)) as ticker:
        job = resolve(job_of(tmp_path, {"TAO": {"source": "coingecko", "url": f"{ticker.url}/coingecko"}}), NOW)
        assert ticker.calls[0].query["ids"] == "bittensor"
    assert (job.fx["TAO"].rate, job.fx["TAO"].at) == (Decimal("411.123456789012"), at)


def test_a_rate_that_is_too_old_is_refused(tmp_path: Path) -> None:
    """Stale is as good as missing, and the message says how old."""
    with Ticker(coingecko=gecko(411.5, NOW - timedelta(hours=2))) as ticker:
        said = refusal(tmp_path, {"TAO": {"source": "coingecko", "url": f"{ticker.url}/coingecko", "max_age": "90m"}})
    assert "fx.TAO.source" in said
    assert "its rate of 2026-11-23 04:00 UTC is older than 1:30:00" in said


def test_a_written_down_rate_goes_stale_too(tmp_path: Path) -> None:
    """A run that would charge at last month's rate does not start."""
    old = {"TAO": {"rate": "400", "at": "2026-10-01T00:00:00Z", "source": "by hand", "max_age": "1d"}}
    with pytest.raises(ConfigError, match="the rate of 2026-10-01 00:00 UTC is stale"):
        begin(job_of(tmp_path, old), now=NOW)


def test_the_second_feed_is_asked_where_the_first_fails(tmp_path: Path) -> None:
    """In the order in which they are written."""
    with Ticker() as ticker:
        (tmp_path / "rates.csv").write_text("currency,rate,at\nTAO,409.5,2026-11-23T05:30:00Z\n")
        source = {"source": ["kraken", "file"], "url": f"{ticker.url}/nothing", "path": "rates.csv"}
        job = resolve(job_of(tmp_path, {"TAO": source}), NOW)
    assert job.fx["TAO"].rate == Decimal("409.5")
    assert job.fx["TAO"].source == str(tmp_path / "rates.csv")


def test_a_file_gives_the_latest_rate_up_to_now(tmp_path: Path) -> None:
    """Rates of other currencies and of later hours are passed over."""
    rows = [
        {"currency": "TAO", "rate": "400", "at": "2026-11-23T05:10:00Z"},
        {"currency": "TAO", "rate": "401", "at": "2026-11-23T05:50:00Z", "source": "the desk"},
        {"currency": "TAO", "rate": "402", "at": "2026-11-23T07:00:00Z"},
        {"currency": "EUR", "rate": "1.1", "at": "2026-11-23T05:55:00Z"},
    ]
    (tmp_path / "rates.json").write_text(json.dumps({"rates": rows}))
    job = resolve(job_of(tmp_path, {"TAO": {"source": "file", "path": "rates.json"}}), NOW)
    assert (job.fx["TAO"].rate, job.fx["TAO"].source) == (Decimal(401), "the desk")
    with pytest.raises(ConfigError, match=r"has no rate of TAO up to now"):
        resolve(job_of(tmp_path, {"TAO": {"source": "file", "path": "rates.json"}}), NOW - timedelta(days=1))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Reply(status=429), "answers 429"),
        (Reply.garbage(), "sends no JSON"),
        ({"error": ["EQuery:Unknown asset pair"], "result": {}}, "Kraken says of TAOUSD: EQuery:Unknown asset pair"),
        ({"error": [], "result": {}}, "Kraken tells no rate of TAOUSD"),
        ({"error": [], "result": {"TAOUSD": {"c": ["0", "1"]}}}, "is no rate: '0'"),
        ({"error": [], "result": {"TAOUSD": {"c": ["-4", "1"]}}}, "is no rate: '-4'"),
        ({"error": [], "result": {"TAOUSD": {"c": ["NaN", "1"]}}}, "is no rate: 'NaN'"),
        ({"error": [], "result": {"TAOUSD": {"c": []}}}, "tells no last trade"),
        ({"error": [], "result": {"TAOUSD": {"c": ["900"], "a": ["412"], "b": ["411"]}}}, "is far off what is bid"),
        ({"error": [], "result": {"TAOUSD": 5, "OTHER": 6}}, "Kraken tells no rate"),
    ],
)
def test_a_ticker_that_tells_no_rate_ends_the_start(tmp_path: Path, told: object, message: str) -> None:
    """Before anything is spent, with what to do instead."""
    with Ticker(told) as ticker:
        said = refusal(tmp_path, {"TAO": {"source": "kraken", "url": f"{ticker.url}/kraken"}})
    assert message in said
    assert "expected a feed that answers" in said


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "tells no rate of bittensor"),
        ({"bittensor": {"usd": 4}}, "does not say of when"),
        ({"bittensor": {"usd": "x", "last_updated_at": 1_700_000_000}}, "is no rate"),
        (gecko(4, NOW + timedelta(days=1)), "which is yet to come"),
    ],
)
def test_coingecko_is_not_believed_either(told: object, message: str) -> None:
    """A rate needs a figure and a time that has come."""
    with Ticker(coingecko=told) as ticker, pytest.raises(FeedError, match=message):
        fetch_rate("coingecko", "TAO", NOW, url=f"{ticker.url}/coingecko")


@pytest.mark.parametrize(
    ("fx", "message"),
    [
        ({"TAO": {"source": "krakn"}}, "did you mean 'kraken'?"),
        ({"TAO": {"source": []}}, "names no feed"),
        ({"TAO": {}}, "fx.TAO.source: is missing"),
        ({"TAO": {"source": "file"}}, "fx.TAO.path: is missing"),
        ({"TAO": {"source": "kraken", "url": "http://host.example/"}}, "asked in the clear"),
        ({"TAO": {"source": "kraken", "symbol": "a b"}}, "Kraken's pair"),
        ({"TAO": {"source": "kraken", "at": "2026-01-01"}}, "stands beside a rate that is fetched"),
        ({"USD": {"source": "kraken"}}, "is not a currency that has a rate"),
        ({"EUR": {"source": "kraken"}}, "there is no exchange rate for 'TAO'"),
    ],
)
def test_a_source_that_cannot_be_right_is_refused_when_the_file_is_read(
    tmp_path: Path, fx: dict[str, Any], message: str
) -> None:
    """Without a word to any feed."""
    with pytest.raises(ConfigError) as caught:
        job_of(tmp_path, fx)
    assert message in str(caught.value)


def test_rates_that_no_pool_needs_are_not_fetched(tmp_path: Path) -> None:
    """A feed that is down is nobody's business then."""
    fx = {"TAO": {"source": "kraken", "url": "http://127.0.0.1:9/"}}
    job = resolve(job_of(tmp_path, fx, remote("far")), NOW)
    assert not job.fx


def test_a_token_too_dear_at_the_fetched_rate_is_refused(tmp_path: Path) -> None:
    """What a price in another currency comes to is known only with its rate."""
    fast = remote("far", price={"input": "1000", "output": "4000", "currency": "TAO"})
    with Ticker() as ticker, pytest.raises(ConfigError, match="USD for a single token"):
        resolve(job_of(tmp_path, {"TAO": {"source": "kraken", "url": f"{ticker.url}/kraken"}}, fast), NOW)


def test_a_run_charges_at_the_rate_that_held_when_it_started(tmp_path: Path) -> None:
    """Every charge has rate, source and time; USD is native x rate, half-even, and the award has the rate too."""
    with EndpointDouble(["tiny"]) as double, Ticker() as ticker:
        pool = remote("far", double.base_url, price={"input": "0.00025", "output": "0.001", "currency": "TAO"})
        fx = {"TAO": {"source": "kraken", "url": f"{ticker.url}/kraken"}}
        job = job_of(tmp_path, fx, pool)
        assert run(job).status == "complete"
    found = written(job)
    check_conserved(found, 3)
    charges = found.rows("charges")
    assert charges
    for charge in charges:
        assert charge["currency"] == "TAO"
        assert charge["fx_rate"] == Decimal("412.03")
        assert charge["fx_source"] == f"kraken TAOUSD {ticker.url}/kraken"
        assert charge["fx_at"] is not None
        assert charge["cost"] == round(charge["cost_native"] * Decimal("412.03"), 18)
    assert {row["fx_rate"] for row in found.rows("awards")} == {Decimal("412.03")}


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.decimals(), st.floats(), st.text(), st.lists(st.none())))
def test_whatever_a_ticker_says_is_a_rate_or_a_refusal(figure: object) -> None:
    """No figure makes the reader fail in any other way, and no rate is 0 or has more than 18 places."""
    try:
        rate = usable_rate(figure, "TAO")
    except FeedError:
        return
    assert rate > 0
    assert rate == rate.quantize(Decimal("1e-18"), context=Context(prec=60))
