"""WriteOutputs: settled ranges become output files, dead letters and the ledger's rows of them, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import PCollection

from bidbeam.transforms.failures import reported
from bidbeam.transforms.history import history_of
from bidbeam.transforms.journal import SegmentRef
from bidbeam.transforms.merging import RangeRef
from bidbeam.transforms.plan_lots import Plan
from bidbeam.transforms.published import Published
from bidbeam.transforms.publishing import publish_dead_split, publish_range
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.side_inputs import listed
from bidbeam.transforms.spilling import SpillRef


class WriteOutputs(beam.PTransform[Any, Any]):
    """PCollection of ``SegmentRef`` (of all rounds) to a PCollection of ``Published``, one per written piece.

    ``unserved`` are the LOT tables that no round could serve: they end as dead letters. Nothing is written before all
    segments are there.
    """

    def __init__(self, context: RunContext, plan: Plan, unserved: PCollection[Any]) -> None:
        super().__init__()
        self._context, self._plan, self._unserved = context, plan, unserved

    def expand(self, segments: PCollection[Any]) -> PCollection[Any]:
        all_segments = listed(segments, "All segments")
        ranges = (
            self._plan.ranges
            | "Spread ranges" >> beam.Reshuffle()
            | "Write ranges"
            >> beam.ParDo(
                _WriteRange(self._context), self._plan.all_spills, all_segments, listed(self._unserved, "All unserved")
            )
        )
        # The segments hold these back too: dead letters stand only once everything is settled.
        unread = self._plan.spills | "Write unreadable rows" >> beam.ParDo(_WriteDeadRows(self._context), all_segments)
        published: PCollection[Any] = (ranges, unread) | "Published" >> beam.Flatten()
        return published


class _WriteRange(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(
        self, ref: RangeRef, spills: Sequence[SpillRef], segments: Sequence[SegmentRef], unserved: Sequence[pa.Table]
    ) -> Iterator[Published]:
        with reported(self._context):
            history = history_of(self._context, ref.range)
            ordered = sorted(segments, key=lambda segment: segment.name)
            yield publish_range(self._context, spills, ref.range, ordered, history, unserved)


class _WriteDeadRows(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, spill: SpillRef, _segments: Sequence[SegmentRef]) -> Iterator[Published]:
        with reported(self._context):
            if spill.dead:
                yield publish_dead_split(self._context, spill)
