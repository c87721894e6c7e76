"""Runs over real HTTP: what endpoints that work, fail, hang or talk nonsense come to in outputs, ledger and bill."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_jobs import Written, check_conserved, make_job, prompts, remote, total, written

from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run
from bidbeam.pipelines.summary import RunSummary

CHEAP = {"input": "0.10", "cached_input": "0.01", "output": "0.40"}
DEAR = {"input": "1.00", "output": "4.00"}
NOWHERE = "http://127.0.0.1:9/v1"

pytestmark = pytest.mark.timeout(60)


def bill(double: EndpointDouble, price: dict[str, str]) -> Decimal:
    """What the double says it served, at this price."""
    rates = {meter: Decimal(value) / 1_000_000 for meter, value in price.items()}
    total = Decimal(0)
    for served in double.served:
        cached = served.cached_tokens if "cached_input" in rates else 0
        total += (served.prompt_tokens - cached) * rates["input"] + served.completion_tokens * rates["output"]
        total += cached * rates.get("cached_input", Decimal(0))
    return total


def run_and_read(job: Job, rows: int) -> tuple[RunSummary, Written]:
    summary = run(job)
    found = written(job)
    check_conserved(found, rows)
    assert summary.exit_code == (0 if summary.status == "complete" else 3)
    assert summary.cost == Decimal(found.manifest["cost"])
    return summary, found


def classes(found: Written, pool: str | None = None) -> Counter[Any]:
    return Counter((row["status"], row["error_class"]) for row in found.attempts if pool is None or row["pool"] == pool)


def test_two_endpoints_serve_a_run_at_their_own_prices(tmp_path: Path) -> None:
    """Lots go to both endpoints at once; the bill is what each of them counted, at its price, request by request."""
    with EndpointDouble(["theirs"]) as near, EndpointDouble(["tiny"], report_cached=False) as far:
        capacity = {"concurrency": 4, "tokens_per_second": 2000}
        pools = [
            remote("near", near.base_url, models={"tiny": "theirs"}, price=CHEAP, capacity=capacity),
            remote("far", far.base_url, price=DEAR, capacity=capacity),
        ]
        shared = "one two three four five six seven eight nine ten eleven twelve " * 80
        job = make_job(tmp_path, prompts(60, shared=shared), pools, tags={"team": "growth"})
        summary, found = run_and_read(job, 60)
        assert (summary.status, summary.served, dict(summary.dead)) == ("complete", 60, {})
        assert len(near.served) + len(far.served) == 60
        assert near.served
        assert far.served
        assert summary.cost == bill(near, CHEAP) + bill(far, DEAR)
        assert {pool.pool: pool.cost for pool in summary.pools} == {"near": bill(near, CHEAP), "far": bill(far, DEAR)}
        served = {each.request: each for double in (near, far) for each in double.served}
    for attempt in found.attempts:
        theirs = served[attempt["attempt_id"].hex]
        assert (attempt["input_tokens"], attempt["output_tokens"]) == (theirs.prompt_tokens, theirs.completion_tokens)
        assert attempt["cached_tokens"] == (theirs.cached_tokens if attempt["pool"] == "near" else None)
        assert attempt["usage_source"] == "reported"
        assert attempt["started_at"] <= attempt["finished_at"]
    assert {row["tags"] for row in found.rows("charges")} == {'{"team": "growth"}'}


def test_requests_arrive_in_the_order_of_their_prefixes(tmp_path: Path) -> None:
    """One endpoint, one request at a time: prompts that share a beginning come one after another, and hit its cache."""
    groups = [f"{name} one two three four five six seven eight" for name in ("amber", "birch", "cedar")]
    rows = prompts(30)
    texts = [f"{groups[n % 3]} item {n}" for n in range(30)]
    rows = rows.set_column(1, "prompt", [texts])
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, rows, [remote("near", double.base_url, capacity={"concurrency": 1})])
        _, found = run_and_read(job, 30)
        asked = [seen.body["messages"][0]["content"] for seen in double.requests]
    assert asked == sorted(texts)
    assert found.manifest["cached_tokens"] == 27 * 8


def test_an_endpoint_that_is_down_loses_nothing_while_another_is_up(tmp_path: Path) -> None:
    """What a dead endpoint was asked for is tried again on another pool; the rest goes there at once."""
    with EndpointDouble(["tiny"]) as far:
        pools = [remote("near", NOWHERE, price=CHEAP), remote("far", far.base_url, price=DEAR)]
        summary, found = run_and_read(make_job(tmp_path, prompts(40), pools), 40)
        assert (summary.status, summary.served) == ("complete", 40)
        assert len(far.served) == 40
        assert summary.cost == bill(far, DEAR)
    assert set(classes(found, "near")) == {("failed", "server")}
    assert classes(found, "far") == {("ok", None): 40}
    assert max(Counter(row["request_id"] for row in found.attempts).values()) == 2
    retried = [row for row in found.attempts if row["attempt_no"] == 2]
    assert {row["kind"] for row in retried} == {"retry"}
    assert {row["pool"] for row in retried} == {"far"}


def test_an_endpoint_that_is_down_alone_ends_in_dead_letters(tmp_path: Path) -> None:
    """With no other pool every row is a dead letter that says so, the run is incomplete, and nothing is charged."""
    summary, found = run_and_read(make_job(tmp_path, prompts(6), [remote("near", NOWHERE)]), 6)
    assert (summary.status, summary.exit_code, dict(summary.dead), summary.cost) == ("incomplete", 3, {"failed": 6}, 0)
    assert set(classes(found)) == {("failed", "server")}
    assert all("cannot connect" in row["message"] for row in found.dead.to_pylist() if row["attempts"])
    assert (found.run_dir / "_INCOMPLETE").exists()


def test_tolerated_dead_letters_are_done(tmp_path: Path) -> None:
    """As many dead letters as the job tolerates still count as complete."""
    job = make_job(tmp_path, prompts(3), [remote("near", NOWHERE)], tolerate={"dead": "100%"})
    summary, _ = run_and_read(job, 3)
    assert (summary.status, summary.exit_code, sum(summary.dead.values())) == ("complete", 0, 3)


def test_an_endpoint_that_goes_down_half_way_loses_nothing(tmp_path: Path) -> None:
    """Its lots move to the runner-up in the same shift; what it had in flight is tried again, and the books agree."""
    gone = threading.Event()

    def fails(seen: Seen) -> Reply:
        if seen.number >= 12 and not gone.is_set():
            gone.set()
            threading.Thread(target=near.close, daemon=True).start()
        return Reply(cut="reset") if gone.is_set() else Reply()

    near = EndpointDouble(["tiny"], fails)
    with near, EndpointDouble(["tiny"]) as far:
        pools = [remote("near", near.base_url, price=CHEAP), remote("far", far.base_url, price=DEAR)]
        summary, found = run_and_read(make_job(tmp_path, prompts(80), pools), 80)
        assert (summary.status, summary.served) == ("complete", 80)
        assert summary.cost == bill(near, CHEAP) + bill(far, DEAR)
        assert len(near.served) + len(far.served) == 80
    assert set(classes(found, "near")) <= {("ok", None), ("failed", "server")}
    assert len([row for row in found.rows("awards") if row["round"] == 1 and row["pool"] == "near"]) > 0
    moved = [row for row in found.attempts if row["pool"] == "far" and row["round"] == 1]
    assert moved, "nothing moved inside the shift"


def test_a_slow_endpoint_costs_failed_attempts_and_never_a_hang(tmp_path: Path) -> None:
    """Requests that take longer than the pool's timeout fail as such and are answered elsewhere."""
    with EndpointDouble(["tiny"], Reply.slow(30)) as near, EndpointDouble(["tiny"]) as far:
        pools = [
            remote("near", near.base_url, price=CHEAP, timeout="1s", capacity={"concurrency": 8}),
            remote("far", far.base_url, price=DEAR),
        ]
        summary, found = run_and_read(make_job(tmp_path, prompts(6), pools), 6)
        assert (summary.status, summary.served) == ("complete", 6)
    assert set(classes(found, "near")) == {("failed", "timeout")}


