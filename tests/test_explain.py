"""Explaining a request from the ledger: the golden texts, the JSON, and what is said where nothing is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from small_jobs import by_the_hour, make_job, prompts, remote
from small_ledger import DAY_A, NOON, A, B, request, run_row, write_run, write_small_ledger
from tiny_model import tiny_model

from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.store import Store
from bidbeam.pipelines.explain import Explanation, explain_request, render_text
from bidbeam.pipelines.explanation import Clearing, exact_sum
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store.at(str(tmp_path_factory.mktemp("ledger")))
    write_small_ledger(store)
    return store.url


@pytest.mark.parametrize(
    ("name", "request_id", "run_id"),
    [
        ("served", "r1", A),
        ("in_tao", "r1", B),
        ("retried", "r2", None),
        ("shared", "r3", None),
        ("never_tried", "r4", None),
    ],
)
def test_the_text_is_the_one_on_record(ledger: str, name: str, request_id: str, run_id: str | None) -> None:
    """The whole story of a request reads as in its golden file; where there is none, it is written to be read."""
    text = render_text(explain_request(ledger, request_id, run_id=run_id))
    golden = GOLDEN / f"explain_{name}.txt"
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"wrote {golden}: read it, commit it")
    assert text == golden.read_text()


def test_a_retried_request_has_its_rounds_attempts_and_charges(ledger: str) -> None:
    """Both rounds it was in, both attempts in order, and a cost that is the sum of their charges."""
    found = explain_request(ledger, "r2")
    assert [(clearing.round, clearing.winner, clearing.runner_up) for clearing in found.clearings] == [
        (1, "chutes", "own"),
        (2, "own", None),
    ]
    assert found.clearings[0].margin == Decimal("0.00019")
    assert [bid.pool for bid in found.clearings[0].bids] == ["chutes", "own", "far"]
    assert [(attempt.pool, attempt.status) for attempt in found.attempts] == [("chutes", "failed"), ("own", "ok")]
    assert found.cost == Decimal("0.0002565277777775")
    for clearing in found.clearings:
        for bid in clearing.bids:
            if bid.eligible:
                assert exact_sum((bid.expected_cost, bid.risk_cost, bid.lateness_cost)) == bid.score


def test_the_latest_run_is_explained_and_the_others_named(ledger: str) -> None:
    """One id in two runs: the later one, unless another is asked for, and each names the other."""
    assert (explain_request(ledger, "r1").run_id, explain_request(ledger, "r1").other_runs) == (B, (A,))
    older = explain_request(ledger, "r1", run_id=A)
    assert (older.run_id, older.other_runs, older.rows_with_this_id) == (A, (B,), 2)


def test_a_shared_answer_shows_the_attempt_it_came_from_and_costs_nothing(ledger: str) -> None:
    """The one that paid is named, its attempt is shown, and its charges do not count here."""
    found = explain_request(ledger, "r3")
    assert (found.shared_with, found.cost) == ("r1", Decimal(0))
    assert [(attempt.request_id, len(attempt.charges)) for attempt in found.attempts] == [("r1", 3)]


def test_json_keeps_every_digit(ledger: str) -> None:
    """Decimals are strings, times ISO 8601 in UTC, and the object survives JSON."""
    found = explain_request(ledger, "r2").to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["cost"] == "0.000256527777777500"
    assert found["attempts"][0]["started_at"] == NOON.isoformat()
    assert found["attempts"][1]["charges"][0]["unit_price"] == "0.000197222222222"
    assert found["clearings"][0]["bids"][2]["reject_reason"] == "jurisdiction US is not in [DE, EEA]"


def test_every_term_of_every_bids_score_is_shown(tmp_path: Path) -> None:
    """Of a run as it is written now: each term has its column, and they add up to the score on every bid."""
    price = {"accelerator_hour": "0.71", "demand": {"least": "0.8", "most": "2.0"}}
    pools = [remote("near"), by_the_hour("own", price=price, capacity={"tokens_per_second": 900})]
    job = make_job(tmp_path, prompts(12), pools, models={"tiny": {"source": tiny_model()}}, deadline="1h")
    run(job, rehearse=True)
    found = explain_request(job.ledger, "q3", rehearsals=True)
    (clearing,) = found.clearings
    assert {bid.pool for bid in clearing.bids} == {"near", "own"}
    for bid in clearing.bids:
        terms = (
            bid.expected_cost, bid.risk_cost, bid.lateness_cost, bid.audit_cost, bid.demand_cost, bid.setup_cost,
        )  # fmt: skip
        assert bid.exploration_credit is not None
        assert exact_sum((*terms, bid.exploration_credit.copy_negate())) == bid.score
        assert bid.expected_cost is not None
        assert bid.risk_cost == (bid.expected_cost / 50).quantize(Decimal("1e-18"))  # the prior's
    own = next(bid for bid in clearing.bids if bid.pool == "own")
    assert own.demand_cost is not None
    assert own.demand_cost < 0
    text = render_text(found)
    assert "= expected" in text
    for term in ("+ risk", "+ lateness", "+ audit", "+ demand", "- exploration"):
        assert term in text
    assert verify_ledger(job.ledger, rehearsals=True).ok
    # With all the time there is a lot is worth its lowest score; as slack shrinks it is worth more, and that is said.
    lowest = min(bid.score for bid in clearing.bids if bid.score is not None)
    assert (clearing.reserve, clearing.urgency) == (lowest, 0)
    assert "worth" not in text
    urgent = replace(found, clearings=(replace(clearing, reserve=Decimal("0.25"), urgency=Decimal("0.125")),))
    assert "reserve 0.25 USD, with 12.5% of the time to the deadline gone or needed" in render_text(urgent)


@pytest.mark.parametrize(
    ("request_id", "run_id", "says"),
    [
        ("r22", None, "the ledger has no request r22; the nearest: r2"),
        (
            "r1",
            "nightly",
            f"the ledger has no run nightly, nor one of a name like it; it has copy-2026-11-23-cccccccc, {B}, {A}",
        ),
        ("r1", "copy-2026-11-21-aaaaaaab", f"the ledger has no run copy-2026-11-21-aaaaaaab; the nearest: {A}"),
        ("r2", B, f"run {B} has no request r2; these have: {A}"),
        ("r9", B, f"run {B} has no request r9, nor one of an id like it; one that it has is r1"),
        ("' OR 1=1 --", None, "the ledger has no request ' OR 1=1 --"),
    ],
)
def test_what_is_not_there_brings_the_nearest(ledger: str, request_id: str, run_id: str | None, says: str) -> None:
    """An unknown request or run is answered with those that were probably meant."""
    with pytest.raises(UsageError) as caught:
        explain_request(ledger, request_id, run_id=run_id)
    assert str(caught.value).startswith(says)


def test_a_run_without_requests_yet_says_so(tmp_path: Path) -> None:
    """A run that is still running has published none."""
    ledger = Store.at(str(tmp_path))
    write_run(ledger, run_row(A, DAY_A, "running"), {})
    with pytest.raises(UsageError, match="no run there has published its requests yet"):
        explain_request(ledger.url, "r1")


def test_rehearsals_are_explained_apart(tmp_path: Path) -> None:
    """A rehearsed request is found among the rehearsals only."""
    ledger = Store.at(str(tmp_path))
    write_run(ledger, run_row(B, DAY_A, "complete"), {"requests": [request(B, "real", 0)]})
    rows = {"requests": [request(A, "rehearsed", 0)]}
    write_run(ledger.child("_rehearsals"), run_row(A, DAY_A, "complete"), rows)
    assert explain_request(ledger.url, "rehearsed", rehearsals=True).run_id == A
    with pytest.raises(UsageError, match="no request rehearsed"):
        explain_request(ledger.url, "rehearsed")


def _clearing(**award: object) -> Clearing:
    bare = dict.fromkeys(Clearing.__slots__)
    return Clearing(**{**bare, "round": 1, "lot_id": "l", "bids": (), **award})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clearing", "says"),
    [
        (_clearing(winner="a", runner_up="b", margin=Decimal("0.5")), "its score is 0.5 USD lower than that of b"),
        (_clearing(winner="a", runner_up="b", margin=Decimal(0)), "a won on equal scores with b"),
        (_clearing(winner="a", runner_up="b", margin=Decimal("-0.5")), "a won although b scored 0.5 USD lower"),
        (_clearing(winner="a", runner_up="b"), "a won before b"),
        (_clearing(winner="a"), "a won: no other pool could serve the lot"),
        (_clearing(), "no bid was recorded"),
    ],
)
def test_why_the_winner_won_is_said(ledger: str, clearing: Clearing, says: str) -> None:
    """Cheaper, equal, dearer because of capacity, alone, or nobody: each has its own sentence."""
    found = explain_request(ledger, "r4")
    fields = {name: getattr(found, name) for name in Explanation.__slots__}
    assert says in render_text(Explanation(**{**fields, "clearings": (clearing,)}))


def test_a_second_pool_is_asked_for_a_reason(ledger: str) -> None:
    """The winner failed, or was slow, or gave the lot up before it came to the request."""
    found = explain_request(ledger, "r2")
    first, second = found.attempts
    assert "asked" not in render_text(found)  # each stands in a round that its pool won
    there = replace(second, round=first.round, lot_id=first.lot_id)
    text = render_text(replace(found, attempts=(first, there)))
    assert text.count("asked") == 1
    assert "asked because chutes, which had won the lot, had not answered it: failed" in text
    soon = replace(there, started_at=first.started_at)
    hedged = render_text(replace(found, attempts=(first, soon)))
    assert "asked as well because chutes, which had won the lot, took longer than it mostly does" in hedged
    alone = render_text(replace(found, attempts=(there,)))
    assert "asked because chutes, which had won the lot, gave it up before this request was sent to it" in alone


def test_a_row_that_died_says_why(tmp_path: Path) -> None:
    """The message of its dead letter is told while that is to be had; without it the reason stands alone."""
    rows = pa.table({"id": ["a", "b"], "prompt": ["fine", None]})
    job = make_job(tmp_path, rows, [remote("near")])
    run(job, rehearse=True)
    found = explain_request(job.ledger, "b", rehearsals=True)
    assert found.message == "column 'prompt': the prompt is null or empty"
    assert "\n  why: column 'prompt': the prompt is null or empty\n" in render_text(found)
    assert found.to_json()["message"] == found.message
    assert explain_request(job.ledger, "a", rehearsals=True).message is None
    shutil.rmtree(job.output)
    gone = explain_request(job.ledger, "b", rehearsals=True)
    assert (gone.reason, gone.message) == ("invalid", None)
