"""The pools file: exact prices, checked places and endpoints, and errors that say where and what next."""

from __future__ import annotations

import pickle
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.errors import ConfigError
from bidbeam.pipelines.pools_file import Pools, check_keys, read_pools
from bidbeam.pipelines.prices import UNITS, per_second
from bidbeam.pipelines.yaml_text import parse

TOKENS = 'price: {input: "0.10", cached_input: "0.01", output: "0.40", per: 1M tokens}'


def read(text: str, directory: str = "/nowhere") -> Pools:
    root = parse(text, "pools.yaml")
    return read_pools(root.entries["pools"], root.entries.get("models"), root.entries.get("fx"), directory)


def remote(*lines: str, price: str = TOKENS, models: str = "models: [m]") -> str:
    body = ["name: far", "kind: openai", "base_url: https://host.example/v1", models, price, *lines]
    keys = {line.split(":")[0] for line in lines}
    kept = [line for line in body[: len(body) - len(lines)] if line.split(":")[0] not in keys]
    return "pools:\n  - " + "\n    ".join([*kept, *lines]) + "\n"


def own(*lines: str, price: str = 'price: {accelerator_hour: "0.71"}') -> str:
    body = ["name: near", "kind: vllm", "models: [m]", price, *lines]
    return 'models: {m: {source: "package:some-model"}}\npools:\n  - ' + "\n    ".join(body) + "\n"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    return str(caught.value)


def test_prices_per_million_become_exact_prices_per_token() -> None:
    """0.10 per 1M tokens is 0.0000001 per token, to the last digit."""
    prices = read(remote()).pools[0].price.unit_prices
    assert prices == {
        "uncached_input": Decimal("1E-7"), "cached_input": Decimal("1E-8"), "output": Decimal("4E-7"),
    }  # fmt: skip


@given(st.integers(0, 10**14), st.sampled_from(sorted(UNITS)))
def test_any_price_that_fits_is_kept_exactly(units: int, per: str) -> None:
    """Whatever 15 places hold is converted without rounding, and multiplied back gives what was written."""
    power = UNITS[per]
    written = Decimal(units).scaleb(power - 15)
    price = f'price: {{input: "{written:f}", output: 0, per: {per}}}'
    if units > 10**13 or 0 < units < 1000:
        # More than a cent for a token, or less than a millionth of a dollar for a million: in another unit.
        with pytest.raises(ConfigError, match="for a single token"):
            read(remote(price=price))
        return
    found = read(remote(price=price)).pools[0].price.unit_prices["uncached_input"]
    assert Fraction(found) * 10**power == Fraction(written)


@given(st.decimals(min_value=0, max_value=90_000, places=15, allow_nan=False, allow_infinity=False))
def test_an_hour_becomes_seconds_half_even_at_15_places(hour: Decimal) -> None:
    """The second's price is the hour's / 3600, rounded once, half-even."""
    exact = Fraction(hour) / 3600 * 10**15
    down, rest = divmod(exact, 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1)
    assert Fraction(per_second(hour)) * 10**15 == int(down) + up


def test_all_time_meters_cost_the_same_second() -> None:
    """Work, idling and loading are charged at one price."""
    prices = read(own()).pools[0].price
    with localcontext() as context:
        context.prec = 60
        second = (Decimal("0.71") / 3600).quantize(Decimal("1e-15"), ROUND_HALF_EVEN)
    assert prices.by_time
    assert set(prices.unit_prices.values()) == {second}
    assert set(prices.unit_prices) == {"accelerator_second", "accelerator_idle_second", "setup"}


