"""``bidbeam pools``: each pool probed by itself, in plain words, its cost in the ledger, and no pool hiding another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.front_batch import BatchFront
from bidbeam.connectors.front_render import KEY as RENDER_KEY
from bidbeam.connectors.front_render import RenderFront
from bidbeam.connectors.front_sagemaker import ACCESS_KEY, SECRET_KEY, SagemakerFront
from bidbeam.connectors.fronts import ProviderFront
from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.pools import PoolProbe, PoolsReport, probe_pools
from bidbeam.pipelines.verify import verify_ledger
from tests.small_jobs import DAY, by_the_hour, make_job, prompts, remote, write_job

KEY = "unremarkable-key-of-a-pool"
PRICES = {"vendor/tiny": {"input": Decimal("1.00"), "output": Decimal("2.00"), "cached_input": Decimal("0.10")}}
VERTEX = {"project": "p", "location": "europe-west4"}
KEYED = {"api_key_env": "POOLS_TEST_KEY"}
OWN = {"tiny": {"source": "package:none"}}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOLS_TEST_KEY", KEY)
    monkeypatch.delenv("POOLS_TEST_UNSET", raising=False)


def probed(home: Path, *pools: Mapping[str, Any], measuring: bool = True, **keys: Any) -> PoolsReport:
    return probe_pools(make_job(home, prompts(2), pools, **keys), measuring=measuring)


def one(home: Path, pool: Mapping[str, Any], **keys: Any) -> PoolProbe:
    return probed(home, pool, **keys).pools[0]


def rows(job: Job, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query_ledger(job.ledger, sql).to_pylist()
    return found


def test_a_pool_that_is_well_is_measured_and_its_probe_is_booked(tmp_path: Path) -> None:
    """Reachable, serving, priced, timed; the ledger has the attempt as ``probe`` and its charges to the digit."""
    with EndpointDouble(["tiny"], api_key=KEY) as double:
        pool = remote("far", double.base_url, api_key_env="POOLS_TEST_KEY", placement={"jurisdiction": "DE"})
        job = make_job(tmp_path, prompts(2), [pool], tags={"team": "growth"})
        report = probe_pools(job)
        assert len(double.served) == 1
        served = double.served[0]
    found = report.pools[0]
    assert (found.ok, found.reachable, found.problems, report.exit_code) == (True, True, (), 0)
    model = found.models[0]
    assert (model.served, model.error) == (True, None)
    assert model.latency_s is not None
    assert model.tokens_per_second is not None
    assert model.tokens_per_second > 0
    assert (model.input_tokens, model.output_tokens) == (served.prompt_tokens, served.completion_tokens)
    assert found.price == "0.1 / 0.01 / 0.4 USD per 1M input / cached / output tokens"
    assert found.placement == {"jurisdiction": "DE"}
    assert "zdr" in found.undeclared
    assert "jurisdiction" not in found.undeclared

    attempts = rows(job, "SELECT * FROM attempts")
    assert [(row["kind"], row["status"], row["request_id"], row["run_id"]) for row in attempts] == [
        ("probe", "ok", None, report.run_id)
    ]
    assert (attempts[0]["jurisdiction"], attempts[0]["endpoint_host"]) == ("DE", double.host)
    cost = served.prompt_tokens * Decimal("1e-7") + served.completion_tokens * Decimal("4e-7")
    cost -= served.cached_tokens * Decimal("9e-8")
    charges = rows(job, "SELECT * FROM charges")
    assert sum(row["cost"] for row in charges) == cost == report.cost == model.cost
    assert {row["tags"] for row in charges} == {'{"team": "growth"}'}
    assert {row["price_id"] for row in charges} == {row["price_id"] for row in rows(job, "SELECT * FROM prices")}
    run = rows(job, "SELECT run_id, status, requests, cost FROM runs")
    assert run == [{"run_id": report.run_id, "status": "complete", "requests": 0, "cost": cost}]
    assert rows(job, "SELECT * FROM savings") == []
    verified = verify_ledger(job.ledger)
    assert (verified.ok, dict(verified.skipped)) == (True, {})


def test_free_probes_send_no_prompt_and_write_nothing(tmp_path: Path) -> None:
    """Only the list of models is asked for."""
    with EndpointDouble(["tiny"]) as double:
        report = probed(tmp_path, remote("far", double.base_url), measuring=False)
        assert not double.served
    found = report.pools[0]
    assert (found.ok, found.reachable, found.models[0].served, found.models[0].latency_s) == (True, True, True, None)
    assert found.reach_s is not None
    assert report.run_id is None
    assert not (tmp_path / "ledger").exists()


def test_one_bad_pool_never_hides_the_others(tmp_path: Path) -> None:
    """Down, keyless, refused, priceless, of another model: each says what is wrong, and the good one is probed."""
    live = {"source": "live", "url": "http://127.0.0.1:9/prices"}
    with EndpointDouble(["tiny"]) as good, EndpointDouble(["tiny"], api_key="another") as closed:
        report = probed(
            tmp_path,
            remote("down"),
            remote("keyless", good.base_url, api_key_env="POOLS_TEST_UNSET"),
            remote("refused", closed.base_url, api_key_env="POOLS_TEST_KEY"),
            remote("priceless", good.base_url, profile="chutes", api_key_env="POOLS_TEST_KEY") | {"price": live},
            remote("other", good.base_url, models={"tiny": "tinny"}),
            by_the_hour("own"),
            remote("good", good.base_url),
            models=OWN,
        )
    found = {pool.pool: pool for pool in report.pools}
    assert [name for name, pool in found.items() if pool.ok] == ["own", "good"]
    assert report.exit_code == 3
    problems = {name: " | ".join(pool.problems) for name, pool in found.items()}
    assert "cannot connect" in problems["down"]
    assert found["down"].reachable is False
    assert problems["keyless"].startswith("environment variable POOLS_TEST_UNSET is not set")
    assert "401" in problems["refused"]
    assert found["refused"].reachable is True
    assert problems["priceless"].startswith("no price: http://127.0.0.1:9/prices: cannot connect")
    assert found["priceless"].price is None
    assert found["priceless"].models[0].cost is None
    assert "does not list the model 'tinny'; did you mean 'tiny'?" in problems["other"]
    assert found["other"].models[0].served is False
    assert found["own"].reachable is None
    assert found["good"].models[0].tokens_per_second is not None


@pytest.mark.parametrize("profile", ["chutes", "prime", "openrouter"])
def test_live_prices_are_those_of_now(tmp_path: Path, profile: str) -> None:
    """Fetched for the probe, and what the probe is charged at."""
    with (
        EndpointDouble(["theirs"]) as upstream,
        ProviderFront(profile, upstream.base_url, {"vendor/tiny": "theirs"}, key=KEY, prices=PRICES) as front,
    ):
        options = {"options": {"team_id": "t"}} if profile == "prime" else {}
        pool = remote(
            "far",
            front.base_url,
            profile=profile,
            api_key_env="POOLS_TEST_KEY",
            models={"tiny": "vendor/tiny"},
            **options,
        )
        found = one(tmp_path, pool | {"price": {"source": "live"}})
    assert found.problems == ()
    assert found.price == "1 / 0.1 / 2 USD per 1M input / cached / output tokens"
    assert found.price_source == f"{front.base_url}/models vendor/tiny"
    assert found.models[0].cost


def test_a_probe_that_fails_is_a_problem_and_an_attempt(tmp_path: Path) -> None:
    """What was sent is in the books, whatever came of it."""
    with EndpointDouble(["tiny"], Reply.error(402, "no funds")) as double:
        job = make_job(tmp_path, prompts(2), [remote("far", double.base_url)])
        report = probe_pools(job)
    assert report.exit_code == 3
    assert "model 'tiny': " in report.pools[0].problems[0]
    assert report.pools[0].models[0].error is not None
    attempts = rows(job, "SELECT kind, status, error_class FROM attempts")
    assert attempts == [{"kind": "probe", "status": "failed", "error_class": "auth_funds"}]
    assert rows(job, "SELECT * FROM charges") == []


def test_nothing_is_sent_to_a_pool_that_the_jobs_placement_keeps_out(tmp_path: Path) -> None:
    """It is listed with the reason; that is no fault of the pool's."""
    with EndpointDouble(["tiny"]) as double:
        report = probed(tmp_path, remote("far", double.base_url), placement={"jurisdictions": ["DE"]})
        assert not double.served
    found = report.pools[0]
    assert (found.ok, found.eligible, report.exit_code) == (True, False, 0)
    assert found.why_not
    assert "placement" in found.notes[-1]


