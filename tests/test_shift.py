"""A shift: several pools at once, each in lot order, and what becomes of their requests when one of them fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from small_plans import Planned, make_context, make_plan, write_input

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import Interrupted, PoolDown
from bidbeam.connectors.pools import Capacity, PoolSpec, PriceSchedule
from bidbeam.connectors.profiles import ErrorClass
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.watch import Watch
from bidbeam.transforms import breaker, heartbeat, heirs, shift, stopping
from bidbeam.transforms import engines as engine_slots
from bidbeam.transforms.bid import terms_of
from bidbeam.transforms.door import Door
from bidbeam.transforms.engines import Slot
from bidbeam.transforms.journal import SegmentRef, read_segment
from bidbeam.transforms.order import read_order
from bidbeam.transforms.retrying import CHARGED_TRIES, TRIES, worst_case_of
from bidbeam.transforms.shift import Shift
from bidbeam.transforms.shift_task import Award, ShiftTask

AT = datetime(2026, 1, 2, tzinfo=UTC)
TOKENS = {"uncached_input": Decimal("1E-7"), "output": Decimal("4E-7")}
HOURS = {name: Decimal("0.000197222222222") for name in ("accelerator_second", "accelerator_idle_second", "setup")}


class Scripted:
    """An engine of ``window`` places. ``outcome`` says of each tag how it ends; ``dies_after`` so many answers it is
    gone: ``gone`` raises at once, ``falls`` gives back what it had not begun, then what it had."""

    wants = frozenset({"prompt"})

    def __init__(
        self,
        window: int = 4,
        outcome: Callable[[int], dict[str, Any]] = lambda tag: {},
        dies_after: int | None = None,
        how: str = "gone",
        holds: bool = False,
    ) -> None:
        self.window, self.outcome, self.dies_after, self.how, self.holds = window, outcome, dies_after, how, holds
        self.tags: list[int] = []
        self.attempts: list[bytes] = []
        self.given_up: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.answered = 0
        self.dead = self.closed = False

    @property
    def room(self) -> int:
        return 0 if self.dead else self.window - self.in_flight

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.given_up)

    def listen(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def submit(self, requests: pa.RecordBatch) -> None:
        assert requests.num_rows <= self.room or self.dead
        if self.dead and not self.in_flight:
            raise PoolDown("gone for good")
        self.waiting += requests.to_pylist()
        self.tags += requests.column("tag").to_pylist()
        self.attempts += requests.column("attempt_id").to_pylist()
        assert len(set(self.attempts)) == len(self.attempts), "an attempt was sent twice"
        self.wake()

    def poll(self) -> list[pa.RecordBatch]:
        results, self.given_up = self.given_up, []
        if self.dies_after is not None and self.answered >= self.dies_after and not self.dead:
            self.dead = True
            begun, rest = self.waiting[: self.window // 2], self.waiting[self.window // 2 :]
            self.waiting = []
            if self.how == "gone":
                raise PoolDown("the line went dead")
            self.given_up = [_result(r, status="cancelled", error_message="given up in flight") for r in begun]
            results += [_result(r, status="cancelled", error_message="not sent") for r in rest]
        if self.dead and not results:
            raise PoolDown("the line went dead")
        if self.waiting and not self.holds:
            done, self.waiting = self.waiting[:1], self.waiting[1:]
            self.answered += 1
            results += [_result(row, **self.outcome(row["tag"])) for row in done]
        if not self.holds:
            self.wake()
        return [pa.RecordBatch.from_pylist(results, RESULT_SCHEMA)] if results else []

    def cancel(self, tags: Any = None) -> None:
        mine = [row for row in self.waiting if tags is None or row["tag"] in tags]
        self.given_up += [_result(row, status="cancelled", error_message="given up in flight") for row in mine]
        self.waiting = [row for row in self.waiting if row not in mine]

    def close(self) -> None:
        self.closed = True


def _result(row: dict[str, Any], **given: Any) -> dict[str, Any]:
    answer = {"output": f"to {row['prompt']}", "input_tokens": 10, "output_tokens": 2, "usage_source": "reported"}
    result = {"tag": row["tag"], "status": "ok", "started_at": AT, "finished_at": AT, **given}
    return answer | result if result["status"] == "ok" else result


def pool(name: str, prices: Any = TOKENS, **keys: Any) -> PoolSpec:
    kind = "vllm" if prices is HOURS else "openai"
    return PoolSpec(name, kind, {"m": "m"}, PriceSchedule(f"price-{name}", name, prices), Capacity(4), **keys)


class Shown(NullProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Stage:
    """A planned input with its pools; runs one shift over scripted engines and reads back its segments."""

    def __init__(self, home: Path, rows: int = 24, pools: tuple[PoolSpec, ...] = (), **keys: Any) -> None:
        self.pools = pools or (pool("near"), pool("far"))
        table = pa.table({"prompt": [f"shared beginning {n:03d}" for n in range(rows)]})
        plan = write_input(home, {"a.parquet": table}, rows)
        self.plan: Planned = make_plan(make_context(home, plan, pools=self.pools, **{"lot_tokens": 60, **keys}), plan)
        self.context = self.plan.context

    def task(
        self,
        split: dict[str, int],
        runner_up: str | None = None,
        round_: int = 1,
        next_best: tuple[str, ...] = (),
        **award: Any,
    ) -> ShiftTask:
        """The lots dealt in order: so many to each pool."""
        lots = self.plan.lots.num_rows
        offered = self.plan.lots.append_column("runner_up", pa.array([runner_up] * lots, pa.string()))
        offered = offered.append_column("next_best", pa.array([next_best] * lots, pa.list_(pa.string())))
        awards, at = [], 0
        terms = {spec.name: {"m": terms_of(self.context, spec, "m")} for spec in self.pools}
        for name, count in split.items():
            part = offered.slice(at, count)
            awards.append(Award(name, 0, part, terms[name], award.get("reserved_ms")))
            at += count
        assert at == self.plan.lots.num_rows
        return ShiftTask(round_, 0, tuple(awards), {(name, "m"): terms[name]["m"] for name in terms})

    def run(self, task: ShiftTask, engines: dict[str, Scripted], **keys: Any) -> tuple[pa.Table, pa.Table]:
        """The rows of all segments that the shift gave, and what it left unserved."""
        context = keys.pop("context", self.context)
        again = keys.pop("again", {})
        slots = {name: Slot(engine, lambda timeout_s: 7) for name, engine in engines.items()}

        def slot(name: str, model: str, replica: int) -> Slot:
            if slots[name].dead and again.get(name):
                slots[name] = Slot(again[name].pop(0), lambda timeout_s: 7)
            return slots[name]

        working = Shift(task, context, self.plan.spills, slot=slot, **keys)
        segments: list[SegmentRef] = []
        unserved = None
        for result in working.run():
            if result.segment is not None:
                segments.append(result.segment)
            if result.unserved is not None:
                unserved = result.unserved
        assert unserved is not None
        assert len({segment.name for segment in segments}) == len(segments)
        tables = [read_segment(context.journal, segment.name)[0] for segment in segments]
        return pa.concat_tables(tables), unserved


def places(lots: pa.Table) -> list[int]:
    return sorted(int(place) for lot in lots.column("places").to_pylist() for place in np.frombuffer(lot, "<u4"))


def tags(rows: pa.Table, **wanted: str) -> list[int]:
    return sorted(row["tag"] for row in rows.to_pylist() if row["tag"] is not None and wanted.items() <= row.items())


def test_every_pool_works_through_its_lots_in_order(tmp_path: Path) -> None:
    """Each engine gets its own lots' requests once, in the order of the plan, and nothing is left."""
    stage = Stage(tmp_path)
    lots = stage.plan.lots.num_rows
    near, far = Scripted(), Scripted(3)
    rows, unserved = stage.run(stage.task({"near": lots - 2, "far": 2}), {"near": near, "far": far})
    assert near.tags == sorted(near.tags)
    assert far.tags == sorted(far.tags)
    assert near.tags + far.tags == list(range(24)) == tags(rows, status="ok")
    assert unserved.num_rows == 0
    assert {row["pool"] for row in rows.to_pylist()} == {"near", "far"}


