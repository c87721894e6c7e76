"""The HTTP engine against a double that is true to the wire: answers, every kind of failure, and what never leaks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.concurrency import Stuck
from bidbeam.connectors.doubles import NO_USAGE, OK, RESET, TRUNCATED, Behaviour, EndpointDouble, Reply, Seen
from bidbeam.connectors.engine import RESULT_SCHEMA, Engine
from bidbeam.connectors.errors import ConfigError, PoolDown
from bidbeam.connectors.http_engine import HttpEngine, list_models
from bidbeam.connectors.http_wire import Outcome, SamplingError, read_answer, read_sampling
from bidbeam.connectors.pools import Capacity, PoolSpec, PriceSchedule
from bidbeam.connectors.profiles import PROFILES, profile
from bidbeam.connectors.provider_text import provider_message
from bidbeam.connectors.secrets import looks_like_secret, mask, read_key

KEY = "sk-Planted0123456789abcdef"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
DEFAULT = profile(None)


def spec(base_url: str, **more: Any) -> PoolSpec:
    more.setdefault("capacity", Capacity(concurrency=4))
    more.setdefault("timeout_s", 10.0)
    price = PriceSchedule(price_id="p", pool="remote", unit_prices={})
    return PoolSpec(name="remote", kind="openai", models={"model": "tiny"}, price=price, base_url=base_url, **more)


def row(tag: int, **more: Any) -> dict[str, Any]:
    """One request; a chat unless it has a ``prompt``."""
    default = None if "prompt" in more else [{"role": "user", "content": f"Tell me about number {tag}, please."}]
    messages = more.get("messages", default)
    return {
        "tag": tag,
        "attempt_id": tag.to_bytes(16, "big"),
        "input_tokens": 10,
        "max_tokens": more.get("max_tokens", 8),
        "sampling": more.get("sampling", '{"max_tokens":8}'),
        "cache_salt": more.get("cache_salt"),
        "messages": None if messages is None else json.dumps(messages),
        "prompt": more.get("prompt"),
    }


def batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    label = pa.dictionary(pa.int32(), pa.string())
    types = {
        "tag": pa.int64(), "attempt_id": pa.binary(16), "input_tokens": pa.int32(), "max_tokens": pa.int32(),
        "sampling": label, "cache_salt": label, "messages": pa.large_string(), "prompt": pa.large_string(),
    }  # fmt: skip
    return pa.RecordBatch.from_pydict({name: [each[name] for each in rows] for name in types}, schema=pa.schema(types))


class Driver:
    """Drives an engine as a shift does: fills its room in order, sleeps until woken, polls."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.woken = threading.Event()
        self.results: list[dict[str, Any]] = []
        engine.listen(self.woken.set)

    def run(self, rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Every row's result by tag. Raises what the engine raises."""
        left = list(rows)
        patience = time.monotonic() + 20
        while left or self.engine.in_flight:
            assert time.monotonic() < patience, "the engine hangs"
            if room := min(self.engine.room, len(left)):
                self.engine.submit(batch(left[:room]))
                left = left[room:]
            self.woken.wait(0.05)
            self.woken.clear()
            self.poll()
        return {each["tag"]: each for each in self.results}

    def poll(self) -> None:
        for result in self.engine.poll():
            assert result.schema == RESULT_SCHEMA
            result.validate(full=True)
            self.results += result.to_pylist()


@contextlib.contextmanager
def driving(
    behaviour: Behaviour = OK, *, double: dict[str, Any] | None = None, **more: Any
) -> Iterator[tuple[Driver, EndpointDouble]]:
    own = ("now", "max_answer_bytes", "drain_s", "first_pause_s", "stuck")
    engine_options = {name: more.pop(name) for name in own if name in more}
    with EndpointDouble(["tiny"], behaviour, **(double or {})) as served:
        engine = HttpEngine(spec(served.base_url, **more), "model", **engine_options)
        try:
            yield Driver(engine), served
        finally:
            engine.close()


def one(behaviour: Behaviour, **more: Any) -> dict[str, Any]:
    """The result of a single request that is answered by ``behaviour``."""
    with driving(behaviour, **more) as (driver, _):
        return driver.run([row(1)])[1]


def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


# -- answers


def test_chat_and_raw_go_to_their_own_routes() -> None:
    """A row of messages is a chat, a row of a prompt is a completion; both come back with text and reported usage."""
    with driving() as (driver, double):
        results = driver.run([row(1), row(2, prompt="raw text of five words"), row(3)])
        assert sorted(seen.path for seen in double.requests) == [
            "/v1/chat/completions", "/v1/chat/completions", "/v1/completions",
        ]  # fmt: skip
    raw = results[2]
    assert (raw["status"], raw["http_status"], raw["error_class"]) == ("ok", 200, None)
    assert (raw["input_tokens"], raw["usage_source"], raw["samples"]) == (5, "reported", None)
    assert raw["output_tokens"] == len(raw["output"].split())
    assert raw["finish_reason"] in ("stop", "length")
    assert raw["provider_request_id"].startswith("cmpl-")
    assert raw["endpoint_host"] == double.host
    assert raw["started_at"] <= raw["finished_at"]


def test_sends_the_request_as_it_was_rendered() -> None:
    """The body holds the vendor's model name, the row's own sampling with numbers as written, and no cache salt."""
    sampling = '{"max_tokens":5,"temperature":0.10,"top_p":1.0,"stop":["\\n"],"seed":12345678901234567890}'
    with driving() as (driver, double):
        driver.run([row(1, sampling=sampling, max_tokens=5, cache_salt="tenant"), row(2)])
        first, second = sorted(double.requests, key=lambda seen: seen.headers["x-request-id"])
    assert first.raw == (
        b'{"model":"tiny","messages":[{"role": "user", "content": "Tell me about number 1, please."}],"max_tokens":5,'
        b'"temperature":0.10,"top_p":1.0,"stop":["\\n"],"seed":12345678901234567890}'
    )
    assert first.headers["x-request-id"] == (1).to_bytes(16, "big").hex()
    assert first.headers["user-agent"].startswith("bidbeam/")
    assert "authorization" not in first.headers
    assert "temperature" not in second.body


def test_salts_the_cache_where_the_endpoint_takes_it() -> None:
    """vLLM's endpoints are told whose prefixes may be shared."""
    with driving(profile="vllm") as (driver, double):
        driver.run([row(1, cache_salt="tenant"), row(2)])
        salts = {seen.headers["x-request-id"][-1]: seen.body.get("cache_salt") for seen in double.requests}
    assert salts == {"1": "tenant", "2": None}


def test_samples() -> None:
    """n > 1 gives a list of samples, the first being the output, and usage of them all."""
    with driving() as (driver, _):
        result = driver.run([row(1, sampling='{"max_tokens":8,"n":3}')])[1]
    assert len(result["samples"]) == 3
    assert result["output"] == result["samples"][0]
    assert result["output_tokens"] == sum(len(text.split()) for text in result["samples"])


def test_fewer_samples_than_asked_is_bad_output_that_was_paid_for() -> None:
    """An endpoint that ignores n fails the request, and what it used stays known."""
    choices = [{"index": 0, "message": {"content": "only one"}, "finish_reason": "stop"}]
    with driving(Reply(merge={"choices": choices})) as (driver, _):
        result = driver.run([row(1, sampling='{"max_tokens":8,"n":2}')])[1]
    assert (result["status"], result["error_class"], result["output"]) == ("failed", "bad_output", None)
    assert result["input_tokens"] == 6


def test_cached_tokens_are_reported_or_null() -> None:
    """Cached tokens come from the details of the prompt's tokens; without them they are unknown."""
    prompt = "a b c d e f g h i j"
    for told, expected in [(True, [0, 8]), (False, [None, None])]:
        with driving(double={"report_cached": told}, capacity=Capacity(concurrency=1)) as (driver, _):
            results = driver.run([row(tag, prompt=prompt) for tag in (1, 2)])
        assert [results[tag]["cached_tokens"] for tag in (1, 2)] == expected


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 2}, (9, None, 2, "reported")),
        ({"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": None}, (9, None, 2, "reported")),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 10}}, (9, None, None, "reported")),
        ({"prompt_tokens": -9, "completion_tokens": 2.5}, (None, None, None, None)),
        ({"prompt_tokens": "9", "completion_tokens": True}, (None, None, None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": 2.0}, (None, None, 2, "reported")),
        (None, (None, None, None, None)),
        ([], (None, None, None, None)),
    ],
)
def test_impossible_usage_counts_as_not_reported(usage: Any, expected: tuple[Any, ...]) -> None:
    """Negative, fractional, absurd or missing counts are NULL, never 0, and the answer still counts."""
    result = answer({"choices": [{"message": {"content": "hi"}}], "usage": usage})
    assert result.status == "ok"
    assert (result.input_tokens, result.cached_tokens, result.output_tokens, result.usage_source) == expected


