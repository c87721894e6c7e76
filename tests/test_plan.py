"""The plan: an external sort of arbitrary rows into ranges, and who answers for whom."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import Planned, make_context, make_plan, write_input
from test_prefix import trie_hits

from bidbeam.transforms.merging import BYTES_PER_TOKEN, read_range
from bidbeam.transforms.order import split_group

words = st.lists(st.sampled_from(["", "a", "ab", "é😀", "\0", "one long shared beginning ", "z"]), max_size=4)
row = st.fixed_dictionaries(
    {
        "prompt": st.one_of(st.none(), words.map("".join)),
        "id": st.one_of(st.none(), st.integers(0, 25).map(str)),
        "tenant": st.sampled_from([None, "x", "y"]),
        "model": st.sampled_from([None, None, "m", "k", "unknown"]),
        "temperature": st.sampled_from([None, 0.0, 1.0]),
        "placement": st.sampled_from([None, None, '{"zdr": true}', '{"operators": ["own"]}']),
    }
)
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()), ("id", pa.string()), ("tenant", pa.string()), ("model", pa.string()),
        ("temperature", pa.float64()), ("placement", pa.string()),
    ]
)  # fmt: skip


def plan_of(home: Path, files: list[list[dict[str, Any]]], *, split_rows: int = 5, **keys: Any) -> Planned:
    tables = {f"f{n}.parquet": pa.Table.from_pylist(rows, SCHEMA) for n, rows in enumerate(files)}
    plan = write_input(home, tables, split_rows)
    return make_plan(make_context(home, plan, **keys), plan)


def places_of(planned: Planned) -> list[dict[str, Any]]:
    """One dict a place, in order: what the order says of it, and the spilled row that stands there."""
    found = []
    for ref in planned.ranges:
        spilled = read_range(planned.context, planned.spills, ref.range).rename_columns(
            [
                name.removeprefix("bidbeam:")
                for name in read_range(planned.context, planned.spills, ref.range).column_names
            ]
        )
        rows = spilled.to_pylist()
        pieces = sorted((s for s in planned.spills if s.rows_per_range[ref.range]), key=lambda s: s.split)
        starts = np.concatenate([[0], np.cumsum([s.rows_per_range[ref.range] for s in pieces])])
        for place, entry in enumerate(planned.orders[ref.range].to_pylist()):
            request = rows[starts[entry["piece"]] + entry["index"]]
            text = request.get("key", request.get("in:0:prompt"))
            found.append(
                {
                    **request,
                    **entry,
                    "content_key": entry["key"],
                    "bytes": text.encode() if isinstance(text, str) else text,
                    "range": ref.range,
                    "place": place,
                    "group_name": ref.groups[entry["group"]],
                }
            )
    return found


def tokens_of(data: bytes) -> list[bytes]:
    return [data[i : i + BYTES_PER_TOKEN] for i in range(0, len(data), BYTES_PER_TOKEN)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(row, max_size=14), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 80),
)
def test_arbitrary_rows_are_sorted_once_into_ranges_and_lots(
    files: list[list[dict[str, Any]]], ranges: int, split_rows: int, lot_tokens: int
) -> None:
    """Whatever the rows, splits and ranges: every good row has one place, in order, in one lot with its like."""
    with tempfile.TemporaryDirectory() as scratch:
        planned = plan_of(Path(scratch), files, split_rows=split_rows, ranges=ranges, lot_tokens=lot_tokens)
        places = places_of(planned)
    rows = sum(map(len, files))
    dead = sum(spill.dead for spill in planned.spills)
    assert len({(place["file"], place["row"]) for place in places}) == len(places) == rows - dead
    check_order(places)
    check_leaders(places)
    check_lots(planned, places)
    check_ideal(planned, places)


def check_order(places: list[dict[str, Any]]) -> None:
    bounds = [(place["group_name"], place["bytes"]) for place in places]
    assert bounds == sorted(bounds), "places are not in the order of (group, key)"
    homes = defaultdict(set)
    for place, bound in zip(places, bounds, strict=True):
        homes[bound].add(place["range"])
        model, placement, tenant = split_group(place["group_name"])
        assert (model, placement, tenant) == (place["model"], place["placement"], place["tenant"])
    assert all(len(ranges) == 1 for ranges in homes.values()), "equal keys are in two ranges"


def check_leaders(places: list[dict[str, Any]]) -> None:
    by_place = {(place["range"], place["place"]): place for place in places}
    alive = [place for place in places if place["reason"] is None]
    ids = Counter(place["request_id"] for place in alive)
    assert all(count == 1 for count in ids.values()), "two live rows have one id"
    for place in places:
        earlier = [p for p in places if p["request_id"] == place["request_id"]]
        first = min(earlier, key=lambda p: (p["file"], p["row"]))
        assert (place["reason"] == "invalid") == (place is not first)
    same: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for place in alive:
        same[place["group_name"], place["bytes"], place["sampling"]].append(place)
    keys = Counter()
    for twins in same.values():
        first = min(twins, key=lambda p: (p["file"], p["row"]))
        for place in twins:
            leader = by_place[place["range"], place["leader"]]
            assert leader is (first if place["greedy"] else place)
        keys.update((first["group_name"], key) for key in ({p["content_key"] for p in twins}))
        distinct = len({place["content_key"] for place in twins})
        assert distinct == (1 if first["greedy"] else len(twins))
    assert all(count == 1 for count in keys.values()), "two requests of a group have one key"
    for place in places:
        if place["reason"] is not None:
            assert place["leader"] == place["place"]


def check_lots(planned: Planned, places: list[dict[str, Any]]) -> None:
    live = [p for p in places if p["reason"] is None and p["leader"] == p["place"]]
    by_place = {(place["range"], place["place"]): place for place in places}
    sold: list[tuple[int, int]] = []
    budget = planned.context.lot_tokens
    for lot in planned.lots.to_pylist():
        mine = [(lot["range"], int(at)) for at in np.frombuffer(lot["places"], "<u4")]
        sold += mine
        members = [by_place[at] for at in mine]
        assert {(m["model"], m["placement"], m["tenant"]) for m in members} == {
            (lot["model"], lot["placement"], lot["tenant"])
        }
        sizes = [m["input_tokens"] + m["n"] * m["max_tokens"] for m in members]
        assert lot["requests"] == len(members)
        assert lot["input_tokens"] == sum(m["input_tokens"] for m in members)
        assert lot["max_input_tokens"] == max(m["input_tokens"] for m in members)
        assert lot["max_output_tokens"] == sum(m["n"] * m["max_tokens"] for m in members)
        assert lot["longest_tokens"] == max(m["input_tokens"] + m["max_tokens"] for m in members)
        assert sum(sizes) <= 1.25 * budget + sizes[-1], "a lot is far above its budget"
        assert (lot["start"], lot["end"]) == (mine[0][1], mine[-1][1] + 1)
    assert sold == [(place["range"], place["place"]) for place in live]
    assert planned.lots.num_rows == len(set(planned.lots.column("lot_id").to_pylist()))


def check_ideal(planned: Planned, places: list[dict[str, Any]]) -> None:
    """The ideal is a trie's over the requests of each group, range by range; and the lots' ideals add up to it."""
    expected: Counter[int] = Counter()
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for place in places:
        if place["reason"] is None and place["leader"] == place["place"]:
            groups[place["range"], place["group_name"]].append(place)
    for (range_, _), members in groups.items():
        block = planned.context.models[members[0]["model"]].cache_block
        expected[range_] += trie_hits([tokens_of(member["bytes"]) for member in members], block)  # type: ignore[misc]
    assert {ref.range: ref.ideal_cached_tokens for ref in planned.ranges} == {
        ref.range: expected[ref.range] for ref in planned.ranges
    }
    lots: Counter[int] = Counter()
    for lot in planned.lots.to_pylist():
        lots[lot["range"]] += lot["ideal_cached_tokens"]
        assert 0 <= lot["warm_tokens"] <= lot["ideal_cached_tokens"] <= lot["input_tokens"]
    assert lots == expected


def test_the_same_input_gives_the_same_plan_to_the_byte(tmp_path: Path) -> None:
    """A retried bundle writes what is there already: planning twice meets its own files and adds none."""
    rows = [
        {
            "prompt": f"shared {n % 7} item {n % 40}",
            "id": str(n),
            "tenant": "xy"[n % 2],
            "temperature": float(n % 3 > 1),
        }
        for n in range(120)
    ]
    one = plan_of(tmp_path, [rows[:70], rows[70:]], split_rows=16, ranges=4)
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = make_plan(one.context, one.input)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files
    assert (again.spills, again.ranges) == (one.spills, one.ranges)
    assert again.lots.equals(one.lots)


def test_rows_without_any_good_one_make_no_lot(tmp_path: Path) -> None:
    """Splits of bad rows alone are planned to nothing."""
    planned = plan_of(tmp_path, [[{"prompt": None, "id": "1"}, {"prompt": "", "id": "2"}]], ranges=3)
    assert (planned.ranges, planned.lots.num_rows, planned.spills[0].dead) == ([], 0, 2)


@pytest.mark.parametrize("ranges", [1, 5])
def test_ranges_are_about_as_large_as_each_other(tmp_path: Path, ranges: int) -> None:
    """Bounds from a sample of the rows cut the input into ranges of like size."""
    rows = [{"prompt": f"{n * 7919 % 4001:05d} text", "id": str(n)} for n in range(4000)]
    planned = plan_of(tmp_path, [rows], split_rows=500, ranges=ranges)
    sizes = [ref.rows for ref in planned.ranges]
    assert len(sizes) == ranges
    assert max(sizes) < 1.5 * len(rows) / ranges