@pytest.mark.parametrize("how", ["gone", "falls"])
def test_a_pool_that_dies_hands_its_lots_to_the_runner_up(tmp_path: Path, how: str) -> None:
    """What a dead pool was not asked for, its runner-up serves in the same shift; what it was asked for is lost."""
    stage = Stage(tmp_path)
    near, far = Scripted(4, dies_after=5, how=how), Scripted()
    lots = stage.plan.lots.num_rows
    rows, unserved = stage.run(stage.task({"near": lots}, "far"), {"near": near, "far": far})
    lost = tags(rows, status="lost")
    begun = 4 if how == "gone" else 2
    assert lost == near.tags[5 : 5 + begun]
    assert tags(rows, status="ok") == sorted(set(range(24)) - set(lost))
    assert sorted({*near.tags[:5], *lost} | set(far.tags)) == list(range(24))
    assert not set(far.tags) & set(lost)
    assert places(unserved) == lost
    assert {lot["attempt_no"] for lot in unserved.to_pylist()} == {2}
    assert all(lot["failed_on"] == ["near"] and lot["last_error"] == "server" for lot in unserved.to_pylist())
    worst = {row["tag"]: row for row in rows.to_pylist() if row["status"] == "lost"}
    for row in worst.values():
        assert row["cost"] == row["input_tokens"] * Decimal("1E-7") + row["output_tokens"] * Decimal("4E-7") > 0
        assert (row["usage_source"], row["output_tokens"], row["error_class"]) == ("estimate", 4, "server")


