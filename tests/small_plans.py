"""Plans of small inputs, made step by step as the transforms make them, without a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.inputs import InputPlan, plan_input
from bidbeam.connectors.store import Store
from bidbeam.transforms.lots import LOT, lots_of_places
from bidbeam.transforms.merging import RangeRef, merge_range
from bidbeam.transforms.order import live_places, read_order
from bidbeam.transforms.plan_lots import _FindRepeatedIds
from bidbeam.transforms.rendering import PromptSpec, RenderSpec
from bidbeam.transforms.run_context import ModelFacts, RunContext
from bidbeam.transforms.spilling import SpillRef, choose_bounds, sample_keys, sampled_splits, spill_split

AT = datetime(2026, 1, 2, 3, tzinfo=UTC)


@dataclass(frozen=True)
class Planned:
    """All that the plan of one start comes to. ``orders`` by range."""

    context: RunContext
    input: InputPlan
    spills: list[SpillRef]
    ranges: list[RangeRef]
    orders: dict[int, pa.Table]
    lots: pa.Table


def write_input(home: Path, files: Mapping[str, pa.Table], split_rows: int) -> InputPlan:
    home.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        pq.write_table(table, home / name, row_group_size=split_rows)
    return plan_input([str(home / "*.parquet")], {}, target_rows=split_rows)


def make_context(
    home: Path,
    plan: InputPlan,
    *,
    ranges: int = 1,
    lot_tokens: int = 60,
    temperature: int = 0,
    seed: int | None = None,
    **keys: Any,
) -> RunContext:
    """A context with the models ``m`` (blocks of 2) and ``k`` (of 4), neither with a tokenizer; prompts go raw."""
    sampling = {"max_tokens": 4, "temperature": temperature, **({} if seed is None else {"seed": seed})}
    prompt = PromptSpec(
        id="id" if "id" in plan.schema.names else None,
        column="prompt",
        format="raw",
        tenant="tenant" if "tenant" in plan.schema.names else None,
    )
    given: dict[str, Any] = {
        "run_id": "small-2026-01-02-00000000",
        "run_date": date(2026, 1, 2),
        "start": 1,
        "started_at": AT,
        "run_dir": Store.at(str(home / "run")),
        "ledger": Store.at(str(home / "ledger")),
        "render": RenderSpec(
            prompt=prompt,
            model="m",
            sampling=sampling,
            placement={},
            longest_context={"m": None, "k": None},
        ),
        "models": {"m": ModelFacts("m", None, 2), "k": ModelFacts("k", None, 4)},
        "pools": (),
        "input_schema": plan.schema,
        "storage": {},
        "seed": 77,
        "rows": plan.rows,
        "ranges": ranges,
        "rounds": 1,
        "lot_tokens": lot_tokens,
    }
    return RunContext(**(given | keys))


def make_plan(context: RunContext, plan: InputPlan) -> Planned:
    tools = dict.fromkeys(context.models)
    samples = [
        bound
        for split, rows in sampled_splits(plan.splits, context.ranges)
        for bound in sample_keys(split, context, tools, rows)
    ]
    bounds = choose_bounds(samples, context.ranges)
    spills = [spill_split(split, context, bounds, tools) for split in plan.splits]
    repeated = dict(_FindRepeatedIds(context).process(0, spills))
    ranges = [
        merge_range(context, spills, number, repeated)
        for number in range(context.ranges)
        if any(spill.rows_per_range[number] for spill in spills)
    ]
    orders = {ref.range: read_order(context, ref.range) for ref in ranges}
    lots = [
        lots_of_places(context, ref.range, ref.groups, orders[ref.range], places)
        for ref in ranges
        if len(places := live_places(orders[ref.range]))
    ]
    return Planned(context, plan, spills, ranges, orders, pa.concat_tables(lots) if lots else LOT.empty_table())