@pytest.mark.parametrize(
    ("profile", "details", "expected"),
    [
        ("openrouter", {"cached_tokens": 4, "cache_write_tokens": 5}, (4, 5)),
        ("openrouter", {"cached_tokens": 4, "cache_write_tokens": 6}, (4, None)),
        ("openrouter", {"cache_write_tokens": 9}, (None, 9)),
        ("openrouter", {"cached_tokens": 0, "cache_write_tokens": -1}, (0, None)),
        ("openrouter", {"created_cache_tokens": 5}, (None, None)),
        ("vllm", {"cached_tokens": 4, "created_cache_tokens": 5}, (4, 5)),
    ],
)
def test_reads_what_was_written_to_a_cache(profile: str, details: Any, expected: tuple[Any, ...]) -> None:
    """Each profile knows where it stands; more than the input that was no hit is not believed."""
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": details}
    body = {"choices": [{"message": {"content": "hi"}}], "usage": usage}
    result = answer(body, profile=PROFILES[profile])
    assert (result.cached_tokens, result.cache_write_tokens) == expected


def test_the_model_that_an_answer_names_is_kept_and_compared() -> None:
    """A dated name is the same model, another family is told and no more; without a name all is unknown."""
    for said, expected in (("tiny-2026-01-31", False), ("other-7b", True), (None, None)):
        with driving(Reply(merge={"model": said})) as (driver, _):
            result = driver.run([row(1)])[1]
        assert (result["status"], result["model_returned"], result["other_model"]) == ("ok", said, expected)