def test_a_dead_pool_s_lots_go_on_at_once_although_another_sits_on_its_requests(tmp_path: Path) -> None:
    """Where the runner-up is gone too, the market's next best serves them in the same shift."""
    stage = Stage(tmp_path, pools=tuple(pool(name) for name in ("near", "far", "third", "slow")))
    lots = stage.plan.lots.num_rows
    task = stage.task({"near": lots - 1, "slow": 1}, "far", next_best=("third",))
    held = sorted(places(task.awards[1].lots))
    asked: list[int] = []

    class Sitting(Scripted):
        """Answers once everything else was asked of somebody."""

        def poll(self) -> list[pa.RecordBatch]:
            self.holds = len(asked) < 24 - len(held) - 4
            return super().poll()

    class Third(Scripted):
        def submit(self, requests: pa.RecordBatch) -> None:
            asked.extend(requests.column("tag").to_pylist())
            super().submit(requests)

    slow, third = Sitting(), Third()
    engines = {"near": Scripted(4, dies_after=0), "far": Scripted(4, dies_after=0), "third": third, "slow": slow}
    rows, unserved = stage.run(task, engines)
    lost = tags(rows, status="lost")
    assert slow.tags == held
    assert tags(rows, status="ok", pool="third") == sorted(third.tags) == sorted(asked)
    assert tags(rows, status="ok") == sorted(set(range(24)) - set(lost))
    assert places(unserved) == lost


def test_an_idle_pool_takes_what_waits_at_one_that_sits_on_its_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lot by lot, the last first; what was sent stays where it is, and is answered there."""
    for name in ("LONG_S", "LONGEST_S", "_EVERY_S"):
        monkeypatch.setattr(heirs, name, 0.0)
    stage = Stage(tmp_path)
    lots = stage.plan.lots.num_rows

    class Sitting(Scripted):
        def poll(self) -> list[pa.RecordBatch]:
            self.holds = len(far.tags) < 24 - 4
            return super().poll()

    near, far = Sitting(), Scripted()
    rows, unserved = stage.run(stage.task({"near": lots}, "far"), {"near": near, "far": far})
    assert unserved.num_rows == 0
    assert (tags(rows, status="ok", pool="near"), near.tags) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert sorted(far.tags) == list(range(4, 24))
    assert far.tags[0] > 12


def test_what_is_ideal_of_each_request_sums_to_what_is_ideal_of_its_lot(tmp_path: Path) -> None:
    """So that the progress and the bill speak of one ideal: the first request shares with the lot before, unless some
    of its lot has gone elsewhere."""
    stage = Stage(tmp_path)
    door = Door(stage.context, stage.plan.spills)
    lots = stage.plan.lots.to_pylist()
    ideal = [pc.sum(door.open(lot, frozenset()).info.column("ideal_cached_tokens")).as_py() for lot in lots]
    assert ideal == [lot["ideal_cached_tokens"] for lot in lots]
    assert any(lot["warm_tokens"] for lot in lots)
    rest = {**lots[1], "places": lots[1]["places"][4:]}
    assert door.open(rest, frozenset()).info.column("ideal_cached_tokens")[0].as_py() == 0


def test_nothing_is_taken_from_a_pool_that_answers(tmp_path: Path) -> None:
    """However idle its runner-up is: it won those lots."""
    stage = Stage(tmp_path)
    near, far = Scripted(), Scripted()
    stage.run(stage.task({"near": stage.plan.lots.num_rows}, "far"), {"near": near, "far": far})
    assert (len(near.tags), far.tags) == (24, [])


def test_the_reserve_bounds_who_takes_over(tmp_path: Path) -> None:
    """Of a dead pool's lots a dearer one gets as many as their worst case leaves room for; the rest is left over."""
    dear = {name: 2 * price for name, price in TOKENS.items()}
    stage = Stage(tmp_path, pools=(pool("near"), pool("far", dear)))
    lots = stage.plan.lots.num_rows
    task = stage.task({"near": lots}, next_best=("far",))
    every = np.arange(24)
    worst = worst_case_of(read_order(stage.context, 0), every, estimated=True, terms=task.awards[0].terms["m"])
    far = Scripted()
    reserved = worst * 3 / 2
    rows, unserved = stage.run(replace(task, reserved=reserved), {"near": Scripted(4, dies_after=4), "far": far})
    assert 0 < len(far.tags) < 24 - 8
    assert tags(rows, status="ok", pool="far") == sorted(far.tags)
    assert places(unserved) == sorted(set(range(24)) - set(tags(rows, status="ok")))
    assert sum((row["cost"] for row in rows.to_pylist()), Decimal(0)) <= reserved


