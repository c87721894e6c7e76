"""What answers tell besides their text: cut off, of another model, from elsewhere; counted in whole runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import check_conserved, make_job, prompts, remote, written
from tiny_model import tiny_model
from tokenizers import Tokenizer

from bidbeam.connectors.chaos import ChaosDouble
from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.http_wire import read_answer
from bidbeam.connectors.ledger_reader import open_ledger, run_query
from bidbeam.connectors.profiles import PROFILES
from bidbeam.pipelines.explain import explain_request, render_text
from bidbeam.pipelines.jsonable import jsonable
from bidbeam.pipelines.run import run
from bidbeam.pipelines.show import summary_text
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms.region_check import check_regions


def named(seen: Seen) -> Reply:
    """Every third answer of a model that nobody asked for."""
    return Reply(merge={"model": "other-7b" if seen.number % 3 == 0 else "vendor/Tiny-2026-01-31"})


def test_cut_off_answers_and_other_models_are_counted(tmp_path: Path) -> None:
    """In the summary, in JSON, in the manifest and in the ledger; they are answers all the same."""
    with EndpointDouble(["tiny"], named) as double:
        job = make_job(tmp_path, prompts(24), [remote("far", double.base_url)], sampling={"max_tokens": 4})
        summary = run(job)
    found = written(job)
    check_conserved(found, 24)
    assert summary.served == 24
    cut = sum(row["finish_reason"] == "length" for row in found.outputs.to_pylist())
    assert 0 < cut < 24
    assert summary.truncated == found.manifest["truncated"] == cut
    assert sum(row["finish_reason"] == "length" for row in found.attempts) == cut
    assert dict(summary.other_models) == found.manifest["other_models"] == {"other-7b": 8}
    text = summary_text(summary)
    assert f"cut off      {cut} answers were cut off at max_tokens" in text
    assert "other model  8 answers name another model: 8 other-7b; from 8 far" in text
    told: Any = jsonable(summary)
    assert (told["truncated"], told["other_models"]) == (cut, {"other-7b": 8})
    assert {row["model_returned"] for row in found.attempts} == {"other-7b", "vendor/Tiny-2026-01-31"}
    odd = next(row["request_id"] for row in found.attempts if row["other_model"] and row["finish_reason"] == "length")
    story = render_text(explain_request(job.ledger, odd))
    assert "4 output (reported), cut off at max_tokens\n  the answer names another model: other-7b\n" in story
    with open_ledger(job.ledger) as ledger:
        [row] = run_query(ledger, "FROM reconciliation").to_pylist()
    assert (row["compared_model"], row["other_model"], row["other_models"]) == (24, 8, "other-7b")


def test_answers_without_a_count_of_tokens_are_told(tmp_path: Path) -> None:
    """How many were booked at the worst case, because neither the provider nor a tokenizer says what they used; a
    later start says it of all starts."""
    with EndpointDouble(["tiny"], lambda seen: Reply(drop=("usage",) if seen.number % 3 == 0 else ())) as double:
        pools = [remote("far", double.base_url)]
        first = run(make_job(tmp_path, prompts(9), pools))
        pq.write_table(prompts(1, start=50), tmp_path / "in" / "b.parquet")
        second = run(make_job(tmp_path, None, pools))
    found = written(make_job(tmp_path, None, pools))
    assert (first.estimated, second.estimated, found.manifest["estimated"]) == (3, 4, 4)
    assert sum(row["usage_source"] == "estimate" for row in found.attempts) == 4
    assert "estimated  3 answers came without a count of tokens, booked at the worst case" in summary_text(first)


def test_counts_go_over_all_starts(tmp_path: Path) -> None:
    """A second start counts the answers of the first again, and its own once; what was paid for is said in full."""
    rows = prompts(6).append_column("placement", pa.array([None] * 4 + ['{"zdr":true}'] * 2))
    with EndpointDouble(["tiny"], Reply(merge={"model": "other-7b"})) as double:
        keys: dict[str, Any] = {"sampling": {"max_tokens": 1}}
        first = run(make_job(tmp_path, rows, [remote("far", double.base_url)], **keys))
        assert (first.truncated, first.served, dict(first.other_models)) == (4, 4, {"other-7b": 4})
        job = make_job(tmp_path, rows, [remote("far", double.base_url, placement={"zdr": True})], **keys)
        second = run(job)
    assert "\nStart 2, round 1, lot s2-" in render_text(explain_request(job.ledger, "q4"))
    assert (second.truncated, second.served, dict(second.other_models)) == (6, 6, {"other-7b": 6})
    assert [pool.other_model for pool in second.pools] == [6]
    assert second.cost > first.cost > Decimal(0)


def test_reports_that_cannot_be_true_cost_a_pool_its_next_lots(tmp_path: Path) -> None:
    """A pool that reports more output than we count, and one that names another model, are flagged in the ledger and
    bid with doubt in the next run; an honest one does not."""
    rows = prompts(36)
    operators = ("cloud", "community", "datacenter")
    asked = [json.dumps({"operators": [operators[n % 3]]}) for n in range(36)]
    rows = rows.append_column("placement", pa.array(asked))
    tokenizer = Tokenizer.from_file(str(Path(tiny_model()) / "tokenizer.json"))
    counted = {"count_tokens": lambda text: len(tokenizer.encode(text, add_special_tokens=False))}
    with (
        ChaosDouble(["tiny"], {"over_report": 1.0}, **counted) as inflated,
        ChaosDouble(["tiny"], {"other_model": 1.0}, **counted) as swapped,
        ChaosDouble(["tiny"], **counted) as honest,
    ):
        doubles = {"inflated": inflated, "swapped": swapped, "honest": honest}
        pools = [
            remote(name, double.base_url, placement={"operator": operator})
            for (name, double), operator in zip(doubles.items(), operators, strict=True)
        ]
        keys: dict[str, Any] = {"models": {"tiny": {"source": tiny_model()}}, "auction": {"rounds": 1}}
        run(make_job(tmp_path, rows, pools, **keys))
        with open_ledger(str(tmp_path / "ledger")) as ledger:
            told = {row["pool"]: row for row in run_query(ledger, "FROM reconciliation").to_pylist()}
        later = make_job(tmp_path, rows, pools, name="later", **keys)
        run(later)
    assert {name: row["flagged"] for name, row in told.items()} == {"inflated": True, "swapped": True, "honest": False}
    assert told["inflated"]["output_tokens_off"] >= 12
    assert told["honest"]["output_tokens_off"] == told["swapped"]["output_tokens_off"] == 0
    assert {name: row["other_model"] for name, row in told.items()} == {"inflated": 0, "swapped": 12, "honest": 0}
    bids = [row for row in written(later).rows("bids") if row["eligible"]]
    doubt = {row["pool"]: row["audit_cost"] / row["expected_cost"] for row in bids}
    assert doubt == {"inflated": 1, "swapped": 1, "honest": 0}


def test_a_refused_key_is_told_once_and_without_made_up_tokens(tmp_path: Path) -> None:
    """Why the pool is down stands in one line; an attempt without usage has no question marks for figures."""
    with EndpointDouble(["tiny"], api_key="another") as closed:
        job = make_job(tmp_path, prompts(1), [remote("far", closed.base_url)], auction={"rounds": 1})
        summary = run(job)
    said = f"pool far at {closed.host} is down: 401: Incorrect API key provided."
    assert summary.down == written(job).manifest["down"] == {"far": said}
    assert f"\ndown          {said}\n" in summary_text(summary)
    story = render_text(explain_request(job.ledger, "q0"))
    assert "  error: auth_funds, HTTP 401, Incorrect API key provided.\n  tokens: none reported\n" in story


def azure(name: str, base_url: str, **keys: Any) -> dict[str, Any]:
    """A pool whose answers name their region."""
    return remote(name, base_url, profile="azure", api_key_env="TOLD_KEY", **keys)


def test_answers_from_elsewhere_are_failures_and_the_pool_gets_no_more_of_what_is_restricted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are booked with their usage and where they came from; another pool serves the requests; rows that may go
    anywhere may come back to it in the next round."""
    monkeypatch.setenv("TOLD_KEY", "some-key")
    rows = prompts(60)
    asked = ['{"jurisdictions":["EEA"]}', None]
    rows = rows.append_column("placement", pa.array([asked[n % 2] for n in range(60)]))
    with (
        EndpointDouble(["tiny"], Reply(headers={"x-ms-region": "East US"})) as liar,
        EndpointDouble(["tiny"], Reply(headers={"x-ms-region": "Sweden Central"})) as honest,
    ):
        pools = [
            azure("liar", liar.base_url, price={"input": "0.01", "output": "0.01"}, placement={"jurisdiction": "DE"}),
            azure("honest", honest.base_url, placement={"jurisdiction": "EU", "data_zone": "EEA"}),
        ]
        job = make_job(tmp_path, rows, pools, auction={"rounds": 3})
        summary = run(job)
    found = written(job)
    check_conserved(found, 60)
    assert (summary.status, summary.served) == ("complete", 60)
    restricted = {f"q{n}" for n in range(0, 60, 2)}
    astray = [row for row in found.attempts if row["error_class"] == "policy"]
    assert 0 < len(astray) <= 8
    for row in astray:
        assert (row["pool"], row["status"], row["jurisdiction"]) == ("liar", "failed", "US")
        assert row["error_message"] == "the answer says that it was processed in US, and the pool declares DE"
        assert row["input_tokens"] > 0
    charged = {row["attempt_id"] for row in found.rows("charges") if row["cost"] > 0}
    assert {row["attempt_id"] for row in astray} <= charged
    by_pool = {(row["pool"], row["jurisdiction"]) for row in found.attempts if row["status"] == "ok"}
    assert by_pool <= {("honest", "SE"), ("liar", "US")}
    assert restricted <= {row["request_id"] for row in found.attempts if row["pool"] == "honest"}
    assert all(row["request_id"] not in restricted for row in found.attempts if row["jurisdiction"] == "US"
               and row["status"] == "ok")  # fmt: skip
    later = [row for row in found.rows("bids") if row["round"] > 1 and row["pool"] == "liar"]
    assert all(not row["eligible"] for row in later if row["reject_reason"] == "placement:jurisdiction (undeclared)")
    # Where a prompt went that was not to go there, the ledger says so for good.
    failed = [check.name for check in verify_ledger(job.ledger).checks if check.failed]
    assert failed == (["attempts.jurisdiction"] if {row["request_id"] for row in astray} & restricted else [])


