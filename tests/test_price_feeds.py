"""Price feeds: each provider's shape and unit, exactly; garbage and wrong units refused before anything is spent."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors import prime_gpus
from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.fetch import FeedError, bare, fetch_json
from bidbeam.connectors.front_prime import PrimeFront, listing
from bidbeam.connectors.front_server import Call, FrontServer
from bidbeam.connectors.front_targon import TargonFront, machine
from bidbeam.connectors.fronts import ProviderFront
from bidbeam.connectors.http_transport import endpoint
from bidbeam.connectors.pools import PoolSpec, PriceSchedule
from bidbeam.connectors.price_feeds import SHAPES, check_plausible, read_prices
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.prices import per_second
from bidbeam.pipelines.quote import quote_job
from bidbeam.pipelines.resolving import resolve, valid_at
from bidbeam.pipelines.run import run
from tests.small_jobs import DAY, by_the_hour, prompts, remote, write_job, written

NOW = datetime(2026, 11, 23, 6, tzinfo=UTC)
DEEPSEEK = {"input": Decimal("1.00"), "output": Decimal("1.00"), "cached_input": Decimal("0.10")}
OWN = {"tiny": {"source": "package:none"}}
NEMO = {"input": Decimal("0.0245"), "output": Decimal("0.0978"), "cached_input": Decimal("0.0024")}


class Feed(FrontServer):
    """Answers every GET with one reply, by path where ``by_path`` names it."""

    def __init__(self, document: object = None, *, reply: Reply | None = None, by_path: Any = None) -> None:
        super().__init__()
        self.reply = reply or Reply(body=json.dumps(document).encode())
        self.by_path: Mapping[str, object] = by_path or {}

    def answer(self, call: Call) -> Reply:
        self.calls.append(call)
        if call.path in self.by_path:
            return Reply(body=json.dumps(self.by_path[call.path]).encode())
        return self.reply


def live(base_url: str, profile: str, *, price: Mapping[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A pool whose price is live."""
    pool = remote("live", base_url, profile=profile, **keys)
    pool["price"] = {"source": "live", **(price or {})}
    pool.setdefault("api_key_env", "FEED_TEST_KEY")
    return pool


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEED_TEST_KEY", "unremarkable")


def job_of(home: Path, *pools: dict[str, Any], fx: Mapping[str, Any] | None = None, **keys: Any) -> Job:
    path = write_job(home, prompts(4), pools, **keys)
    if fx is not None:
        bought = json.loads((home / "pools.yaml").read_text())
        (home / "pools.yaml").write_text(json.dumps({**bought, "fx": fx}))
    return Job.from_yaml(path, run_date=DAY)


def resolved(home: Path, *pools: dict[str, Any], now: datetime = NOW, **keys: Any) -> PoolSpec:
    return resolve(job_of(home, *pools, **keys), now).pools[0]