def test_a_dead_engine_paid_by_time_costs_its_seconds_and_no_tokens(tmp_path: Path) -> None:
    """Requests that die with our own engine are failed attempts that share its time, and setup is booked once."""
    stage = Stage(tmp_path, pools=(pool("own", HOURS), pool("far")))
    own, far = Scripted(4, dies_after=3), Scripted()
    rows, unserved = stage.run(stage.task({"own": stage.plan.lots.num_rows}, "far"), {"own": own, "far": far})
    assert len(tags(rows, status="failed", pool="own")) == 4
    assert tags(rows, status="lost") == []
    assert places(unserved) == tags(rows, status="failed")
    setup = [row for row in rows.to_pylist() if row["q_setup"] is not None]
    assert [row["q_setup"] for row in setup] == [Decimal("0.007")]
    assert all(row["tag"] is None and row["kind"] == "overhead" for row in setup)


@pytest.mark.parametrize("prices", [HOURS, TOKENS])
def test_an_engine_of_ours_that_dies_is_started_again_once(tmp_path: Path, prices: Any) -> None:
    """What was in flight is booked with the seconds it took, or at its worst case; the rest of the queue stays. When it
    dies again its lots move on to the runner-up."""
    own = replace(pool("own", prices), kind="vllm")
    stage = Stage(tmp_path, rows=60, pools=(own, pool("far")))
    task = stage.task({"own": stage.plan.lots.num_rows}, "far")
    first, second, far = Scripted(4, dies_after=3), Scripted(), Scripted()
    rows, unserved = stage.run(task, {"own": first, "far": far}, again={"own": [second]})
    died = first.tags[3:]
    ended = "failed" if prices is HOURS else "lost"
    assert len(died) == 4
    assert tags(rows, status=ended, pool="own") == died
    # What is lost may have been served, and is not asked again in the round.
    assert sorted(set(second.tags)) == sorted(set(range(60)) - set(first.tags[: 3 if prices is HOURS else 7]))
    served = tags(rows, status="ok")
    assert sorted([*served, *places(unserved)]) == list(range(60))
    assert (far.tags, places(unserved)) == ([], [] if prices is HOURS else died)
    ids = rows.column("attempt_id").to_pylist()
    assert len(set(ids)) == len(ids)
    setups = [row["q_setup"] for row in rows.to_pylist() if row["q_setup"] is not None]
    assert setups == ([Decimal("0.007")] * 2 if prices is HOURS else [])


def test_an_engine_that_dies_twice_gives_its_lots_away(tmp_path: Path) -> None:
    """It is not started a third time in one shift."""
    stage = Stage(tmp_path, rows=60, pools=(pool("own", HOURS), pool("far")))
    task = stage.task({"own": stage.plan.lots.num_rows}, "far")
    first, second, third, far = Scripted(4, dies_after=3), Scripted(4, dies_after=2), Scripted(), Scripted()
    rows, unserved = stage.run(task, {"own": first, "far": far}, again={"own": [second, third]})
    assert third.tags == []
    assert len(first.tags) == 7
    assert 2 <= len(second.tags) <= 6
    assert tags(rows, status="failed", pool="own") == sorted([*first.tags[3:], *second.tags[2:]])
    assert sorted([*tags(rows, status="ok"), *places(unserved)]) == list(range(60))
    assert len(set(first.tags) | set(second.tags) | set(far.tags)) == 60


