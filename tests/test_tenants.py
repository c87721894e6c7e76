"""Tenants and placement where requests leave: caches and answers kept apart, and a wall that no award gets through."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_jobs import DAY, LATIN, by_the_hour, check_conserved, remote, write_job, written
from small_plans import make_context, make_plan, write_input
from test_shift import Scripted, Stage, places, pool
from tiny_model import tiny_model

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.connectors.errors import BidbeamError
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job
from bidbeam.transforms.door import cache_salt
from bidbeam.transforms.engines import Slot
from bidbeam.transforms.heirs import Heirs
from bidbeam.transforms.order import split_group
from bidbeam.transforms.shift import Shift

EEA = '{"jurisdictions":["EEA"]}'
BLOCK = 32


def run(path: Path) -> Any:
    """Runs the job and reads back what it left."""
    job = Job.from_yaml(path, run_date=DAY)
    run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
    return written(job)


def two_tenants(count: int) -> pa.Table:
    """``count`` different prompts with one long beginning, each asked by both tenants alike."""
    rows = [
        {"id": f"{tenant}{n}", "customer": tenant, "prompt": f"{LATIN} {LATIN} item {n}"}
        for n in range(count)
        for tenant in ("acme", "bolt")
    ]
    return pa.Table.from_pylist(rows)


ASKED = {"prompt": {"id": "id", "column": "prompt", "tenant": "customer"}}


# -- salts --


def test_a_salt_is_the_tenant_s_own_and_tells_nothing_of_it(tmp_path: Path) -> None:
    """One salt for each tenant of a run, another in any other run, none where there is no tenant."""
    plan = write_input(tmp_path, {"a.parquet": pa.table({"prompt": ["x"]})}, 1)
    context = make_context(tmp_path, plan)
    acme, bolt = cache_salt(context, "acme"), cache_salt(context, "bolt")
    assert acme == cache_salt(context, "acme") != bolt
    assert acme != cache_salt(replace(context, seed=context.seed + 1), "acme")
    assert cache_salt(context, None) is None
    assert cache_salt(context, "") not in {None, "", acme}
    assert acme is not None
    assert "acme" not in acme


@pytest.mark.parametrize("takes", [True, False])
def test_a_salt_goes_out_only_where_the_endpoint_takes_it(tmp_path: Path, takes: bool) -> None:
    """An endpoint whose profile takes salts finds nothing cached for a tenant's first request and something for the
    rest; another is sent no unknown field."""
    with EndpointDouble(["tiny"]) as double:
        profile = {"profile": "vllm"} if takes else {}
        path = write_job(
            tmp_path, two_tenants(4), [remote("far", double.base_url, capacity={"concurrency": 1}, **profile)], **ASKED
        )
        found = run(path)
        salts = [seen.body.get("cache_salt") for seen in double.requests]
    check_conserved(found, 8)
    if not takes:
        assert set(salts) == {None}
        return
    assert len(set(salts)) == 2
    assert None not in salts
    assert_apart(found)


def assert_apart(found: Any) -> None:
    """Of each tenant the first request met an empty cache, and every other one a warm one."""
    tenant_of = {row["request_id"]: row["tenant"] for row in found.rows("requests")}
    for tenant in ("acme", "bolt"):
        mine = sorted(
            (a for a in found.attempts if tenant_of[a["request_id"]] == tenant), key=lambda a: a["started_at"]
        )
        assert len(mine) == 4
        assert mine[0]["cached_tokens"] == 0
        assert all(attempt["cached_tokens"] > 0 for attempt in mine[1:])


@pytest.mark.engine
def test_tenants_meet_in_no_cache_of_a_real_engine(tmp_path: Path) -> None:
    """vLLM computes one tenant's beginning anew although another's equal one is cached, and re-uses its own."""
    engine = {
        "block_size": BLOCK, "max_num_seqs": 1, "kv_cache_memory_bytes": 32 << 20, "cores": [*os.sched_getaffinity(0)],
    }  # fmt: skip
    path = write_job(
        tmp_path,
        two_tenants(4),
        [by_the_hour("own", engine=engine)],
        models={"tiny": {"source": tiny_model()}},
        **ASKED,
    )
    found = run(path)
    check_conserved(found, 8)
    assert_apart(found)


# -- answers and lots --


def test_an_answer_is_shared_within_a_tenant_only(tmp_path: Path) -> None:
    """Of equal greedy requests one of each tenant is computed, and pays; no lot holds two tenants."""
    rows = [
        {"id": f"{tenant}{n}", "customer": tenant, "prompt": LATIN} for n in range(3) for tenant in ("a", "b", None)
    ]
    with EndpointDouble(["tiny"]) as double:
        found = run(write_job(tmp_path, pa.Table.from_pylist(rows), [remote("far", double.base_url)], **ASKED))
        assert len(double.served) == 3
    check_conserved(found, 9)
    requests = found.rows("requests")
    tenant_of = {row["request_id"]: row["tenant"] for row in requests}
    assert sorted(row["shared_with"] is None for row in requests) == [False] * 6 + [True] * 3
    assert all(tenant_of[row["shared_with"]] == row["tenant"] for row in requests if row["shared_with"])
    lot_of = {row["lot_id"]: row["tenant"] for row in found.rows("lots")}
    assert set(lot_of.values()) == {None, "a", "b"}
    assert all(lot_of[row["lot_id"]] == row["tenant"] for row in requests)


def test_a_tenant_s_name_may_hold_anything(tmp_path: Path) -> None:
    """Control characters, quotes and emptiness in a tenant's name name that tenant and break nothing."""
    names = ["a\x1fb", "\x1f", "\x00", "\x01x", '"', "", "é\n"]
    table = pa.table({"prompt": ["one"] * len(names), "tenant": names})
    planned = make_plan(context := make_context(tmp_path, plan := write_input(tmp_path, {"a.parquet": table}, 9)), plan)
    assert sorted(planned.lots.column("tenant").to_pylist()) == sorted(names)
    groups = [split_group(name)[2] for ref in planned.ranges for name in ref.groups]
    assert sorted(map(str, groups)) == sorted(names)
    assert len({cache_salt(context, name) for name in names}) == len(names)


