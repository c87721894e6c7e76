"""Hedging: the tail of a shift is asked of a second pool, the first answer counts, and the other is paid for once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_jobs import check_conserved, make_job, prompts, remote, written
from test_shift import AT, HOURS, TOKENS, Scripted, Stage, places, pool, tags

from bidbeam.connectors.doubles import OK, EndpointDouble, Reply, Seen
from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import PoolDown
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms import heirs, lane
from bidbeam.transforms.charging import serving
from bidbeam.transforms.engines import Slot
from bidbeam.transforms.hedging import CALLED_OFF, Latencies
from bidbeam.transforms.lane import NOT_SENT
from bidbeam.transforms.shift import Shift

ROWS = 39
LAST = ROWS - 1


class Slow(Scripted):
    """Answers in order, but for requests that it sits on for some polls (None: until they are called off).
    After ``gone_after`` polls with nothing else to answer it is gone."""

    def __init__(
        self,
        sits: dict[int, int | None] | None = None,
        *,
        deaf: bool = False,
        outcome: Callable[[int], dict[str, Any]] = lambda tag: {},
        gone_after: int | None = None,
    ) -> None:
        super().__init__(4, outcome)
        self.gone_after = gone_after
        self.sits, self.deaf, self.since = dict(sits or {}), deaf, dict[int, int]()
        self.polls = self.stuck = 0
        self.called_off: list[int] = []

    def poll(self) -> list[pa.RecordBatch]:
        self.polls += 1
        for row in self.waiting:
            self.since.setdefault(row["tag"], self.polls)
        ready = [row for row in self.waiting if self._ready(row["tag"])]
        held = [row for row in self.waiting if not self._ready(row["tag"])]
        self.stuck += bool(held) and not ready
        if self.gone_after is not None and self.stuck > self.gone_after:
            raise PoolDown("the line went dead")
        self.waiting = ready
        found = super().poll()
        self.waiting += held
        self.wake()
        return found

    def _ready(self, tag: int) -> bool:
        sits = self.sits.get(tag, 0)
        return sits is not None and self.polls - self.since[tag] >= sits

    def cancel(self, tags: Collection[int] | None = None) -> None:
        self.called_off += list(tags or ())
        if not self.deaf:
            super().cancel(tags)


class Late(Slow):
    """Answers what it sat on as soon as that is called off."""

    def cancel(self, tags: Collection[int] | None = None) -> None:
        super().cancel(tags)
        self.sits.clear()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted answers take no time: a request is late as soon as it is not answered at once."""
    monkeypatch.setattr(lane, "LEAST_S", 0.0)


def shifted(home: Path, near: Slow, far: Slow, **keys: Any) -> tuple[pa.Table, pa.Table]:
    """All lots to ``near``, with ``far`` as runner-up."""
    stage = Stage(home, ROWS, **keys)
    return stage.run(stage.task({"near": stage.plan.lots.num_rows}, "far"), {"near": near, "far": far})


def of(rows: pa.Table, tag: int) -> dict[str, dict[str, Any]]:
    return {row["pool"]: row for row in rows.to_pylist() if row["tag"] == tag}


def test_a_straggler_is_asked_of_the_runner_up_and_its_first_pool_is_called_off(tmp_path: Path) -> None:
    """The second pool's answer serves it; what the first may have done is booked at its worst, as a hedge."""
    near, far = Slow({LAST: None}), Slow()
    rows, unserved = shifted(tmp_path, near, far)
    assert (far.tags, set(near.called_off)) == ([LAST], {LAST})
    served, lost = of(rows, LAST)["far"], of(rows, LAST)["near"]
    assert (served["kind"], served["status"], served["attempt_no"]) == ("primary", "ok", 2)
    assert (lost["kind"], lost["status"], lost["usage_source"]) == ("hedge", "cancelled", "estimate")
    assert (lost["error_class"], lost["error_message"]) == (None, CALLED_OFF)
    assert lost["cost"] == lost["input_tokens"] * Decimal("1E-7") + 4 * Decimal("4E-7")
    assert tags(rows.filter(serving(rows))) == list(range(ROWS))
    assert unserved.num_rows == 0


