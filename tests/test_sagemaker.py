"""SageMaker through a real boto3 client, and the prefix groups that its affinity header is made from."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_jobs import PRICE, check_conserved, make_job, prompts, remote, written

from bidbeam.connectors import sagemaker_engine
from bidbeam.connectors.doubles import NO_USAGE, RESET, EndpointDouble, Reply
from bidbeam.connectors.errors import ConfigError, PoolDown
from bidbeam.connectors.front_sagemaker import ACCESS_KEY, SECRET_KEY, SagemakerFront, model_error, sagemaker_error
from bidbeam.connectors.pools import Capacity, PoolSpec, PriceSchedule
from bidbeam.connectors.sagemaker_engine import PREFIX_HEADER, SagemakerEngine
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job
from bidbeam.transforms.prefix import common_prefix_bytes
from bidbeam.transforms.prefix_group import SHORTEST, prefix_groups, prefix_ids

# -- prefix groups --

SYSTEM = b"You are a careful clerk. " * 12
MANUALS = [b"Manual %d: " % n + bytes([97 + n]) * 1500 for n in range(4)]

keys_in_order = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.binary(max_size=6)).map(
        lambda row: (b"" if row[0] == 3 else SYSTEM) + (MANUALS[row[1]] if row[0] else b"") + row[2]
    ),
    max_size=25,
).map(sorted)


def ids(keys: list[bytes], seed: int = 7, parts: tuple[str | None, ...] = ("m", None)) -> list[str | None]:
    found: list[str | None] = prefix_ids(pa.array(keys, pa.large_binary()), seed, parts).cast(pa.string()).to_pylist()
    return found


def test_requests_of_one_manual_share_an_id_and_those_of_another_do_not() -> None:
    keys = sorted(SYSTEM + MANUALS[at] + b" question %d" % n for at in range(3) for n in range(5))
    found = ids(keys)
    assert None not in found
    assert [found.count(name) for name in dict.fromkeys(found)] == [5, 5, 5]


def test_a_manual_keeps_its_id_in_another_lot_and_with_other_questions() -> None:
    first = ids(sorted(SYSTEM + MANUALS[1] + b" question %d" % n for n in range(6)))
    second = ids(sorted(SYSTEM + MANUALS[at] + b" detail %d" % n for at in (1, 2) for n in range(9)))
    assert len(set(first)) == 1
    assert second[:9] == [first[0]] * 9


def test_a_lone_request_is_known_by_what_it_shares_with_its_neighbours() -> None:
    lone = SYSTEM + MANUALS[1] + b" only this"
    keys = [SYSTEM + MANUALS[0] + b" a", SYSTEM + MANUALS[0] + b" b", lone, SYSTEM + MANUALS[2] + b" a"]
    found = ids([*keys, SYSTEM + MANUALS[2] + b" b"])
    assert found[0] == found[1] != found[2] is not None
    assert found[3] == found[4] not in (found[0], found[2])


def test_a_beginning_too_short_to_matter_gets_no_id() -> None:
    assert ids([b"Describe item %d" % n for n in range(5)]) == [None] * 5
    assert ids([]) == []
    assert ids([SYSTEM * 9]) == [None]


def test_ids_are_keyed_by_the_runs_seed_the_model_and_the_tenant() -> None:
    keys = [SYSTEM + MANUALS[0] + b" a", SYSTEM + MANUALS[0] + b" b"]
    made = [ids(keys, seed, parts)[0] for seed in (1, 2) for parts in (("m", None), ("k", None), ("m", "t"), ("m", ""))]
    assert len(set(made)) == len(made)
    assert all(name is not None and len(name) == 16 for name in made)


@given(keys_in_order)
def test_whoever_has_one_id_shares_at_least_the_shortest_prefix(keys: list[bytes]) -> None:
    found = ids(keys)
    for name in {name for name in found if name is not None}:
        mine = [key for key, other in zip(keys, found, strict=True) if other == name]
        assert len({key[:SHORTEST] for key in mine}) == 1
        assert all(len(key) >= SHORTEST for key in mine)


@given(keys_in_order)
def test_groups_are_runs_of_neighbours_that_share_what_they_say(keys: list[bytes]) -> None:
    shared = common_prefix_bytes(pa.array(keys, pa.large_binary()))
    group, depth = prefix_groups(shared)
    assert np.all(np.diff(group) >= 0)
    assert np.all(np.diff(group) <= 1)
    for at, length in enumerate(depth.tolist()):
        mine = [keys[place][:length] for place in np.flatnonzero(group == at).tolist()]
        assert len(set(mine)) == 1
        assert length == 0 or (length >= SHORTEST and length & (length - 1) == 0)


# -- the engine, through a real boto3 client --


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ROLE_ARN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def container() -> Iterator[EndpointDouble]:
    with EndpointDouble(["tiny"]) as double:
        yield double


def spec(front: SagemakerFront, **more: Any) -> PoolSpec:
    given: dict[str, Any] = {
        "name": "aws",
        "kind": "openai",
        "models": {"tiny": "tiny"},
        "price": PriceSchedule("p", "aws", {}),
        "capacity": Capacity(concurrency=4),
        "profile": "sagemaker-invoke",
        "base_url": front.url,
        "options": {"region": "eu-central-1", "endpoint": front.endpoint},
        "timeout_s": 5.0,
    }
    return PoolSpec(**(given | more))


def requests(count: int, prefix_id: str | None = None) -> pa.RecordBatch:
    label = pa.dictionary(pa.int32(), pa.string())
    messages = [json.dumps([{"role": "user", "content": f"Tell me of number {n}, please."}]) for n in range(count)]
    columns = {
        "tag": pa.array(range(count), pa.int64()),
        "attempt_id": pa.array([n.to_bytes(16, "big") for n in range(count)], pa.binary(16)),
        "input_tokens": pa.array([6] * count, pa.int32()),
        "max_tokens": pa.array([8] * count, pa.int32()),
        "sampling": pa.array(['{"temperature":0.10}'] * count).cast(label),
        "cache_salt": pa.nulls(count, label),
        "messages": pa.array(messages, pa.large_string()),
        "prompt": pa.nulls(count, pa.large_string()),
        "prefix_id": pa.array([prefix_id] * count, pa.string()).cast(label),
    }
    return pa.RecordBatch.from_pydict(columns)


def ask(pool: PoolSpec, count: int = 1, prefix_id: str | None = None) -> list[dict[str, Any]]:
    """Results by tag, until all are there or the pool says that it is down (``down``)."""
    engine = SagemakerEngine(pool, "tiny", drain_s=1.0, first_pause_s=0.01)
    woken = threading.Event()
    engine.listen(woken.set)
    results: list[dict[str, Any]] = []
    patience = time.monotonic() + 10
    try:
        engine.submit(requests(count, prefix_id))
        while len(results) < count:
            assert time.monotonic() < patience
            for batch in engine.poll():
                results += batch.to_pylist()
            woken.wait(0.05)
            woken.clear()
        try:
            engine.poll()
        except PoolDown as error:
            results[-1]["down"] = str(error)
    finally:
        engine.close()
    return sorted(results, key=lambda each: each["tag"])


def test_a_signed_call_brings_the_answer_its_usage_and_the_attempts_name(container: EndpointDouble) -> None:
    with SagemakerFront(container.base_url) as front:
        found = ask(spec(front, options={**spec(front).options, "inference_component": "adapter-2"}), 3, "0123abcd")
    assert [each["status"] for each in found] == ["ok"] * 3
    assert all(each["usage_source"] == "reported" and each["http_status"] == 200 for each in found)
    assert sorted((s.prompt_tokens, s.completion_tokens) for s in container.served) == sorted(
        (each["input_tokens"], each["output_tokens"]) for each in found
    )
    assert {s.request for s in container.served} == {n.to_bytes(16, "big").hex() for n in range(3)}
    assert found[0]["provider_request_id"].startswith("chatcmpl-")
    assert found[0]["endpoint_host"] == front.host
    for call in front.calls:
        assert call.path == "/endpoints/chat-endpoint/invocations"
        assert call.headers[PREFIX_HEADER.lower()] == "0123abcd"
        assert call.headers["x-amzn-sagemaker-inference-component"] == "adapter-2"
        assert b'"temperature":0.10' in call.raw, "numbers stay as they were written"


def test_a_request_without_a_prefix_group_has_no_header(container: EndpointDouble) -> None:
    with SagemakerFront(container.base_url) as front:
        assert ask(spec(front))[0]["status"] == "ok"
    assert PREFIX_HEADER.lower() not in front.calls[0].headers


def test_a_client_that_does_not_know_the_parameter_sends_the_header_all_the_same(
    container: EndpointDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = next((Path(botocore.__file__).parent / "data" / "sagemaker-runtime").glob("*/service-2.json*"))
    model = json.loads(gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes())
    del model["shapes"]["InvokeEndpointInput"]["members"]["PrefixAwareId"]
    older = tmp_path / "sagemaker-runtime" / source.parent.name
    older.mkdir(parents=True)
    (older / "service-2.json").write_text(json.dumps(model))
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    with SagemakerFront(container.base_url) as front:
        assert [each["status"] for each in ask(spec(front), 2, "0123abcd")] == ["ok", "ok"]
    assert [call.headers[PREFIX_HEADER.lower()] for call in front.calls] == ["0123abcd"] * 2


TOO_MANY = json.dumps({"error": {"message": "too many requests", "type": "rate_limit_error", "code": 429}})
TOO_LONG = json.dumps({"error": {"message": "the context is too long", "type": "BadRequestError", "code": 400}})
WAIT = {"Retry-After": "3"}


@pytest.mark.parametrize(
    ("fault", "error_class", "status", "down"),
    [
        (model_error(429, TOO_MANY), "rate", 424, False),
        (model_error(400, TOO_LONG), "caller", 424, False),
        (model_error(500, "Internal Server Error"), "server", 424, False),
        (model_error(503, ""), "capacity", 424, False),
        (model_error(404, json.dumps({"error": {"message": "no such model", "code": 404}})), "auth_funds", 424, True),
        (sagemaker_error(424, "ModelError", "Your invocation timed out."), "server", 424, False),
        (sagemaker_error(429, "ModelNotReadyException", "Model is loading."), "capacity", 429, False),
        (sagemaker_error(429, "ThrottlingException", "Rate exceeded", headers=WAIT), "rate", 429, False),
        (sagemaker_error(400, "ThrottlingException", "Rate exceeded"), "rate", 400, False),
        (sagemaker_error(503, "ServiceUnavailable", "The service is unavailable."), "capacity", 503, False),
        (sagemaker_error(500, "InternalFailure", ""), "server", 500, False),
        (sagemaker_error(530, "InternalDependencyException", "A dependency failed."), "server", 530, False),
        (sagemaker_error(400, "ValidationError", "The body is too large."), "caller", 400, False),
        (sagemaker_error(403, "AccessDeniedException", "User is not authorized."), "auth_funds", 403, True),
        (sagemaker_error(403, "ExpiredTokenException", "The token has expired."), "auth_funds", 403, True),
        (Reply.error_inside(429, "slow down"), "rate", 200, False),
        (Reply.garbage(), "bad_output", 200, False),
    ],
    ids=lambda value: None if isinstance(value, Reply) else str(value),
)
def test_errors_are_told_apart(
    container: EndpointDouble, fault: Reply, error_class: str, status: int, down: bool
) -> None:
    with SagemakerFront(container.base_url, [fault]) as front:
        found = ask(spec(front))[0]
    assert (found["status"], found["error_class"], found["http_status"]) == ("failed", error_class, status)
    assert ("down" in found) is down
    assert len(front.calls) == 1, "boto3 must not try again by itself"
    if "Retry-After" in fault.headers:
        assert found["retry_after_s"] == 3.0
    if "x-amzn-RequestId" in fault.headers:
        assert found["provider_request_id"] == fault.headers["x-amzn-RequestId"]


@pytest.mark.parametrize(
    ("fault", "error_class"),
    [(RESET, "server"), (Reply(body=b"{}", cut="truncate"), "bad_output"), (Reply.slow(2.0), "timeout")],
    ids=["reset", "truncated", "slow"],
)
def test_what_the_wire_does_is_told_apart(container: EndpointDouble, fault: Reply, error_class: str) -> None:
    with SagemakerFront(container.base_url, [fault]) as front:
        found = ask(spec(front, timeout_s=0.3))[0]
    assert (found["status"], found["error_class"]) == ("failed", error_class)
    assert len(front.calls) == 1


def test_of_an_error_no_more_is_read_than_it_takes_to_tell(
    container: EndpointDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS's client reads an error whole before anybody is asked: it gets the beginning of one that does not end."""
    monkeypatch.setattr(sagemaker_engine, "MOST_ERROR_BYTES", 5000)
    endless = sagemaker_error(503, "ServiceUnavailable", "no room " * 100_000)
    with SagemakerFront(container.base_url, [endless, endless]) as front:
        client = sagemaker_engine.runtime_client(spec(front))
        with pytest.raises(client.exceptions.ClientError) as caught:
            client.invoke_endpoint(EndpointName=front.endpoint, Body=b"{}")
        assert len(repr(caught.value.response)) < 7000
        found = ask(spec(front))[0]
        assert (found["error_class"], found["http_status"]) == ("capacity", 503)
        assert ask(spec(front))[0]["status"] == "ok"