# -- the wall at the engine's door --


class Walled(Stage):
    """24 requests that may go to the EEA only, a pool there, and one in the US."""

    def __init__(self, home: Path) -> None:
        self.pools = (
            pool("near", placement={"jurisdiction": "DE", "operator": "cloud"}),
            pool("far", placement={"jurisdiction": "US", "operator": "cloud"}),
        )
        prompts = [f"shared beginning {n:03d}" for n in range(24)]
        table = pa.table({"prompt": prompts, "placement": [EEA] * 24, "tenant": ["acme"] * 24})
        plan = write_input(home, {"a.parquet": table}, 24)
        self.plan = make_plan(make_context(home, plan, lot_tokens=60, pools=self.pools), plan)
        self.context = self.plan.context


def test_an_award_to_a_pool_that_may_not_serve_is_not_carried_out(tmp_path: Path) -> None:
    """Whatever the market says, no request leaves for a pool outside its placement; it ends as unserved."""
    stage, far = Walled(tmp_path), Scripted()
    lots = stage.plan.lots.num_rows
    near = Scripted()
    rows, unserved = stage.run(stage.task({"near": 1, "far": lots - 1}), {"near": near, "far": far})
    assert far.tags == []
    assert near.tags
    assert {row["jurisdiction"] for row in rows.to_pylist()} == {"DE"}
    assert places(unserved) == sorted(set(range(24)) - set(near.tags))
    assert set(unserved.column("last_error").to_pylist()) == {"no_eligible_pool"}