def test_without_a_runner_up_what_was_not_sent_keeps_its_first_attempt(tmp_path: Path) -> None:
    """The next round gets the failed and the unsent part of a lot apart: one had its attempt, the other did not."""
    stage = Stage(tmp_path)
    near = Scripted(4, dies_after=5)
    rows, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}), {"near": near})
    left = unserved.to_pylist()
    assert len({lot["lot_id"] for lot in left}) == len(left)
    assert len({place for lot in left for place in np.frombuffer(lot["places"], "<u4").tolist()}) == 19
    assert places(unserved) == sorted(set(range(24)) - set(tags(rows, status="ok")))
    tried = [lot for lot in left if lot["attempt_no"] == 2]
    assert places(pa.Table.from_pylist(tried, unserved.schema)) == tags(rows, status="lost")
    assert {lot["round"] for lot in left} == {2}
    assert all(lot["requests"] == len(lot["places"]) // 4 for lot in left)


def test_a_failed_request_is_tried_again_and_goes_to_the_next_round_unless_it_was_at_fault_itself(
    tmp_path: Path,
) -> None:
    """A request that the pool refused is final; any other failure is tried again in the round, as often as a round may,
    and then goes on, one attempt further. What answered is asked once."""
    ends = {
        3: "caller", 5: "policy",
        7: "server", 9: "bad_output", 11: "timeout", 13: "rate", 15: "capacity", 17: "auth_funds",
    }  # fmt: skip
    assert set(ends.values()) == set(get_args(ErrorClass))
    again = [7, 9, 11, 13, 15, 17]
    near = Scripted(outcome=lambda tag: {"status": "failed", "error_class": ends[tag]} if tag in ends else {})
    stage = Stage(tmp_path, rows=48)
    rows, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}), {"near": near})
    assert tags(rows, status="failed") == sorted([3, 5, *(TRIES * again)])
    assert Counter(near.tags) == Counter({tag: TRIES if tag in again else 1 for tag in range(48)})
    assert places(unserved) == again
    assert {lot["attempt_no"] for lot in unserved.to_pylist()} == {TRIES + 1}
    assert sum((row["cost"] for row in rows.to_pylist() if row["status"] == "failed"), Decimal(0)) == 0


def test_a_pool_that_fails_more_than_it_answers_is_not_asked_again_in_the_round(tmp_path: Path) -> None:
    """Its failures go straight to the next round, or to the runner-up if that is at work."""
    near = Scripted(outcome=lambda tag: {} if tag % 3 == 0 else {"status": "failed", "error_class": "server"})
    far = Scripted()
    stage = Stage(tmp_path / "alone")
    _, unserved = stage.run(stage.task({"near": 1, "far": stage.plan.lots.num_rows - 1}), {"near": near, "far": far})
    assert len(set(near.tags)) == len(near.tags)
    assert places(unserved) == sorted(tag for tag in near.tags if tag % 3)
    near, far = Scripted(outcome=lambda tag: {"status": "failed", "error_class": "server"}), Scripted()
    stage = Stage(tmp_path / "with")
    task = stage.task({"near": 1, "far": stage.plan.lots.num_rows - 1}, "far")
    rows, unserved = stage.run(task, {"near": near, "far": far})
    assert sorted(far.tags) == list(range(24)) == tags(rows, status="ok")
    assert unserved.num_rows == 0


@pytest.mark.parametrize("error_class", sorted(breaker.COUNTED))
def test_lots_are_led_around_a_pool_whose_breaker_opens(tmp_path: Path, error_class: str) -> None:
    """A pool that answers with errors alone gets no more than its breaker needs to see; its runner-up serves the rest,
    what failed included, and the beats say so once."""
    stage = Stage(tmp_path, rows=60)
    near, far = Scripted(outcome=lambda tag: {"status": "failed", "error_class": error_class}), Scripted()
    rows, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}, "far"), {"near": near, "far": far})
    assert 5 <= len(near.tags) <= 5 + near.window
    assert sorted(far.tags) == list(range(60)) == tags(rows, status="ok")
    assert unserved.num_rows == 0
    progress = Shown()
    with Watch(stage.context, progress):
        pass
    assert [note for note in progress.notes if "near" in note] == [
        f"pool near: {shift._AILING.format(last=f' (last: {error_class})')}"
    ]