def test_a_pool_is_held_to_the_name_that_the_pools_file_promises() -> None:
    """Another name, or none, is no answer; what it used stays known."""
    for said, ok in (("vendor/gpt-4o-2024-08-06", True), ("gpt-4o-mini", False), (None, False)):
        with driving(Reply(merge={"model": said}), answers_as={"model": "gpt-4o"}) as (driver, _):
            result = driver.run([row(1)])[1]
        assert (result["status"], result["error_class"]) == (("ok", None) if ok else ("failed", "bad_output"))
        assert (result["other_model"], result["input_tokens"]) == (None if said is None else not ok, 6)
        assert ok or "the pools file says gpt-4o" in result["error_message"]


def test_one_sample_that_is_cut_off_is_told() -> None:
    """Whichever of several samples it is, the answer's finish_reason says so."""
    choices = [{"index": n, "message": {"content": "x"}, "finish_reason": ("stop", "length")[n]} for n in range(2)]
    assert answer({"choices": choices}, n=2).finish_reason == "length"
    assert answer({"choices": choices}, n=1).finish_reason == "stop"


def test_missing_usage_leaves_nulls() -> None:
    """An answer without usage is an answer; its tokens are for the settling to count."""
    result = one(NO_USAGE)
    assert result["status"] == "ok"
    assert [result[name] for name in ("input_tokens", "cached_tokens", "output_tokens", "usage_source")] == [None] * 4


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        ("0.000012345678901234567", Decimal("0.000012345678901235")),
        ('"0.0000000000000000015"', Decimal("0.000000000000000002")),
        ("3", Decimal(3)),
        ("-1", None), ("1e999999", None), ('"NaN"', None), ("true", None), ("[1]", None), ("NaN", None),
    ],
)  # fmt: skip
def test_provider_cost_is_exact(cost: str, expected: Decimal | None) -> None:
    """A provider's own figure is read from its text, at 18 places; what is no amount is unknown."""
    body = f'{{"choices": [{{"message": {{"content": "hi"}}}}], "usage": {{"cost": {cost}}}}}'
    assert answer(body.encode()).provider_cost == expected


# -- failures, each told apart


@pytest.mark.parametrize(
    ("reply", "error_class", "http_status"),
    [
        (Reply.error(400), "caller", 400),
        (Reply.error(413), "caller", 413),
        (Reply.error(422), "caller", 422),
        (Reply.error(400, "no", "content_policy_violation"), "policy", 400),
        (Reply.error(403, "Flagged by moderation"), "policy", 403),
        (Reply.error(401), "auth_funds", 401),
        (Reply.error(402), "auth_funds", 402),
        (Reply.error(403), "auth_funds", 403),
        (Reply.error(404), "auth_funds", 404),
        (Reply(307, b"", {"Location": "http://127.0.0.1:1/"}), "auth_funds", 307),
        (Reply.error(408), "timeout", 408),
        (Reply.error(429), "rate", 429),
        (Reply.error(429, "You exceeded your quota", "insufficient_quota"), "auth_funds", 429),
        (Reply.error(500), "server", 500),
        (Reply(502, b"<html>Bad Gateway</html>"), "server", 502),
        (Reply.error(503), "capacity", 503),
        (Reply.error_inside(429), "rate", 200),
        (Reply.error_inside("503"), "capacity", 200),
        (Reply.error_inside("odd"), "bad_output", 200),
        (Reply.garbage(), "bad_output", 200),
        (Reply.garbage(b"\xff\xfe\x00"), "bad_output", 200),
        (Reply.garbage(b'data: {"choices": []}\n\n', "text/event-stream"), "bad_output", 200),
        (Reply.garbage(b"[]", "application/json"), "bad_output", 200),
        (Reply.garbage(b'{"choices": []}', "application/json"), "bad_output", 200),
        (Reply.garbage(b"[" * 100_000, "application/json"), "bad_output", 200),
        (Reply(merge={"choices": [{"message": {"content": None}, "finish_reason": "tool_calls"}]}), "bad_output", 200),
        (Reply(merge={"choices": [{"message": {"content": None, "refusal": "I will not."}}]}), "policy", 200),
        (Reply(merge={"choices": [{"error": {"code": 502, "message": "upstream"}}]}), "server", 200),
        (TRUNCATED, "bad_output", None),
        (RESET, "server", None),
    ],
)
def test_tells_failures_apart(reply: Reply, error_class: str, http_status: int | None) -> None:
    """Each way to fail has its class, its status and a message, and no output."""
    result = one(reply)
    assert (result["status"], result["error_class"], result["http_status"]) == ("failed", error_class, http_status)
    assert result["error_message"]
    assert len(result["error_message"]) <= 200
    assert result["output"] is None


