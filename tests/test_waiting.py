"""What the progress of a run says: over all of its starts, and of what it waits for while nothing moves."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_jobs import make_job, prompts, remote

from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.store import Store
from bidbeam.pipelines.progress import LogProgress, NullProgress, PoolProgress, ProgressSnapshot, line_of
from bidbeam.pipelines.run import run_job
from bidbeam.pipelines.watch import Watch
from bidbeam.transforms.breaker import Breaker
from bidbeam.transforms.lane import Lane
from bidbeam.transforms.order import ORDER, live_places
from bidbeam.transforms.planned import Planned, note_planned, planned_of
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.waiting import Wait, wait_of


class Seen(NullProgress):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.snapshots: list[ProgressSnapshot] = []

    def update(self, snapshot: ProgressSnapshot) -> None:
        self.snapshots.append(snapshot)


def test_a_start_counts_the_whole_run_and_says_what_was_there(tmp_path: Path) -> None:
    """After rows were added to a run's input, its earlier answers count and are told apart; bad rows count as dead."""
    # Slow enough to be seen at it.
    with EndpointDouble(["tiny"], lambda seen: Reply.slow(1.6 if seen.number >= 6 else 0)) as double:
        pools = [remote("far", double.base_url)]
        run_job(make_job(tmp_path, prompts(6), pools), rehearse=False, beam_options=[], progress=NullProgress())
        more = pa.concat_tables([prompts(3, start=6), pa.table({"id": ["q0"], "prompt": ["again"]})])
        job, seen = make_job(tmp_path, None, pools), Seen()
        pq.write_table(more, tmp_path / "in" / "b.parquet")
        run_job(job, rehearse=False, beam_options=[], progress=seen)
    first = seen.snapshots[0]
    assert (first.phase, first.total, first.settled) == ("planning", 10, None)
    working = next(each for each in seen.snapshots if each.settled is not None)
    assert (working.phase, working.total, working.settled) == ("generating, round 1", 10, 6)
    assert (working.before, working.dead) == (6, 1)
    assert [(pool.settled, pool.in_flight, pool.waits) for pool in working.pools] == [(0, 3, None)]


def test_once_all_is_answered_the_run_is_published(tmp_path: Path) -> None:
    """Rows that share an answer count as settled then, and answers are counted over the shifts of all rounds."""
    scratch = Store.at(str(tmp_path))
    note_planned(scratch, 0, Planned(rows=9, open=3, shared=2, before=3, invalid=1))
    note_planned(scratch, 1, Planned(rows=1, open=1))
    context = SimpleNamespace(scratch=scratch, rows=10, spent=Decimal(1), max_cost=None, pools=())
    watch = Watch(cast(RunContext, context), NullProgress())

    def beat(shift: str, settled: int, in_flight: int) -> None:
        counts = dict.fromkeys(("failed", "input_tokens", "cached_tokens", "output_tokens", "ideal_cached_tokens"), 0)
        pool = {"pool": "far", "settled": settled, "in_flight": in_flight, "cost": "0.5", "down": None, **counts}
        scratch.replace(f"progress/{shift}.json", json.dumps({"pools": [pool]}).encode())

    beat("r001-s000", 2, 1)
    told = watch.snapshot()
    assert (told.phase, told.settled, told.before, told.shared) == ("generating, round 1", 5, 3, 2)
    beat("r001-s000", 2, 0)
    beat("r002-s000", 2, 0)
    told = watch.snapshot()
    assert (told.phase, told.settled, told.total, told.dead) == ("publishing", 9, 10, 1)
    assert told.spend == 2


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12),
    settled=st.sets(st.integers(0, 11)),
)
def test_every_row_is_planned_as_one_thing(rows: list[tuple[int, bool]], settled: set[int]) -> None:
    """What is sent, shared, settled before and invalid adds up to the rows, whatever leads what."""
    first: dict[int, int] = {}  # a row that died leads itself, the first of a kind the others
    leaders = [at if dead else first.setdefault(kind, at) for at, (kind, dead) in enumerate(rows)]
    columns: dict[str, Any] = {field.name: pa.nulls(len(rows), field.type) for field in ORDER}
    columns["leader"] = pa.array(leaders, pa.int32())
    columns["reason"] = pa.array(["invalid" if dead else None for _, dead in rows], ORDER.field("reason").type)
    order = pa.table(columns, ORDER)
    over = np.array([at in settled for at in range(len(rows))], bool)
    live = live_places(order, over)
    planned = planned_of(order, live)
    assert planned.rows == len(rows) == planned.open + planned.shared + planned.before + planned.invalid
    assert planned.open == len(live)
    assert planned.invalid == sum(dead for _, dead in rows)
    assert planned.before == sum(not dead and over[leaders[at]] for at, (_, dead) in enumerate(rows))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Endpoint:
    """As much of an engine as is asked."""

    in_flight, sent, pause_s, room = 0, 0, 0.0, 4
    listen = submit = poll = cancel = close = print
    wants: frozenset[str] = frozenset()


