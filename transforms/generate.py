"""Generate: shifts to segments of the journal, and what they could not serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import PCollection, TaggedOutput

from bidbeam.transforms.failures import reported
from bidbeam.transforms.journal import SegmentRef
from bidbeam.transforms.plan_lots import Plan
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.shift import Shift
from bidbeam.transforms.shift_task import ShiftTask
from bidbeam.transforms.spilling import SpillRef

_UNSERVED = "unserved"


class Answers(NamedTuple):
    """What Generate gives."""

    segments: PCollection[Any]
    """``SegmentRef``: where answers, attempts and charges are."""
    unserved: PCollection[Any]
    """``pa.Table`` of LOT: what the next round auctions again."""


class Generate(beam.PTransform[Any, Any]):
    """PCollection of ``ShiftTask`` to ``Answers``. One request failing never raises; a model that does not load does.

    ``accelerator`` becomes the stage's resource hint on runners that honour one.
    """

    def __init__(self, context: RunContext, plan: Plan, accelerator: str | None = None) -> None:
        super().__init__()
        self._context, self._plan, self._accelerator = context, plan, accelerator

    def expand(self, tasks: PCollection[Any]) -> Answers:
        work = beam.ParDo(_RunShift(self._context), self._plan.all_spills).with_outputs(_UNSERVED, main="segments")
        if self._accelerator is not None:
            work = work.with_resource_hints(accelerator=self._accelerator)
        done = tasks | "Spread shifts" >> beam.Reshuffle() | "Run shifts" >> work
        return Answers(done.segments, done[_UNSERVED])


class _RunShift(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, task: ShiftTask, spills: Sequence[SpillRef]) -> Iterator[SegmentRef | TaggedOutput[str, Any]]:
        with reported(self._context):
            for result in Shift(task, self._context, spills).run():
                if result.segment is not None:
                    yield result.segment
                unserved: pa.Table | None = result.unserved
                if unserved is not None and unserved.num_rows:
                    yield TaggedOutput(_UNSERVED, unserved)