@pytest.mark.parametrize("failing", [9, 1000])
def test_without_a_runner_up_a_failing_pool_is_probed_until_it_answers_or_counts_as_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """One request at a time: the first that is answered lets the others go; after six that are not the rest goes on to
    the next round unsent, and the pool is down for its auction."""
    monkeypatch.setattr(breaker, "FIRST_OPEN_S", 0.001)
    stage, asked = Stage(tmp_path, rows=60), Counter[int]()

    def outcome(tag: int) -> dict[str, Any]:
        asked[tag] += 1
        return {"status": "failed", "error_class": "timeout"} if asked.total() <= failing else {}

    near = Scripted(outcome=outcome)
    rows, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}), {"near": near})
    if failing == 9:
        assert tags(rows, status="ok") == list(range(60))
        assert unserved.num_rows == 0
        return
    assert near.tags == list(range(len(near.tags)))
    assert 5 + 6 <= len(near.tags) <= 5 + near.window + 6
    assert places(unserved) == list(range(60))
    assert {lot["attempt_no"] for lot in unserved.to_pylist()} == {1, 2}
    assert heartbeat.so_far(stage.context.scratch, 2)["near"].down


@pytest.mark.parametrize("error_class", sorted({*get_args(ErrorClass)} - breaker.COUNTED))
def test_what_is_not_the_pool_s_fault_opens_no_breaker(tmp_path: Path, error_class: str) -> None:
    """Bad requests, forbidden ones and a pool that is merely asked too fast are all asked, in order. A key or funds
    that are refused take the engine down instead, as it says itself."""
    stage = Stage(tmp_path, rows=60)
    near, far = Scripted(outcome=lambda tag: {"status": "failed", "error_class": error_class}), Scripted()
    stage.run(stage.task({"near": stage.plan.lots.num_rows}, "far"), {"near": near, "far": far})
    assert near.tags == list(range(60))


def test_answers_that_do_not_stand_their_check_open_the_breaker(tmp_path: Path) -> None:
    """Empty answers are the pool's failures, although it calls them answers."""
    stage = Stage(tmp_path, rows=400)
    near, far = Scripted(outcome=lambda tag: {"output": " "}), Scripted()
    rows, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}, "far"), {"near": near, "far": far})
    assert len(near.tags) < 400
    assert tags(rows, status="ok") == list(range(400))
    assert unserved.num_rows == 0


def test_who_charges_for_something_unusable_is_asked_the_same_twice_at_most(tmp_path: Path) -> None:
    """A failure that was paid for is tried once more; one that was not, as often as the round allows."""

    def outcome(tag: int) -> dict[str, Any]:
        paid = {"input_tokens": 10, "output_tokens": 2, "usage_source": "reported"}
        return {"status": "failed", "error_class": "bad_output", **(paid if tag == 4 else {})} if tag in (4, 6) else {}

    near, stage = Scripted(outcome=outcome), Stage(tmp_path)
    _, unserved = stage.run(stage.task({"near": stage.plan.lots.num_rows}), {"near": near})
    assert Counter(near.tags)[4] == CHARGED_TRIES
    assert Counter(near.tags)[6] == TRIES
    assert places(unserved) == [4, 6]
    assert len({lot["lot_id"] for lot in unserved.to_pylist()}) == 2
    assert {lot["attempt_no"] for lot in unserved.to_pylist()} == {CHARGED_TRIES + 1, TRIES + 1}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 1}])
def test_an_unusable_answer_that_would_come_again_is_asked_of_another_pool(tmp_path: Path, sampling: Any) -> None:
    """What leaves nothing to chance is not asked of the same pool twice in a round; a sample may turn out better."""
    stage = Stage(tmp_path, 12, **sampling)
    near, far = (Scripted(outcome=lambda tag: {"output": " "} if tag == 4 else {}) for _ in range(2))
    lots = stage.plan.lots.num_rows
    rows, unserved = stage.run(stage.task({"near": lots - 1, "far": 1}, "far"), {"near": near, "far": far})
    twice = sampling == {"temperature": 1}
    assert (near.tags.count(4), far.tags.count(4)) == ((2, 2) if twice else (1, 1))
    assert tags(rows, status="ok") == [tag for tag in range(12) if tag != 4]
    assert places(unserved) == [4]