def refusal(home: Path, *pools: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(home, *pools, **keys)
    assert caught.value.exit_code == 2
    assert caught.value.line is not None
    return str(caught.value)


@pytest.mark.parametrize("profile", ["chutes", "prime", "openrouter"])
@pytest.mark.parametrize("prices", [DEEPSEEK, NEMO])
def test_each_providers_own_feed_gives_the_same_exact_price_of_a_token(
    tmp_path: Path, profile: str, prices: Mapping[str, Decimal]
) -> None:
    """Dollars per million under two names, and decimal text per token, all come to the same unit prices."""
    with ProviderFront(profile, "http://127.0.0.1:9", {"tiny": "tiny"}, prices={"tiny": prices}) as front:
        pool = resolved(tmp_path, live(front.base_url, profile))
    assert pool.price.unit_prices == {
        "uncached_input": prices["input"] / 10**6,
        "cached_input": prices["cached_input"] / 10**6,
        "output": prices["output"] / 10**6,
    }
    assert pool.price.fetched_at == NOW
    assert pool.price.source == f"{front.base_url}/models tiny"
    assert pool.price.price_id


def test_both_of_chutes_shapes_are_read() -> None:
    """The older feed has ``pricing`` alone, which looks like per token and is per million."""
    document = {"data": [{"id": "m", "pricing": {"prompt": 0.5, "completion": "2.85"}}]}
    prices, _ = read_prices(json.loads(json.dumps(document), parse_float=Decimal), SHAPES["chutes"], "usd/mtok", "m")
    assert prices == {"uncached_input": Decimal("5e-7"), "output": Decimal("0.00000285")}


def test_prices_in_tao_are_read_in_tao(tmp_path: Path) -> None:
    """A pool that is paid in TAO is priced by the feed's TAO figures, at the job's rate of exchange."""
    entry = {"id": "tiny", "price": {"input": {"usd": 0.5, "tao": 0.00125}, "output": {"usd": 2.85, "tao": 0.007125}}}
    with Feed({"data": [entry]}) as feed:
        job = job_of(
            tmp_path,
            live(f"{feed.url}/v1", "chutes", price={"currency": "TAO"}),
            fx={"TAO": {"rate": "400", "at": "2026-11-23T05:00:00Z", "source": "by hand"}},
        )
        price = resolve(job, NOW).pools[0].price
    assert price.currency == "TAO"
    assert price.unit_prices == {"uncached_input": Decimal("1.25e-9"), "output": Decimal("7.125e-9")}


@given(st.decimals("1e-6", "9000", places=6, allow_nan=False), st.decimals("1e-6", "9000", places=6, allow_nan=False))
def test_what_a_feed_says_is_kept_to_the_last_digit(input_: Decimal, output: Decimal) -> None:
    """Whatever 15 places hold per token is what the feed said, exactly."""
    document = {"data": [{"id": "m", "pricing": {"input_usd_per_mtok": input_, "output_usd_per_mtok": str(output)}}]}
    prices, said = read_prices(document, SHAPES["prime"], "usd/mtok", "m")
    assert Fraction(prices["uncached_input"]) * 10**6 == Fraction(input_)
    assert Fraction(prices["output"]) * 10**6 == Fraction(output)
    assert said == ""


def test_binary_noise_is_rounded_once_and_said() -> None:
    """A float that was computed has places that no price has: half-even at 15, and the source says so."""
    document = {"data": [{"id": "m", "pricing": {"prompt": "0.30000000000000004", "completion": "1"}}]}
    prices, said = read_prices(document, SHAPES["chutes"], "usd/mtok", "m")
    assert prices["uncached_input"] == Decimal("3e-7")
    assert "rounded" in said


def test_of_conditional_prices_the_dearest_counts() -> None:
    """A price that rises with the prompt or the hour must not let a bill pass its worst case."""
    pricing = {
        "prompt": "0.000001",
        "completion": "0.000002",
        "input_cache_read": "0.0000001",
        "request": "0",
        "overrides": [
            {"min_prompt_tokens": 200000, "prompt": "0.000002"},
            {"utc_start": "16:30", "completion": "1e-6"},
        ],
    }
    prices, said = read_prices({"data": [{"id": "m", "pricing": pricing}]}, SHAPES["openrouter"], "usd/token", "m")
    assert prices == {
        "uncached_input": Decimal("0.000002"),
        "output": Decimal("0.000002"),
        "cached_input": Decimal("0.0000001"),
    }
    assert "dearest" in said


def test_one_of_a_routers_providers_is_priced_by_its_own_entry(tmp_path: Path) -> None:
    """``served_by`` reads the model's list of endpoints."""
    endpoints = [
        {"tag": "one/fp8", "provider_name": "One", "pricing": {"prompt": "0.000001", "completion": "0.000002"}},
        {"tag": "two", "provider_name": "Two", "pricing": {"prompt": "0.0000005", "completion": "0.000003"}},
    ]
    path = "/api/v1/models/author/tiny/endpoints"
    with Feed({}, by_path={path: {"data": {"id": "author/tiny", "endpoints": endpoints}}}) as feed:
        base, models = f"{feed.url}/api/v1", {"tiny": "author/tiny"}
        pool = resolved(tmp_path, live(base, "openrouter", price={"served_by": "Two"}, models=models))
        assert pool.price.unit_prices["uncached_input"] == Decimal("5e-7")
        # And nobody else behind the router is asked at that price.
        assert endpoint(pool).profile.body == {"provider": {"only": ["two"], "allow_fallbacks": False}}
        also = live(base, "openrouter", price={"served_by": "one/fp8"}, models=models, options={"privacy": "zdr"})
        assert endpoint(resolved(tmp_path, also)).profile.body == {
            "provider": {"data_collection": "deny", "zdr": True, "only": ["one/fp8"], "allow_fallbacks": False}
        }
        other = live(base, "openrouter", price={"served_by": "Two"}, models=models, options={"provider": "one/fp8"})
        assert "the price is that of 'two', and options.provider is 'one/fp8'" in refusal(tmp_path, other)
        wrong = refusal(tmp_path, live(base, "openrouter", price={"served_by": "twoo"}, models=models))
    assert "'twoo' does not serve 'author/tiny' there; did you mean 'two'?" in wrong
    fallback = {"input": "0.50", "output": "3.00", "per": "1M tokens"}
    down = live("http://127.0.0.1:9/v1", "openrouter", price={"served_by": "two", "fallback": fallback}, models=models)
    assert endpoint(resolved(tmp_path, down)).profile.body["provider"]["only"] == ["two"]


def test_the_run_pays_the_live_price_and_the_ledger_says_whose_it_was(tmp_path: Path) -> None:
    """Fetched when the run starts, charged to the digit, and in ``prices`` with where and when it was read."""
    with (
        EndpointDouble(["theirs"]) as upstream,
        ProviderFront(
            "chutes", upstream.base_url, {"vendor/tiny": "theirs"}, key="unremarkable", prices={"vendor/tiny": DEEPSEEK}
        ) as front,
    ):
        job = job_of(tmp_path, live(front.base_url, "chutes", models={"tiny": "vendor/tiny"}))
        quoted = quote_job(job)
        assert "1 / 0.1 / 1 USD per 1M input / cached / output tokens" in quoted.pools[0].price
        assert run(job).status == "complete"
    found = written(job)
    prices = {row["meter"]: row for row in found.rows("prices")}
    assert {meter: row["unit_price"] for meter, row in prices.items()} == {
        "uncached_input": Decimal("0.000001"), "cached_input": Decimal("1e-7"), "output": Decimal("0.000001"),
    }  # fmt: skip
    assert {row["source"] for row in prices.values()} == {f"{front.base_url}/models vendor/tiny"}
    assert all(row["fetched_at"] is not None for row in prices.values())
    assert {row["price_id"] for row in found.rows("charges")} == {row["price_id"] for row in prices.values()}
    assert sum(row["cost"] for row in found.rows("charges")) > 0


def test_reading_a_job_fetches_nothing(tmp_path: Path) -> None:
    """A job file reads without its feeds; a run does not start without them."""
    job = job_of(tmp_path, live("http://127.0.0.1:9/v1", "chutes"))
    assert not job.pools[0].price.unit_prices
    with pytest.raises(ConfigError, match="cannot connect"):
        run(job)
    assert not (tmp_path / "out").exists()


GOOD = {"prompt": 0.5, "completion": 2.85, "input_cache_read": 0.05}


@pytest.mark.parametrize(
    ("pricing", "message"),
    [
        ({"prompt": 50_000, "completion": 50_000}, "comes to 0.05 USD for a single token"),
        ({"prompt": 5e-7, "completion": 2e-6}, "in another unit than this feed is known for"),
        ({"prompt": 500, "completion": 1}, "input costs more than 100 times the output"),
        ({"prompt": 1, "completion": 1, "input_cache_read": 2}, "cached input is dearer"),
        ({"prompt": -1, "completion": -1}, "is no price: '-1'"),
        ({"prompt": True, "completion": 1}, "is no price: 'True'"),
        ({"prompt": "free", "completion": 1}, "is no price: 'free'"),
        ({"prompt": "NaN", "completion": 1}, "is no price: 'NaN'"),
        ({"prompt": "1e999", "completion": 1}, "is no price: '1e999'"),
        ({"prompt": {"usd": 1}, "completion": 1}, "is no price"),
        ({"completion": 1}, "names no uncached input price"),
        ({}, "names no uncached input price"),
        ("cheap", "names no uncached input price"),
        (None, "names no uncached input price"),
    ],
)
def test_a_price_that_cannot_be_right_is_refused(tmp_path: Path, pricing: object, message: str) -> None:
    """Wrong units, negative, missing and unreadable prices end the start with a message that says what to do."""
    with Feed({"data": [{"id": "tiny", "pricing": pricing}]}) as feed:
        said = refusal(tmp_path, live(f"{feed.url}/v1", "chutes"))
    assert message in said
    assert "pools[0].price.source" in said
    assert "fallback" in said


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=500), "answers 500"),
        (Reply(status=302, headers={"Location": "http://127.0.0.1:1/"}), "answers 302"),
        (Reply(status=401, body=b"{}"), "asks for a key (401)"),
        (Reply.garbage(), "sends no JSON"),
        (Reply(body=b'"tiny"'), "sends no JSON object or list"),
        (Reply(body=b"[" * 100_000), "sends no JSON"),
        (Reply(cut="truncate", body=b'{"data": []}'), "the answer broke off"),
        (Reply(cut="reset"), "the connection was lost"),
        (Reply(body=b"{}"), "holds no list of models"),
        (Reply(body=b'{"data": {"tiny": 1}}'), "holds no list of models"),
        (Reply(body=b'{"data": [1, null, {"id": "tinny"}]}'), "does not name the model 'tiny'; did you mean 'tinny'?"),
    ],
)
def test_a_feed_that_answers_garbage_ends_the_start_and_nothing_else(
    tmp_path: Path, reply: Reply, message: str
) -> None:
    """Nothing that a feed sends is followed, and nothing hangs on it."""
    with Feed(reply=reply) as feed:
        assert message in refusal(tmp_path, live(f"{feed.url}/v1", "chutes"))


