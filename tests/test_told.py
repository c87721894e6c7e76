"""What answers tell besides their text: cut off, of another model, from elsewhere; counted in whole runs."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

from small_jobs import check_conserved, make_job, prompts, remote, written

from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.connectors.ledger_reader import open_ledger, run_query
from bidbeam.pipelines.jsonable import jsonable
from bidbeam.pipelines.run import run
from bidbeam.pipelines.show import summary_text


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
    with open_ledger(job.ledger) as ledger:
        [row] = run_query(ledger, "FROM reconciliation").to_pylist()
    assert (row["compared_model"], row["other_model"], row["other_models"]) == (24, 8, "other-7b")


def test_counts_go_over_all_starts(tmp_path: Path) -> None:
    """A second start counts the answers of the first again, and its own once; what was paid for is said in full."""
    full = True

    def answers(seen: Seen) -> Reply:
        turned_away = full and any(f"item {n} " in seen.prompt for n in (4, 5))
        return Reply.error(503, "full") if turned_away else Reply(merge={"model": "other-7b"})

    with EndpointDouble(["tiny"], answers) as double:
        job = make_job(tmp_path, prompts(6), [remote("far", double.base_url)], sampling={"max_tokens": 1})
        first = run(job)
        assert (first.truncated, first.served, dict(first.other_models)) == (4, 4, {"other-7b": 4})
        full = False
        second = run(job)
    assert (second.truncated, second.served, dict(second.other_models)) == (6, 6, {"other-7b": 6})
    assert [pool.other_model for pool in second.pools] == [6]
    assert second.cost > first.cost > Decimal(0)
