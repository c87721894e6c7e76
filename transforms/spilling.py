"""Read, render, sort, cut: one split of the input becomes one sorted Arrow file with one record batch per range.

Beam carries only the reference. The columns of the input stand first in the file, unchanged; ours follow, so that
no name of the input can collide with one of ours.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bidbeam.connectors.inputs import Split, is_json_text, is_openai_batch, read_split
from bidbeam.connectors.schemas import LABEL
from bidbeam.connectors.store import Store
from bidbeam.connectors.tokenizer import ModelTools
from bidbeam.transforms.origins import origin_of
from bidbeam.transforms.rendering import RENDERED, RenderSpec, render
from bidbeam.transforms.run_context import RunContext

Bound = tuple[str, bytes]
"""A place in the global order: (group, key)."""

_SAMPLED_SPLITS = 4
_SAMPLES_PER_RANGE = 128


@dataclass(frozen=True, slots=True)
class SpillRef:
    """One spilled split: where it is and what is in it. Tokens are the sum of its good rows' input tokens."""

    split: int
    name: str
    rows_per_range: tuple[int, ...]
    dead: int
    input_tokens: int
    max_output_tokens: int
    ids_name: str | None


def key_column(spec: RenderSpec, models: Mapping[str, str | None], schema: pa.Schema) -> int | None:
    """The input column that is itself the sort key of every row, or None where the keys are made.

    That holds when no model has a tokenizer and the prompt is a plain text column: the text is then not written twice.
    """
    prompt = spec.prompt
    # A batch line's prompt stands in its body, whatever other columns there are.
    if prompt.template is not None or prompt.column is None or any(models.values()) or is_openai_batch(schema):
        return None
    index: int = schema.get_field_index(prompt.column)
    if index < 0:
        return None
    type_ = schema.field(index).type
    if is_json_text(schema.field(index)):
        return None
    return index if pa.types.is_string(type_) or pa.types.is_large_string(type_) else None


@dataclass(frozen=True, slots=True)
class SpillLayout:
    """Which columns a spill file has, by position: the input's first, then ours."""

    input_schema: pa.Schema
    key_column: int | None

    @property
    def ours(self) -> tuple[pa.Field, ...]:
        made = [field for field in RENDERED if not (field.name == "key" and self.key_column is not None)]
        return (pa.field("row", pa.int64()), pa.field("file", LABEL), *made)

    @property
    def schema(self) -> pa.Schema:
        ours = [pa.field(f"bidbeam:{field.name}", field.type) for field in self.ours]
        return pa.schema([*(pa.field(f"in:{i}:{f.name}", f.type) for i, f in enumerate(self.input_schema)), *ours])

    def index(self, name: str) -> int:
        """The position of one of our columns."""
        if name == "key" and self.key_column is not None:
            return self.key_column
        return len(self.input_schema) + next(i for i, field in enumerate(self.ours) if field.name == name)

    def input_table(self, rows: pa.Table) -> pa.Table:
        """The input's own columns of full spill rows, under their own names and types."""
        return pa.Table.from_arrays([rows.column(i) for i in range(len(self.input_schema))], schema=self.input_schema)


def layout_of(context: RunContext) -> SpillLayout:
    directories = {name: facts.directory for name, facts in context.models.items()}
    return SpillLayout(context.input_schema, key_column(context.render, directories, context.input_schema))


def group_codes(model: pa.Array, placement: pa.Array, tenant: pa.Array) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Group of each row and the groups' names, both in the names' order: requests of one group may share prefixes.

    All three are dictionary arrays; the names join their values. Shapes (n,) and (groups,).
    """
    codes = np.zeros(len(model), np.int64)
    values: list[list[str]] = []
    for column in (model, placement, tenant):
        # Slot 0 stands for null.
        names = ["\x00", *("\x01" + str(v) for v in column.dictionary.to_pylist())]
        index = pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
        codes = codes * len(names) + index
        values.append(names)
    used, inverse = np.unique(codes, return_inverse=True)
    texts = []
    for code in used.tolist():
        parts, rest = [], code
        for names in reversed(values):
            rest, slot = divmod(rest, len(names))
            parts.append(names[slot])
        texts.append("\x1f".join(reversed(parts)))
    rank = np.argsort(np.argsort(np.array(texts, dtype=object)))
    return rank[inverse].astype(np.int64), sorted(texts)


def sorted_order(keys: pa.Array, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Row numbers in the order of (group, key); equal ones keep their order. Shape (n,)."""
    order: npt.NDArray[np.int64] = pc.array_sort_indices(keys).to_numpy().astype(np.int64)
    if len(groups) and groups.max() > 0:
        order = order[np.argsort(groups[order], kind="stable")]
    return order


def sample_keys(split: Split, context: RunContext, models: Mapping[str, ModelTools | None], rows: int) -> list[Bound]:
    """Places in the global order of a seeded sample of ``rows`` rows of a split; bad rows give none."""
    table = read_split(split, context.input_schema, context.storage)
    if table.num_rows > rows:
        chosen = np.random.default_rng([context.seed % (1 << 63), split.index]).choice(
            table.num_rows, rows, replace=False
        )
        table = table.take(pa.array(np.sort(chosen)))
    rendered = render(table, context.render, models, file=split.file, row_start=0, seed=context.seed)
    good = rendered.filter(pc.is_null(rendered.column("reason")))
    codes, names = group_codes(good.column("model"), good.column("placement"), good.column("tenant"))
    keys = good.column("key").cast(pa.large_binary()).to_pylist()
    return [(names[code], key) for code, key in zip(codes.tolist(), keys, strict=True)]


