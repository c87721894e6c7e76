"""WriteLedger: attempts, charges and the market's tables, and at the very end the manifests that make them count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from bidbeam.transforms.booking import book, book_rows, book_strays, segment_groups
from bidbeam.transforms.compaction import is_kept
from bidbeam.transforms.failures import reported
from bidbeam.transforms.finishing import RunRecord, finish
from bidbeam.transforms.history import earlier_segments
from bidbeam.transforms.journal import OVERHEAD, SegmentRef, list_segments, read_rows, segment_ref
from bidbeam.transforms.merging import RangeRef
from bidbeam.transforms.plan_lots import Plan
from bidbeam.transforms.published import Published
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
        pipeline, context = segments.pipeline, self._context
        all_segments = listed(segments, "All segments")
        booked: list[PCollection[Any]] = [
            pipeline
            | "Close the books" >> beam.Create([0], reshuffle=False)
            | "Book overhead" >> beam.ParDo(_BookOverhead(context), all_segments)
        ]
        if context.has_history:
            booked.append(
                pipeline
                | "Open earlier books" >> beam.Create([0], reshuffle=False)
                # The segments hold this back too: the ledger's rows stand only once everything is settled.
                | "Group earlier segments" >> beam.ParDo(_Group(context), listed(segments, "Segments of this start"))
                | "Spread groups" >> beam.Reshuffle()
                | "Book earlier starts" >> beam.ParDo(_Book(context))
            )
        everything = (self._published, *booked) | "Booked" >> beam.Flatten()
        manifest: PCollection[Any] = (
            pipeline
            | "End of the run" >> beam.Create([0], reshuffle=False)
            | "Write manifests"
            >> beam.ParDo(_Finish(context, self._record), listed(everything, "All published"), self._plan.all_ranges)
        )
        return manifest


class _BookOverhead(beam.DoFn):
    """What this start was charged for without a request; the rest is booked with its range."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, _: int, segments: Sequence[SegmentRef]) -> Iterator[Published]:
        with reported(self._context):
            ordered = sorted(segments, key=lambda segment: segment.name)
            rows, terms = read_rows(self._context.journal, ordered, OVERHEAD)
            yield book_rows(self._context, f"s{self._context.start:03d}-overhead", rows, terms)
            told = {segment.name for segment in ordered}
            there = list_segments(self._context.journal, f"{self._context.scratch_name}/segments/")
            if strays := [name for name in there if name not in told]:
                yield book_strays(self._context, strays, ordered)


class _Group(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, _: int, _segments: Sequence[SegmentRef]) -> Iterator[tuple[str, tuple[SegmentRef, ...]]]:
        with reported(self._context):
            names = [name for name in earlier_segments(self._context) if not is_kept(name)]
            yield from segment_groups([segment_ref(self._context.journal, name) for name in names])


class _Book(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, element: tuple[str, tuple[SegmentRef, ...]]) -> Iterator[Published]:
        with reported(self._context):
            yield book(self._context, *element)


class _Finish(beam.DoFn):
    def __init__(self, context: RunContext, record: RunRecord) -> None:
        self._context, self._record = context, record

    def process(self, _: int, published: Sequence[Published], ranges: Sequence[RangeRef]) -> Iterator[dict[str, Any]]:
        with reported(self._context):
            ideal = sum(ref.ideal_cached_tokens for ref in ranges)
            yield finish(self._context, self._record, published, ideal)
