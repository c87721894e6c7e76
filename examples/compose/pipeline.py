"""A Beam pipeline of one's own: Bidbeam's transforms, and a report that counts the labels.

    python examples/compose/pipeline.py [--rehearse] [BEAM OPTIONS]

With --rehearse stand-ins answer in place of the endpoints of pools.yaml, and nothing is sent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from bidbeam import Bid, Generate, Job, PlanLots, ReadPrompts, WriteLedger, WriteOutputs, begin

JOB = Path(__file__).with_name("job.yaml")
LABELS = ("praise", "complaint", "question")


def main(arguments: Sequence[str]) -> int:
    """Runs the pipeline; a run that has ended before is left as it is."""
    parser = argparse.ArgumentParser(description="Labels reviews and counts the labels.")
    parser.add_argument("--rehearse", action="store_true", help="stand-ins in place of the endpoints")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as with bidbeam run")
    ours, beam_options = parser.parse_known_args(arguments)
    job = Job.from_yaml(JOB, set=ours.set)
    with begin(job, rehearse=ours.rehearse) as begun:
        if begun.lease is None:
            print(f"nothing to do: {job.run_id} has ended")
            return 0
        context, splits = begun.context, begun.plan.splits
        report = context.run_dir.url_of("labels.csv")
        options = PipelineOptions(["--runner=FnApiRunner", *beam_options])
        with beam.Pipeline(options=options) as pipeline:
            plan = pipeline | "Read" >> ReadPrompts(splits) | "Plan" >> PlanLots(context, splits)
            market = plan.lots | "Bid" >> Bid(context, 1, ())
            answers = market.shifts | "Generate" >> Generate(context, plan)
            unserved = (market.waiting, market.refused, answers.unserved) | "Unserved" >> beam.Flatten()
            published = answers.segments | "Publish" >> WriteOutputs(context, plan, unserved)
            manifest = answers.segments | "Book" >> WriteLedger(context, begun.record, plan, published)

            # From here on it is ours: the manifest says which files hold the answers.
            _ = (
                manifest
                | "Read answers" >> beam.FlatMap(read_answers, context.run_dir)
                | "Label" >> beam.Map(label_of)
                | "Count" >> beam.combiners.Count.PerElement()
                | "To lines" >> beam.Map(lambda counted: f"{counted[0]},{counted[1]}")
                | "Write report" >> beam.io.WriteToText(report, header="label,answers", shard_name_template="")
            )
    print(f"labels counted in {report}")
    return 0


def read_answers(manifest: Mapping[str, Any], run_dir: Any) -> Iterator[str]:
    """The answers of a run, from the files that its manifest lists."""
    for part in manifest["outputs"]:
        with run_dir.open_input(part["path"]) as file:
            yield from pq.read_table(file, columns=["output"]).column("output").to_pylist()


def label_of(answer: str) -> str:
    """The label that an answer begins with; ``other`` where it is none of those asked for."""
    word = answer.strip().strip('."').lower()
    return next((label for label in LABELS if word.startswith(label)), "other")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
