"""Every provider through its profile, against a front that is true to its wire: who is let in, what an error means."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from provider_fronts import AWS_KEYS, KEY, PRICES, PROVIDERS, THEIRS, Standing, standing
from test_http_engine import Driver, row

from bidbeam.connectors.doubles import NO_USAGE, OK, EndpointDouble, Reply
from bidbeam.connectors.errors import ConfigError, PoolDown
from bidbeam.connectors.front_errors import ERRORS, Case
from bidbeam.connectors.http_engine import HttpEngine, list_models

Open = Callable[..., AbstractContextManager[Standing]]

# What each error of each provider is, and the seconds that it asks for.
EXPECTED: dict[Case, tuple[str, float | None]] = {
    "no_funds": ("auth_funds", None),
    "rate": ("rate", None),
    "rate_with_wait": ("rate", 3.0),
    "no_capacity": ("capacity", None),
    "error_inside": ("capacity", None),
    "wrong_model": ("auth_funds", None),
    "refused_content": ("policy", None),
    "server": ("server", None),
}
OTHERWISE: dict[tuple[str, Case], tuple[str, float | None]] = {
    ("openai", "rate_with_wait"): ("rate", 0.25),  # in words
    ("azure", "rate_with_wait"): ("rate", 6.0),  # in words
    ("openrouter", "error_inside"): ("server", None),
    ("chutes", "refused_content"): ("caller", None),  # it does not say why
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with EndpointDouble(["tiny"]) as double:
        yield double.base_url


@pytest.fixture
def opened(upstream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a provider's front before an endpoint double."""

    def begin(profile: str, **more: Any) -> AbstractContextManager[Standing]:
        return standing(profile, upstream, "tiny", tmp_path, monkeypatch, **more)

    return begin


def ask(place: Standing, count: int = 1, **more: Any) -> dict[int, dict[str, Any]]:
    """What became of ``count`` requests; of a pool that went down meanwhile too."""
    engine = HttpEngine(place.spec(**more), "tiny", first_pause_s=0.02)
    driver = Driver(engine)
    try:
        driver.run([row(tag) for tag in range(count)])
    except PoolDown:
        pass
    finally:
        engine.close()
    return {each["tag"]: each for each in driver.results}


@pytest.mark.parametrize("profile", PROVIDERS)
def test_serves_and_books(profile: str, opened: Open) -> None:
    """Answers come through each profile, and the ledger's figures are those of the provider's books, by its ids."""
    with opened(profile) as place:
        results = ask(place, 6)
        front = place.front
    assert [each["status"] for each in results.values()] == ["ok"] * 6
    booked = {each.answer_id: each for each in front.served}
    for each in results.values():
        theirs = booked[each["provider_request_id"]]
        told = (each["input_tokens"], each["cached_tokens"], each["output_tokens"])
        assert told == (theirs.prompt_tokens, theirs.cached_tokens, theirs.completion_tokens)
        assert each["provider_cost"] == (theirs.cost if front.kind.tells_cost else None)
        assert (each["usage_source"], each["endpoint_host"]) == ("reported", front.host)
        # Vertex and the others say nothing of where they processed it.
        assert each["jurisdiction"] == ("SE" if profile == "azure" else None)
        assert (each["model_returned"], each["other_model"]) == (
            THEIRS if front.kind.names_model else each["model_returned"],
            None if profile in ("azure", "sagemaker") else False,
        )
    assert front.refused == 0
    assert {seen.body["model"] for seen in front.requests} == {THEIRS if front.kind.names_model else ""}


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("profile", PROVIDERS)
def test_tells_errors_apart(profile: str, case: Case, opened: Open) -> None:
    """Each provider's way to say what went wrong comes to the same few classes, with the time it asks for."""
    with opened(profile, behaviour=ERRORS[profile][case]) as place:
        result = ask(place)[0]
    assert result["status"] == "failed"
    assert (result["error_class"], result["retry_after_s"]) == OTHERWISE.get((profile, case), EXPECTED[case])
    assert result["http_status"] == ERRORS[profile][case].status
    assert result["error_message"]