def test_not_http_is_bad_output() -> None:
    """An endpoint that speaks another protocol is garbage, not a hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example ESMTP\r\n\r\n")

        threading.Thread(target=greet, daemon=True).start()
        engine = HttpEngine(spec(f"http://127.0.0.1:{server.getsockname()[1]}/v1"), "model")
        result = Driver(engine).run([row(1)])[1]
        engine.close()
    assert (result["status"], result["error_class"]) == ("failed", "bad_output")


def test_slow_is_a_timeout() -> None:
    """A request that takes longer than the pool allows fails as timeout; its usage is unknown."""
    result = one(Reply.slow(5), timeout_s=0.2)
    assert (result["status"], result["error_class"], result["input_tokens"]) == ("failed", "timeout", None)


def test_huge_answers_are_cut_off() -> None:
    """An answer beyond the limit is bad output, whether or not it announces its size."""
    result = one(Reply.garbage(b" " * 5000), max_answer_bytes=4096)
    assert result["error_class"] == "bad_output"
    assert "4096" in result["error_message"]


def test_other_requests_do_not_suffer() -> None:
    """One request's failure is its own: the others of the same window are answered."""

    def behave(seen: Seen) -> Reply:
        return (RESET, TRUNCATED, Reply.error(500), Reply.garbage(), OK, OK)[seen.number % 6]

    with driving(behave) as (driver, double):
        results = driver.run([row(tag) for tag in range(60)])
        assert len(double.requests) == 60, "the engine retries nothing"
    classes = [each["error_class"] for each in results.values()]
    assert {each: classes.count(each) for each in set(classes)} == {"server": 20, "bad_output": 20, None: 20}


@pytest.mark.parametrize(
    "sampling",
    [
        '{"stream":true}',
        '{"model":"other"}',
        '{"n":0}',
        '{"n":1.5}',
        "[]",
        '{"a":',
        '{"a":1}x',
        '{"a":1,',
        "{1:2}",
        "7",
    ],
)
def test_bad_sampling_is_refused_unsent(sampling: str) -> None:
    """Sampling that is no object, or that would change what is asked, fails at our door as the caller's."""
    with driving() as (driver, double):
        results = driver.run([row(1, sampling=sampling), row(2, messages=None), row(3)])
        assert len(double.requests) == 1
    assert [results[tag]["error_class"] for tag in (1, 2, 3)] == ["caller", "caller", None]


SAMPLING_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=8), SAMPLING_VALUES, max_size=5), st.sampled_from([None, 2]))
def test_sampling_goes_through_as_it_is(sampling: dict[str, Any], indent: int | None) -> None:
    """Whatever keys a job gives its sampling, they arrive with their values."""
    fields = {name: value for name, value in sampling.items() if name not in ("messages", "cache_salt", "max_tokens")}
    read = read_sampling(json.dumps({**fields, "max_tokens": 3, "n": 2}, indent=indent), "max_tokens")
    assert read.n == 2
    assert json.loads("{" + read.fields + "}") == {**fields, "n": 2}


@given(st.text())
def test_no_sampling_text_crashes(text: str) -> None:
    """Any text is either taken or refused as bad sampling."""
    with contextlib.suppress(SamplingError):
        read_sampling(text, "max_tokens")


# -- the window


def test_concurrency_is_bounded_and_connections_are_reused() -> None:
    """Never more requests at once than the pool's concurrency, and no more connections than that."""
    with driving(Reply.slow(0.01)) as (driver, double):
        driver.run([row(tag) for tag in range(80)])
    assert double.max_concurrent == 4
    assert double.connections <= 4


def test_begins_in_the_order_of_submission() -> None:
    """The endpoint sees requests in the order they were submitted: the order is the cache policy."""
    with driving(capacity=Capacity(concurrency=1)) as (driver, double):
        driver.run([row(tag) for tag in range(30)])
        tags = [int(seen.headers["x-request-id"], 16) for seen in double.requests]
    assert tags == list(range(30))


def test_keeps_the_window_full() -> None:
    """Room is twice the concurrency less what is in flight, so that the endpoint never waits for the caller."""
    with driving(Reply.slow(0.3)) as (driver, _):
        assert driver.engine.room == 8
        driver.engine.submit(batch([row(tag) for tag in range(8)]))
        assert (driver.engine.room, driver.engine.in_flight) == (0, 8)
        assert len(driver.run([])) == 8
        assert (driver.engine.room, driver.engine.in_flight) == (8, 0)