def test_price_id_follows_what_the_schedule_says_and_not_how_it_is_written() -> None:
    """0.10 and 0.1, or 1M and 1K, are the same schedule; another price is another one."""
    one = read(remote()).pools[0].price.price_id
    spelt = 'price: {input: 0.0001, cached_input: "0.00001", output: 4e-4, per: 1K tokens, currency: USD}'
    other = TOKENS.replace("0.40", "0.41")
    assert read(remote(price=spelt)).pools[0].price.price_id == one
    assert read(remote(price=other)).pools[0].price.price_id != one


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ('price: {input: "0.10", output: "0.40"}', "pools[0].price.per: is missing (expected 1M tokens, 1K tokens"),
        ('price: {input: "0.10", per: 1M tokens}', "pools[0].price.output: is missing"),
        ('price: {input: "0.10", output: 1, per: 1M token}', "did you mean '1M tokens'?"),
        ('price: {input: "-0.10", output: 1, per: 1M tokens}', "pools[0].price.input: is negative: '-0.10'"),
        ('price: {input: "0.10", output: 1, per: token}', "comes to 0.1 for a single token"),
        ('price: {input: "0.1234567891", output: 1, per: 1M tokens}', "needs more than 15 places"),
        ("price: {input: cheap, output: 1, per: 1M tokens}", "is 'cheap' (expected an exact price such as \"0.10\")"),
        ("price: {input: .nan, output: 1, per: 1M tokens}", "is '.nan'"),
        ("price: {input: 1_000, output: 1, per: 1M tokens}", "is '1_000'"),
        ("price: {source: live}", "profile openai-compatible has no price feed (expected prices that are written down"),
        ("price: {inptu: 1}", "pools[0].price.inptu: unknown key"),
        ("price: {}", "names no price"),
        ('price: {accelerator_hour: "1"}', "only an engine in our workers is paid by the hour"),
        (TOKENS[:-1] + ", currency: TAO}", "there is no exchange rate for 'TAO' (expected USD, or a currency with"),
    ],
)
def test_a_price_that_cannot_be_right_is_refused(price: str, message: str) -> None:
    """Missing units, wrong units, negative, imprecise and unreadable prices name their key."""
    assert message in refusal(remote(price=price))


def test_hour_and_tokens_do_not_mix() -> None:
    """A pool is paid by time or by token."""
    mixed = 'price: {accelerator_hour: "1", input: 1, output: 1, per: 1M tokens}'
    assert "pools[0].price.input: stands beside accelerator_hour" in refusal(own(price=mixed))


def test_a_price_per_request_alone_is_enough() -> None:
    """A flat rate has one meter."""
    assert read(remote(price='price: {request: "0.002"}')).pools[0].price.unit_prices == {"request": Decimal("0.002")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (remote("kind: sagemaker"), "pools.yaml:6: pools[0].kind: pools of kind 'sagemaker' are not available in this"),
        (remote("engine: {}"), "engine: does not belong to a pool of kind openai"),
        (remote("name: a b"), "pools[0].name: is 'a b'"),
        (remote("concurency: 3"), "pools.yaml:7: pools[0].concurency: unknown key"),
        (remote("capacity: {concurency: 3}"), "did you mean 'concurrency'?"),
        (remote("capacity: {concurrency: 0}"), "is 0 (expected a whole number from 1 to 1000000)"),
        (remote("models: {}"), "names no model"),
        (remote("models: {m: {answer_as: x}}"), "did you mean 'answers_as'?"),
        (remote("models: {m: {answers_as: [x]}}"), "pools[0].models.m.answers_as: is a list"),
        (own("models: {m: {answers_as: x}}").replace("models: [m]\n    ", ""), "an engine that loads the model itself"),
        (remote("base_url: http://host.example/v1"), "sends prompts in the clear to 'host.example'"),
        (remote("base_url: ftp://host.example"), "(expected https://host/path; http:// only to this machine)"),
        (remote("base_url: https://host.example/v1?a=b"), "holds more than an address"),
        (remote("profile: vlmm"), "did you mean 'vllm'?"),
        (remote("placement: {jurisdction: DE}"), "did you mean 'jurisdiction'?"),
        (remote("placement: {jurisdiction: UK}"), "did you mean 'GB'?"),
        (remote("placement: {operator: clod}"), "did you mean 'cloud'?"),
        (remote("placement: {zdr: maybe}"), "is 'maybe' (expected true or false)"),
        (remote("timeout: soon"), "(expected a duration such as 90s, 15m, 6h, 1h30m or 2d)"),
        ("models: {model-a: {}}\n" + remote("models: [model-b]"), "unknown model 'model-b'"),
        ("models: {model-a: {}}\n" + remote("models: [model-b]"), "did you mean 'model-a'?"),
        (own().replace('{m: {source: "package:some-model"}}', "{m: {}}"), "has no source"),
        (own("api_key_env: A"), "does not belong to a pool of kind vllm"),
        ("pools: []", "(expected a list of at least one pool)"),
        (remote() + remote().removeprefix("pools:\n"), "pools.yaml:7: pools[1].name: the name 'far' is there twice"),
        (
            "fx: {TAO: {source: somewhere}}\n" + remote(),
            "there is no feed of rates 'somewhere' (expected kraken or coingecko or file",
        ),
    ],
)
def test_a_pool_that_cannot_be_right_is_refused(text: str, message: str) -> None:
    """Every fault names line and key, and the nearest name where one is misspelt."""
    assert message in refusal(text)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:80"])
