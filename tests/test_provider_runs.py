"""Whole runs bought from every provider through its profile: a real vLLM server behind each one's wire-true front."""

from __future__ import annotations

import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from provider_fronts import PRICES, standing
from small_jobs import DAY, LATIN, Written, check_conserved, make_job, prompts, remote, total, write_job, written
from tiny_model import tiny_model
from vllm_server import Starting, VllmServer

from bidbeam.connectors.front_batch import BatchFront
from bidbeam.connectors.front_render import KEY as RENDER_KEY
from bidbeam.connectors.front_render import RenderFront
from bidbeam.connectors.front_sagemaker import ACCESS_KEY, SECRET_KEY, SagemakerFront
from bidbeam.connectors.sagemaker_engine import PREFIX_HEADER
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run, run_job

pytestmark = pytest.mark.engine

CORES = sorted(os.sched_getaffinity(0))
ROWS = 12
MILLION = Decimal(1_000_000)
SYSTEMS = ("openrouter", "chutes", "prime", "pai3", "azure", "vertex", "sagemaker")


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    starting = Starting(tiny_model(), ["tiny"], {"block_size": 32, "max_num_seqs": 8}, cores=CORES)
    try:
        yield starting.ready()
    finally:
        starting.stop()


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, str]]:
    """By system, what each run answered; greedy answers of one engine are one."""
    return {}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_buys_from(
    system: str, server: VllmServer, answers: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is answered through the profile; ledger, provider's books and the server's own counters agree."""
    with standing(system, server.base_url, "tiny", tmp_path, monkeypatch) as place:
        price = {name: str(value) for name, value in PRICES.items()}
        pool = remote(system, **{**place.pool, "price": price, "placement": {"operator": "cloud"}})
        path = write_job(
            tmp_path,
            prompts(ROWS),
            [pool],
            models={"tiny": {"source": tiny_model()}},
            placement={"operators": ["cloud"]},
        )
        job = Job.from_yaml(path, run_date=DAY)
        before = server.counters()
        summary = run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
        after = server.counters()
        front = place.front
    assert (summary.exit_code, front.refused) == (0, 0)
    found = written(job)
    check_conserved(found, ROWS)
    attempts = found.attempts
    assert {(a["pool"], a["status"], a["kind"], a["usage_source"]) for a in attempts} == {
        (system, "ok", "primary", "reported")
    }
    books = {each.answer_id: each for each in front.served}
    assert {a["provider_request_id"] for a in attempts} == books.keys()
    for a in attempts:
        theirs = books[a["provider_request_id"]]
        assert (a["input_tokens"], a["cached_tokens"], a["output_tokens"]) == (
            theirs.prompt_tokens, theirs.cached_tokens, theirs.completion_tokens,
        )  # fmt: skip
        assert a["provider_cost"] == (theirs.cost if front.kind.tells_cost else None)
    booked = {name: sum(a[name] for a in attempts) for name in ("input_tokens", "cached_tokens", "output_tokens")}
    assert {name: after[name] - before[name] for name in booked} == booked
    assert total(found.rows("charges")) == sum((each.cost or Decimal(0) for each in front.served), Decimal(0))
    answers[system] = {row["request_id"]: row["output"] for row in found.outputs.to_pylist()}
    assert all(answers[system].values())
    assert answers[system] == next(iter(answers.values()))
    for file in tmp_path.rglob("*"):
        content = file.read_bytes() if file.is_file() and file.name != "account.json" else b""
        assert not any(secret in content for secret in (b"planted", b"ya29.", b"sagemaker-api-key")), file


def bought(server: VllmServer, home: Path, pool: dict[str, Any], rows: pa.Table) -> Written:
    """A run on one pool, held to the server's own counters."""
    path = write_job(home, rows, [pool], models={"tiny": {"source": tiny_model()}})
    job = Job.from_yaml(path, run_date=DAY)
    before = server.counters()
    summary = run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
    after = server.counters()
    found = written(job)
    assert summary.exit_code == 0
    check_conserved(found, ROWS)
    attempts = found.attempts
    assert {(a["status"], a["usage_source"]) for a in attempts} == {("ok", "reported")}
    booked = {name: sum(a[name] for a in attempts) for name in ("input_tokens", "cached_tokens", "output_tokens")}
    assert {name: after[name] - before[name] for name in booked} == booked
    return found


def test_a_run_buys_from_sagemaker_through_boto3(
    server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InvokeEndpoint, signed by boto3, with the name of the prefix that all the rows share."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with SagemakerFront(server.base_url) as front:
        options = {"region": "eu-central-1", "endpoint": front.endpoint}
        pool = remote("boto3", front.url, profile="sagemaker-invoke", options=options)
        bought(server, tmp_path, pool, prompts(ROWS, shared=f"{LATIN} " * 5))
    assert len(front.calls) == ROWS
    (name,) = {call.headers[PREFIX_HEADER.lower()] for call in front.calls}
    assert len(name) == 16


def test_a_run_rents_a_node_and_gives_it_back(
    server: VllmServer, answers: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Render's routes before a node whose vLLM is real; its time is what the run costs."""
    monkeypatch.setenv("RENDER_API_KEY", RENDER_KEY)
    with RenderFront(looks=2) as front:
        pool = {
            "name": "render",
            "kind": "lease",
            "profile": "render",
            "base_url": front.base_url,
            "models": ["tiny"],
            "price": {"accelerator_hour": "3.60"},
            "context": 512,
            "options": {"gpu_tier": "premium", "image": "vllm", "address": server.base_url},
        }
        found = bought(server, tmp_path, pool, prompts(ROWS))
        assert front.alive == []
        assert len(front.nodes) == 1
    meters = {charge["meter"] for charge in found.rows("charges")}
    outputs = {row["request_id"]: row["output"] for row in found.outputs.to_pylist()}
    assert outputs == next(iter(answers.values()), outputs)
    assert {"setup", "accelerator_second"} <= meters <= {"setup", "accelerator_second", "accelerator_idle_second"}
    assert total(found.rows("charges"), "quantity") * Decimal("0.001") == total(found.rows("charges"))


def test_a_batch_run_on_a_real_server_costs_what_the_server_counted(
    tmp_path: Path, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cheap batch beside a dearer endpoint of the same server, exact tokens: one file, and not a token unaccounted."""
    monkeypatch.setenv("FRONT_KEY", "key-of-the-batch-front-0123456789")
    before = server.counters()
    with BatchFront(server.base_url, key="key-of-the-batch-front-0123456789", models={"vendor/tiny": "tiny"}) as front:
        slow = remote(
            "slow",
            front.base_url,
            kind="batch",
            models={"tiny": "vendor/tiny"},
            price={"input": "0.05", "cached_input": "0.005", "output": "0.20"},
            api_key_env="FRONT_KEY",
            options={"window": "24h", "poll": "50ms"},
        )
        job = make_job(
            tmp_path,
            prompts(48),
            [slow, remote("near", server.base_url)],
            models={"tiny": {"source": tiny_model()}},
            deadline="48h",
        )
        summary = run(job)
        assert (summary.status, summary.served, len(front.batches)) == ("complete", 48, 1)
    after = server.counters()
    found = written(job)
    check_conserved(found, 48)
    attempts = found.attempts
    assert {row["pool"] for row in attempts} == {"slow"}
    for name in ("input_tokens", "cached_tokens", "output_tokens"):
        assert sum(row[name] for row in attempts) == after[name] - before[name]
    assert all(row["recount_input_tokens"] == row["input_tokens"] for row in attempts)
    tokens = {
        meter: sum(c["quantity"] for c in found.rows("charges") if c["meter"] == meter)
        for meter in ("uncached_input", "cached_input", "output")
    }
    assert tokens["cached_input"] == sum(ran.cached_tokens or 0 for ran in front.served) > 0
    assert tokens["output"] == sum(ran.completion_tokens or 0 for ran in front.served)
    assert total(found.rows("charges")) == total(found.rows("requests"))
    assert b"key-of-the-batch-front" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