FAILURES = {
    "garbage": (Reply.garbage(), "bad_output", "bad_output"),
    "truncated": (Reply(cut="truncate"), "bad_output", "bad_output"),
    "error-in-200": (Reply.error_inside(502, "upstream is gone"), "server", "failed"),
    "error-500": (Reply.error(500, "boom"), "server", "failed"),
    "error-429": (Reply.error(429, "slow down"), "rate", "capacity"),
    "error-503": (Reply.error(503, "full"), "capacity", "capacity"),
    "error-400": (Reply.error(400, "this is not a request"), "caller", "refused"),
}


def test_failures_are_told_apart_and_end_in_dead_letters(tmp_path: Path) -> None:
    """Each way to fail is an attempt of its class, tried again unless the request is at fault, then a dead letter."""
    doubles = {name: EndpointDouble([name], reply) for name, (reply, _, _) in FAILURES.items()}
    names = list(doubles)
    rows = prompts(7 * 3).append_column("model", [[names[n % 7] for n in range(7 * 3)]])
    with contextlib.ExitStack() as open_doubles:
        for double in doubles.values():
            open_doubles.enter_context(double)
        pools = [remote(name, double.base_url, models=[name]) for name, double in doubles.items()]
        models: dict[str, Any] = {name: {} for name in names}
        job = make_job(tmp_path, rows, pools, models=models, model=None, auction={"rounds": 2})
        summary, found = run_and_read(job, 21)
    assert (summary.exit_code, summary.served, summary.cost) == (3, 0, 0)
    dead = found.dead.to_pylist()
    for name, (_, failure, reason) in FAILURES.items():
        tries = 1 if failure == "caller" else 2
        assert len(doubles[name].requests) == 3 * tries, name
        assert classes(found, name) == {("failed", failure): 3 * tries}, name
        mine = [row for row in dead if row["model"] == name]
        assert [(row["reason"], row["attempts"]) for row in mine] == [(reason, tries)] * 3, name