def test_cancel_gives_everything_back() -> None:
    """Cancelled requests come back at once, as cancelled, of unknown usage, and those not yet sent stay unsent."""
    with driving(Reply.slow(5)) as (driver, double):
        driver.engine.submit(batch([row(tag) for tag in range(8)]))
        while len(double.requests) < 4:
            time.sleep(0.005)
        driver.engine.cancel()
        results = driver.run([])
        assert len(double.requests) == 4
        assert {each["status"] for each in results.values()} == {"cancelled"}
        assert {each["input_tokens"] for each in results.values()} == {None}
        assert driver.engine.room == 8


def test_cancel_of_some_leaves_the_others_alone() -> None:
    """Only what is named comes back early: what is under way as cancelled, what waits as not sent."""
    with driving(Reply.slow(0.3)) as (driver, double):
        driver.engine.submit(batch([row(tag) for tag in range(8)]))
        while len(double.requests) < 4:
            time.sleep(0.005)
        driver.engine.cancel([1, 6, 99])
        results = driver.run([])
        assert len(double.requests) == 7
        told = {tag: (each["status"], each["error_message"]) for tag, each in results.items()}
        ok = ("ok", None)
        assert told == dict.fromkeys(range(8), ok) | {
            1: ("cancelled", "given up in flight"),
            6: ("cancelled", "not sent"),
        }


def test_retry_after_holds_back_what_follows() -> None:
    """After a 429 that names a time the next request leaves only then; the failed one says how long."""
    script = [Reply.error(429, headers={"retry-after-ms": "300", "Retry-After": "9"})]
    with driving(script, capacity=Capacity(concurrency=1)) as (driver, _):
        begun = time.monotonic()
        results = driver.run([row(1), row(2)])
        assert time.monotonic() - begun >= 0.3
    assert results[1]["retry_after_s"] == 0.3
    assert results[2]["status"] == "ok"


@pytest.mark.parametrize("status", [429, 503])
def test_a_push_back_halves_what_is_asked_at_once(status: int) -> None:
    """A window that is pushed back is followed, after a pause, by one half as wide, which grows again with answers."""

    def behave(seen: Seen) -> Reply:
        return dataclasses.replace(Reply.error(status), delay_s=0.05) if seen.number < 8 else Reply.slow(0.01)

    with driving(behave, capacity=Capacity(concurrency=8), first_pause_s=0.05) as (driver, double):
        results = driver.run([row(tag) for tag in range(60)])
        at_once = [seen.concurrent for seen in double.requests]
    assert [each["status"] for each in results.values()].count("ok") == 52
    assert (max(at_once[:8]), max(at_once[8:12])) == (8, 4)
    assert 4 < max(at_once[12:]) <= 8


def test_requests_that_are_stuck_do_not_hold_up_the_others() -> None:
    """A narrow window may fill with what is never answered: others are then asked beside it, up to the ceiling."""
    behaviour: dict[int, Reply] = {30: Reply.error(429), **{number: Reply.slow(2.5) for number in range(34, 38)}}

    def behave(seen: Seen) -> Reply:
        return behaviour.get(seen.number, Reply.slow(0.01))

    stuck = Stuck(least_s=0.2)
    with driving(behave, capacity=Capacity(concurrency=8), first_pause_s=0.05, stuck=stuck) as (driver, double):
        results = driver.run([row(tag) for tag in range(80)])
        at_once = [seen.concurrent for seen in double.requests]
    assert [each["status"] for each in results.values()].count("ok") == 79
    last = [each["tag"] for each in driver.results[-4:]]
    held = [int(seen.headers["x-request-id"], 16) for seen in double.requests if 34 <= seen.number < 38]
    assert sorted(last) == sorted(held)
    assert max(at_once) <= 8


def test_what_is_stuck_is_told_by_what_is_usual() -> None:
    """After ten times what most answers took, at least the given seconds; nothing is known before twenty answers."""
    stuck = Stuck(least_s=10.0)
    for _ in range(19):
        stuck.took(0.1)
    assert stuck.after_s is None
    stuck.took(0.1)
    assert stuck.after_s == 10.0
    for _ in range(200):
        stuck.took(3.0)
    assert stuck.after_s == 30.0


def test_errors_that_are_no_push_back_leave_the_window_as_it_is() -> None:
    """An endpoint that fails, garbles or refuses a request has room all the same."""
    script = [Reply.error(500), Reply.error(400), Reply.garbage(), RESET] * 2
    with driving(lambda seen: script[seen.number] if seen.number < 8 else Reply.slow(0.01)) as (driver, double):
        driver.run([row(tag) for tag in range(30)])
    assert max(seen.concurrent for seen in double.requests[8:]) == 4


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Please retry after 6 seconds.", 6.0), ("Please try again in 20s.", 20.0), ("Try again in 1m30.5s", 90.5),
        ("try again in 120ms", 0.12), ("retry after 2 minutes", 120.0), ("retry after 250 milliseconds", 0.25),
        ("try again later", None), ("retry after lunch", None), ("retry after 99999999 s", None), ("6 seconds", None),
        ("", None),
    ],
)  # fmt: skip
def test_reads_the_time_to_wait_from_words(message: str, expected: float | None) -> None:
    """Some providers name it in the message alone; a header, where there is one, counts instead."""
    error = {"error": {"message": message}}
    assert answer(error, status=429).retry_after_s == expected
    assert answer(error, status=429, headers={"retry-after": "9"}).retry_after_s == 9.0
    assert answer({"choices": [{"message": {"content": message}}]}).retry_after_s is None