def test_a_pool_alone_is_not_left_without_what_may_go_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What restricts nothing is asked of it again, its label being void; what may not go there ends for want of a
    pool, and a later start tries it where a pool has come."""
    monkeypatch.setenv("TOLD_KEY", "some-key")
    rows = prompts(8).append_column("placement", pa.array(['{"jurisdictions":["DE"]}', None] * 4))
    with EndpointDouble(["tiny"], Reply(headers={"x-ms-region": "eastus2"})) as liar:
        only = azure("liar", liar.base_url, placement={"jurisdiction": "DE"})
        job = make_job(tmp_path, rows, [only], auction={"rounds": 2})
        first = run(job)
        assert (first.served, dict(first.dead)) == (4, {"no_eligible_pool": 4})
        with EndpointDouble(["tiny"]) as other:
            pools = [remote("other", other.base_url, placement={"jurisdiction": "DE"})]
            second = run(make_job(tmp_path, rows, pools, auction={"rounds": 2}))
    assert (second.served, second.status) == (8, "complete")


def test_a_later_start_does_not_ask_a_pool_again_that_answered_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was refused nor what is new goes there, until the pools file says something else of the pool."""
    monkeypatch.setenv("TOLD_KEY", "some-key")
    asked = pa.array(['{"jurisdictions":["EEA"]}'] * 12)
    with EndpointDouble(["tiny"], Reply(headers={"x-ms-region": "eastus2"})) as liar:

        def start(number: int, rows: int, jurisdiction: str) -> tuple[bool, set[str | None], set[str | None]]:
            """Whether a request went there, and why the pool did not bid in the first round and in the second."""
            before = len(liar.requests)
            pool = azure("liar", liar.base_url, placement={"jurisdiction": jurisdiction})
            job = make_job(tmp_path, prompts(rows).append_column("placement", asked[:rows]), [pool])
            assert run(job).served == 0
            mine = [bid for bid in written(job).rows("bids") if bid["lot_id"].startswith(f"s{number}-")]
            why = ({bid["reject_reason"] for bid in mine if bid["round"] == round_} for round_ in (1, 2))
            return len(liar.requests) > before, *why

        void = {"placement:jurisdiction (undeclared)"}
        assert start(1, 8, "DE") == (True, {None}, void)
        assert start(2, 12, "DE")[:2] == (False, void)
        assert start(3, 12, "FR")[:2] == (True, {None})