def test_what_one_pool_garbles_another_answers(tmp_path: Path) -> None:
    """A request that failed on one pool goes to another in the next round, though the first still asks for less."""
    with EndpointDouble(["tiny"], Reply.garbage()) as near, EndpointDouble(["tiny"]) as far:
        pools = [remote("near", near.base_url, price=CHEAP), remote("far", far.base_url, price=DEAR)]
        # Too few for the pool's breaker, which would send the rest elsewhere within the round.
        summary, found = run_and_read(make_job(tmp_path, prompts(4), pools), 4)
        assert (summary.status, len(near.requests), len(far.requests)) == ("complete", 4, 4)
        assert summary.cost == bill(far, DEAR)
    assert {row["attempts"] for row in found.outputs.to_pylist()} == {2}
    taken_back = [row for row in found.rows("bids") if row["round"] == 2 and row["pool"] == "near"]
    assert {(row["eligible"], row["reject_reason"]) for row in taken_back} == {(False, "failed")}


def test_rate_limits_are_waited_for(tmp_path: Path) -> None:
    """An endpoint that says 429 at first serves everything in the end, and only what it served is paid."""
    limits = [Reply.error(429, "slow down", headers={"Retry-After": "0.2"})] * 3
    with EndpointDouble(["tiny"], limits) as double:
        summary, found = run_and_read(make_job(tmp_path, prompts(12), [remote("near", double.base_url)]), 12)
        assert (summary.status, summary.served) == ("complete", 12)
        assert summary.cost == bill(double, CHEAP)
    assert classes(found) == {("ok", None): 12, ("failed", "rate"): 3}