def test_a_retried_bundle_skips_what_it_settled(tmp_path: Path) -> None:
    """A shift that ran before in part sends only the rest, counts its earlier segments, and forgets no failure."""
    stage = Stage(tmp_path)
    task = stage.task({"near": stage.plan.lots.num_rows}, "far")
    first = Scripted(outcome=lambda tag: {"status": "failed", "error_class": "server"} if tag == 1 else {})
    whole = Shift(task, stage.context, stage.plan.spills, slot=lambda *_: Slot(first))
    whole._open_lanes()
    lane = next(iter(whole._lanes.values()))
    while first.answered < 9:
        lane.fill()
        lane.poll()
    kept = [result.segment for result in whole._flush(final=False)] + [r.segment for r in whole._written(keep=0)]
    assert [segment.rows for segment in kept if segment] == [9]

    second = Scripted()
    rows, unserved = stage.run(task, {"near": second, "far": Scripted()})
    assert second.tags == list(range(9, 24))
    assert tags(rows, status="ok") == [n for n in range(24) if n != 1]
    assert places(unserved) == [1]
    # What had been sent, and was perhaps served, is in the books too, at its worst case and under ids of its own.
    lost = rows.filter(pc.equal(rows.column("status").cast(pa.string()), "lost"))
    assert set(first.tags[9:]) <= set(tags(lost)) <= set(range(9, 24))
    assert min(row["cost"] for row in lost.to_pylist()) > 0
    assert len(set(rows.column("attempt_id").to_pylist())) == rows.num_rows
    # Nothing at all is left for a third.
    third = Scripted()
    rows, unserved = stage.run(task, {"near": third, "far": Scripted()})
    assert third.tags == []
    assert tags(rows, status="ok") == [n for n in range(24) if n != 1]
    assert len(set(rows.column("attempt_id").to_pylist())) == rows.num_rows == 24 + lost.num_rows
    assert places(unserved) == [1]


def test_after_the_deadline_nothing_more_is_sent(tmp_path: Path) -> None:
    """What is in flight at the deadline is still taken in; the rest is left over for its want of time."""
    stage = Stage(tmp_path, deadline_at=AT)
    near = Scripted()
    rows, unserved = stage.run(
        stage.task({"near": stage.plan.lots.num_rows}),
        {"near": near},
        now=lambda: AT if len(near.tags) >= 6 else AT.replace(year=2025),
    )
    assert 0 < len(near.tags) < 24
    assert tags(rows, status="ok") == near.tags
    assert places(unserved) == sorted(set(range(24)) - set(near.tags))
    assert {(lot["last_error"], lot["attempt_no"]) for lot in unserved.to_pylist()} == {("deadline", 1)}
    assert all(lot["failed_on"] == [] for lot in unserved.to_pylist())


def test_reserved_time_is_a_wall(tmp_path: Path) -> None:
    """A pool that has used up its reserved seconds is cancelled, and that is no fault of the pool's."""
    stage = Stage(tmp_path, pools=(pool("own", HOURS),))
    own = Scripted(4, holds=True)
    task = stage.task({"own": stage.plan.lots.num_rows}, reserved_ms=2_050)
    rows, unserved = stage.run(task, {"own": own})
    assert tags(rows, status="cancelled") == own.tags
    assert places(unserved) == list(range(24))
    assert {lot["last_error"] for lot in unserved.to_pylist()} == {"budget"}
    assert all(lot["failed_on"] == [] for lot in unserved.to_pylist())