@pytest.mark.parametrize("profile", PROVIDERS)
def test_waits_as_long_as_any_provider_asks(profile: str, opened: Open) -> None:
    """Seconds, an HTTP date and milliseconds are all understood in a header."""
    for headers, seconds in [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5),
        ({"Retry-After": "Sun, 01 Mar 2020 12:00:00 GMT"}, 0.0),
    ]:
        limited = ERRORS[profile]["rate"]
        with opened(profile, behaviour=Reply(limited.status, limited.body, {**limited.headers, **headers})) as place:
            result = ask(place)[0]
        assert (result["error_class"], result["retry_after_s"]) == ("rate", seconds)


@pytest.mark.parametrize("profile", PROVIDERS)
def test_a_wrong_key_is_the_pools_fault(profile: str, opened: Open) -> None:
    """A key, signature or token that is another's takes the pool down after one window, and nothing repeats it."""
    with opened(profile, wrong=True) as place:
        results = ask(place, 30)
        front = place.front
    assert {each["status"] for each in results.values()} == {"failed", "cancelled"}
    assert {each["error_class"] for each in results.values() if each["status"] == "failed"} == {"auth_funds"}
    assert 1 <= front.refused <= 8
    shown = repr(results)
    assert not any(secret[:12] in shown for secret in (KEY[::-1], AWS_KEYS[1][::-1], "ya29.", "sagemaker-api-key-"))


def test_a_key_file_that_is_not_the_accounts_is_refused_before_anything_is_sent(opened: Open) -> None:
    """A claim with another's signature gets no token; the pool is down without a request."""
    with opened("vertex", wrong="claim") as place:
        result = ask(place)[0]
        assert (result["error_class"], place.front.requests) == ("auth_funds", [])
    assert "key file" in result["error_message"]


@pytest.mark.parametrize("profile", PROVIDERS)
def test_missing_usage_and_missing_cached_tokens_differ(profile: str, opened: Open) -> None:
    """An answer without usage leaves every count unknown; one without cached tokens leaves only those unknown."""
    with opened(profile, behaviour=NO_USAGE) as place:
        none = ask(place)[0]
    with opened(profile, report_cached=False) as place:
        some = ask(place)[0]
    assert (none["status"], some["status"]) == ("ok", "ok")
    counts = ("input_tokens", "cached_tokens", "output_tokens", "usage_source")
    assert [none[name] for name in counts] == [None] * 4
    assert [some[name] is None for name in counts] == [False, True, False, False]


@pytest.mark.parametrize("profile", PROVIDERS)
def test_too_fast_means_fewer_at_once(profile: str, opened: Open) -> None:
    """After one push-back the pool is asked again, less at once, and everything else is served."""
    with opened(profile, behaviour=[ERRORS[profile]["rate"]]) as place:
        results = ask(place, 12)
    assert [each["status"] for each in results.values()].count("ok") == 11


@pytest.mark.parametrize("profile", ["vertex", "sagemaker"])
def test_raw_prompts_go_elsewhere(profile: str, opened: Open) -> None:
    """An endpoint that takes chats only is sent no raw prompt: the pool is down for them, and they cost no try."""
    with opened(profile) as place:
        driver = Driver(HttpEngine(place.spec(), "tiny"))
        with pytest.raises(PoolDown, match="takes chats only"):
            driver.run([row(tag, prompt="raw") for tag in range(9)])
        assert {each["error_message"] for each in driver.results} == {"not sent"}
        assert place.front.requests == []
        driver.engine.close()


def test_prime_is_told_which_team_pays(opened: Open) -> None:
    """The team's header goes along where the pool names a team, and only there."""
    with opened("prime") as place:
        ask(place)
        ask(place, options={})
        assert [seen.headers.get("x-prime-team-id") for seen in place.front.requests] == ["team-1", None]