def test_a_wrong_key_takes_a_pool_down_and_is_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that refuses our key is asked no more; its lots are served elsewhere, and no file holds the key."""
    monkeypatch.setenv("NEAR_KEY", "sk-planted-wrong-key-0123456789")
    with EndpointDouble(["tiny"], api_key="the-right-one") as near, EndpointDouble(["tiny"]) as far:
        pools = [
            remote("near", near.base_url, price=CHEAP, api_key_env="NEAR_KEY"),
            remote("far", far.base_url, price=DEAR),
        ]
        summary, found = run_and_read(make_job(tmp_path, prompts(40), pools), 40)
        assert (summary.status, summary.served, len(near.served)) == ("complete", 40, 0)
        assert len(near.requests) <= 8
    assert set(classes(found, "near")) == {("failed", "auth_funds")}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-planted" not in path.read_bytes(), path


def test_usage_that_is_not_reported_is_recounted_or_estimated(tmp_path: Path) -> None:
    """An endpoint that tells no usage is charged at the worst case, and the ledger says that it is an estimate."""
    with EndpointDouble(["tiny"], Reply(drop=("usage",))) as double:
        _, found = run_and_read(make_job(tmp_path, prompts(4), [remote("near", double.base_url)]), 4)
    for row in found.attempts:
        assert (row["usage_source"], row["cached_tokens"], row["output_tokens"]) == ("estimate", None, 8)


def test_a_deadline_that_has_passed_sends_nothing(tmp_path: Path) -> None:
    """Without time left every row is a dead letter for the deadline, and no endpoint hears of it."""
    with EndpointDouble(["tiny"]) as double:
        pools = [remote("near", double.base_url, capacity={"concurrency": 4, "tokens_per_second": 1})]
        summary, found = run_and_read(make_job(tmp_path, prompts(5), pools, deadline="1s"), 5)
        assert (dict(summary.dead), len(double.requests)) == ({"deadline": 5}, 0)
    assert {row["reason"] for row in found.rows("requests")} == {"deadline"}


def test_nowhere_to_go_is_a_dead_letter_with_the_reason(tmp_path: Path) -> None:
    """A placement that no pool declares fails closed: nothing is sent, and the bids say which label was missing."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(5), [remote("near", double.base_url)], placement={"zdr": True})
        summary, found = run_and_read(job, 5)
        assert (dict(summary.dead), len(double.requests)) == ({"no_eligible_pool": 5}, 0)
    assert {row["reject_reason"] for row in found.rows("bids")} == {"placement:zdr (undeclared)"}


@pytest.mark.parametrize(("budget", "enough"), [("0.004", True), ("0.00025", False)])
def test_a_budget_is_never_overspent(tmp_path: Path, budget: str, enough: bool) -> None:
    """What it pays for is served, also beyond its worst case, the rest are dead letters, and the bill stays within."""
    with EndpointDouble(["tiny"]) as double:
        rows = prompts(60, shared="one two three four five six seven eight nine ten eleven twelve " * 20)
        once = {"budget": {"max_cost": budget}, "auction": {"rounds": 1}}
        job = make_job(tmp_path, rows, [remote("near", double.base_url)], **once)
        summary, found = run_and_read(job, 60)
        assert total(found.rows("bids"), "worst_case_cost") > Decimal("0.004")
        assert summary.served == 60 if enough else 0 < summary.served < 60
        assert set(summary.dead) == (set() if enough else {"budget"})
        assert summary.cost == bill(double, CHEAP) <= Decimal(budget)


def test_what_a_round_or_a_start_has_spent_the_next_ones_do_not_have(tmp_path: Path) -> None:
    """Where an answer costs all that was reserved, later rounds and starts find nothing left; each tenant has a lot."""
    rows = prompts(18)
    rows = rows.append_column("customer", pa.array([f"c{n % 6}" for n in range(18)]))
    flat = {"input": "0", "output": "0", "request": "0.001"}
    terms: dict[str, Any] = {
        "prompt": {"id": "id", "column": "prompt", "tenant": "customer"},
        "budget": {"max_cost": "0.007"},
        "auction": {"rounds": 3},
    }
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, rows, [remote("near", double.base_url, price=flat)], **terms)
        summary, found = run_and_read(job, 18)
        assert len(double.requests) == 7
        assert (summary.served, summary.cost, dict(summary.dead)) == (7, Decimal("0.007"), {"budget": 11})
        assert {row["round"] for row in found.rows("auctions")} == {1, 2, 3}
        again, _ = run_and_read(job, 18)
        assert len(double.requests) == 7
    assert (again.status, again.served, again.cost) == ("incomplete", 7, Decimal("0.007"))