def test_a_straggler_that_answers_after_all_calls_its_hedge_off(tmp_path: Path) -> None:
    """Then the second attempt is the hedge, and what it may have cost is booked."""
    near, far = Slow({LAST: 60}), Slow({LAST: None})
    rows, unserved = shifted(tmp_path, near, far)
    assert (of(rows, LAST)["near"]["kind"], of(rows, LAST)["near"]["status"]) == ("primary", "ok")
    assert (of(rows, LAST)["far"]["kind"], of(rows, LAST)["far"]["status"]) == ("hedge", "cancelled")
    assert set(far.called_off) == {LAST}
    assert tags(rows.filter(serving(rows))) == list(range(ROWS))
    assert unserved.num_rows == 0


def test_of_two_answers_the_first_counts_and_both_are_paid(tmp_path: Path) -> None:
    """An endpoint that cannot be called off answers too: an attempt that is ok, of kind hedge, that serves nobody."""
    near, far = Late({LAST: None}, deaf=True), Slow()
    rows, _ = shifted(tmp_path, near, far)
    second, first = of(rows, LAST)["near"], of(rows, LAST)["far"]
    assert (second["kind"], second["status"], second["usage_source"]) == ("hedge", "ok", "reported")
    assert (first["kind"], first["status"]) == ("primary", "ok")
    assert second["cost"] > 0 < first["cost"]
    assert tags(rows.filter(serving(rows))) == list(range(ROWS))


def test_a_hedge_that_fails_leaves_the_first_attempt_alone(tmp_path: Path) -> None:
    """Nothing is tried again as long as somebody may still answer."""
    near, far = Slow({LAST: 60}), Slow(outcome=lambda tag: {"status": "failed", "error_class": "server"})
    rows, unserved = shifted(tmp_path, near, far)
    assert Counter([*near.tags, *far.tags])[LAST] == 2
    assert of(rows, LAST)["near"]["status"] == "ok"
    assert (of(rows, LAST)["far"]["kind"], of(rows, LAST)["far"]["status"]) == ("hedge", "failed")
    assert unserved.num_rows == 0


def test_a_first_attempt_that_fails_waits_for_its_hedge(tmp_path: Path) -> None:
    """The answer of the second pool then serves the request as a retry does."""
    fails = {LAST: {"status": "failed", "error_class": "timeout"}}
    near, far = Slow({LAST: 30}, outcome=lambda tag: fails.get(tag, {})), Slow({LAST: 120})
    rows, unserved = shifted(tmp_path, near, far)
    assert (near.tags.count(LAST), far.tags) == (1, [LAST])
    assert (of(rows, LAST)["near"]["kind"], of(rows, LAST)["near"]["status"]) == ("primary", "failed")
    assert (of(rows, LAST)["far"]["kind"], of(rows, LAST)["far"]["status"]) == ("retry", "ok")
    assert unserved.num_rows == 0


def test_what_both_pools_failed_is_tried_on_under_a_number_of_its_own(tmp_path: Path) -> None:
    """Whichever of the two ends last, the next attempt is the third."""
    failed = {"status": "failed", "error_class": "timeout"}
    for name, sits in (("near", 30), ("far", 120)):
        near = Slow({LAST: 30 if name == "near" else 200}, outcome=lambda tag: failed if tag == LAST else {})
        far = Slow({LAST: sits}, outcome=lambda tag: failed)
        rows, unserved = shifted(tmp_path / name, near, far)
        numbers = sorted(row["attempt_no"] for row in rows.to_pylist() if row["tag"] == LAST)
        assert numbers == list(range(1, len(numbers) + 1))
        assert numbers[:3] == [1, 2, 3]
        ids = rows.column("attempt_id").to_pylist()
        assert len(set(ids)) == len(ids)
        assert places(unserved) == [LAST]


class Queued(Slow):
    """Works at one request at a time: what waits behind it is given back when it is called off, or when the line goes
    dead, and was never sent."""

    def poll(self) -> list[pa.RecordBatch]:
        try:
            found = super().poll()
        except PoolDown:
            queued, self.waiting = self.waiting[1:], self.waiting[:1]
            if not queued:
                raise
            found = [_unsent(queued)]
        return found

    def _ready(self, tag: int) -> bool:
        return tag == self.waiting[0]["tag"] and super()._ready(tag)

    def cancel(self, tags: Collection[int] | None = None) -> None:
        assert tags is not None
        queued = [row for row in self.waiting[1:] if row["tag"] in tags]
        super().cancel(set(tags) - {row["tag"] for row in queued})
        self.waiting = [row for row in self.waiting if row not in queued]
        self.given_up += _unsent(queued).to_pylist()


