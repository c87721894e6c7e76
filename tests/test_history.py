"""History: which earlier attempts belong to which of a start's requests, and what they leave to be done."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_plans import Planned, make_context, make_plan, write_input

from bidbeam.connectors.pools import PriceSchedule
from bidbeam.connectors.schemas import SEGMENT
from bidbeam.transforms.compaction import keep_attempts
from bidbeam.transforms.history import history_of, match_history, settled_places
from bidbeam.transforms.journal import list_segments, write_segment
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms

TERMS = Terms("near", "m", PriceSchedule("price-near", "near", {"output": Decimal("4E-7")}))


def plan_of(home: Path, rows: list[dict[str, Any]], **keys: Any) -> Planned:
    table = pa.Table.from_pylist(rows)
    plan = write_input(home / "in", {"a.parquet": table}, 8)
    return make_plan(make_context(home, plan, has_history=True, **keys), plan)


def settle(context: RunContext, number: int, rows: list[dict[str, Any]]) -> None:
    """Journals attempts of the first start."""
    given = {"status": "ok", "pool": "near", "price_id": "price-near", "kind": "primary", "cost": Decimal(1)}
    table = pa.Table.from_pylist([given | row for row in rows], SEGMENT)
    write_segment(context.journal, "start-001/segments/r1-s000", number, table, [TERMS])


def keys_of(planned: Planned) -> list[tuple[int, int, bytes, int]]:
    """Range, place, key and leader of every place."""
    return [
        (range_, place, row["key"], row["leader"])
        for range_, order in planned.orders.items()
        for place, row in enumerate(order.to_pylist())
    ]


def second_start(planned: Planned) -> Planned:
    """The same input planned by a second start."""
    return make_plan(replace(planned.context, start=2), planned.input)


def matched(planned: Planned) -> dict[tuple[int, int], list[str]]:
    """Outputs of the earlier attempts, by range and place."""
    found: dict[tuple[int, int], list[str]] = {}
    match_history(planned.context, planned.ranges, planned.spills)
    for ref in planned.ranges:
        history = history_of(planned.context, ref.range)
        for row in history.to_pylist() if history is not None else []:
            assert row["tag"] >> 32 == ref.range
            found.setdefault((ref.range, row["tag"] & 0xFFFFFFFF), []).append(row["output"])
    return found


@pytest.mark.parametrize("ranges", [1, 4])
def test_every_request_finds_its_own_attempts(tmp_path: Path, ranges: int) -> None:
    """Attempts of any segment, retries too, come to the place where their request stands now, under its new tag."""
    first = plan_of(tmp_path, [{"prompt": f"text {n:03d}"} for n in range(60)], ranges=ranges)
    entries = keys_of(first)
    settle(first.context, 0, [{"key": key, "tag": 5, "output": f"{r}/{p}"} for r, p, key, _ in entries[::2]])
    settle(first.context, 1, [{"key": key, "tag": 6, "output": f"{r}/{p}"} for r, p, key, _ in entries[::4]])
    assert matched(second_start(first)) == {
        (r, p): [f"{r}/{p}"] * (2 if n % 4 == 0 else 1) for n, (r, p, _, _) in enumerate(entries) if n % 2 == 0
    }


def test_what_is_not_in_the_input_any_more_belongs_to_nobody(tmp_path: Path) -> None:
    """An answer to a row that was taken away is left alone, and overhead is nobody's."""
    planned = plan_of(tmp_path, [{"prompt": "here"}])
    settle(planned.context, 0, [{"key": b"\x01" * 16, "tag": 1, "output": "gone"}])
    settle(planned.context, 1, [{"key": None, "tag": None, "kind": "overhead"}])
    assert matched(second_start(planned)) == {}


def test_a_dead_row_does_not_come_alive_by_its_twins_answer(tmp_path: Path) -> None:
    """A row whose id was taken keeps no answer, though its prompt is the very one that was answered."""
    planned = plan_of(tmp_path, [{"id": "a", "prompt": "same"}, {"id": "a", "prompt": "same"}])
    (_, _, key, _), (_, _, dead, _) = keys_of(planned)
    assert key == dead
    settle(planned.context, 0, [{"key": key, "tag": 0, "output": "yes", "request_id": "a"}])
    assert matched(second_start(planned)) == {(0, 0): ["yes"]}


def test_twins_of_two_placements_keep_an_attempt_each(tmp_path: Path) -> None:
    """Content says nothing of placement: of requests with one key each finds the attempts made under its own id."""
    rows = [{"id": name, "prompt": "same", "placement": where} for name, where in (("a", None), ("b", '{"zdr": true}'))]
    rows.append({"id": "c", "prompt": "other", "placement": None})
    planned = plan_of(tmp_path, rows)
    entries = keys_of(planned)
    twins = [key for _, _, key, _ in entries if [k for _, _, k, _ in entries].count(key) == 2]
    other = next(key for _, _, key, _ in entries if key not in twins)
    attempts = [{"key": twins[0], "tag": 0, "output": name, "request_id": name} for name in "ab"]
    # The unique one is found by content alone: rows may be renamed.
    attempts.append({"key": other, "tag": 0, "output": "c", "request_id": "renamed"})
    settle(planned.context, 0, attempts)
    found = matched(second_start(planned))
    assert sorted(found.values()) == [["a"], ["b"], ["c"]]


def test_only_what_is_open_is_asked_again(tmp_path: Path) -> None:
    """Answers and refusals are settled; other failures are final only once a start has run to its end."""
    planned = plan_of(tmp_path, [{"prompt": f"text {n}"} for n in range(6)])
    ends = [("ok", None), ("failed", "caller"), ("failed", "server"), ("failed", "rate"), ("lost", "server")]
    settle(
        planned.context,
        0,
        [
            {"key": key, "tag": 0, "status": status, "error_class": error}
            for (_, _, key, _), (status, error) in zip(keys_of(planned), ends, strict=False)
        ],
    )
    again = second_start(planned)
    match_history(again.context, again.ranges, again.spills)
    assert settled_places(again.context, 0, 6).tolist() == [True, True, False, False, False, False]
    # What the first start keeps once it has ended.
    history = history_of(again.context, 0)
    assert history is not None
    keep_attempts(planned.context, 0, history, np.zeros(0, np.int64), None)
    for name in list_segments(again.context.journal):
        again.context.journal.delete(name)
    third = make_plan(replace(planned.context, start=3, ended_start=1), planned.input)
    match_history(third.context, third.ranges, third.spills)
    assert settled_places(third.context, 0, 6).tolist() == [True, True, True, False, True, False]
