"""Quotes of runs that were begun, or are done: what is still to be asked, counted as the run counts it."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import DAY, PRICE, by_the_hour, make_job, prompts, remote, write_job, written
from test_resume import fail_at
from tiny_model import tiny_model

from bidbeam.connectors.doubles import NO_USAGE, EndpointDouble
from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.pipelines import quote as quoting
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.quote import quote_job
from bidbeam.pipelines.report_queries import SAVINGS
from bidbeam.pipelines.run import run
from bidbeam.pipelines.show import quote_text
from bidbeam.transforms import write_outputs
from bidbeam.transforms.reputation import Reputation

pytestmark = pytest.mark.timeout(60)

LIST = {"name": "list", "input": "2", "cached_input": "0.5", "output": "8", "per": "1M tokens"}


def mixed() -> pa.Table:
    """Nine good rows, of which four share one answer and two another; two with an id that is taken; two unreadable."""
    return pa.table(
        {
            "id": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "a", "b", "y", "z"],
            "prompt": ["same"] * 4 + ["like"] * 2 + ["one", "two", "three", "late", "later", None, None],
        }
    )


def files_of(home: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(home.rglob("*")) if p.is_file()}


def told(job: Job) -> tuple[Decimal, Decimal, Decimal]:
    """The baseline's cost in the view and in the report, and what was paid in the report."""
    (view,) = query_ledger(job.ledger, "SELECT sum(baseline_cost) AS b FROM savings").to_pylist()
    (report,) = query_ledger(job.ledger, SAVINGS).to_pylist()
    return view["b"], report["baseline_cost"], report["cost"]


