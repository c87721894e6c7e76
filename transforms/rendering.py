"""From input rows to requests: rendered, validated, counted and hashed; a bad row becomes a dead letter with a reason.

Where rows are plain text and nothing varies from row to row, all of it stays columnar; only the content hash visits
rows one by one. A row that brings its own messages, template values or sampling is looked at by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError, InputError
from bidbeam.connectors.inputs import BAD, is_json_text, is_openai_batch
from bidbeam.connectors.schemas import LABEL
from bidbeam.connectors.tokenizer import ModelTools
from bidbeam.transforms.content_key import content_keys, context_seed
from bidbeam.transforms.keys import Keys, make_keys
from bidbeam.transforms.placement import combine
from bidbeam.transforms.prompt_template import compile_template
from bidbeam.transforms.prompts import PromptSpec, check_prompt_columns, id_column, one_chunk, read_prompts
from bidbeam.transforms.row_values import is_text, python_values, readable_text
from bidbeam.transforms.sampling import BadSampling, Sampling, canonical_json, distinct, resolve, row_keys
from bidbeam.transforms.wire import messages_json, prompt_text, token_lists

__all__ = [
    "RENDERED", "PromptSpec", "RenderSpec", "check_columns", "compile_template", "messages_json", "prompt_text",
    "render", "token_lists",
]  # fmt: skip

MODEL_COLUMN = "model"
PLACEMENT_COLUMN = "placement"

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RenderSpec:
    """What a job says about rendering."""

    prompt: PromptSpec
    model: str | None
    """For rows that name none."""
    sampling: Mapping[str, Any]
    placement: Mapping[str, Any]
    longest_context: Mapping[str, int | None]
    """Model -> longest prompt plus answer, in tokens, that any pool takes; None: unknown, so nothing is too long."""


RENDERED = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("model", LABEL),
        pa.field("tenant", LABEL),
        pa.field("placement", LABEL),  # canonical JSON of job and row constraint; null: none
        pa.field("sampling", LABEL),  # canonical JSON object: sorted keys, numbers' text kept
        pa.field("max_tokens", pa.int32()),
        pa.field("n", pa.int16()),
        pa.field("greedy", pa.bool_()),  # temperature 0: identical requests may share an answer
        pa.field("key", pa.binary()),  # sort key: big-endian token ids, or the text's UTF-8; see transforms/keys.py
        pa.field("key_width", pa.int8()),  # bytes per token: 2 or 4; 1: the key is text
        pa.field("input_tokens", pa.int32()),
        pa.field("tokens_exact", pa.bool_()),
        pa.field("text", pa.large_string()),  # only of template prompts: no column holds these
        pa.field("content", pa.binary(16)),  # see transforms/content_key.py
        pa.field("reason", LABEL),  # null: a good row; else invalid or too_long
        pa.field("message", pa.string()),
    ]
)


class _Problems:
    """The first problem of each bad row."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str]] = {}

    def add(self, row: int, message: str, reason: str = "invalid") -> None:
        self.found.setdefault(row, (reason, message))

    def add_all(self, rows: Ints, message: str, reason: str = "invalid") -> None:
        for row in rows.tolist():
            self.add(row, message, reason)


@dataclass(frozen=True, slots=True)
class _Coded:
    """A label a row: codes into ``values``, -1 for null. ``codes`` has shape (n,)."""

    codes: Ints
    values: list[str | None]

    def array(self) -> pa.Array:
        # Values keep their order; equal ones (two spellings of one constraint) become one.
        names = list(dict.fromkeys(value for value in self.values if value is not None))
        place = {name: i for i, name in enumerate(names)}
        map_ = np.array([-1 if value is None else place[value] for value in self.values] + [-1], np.int32)
        indices = map_[self.codes]
        return pa.DictionaryArray.from_arrays(pa.array(indices, mask=indices < 0), pa.array(names, pa.string()))