@pytest.mark.parametrize(("inner", "error_class"), [(500, "server"), (400, "caller"), (503, "capacity"), (7, "server")])
def test_an_error_behind_the_provider_counts_as_what_it_is(inner: int, error_class: str) -> None:
    """Where a provider quotes the status of the container behind it, that one decides."""
    body = {"OriginalStatusCode": inner, "OriginalMessage": "it said so", "Message": "Received an error"}
    outcome = answer(body, status=424, profile=profile("sagemaker"))
    assert (outcome.error_class, outcome.http_status) == (error_class, 424)
    assert "it said so" in (outcome.error_message or "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0), ("0.5", 0.5), ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0), ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
        ("-3", None), ("nan", None), ("inf", None), ("soon", None), ("", None),
    ],
)  # fmt: skip
def test_reads_retry_after(value: str, expected: float | None) -> None:
    """Seconds or an HTTP date; anything else says nothing."""
    assert answer({"error": {}}, status=429, headers={"retry-after": value}).retry_after_s == expected


# -- pools that are gone


def test_an_endpoint_that_is_down_takes_the_pool_down() -> None:
    """A few refused connections fail as server errors, the rest comes back unsent, then the pool is down."""
    engine = HttpEngine(spec(unused_address()), "model")
    driver = Driver(engine)
    with pytest.raises(PoolDown, match="remote"):
        driver.run([row(tag) for tag in range(100)])
    statuses = [each["status"] for each in driver.results]
    assert 5 <= statuses.count("failed") <= 9
    assert {each["error_class"] for each in driver.results if each["status"] == "failed"} == {"server"}
    assert engine.in_flight == 0
    assert engine.room == 0
    assert engine.dead
    with pytest.raises(PoolDown):
        engine.submit(batch([row(1)]))
    engine.close()


def test_a_single_refused_connection_does_not() -> None:
    """Fewer failed connections than that are those requests' own failures."""
    engine = HttpEngine(spec(unused_address()), "model")
    results = Driver(engine).run([row(1), row(2)])
    assert {each["error_class"] for each in results.values()} == {"server"}
    assert not engine.dead
    engine.close()


def test_a_wrong_key_takes_the_pool_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that refuses the key is asked no further; what was submitted comes back first."""
    monkeypatch.setenv("REMOTE_KEY", KEY)
    with driving(double={"api_key": "another"}, api_key_env="REMOTE_KEY") as (driver, double):
        with pytest.raises(PoolDown) as raised:
            driver.run([row(tag) for tag in range(50)])
        assert len(double.requests) <= 8
    assert KEY not in str(raised.value)
    assert {each["status"] for each in driver.results} == {"failed", "cancelled"}
    assert len({each["tag"] for each in driver.results}) == len(driver.results)


def test_what_is_in_flight_may_end_when_the_pool_goes_down() -> None:
    """Answers on their way when the funds end are kept: they are paid for."""

    def behave(seen: Seen) -> Reply:
        return Reply.slow(0.3) if seen.number == 0 else Reply.error(402)

    with driving(behave) as (driver, _), pytest.raises(PoolDown):
        driver.run([row(tag) for tag in range(50)])
    assert [each["status"] for each in driver.results].count("ok") == 1


def test_a_pool_going_down_waits_only_so_long() -> None:
    """What does not end within the grace is cancelled, so that its lots can move on."""

    def behave(seen: Seen) -> Reply:
        return Reply.slow(9) if seen.number == 0 else Reply.error(402)

    with driving(behave, drain_s=0.1) as (driver, _), pytest.raises(PoolDown):
        driver.run([row(tag) for tag in range(50)])
    assert "ok" not in [each["status"] for each in driver.results]


def test_an_endpoint_that_never_answers_takes_the_pool_down() -> None:
    """Two windows in a row without any answer are enough: a silent endpoint costs no hang."""
    with driving(Reply.slow(9), timeout_s=0.1, capacity=Capacity(concurrency=2)) as (driver, _):
        with pytest.raises(PoolDown):
            driver.run([row(tag) for tag in range(100)])
        assert len([each for each in driver.results if each["error_class"] == "timeout"]) <= 6


def test_closing_is_final_and_idempotent() -> None:
    """Closing twice is harmless, even with requests in flight; then it takes no more."""
    with driving(Reply.slow(5)) as (driver, _):
        driver.engine.submit(batch([row(1)]))
        driver.engine.close()
        driver.engine.close()
        with pytest.raises(PoolDown):
            driver.engine.submit(batch([row(2)]))


# -- configuration


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://models.example/v1", "plain http"),
        ("ftp://127.0.0.1/v1", "no http address"),
        ("https://user:pw@models.example/v1", "no user or password"),
        ("https://models.example:port/v1", "no address"),
        ("", "needs an address"),
    ],
)
def test_refuses_wrong_addresses(address: str, problem: str) -> None:
    """Addresses that are none, hold a password or send prompts in the clear are refused at the door."""
    with pytest.raises(ConfigError, match=problem) as raised:
        HttpEngine(spec(address), "model")
    assert "pw" not in str(raised.value).replace("password", "")


def test_names_what_is_misspelt() -> None:
    """A wrong model or profile is answered with the nearest right one."""
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        HttpEngine(spec("http://127.0.0.1/v1"), "modle")
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        HttpEngine(spec("http://127.0.0.1/v1", profile="vlm"), "model")


def test_lists_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's models by name; PoolDown where it does not answer."""
    with EndpointDouble(["tiny", "small"]) as double:
        assert list_models(spec(double.base_url)) == ["tiny", "small"]
        with pytest.raises(PoolDown, match="404"):
            list_models(spec(f"http://{double.host}/v2"))
    with pytest.raises(PoolDown):
        list_models(spec(unused_address()))


