"""The graph of a run: what is handed to steps as a list is handed over whole, on every runner."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2 as api
from apache_beam.portability.common_urns import primitives

from bidbeam.pipelines.batch import build
from bidbeam.pipelines.begin import begin
from bidbeam.pipelines.job import Job

JOB = """
name: graph
input: rows.parquet
output: out
ledger: ledger
model: m
pools:
  - {name: p, kind: openai, base_url: "http://127.0.0.1:9/v1", models: [m], price: {request: "0.01"}}
"""


def inputs_of(proto: api.Pipeline) -> tuple[set[str], set[str]]:
    """The PCollections that are main inputs of steps, and those that are side inputs."""
    main: set[str] = set()
    side: set[str] = set()
    for transform in proto.components.transforms.values():
        if transform.subtransforms:
            continue
        sides: set[str] = set()
        if transform.spec.urn == primitives.PAR_DO.urn:
            sides = set(api.ParDoPayload.FromString(transform.spec.payload).side_inputs)
        for name, pcollection in transform.inputs.items():
            (side if name in sides else main).add(pcollection)
    return main, side


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_side_inputs_are_nobodys_main_input(tmp_path: Path, rounds: int) -> None:
    """No PCollection of a run's graph is both a main and a side input, which FnApiRunner would now and then empty."""
    pq.write_table(pa.table({"prompt": ["one", "two"]}), tmp_path / "rows.parquet")
    path = tmp_path / "job.yaml"
    path.write_text(f"{JOB}auction: {{rounds: {rounds}}}\n")
    begun = begin(Job.from_yaml(path), rehearse=True, warm=False)
    assert begun.lease is not None
    begun.lease.release()
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    build(pipeline, begun.context, begun.plan.splits, begun.record)

    main, side = inputs_of(pipeline.to_runner_api())

    assert len(side) > rounds
    assert not main & side