def test_a_hand_over_to_a_pool_that_may_not_serve_is_not_made(tmp_path: Path) -> None:
    """A runner-up outside the placement gets nothing of a dead pool's lots, in the first round and in later ones."""
    for round_ in (1, 2):
        stage, far = Walled(tmp_path / str(round_)), Scripted()
        task = stage.task({"near": stage.plan.lots.num_rows}, "far", round_)
        _, unserved = stage.run(task, {"near": Scripted(4, dies_after=5), "far": far})
        assert far.tags == []
        assert len(places(unserved)) == 24 - 5


def test_a_lot_put_into_a_lane_behind_the_market_s_back_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the shift's own check of awards is blind, the door to the engine still asks."""
    stage, far = Walled(tmp_path), Scripted()
    may, blind = Heirs.may, iter([True] * stage.plan.lots.num_rows)
    monkeypatch.setattr(Heirs, "may", lambda self, name, lot: next(blind, False) or may(self, name, lot))
    task = stage.task({"far": stage.plan.lots.num_rows})
    shift = Shift(task, stage.context, stage.plan.spills, slot=lambda *_: Slot(far, lambda timeout_s: 7))
    unserved = [result.unserved for result in shift.run() if result.unserved is not None]
    assert far.tags == []
    assert places(unserved[0]) == list(range(24))


@pytest.mark.parametrize(("column", "value"), [("placement", None), ("placement", "{}"), ("tenant", "bolt")])
def test_a_lot_that_lies_about_its_requests_is_not_opened(tmp_path: Path, column: str, value: str | None) -> None:
    """An award whose lot claims another placement or tenant than its rows have stops the run before anything leaves."""
    stage, far = Walled(tmp_path), Scripted()
    task = stage.task({"far": stage.plan.lots.num_rows})
    award = task.awards[0]
    forged = award.lots.set_column(
        award.lots.schema.get_field_index(column), column, pa.array([value] * award.lots.num_rows, pa.string())
    )
    where = "near" if column == "tenant" else "far"
    task = replace(task, awards=(replace(award, pool=where, lots=forged),))
    with pytest.raises(BidbeamError, match=f"another {column} than its requests have"):
        stage.run(task, {"far": far, "near": far})
    assert far.tags == []


def test_the_ledger_says_where_and_by_whom_each_attempt_was_made(tmp_path: Path) -> None:
    """Attempts carry the jurisdiction and operator that their pool declares; rows that tighten the job's placement go
    only where both allow, and those that nobody may serve are dead letters."""
    rows = [
        {"id": f"q{n}", "prompt": f"{LATIN} {n}", "placement": json.dumps(asked) if asked else None}
        for n, asked in enumerate(
            [None, {"operators": ["own"]}, {"jurisdictions": ["FR"]}, {"operator_jurisdictions_deny": ["US"]}]
        )
    ]
    with EndpointDouble(["tiny"]) as double:
        pools = [
            remote("us-owned", double.base_url, price={"input": "0.01", "output": "0.01"},
                   placement={"jurisdiction": "DE", "operator": "cloud", "operator_jurisdiction": "US"}),
            remote("ours", double.base_url,
                   placement={"jurisdiction": "DE", "operator": "own", "operator_jurisdiction": "DE"}),
            remote("silent", double.base_url, price={"input": "0.001", "output": "0.001"}),
        ]  # fmt: skip
        found = run(write_job(tmp_path, pa.Table.from_pylist(rows), pools, placement={"jurisdictions": ["EEA"]}))
    check_conserved(found, 4)
    made = {a["request_id"]: (a["pool"], a["jurisdiction"], a["operator"]) for a in found.attempts}
    assert made == {
        "q0": ("us-owned", "DE", "cloud"),
        "q1": ("ours", "DE", "own"),
        "q3": ("ours", "DE", "own"),
    }
    assert found.dead.column("reason").to_pylist() == ["no_eligible_pool"]
    why = {(bid["pool"], bid["reject_reason"]) for bid in found.rows("bids") if not bid["eligible"]}
    assert ("silent", "placement:jurisdiction (undeclared)") in why
    assert ("us-owned", "placement:operator_jurisdiction") in why