# -- what never leaks


def answer(body: Any, *, status: int = 200, headers: dict[str, str] | None = None, **more: Any) -> Outcome:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = {"chat": True, "n": 1, "prompt_text": "", "secrets": (KEY,), "now": lambda: NOON} | more
    return read_answer(more.pop("profile", DEFAULT), status, headers or {}, raw, **more)


def check(outcome: Outcome) -> None:
    """What holds of every outcome, whatever came in."""
    assert outcome.status in ("ok", "failed")
    assert (outcome.status == "ok") == (outcome.error_class is None) == (outcome.output is not None)
    assert (outcome.error_message is None) == (outcome.status == "ok")
    for text in (outcome.error_message, outcome.provider_request_id, outcome.finish_reason, outcome.model_returned):
        assert text is None or (KEY not in text and len(text) <= 200 and text.isprintable())
    if outcome.cached_tokens is not None:
        assert outcome.input_tokens is not None
        assert outcome.cached_tokens <= outcome.input_tokens
    if outcome.cache_write_tokens is not None:
        assert outcome.input_tokens is not None
        assert (outcome.cached_tokens or 0) + outcome.cache_write_tokens <= outcome.input_tokens
    pa.array([outcome.output], pa.large_string())
    pa.array([outcome.error_message], pa.string())
    pa.array([outcome.provider_cost], pa.decimal128(38, 18))
    pa.array([outcome.input_tokens, outcome.output_tokens], pa.int64())


TEXT = st.text() | st.text().map(lambda text: f"{text}{KEY}{text}")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
ANSWER = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "model": JSON,
        "error": JSON | st.fixed_dictionaries({}, optional={"message": TEXT, "code": JSON}),
        "detail": JSON,
        "usage": JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "prompt_tokens": JSON,
                "completion_tokens": JSON,
                "cost": JSON,
                "prompt_tokens_details": st.fixed_dictionaries({"cached_tokens": JSON, "cache_write_tokens": JSON}),
            },
        ),
        "choices": JSON
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "index": JSON,
                    "message": JSON | st.fixed_dictionaries({"content": JSON}),
                    "text": JSON,
                    "finish_reason": JSON,
                    "error": JSON,
                },
            ),
            max_size=3,
        ),
    },
)
STATUS = st.sampled_from([200, 200, 200, 204, 301, 400, 401, 404, 429, 500, 503, 599])


@given(ANSWER | JSON, STATUS, st.booleans(), st.integers(1, 3), st.sampled_from(sorted(PROFILES)))
def test_any_json_is_settled(document: Any, status: int, chat: bool, n: int, name: str) -> None:
    """Whatever JSON a provider of any profile sends ends as an outcome that fits the schema and holds no key."""
    check(answer(document, status=status, chat=chat, n=n, profile=PROFILES[name]))


@given(st.binary(), STATUS, st.dictionaries(st.sampled_from(["retry-after", "content-type", "x-request-id"]), TEXT))
def test_any_bytes_are_settled(body: bytes, status: int, headers: dict[str, str]) -> None:
    """So does whatever bytes it sends, under whatever headers."""
    check(answer(body, status=status, headers=headers))


def test_lone_surrogates_are_replaced() -> None:
    """Text that no UTF-8 can hold is an answer all the same."""
    outcome = answer(b'{"choices": [{"message": {"content": "a\\ud800b \\ud83d\\ude00"}}]}')
    assert outcome.output == "a\ufffdb \U0001f600"


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 10), st.integers(12, len(KEY)))
def test_no_message_holds_the_key_or_a_large_piece_of_it(before: str, after: str, start: int, end: int) -> None:
    """A provider that echoes the key, whole or in part, finds it masked."""
    message = provider_message(f"{before} {KEY} {after} {KEY[start:end]}", "", (KEY,))
    for at in range(len(KEY) - 7):
        assert KEY[at : at + 8] not in message