def test_a_feed_has_limits_of_size_and_time() -> None:
    """A body without end, or without beginning, is given up."""
    with Feed([0] * 5000) as feed, pytest.raises(FeedError, match="more than 1,000 bytes"):
        fetch_json(feed.url, max_bytes=1000)
    with Feed(reply=Reply(delay_s=5, body=b"{}")) as feed, pytest.raises(FeedError, match=r"no answer within 0\.1 s"):
        fetch_json(feed.url, timeout_s=0.1)


@pytest.mark.parametrize("url", ["ftp://host/", "http://host.example/", "https://u:p@host.example/", "https://[", "x"])
def test_a_feed_is_asked_over_https_only(url: str) -> None:
    """Plain http goes to this machine alone; an address holds no password."""
    with pytest.raises(FeedError):
        fetch_json(url)


def test_what_is_written_down_of_an_address_holds_no_secret() -> None:
    """User, password and query are left out of a price's source."""
    assert bare("https://user:pass@host.example:8443/v1/models?api_key=abc#x") == "https://host.example:8443/v1/models"


def test_the_key_goes_to_the_pools_own_provider_alone(tmp_path: Path) -> None:
    """A feed at another address never sees it."""
    document = {"data": [{"id": "tiny", "pricing": GOOD}]}
    with Feed(document) as own, Feed(document) as other:
        resolved(tmp_path, live(f"{own.url}/v1", "chutes"))
        resolved(tmp_path, live(f"{own.url}/v1", "chutes", price={"url": f"{other.url}/prices"}))
        assert own.calls[0].headers["authorization"] == "Bearer unremarkable"
        assert "authorization" not in other.calls[0].headers


