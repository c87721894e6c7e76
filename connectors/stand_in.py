"""The engine of a rehearsal: answers at once, deterministically, within ``max_tokens``; nothing is sent or spent."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import PoolDown

WINDOW = 65_536
IDEAL_CACHED = "ideal_cached_tokens"
"""An optional int32 column of the requests: what a perfect prefix cache would hit, reported as cached tokens."""

_ANSWERS = pa.array(
    [
        "Yes.",
        "No.",
        "It depends on the details given.",
        "The text names three items, of which the second one matters most here.",
        '{"label": "positive", "confidence": "high"}',
        "A short summary: the product is sturdy, light and made for daily use.",
        "First check the cable, then restart the device, and then try again.",
        "There is not enough information in the text to answer this with certainty, so no answer is given.",
    ],
    pa.large_string(),
)
_OK = pa.array(["ok"], pa.string())
_STOP = pa.array(["stop"], pa.string())
_REPORTED = pa.array(["reported"], pa.string())


def _now() -> datetime:
    return datetime.now(UTC)


class StandIn:
    """Implements ``Engine``. Text and length of an answer follow from the request's ``tag`` and ``max_tokens`` alone.

    Output tokens are 1 to ``max_tokens`` for each of the n samples. Cached tokens are NULL unless the requests bring
    ``ideal_cached_tokens``.
    """

    wants: frozenset[str] = frozenset()

    def __init__(self, name: str = "stand-in", *, now: Callable[[], datetime] = _now) -> None:
        self._name = name
        self._now = now
        self._wake: Callable[[], None] = lambda: None
        self._ready: list[pa.RecordBatch] = []
        self._waiting = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"StandIn({self._name!r})"

    @property
    def room(self) -> int:
        return 0 if self._closed else max(0, WINDOW - self._waiting)

    @property
    def in_flight(self) -> int:
        return self._waiting

    def listen(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def submit(self, requests: pa.RecordBatch) -> None:
        if self._closed:
            raise PoolDown(f"pool {self._name}: its stand-in is closed")
        if requests.num_rows == 0:
            return
        started_at = self._now()
        self._ready.append(_answer(requests, started_at, self._now))
        self._waiting += requests.num_rows
        self._wake()

    def poll(self) -> list[pa.RecordBatch]:
        ready, self._ready, self._waiting = self._ready, [], 0
        return ready

    def cancel(self, tags: Collection[int] | None = None) -> None:
        """Gives up nothing: what was submitted is answered already."""

    def close(self) -> None:
        self._closed = True
        self._ready, self._waiting = [], 0


def _answer(requests: pa.RecordBatch, started_at: datetime, now: Callable[[], datetime]) -> pa.RecordBatch:
    rows = requests.num_rows
    tags = requests.column("tag").to_numpy(zero_copy_only=False)
    noise = _splitmix64(tags.astype(np.int64).view(np.uint64))
    limit = np.maximum(requests.column("max_tokens").to_numpy(zero_copy_only=False), 1).astype(np.uint64)
    wanted = _samples_wanted(requests.column("sampling"))
    output_tokens = (1 + noise % limit).astype(np.int64) * wanted
    input_tokens = requests.column("input_tokens").cast(pa.int64())
    # The upper bits choose the text, so that it does not hang together with the length.
    picks = (noise >> np.uint64(40)) % np.uint64(len(_ANSWERS))
    columns = {
        "tag": requests.column("tag"),
        "status": _constant(_OK, rows),
        "output": _texts(picks),
        "samples": _samples(picks, wanted),
        "finish_reason": _constant(_STOP, rows),
        "input_tokens": input_tokens,
        "cached_tokens": _cached(requests, input_tokens),
        "output_tokens": pa.array(output_tokens),
        "usage_source": _constant(_REPORTED, rows),
        "started_at": _instant(started_at, rows),
        "finished_at": _instant(now(), rows),
    }
    return pa.RecordBatch.from_arrays(
        [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in RESULT_SCHEMA], schema=RESULT_SCHEMA
    )


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _texts(picks: npt.NDArray[np.uint64]) -> pa.Array:
    return _ANSWERS.take(pa.array(picks.astype(np.int8)))


def _constant(one: pa.Array, rows: int) -> pa.Array:
    return one.take(pa.array(np.zeros(rows, np.int8)))


def _instant(at: datetime, rows: int) -> pa.Array:
    micros = pa.scalar(at, pa.timestamp("us", "UTC")).value
    return pa.array(np.full(rows, micros, np.int64)).cast(pa.timestamp("us", "UTC"))


def _cached(requests: pa.RecordBatch, input_tokens: pa.Array) -> pa.Array:
    if IDEAL_CACHED not in requests.schema.names:
        return pa.nulls(requests.num_rows, pa.int64())
    return pc.min_element_wise(requests.column(IDEAL_CACHED).cast(pa.int64()), input_tokens, skip_nulls=False)


def _samples_wanted(sampling: pa.Array) -> npt.NDArray[np.int64]:
    """How many samples each row asks for; one JSON object is read per distinct sampling, not per row."""
    coded = sampling if pa.types.is_dictionary(sampling.type) else sampling.dictionary_encode()
    by_code = np.array([*(_n(text) for text in coded.dictionary.to_pylist()), 1], np.int64)
    codes: npt.NDArray[np.int32] = coded.indices.fill_null(len(coded.dictionary)).to_numpy(zero_copy_only=False)
    return by_code[codes]


def _n(sampling: str | None) -> int:
    n = json.loads(sampling).get("n") if sampling else None
    return n if isinstance(n, int) and n > 1 else 1


def _samples(picks: npt.NDArray[np.uint64], wanted: npt.NDArray[np.int64]) -> pa.Array:
    """All samples of the rows with n > 1, the first being the output; NULL elsewhere."""
    type_ = RESULT_SCHEMA.field("samples").type
    many = wanted > 1
    if not many.any():
        return pa.nulls(len(picks), type_)
    lengths = np.where(many, wanted, 0)
    ends = np.cumsum(lengths)
    first = np.repeat(picks, lengths)
    nth = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    values = _texts((first + nth.astype(np.uint64)) % np.uint64(len(_ANSWERS)))
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, values, type=type_, mask=pa.array(~many))
