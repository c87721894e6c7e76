"""The examples other than the demo, run as a reader would run them, with stand-ins in place of engines."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.pipelines.job import Job

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "examples/compose"


def compose(home: Path) -> str:
    command = [sys.executable, "examples/compose/pipeline.py", "--rehearse"]
    places = [f"--set=output={home}/out", f"--set=ledger={home}/ledger"]
    ended = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_composed_pipeline_writes_outputs_ledger_and_a_report_of_its_own(tmp_path: Path) -> None:
    """The hand-written pipeline answers every review, books it, and its own step counts every answer."""
    report = Path(compose(tmp_path).strip().rpartition(" ")[2])
    with report.open(newline="") as file:
        counted = {row["label"]: int(row["answers"]) for row in csv.DictReader(file)}
    assert sum(counted.values()) == 20
    assert (report.parent / "_SUCCESS").exists()
    sql = "SELECT count(*) AS served FROM requests WHERE status = 'served'"
    assert query_ledger(f"{tmp_path}/ledger", sql, rehearsals=True).to_pylist() == [{"served": 20}]

    assert "nothing to do" in compose(tmp_path)


def test_example_jobs_and_their_pools_are_valid() -> None:
    """Every job file of the examples reads without an error."""
    jobs = sorted(ROOT.glob("examples/*/job.yaml"))
    assert {path.parent.name for path in jobs} >= {"compose", "demo"}
    for path in jobs:
        assert Job.from_yaml(path).pools