def test_a_fallback_counts_where_the_feed_fails_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The start goes on at the written-down price, with a warning and the reason in the ledger's source."""
    fallback = {"input": "0.50", "output": "2.85", "per": "1M tokens"}
    with Feed(reply=Reply(status=503)) as feed, caplog.at_level(logging.WARNING, "bidbeam.prices"):
        pool = resolved(tmp_path, live(f"{feed.url}/v1", "chutes", price={"fallback": fallback}))
    assert pool.price.unit_prices == {"uncached_input": Decimal("5e-7"), "output": Decimal("0.00000285")}
    assert pool.price.source.startswith("fallback of the pools file, for http://127.0.0.1:")
    assert "answers 503; its fallback price counts" in caplog.text


def test_a_feed_far_off_what_is_expected_is_not_believed(tmp_path: Path) -> None:
    """A factor of more than a hundred is a mistake, whoever made it; less is a price that moved."""
    with Feed({"data": [{"id": "tiny", "pricing": GOOD}]}) as feed:

        def expect(price: str) -> dict[str, Any]:
            told = {"input": price, "output": "2.00", "per": "1M tokens"}
            return live(f"{feed.url}/v1", "chutes", price={"expect": told})

        assert resolved(tmp_path, expect("0.01")).price.unit_prices["uncached_input"] == Decimal("5e-7")
        assert "more than 100 times off" in refusal(tmp_path, expect("0.001"))
        assert "more than 100 times off" in refusal(tmp_path, expect("60"))


def test_models_of_different_prices_need_a_pool_each(tmp_path: Path) -> None:
    """A pool has one schedule of prices."""
    entries = [{"id": "tiny", "pricing": GOOD}, {"id": "big", "pricing": {**GOOD, "completion": 4}}]
    with Feed({"data": entries}) as feed:
        pool = live(f"{feed.url}/v1", "chutes", models=["tiny", "big"])
        said = refusal(tmp_path, pool, models={"tiny": {}, "big": {}})
    assert "'tiny' and 'big' have different prices there; make a pool for each" in said


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ({"source": "live", "feed": "chuts"}, "there is no price feed 'chuts'"),
        ({"source": "live", "input": "1"}, "stands beside source: live"),
        ({"source": "live", "path": "a.csv"}, "does not belong to source: live"),
        (
            {"source": "live", "url": "http://host.example/"},
            "price.url: the feed at host.example is asked in the clear",
        ),
        ({"source": "file"}, "price.path: is missing"),
        ({"source": "list"}, "price.provider: is missing"),
        ({"source": "live", "currency": "TAO"}, "there is no exchange rate for 'TAO'"),
    ],
)
def test_a_source_that_cannot_be_right_is_refused_when_the_file_is_read(
    tmp_path: Path, price: dict[str, Any], message: str
) -> None:
    """Without a word to any feed."""
    pool = live("http://127.0.0.1:9/v1", "chutes") | {"price": price}
    with pytest.raises(ConfigError) as caught:
        job_of(tmp_path, pool)
    assert message in str(caught.value)