def test_nothing_is_compared_where_nothing_is_declared_or_said() -> None:
    """A pool that declares nothing, one that may be anywhere, a region nobody knows and a silent answer all pass."""
    told = pa.RecordBatch.from_pylist(
        [{"tag": 1, "status": "ok", "output": "x", "jurisdiction": place} for place in ("US", "SE", None)],
        schema=pa.schema([pa.field(each.name, each.type) for each in RESULT_SCHEMA]),
    )
    for labels in ({}, {"jurisdiction": None}, {"jurisdiction": "GLOBAL"}, {"operator": "cloud"}):
        assert check_regions(told, labels) == (told, None)
    for labels in ({"jurisdiction": "EU"}, {"data_zone": "EU"}, {"jurisdiction": "GLOBAL", "data_zone": "SE"}):
        checked, first = check_regions(told, labels)
        assert checked.column("status").to_pylist() == ["failed", "ok", "ok"]
        assert checked.column("output").to_pylist() == [None, "x", "x"]
        assert first == checked.column("error_message")[0].as_py()
    profile = PROFILES["azure"]
    body = b'{"choices": [{"message": {"content": "x"}}]}'
    for header, country in (("East US 2", "US"), ("swedencentral", "SE"), ("Mars North", None), ("", None)):
        outcome = read_answer(
            profile, 200, {"x-ms-region": header}, body, chat=True, n=1, prompt_text="", secrets=(),
            now=lambda: datetime.now(UTC),
        )  # fmt: skip
        assert outcome.jurisdiction == country