def test_usage_that_the_container_leaves_out_stays_unknown() -> None:
    with EndpointDouble(["tiny"], NO_USAGE) as double, SagemakerFront(double.base_url) as front:
        found = ask(spec(front))[0]
    assert (found["status"], found["input_tokens"], found["usage_source"]) == ("ok", None, None)
    with EndpointDouble(["tiny"], report_cached=False) as double, SagemakerFront(double.base_url) as front:
        found = ask(spec(front))[0]
    assert found["input_tokens"] is not None
    assert found["cached_tokens"] is None


def test_an_endpoint_that_is_not_there_and_wrong_keys_take_the_pool_down_and_leak_nothing(
    container: EndpointDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SagemakerFront(container.base_url) as front:
        missing = ask(spec(front, options={"region": "eu-central-1", "endpoint": "gone"}))[0]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-entirely")
        wrong = ask(spec(front), 6)
    assert missing["error_class"] == "auth_funds"
    assert "not found" in missing["error_message"]
    assert {each["error_class"] for each in wrong} <= {"auth_funds", None}
    assert {each["status"] for each in wrong} <= {"failed", "cancelled"}
    assert "another-secret-entirely" not in repr(wrong)
    assert not container.served


def test_temporary_credentials_show_their_token(container: EndpointDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session-token")
    with SagemakerFront(container.base_url, token="a-session-token") as front:
        assert ask(spec(front))[0]["status"] == "ok"


def test_an_address_that_nobody_answers_at_takes_the_pool_down_after_a_few(container: EndpointDouble) -> None:
    front = SagemakerFront(container.base_url)
    front.close()
    found = ask(spec(front), 6)
    assert {each["error_class"] for each in found} <= {"server", None}
    assert any("is down: cannot connect" in each.get("down", "") for each in found)


def test_no_credentials_a_wrong_profile_or_a_clear_address_are_configuration_errors(
    container: EndpointDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = SagemakerFront(container.base_url)
    front.close()
    with pytest.raises(ConfigError, match="plain http"):
        SagemakerEngine(spec(front, base_url="http://runtime.example.com"), "tiny")
    with pytest.raises(ConfigError, match=r"options\.endpoint"):
        SagemakerEngine(spec(front, options={"region": "eu-central-1"}), "tiny")
    with pytest.raises(ConfigError, match="ProfileNotFound"):
        SagemakerEngine(spec(front, options={**spec(front).options, "aws_profile": "nobody"}), "tiny")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="no AWS credentials"):
        SagemakerEngine(spec(front), "tiny")


def test_without_an_address_of_its_own_a_pool_goes_to_its_region(container: EndpointDouble) -> None:
    front = SagemakerFront(container.base_url)
    front.close()
    engine = SagemakerEngine(spec(front, base_url=None), "tiny")
    try:
        assert "runtime.sagemaker.eu-central-1.amazonaws.com" in repr(engine)
    finally:
        engine.close()


def test_what_is_given_up_in_flight_comes_back_cancelled(container: EndpointDouble) -> None:
    with SagemakerFront(container.base_url, [Reply.slow(5.0)] * 2) as front:
        engine = SagemakerEngine(spec(front), "tiny")
        woken = threading.Event()
        engine.listen(woken.set)
        engine.submit(requests(2))
        while len(front.calls) < 2:
            time.sleep(0.01)
        engine.cancel()
        results: list[dict[str, Any]] = []
        while len(results) < 2:
            woken.wait(0.05)
            results += [row for batch in engine.poll() for row in batch.to_pylist()]
        engine.close()
    assert {each["status"] for each in results} == {"cancelled"}


# -- a whole run --


def sagemaker_pool(front: SagemakerFront, **keys: Any) -> dict[str, Any]:
    options = {"region": "eu-central-1", "endpoint": front.endpoint}
    return remote("aws", front.url, **{"profile": "sagemaker-invoke", "options": options, "price": PRICE, **keys})


def test_a_run_buys_from_an_endpoint_and_names_each_prefix_group(container: EndpointDouble, tmp_path: Path) -> None:
    shared = "Read the whole of this manual before you answer anything at all. " * 8
    rows = pa.concat_tables([prompts(6, shared=f"Manual {n}. {shared}", start=10 * n) for n in range(3)])
    faults = [model_error(503, ""), model_error(429, TOO_MANY)]
    with SagemakerFront(container.base_url, faults) as front:
        job = make_job(tmp_path, rows, [sagemaker_pool(front)])
        summary = run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
    found = written(job)
    check_conserved(found, 18)
    assert (summary.exit_code, summary.served) == (0, 18)
    groups: dict[str, set[str]] = {}
    for call in front.calls:
        groups.setdefault(call.headers[PREFIX_HEADER.lower()], set()).add(call.raw.decode().split("Manual ")[1][:1])
    assert sorted(groups.values(), key=str) == [{"0"}, {"1"}, {"2"}]
    failed = [row for row in found.attempts if row["status"] == "failed"]
    assert sorted(row["error_class"] for row in failed) == ["capacity", "rate"]
    answered = [row for row in found.attempts if row["status"] == "ok"]
    assert {served.request for served in container.served} == {row["attempt_id"].hex for row in answered}
    assert {row["endpoint_host"] for row in found.attempts} == {front.host}
    assert SECRET_KEY not in json.dumps(found.manifest)
