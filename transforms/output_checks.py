"""Output checks: an answer that is no answer counts as a failed attempt, whatever the endpoint says.

What was reported of its usage stays: a provider charges for a bad answer too. No message repeats a piece of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.json_schemas import Checker, schema_of

EMPTY = "the answer is empty"
NOTHING_YET = "the answer is empty: it was cut off at max_tokens before its first word"
CUT_OFF = "the answer was cut off at max_tokens before its JSON was complete"
NO_JSON = "the answer is not JSON"
NO_OBJECT = "the answer is not a JSON object"


def check_answers(sampling: pa.Array, results: pa.RecordBatch) -> pa.RecordBatch:
    """``results`` (RESULT_SCHEMA) with every answer that is empty, or not of the form that was asked for, turned
    into a failure of class ``bad_output``.

    ``sampling`` stands row by row beside them: the canonical JSON text of each request.
    """
    ok = pc.equal(results.column("status"), "ok")
    blank = _blank(pc.fill_null(results.column("output"), ""))
    samples = results.column("samples")
    if samples.null_count < len(samples):
        bare = pc.list_parent_indices(samples).filter(_blank(pc.fill_null(samples.flatten(), "")))
        blank = pc.or_(blank, pa.array(np.isin(np.arange(len(samples)), bare.to_numpy())))
    problems: dict[int, str] = {
        row: NOTHING_YET if results.column("finish_reason")[row].as_py() == "length" else EMPTY
        for row in np.flatnonzero(pc.and_(ok, blank).to_numpy(zero_copy_only=False)).tolist()
    }
    coded = sampling if isinstance(sampling, pa.DictionaryArray) else sampling.dictionary_encode()
    checks = [None if text is None else _check_of(text) for text in coded.dictionary.to_pylist()]
    if any(checks):
        codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
        wanted = np.isin(codes, [code for code, check in enumerate(checks) if check is not None])
        for row in np.flatnonzero(wanted & ok.to_numpy(zero_copy_only=False)).tolist():
            check = checks[codes[row]]
            if row not in problems and check is not None and (found := _first(check, results, row)) is not None:
                problems[row] = found
    return _failed(results, problems) if problems else results


def would_repeat(sampling: pa.Array, before: pa.RecordBatch, checked: pa.RecordBatch) -> list[int]:
    """The tags of the answers that ``check_answers`` has turned down and that the same pool would give again: those of
    requests that leave nothing to chance."""
    bad = pc.and_(pc.equal(before.column("status"), "ok"), pc.not_equal(checked.column("status"), "ok"))
    tags, texts = (column.filter(bad).to_pylist() for column in (checked.column("tag"), sampling))
    return [tag for tag, text in zip(tags, texts, strict=True) if text is not None and _leaves_nothing_to_chance(text)]


@lru_cache(maxsize=1024)
def _leaves_nothing_to_chance(sampling: str) -> bool:
    given = json.loads(sampling)
    return given.get("temperature") == 0 or given.get("seed") is not None


def _blank(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)


def _first(check: Callable[[str], str | None], results: pa.RecordBatch, row: int) -> str | None:
    samples = results.column("samples")[row].as_py() or [results.column("output")[row].as_py()]
    found = next((problem for sample in samples if (problem := check(sample)) is not None), None)
    cut = results.column("finish_reason")[row].as_py() == "length"
    return CUT_OFF if found == NO_JSON and cut else found


@lru_cache(maxsize=1024)
def _check_of(sampling: str) -> Callable[[str], str | None] | None:
    """What an answer under this sampling must pass; None where any text will do."""
    try:
        schema = schema_of(json.loads(sampling).get("response_format"))
        checker = Checker(schema) if not isinstance(schema, bool | None) else None
    except ValueError:
        return None
    if schema is None:
        return None

    def check(answer: str) -> str | None:
        try:
            value: Any = json.loads(answer)
        except (ValueError, RecursionError):
            return NO_JSON
        if checker is None:
            return None if isinstance(value, dict) else NO_OBJECT
        broken = checker.problem(value)
        return None if broken is None else f"the answer breaks its schema: {broken}"

    return check


def _failed(results: pa.RecordBatch, problems: dict[int, str]) -> pa.RecordBatch:
    bad = np.zeros(results.num_rows, bool)
    bad[list(problems)] = True
    messages = pa.array([problems.get(row) for row in range(results.num_rows)], pa.string())
    return turned_down(results, pa.array(bad), "bad_output", messages)


def turned_down(results: pa.RecordBatch, mask: pa.Array, error_class: str, messages: pa.Array) -> pa.RecordBatch:
    """``results`` with the rows of ``mask`` (bool[n]) failed for these reasons (text[n]); their usage stays."""
    replaced = {
        "status": pc.if_else(mask, "failed", results.column("status")),
        "error_class": pc.if_else(mask, error_class, results.column("error_class")),
        "error_message": pc.if_else(mask, messages, results.column("error_message")),
        **{
            name: pc.if_else(mask, pa.scalar(None, results.schema.field(name).type), results.column(name))
            for name in ("output", "samples")
        },
    }
    columns = [replaced.get(name, results.column(name)) for name in results.schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=results.schema)