@pytest.fixture(params=["json", "yaml", "csv"])
def price_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rows = [
        {"pool": "live", "input": "0.20", "output": "0.80", "per": "1M tokens", "valid_to": "2026-11-01"},
        {"pool": "live", "input": "0.10", "output": "0.40", "per": "1M tokens", "valid_from": "2026-11-01"},
        {"pool": "live", "input": "0.05", "output": "0.20", "per": "1M tokens", "valid_from": "2026-12-01"},
        {"pool": "else", "input": "9", "output": "9", "per": "1M tokens"},
    ]
    path = tmp_path / f"prices.{request.param}"
    if request.param == "csv":
        names = ["pool", "input", "output", "per", "valid_from", "valid_to"]
        lines = [",".join(names), *(",".join(row.get(name, "") for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif request.param == "json":
        path.write_text(json.dumps({"prices": rows}))
    else:
        path.write_text("\n".join("- {" + ", ".join(f'{k}: "{v}"' for k, v in row.items()) + "}" for row in rows))
    return path


def test_a_file_of_dated_prices_gives_the_one_that_holds(tmp_path: Path, price_file: Path) -> None:
    """JSON, YAML and CSV alike; of several the one begun last."""
    pool = live("http://127.0.0.1:9/v1", "chutes") | {"price": {"source": "file", "path": price_file.name}}
    price = resolved(tmp_path, pool).price
    assert price.unit_prices["uncached_input"] == Decimal("1e-7")
    assert price.valid_from == datetime(2026, 11, 1, tzinfo=UTC)
    assert price.source == str(price_file)
    assert resolved(tmp_path, pool, now=NOW - timedelta(days=30)).price.unit_prices["output"] == Decimal("8e-7")
    assert resolved(tmp_path, pool, now=NOW + timedelta(days=30)).price.unit_prices["output"] == Decimal("2e-7")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", None, "cannot be read: No such file"),
        ("p.json", None, "there is no such file"),
        ("p.txt", "", "is no kind of file that is read here"),
        ("p.csv", "pool,input\nlive,1,2\n", "more or fewer cells"),
        ("p.csv", "pool,inptu,output,per\nlive,1,2,1M tokens\n", "unknown key"),
        ("p.json", "[1]", "a list of prices"),
        ("p.json", '{"pool": "else", "input": 1, "output": 1, "per": "1M tokens"}', "has no price of the pool 'live'"),
        ("p.json", '{"input": 1, "output": 1, "per": "1M tokens", "valid_to": "2020-01-01"}', "no price holds now"),
        ("p.json", '{"input": 100000, "output": 100000, "per": "1M tokens"}', "comes to 0.1 for a single token"),
    ],
)
def test_a_file_without_a_price_that_holds_is_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    """Missing, unreadable and expired prices say which file."""
    if text is not None:
        (tmp_path / name).write_text(text)
    pool = live("http://127.0.0.1:9/v1", "chutes") | {"price": {"source": "file", "path": name}}
    said = refusal(tmp_path, pool)
    assert message in said


def test_prices_written_down_may_be_dated(tmp_path: Path) -> None:
    """A list of them is a price that changes by itself; one that has ended is refused at the start."""
    old = {"input": "0.20", "output": "0.80", "per": "1M tokens", "valid_to": "2026-11-01"}
    new = {"input": "0.10", "output": "0.40", "per": "1M tokens", "valid_from": "2026-11-01"}
    base = remote("live")
    assert resolved(tmp_path, base | {"price": [old, new]}).price.unit_prices["output"] == Decimal("4e-7")
    assert "no price holds now: the last one ended 2026-11-01 00:00 UTC" in refusal(tmp_path, base | {"price": old})
    assert "the next one begins 2026-12-01" in refusal(tmp_path, base | {"price": {**new, "valid_from": "2026-12-01"}})
    assert valid_at([resolve(job_of(tmp_path, base | {"price": new}), NOW).pools[0].price], NOW)


@pytest.mark.parametrize(
    ("price", "rate", "message"),
    [
        ({"input": "0.0000001", "output": "0.40"}, None, "price.input: comes to 0.0000000000001 for a single token"),
        ({"input": "20000", "output": "20000"}, None, "price.input: comes to 0.02 for a single token"),
        ({"request": "150"}, None, "price.request: cannot be: a request comes to 150 USD"),
        ({"accelerator_hour": "7100"}, None, "an accelerator comes to 7100 USD an hour"),
        ({"input": "3", "output": "3", "currency": "TAO"}, "400", None),
        ({"input": "30", "output": "30", "currency": "TAO"}, "400", "price.input: comes to 0.00003 for a single token"),
        ({"accelerator_hour": "3", "currency": "TAO"}, "400", "an accelerator comes to 1200 USD an hour"),
    ],
)
def test_what_is_written_down_in_the_wrong_unit_is_refused_too(
    tmp_path: Path, price: dict[str, str], rate: str | None, message: str | None
) -> None:
    """Tokens, requests and hours, in dollars or at the rate of their currency: at their line, before a start."""
    hourly = "accelerator_hour" in price
    pool = (
        by_the_hour("near", price=price)
        if hourly
        else remote("near", price={"per": "1M tokens"})
        | {"price": price | ({"per": "1M tokens"} if "input" in price else {})}
    )
    fx = None if rate is None else {"TAO": {"rate": rate, "at": "2026-11-23T05:00:00Z", "source": "by hand"}}
    if message is None:
        assert job_of(tmp_path, pool, fx=fx).pools[0].price.unit_prices
    else:
        with pytest.raises(ConfigError) as caught:
            job_of(tmp_path, pool, fx=fx, models=OWN if hourly else None)
        assert message in str(caught.value)


def test_a_throughput_that_cannot_be_makes_no_price(tmp_path: Path) -> None:
    """An hour divided by next to nothing is dearer than any token."""
    pool = remote("live", capacity={"tokens_per_second": "0.001"}) | {"price": {"accelerator_hour": "1.408"}}
    with pytest.raises(ConfigError, match=r"uncached input comes to 0\.39"):
        job_of(tmp_path, pool)


def test_an_hour_becomes_the_price_of_a_token_by_measured_throughput(tmp_path: Path) -> None:
    """A remote machine that is rented by the hour: the hour / what it serves in one, half-even at 15 places."""
    pool = remote("live", price={"per": None}, capacity={"tokens_per_second": 2400}) | {
        "price": {"accelerator_hour": "1.408"}
    }
    price = resolved(tmp_path, pool).price
    token = Decimal("0.000000162962963")
    assert price.unit_prices == {"uncached_input": token, "cached_input": Decimal(0), "output": token}
    assert price.source == "pools file: '1.408' an hour at 2400 tokens a second"


def test_a_published_list_prices_a_pool(tmp_path: Path) -> None:
    """Dated prices of a maintained package, the batch price where the pool is a batch API."""
    pool = remote("live", models={"tiny": "gemini-2.5-flash"}) | {"price": {"source": "list", "provider": "vertex"}}
    price = resolved(tmp_path, pool).price
    assert price.unit_prices["uncached_input"] > 0
    assert price.source.startswith("genai-prices ")
    assert f"as of {DAY}" in price.source
    unknown = remote("live") | {"price": {"source": "list", "provider": "vertex"}}
    assert "vertex lists no price of 'tiny'" in refusal(tmp_path, unknown)


@pytest.mark.parametrize(
    ("provider", "model", "output"), [("vertex", "gemini-2.5-flash", "2.50"), ("azure", "deepseek-v3.2", "1.68"),
                                      ("vertex", "deepseek-v3.2", "1.68")]
)  # fmt: skip
def test_a_batch_pool_is_priced_by_the_lists_batch_price(
    tmp_path: Path, provider: str, model: str, output: str
) -> None:
    """Half where the list says so, the usual price where it has no other; an endpoint pays the usual one."""

    def listed(**keys: Any) -> PriceSchedule:
        pool = remote("live", models={"tiny": model}, **keys) | {"price": {"source": "list", "provider": provider}}
        job = Job.from_yaml(write_job(tmp_path, prompts(4), [pool]), run_date=NOW.date())
        return resolve(job, NOW).pools[0].price

    usual, batch = listed(), listed(kind="batch")
    assert usual.unit_prices["output"] == Decimal(output) / 1_000_000
    parts = 1 if provider == "azure" else 2
    assert batch.unit_prices["output"] * parts == usual.unit_prices["output"]


def test_machines_by_the_hour_are_priced_by_targons_inventory(tmp_path: Path) -> None:
    """A machine by its name costs its whole hour; accelerators cost theirs where they are cheapest and free."""
    machines = [
        machine("h200-8x", "H200", 8, 17.6, 1),
        machine("h200-1x", "H200", 1, 2.5, 2),
        machine("h200-2x", "H200", 2, 2.0, 0),
    ]
    models = OWN
    with TargonFront(machines) as front:

        def hour(name: str) -> dict[str, Any]:
            return by_the_hour("near", price={"source": "live", "feed": "targon", "url": front.url, "machine": name})

        price = resolved(tmp_path, hour("H200"), models=models).price
        assert price.unit_prices["accelerator_second"] == per_second(Decimal("2.2"))
        assert price.by_time
        assert price.source == f"targon h200-8x {front.url}"
        assert resolved(tmp_path, hour("h200-8x"), models=models).price.unit_prices["setup"] == per_second(
            Decimal("17.6")
        )
        pair = hour("H200") | {"engine": {"tensor_parallel_size": 2}}
        assert resolved(tmp_path, pair, models=models).price.unit_prices["setup"] == per_second(Decimal("4.4"))
        assert "all are taken" in refusal(tmp_path, hour("h200-2x"), models=models)
        assert "Targon offers no 'b200' now" in refusal(tmp_path, hour("b200"), models=models)


LISTED = [
    listing("eu-8x", "H100_80GB", 8, 17.6, "DE"),
    listing("us-1x", "H100_80GB", 1, 1.9, "US"),
    listing("attic", "H100_80GB", 1, None, "DE", security="community_cloud")
    | {"prices": {"onDemand": 9, "communityPrice": 1.5, "currency": "USD"}},
    listing("nowhere", "H100_80GB", 1, 1.1, None),
    listing("spot", "H100_80GB", 1, 0.5, "DE", isSpot=True),
    listing("gone", "H100_80GB", 1, 0.6, "DE", stock="Unavailable"),
    listing("free", "H100_80GB", 1, 0, "DE"),
    listing("euros", "H100_80GB", 1, None, "DE") | {"prices": {"onDemand": 0.7, "currency": "EUR"}},
    listing("rare", "B300_288GB", 8, 40.0, "FR", stock="Low"),
]


@pytest.mark.parametrize(
    ("placement", "machine", "hour", "told"),
    [
        ({}, "h100_80gb", "1.1", "nowhere a-cloud secure_cloud"),
        ({"jurisdiction": "global"}, "H100_80GB", "1.1", "nowhere a-cloud secure_cloud"),
        ({"jurisdiction": "EEA"}, "H100_80GB", "1.5", "attic a-cloud DE community_cloud"),
        ({"jurisdiction": "EU", "operator": "community"}, "H100_80GB", "1.5", "attic a-cloud DE community_cloud"),
        ({"jurisdiction": "DE", "operator": "datacenter"}, "H100_80GB", "2.2", "eu-8x a-cloud DE secure_cloud"),
        ({"operator": "cloud", "jurisdiction": "US"}, "H100_80GB", "1.9", "us-1x a-cloud US secure_cloud"),
        ({"jurisdiction": "DE"}, "eu-8x", "17.6", "eu-8x a-cloud DE secure_cloud"),
        ({}, "B300_288GB", "5", "rare a-cloud FR secure_cloud"),
    ],
)
def test_primes_availability_prices_a_pool_by_machines_where_and_of_whom_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: dict[str, str], machine: str, hour: str, told: str
) -> None:
    """The cheapest in stock by price, country and security; what it says of itself stands in the price's source."""
    monkeypatch.setenv("PRIME_API_KEY", "key-of-the-availability")
    with PrimeFront(LISTED, key="key-of-the-availability", page=4) as front:
        monkeypatch.setattr(prime_gpus, "PRIME_URL", front.url)
        pool = by_the_hour("near", price={"source": "live", "feed": "prime", "machine": machine}, placement=placement)
        price = resolved(tmp_path, pool, models=OWN).price
        assert [call.query["page"] for call in front.calls] == ["1", "2", "3"]
    assert price.unit_prices["accelerator_second"] == per_second(Decimal(hour))
    assert price.source == f"prime {told} {front.url}"
    assert price.fetched_at == NOW