def test_rows_and_savings_are_counted_as_the_run_counts_them(tmp_path: Path) -> None:
    """Invalid, repeated and shared rows and the requests that are sent: quote and run have the same numbers. A shared
    answer is saved as often as it is used: summary, view, report and quote agree, also when a later start counts by
    another list."""
    with EndpointDouble(["tiny"]) as double:
        pools = [remote("near", double.base_url)]
        job = make_job(tmp_path, mixed(), pools, baseline=LIST)
        quote = quote_job(job)
        summary = run(job)
        asked = len(double.requests)
        found = written(job)
        pq.write_table(prompts(2, start=70), tmp_path / "in" / "b.parquet")
        again = Job.from_yaml(write_job(tmp_path, None, pools, baseline={**LIST, "output": "80"}), run_date=DAY)
        first = told(job)
        second = run(again)
    assert (quote.requests, quote.dead_invalid) == (13, 4) == (summary.requests, summary.dead["invalid"])
    assert quote.shared == 4 == sum(row["shared_with"] is not None for row in found.rows("requests"))
    assert quote.to_ask == 5 == asked
    assert (quote.settled, quote.spent) == (0, 0)
    assert quote.ideal_cached_tokens == summary.ideal_cached_tokens

    assert first == (summary.baseline_cost, summary.baseline_cost, summary.cost)
    times = {"a": 4, "e": 2}
    assert summary.baseline_cost == sum(
        times.get(row["request_id"], 1)
        * (row["input_tokens"] * 2 + row["output_tokens"] * 8 - (row["cached_tokens"] or 0) * Decimal("1.5"))
        / 1_000_000
        for row in found.attempts
    )
    # Of the five requests the last one's prompt is a token longer. Nothing is cached, and answers are of full length.
    tokens = quote.input_tokens + 4 * (quote.input_tokens // 5)
    assert quote.baseline_cost == (tokens * 2 + 9 * 8 * 8) / Decimal(1_000_000)
    assert second.served == 11
    assert told(again) == (second.baseline_cost, second.baseline_cost, second.cost)
    assert second.baseline_cost is not None
    assert second.baseline_cost > 5 * (summary.baseline_cost or 0)


def test_rows_that_nobody_takes_are_dead_as_often_as_they_are_there(tmp_path: Path) -> None:
    """Those that share an answer are unserved too, where nobody gives it."""
    job = make_job(tmp_path, mixed(), [remote("near")], budget={"max_cost": "0"})
    assert dict(quote_job(job).unserved) == {"budget": 9} == {k: n for k, n in run(job).dead.items() if k != "invalid"}


def test_a_quote_prices_what_is_still_to_be_asked(tmp_path: Path) -> None:
    """Of a run that is done nothing; of one with new rows these alone, with what is left of its budget; and it leaves
    every file as it was."""
    with EndpointDouble(["tiny"]) as double:
        terms: dict[str, Any] = {"pools": [remote("near", double.base_url)], "budget": {"max_cost": "1"}}
        job = make_job(tmp_path, prompts(30), **terms)
        done = run(job)
        finished = quote_job(job)
        assert (finished.to_ask, finished.settled, finished.expected_cost) == (0, 30, 0)
        assert (finished.worst_case_cost, finished.spent) == (0, done.cost)
        assert "30; nothing to do: every request of this run is settled" in quote_text(finished)
        pq.write_table(prompts(6, start=100), tmp_path / "in" / "b.parquet")
        job = Job.from_yaml(tmp_path / "job.yaml", run_date=DAY)
        before, asked = files_of(tmp_path), len(double.requests)
        rest = quote_job(job)
        assert files_of(tmp_path) == before
        assert len(double.requests) == asked
        assert (rest.requests, rest.settled, rest.to_ask, rest.spent) == (36, 30, 6, done.cost)
        assert f"36, 30 settled by earlier starts for {usd(done.cost)}, and not asked again" in quote_text(rest)
        assert rest.expected_cost > 0
        assert rest.worst_case_cost is not None
        assert rest.worst_case_cost <= 1 - done.cost
        bill = run(job)
        assert len(double.requests) == asked + rest.to_ask
    assert 0 < bill.cost - done.cost <= rest.worst_case_cost


def test_a_quote_reads_the_journal_of_a_run_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in segments is settled and spent, although the run has no manifest yet."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(12), [remote("near", double.base_url)])
        mend = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        mend()
        pq.write_table(prompts(3, start=50), tmp_path / "in" / "b.parquet")
        job = Job.from_yaml(tmp_path / "job.yaml", run_date=DAY)
        before = files_of(tmp_path)
        quote = quote_job(job)
        assert files_of(tmp_path) == before
        assert (quote.requests, quote.settled, quote.to_ask) == (15, 12, 3)
        summary = run(job)
        assert len(double.requests) == 15
        new = {f"q{n}" for n in range(50, 53)}
        fresh = sum(row["cost"] for row in written(job).rows("charges") if row["request_id"] in new)
        assert quote.spent == summary.cost - fresh > 0


def test_estimated_tokens_are_compared_with_nothing(tmp_path: Path) -> None:
    """Where a provider reports no usage, neither summary nor view claims a saving."""
    with EndpointDouble(["tiny"], lambda _: NO_USAGE) as double:
        job = make_job(tmp_path, prompts(3), [remote("near", double.base_url)], baseline=LIST)
        summary = run(job)
    assert summary.served == 3
    found = query_ledger(job.ledger, "SELECT usage_source, baseline_cost FROM savings JOIN cost_per_request"
                         " USING (run_id, request_id)").to_pylist()  # fmt: skip
    assert {(row["usage_source"], row["baseline_cost"]) for row in found} == {("estimate", None)}
    assert summary.baseline_cost is None


def test_a_first_quote_says_that_an_engines_loading_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows yet how long an engine of ours loads; once a run has paid for it, that is in the cost instead."""
    terms: dict[str, Any] = {"models": {"tiny": {"source": tiny_model()}}, "budget": {"max_cost": "1"}}
    dear = remote("far", price={"input": "900", "output": "900"})
    job = make_job(tmp_path, prompts(4), [by_the_hour("own"), dear], **terms)
    first = quote_job(job)
    assert first.overhead_unknown == ("own",)
    assert "how long own will load and idle: no run has shown it" in quote_text(first)
    monkeypatch.setattr(quoting, "known_pools", lambda *_: {("own", "tiny"): Reputation(overhead_s=3600.0)})
    later = quote_job(job)
    assert later.overhead_unknown == ()
    assert "load and idle" not in quote_text(later)
    assert later.expected_cost == pytest.approx(first.expected_cost + Decimal("0.71"))


def test_what_fails_is_quoted_with_its_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter fails at half the price of an answer; of that a fifth is answered here in the end, the rest by the
    runner-up at three times the price."""
    dear = {meter: str(3 * Decimal(price)) for meter, price in PRICE.items()}
    job = make_job(tmp_path, prompts(4), [remote("near"), remote("far", price=dear)])
    sure = quote_job(job).expected_cost
    fails = Reputation(successes=75.0, failures=25.0, failed_cost=0.5, retried_here=0.2)
    monkeypatch.setattr(quoting, "known_pools", lambda *_: {("near", "tiny"): fails})
    quote = quote_job(job)
    assert [pool.lots for pool in quote.pools] == [1, 0]
    assert quote.expected_cost == pytest.approx(sure * Decimal("1.525"))