def check_columns(spec: RenderSpec, schema: pa.Schema) -> None:
    """Checks a job's columns against the input's schema before anything starts.

    Raises InputError for a column that is missing (with the nearest name), doubled or of a wrong type; ConfigError for
    a template that does not compile, sampling out of range, or no model anywhere.
    """
    check_prompt_columns(spec.prompt, schema)
    try:
        resolve(spec.sampling, {})
    except BadSampling as problem:
        raise ConfigError("out of range", key=f"sampling.{problem.key}", expected=problem.expected) from None
    if is_openai_batch(schema):
        return
    if spec.model is None and MODEL_COLUMN not in schema.names:
        raise ConfigError(
            "no model: neither the job nor a column names one", key="model", expected="a model of the pools"
        )
    for name in (MODEL_COLUMN, *_sampling_columns(spec, schema.names), PLACEMENT_COLUMN):
        if schema.names.count(name) > 1:
            raise InputError(f"the input has {schema.names.count(name)} columns named {name!r}")
    if MODEL_COLUMN in schema.names and not is_text(schema.field(MODEL_COLUMN).type):
        raise InputError(f"column {MODEL_COLUMN!r} is {schema.field(MODEL_COLUMN).type}; expected text")


def columns_in_both(spec: RenderSpec, schema: pa.Schema) -> list[str]:
    """The columns that the template names and that also set the sampling of their rows."""
    if spec.prompt.template is None or is_openai_batch(schema):
        return []
    used = compile_template(spec.prompt.template).names
    return [name for name in _sampling_columns(spec, schema.names) if name in used]


def _sampling_columns(spec: RenderSpec, names: list[str]) -> list[str]:
    taken = {spec.prompt.id, spec.prompt.column, spec.prompt.tenant}
    return [name for name in row_keys(spec.sampling, names) if name not in taken]


def render(
    table: pa.Table,
    spec: RenderSpec,
    models: Mapping[str, ModelTools | None],
    *,
    file: str,
    row_start: int,
    origin: tuple[pa.Array, pa.Array] | None = None,
    seed: int,
) -> pa.RecordBatch:
    """The rows of ``table`` as requests: a RENDERED batch, row by row beside it.

    ``models`` are the models of the pools; None: no tokenizer, so counts are estimates and keys are text. ``file`` and
    ``row_start`` name rows without an id, or ``origin``, the file and row that each came from first. ``seed`` (up to
    128 bits) is the run's secret of content keys. A bad row has a reason and a message, and null key and content; it
    never raises. Raises ModelError where a model has no chat template for chats, ConfigError for what
    ``check_columns`` would have found.
    """
    n = table.num_rows
    problems = _Problems()
    if BAD in table.column_names:
        for row, said in enumerate(python_values(one_chunk(table.column(BAD)))):
            if said is not None:
                problems.add(row, str(said))
    prompts = read_prompts(table, spec.prompt)
    for row, message in prompts.problems.items():
        problems.add(row, message)
    ids = _request_ids(table, spec.prompt, partial(_places, file, row_start, n, origin), problems)
    model = _models(table, spec, prompts.models, models, problems)
    _find_tools(prompts.samplings, model, models, problems)
    sampling_codes, samplings = _samplings(table, spec, prompts.samplings, problems)
    placement = _placements(table, spec, problems)
    tenant = _tenants(table, spec.prompt, problems)

    bad = np.zeros(n, bool)
    bad[list(problems.found)] = True
    keys = make_keys(prompts, spec.prompt, model.codes, [models.get(name or "") for name in model.values], ~bad)
    for row, message in keys.problems.items():
        problems.add(row, message)

    known = np.array([s is not None for s in samplings])
    max_tokens = np.array([0 if s is None else s.max_tokens for s in samplings], np.int32)[sampling_codes]
    samples = np.array([0 if s is None else s.n for s in samplings], np.int16)[sampling_codes]
    greedy = np.array([s is not None and s.greedy for s in samplings])[sampling_codes]
    _find_too_long(spec, model, keys, max_tokens, problems)

    bad[list(problems.found)] = True
    sampling = _Coded(sampling_codes, [None if s is None else s.text for s in samplings])
    unsampled = None if known.all() else ~known[sampling_codes]
    keyless = None if not bad.any() and keys.complete else bad | ~keys.present
    countless = None if keys.complete else ~keys.present
    key = keys.bytes if keyless is None else pc.if_else(pa.array(~keyless), keys.bytes, pa.scalar(None, pa.binary()))
    seeds = _seeds(seed, (model, sampling, tenant, _Coded(keys.kind.astype(np.int64), list(keys.kinds))))
    text = prompts.texts if prompts.made else pa.nulls(n, pa.large_string())
    return pa.RecordBatch.from_arrays(
        [
            ids,
            model.array(),
            tenant.array(),
            placement.array(),
            sampling.array(),
            pa.array(max_tokens, mask=unsampled),
            pa.array(samples, mask=unsampled),
            pa.array(greedy, mask=unsampled),
            key,
            pa.array(keys.widths, mask=countless),
            pa.array(keys.tokens, mask=countless),
            pa.array(keys.exact, mask=countless),
            text,
            content_keys(key, seeds),
            *_verdicts(n, problems),
        ],
        schema=RENDERED,
    )