def sampled_splits(splits: Sequence[Split], ranges: int) -> list[tuple[Split, int]]:
    """Which splits are sampled for the bounds, evenly spread, and how many rows of each; none for a single range."""
    if ranges < 2 or not splits:
        return []
    step = max(1, -(-len(splits) // _SAMPLED_SPLITS))
    chosen = list(splits[::step])
    return [(split, -(-_SAMPLES_PER_RANGE * ranges // len(chosen))) for split in chosen]


def choose_bounds(samples: Sequence[Bound], ranges: int) -> list[Bound]:
    """Quantiles of the samples: at most ``ranges`` - 1 places, ascending, none twice."""
    ordered = sorted(samples)
    if ranges < 2 or not ordered:
        return []
    picked = [ordered[len(ordered) * i // ranges] for i in range(1, ranges)]
    return sorted(set(picked))


def _cut(
    bounds: Sequence[Bound],
    names: Sequence[str],
    groups: npt.NDArray[np.int64],
    keys: pa.Array,
    order: npt.NDArray[np.int64],
) -> list[int]:
    """Where each bound falls among the rows in this order: the first one that is not before it."""
    binary = keys.cast(pa.large_binary()) if pa.types.is_large_string(keys.type) else keys.cast(pa.binary())

    def place(i: int) -> Bound:
        row = int(order[i])
        return names[int(groups[row])], binary[row].as_py()

    return [bisect.bisect_left(range(len(order)), bound, key=place) for bound in bounds]


def spill_split(
    split: Split, context: RunContext, bounds: Sequence[Bound], models: Mapping[str, ModelTools | None]
) -> SpillRef:
    """Reads, renders and sorts one split and writes it, cut at the bounds: ranges + 1 record batches, the last one the
    dead rows. Writing again gives the same bytes, so a retried bundle finds its file already there."""
    table = read_split(split, context.input_schema, context.storage)
    origin = origin_of(context, split)
    rendered = render(table, context.render, models, file=split.file, row_start=split.row_start, origin=origin,
                      seed=context.seed)  # fmt: skip
    layout = layout_of(context)
    n = table.num_rows
    dead_mask = pc.is_valid(rendered.column("reason"))
    if origin is None:
        file_code = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([split.file]))
        ours = {"row": pa.array(np.arange(split.row_start, split.row_start + n)), "file": file_code}
    else:
        ours = {"row": origin[1], "file": origin[0].dictionary_encode()}
    # JSON Lines bring a column more, which rendering has read: why a line is no row.
    inputs = table.columns[: len(context.input_schema)]
    columns = [
        *(column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in inputs),
        *(ours[field.name] if field.name in ours else rendered.column(field.name) for field in layout.ours),
    ]
    full = pa.Table.from_arrays(columns, schema=layout.schema)

    good = np.flatnonzero(~dead_mask.to_numpy(zero_copy_only=False))
    everything_good = len(good) == n
    live = rendered if everything_good else rendered.take(pa.array(good))
    keys = live.column("key")
    groups, names = group_codes(live.column("model"), live.column("placement"), live.column("tenant"))
    order = sorted_order(keys, groups)
    cuts = [0, *_cut(bounds, names, groups, keys, order), len(order)]
    cuts += [len(order)] * (context.ranges + 1 - len(cuts))

    chosen = order if everything_good else good[order]
    dead = np.flatnonzero(dead_mask.to_numpy(zero_copy_only=False))
    # One table, so one dictionary a column: the file format takes no second one.
    rows = full.take(pa.array(np.concatenate([chosen, dead]))).combine_chunks()
    name = f"spill/split-{split.index:06d}.arrow"
    _write(context.scratch, name, rows, [*cuts, n])

    ids_name = None
    if context.render.prompt.id is not None:
        ids_name = f"ids/split-{split.index:06d}.parquet"
        _write_ids(context.scratch, ids_name, live.column("request_id"), split, good)
    return SpillRef(
        split=split.index,
        name=name,
        rows_per_range=tuple(np.diff(cuts).tolist()),
        dead=len(dead),
        input_tokens=int(pc.sum(live.column("input_tokens")).as_py() or 0),
        max_output_tokens=int(
            pc.sum(pc.multiply(live.column("max_tokens").cast(pa.int64()), live.column("n").cast(pa.int64()))).as_py()
            or 0
        ),
        ids_name=ids_name,
    )


def _write(store: Store, name: str, rows: pa.Table, cuts: Sequence[int]) -> None:
    batches = rows.to_batches()
    batch = (
        batches[0]
        if batches
        else pa.RecordBatch.from_arrays([pa.array([], field.type) for field in rows.schema], schema=rows.schema)
    )
    with store.scratch_file() as path:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            for start, end in itertools.pairwise(cuts):
                writer.write_batch(batch.slice(start, end - start))
        store.create_from(name, path, durable=False)


def _write_ids(store: Store, name: str, ids: pa.Array, split: Split, good: npt.NDArray[np.int64]) -> None:
    table = pa.table(
        {
            "request_id": ids,
            "split": pa.array(np.full(len(ids), split.index, np.int32)),
            "row": pa.array(good + split.row_start),
        }
    )
    with store.scratch_file() as path:
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
        store.create_from(name, path, durable=False)