def test_primes_availability_says_why_it_prices_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, of others, all taken, unknown, behind a key; and the key goes to Prime's own address alone."""
    monkeypatch.setenv("PRIME_API_KEY", "key-of-the-availability")

    def asking(machine: str, **more: Any) -> dict[str, Any]:
        placement = {"jurisdiction": "FR", "operator": "datacenter"}
        live = {"source": "live", "feed": "prime", "machine": machine, **more}
        return by_the_hour("near", price=live, placement=placement)

    many = [*[listing(f"m{n}", "H100_80GB", 1, 2.0, "US") for n in range(120)], *LISTED]
    with PrimeFront(many, key="key-of-the-availability") as front:
        monkeypatch.setattr(prime_gpus, "PRIME_URL", front.url)
        elsewhere = refusal(tmp_path, asking("H100_80GB"), models=OWN)
        assert [call.query["page"] for call in front.calls] == ["1", "2"]
        assert "those that it has are not where or of whom the pool declares: DE" in elsewhere
        front.listings[:] = [listing("fr", "H100_80GB", 1, 2.0, "FR", stock="Unavailable")]
        assert "offers no 'H100_80GB' now; all are taken" in refusal(tmp_path, asking("H100_80GB"), models=OWN)
        assert "offers no 'H200' now; it has fr" in refusal(tmp_path, asking("H200"), models=OWN)
        front.listings[:] = [listing("fr", "H100_80GB", 1, 2000.0, "FR")]
        assert "comes to 2000 USD, which cannot be" in refusal(tmp_path, asking("H100_80GB"), models=OWN)
        front.calls.clear()
        shut = refusal(tmp_path, asking("fr", url=front.url), models=OWN)
        assert "(401" in shut
        assert "is PRIME_API_KEY set and valid?" in shut
        assert all("authorization" not in call.headers for call in front.calls)


