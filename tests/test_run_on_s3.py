"""A whole run on an object store: input, output, journal and ledger on a server that speaks S3."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from s3_server import S3Server, s3  # noqa: F401 # the fixture

from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.connectors.store import Store
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms.journal import list_segments, read_segment

TWO_WORKERS = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")

JOB = """
name: remote
input: s3://{bucket}/in/*.parquet
output: s3://{bucket}/out/
ledger: s3://{bucket}/ledger/
model: m
prompt: {{column: prompt}}
auction: {{rounds: 1}}
sampling: {{max_tokens: 16, temperature: 0}}
storage: {{s3: {options}}}
models: {{m: {{}}}}
pools:
  - name: pool
    kind: openai
    base_url: {base_url}
    models: [m]
    capacity: {{concurrency: 4}}
    price: {{input: "0.10", output: "0.40", per: 1M tokens, currency: USD}}
"""


def written_job(server: S3Server, home: Path, rows: int, base_url: str = "http://127.0.0.1:9/v1") -> tuple[Path, str]:
    """The job's file, and the bucket that all else of it is in."""
    bucket = server.bucket()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"Name number {i}." for i in range(rows)]}), buffer, row_group_size=rows // 2)
    Store.at(f"s3://{bucket}/in", server.options).create("a.parquet", buffer.getvalue())
    file = home / "job.yaml"
    options = json.dumps(server.options["s3"])
    file.write_text(JOB.format(bucket=bucket, options=options, base_url=base_url), encoding="utf-8")
    return file, bucket


def test_a_run_reads_from_and_writes_to_an_object_store_alone(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    """A job whose input, output and ledger are S3 URLs is served, counted and finished there, and not run twice."""
    file, bucket = written_job(s3, tmp_path, 500)
    job = Job.from_yaml(file)

    summary = run(job, rehearse=True)

    assert (summary.status, summary.served) == ("complete", 500)
    run_dir = Store.at(summary.output_url, s3.options)
    manifest = json.loads(run_dir.read("_SUCCESS"))
    rows = sum(pq.read_metadata(run_dir.open_input(part["path"])).num_rows for part in manifest["outputs"])
    assert rows == 500
    sql = "SELECT attempts, cost FROM cost_by_pool"
    ledger = query_ledger(f"s3://{bucket}/ledger", sql, rehearsals=True, storage=s3.options)
    assert ledger.to_pylist() == [{"attempts": 500, "cost": summary.cost}]
    assert run(job, rehearse=True).status == "nothing_to_do"
    assert not [path.name for path in tmp_path.iterdir() if path != file]


def test_a_run_of_two_processes_that_is_killed_is_resumed_from_the_object_store(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    """Workers that write to one journal at the same time leave one that a second start goes on from: it asks again for
    nothing that stood there, and the bill is the endpoint's."""
    with EndpointDouble(["m"], Reply.slow(0.25)) as double:
        file, bucket = written_job(s3, tmp_path, 60, double.base_url)
        run_dir = Store.at(Job.from_yaml(file).output, s3.options)
        command = [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(file), "--json", "--", *TWO_WORKERS]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not (found := [entry.name for entry in run_dir.list("") if "/segments/" in entry.name]):
            assert first.poll() is None, first.communicate()
            time.sleep(0.5)
        first.kill()
        first.communicate()
        journal = run_dir.child(found[0].partition("/start-")[0])
        kept = sum(read_segment(journal, name)[0].num_rows for name in list_segments(journal))
        sent = len(double.requests)
        double._behaviour = Reply()
        assert run(Job.from_yaml(file)).served == 60
        assert 0 < kept < 60
        assert len(double.requests) - sent <= 60 - kept
        served = sum(each.prompt_tokens for each in double.served)
    sql = "SELECT status, count(*) AS n, sum(input_tokens)::BIGINT AS tokens FROM attempts GROUP BY status"
    booked = {row["status"]: row for row in query_ledger(f"s3://{bucket}/ledger", sql, storage=s3.options).to_pylist()}
    assert booked["ok"]["n"] == 60
    assert sum(row["tokens"] for row in booked.values()) >= served
    assert verify_ledger(f"s3://{bucket}/ledger", storage=s3.options).ok
