"""Lots: where the order is cut, and what is left of a prefix when some of its requests are settled."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from small_plans import make_context, make_plan, write_input

from bidbeam.transforms.lots import cut_points, lot_places, lots_of_places
from bidbeam.transforms.order import live_places, shared_with_previous

requests = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2)), max_size=60)


@given(requests, st.integers(1, 120), st.integers(1, 20))
def test_cuts_keep_groups_apart_and_lots_near_the_budget(
    rows: list[tuple[int, int, int]], budget: int, max_rows: int
) -> None:
    """Lots partition the requests: one group each, at most so many rows, about the budget unless the group ends."""
    rows = sorted(rows, key=lambda row: row[2])
    tokens, shared, groups = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    cuts = cut_points(tokens, shared, groups, budget, max_rows)
    assert cuts[0] == 0
    assert cuts[-1] == len(rows)
    for start, end in pairwise(cuts):
        assert start < end
        assert len(set(groups[start:end].tolist())) == 1
        assert end - start <= max_rows
        size, last = int(tokens[start:end].sum()), int(tokens[end - 1])
        assert size <= 1.25 * budget + last
        ends_group = end == len(rows) or groups[end] != groups[end - 1]
        assert size >= 0.75 * budget or ends_group or end - start == max_rows


def test_a_cut_falls_where_little_is_shared() -> None:
    """Near the budget a lot ends at the border of two prefixes rather than within one."""
    tokens, groups = np.full(30, 10), np.zeros(30, np.int64)
    shared = np.array([0] + [8] * 11 + [0] + [8] * 9 + [0] + [8] * 7)
    assert cut_points(tokens, shared, groups, 100) == [0, 12, 22, 30]


@given(st.lists(st.text("ab", max_size=9), min_size=1, max_size=20), st.data())
def test_what_is_left_of_an_order_shares_the_least_on_the_way(texts: list[str], data: st.DataObject) -> None:
    """With places taken out, neighbours share what a direct comparison says they share."""
    texts = sorted(texts)
    lcp = [0] + [len(_common(a, b)) for a, b in pairwise(texts)]
    order = pa.table({"shared_tokens": pa.array(lcp, pa.int32())})
    places = np.array(sorted(data.draw(st.sets(st.integers(0, len(texts) - 1), max_size=len(texts)))), np.int64)
    kept = [texts[place] for place in places]
    expected = [0] * bool(kept) + [len(_common(a, b)) for a, b in pairwise(kept)]
    assert shared_with_previous(order, places).tolist() == expected


def _common(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def test_lots_of_what_is_not_settled_hold_no_settled_place(tmp_path: Path) -> None:
    """A resumed start sells the open places alone, and counts its ideal without the settled ones."""
    table = pa.table({"prompt": [f"shared beginning of all {n:03d}" for n in range(50)]})
    plan = write_input(tmp_path, {"a.parquet": table}, 50)
    planned = make_plan(make_context(tmp_path, plan, lot_tokens=120), plan)
    order = planned.orders[0]
    settled = np.arange(50) % 3 == 0
    places = live_places(order, settled)
    lots = lots_of_places(planned.context, 0, planned.ranges[0].groups, order, places)
    sold = np.concatenate([lot_places(each) for each in lots.column("places").to_pylist()])
    assert sold.tolist() == [place for place in range(50) if place % 3]
    assert lots.column("requests").to_pylist() == [len(each) // 4 for each in lots.column("places").to_pylist()]
    # 24 characters, 6 tokens, 3 whole blocks of 2: all but the first request find them cached.
    assert sum(lots.column("ideal_cached_tokens").to_pylist()) == 6 * (len(places) - 1)