def test_a_router_is_told_what_its_providers_may_do(opened: Open) -> None:
    """The pool's privacy stands in every body, and a row that would set it otherwise is refused unsent."""
    with opened("openrouter") as place:
        ask(place, options={"privacy": "zdr"})
        (seen,) = place.front.requests
        assert seen.body["provider"] == {"data_collection": "deny", "zdr": True}
        driver = Driver(HttpEngine(place.spec(options={"privacy": "zdr"}), "tiny"))
        result = driver.run([row(1, sampling='{"max_tokens":8,"provider":{"zdr":false}}')])[1]
        driver.engine.close()
        assert (result["error_class"], len(place.front.requests)) == ("caller", 1)


def test_names_the_attempt_where_the_provider_has_a_header_for_it(opened: Open) -> None:
    """Our attempt id goes into the provider's own header, or nowhere."""
    told = {}
    for profile in PROVIDERS:
        with opened(profile) as place:
            ask(place)
            headers = place.front.requests[0].headers
        told[profile] = [name for name, value in headers.items() if value == "0" * 32]
    assert told == {
        "openai": ["x-client-request-id"], "openrouter": [], "chutes": ["x-request-id"], "prime": ["x-request-id"],
        "pai3": ["x-request-id"], "azure": ["x-ms-client-request-id"], "vertex": [], "sagemaker": [],
    }  # fmt: skip


def test_limits_answers_in_the_field_the_model_wants(opened: Open) -> None:
    """OpenAI's own models have another field for it; where both occur, an option says which."""
    with opened("openai") as place:
        ask(place)
        assert place.front.requests[0].body["max_completion_tokens"] == 8
    with opened("azure") as place:
        ask(place)
        ask(place, options={"max_tokens_field": "max_completion_tokens"})
        first, second = (seen.body for seen in place.front.requests)
    assert ("max_tokens" in first, "max_tokens" in second, second["max_completion_tokens"]) == (True, False, 8)


def feed(place: Standing, **headers: str) -> Any:
    connection = http.client.HTTPConnection(place.front.host, timeout=5)
    try:
        connection.request("GET", f"{place.front.base_url.partition(place.front.host)[2]}/models", headers=headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_price_feeds_speak_each_in_its_own_unit(opened: Open) -> None:
    """The same price is a number per million at one, text per token at another, and needs no key at either."""
    entries = {}
    for profile in ("chutes", "prime", "openrouter"):
        with opened(profile) as place:
            status, document = feed(place)
            assert (status, [each["id"] for each in document["data"]]) == (200, [THEIRS])
            entries[profile] = document["data"][0]
    assert entries["chutes"]["pricing"] == {"prompt": 0.1, "completion": 0.4, "input_cache_read": 0.01}
    assert entries["chutes"]["price"]["input"] == {"usd": 0.1, "tao": float(PRICES["input"] / 350)}
    assert entries["prime"]["pricing"]["cache_read_usd_per_mtok"] == 0.01
    assert Decimal(entries["openrouter"]["pricing"]["prompt"]) == PRICES["input"] / 1_000_000


def test_lists_models_to_those_it_knows(opened: Open) -> None:
    """Where the list is not public the key is needed for it; some have no list at all."""
    with opened("azure") as place:
        assert feed(place)[0] == 401
        assert list_models(place.spec()) == [THEIRS]
    with opened("vertex") as place, pytest.raises(PoolDown, match="404"):
        list_models(place.spec())


def test_without_a_key_nothing_is_asked(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that needs a key is a configuration error without one; its usual variable will do."""
    with opened("chutes") as place:
        monkeypatch.delenv("CHUTES_API_KEY", raising=False)
        with pytest.raises(ConfigError, match="CHUTES_API_KEY"):
            HttpEngine(place.spec(api_key_env=None), "tiny")
        monkeypatch.setenv("CHUTES_API_KEY", KEY)
        assert ask(place, api_key_env=None)[0]["status"] == "ok"


def test_unknown_paths_and_models_are_answered_as_the_provider_does(opened: Open) -> None:
    """A front knows no other path or model than the provider would."""
    with opened("chutes") as place:
        assert ask(place, base_url=f"http://{place.front.host}/other")[0]["http_status"] == 404
    with opened("chutes", behaviour=OK) as place:
        place.front.models.clear()
        assert ask(place)[0]["error_class"] == "auth_funds"
