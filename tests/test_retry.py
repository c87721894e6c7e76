"""``run --retry-dead``: dead letters run again, with every column their rows came with."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from small_jobs import DAY, check_conserved, make_job, prompts, remote, write_job, written

from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.connectors.errors import UsageError
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.retry import retried
from bidbeam.pipelines.run import run
from bidbeam.pipelines.show import summary_text

pytestmark = pytest.mark.timeout(60)


def refuse(numbers: set[int]) -> object:
    """Answers 400 to the items of these numbers."""

    def behaviour(seen: Seen) -> Reply:
        text = seen.body["messages"][0]["content"]
        return Reply.error(400, "no") if any(f"item {n} of" in text for n in numbers) else Reply()

    return behaviour


def test_dead_letters_run_again_as_a_run_with_a_parent(tmp_path: Path) -> None:
    """Exactly they are asked again; their outputs have the input's own columns, renamed ones under their own names."""
    rows = prompts(12)
    rows = rows.append_column("reason", pa.array([f"why {n}" for n in range(12)]))
    rows = rows.append_column("message", pa.array([[n] for n in range(12)]))
    with EndpointDouble(["tiny"], refuse({3, 5})) as double:
        job = make_job(tmp_path, rows, [remote("near", double.base_url)])
        first = run(job)
        assert (first.served, first.dead) == (10, {"refused": 2})
    assert {"reason_in", "message_in"} <= set(written(job).dead.column_names)
    with EndpointDouble(["tiny"]) as double:
        write_job(tmp_path, None, [remote("near", double.base_url)])
        again = retried(job.from_yaml(tmp_path / "job.yaml", run_date=DAY), first.run_id)
        second = run(again)
        assert (second.served, dict(second.dead)) == (2, {})
        assert len(double.requests) == 2
        # The same call is the same run, which has nothing left to do.
        assert run(retried(job, first.run_id)).status == "nothing_to_do"
    found = written(again)
    check_conserved(found, 2)
    # Each says where the other is.
    told = [line.split(maxsplit=1) for line in summary_text(first).splitlines()]
    assert ["letters", f"{first.output_url}/dead_letters"] in told
    assert f"run again     bidbeam run JOB --retry-dead {first.run_id}" in summary_text(first)
    assert ["parent", f"{first.run_id}, whose dead letters these were"] in [
        line.split(maxsplit=1) for line in summary_text(second).splitlines()
    ]
    assert found.rows("runs")[0]["parent_run_id"] == first.run_id
    assert found.rows("runs")[0]["run_id"] != first.run_id
    outputs = sorted(found.outputs.to_pylist(), key=lambda row: row["id"])
    # Where they stood in the parent's input, not where its journal keeps them.
    stood = {row["request_id"]: (row["source_file"], row["source_row"]) for row in found.rows("requests")}
    assert stood == {f"q{n}": (str(tmp_path / "in" / "a.parquet"), n) for n in (3, 5)}
    assert [(row["id"], row["reason"], row["message"]) for row in outputs] == [
        ("q3", "why 3", [3]),
        ("q5", "why 5", [5]),
    ]


def test_what_cannot_be_retried_is_said(tmp_path: Path) -> None:
    """A run that is not there is told with the nearest one, and so is one that has no dead letters."""
    job = make_job(tmp_path, prompts(3), [remote("near")])
    summary = run(job, rehearse=True)
    with pytest.raises(UsageError, match="has no dead letters"):
        retried(job, summary.run_id, rehearse=True)
    with pytest.raises(UsageError, match=f"did you mean {summary.run_id}"):
        retried(job, summary.run_id[:-1] + "x", rehearse=True)
    with pytest.raises(UsageError, match="holds no run"):
        retried(job, "../../etc", rehearse=True)
    with pytest.raises(UsageError, match="holds no run"):
        retried(job, f"../{summary.run_id}", rehearse=True)


def test_the_command_line_retries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``bidbeam run JOB --retry-dead RUN_ID`` runs and ends like any run; a wrong id ends with 2."""
    with EndpointDouble(["tiny"], refuse({1})) as double:
        path = str(write_job(tmp_path, prompts(4), [remote("near", double.base_url)]))
        assert invoke(["run", path, "--run-date", str(DAY), "--quiet", "--json"]) == 3
        run_id = json.loads(capsys.readouterr().out)["run_id"]
    with EndpointDouble(["tiny"]) as double:
        write_job(tmp_path, None, [remote("near", double.base_url)])
        assert invoke(["run", path, "--retry-dead", run_id, "--quiet"]) == 0
        assert len(double.requests) == 1
    assert invoke(["run", path, "--retry-dead", "small-2026-01-02-00000000", "--quiet"]) == 2
    assert run_id in capsys.readouterr().err
