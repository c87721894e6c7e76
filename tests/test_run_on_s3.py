"""A whole run on an object store: input, output, journal and ledger on a server that speaks S3."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from s3_server import S3Server, s3  # noqa: F401 # the fixture

from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.connectors.store import Store
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run

JOB = """
name: remote
input: s3://{bucket}/in/*.parquet
output: s3://{bucket}/out/
ledger: s3://{bucket}/ledger/
model: m
prompt: {{column: prompt}}
sampling: {{max_tokens: 16, temperature: 0}}
storage: {{s3: {options}}}
models: {{m: {{}}}}
pools:
  - name: pool
    kind: openai
    base_url: http://127.0.0.1:9/v1
    models: [m]
    price: {{input: "0.10", output: "0.40", per: 1M tokens, currency: USD}}
"""


def test_a_run_reads_from_and_writes_to_an_object_store_alone(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    """A job whose input, output and ledger are S3 URLs is served, counted and finished there, and not run twice."""
    bucket = s3.bucket()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"Name number {i}." for i in range(500)]}), buffer)
    Store.at(f"s3://{bucket}/in", s3.options).create("a.parquet", buffer.getvalue())
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(bucket=bucket, options=json.dumps(s3.options["s3"])), encoding="utf-8")
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