def _listed(component: str, usd: str, unit: str = "Hrs") -> str:
    dimension = {"unit": unit, "pricePerUnit": {"USD": usd}}
    product = {"productFamily": "ML Instance", "attributes": {"instanceName": "ml.g5.xlarge", "component": component}}
    return json.dumps({"product": product, "terms": {"OnDemand": {"a": {"priceDimensions": {"b": dimension}}}}})


class PriceList(FrontServer):
    """AWS's price list as its own client asks for it."""

    def __init__(self, *listed: str, error: str | None = None) -> None:
        super().__init__()
        self.listed, self.error = listed, error

    def answer(self, call: Call) -> Reply:
        self.calls.append(call)
        if self.error is not None:
            return Reply(400, json.dumps({"__type": self.error, "message": "no"}).encode())
        return Reply(body=json.dumps({"FormatVersion": "aws_v1", "PriceList": self.listed}).encode())


def _sagemaker(url: str, **keys: Any) -> dict[str, Any]:
    pool = remote("live", profile="sagemaker", capacity={"tokens_per_second": 1000}, **keys)
    pool |= {"options": {"region": "eu-central-1", "endpoint": "e"}, "api_key_env": "FEED_TEST_KEY"}
    return pool | {"price": {"source": "live", "machine": "ml.g5.xlarge", "url": url}}