def test_an_engine_that_idles_beyond_its_reserve_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for others is paid for too: once that has used up its time, it is closed and costs no more."""
    now_ms = [0]
    monkeypatch.setattr(engine_slots, "clock_ms", lambda: now_ms[0])
    stage = Stage(tmp_path, rows=120, pools=(pool("own", HOURS), pool("far")), max_cost=Decimal(1))

    own = Scripted(64)
    lots, mine = stage.plan.lots.num_rows, stage.plan.lots.column("requests")[0].as_py()

    class Slow(Scripted):
        def poll(self) -> list[pa.RecordBatch]:
            # Time passes once the other has nothing left to do.
            now_ms[0] += 200 if self.in_flight and own.answered == mine else 0
            return super().poll()

    rows, unserved = stage.run(stage.task({"own": 1, "far": lots - 1}, reserved_ms=2_000), {"own": own, "far": Slow(4)})
    assert unserved.num_rows == 0
    assert own.closed
    seconds = sum(
        (row[name] or Decimal(0) for row in rows.to_pylist() for name in ("q_accelerator_second", "q_setup")),
        Decimal(0),
    )
    idle = sum((row["q_accelerator_idle_second"] or Decimal(0) for row in rows.to_pylist()), Decimal(0))
    assert 0 < seconds + idle <= 2


def test_a_pool_that_bills_more_than_was_reserved_is_bought_from_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a provider reports is booked, but once it is beyond the reservation nothing more is sent."""
    monkeypatch.setattr(shift, "_SEGMENT_S", 0.0)
    stage = Stage(tmp_path, rows=60)
    near = Scripted(outcome=lambda tag: {"input_tokens": 1_000_000})
    task = replace(stage.task({"near": stage.plan.lots.num_rows}), reserved=Decimal("0.55"))
    rows, unserved = stage.run(task, {"near": near})
    # A tenth of a dollar each: the sixth breaks it, and a window of four is in flight by then.
    assert 6 <= len(near.tags) <= 12
    assert tags(rows, status="ok") == near.tags
    assert {lot["last_error"] for lot in unserved.to_pylist()} == {"budget"}
    assert places(unserved) == list(range(len(near.tags), 60))


def test_nothing_goes_where_it_may_not_even_if_the_market_said_so(tmp_path: Path) -> None:
    """The engine's door checks placement again, for the winner and for the runner-up."""
    stage = Stage(tmp_path, pools=(pool("near", placement={"zdr": False}), pool("far", placement={"zdr": True})))
    lots = stage.plan.lots
    strict = lots.set_column(
        lots.schema.get_field_index("placement"), "placement", pa.array(['{"zdr":true}'] * lots.num_rows, pa.string())
    )
    stage.plan = replace(stage.plan, lots=strict)
    near, far = Scripted(), Scripted(dies_after=3)
    half = lots.num_rows // 2
    task = stage.task({"near": half, "far": lots.num_rows - half}, "near")
    rows, unserved = stage.run(task, {"near": near, "far": far})
    assert near.tags == []
    assert len(tags(rows)) + len(places(unserved)) - len(tags(rows, status="lost")) == 24
    assert {lot["last_error"] for lot in unserved.to_pylist()} == {"no_eligible_pool", "server"}


def test_an_interrupted_shift_keeps_what_is_settled_and_says_so(tmp_path: Path) -> None:
    """After a signal nothing more is sent, what was in flight is journalled, and the shift ends as interrupted."""
    stage = Stage(tmp_path)
    near = Scripted()

    def stop(tag: int) -> dict[str, Any]:
        if tag == 5:
            stopping.request()
        return {}

    near.outcome = stop
    task = stage.task({"near": stage.plan.lots.num_rows})
    try:
        with pytest.raises(Interrupted):
            stage.run(task, {"near": near})
    finally:
        stopping.clear()
    assert len(near.tags) < 24
    again = Scripted()
    rows, unserved = stage.run(task, {"near": again})
    assert again.tags == sorted(set(range(24)) - set(near.tags))
    assert (tags(rows, status="ok"), unserved.num_rows) == (list(range(24)), 0)


def test_progress_counts_all_that_is_spent(tmp_path: Path) -> None:
    """A lane's cost is that of its segments' rows, setup and idle time included; its counts are of requests alone."""
    stage = Stage(tmp_path, pools=(pool("own", HOURS),))
    task = stage.task({"own": stage.plan.lots.num_rows})
    slot = Slot(Scripted(), lambda timeout_s: 1500)
    working = Shift(task, stage.context, stage.plan.spills, slot=lambda *_: slot)
    segments = [result.segment for result in working.run() if result.segment is not None]
    lane = next(iter(working._lanes.values()))
    assert lane.cost == sum((segment.cost for segment in segments), Decimal(0)) > Decimal("1.5") * HOURS["setup"]
    assert (lane.settled, lane.failed, lane.input_tokens, lane.output_tokens) == (24, 0, 240, 48)