@given(st.text(min_size=1), st.text(max_size=30), st.booleans())
def test_no_message_holds_the_prompt(prompt: str, around: str, escaped: bool) -> None:
    """A provider that echoes the prompt, as it is or escaped, is not quoted at all."""
    echoed = json.dumps(prompt) if escaped else prompt
    if not any(char.isprintable() and not char.isspace() for char in echoed):
        return  # nothing of it would show
    said = f"{around} {echoed} {around}"[:1000]
    assert provider_message(said, json.dumps([{"role": "user", "content": prompt}]), ()) == ""
    assert provider_message(said, prompt, ()) == ""


def test_quotes_a_providers_reason() -> None:
    """A message that repeats nothing of ours is kept, on one line and cut short."""
    said = "This model's maximum\ncontext length is\t8 tokens. " + "x" * 500
    message = provider_message({"message": said}, '[{"role": "user", "content": "Tell me a story"}]', ())
    assert message.startswith("This model's maximum context length is 8 tokens.")
    assert len(message) == 200


def test_the_key_is_sent_and_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint gets the key; repr, pickle, results and the pool's own values do not hold it."""
    monkeypatch.setenv("REMOTE_KEY", KEY)
    reply = Reply.error(500, f"bad key {KEY}", headers={"X-Request-Id": f"id-{KEY}"})
    with driving([OK, reply], double={"api_key": KEY}, api_key_env="REMOTE_KEY") as (driver, double):
        results = driver.run([row(1), row(2), row(3)])
        assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in double.requests)
        assert KEY not in repr(driver.engine) + repr(results)
        with pytest.raises(TypeError, match="PoolSpec"):
            pickle.dumps(driver.engine)
        assert KEY.encode() not in pickle.dumps(spec(double.base_url, api_key_env="REMOTE_KEY"))


def test_keys_come_from_where_the_pool_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """From a variable or a file, stripped; what is unset, empty or unfit is named without its value."""
    where = "http://127.0.0.1/v1"
    monkeypatch.setenv("REMOTE_KEY", f" {KEY}\n")
    assert read_key(spec(where)) is None
    assert read_key(spec(where, api_key_env="REMOTE_KEY")) == KEY
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(spec(where, api_key_file=str(file))) == KEY
    monkeypatch.setenv("BROKEN_KEY", "two\nlines")
    monkeypatch.setenv("EMPTY_KEY", " ")
    for name in ("BROKEN_KEY", "EMPTY_KEY", "UNSET_KEY"):
        with pytest.raises(ConfigError, match=name) as raised:
            read_key(spec(where, api_key_env=name))
        assert "lines" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(spec(where, api_key_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("text", "key", "secret"),
    [
        (KEY, "", True),
        ("cpk_0123456789abcdef0123", "", True),
        ("hf_abcdefghijklmnopqrstuv", "", True),
        ("AKIAIOSFODNN7EXAMPLE", "", True),
        ("Bearer abcdef0123456789", "", True),
        ("s3://bucket/path?X-Amz-Signature=abc", "", True),
        ("https://user:hunter2@models.example/v1", "", True),
        ("9f86d081884c7d659a2feaa0c55ad015", "api_key", True),
        ("9f86d081884c7d659a2feaa0c55ad015", "pools.0.headers.X-Api-Key", True),
        ("9f86d081884c7d659a2feaa0c55ad015", "revision", False),
        ("CHUTES_PRODUCTION_API_KEY", "api_key_env", False),
        ("/run/secrets/provider/key", "api_key_file", False),
        ("You write short product copy.", "prompt.system", False),
        ("s3://bucket/prompts/*.parquet", "input", False),
        ("task-sk-list", "name", False),
    ],
)
def test_knows_a_secret_when_it_sees_one(text: str, key: str, secret: bool) -> None:
    """Keys of known shapes, URLs with credentials, and random text under a secret's name; not where to find one."""
    assert looks_like_secret(text, key) is secret


def test_what_is_known_hides_no_part_of_what_is_not() -> None:
    """A key that begins like one of ours is hidden whole, though it is not ours."""
    other = "sk-proj-anotherteamskey0123456789"
    assert mask(f"bad key {other}, really", ["sk-proj-ourownkey0000000"]) == "bad key ***, really"


@given(st.text(), st.text(min_size=1))
def test_mask_hides_the_secret(text: str, secret: str) -> None:
    """No secret survives masking, wherever it stands."""
    if secret.strip("*") and secret not in "Bearer ***":
        assert secret not in mask(f"{text}{secret}{text}", [secret]).replace("***", "\0")


def test_clock_is_passed_in() -> None:
    """Both times of an attempt are the caller's clock's."""
    ticks = iter(NOON + timedelta(seconds=second) for second in range(10))
    with driving(now=lambda: next(ticks)) as (driver, _):
        result = driver.run([row(1)])[1]
    assert (result["started_at"], result["finished_at"]) == (NOON, NOON + timedelta(seconds=1))