def test_an_endpoint_without_a_list_of_models_is_measured_all_the_same(tmp_path: Path) -> None:
    """Whether it serves the model is then what the probe shows."""
    with (
        EndpointDouble(["tiny"]) as upstream,
        ProviderFront("vertex", upstream.base_url, {"tiny": "tiny"}, key=KEY, options=VERTEX) as front,
    ):
        pool = remote("far", front.base_url, profile="vertex", api_key_env="POOLS_TEST_KEY", options=VERTEX)
        found = one(tmp_path, pool)
    assert found.problems == ()
    assert found.reachable is True
    assert "lists no models" in found.notes
    assert found.models[0].served is True


def test_the_command_prints_a_table_or_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For people with every problem in full; for programs with exact decimals as text. 0 where all is well, else 3."""
    with EndpointDouble(["tiny"]) as double:
        path = write_job(tmp_path, prompts(2), [remote("good", double.base_url), remote("down")])
        arguments = ["pools", str(path), "--run-date", DAY.isoformat()]
        assert invoke(arguments) == 3
        text = capsys.readouterr().out
        assert invoke([*arguments, "--json", "--free"]) == 3
        told = json.loads(capsys.readouterr().out)
        assert invoke([*arguments, "--set", "pools.down.base_url=" + double.base_url]) == 0
        capsys.readouterr()
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["pool", "kind", "model", "reachable"]
    assert lines[2].split()[:4] == ["good", "openai", "tiny", "yes"]
    assert lines[3].split()[:4] == ["down", "openai", "tiny", "no"]
    assert "cannot connect" in text
    assert "to mend: down" in text
    assert [pool["pool"] for pool in told["pools"]] == ["good", "down"]
    assert told["pools"][0]["unit_prices"]["output"] == "0.000000400000000"
    assert told["exit_code"] == 3
    assert invoke(["pools", str(tmp_path / "none.yaml")]) == 2


def test_every_kind_of_pool_is_probed_for_what_it_costs_nothing_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes are listed and none is rented, a batch API is reached and no batch sent, boto3's endpoint is asked once."""
    monkeypatch.setenv("RENDER_API_KEY", RENDER_KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    with (
        EndpointDouble(["tiny"]) as upstream,
        RenderFront() as nodes,
        BatchFront(upstream.base_url) as batches,
        SagemakerFront(upstream.base_url) as aws,
    ):
        lease = {
            **by_the_hour("rented"),
            "kind": "lease",
            "profile": "render",
            "base_url": nodes.base_url,
            "context": 512,
            "options": {"gpu_tier": "premium", "image": "vllm"},
        }
        options = {"region": "eu-central-1", "endpoint": aws.endpoint}
        report = probed(
            tmp_path,
            lease,
            {**lease, "name": "shut", **KEYED},
            remote("slow", batches.base_url, kind="batch", options={"window": "1h"}),
            remote("boto3", aws.url, profile="sagemaker-invoke", options=options),
        )
        assert (nodes.nodes, batches.batches, len(aws.calls)) == ({}, [], 1)
    found = {pool.pool: pool for pool in report.pools}
    assert [(name, pool.ok, pool.reachable) for name, pool in found.items()] == [
        ("rented", True, True), ("shut", False, True), ("slow", True, True), ("boto3", True, True),
    ]  # fmt: skip
    assert "(401" in found["shut"].problems[0]
    assert found["rented"].notes == ("not measured: no node is rented for a probe",)
    assert found["slow"].notes == ("lists no models", "not measured: a batch takes hours")
    assert found["boto3"].measured


def test_all_is_fine_only_where_every_pool_has_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A public list of models lets any key in, and a fallback hides a feed that does not: neither is called fine."""
    with (
        EndpointDouble(["theirs"]) as upstream,
        ProviderFront("chutes", upstream.base_url, {"vendor/tiny": "theirs"}, key="another", prices=PRICES) as closed,
        EndpointDouble(["tiny"]) as good,
    ):
        theirs = {"profile": "chutes", "api_key_env": "POOLS_TEST_KEY", "models": {"tiny": "vendor/tiny"}}
        fallback = {"input": "0.10", "output": "0.40", "per": "1M tokens"}
        live = {"source": "live", "url": "http://127.0.0.1:9/prices", "fallback": fallback}
        for pool, flags, verdict in (
            (remote("far", closed.base_url, **theirs), ["--free"], "nothing wrong found; no request was sent to far"),
            (remote("far", closed.base_url, **theirs), [], "to mend: far"),
            (remote("near", good.base_url, profile="openrouter") | {"price": live, **KEYED}, [], "nothing wrong found"),
            (remote("near", good.base_url), [], "all fine"),
        ):
            invoke(["pools", str(write_job(tmp_path, prompts(2), [pool])), *flags])
            told = capsys.readouterr().out
            assert next(line for line in told.splitlines() if line.startswith("pools ")).endswith(f"1, {verdict}")
            assert (verdict != "to mend: far") or told.splitlines()[2].split()[-4:] == ["failed", "fits", "the", "job"]


def test_no_key_is_ever_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in the table, the JSON or the ledger, even where the endpoint echoes it."""
    echo = Reply.error(401, f"the key {KEY} is wrong")
    with EndpointDouble(["tiny"], echo) as double:
        path = write_job(tmp_path, prompts(2), [remote("far", double.base_url, api_key_env="POOLS_TEST_KEY")])
        assert invoke(["pools", str(path)]) == 3
        assert invoke(["pools", str(path), "--json"]) == 3
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    for file in (tmp_path / "ledger").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
