"""Where answers say that they were processed, held against what their pool declares.

An answer from elsewhere is a failure, never a warning: the prompt has been where it may not have been allowed. It is
the pool that broke its word, not the request that was at fault: another pool may serve it. The run remembers it, in
every later round and start, for as long as the pool declares the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.store import Store
from bidbeam.transforms.output_checks import turned_down
from bidbeam.transforms.placement import broken_label

ELSEWHERE = "the answer says that it was processed in "
"""How the message of such a failure begins."""
PLACES = ("jurisdiction", "data_zone")
"""The labels that such an answer refutes."""
_DIRECTORY = "refuted"
"""Where in a run's journal refuted labels are written down."""


def check_regions(results: pa.RecordBatch, labels: Mapping[str, Any]) -> tuple[pa.RecordBatch, str | None]:
    """``results`` (RESULT_SCHEMA) with every answer from a country that contradicts ``labels`` turned into a failure of
    class ``policy``, its usage kept; and what the first such answer says, None where there is none.

    Where a label is not declared, or an answer says nothing, nothing is compared.
    """
    told = results.column("jurisdiction")
    if told.null_count == len(told):
        return results, None
    broken = {each: broken_label(labels, each) for each in pc.unique(told).to_pylist() if each is not None}
    messages = {
        country: f"{ELSEWHERE}{country}, and the pool declares {declared}"
        for country, declared in broken.items()
        if declared is not None
    }
    if not messages:
        return results, None
    unusable = pc.fill_null(pc.equal(results.column("error_class"), "bad_output"), False)
    answered = pc.or_(pc.equal(results.column("status"), "ok"), unusable)
    astray = pc.and_(pc.is_in(told, value_set=pa.array(list(messages))), answered)
    if not pc.any(astray).as_py():
        return results, None
    texts = [messages.get(country) for country in told.to_pylist()]
    first = next(text for text, row in zip(texts, astray.to_pylist(), strict=True) if row)
    return turned_down(results, astray, "policy", pa.array(texts, pa.string())), first


def undeclared(spec: PoolSpec) -> PoolSpec:
    """The pool without the labels that an answer has refuted: what restricts them does not go there any more."""
    return replace(spec, placement={name: label for name, label in spec.placement.items() if name not in PLACES})


def note_refuted(journal: Store, spec: PoolSpec) -> None:
    """Writes down that an answer has refuted what a pool declares. Idempotent."""
    journal.create(_note_of(spec), spec.name.encode())


def believed(journal: Store, pools: Iterable[PoolSpec]) -> tuple[PoolSpec, ...]:
    """The pools, those whose labels an answer of this run has refuted without them."""
    noted = {entry.name for entry in journal.list(f"{_DIRECTORY}/")}
    return tuple(undeclared(spec) if _note_of(spec) in noted else spec for spec in pools)


def _note_of(spec: PoolSpec) -> str:
    """One that declares something else, or that has another address, is another: it was put right."""
    said = [spec.name, spec.base_url, dict(spec.options), {name: spec.placement.get(name) for name in PLACES}]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"{_DIRECTORY}/{digest}"


def from_elsewhere(messages: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Which error messages (text[n]) are of such failures (bool[n])."""
    return pc.fill_null(pc.starts_with(messages.cast(pa.string()), ELSEWHERE), False)
