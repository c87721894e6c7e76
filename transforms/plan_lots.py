"""PlanLots: an external sample-sort of the prompts into lots. References travel; the payload goes to the store once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.pvalue import AsList, PCollection

from bidbeam.connectors.inputs import Split
from bidbeam.connectors.store import Store
from bidbeam.connectors.tokenizer import ModelTools, model_tools
from bidbeam.transforms.failures import reported
from bidbeam.transforms.history import match_history, settled_places
from bidbeam.transforms.lots import lots_of_places
from bidbeam.transforms.merging import RangeRef, merge_range
from bidbeam.transforms.order import live_places, read_order
from bidbeam.transforms.planned import note_planned, planned_of
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.side_inputs import listed
from bidbeam.transforms.spilling import Bound, SpillRef, choose_bounds, sample_keys, sampled_splits, spill_split


class Plan(NamedTuple):
    """What PlanLots gives: PCollections of references."""

    spills: PCollection[Any]
    """``SpillRef``: where each split's sorted rows are."""
    ranges: PCollection[Any]
    """``RangeRef``: where each range's order is."""
    lots: PCollection[Any]
    """``pa.Table`` of LOT: what has no answer yet, one table a range."""
    all_spills: AsList
    """``spills`` as a side input."""
    all_ranges: AsList
    """``ranges`` as a side input."""


class PlanLots(beam.PTransform[Any, Any]):
    """PCollection of ``Split`` to ``Plan``. Bad rows are spilled apart and end as dead letters; none raises."""

    def __init__(self, context: RunContext, splits: Sequence[Split]) -> None:
        super().__init__()
        self._context, self._splits = context, tuple(splits)

    def expand(self, splits: PCollection[Any]) -> Plan:
        context, pipeline = self._context, splits.pipeline
        chosen = sampled_splits(self._splits, context.ranges)
        samples = (
            pipeline
            | "Choose samples" >> beam.Create(chosen, reshuffle=False)
            | "Sample" >> beam.ParDo(_Sample(context))
        )
        spills = splits | "Render and sort" >> beam.ParDo(_Spill(context), AsList(samples))
        all_spills = listed(spills, "All spills")
        repeated: PCollection[Any] = (
            pipeline
            | "Look at ids" >> beam.Create([0] if context.render.prompt.id is not None else [], reshuffle=False)
            | "Find repeated ids" >> beam.ParDo(_FindRepeatedIds(context), all_spills)
        )
        ranges = (
            pipeline
            | "List ranges" >> beam.Create(range(context.ranges))
            | "Merge" >> beam.ParDo(_Merge(context), all_spills, AsList(repeated))
        )
        all_ranges = listed(ranges, "All ranges")
        matched: PCollection[Any] = (
            pipeline
            | "Look at journal" >> beam.Create([0] if context.has_history else [], reshuffle=False)
            | "Find what is settled" >> beam.ParDo(_MatchHistory(context), all_ranges, all_spills)
        )
        lots = ranges | "Cut lots" >> beam.ParDo(_CutLots(context), AsList(matched))
        return Plan(spills, ranges, lots, all_spills, all_ranges)


def _tools(context: RunContext) -> Mapping[str, ModelTools | None]:
    return {
        name: model_tools(facts.directory) if facts.directory is not None else None
        for name, facts in context.models.items()
    }


class _Sample(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, element: tuple[Split, int]) -> Iterator[Bound]:
        split, rows = element
        with reported(self._context):
            yield from sample_keys(split, self._context, _tools(self._context), rows)


class _Spill(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, split: Split, samples: Sequence[Bound]) -> Iterator[SpillRef]:
        with reported(self._context):
            bounds = choose_bounds(samples, self._context.ranges)
            yield spill_split(split, self._context, bounds, _tools(self._context))


class _FindRepeatedIds(beam.DoFn):
    """(split, source rows) of rows whose id a row before them, by file and row, has taken."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, _: int, spills: Sequence[SpillRef]) -> Iterator[tuple[int, list[int]]]:
        names = [spill.ids_name for spill in spills if spill.ids_name is not None]
        if not names:
            return
        with reported(self._context), duckdb.connect() as connection:
            # DuckDB reads local files itself, a part at a time; a remote store's are read for it.
            scratch = self._context.scratch
            if scratch.is_local:
                connection.execute("SET VARIABLE files = ?", [[scratch.url_of(name) for name in names]])
                connection.execute("CREATE VIEW ids AS SELECT * FROM read_parquet(getvariable('files'))")
            else:
                connection.register("ids", pa.concat_tables(_read_parquet(scratch, name) for name in names))
            repeated = connection.execute(
                "WITH twice AS (SELECT request_id, min((split, row)) AS first FROM ids"
                " GROUP BY request_id HAVING count(*) > 1)"
                " SELECT split, list(row) FROM ids JOIN twice USING (request_id) WHERE (split, row) > first"
                " GROUP BY split ORDER BY split"
            ).fetchall()
        yield from repeated


def _read_parquet(store: Store, name: str) -> pa.Table:
    with store.open_input(name) as file:
        return pq.read_table(file)


class _Merge(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(
        self, range_: int, spills: Sequence[SpillRef], repeated: Sequence[tuple[int, list[int]]]
    ) -> Iterator[RangeRef]:
        with reported(self._context):
            if any(spill.rows_per_range[range_] for spill in spills):
                yield merge_range(self._context, spills, range_, dict(repeated))


class _MatchHistory(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, _: int, ranges: Sequence[RangeRef], spills: Sequence[SpillRef]) -> Iterator[int]:
        with reported(self._context):
            yield from match_history(self._context, ranges, spills)


class _CutLots(beam.DoFn):
    def __init__(self, context: RunContext) -> None:
        self._context = context

    def process(self, ref: RangeRef, _matched: Sequence[int]) -> Iterator[pa.Table]:
        with reported(self._context):
            order = read_order(self._context, ref.range)
            places = live_places(order, settled_places(self._context, ref.range, order.num_rows))
            note_planned(self._context.scratch, ref.range, planned_of(order, places))
            if len(places):
                yield lots_of_places(self._context, ref.range, ref.groups, order, places)