def lane(clock: Clock, **keys: Any) -> Any:
    usual = {
        "down": None, "engine": Endpoint(), "engine_in_flight": 4, "still_s": 0.0, "waiting": True, "ready": True,
        "breaker": Breaker(clock, first_s=8.0),
    }  # fmt: skip
    return cast(Lane, SimpleNamespace(**usual | keys))


def test_a_lane_says_what_it_waits_for() -> None:
    """Loading, a pause that was asked for, the breaker, its probe, and an answer that does not come; else nothing."""
    clock = Clock()
    it = lane(clock)
    assert wait_of(it) is None
    it.still_s = 31.0
    assert wait_of(it) == Wait("answer", 31.0)
    it.engine.pause_s = 12.0
    assert wait_of(it) == Wait("pause", 12.0)
    it.breaker.note(0, 5)
    clock.now = 3.0
    assert wait_of(it) == Wait("breaker", 5.0)
    clock.now = 9.0
    it.breaker.sent(7)
    assert wait_of(it) == Wait("probe", 31.0)
    it.ready = False
    assert wait_of(it) == Wait("ready", 31.0)
    it.down = "gone"
    assert wait_of(it) is None


@pytest.mark.parametrize("out", [0, 4])
def test_a_lane_that_has_nothing_to_do_waits_for_nothing(out: int) -> None:
    """Neither an endpoint that pauses with nothing to send, nor one that answered a moment ago."""
    it = lane(Clock(), waiting=False, engine_in_flight=out, still_s=99.0 if not out else 1.0)
    it.engine.sent, it.engine.pause_s = out, 5.0
    assert wait_of(it) is None


def test_the_line_says_what_a_pool_waits_for_and_what_was_there() -> None:
    """Beside the pool that waits; what is not known or not the case is left out."""
    pools = (PoolProgress("far", 2, 3, waits="no answer for 12.0 s of at most 600 s"), PoolProgress("near", 0, 4))
    snapshot = ProgressSnapshot("generating, round 1", total=20, settled=12, before=5, shared=2, pools=pools)
    assert line_of(snapshot) == (
        "generating, round 1 | 12/20 prompts (60%) | 5 settled before this start | 2 share another's answer | "
        "far: 3 done, 2 in flight, no answer for 12.0 s of at most 600 s | near: 4 done, 0 in flight"
    )
    assert line_of(ProgressSnapshot("planning", total=20, settled=None)) == "planning | 20 prompts"


def test_lines_come_less_often_while_nothing_gets_done() -> None:
    """Each second line of the same state takes twice as long; something done brings the next after ten seconds."""
    out, clock = io.StringIO(), Clock()
    log = LogProgress(out, clock=clock)

    def at(second: int, settled: int) -> None:
        clock.now = float(second)
        waits = f"no answer for {second} s"
        log.update(ProgressSnapshot("generating", settled=settled, pools=(PoolProgress("far", waits=waits),)))

    for second in range(301):
        at(second, 1)
    for second in range(301, 330):
        at(second, 2)
    shown = [int(line.split(" for ")[1].split()[0]) for line in out.getvalue().splitlines()]
    assert shown == [0, 10, 30, 70, 150, 301, 311]


def test_spend_counts_what_earlier_starts_spent() -> None:
    """The budget is over all starts, and so is what the line says of it."""
    line = line_of(ProgressSnapshot("planning", total=2, settled=None, spend=Decimal("0.5"), budget=Decimal(2)))
    assert line == "planning | 2 prompts | spent $0.50 of $2.00"
