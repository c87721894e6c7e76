"""WriteLedger: attempts, charges and the market's tables, and at the very end the manifests that make them count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsList, PCollection

from bidbeam.transforms.booking import book, segment_groups
from bidbeam.transforms.compaction import is_kept
from bidbeam.transforms.failures import reported
from bidbeam.transforms.finishing import RunRecord, finish
from bidbeam.transforms.history import earlier_segments
from bidbeam.transforms.journal import SegmentRef, segment_ref
from bidbeam.transforms.merging import RangeRef
from bidbeam.transforms.plan_lots import Plan
from bidbeam.transforms.publishing import Published
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.side_inputs import listed


class WriteLedger(beam.PTransform[Any, Any]):
    """PCollection of ``SegmentRef`` (of all rounds) to one element, the run's manifest as a dict; writes it last.

    ``published`` is what WriteOutputs gave. Until the manifest stands, readers see nothing of the run.
    """

    def __init__(self, context: RunContext, record: RunRecord, plan: Plan, published: PCollection[Any]) -> None:
        super().__init__()
        self._context, self._record, self._plan, self._published = context, record, plan, published

    def expand(self, segments: PCollection[Any]) -> PCollection[Any]:
        pipeline = segments.pipeline
        booked = (
            pipeline
            | "Close the books" >> beam.Create([0], reshuffle=False)
            | "Group segments" >> beam.ParDo(_Group(self._context), listed(segments, "All segments"))
            | "Spread groups" >> beam.Reshuffle()
            | "Book attempts and charges" >> beam.ParDo(_Book(self._context))
        )
        manifest: PCollection[Any] = (
            pipeline
            | "End of the run" >> beam.Create([0], reshuffle=False)
            | "Write manifests"
            >> beam.ParDo(
                _Finish(self._context, self._record),
                listed(self._published, "All published"),
                AsList(booked),
                self._plan.all_ranges,
            )
        )
        return manifest


class _Group(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, _: int, segments: Sequence[SegmentRef]) -> Iterator[tuple[str, tuple[SegmentRef, ...]]]:
        with reported(self._context):
            earlier = [
                segment_ref(self._context.journal, name)
                for name in earlier_segments(self._context)
                if not is_kept(name)
            ]
            yield from segment_groups([*earlier, *segments])


class _Book(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, element: tuple[str, tuple[SegmentRef, ...]]) -> Iterator[Published]:
        with reported(self._context):
            yield book(self._context, *element)


class _Finish(beam.DoFn):
    def __init__(self, context: RunContext, record: RunRecord) -> None:
        self._context, self._record = context, record

    def process(
        self, _: int, published: Sequence[Published], booked: Sequence[Published], ranges: Sequence[RangeRef]
    ) -> Iterator[dict[str, Any]]:
        with reported(self._context):
            ideal = sum(ref.ideal_cached_tokens for ref in ranges)
            yield finish(self._context, self._record, published, booked, ideal)
