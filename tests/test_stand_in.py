"""The engine of a rehearsal: answers at once, the same every time, within what was asked."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.engine import RESULT_SCHEMA, Engine
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.stand_in import WINDOW, StandIn

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def batch(rows: list[dict[str, Any]], *, ideal: bool = False) -> pa.RecordBatch:
    sampling = [json.dumps({"max_tokens": row["max_tokens"], "n": row.get("n", 1)}) for row in rows]
    columns = {
        "tag": pa.array([row["tag"] for row in rows], pa.int64()),
        "input_tokens": pa.array([row.get("input_tokens", 10) for row in rows], pa.int32()),
        "max_tokens": pa.array([row["max_tokens"] for row in rows], pa.int32()),
        "sampling": pa.array(sampling, pa.string()).dictionary_encode(),
    }
    if ideal:
        columns["ideal_cached_tokens"] = pa.array([row.get("ideal", 0) for row in rows], pa.int32())
    return pa.RecordBatch.from_pydict(columns)


def answers(requests: pa.RecordBatch) -> list[dict[str, Any]]:
    engine = StandIn(now=lambda: NOON)
    engine.submit(requests)
    (result,) = engine.poll()
    result.validate(full=True)
    assert result.schema == RESULT_SCHEMA
    return result.to_pylist()


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "tag": st.integers(-(2**63), 2**63 - 1),
            "max_tokens": st.integers(1, 2**20),
            "n": st.integers(1, 4),
            "input_tokens": st.integers(1, 10_000),
            "ideal": st.integers(0, 10_000),
        }
    ),
    min_size=1,
    max_size=40,
)


@given(ROWS)
def test_answers_within_what_was_asked(rows: list[dict[str, Any]]) -> None:
    """Every row is answered ok, in order, with n samples whose tokens fit n x max_tokens and cached within input."""
    for row, answer in zip(rows, answers(batch(rows, ideal=True)), strict=True):
        assert (answer["tag"], answer["status"], answer["finish_reason"]) == (row["tag"], "ok", "stop")
        assert row["n"] <= answer["output_tokens"] <= row["n"] * row["max_tokens"]
        assert answer["input_tokens"] == row["input_tokens"]
        assert answer["cached_tokens"] == min(row["ideal"], row["input_tokens"])
        assert answer["output"]
        if row["n"] == 1:
            assert answer["samples"] is None
        else:
            assert len(answer["samples"]) == row["n"]
            assert answer["samples"][0] == answer["output"]


@given(ROWS)
def test_answers_do_not_depend_on_batching(rows: list[dict[str, Any]]) -> None:
    """A row is answered alike alone and among others, today and tomorrow."""
    together = answers(batch(rows))
    alone = [answers(batch([row]))[0] for row in rows]
    assert together == alone


def test_reports_no_cached_tokens_unless_told_what_is_ideal() -> None:
    """Without the ideal's column cached tokens are unknown, not 0."""
    assert answers(batch([{"tag": 1, "max_tokens": 5}]))[0]["cached_tokens"] is None


def test_window_fills_and_empties() -> None:
    """Room shrinks by what is submitted and comes back when it is polled; an empty batch is no news."""
    woken: list[int] = []
    engine: Engine = StandIn()
    engine.listen(lambda: woken.append(1))
    assert engine.wants == frozenset()
    engine.submit(batch([{"tag": 1, "max_tokens": 5}]).slice(0, 0))
    assert (woken, engine.poll()) == ([], [])
    engine.submit(batch([{"tag": 1, "max_tokens": 5}, {"tag": 2, "max_tokens": 5}]))
    assert (engine.room, engine.in_flight, len(woken)) == (WINDOW - 2, 2, 1)
    engine.cancel()
    assert engine.poll()[0].num_rows == 2
    assert (engine.room, engine.in_flight) == (WINDOW, 0)


def test_takes_nothing_once_closed() -> None:
    """Closing twice is harmless; submitting afterwards says that the pool is gone."""
    engine = StandIn()
    engine.close()
    engine.close()
    assert engine.room == 0
    with pytest.raises(PoolDown):
        engine.submit(batch([{"tag": 1, "max_tokens": 5}]))