def test_plain_http_is_fine_to_this_machine(host: str) -> None:
    """Loopback addresses need no encryption."""
    assert read(remote(f"base_url: http://{host}/v1/")).pools[0].base_url == f"http://{host}/v1"


def test_a_model_may_have_another_name_there_and_answer_under_a_third() -> None:
    """A text is its name at the pool; a mapping may say that and what answers call it."""
    [pool] = read(remote("models: {a: theirs, b: {answers_as: gpt-4o}, c: {name: d1, answers_as: gpt-4o}, d: }")).pools
    assert pool.models == {"a": "theirs", "b": "b", "c": "d1", "d": "d"}
    assert pool.answers_as == {"b": "gpt-4o", "c": "gpt-4o"}


def test_norway_is_a_country() -> None:
    """The plain scalar NO is text, as YAML 1.2 has it."""
    assert read(remote("placement: {jurisdiction: NO, zdr: null}")).pools[0].placement == {
        "jurisdiction": "NO", "zdr": None,
    }  # fmt: skip


def test_a_currency_with_a_rate_prices_a_pool() -> None:
    """An inline rate carries its moment and source, and can be stale."""
    text = 'fx: {TAO: {rate: "350.10", at: 2026-11-22T06:00:00Z, source: desk, max_age: 1h}}\n'
    pools = read(text + remote(price=TOKENS[:-1] + ", currency: TAO}"))
    rate = pools.fx["TAO"]
    assert (pools.pools[0].price.currency, rate.rate, rate.source) == ("TAO", Decimal("350.10"), "desk")
    assert not rate.stale(rate.at)
    assert rate.max_age is not None
    assert rate.stale(rate.at + rate.max_age * 2)


def test_engine_arguments_pass_through_as_plain_values() -> None:
    """vLLM gets ints, floats, booleans, lists and mappings."""
    lines = "engine: {max_model_len: 8192, gpu_memory_utilization: 0.9, speculative_config: {n: [1, true, null]}}"
    assert read(own(lines)).pools[0].engine == {
        "max_model_len": 8192, "gpu_memory_utilization": 0.9, "speculative_config": {"n": [1, True, None]},
    }  # fmt: skip


def test_keys_are_named_but_never_read_into_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset variable is a configuration error; a set one stays where it is."""
    pools = read(remote("api_key_env: FAR_KEY")).pools
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(ConfigError, match="FAR_KEY is not set"):
        check_keys(pools)
    monkeypatch.setenv("FAR_KEY", "planted-value-of-the-key")
    check_keys(pools)
    assert b"planted" not in pickle.dumps(pools)


def test_a_key_in_place_of_its_variable_is_not_repeated() -> None:
    """The message about a wrong variable name does not quote it."""
    assert "planted" not in refusal(remote("api_key_env: planted-value-of-the-key"))


def test_model_directories_start_at_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A relative directory becomes absolute; packages, hub ids and URLs stay."""
    (tmp_path / "weights").mkdir()
    sources = {"a": "weights", "b": "./other", "c": "package:p", "d": "org/name", "e": "s3://bucket/m"}
    text = "models: {" + ", ".join(f'{name}: {{source: "{source}"}}' for name, source in sources.items()) + "}\n"
    models = read(text + remote("models: [a, b, c, d, e]"), str(tmp_path)).models
    assert [models[name].source for name in sources] == [
        str(tmp_path / "weights"), str(tmp_path / "other"), "package:p", "org/name", "s3://bucket/m",
    ]  # fmt: skip
