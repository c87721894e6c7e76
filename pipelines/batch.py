"""The batch pipeline: the whole graph of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from bidbeam.connectors.inputs import Split
from bidbeam.transforms.bid import Bid
from bidbeam.transforms.finishing import RunRecord
from bidbeam.transforms.generate import Generate
from bidbeam.transforms.plan_lots import PlanLots
from bidbeam.transforms.read_prompts import ReadPrompts
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.write_ledger import WriteLedger
from bidbeam.transforms.write_outputs import WriteOutputs


def build(pipeline: beam.Pipeline, context: RunContext, splits: Sequence[Split], record: RunRecord) -> PCollection[Any]:
    """read, plan, then bid and generate round after round, then publish; gives the run's manifest."""
    plan = pipeline | "Read" >> ReadPrompts(splits) | "Plan" >> PlanLots(context, splits)
    lots = plan.lots
    done: list[PCollection[Any]] = []
    refused: list[PCollection[Any]] = []
    for number in range(1, context.rounds + 1):
        spent = tuple(done)
        market = lots | f"Bid {number}" >> Bid(context, number, spent)
        answers = market.shifts | f"Generate {number}" >> Generate(context, plan)
        done.append(answers.segments)
        refused.append(market.refused)
        lots = (market.waiting, answers.unserved) | f"Left after {number}" >> beam.Flatten()
    segments = done | "Journal" >> beam.Flatten()
    unserved = (*refused, lots) | "Unserved" >> beam.Flatten()
    published = segments | "Publish" >> WriteOutputs(context, plan, unserved)
    manifest: PCollection[Any] = segments | "Book" >> WriteLedger(context, record, plan, published)
    return manifest
