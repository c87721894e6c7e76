"""How each provider fails in a whole run: told apart in the ledger, handled by class, held against whom it may."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from provider_fronts import standing
from small_jobs import DAY, check_conserved, make_job, prompts, remote, written
from test_fronts import EXPECTED, OTHERWISE
from test_leases import lease_pool

from bidbeam.connectors.doubles import NO_USAGE, EndpointDouble, Reply
from bidbeam.connectors.front_errors import ERRORS, Case
from bidbeam.connectors.front_render import KEY as RENDER_KEY
from bidbeam.connectors.front_render import RenderFront
from bidbeam.connectors.front_sagemaker import ACCESS_KEY, SECRET_KEY, SagemakerFront, model_error, sagemaker_error
from bidbeam.connectors.http_engine import HttpEngine
from bidbeam.connectors.ledger_history import read_deeds
from bidbeam.connectors.store import Store
from bidbeam.pipelines.run import run

HTTP = ("openrouter", "chutes", "prime", "pai3", "azure", "vertex")
SYSTEMS = (*HTTP, "render", "sagemaker-invoke")
CASES: tuple[Case, ...] = ("rate", "no_capacity", "error_inside", "server", "refused_content")
PASSING = ("rate", "capacity")
ROWS = 9


def script(system: str) -> list[Reply]:
    """One of each failure, then an answer without usage; all that follows is answered."""
    theirs = ERRORS["pai3" if system == "render" else system]
    return [*(theirs[case] for case in CASES), NO_USAGE]


def expected(system: str) -> list[str]:
    """The class of each of CASES."""
    return [OTHERWISE.get((system, case), EXPECTED[case])[0] for case in CASES]


def test_every_way_to_fail_of_every_system_is_told_apart_and_handled_by_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but what a provider refuses is answered in the end; what is not reported stays unknown and is paid in full;
    want of room and our own speed count against nobody."""
    monkeypatch.setenv("RENDER_API_KEY", RENDER_KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setitem(HttpEngine.__init__.__kwdefaults__ or {}, "first_pause_s", 0.02)
    pools: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(EndpointDouble(["tiny"], report_cached=False))
        for system in HTTP:
            more = {"behaviour": script(system), "report_cached": False}
            place = stack.enter_context(standing(system, upstream.base_url, "tiny", tmp_path, monkeypatch, **more))
            pools.append(remote(system, **{**place.pool, "models": {system: "vendor/tiny-it"}}))
        node = stack.enter_context(EndpointDouble(["render"], script("render"), report_cached=False))
        nodes = stack.enter_context(RenderFront())
        pools.append(lease_pool(nodes, node, models=["render"]))
        container = stack.enter_context(EndpointDouble(["tiny"], [NO_USAGE], report_cached=False))
        faults = [
            sagemaker_error(400, "ThrottlingException", "Rate exceeded"),
            model_error(503, ""),
            Reply.error_inside(503, "The container is overloaded."),
            model_error(500, "CUDA error"),
            model_error(400, '{"error": {"message": "Refused by the content_filter.", "code": 400}}'),
        ]
        aws = stack.enter_context(SagemakerFront(container.base_url, faults))
        options = {"region": "eu-central-1", "endpoint": aws.endpoint}
        pools.append(
            remote(
                "sagemaker-invoke",
                aws.url,
                profile="sagemaker-invoke",
                options=options,
                models={"sagemaker-invoke": "tiny"},
            )
        )
        models = [SYSTEMS[n % len(SYSTEMS)] for n in range(ROWS * len(SYSTEMS))]
        rows = prompts(len(models)).append_column("model", pa.array(models))
        job = make_job(tmp_path, rows, pools, models={name: {} for name in SYSTEMS}, model=None, auction={"rounds": 3})
        summary = run(job)
        assert nodes.alive == []
    found = written(job)
    check_conserved(found, len(models))
    assert (summary.served, dict(summary.down)) == ((ROWS - 1) * len(SYSTEMS), {})
    dead = {row["model"]: (row["reason"], row["attempts"]) for row in found.dead.to_pylist()}
    deeds = {each.pool: each for each in read_deeds(
        Store.at(job.ledger), job=job.name, models=list(SYSTEMS), around=[DAY], days=1
    )}  # fmt: skip
    for system in SYSTEMS:
        told = expected("sagemaker" if system == "sagemaker-invoke" else system)
        attempts = [row for row in found.attempts if row["pool"] == system]
        failed = Counter(row["error_class"] for row in attempts if row["status"] == "failed")
        assert failed == Counter(told), system
        assert dead[system] == ("refused", 1), system
        answered = [row for row in attempts if row["status"] == "ok"]
        assert len(answered) == ROWS - 1, system
        assert sorted(row["usage_source"] for row in answered) == ["estimate"] + ["reported"] * (ROWS - 2), system
        assert {row["cached_tokens"] for row in answered} == {None}, system
        assert deeds[system].refused == sum(each in PASSING for each in told), system
        assert deeds[system].failed == sum(each == "server" for each in told), system
    cached = [row for row in found.rows("charges") if row["meter"] == "cached_input" and row["quantity"]]
    assert cached == []


@pytest.mark.parametrize("case", ["wrong_key", "no_funds"])
def test_a_pool_that_is_closed_to_us_is_asked_next_to_nothing_and_said_at_the_end(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong key, an empty account: whoever else is there serves, and why nobody asks the pool is told."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(EndpointDouble(["tiny"]))
        pools: list[dict[str, Any]] = []
        fronts = {}
        # One variable holds the key of all: what the last of them sets counts.
        for system in ("vertex", *(each for each in HTTP if each != "vertex"), "sagemaker"):
            more: dict[str, Any] = {"wrong": True} if case == "wrong_key" else {"behaviour": ERRORS[system][case]}
            place = stack.enter_context(standing(system, upstream.base_url, "tiny", tmp_path, monkeypatch, **more))
            fronts[system] = place.front
            pools.append(remote(system, **{**place.pool, "models": {system: "vendor/tiny-it"}}))
        models = [system for system in fronts for _ in range(20)]
        pools.append(
            remote(
                "other", upstream.base_url, models=dict.fromkeys(fronts, "tiny"), price={"input": "9", "output": "9"}
            )
        )
        rows = prompts(len(models)).append_column("model", pa.array(models))
        job = make_job(tmp_path, rows, pools, models={name: {} for name in fronts}, model=None)
        summary = run(job)
    found = written(job)
    assert (summary.exit_code, summary.served) == (0, len(models))
    assert summary.down.keys() == fronts.keys()
    for system, front in fronts.items():
        mine = [row for row in found.attempts if row["pool"] == system]
        assert {(row["status"], row["error_class"]) for row in mine} == {("failed", "auth_funds")}
        assert 1 <= len(mine) <= 8
        assert front.served == []
        assert f"pool {system} at {front.host} is down: 4" in summary.down[system]
