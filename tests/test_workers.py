"""Beam workers in processes of their own: the same run, nothing but references between them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from small_jobs import prompts, remote, write_job

from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run

TWO_PROCESSES = ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def answers(home: Path, beam_options: list[str]) -> list[dict[str, object]]:
    """What a rehearsal answers, by request id: the model's part of each output row, not where or when it was made."""
    rows = prompts(60)
    path = write_job(home, rows.slice(0, 30), [remote("one"), remote("two")])
    pq.write_table(rows.slice(30), home / "in" / "b.parquet")
    summary = run(Job.from_yaml(path), beam_options, rehearse=True)
    assert (summary.status, summary.served) == ("complete", 60)
    files = sorted((home / "out").glob("**/outputs/part-*.parquet"))
    table: pa.Table = pads.dataset(files).to_table(columns=["request_id", "output", "finish_reason", "output_tokens"])
    found: list[dict[str, object]] = table.sort_by("request_id").to_pylist()
    return found


def test_two_worker_processes_answer_as_one(tmp_path: Path) -> None:
    """A run over two worker processes gives every request the answer that a run in this process gives it."""
    one = answers(tmp_path / "one", [])
    two = answers(tmp_path / "two", TWO_PROCESSES)
    assert one == two
    assert len({row["request_id"] for row in one}) == 60