def _unsent(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    ended = {"status": "cancelled", "error_message": NOT_SENT, "started_at": AT, "finished_at": AT}
    return pa.RecordBatch.from_pylist([{"tag": row["tag"], **ended} for row in rows], RESULT_SCHEMA)


MORE = 80
"""Rows of which four may be out in the tail."""


def queued(home: Path, near: Slow, far: Slow) -> tuple[pa.Table, pa.Table]:
    stage = Stage(home, MORE)
    return stage.run(stage.task({"near": stage.plan.lots.num_rows}, "far"), {"near": near, "far": far})


def test_what_waited_at_its_first_pool_and_is_answered_by_the_second_is_asked_of_nobody_again(tmp_path: Path) -> None:
    """The first pool gives it back unsent: it is not handed on, and the pool goes on taking requests."""

    class Near(Queued):
        def cancel(self, tags: Collection[int] | None = None) -> None:
            super().cancel(tags)
            far.sits.clear()

    def of_near(tag: int) -> dict[str, Any]:
        return failed if tag == MORE - 2 and near.tags.count(tag) == 1 else {}

    def of_far(tag: int) -> dict[str, Any]:
        if tag == MORE - 2:
            near.sits.clear()
        return failed if tag == MORE - 2 else {}

    failed = {"status": "failed", "error_class": "server"}
    near, far = Near({MORE - 2: None}, outcome=of_near), Slow({MORE - 2: None}, outcome=of_far)
    rows, unserved = queued(tmp_path, near, far)
    assert far.tags.count(MORE - 1) == 1
    assert [row["kind"] for row in rows.to_pylist() if row["tag"] == MORE - 1] == ["primary"]
    # Both have failed the other one: it is the first pool's turn again.
    assert near.tags.count(MORE - 2) == 2
    assert tags(rows.filter(serving(rows))) == list(range(MORE))
    assert unserved.num_rows == 0


@pytest.mark.parametrize("first", ["near", "far"])
@pytest.mark.parametrize("end", ["answered", "failed"])
def test_what_a_pool_that_went_down_gave_back_unsent_is_left_to_its_hedge(tmp_path: Path, end: str, first: str) -> None:
    """It is not sent to the same pool twice; where the hedge fails too, it goes on to the next round."""

    class Near(Queued):
        def poll(self) -> list[pa.RecordBatch]:
            found = super().poll()
            if self.gone_after == 0:
                far.sits.clear()
            return found

    class Far(Slow):
        def submit(self, requests: pa.RecordBatch) -> None:
            super().submit(requests)
            if MORE - 1 in requests.column("tag").to_pylist() and first == "near":
                near.gone_after = 0

    def of_far(tag: int) -> dict[str, Any]:
        if tag == MORE - 1:
            near.gone_after = 0
        return {"status": "failed", "error_class": "timeout"} if end == "failed" else {}

    near = Near({MORE - 2: None})
    far = Far({MORE - 2: None, **({MORE - 1: None} if first == "near" else {})}, outcome=of_far)
    rows, unserved = queued(tmp_path, near, far)
    assert (far.tags.count(MORE - 2), far.tags.count(MORE - 1)) == (1, 1)
    left = [] if end == "answered" else [MORE - 2, MORE - 1]
    assert places(unserved) == left
    assert tags(rows.filter(serving(rows))) == [tag for tag in range(MORE) if tag not in left]


@pytest.mark.parametrize("why", ["off", "money", "placement", "nobody else"])
def test_nothing_is_hedged(tmp_path: Path, why: str) -> None:
    """Where the job says so, where the reserve does not cover it, and where no other pool may have it."""
    here, there = ({"jurisdiction": each} for each in ("DE", "US"))
    stage = Stage(tmp_path, ROWS, (pool("near", placement=here), pool("far", placement=there)), hedging=why != "off")
    lots = stage.plan.lots
    if why == "placement":
        at = lots.schema.get_field_index("placement")
        text = pa.array(['{"jurisdictions":["DE"]}'] * lots.num_rows).cast(lots.schema.field(at).type)
        lots = lots.set_column(at, lots.schema.field(at), text)
        stage.plan = replace(stage.plan, lots=lots)
    task = stage.task({"near": lots.num_rows}, None if why == "nobody else" else "far")
    if why == "money":
        # All that is answered, and the straggler's own worst case, but not a second one.
        task = replace(task, reserved=ROWS * (10 * Decimal("1E-7") + 2 * Decimal("4E-7")) + Decimal("1E-6"))
    near, far = Slow({LAST: 40}), Slow()
    rows, unserved = stage.run(task, {"near": near, "far": far})
    assert far.tags == []
    assert tags(rows, status="ok", kind="primary") == list(range(ROWS))
    assert unserved.num_rows == 0


def test_more_than_the_tail_is_not_hedged(tmp_path: Path) -> None:
    """While more than one request in twenty is out, slowness is the pool's own, and the next auction's to weigh."""
    near, far = Slow({LAST - 1: None, LAST: None}, gone_after=100), Slow()
    rows, unserved = shifted(tmp_path, near, far)
    assert far.tags == []
    assert tags(rows, status="lost") == [LAST - 1, LAST] == places(unserved)


def test_an_engine_of_ours_is_not_hedged(tmp_path: Path) -> None:
    """Its watchdog knows whether it makes steps; a long answer is no straggler."""
    near, far = Slow({LAST: 40}), Slow()
    rows, _ = shifted(tmp_path, near, far, pools=(pool("near", HOURS), pool("far")))
    assert far.tags == []
    assert tags(rows, status="ok", kind="primary") == list(range(ROWS))


@pytest.mark.parametrize("down", [True, False])
def test_no_engine_of_ours_is_started_for_a_hedge(tmp_path: Path, down: bool) -> None:
    """A shift drives one of a pool's engines, not always the first: that one is asked where it is up, and no other."""
    stage = Stage(tmp_path, 80, (pool("own", HOURS), pool("far")))
    own, far = Slow(), Slow({79: None}, gone_after=2000)
    own.dies_after = 10 if down else None
    started = list[tuple[str, int]]()

    def slot(name: str, model: str, replica: int) -> Slot:
        started.append((name, replica))
        return Slot({"own": own, "far": far}[name], lambda timeout_s: 7)

    lots = stage.plan.lots.num_rows
    task = stage.task({"own": lots} if down else {"own": lots // 4, "far": lots - lots // 4}, "far" if down else "own")
    task = replace(task, awards=tuple(replace(each, replica=int(each.pool == "own")) for each in task.awards))
    list(Shift(task, stage.context, stage.plan.spills, slot=slot).run())
    assert ("own", 0) not in started
    assert own.tags.count(79) == (0 if down else 1)


_OUTCOMES: list[dict[str, Any]] = [
    {}, {}, {"status": "failed", "error_class": "server"}, {"status": "failed", "error_class": "caller"},
    {"output": " "}, {"input_tokens": None, "output_tokens": None},
]  # fmt: skip


def _outcome_of(ends: dict[int, dict[str, Any]], tag: int) -> dict[str, Any]:
    return ends.get(tag, {})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    deaf=st.tuples(st.booleans(), st.booleans()),
    dies=st.tuples(st.none() | st.integers(1, ROWS), st.none() | st.integers(0, 2)),
    part=st.integers(1, 3),
    relieved=st.booleans(),
)
def test_hedged_or_not_each_request_is_served_once_or_left_and_the_reserve_holds(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    deaf: tuple[bool, bool],
    dies: tuple[int | None, int | None],
    part: int,
    relieved: bool,
) -> None:
    """Whoever is slow, fails, dies, cannot be called off or is relieved of what waits: no request is lost or served
    twice, no attempt is sent twice, none is hedged twice, and all that is charged fits in what was reserved."""
    chance = np.random.default_rng(seed)
    engines = dict[str, Slow]()
    for at, name in enumerate(("near", "far", "third")):
        late = chance.choice(ROWS, 3, replace=False).tolist()
        odd = [*late, *chance.choice(ROWS, 2).tolist()]
        ends = {tag: _OUTCOMES[int(chance.integers(len(_OUTCOMES)))] for tag in odd}
        sits = {tag: int(chance.integers(1, 80)) for tag in late}
        engines[name] = Slow(sits, deaf=deaf[at % 2], outcome=partial(_outcome_of, ends))
        engines[name].dies_after = dies[at % 2]
    dear = {name: 3 * price for name, price in TOKENS.items()}
    stage = Stage(tmp_path_factory.mktemp("hedged"), ROWS, (pool("near"), pool("far", dear), pool("third")))
    worst = ROWS * (20 * Decimal("1E-7") + 4 * Decimal("4E-7"))
    reserved = worst * part
    task = stage.task({"near": stage.plan.lots.num_rows}, "far", next_best=("third",))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LONG_S", "LONGEST_S", "_EVERY_S") if relieved else ():
            patch.setattr(heirs, name, 0.0)
        rows, unserved = stage.run(replace(task, reserved=reserved), {**engines})
    served = tags(rows.filter(serving(rows)))
    assert len(set(served)) == len(served)
    final = set(tags(rows, error_class="caller"))
    assert set(served) | set(places(unserved)) | final == set(range(ROWS))
    assert not set(served) & set(places(unserved))
    assert sum((row["cost"] for row in rows.to_pylist()), Decimal(0)) <= reserved
    ids = rows.column("attempt_id").to_pylist()
    assert len(set(ids)) == len(ids)
    hedged = Counter(row["tag"] for row in rows.to_pylist() if row["kind"] == "hedge")
    assert max(hedged.values(), default=0) <= 1
    assert all(row["tag"] in served for row in rows.to_pylist() if row["kind"] == "hedge" and row["status"] == "ok")


def test_what_does_not_count_is_taken_off_the_lane_of_its_own_model(tmp_path: Path) -> None:
    """A pool has a lane for each of its models; what one has answered in vain says nothing of the other."""
    stage = Stage(tmp_path, ROWS)
    context = replace(stage.context, pools=tuple(replace(each, models={"m": "m", "a": "a"}) for each in stage.pools))
    near, far = Late({LAST: None}, deaf=True), Slow()
    engines = {("near", "m"): near, ("far", "m"): far, ("near", "a"): Slow(), ("far", "a"): Slow()}
    task = stage.task({"near": stage.plan.lots.num_rows}, "far")
    working = Shift(task, context, stage.plan.spills, slot=lambda name, model, _: Slot(engines[name, model]))
    # The lanes of the other model are there first.
    for name in ("near", "far"):
        working._lane(name, "a", 0, replace(task.runner_up_terms[name, "m"], model="a"), None)
    assert sum(each.unserved.num_rows for each in working.run() if each.unserved is not None) == 0
    counts = {key[:2]: (lane.settled, lane.failed) for key, lane in working._lanes.items()}
    assert near.tags.count(LAST) == far.tags.count(LAST) == 1
    assert counts == {("near", "m"): (LAST, 0), ("far", "m"): (1, 0), ("near", "a"): (0, 0), ("far", "a"): (0, 0)}


def test_latencies_tell_their_95th_percentile_once_there_are_enough() -> None:
    """Of answers alone, the last thousand of them."""
    told = Latencies()

    def results(seconds: list[int], status: str) -> pa.RecordBatch:
        stamps = [{"started_at": 0, "finished_at": each * 1_000_000} for each in seconds]
        return pa.RecordBatch.from_pylist([{"tag": 1, "status": status, **each} for each in stamps], RESULT_SCHEMA)

    told.add(results([1] * 19, "ok"))
    told.add(results([500] * 500, "failed"))
    assert told.p95_s is None
    told.add(results([1], "ok"))
    assert told.p95_s == 1.0
    told.add(results([3] * 1_500, "ok"))
    assert told.p95_s == 3.0


def test_a_run_does_not_wait_for_an_endpoint_that_sits_on_its_last_request(tmp_path: Path) -> None:
    """Over HTTP: the other endpoint answers, the connection is closed, and the ledger shows the hedge and adds up."""

    def sits(seen: Seen) -> Reply:
        return Reply.slow(120) if "item 7 of" in seen.prompt else OK

    with EndpointDouble(["tiny"], sits) as near, EndpointDouble(["tiny"]) as far:
        pools = [remote("near", near.base_url), remote("far", far.base_url, price={"input": "0.50", "output": "2.00"})]
        job = make_job(tmp_path, prompts(60), pools, budget={"max_cost": "1.00"})
        summary = run(job)
    found = written(job)
    check_conserved(found, 60)
    assert (summary.status, summary.served) == ("complete", 60)
    two = {row["pool"]: row for row in found.attempts if row["request_id"] == "q7"}
    assert (two["near"]["kind"], two["near"]["status"]) == ("hedge", "cancelled")
    assert (two["far"]["kind"], two["far"]["status"]) == ("primary", "ok")
    row = next(row for row in found.outputs.to_pylist() if row["id"] == "q7")
    costs = [charge["cost"] for charge in found.rows("charges") if charge["request_id"] == "q7"]
    assert (row["pool"], row["attempts"], row["cost"]) == ("far", 2, sum(costs, Decimal(0)))
    assert verify_ledger(job.ledger).ok