def _request_ids(table: pa.Table, spec: PromptSpec, places: Callable[[], pa.Array], problems: _Problems) -> pa.Array:
    """The id column as text; the row's place where it is null, empty or absent."""
    name = id_column(spec, table.schema)
    if name is None:
        return places()
    ids = _as_text(table, name, problems)
    good = pc.fill_null(pc.greater(pc.binary_length(ids), 0), False)
    return pc.if_else(good, ids, places()) if not pc.all(good).as_py() else ids


def _places(file: str, row_start: int, rows: int, origin: tuple[pa.Array, pa.Array] | None) -> pa.Array:
    """``<file>:<row>`` of each row, where it came from first."""
    files, numbers = origin or (pa.scalar(file), pa.array(np.arange(row_start, row_start + rows)))
    return pc.binary_join_element_wise(files, numbers.cast(pa.string()), ":")


def _as_text(table: pa.Table, name: str, problems: _Problems) -> pa.Array:
    column = one_chunk(table.column(name))
    if not is_text(column.type):
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return column.cast(pa.string())
    texts, broken = readable_text(column)
    for row in broken:
        problems.add(row, f"column {name!r}: the value is not UTF-8")
    return texts.cast(pa.string())


def _models(
    table: pa.Table,
    spec: RenderSpec,
    named: list[str | None] | None,
    models: Mapping[str, ModelTools | None],
    problems: _Problems,
) -> _Coded:
    where = f"column {MODEL_COLUMN!r}" if named is None else "column 'body': model"
    if named is not None:
        column = pa.array(named, pa.string())
    elif MODEL_COLUMN in table.column_names:
        column = _as_text(table, MODEL_COLUMN, problems)
    else:
        codes, values, where = np.zeros(table.num_rows, np.int64), [spec.model], "model"
        column = None
    if column is not None:
        if spec.model is not None:
            column = pc.fill_null(column, spec.model)
        codes, values = _coded(column)
    for code, value in enumerate(values):
        if value is None or value not in models:
            near = get_close_matches(value or "", list(models), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            why = "names no model, and neither does the job" if value is None else "names a model that no pool serves"
            problems.add_all(np.flatnonzero(codes == code), f"{where} {why}{hint}")
            values[code] = None
    return _Coded(codes, values)


def _coded(column: pa.Array) -> tuple[Ints, list[str | None]]:
    """Codes of a text column's values and the values; null is a value of its own, last."""
    encoded = column.dictionary_encode()
    values: list[str | None] = [*encoded.dictionary.to_pylist(), None]
    return pc.fill_null(encoded.indices, len(values) - 1).to_numpy(zero_copy_only=False).astype(np.int64), values


def _samplings(
    table: pa.Table, spec: RenderSpec, own: list[dict[str, Any]] | None, problems: _Problems
) -> tuple[Ints, list[Sampling | None]]:
    """Which sampling each row has, by code; None where its values are bad."""
    if own is not None:
        codes, rows = _distinct_bodies(own)
    else:
        names = _sampling_columns(spec, table.column_names)
        codes, rows = _distinct_rows(table, names)
    where = "column 'body'" if own is not None else "column"
    found: list[Sampling | None] = []
    for code, row in enumerate(rows):
        try:
            found.append(resolve(spec.sampling, row))
        except BadSampling as problem:
            found.append(None)
            name = f"{where}: {problem.key}" if own is not None else f"{where} {problem.key!r}"
            place = name if problem.key in row else f"sampling.{problem.key}"
            problems.add_all(np.flatnonzero(codes == code), f"{place} is not {problem.expected}")
    return codes, found


def _find_tools(
    own: list[dict[str, Any]] | None, model: _Coded, models: Mapping[str, ModelTools | None], problems: _Problems
) -> None:
    """Tools would stand in the prompt of a model that we tokenize for; to leave them out silently would be wrong."""
    for row, given in enumerate(own or []):
        if given.get("tools") and models.get(model.values[model.codes[row]] or "") is not None:
            problems.add(
                row, "column 'body': tools are only for models without a tokenizer (no source in the pools file)"
            )


def _distinct_rows(table: pa.Table, names: list[str]) -> tuple[Ints, list[dict[str, Any]]]:
    json_text = [name for name in names if is_json_text(table.schema.field(name))]
    return distinct({name: one_chunk(table.column(name)) for name in names}, table.num_rows, json_text)


def _distinct_bodies(own: list[dict[str, Any]]) -> tuple[Ints, list[dict[str, Any]]]:
    places: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    codes = np.zeros(len(own), np.int64)
    for i, row in enumerate(own):
        text = canonical_json(row)
        if text not in places:
            places[text] = len(rows)
            rows.append(row)
        codes[i] = places[text]
    return codes, rows or [{}]


def _placements(table: pa.Table, spec: RenderSpec, problems: _Problems) -> _Coded:
    if PLACEMENT_COLUMN not in table.column_names:
        return _Coded(np.zeros(table.num_rows, np.int64), [combine(spec.placement, None)])
    codes, rows = _distinct_rows(table, [PLACEMENT_COLUMN])
    values: list[str | None] = []
    for code, row in enumerate(rows):
        constraint = row[PLACEMENT_COLUMN]
        try:
            if not isinstance(constraint, str | Mapping | None):
                raise TypeError("is neither JSON text nor an object")  # noqa: TRY301 - handled as combine's own
            values.append(combine(spec.placement, constraint))
        except (ConfigError, ValueError, TypeError) as problem:
            values.append(None)
            problems.add_all(np.flatnonzero(codes == code), f"column {PLACEMENT_COLUMN!r}: {problem}")
    return _Coded(codes, values)


def _tenants(table: pa.Table, spec: PromptSpec, problems: _Problems) -> _Coded:
    if spec.tenant is None:
        return _Coded(np.zeros(table.num_rows, np.int64), [None])
    return _Coded(*_coded(_as_text(table, spec.tenant, problems)))


def _find_too_long(
    spec: RenderSpec, model: _Coded, keys: Keys, max_tokens: npt.NDArray[np.int32], problems: _Problems
) -> None:
    limits = [spec.longest_context.get(name or "") for name in model.values]
    if all(limit is None for limit in limits):
        return
    limit = np.array([np.iinfo(np.int64).max if value is None else value for value in limits])[model.codes]
    total = keys.tokens.astype(np.int64) + max_tokens
    for row in np.flatnonzero(keys.present & (total > limit)).tolist():
        count = f"{keys.tokens[row]}" if keys.exact[row] else f"about {keys.tokens[row]}"
        problems.add(
            row,
            f"the prompt has {count} tokens and max_tokens is {max_tokens[row]}: "
            f"the longest that any pool takes is {limit[row]} together",
            "too_long",
        )


def _seeds(seed: int, parts: Iterable[_Coded]) -> int | npt.NDArray[np.uint64]:
    """The hash seed of everything but the prompt: one for all rows, or one a row."""
    parts = list(parts)
    combined = np.zeros(len(parts[0].codes), np.int64)
    for part in parts:
        _, combined = np.unique(combined * len(part.values) + part.codes, return_inverse=True)
    used, first, inverse = np.unique(combined, return_index=True, return_inverse=True)
    made = [context_seed(seed, *(part.values[part.codes[row]] for part in parts)) for row in first.tolist()]
    return made[0] if len(used) == 1 else np.array(made, np.uint64)[inverse]


def _verdicts(n: int, problems: _Problems) -> tuple[pa.Array, pa.Array]:
    if not problems.found:
        return pa.nulls(n, LABEL), pa.nulls(n, pa.string())
    reasons: list[str | None] = [None] * n
    messages: list[str | None] = [None] * n
    for row, (reason, message) in problems.found.items():
        reasons[row], messages[row] = reason, message
    return pa.array(reasons, pa.string()).dictionary_encode(), pa.array(messages, pa.string())