def test_an_instances_hour_comes_from_awss_price_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through boto3: the hour of hosting, not of training, and by measured throughput a token's price."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unremarkable")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unremarkable")
    with PriceList(_listed("Training", "9"), _listed("Hosting", "1.4400000000"), _listed("Hosting", "0")) as listed:
        price = resolved(tmp_path, _sagemaker(listed.url)).price
        asked = listed.calls[0].body
    assert {each["Field"]: each["Value"] for each in asked["Filters"]} == {
        "instanceName": "ml.g5.xlarge", "regionCode": "eu-central-1",
    }  # fmt: skip
    assert price.unit_prices == {
        "uncached_input": Decimal("4e-7"), "cached_input": Decimal(0), "output": Decimal("4e-7"),
    }  # fmt: skip
    assert "ml.g5.xlarge hosting eu-central-1: 1.44 an hour at 1000 tokens a second" in price.source
    with PriceList(_listed("Hosting", "1.44"), _listed("Hosting", "2")) as several:
        assert "has 2 prices of hosting" in refusal(tmp_path, _sagemaker(several.url))
    with PriceList(_listed("Training", "1.44")) as none:
        assert "has no price of hosting on 'ml.g5.xlarge' in 'eu-central-1'" in refusal(tmp_path, _sagemaker(none.url))
    with PriceList(error="AccessDeniedException") as denied:
        assert "AccessDeniedException; may these credentials read it" in refusal(tmp_path, _sagemaker(denied.url))
    with pytest.raises(ConfigError, match="how many tokens it serves"):
        job_of(tmp_path, _sagemaker("http://127.0.0.1:9") | {"capacity": {}})


_JSONS: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.decimals() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["data", "id", "price", "pricing", "input", "prompt", "usd", "m"]), inner)
    ),
    max_leaves=20,
)


@given(_JSONS, st.sampled_from(sorted(SHAPES)), st.none() | st.text(max_size=4))
def test_whatever_a_feed_holds_is_a_price_or_a_refusal(document: Any, shape: str, served_by: str | None) -> None:
    """No document makes the reader fail in any other way."""
    try:
        prices, _ = read_prices(document, SHAPES[shape], "usd/token", "m", served_by=served_by)
        check_plausible(prices, Decimal(1))
    except FeedError:
        return
    assert all(price >= 0 for price in prices.values())
