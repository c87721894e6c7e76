"""A shift: one loop over all the pools that one worker drives in a round, each kept full, each in lot order.

There is no batch and no barrier: whenever an engine has room it gets the next requests of its own queue, whatever the
other pools are doing. What finishes is settled and journalled as it comes. A pool that dies hands the lots it was not
asked for yet to their runners-up; what fails goes to the next round.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import Engine, Lasting
from bidbeam.connectors.errors import Interrupted, ModelError, PoolDown
from bidbeam.connectors.schemas import METER_COLUMNS
from bidbeam.connectors.tokenizer import model_tools
from bidbeam.transforms import dispatch, heartbeat, stopping
from bidbeam.transforms.door import Door, LotRequests
from bidbeam.transforms.engines import Slot, slot_for
from bidbeam.transforms.hedging import HEDGE, TAIL, Hedge, Hedges
from bidbeam.transforms.heirs import Heirs, handed_on, places_of
from bidbeam.transforms.journal import (
    SegmentRef,
    list_segments,
    read_segment,
    segment_number,
    segment_ref,
    write_segment,
)
from bidbeam.transforms.lane import Lane, Lot, all_tags
from bidbeam.transforms.leftovers import Leftovers
from bidbeam.transforms.outstanding import Tags
from bidbeam.transforms.purse import Purse
from bidbeam.transforms.recount import recount_results
from bidbeam.transforms.region_check import believed, note_refuted, undeclared
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms
from bidbeam.transforms.shift_task import ShiftTask
from bidbeam.transforms.spilling import SpillRef

_SEGMENT_ROWS = 65_536
_SEGMENT_S = 0.5
_REMOTE_SEGMENT_S = 2.0
"""Seconds after which what was answered is written down, locally and on an object store: a crash asks it again."""
_TICK_S = 0.25
_SHORT_S = 0.1
"""Seconds after which what was answered is written down where others wait for the money that it leaves."""
_WRITES_AHEAD = 2
_GRACE_S = 10.0
"""Seconds that what is in flight gets to finish after an interruption, before it is cancelled."""

_TIMES = [METER_COLUMNS[meter] for meter in ("accelerator_second", "accelerator_idle_second", "setup")]

_AILING = "most of what it was asked of late failed{last}; it gets one request at a time until one is answered"


@dataclass(frozen=True, slots=True)
class ShiftResult:
    """Segments as they are written, in ``segment``; at the end what is left, in ``unserved`` (LOT)."""

    segment: SegmentRef | None = None
    unserved: pa.Table | None = None


class Shift:
    """Runs one task. ``slot`` gives the engine of (pool, model, replica); a test passes its own."""

    def __init__(
        self,
        task: ShiftTask,
        context: RunContext,
        spills: Sequence[SpillRef],
        *,
        slot: Callable[[str, str, int], Slot] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._task, self._context, self._spills, self._now = task, context, spills, now
        self._specs = {spec.name: spec for spec in believed(context.journal, context.pools)}
        self._slot = slot or (lambda pool, model, replica: slot_for(context, self._specs[pool], model, replica))
        self._wake = threading.Event()
        self._door = Door(context, spills)
        self._number = 0
        self._flushes = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="bidbeam-journal")
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="bidbeam-door")
        self._dispatcher = ThreadPoolExecutor(1, thread_name_prefix="bidbeam-dispatch")
        self._segment_s = _SEGMENT_S if context.scratch.is_local else max(_SEGMENT_S, _REMOTE_SEGMENT_S)
        self._dispatches = 0
        self._try = 0
        self._writing: deque[Future[SegmentRef]] = deque()
        self._closed_books: list[tuple[pa.Table, Terms]] = []
        """Of engines that are gone, and were started again: SEGMENT rows that are still to be written."""
        self._lanes: dict[tuple[str, str, int], Lane] = {}
        self._hedges = Hedges()
        self._before = heartbeat.so_far(context.scratch, task.round) if task.round > 1 else {}
        self._won = {lot_id: each.pool for each in task.awards for lot_id in each.lots.column("lot_id").to_pylist()}
        self._purse = Purse(context, task, self._lanes.values, self._won)
        self._heirs = Heirs(
            self._specs,
            self._lanes,
            task.runner_up_terms,
            self._won,
            self._purse,
            lambda pool, model, terms: self._lane(pool, model, 0, terms, None),
            walled=context.max_cost is not None,
        )
        self._failed_before: pa.Table | None = None
        self._lots: dict[str, Lot] = {}
        self._left = Leftovers(context, task.round, self._lots, self._won)
        self._slots: dict[tuple[str, str, int], Slot] = {}
        self._ms_before: dict[tuple[str, str], int] = {}
        """Milliseconds that earlier tries of this shift have used of engines paid by time, by pool and model."""

    def run(self) -> Iterator[ShiftResult]:
        """Works until nothing is left or nothing can go on; yields each segment once it is safely on the store."""
        yield from self._earlier_try()
        stop_at: float | None = None
        with heartbeat.of(self._context, self._task.prefix, self._lanes.values) as beat, self._left_on_error():
            self._open_lanes()
            last_flush = time.monotonic()
            while not all(lane.idle for lane in self._lanes.values()) or (yield from self._try_again()):
                # First: what is reserved may be gone before anything was sent, to an engine that was slow to load.
                stop_at = self._check_walls(stop_at)
                for lane in list(self._lanes.values()):
                    lane.fill()
                for key, lane in list(self._lanes.items()):
                    lane.poll()
                    if lane.strayed:
                        self._disbelieve(lane.pool)
                    if lane.restartable:
                        self._restart(key, lane)
                    self._heed(lane)
                    self._heirs.relieve(lane)
                    if not lane.open:
                        self._hand_over(lane)
                self._hedge()
                for lot, tags in self._purse.last_resort():
                    self._keep_unsent(lot, tags, "budget")
                pending = sum(lane.pending_results for lane in self._lanes.values())
                pending += bool(self._closed_books)
                if pending >= _SEGMENT_ROWS or (pending and self._flush_due(last_flush)):
                    yield from self._flush(final=False)
                    last_flush = time.monotonic()
                    beat()
                elif self._purse.waits and self._writing:
                    yield from self._written(keep=0)
                elif not pending or not any(lane.hungry for lane in self._lanes.values()):
                    self._wake.wait(_TICK_S)
                    self._wake.clear()
            for lane in self._lanes.values():
                if lane.closing:
                    # It gave back what it was not asked for; now it says why.
                    lane.poll()
            yield from self._flush(final=True)
            for slot in self._slots.values():
                slot.booked()
            for lane in self._lanes.values():
                lane.look_once_more()
            beat()
        if self._dispatches:
            dispatch.close(self._context.journal, self._context.scratch_name, self._task.prefix)
        if stopping.requested():
            raise Interrupted("stopped by a signal; what was settled is kept")
        yield ShiftResult(unserved=self._left.unserved())

    @contextmanager
    def _left_on_error(self) -> Iterator[None]:
        """A shift that fails leaves what outlives it to whoever comes next: to another engine, which takes it over."""
        try:
            yield
        except BaseException:
            for lane in self._lanes.values():
                if isinstance(lane.engine, Lasting):
                    lane.engine.leave()
            raise

    def _flush_due(self, last_flush: float) -> bool:
        short, waited_s = self._purse.waits, time.monotonic() - last_flush
        waited = waited_s >= self._segment_s or (short and (waited_s >= _SHORT_S or self._purse.drained))
        lanes, hedged = self._lanes.values(), self._hedges.tags
        # A verdict that something hangs on, a probe's or a hedge's, is not waited for.
        return waited or any(lane.awaits_verdict or (len(hedged) and lane.has_result_of(hedged)) for lane in lanes)

    # -- before ---------------------------------------------------------------------------------------------------

    def _earlier_try(self) -> Iterator[ShiftResult]:
        """What an earlier try of this very bundle has settled is not asked again; its segments count as ours."""
        tags, failed = [], []
        if not self._context.rehearse:
            scratch = self._context.scratch_name
            self._try = dispatch.tries(self._context.journal, scratch, self._task.prefix)
            if self._try:
                # What it had in flight may have been served: it is booked, and asked again under ids of its own.
                list(dispatch.book_open(self._context.journal, scratch, [self._task.prefix]))
        for name in list_segments(self._context.journal, f"{self._context.scratch_name}/segments/{self._task.prefix}-"):
            rows, _ = read_segment(self._context.journal, name)
            self._number = max(self._number, segment_number(name) + 1)
            self._flushes = self._number
            self._purse.begun_before(rows)
            rows_lost = pc.equal(rows.column("status").cast(pa.string()), "lost")
            tags.append(rows.filter(pc.invert(rows_lost)).column("tag").drop_null().to_numpy())
            failed.append(rows.filter(pc.invert(rows_lost)))
            self._count_before(rows)
            yield ShiftResult(segment=segment_ref(self._context.journal, name))
        if tags:
            self._left.settled = np.unique(np.concatenate(tags))
            self._failed_before = _last_failures(pa.concat_tables(failed))

    def _count_before(self, rows: pa.Table) -> None:
        """The time that an earlier try has used (SEGMENT) is gone from what was reserved."""
        by_time = {spec.name for spec in self._context.pools if spec.price.by_time}
        timed = pc.is_in(rows.column("pool").cast(pa.string()), value_set=pa.array(sorted(by_time), pa.string()))
        for row in rows.filter(timed).select(["pool", "model", *_TIMES]).to_pylist():
            seconds = sum((row[name] for name in _TIMES if row[name] is not None), Decimal(0))
            key = row["pool"], row["model"]
            self._ms_before[key] = self._ms_before.get(key, 0) + int(seconds * 1000)

    def _open_lanes(self) -> None:
        for award in self._task.awards:
            for lot in award.lots.to_pylist():
                if not self._heirs.may(award.pool, lot):
                    self._keep_unsent(lot, all_tags(lot), "no_eligible_pool")
                    continue
                lane = self._lane(award.pool, lot["model"], award.replica, award.terms[lot["model"]], award.reserved_ms)
                lane.queue.append(lot)
                self._lots[lot["lot_id"]] = lot
        for pool, model in self._task.adopts:
            self._lane(pool, model, 0, self._task.runner_up_terms[pool, model], None)
        if self._failed_before is not None:
            self._note_failures(self._failed_before)
        for key, lane in list(self._lanes.items()):
            try:
                self._slots[key].wait()
            except ModelError as error:
                if self._task.round == 1:
                    # A mistake in the job, found before anything is sent anywhere.
                    raise
                lane.mark_down(str(error))
            except PoolDown as error:
                lane.mark_down(str(error))
        for lane in list(self._lanes.values()):
            if lane.down:
                self._hand_over(lane)

    def _lane(self, pool: str, model: str, replica: int, terms: Terms, reserved_ms: int | None) -> Lane:
        key = (pool, model, replica)
        if key not in self._lanes:
            slot = self._slots[key] = self._slot(pool, model, replica)
            slot.engine.listen(self._wake.set)
            digest = f"{self._context.run_id}|{self._context.start}|{self._task.prefix}|{pool}|{model}|{replica}"
            self._lanes[key] = Lane(
                pool=pool,
                model=model,
                engine=slot.engine,
                terms=terms,
                meter=slot.meter if terms.price.by_time else None,
                admit=partial(self._admit, pool),
                announce=self._announcer(slot, terms),
                open_lot=self._open_lot,
                overhead_id=lambda number: hashlib.sha256(f"{digest}|{self._flushes}|{number}".encode()).digest()[:16],
                round=self._task.round,
                loaded=slot.loaded,
                retire=slot.retire,
                checks=not self._context.rehearse,
                recount=self._recount(pool, model),
                labels=self._specs[pool].placement,
                reserved_ms=reserved_ms,
                used_ms=self._ms_before.get((pool, model), 0),
                purse=self._purse if self._purse.tight and not terms.price.by_time else None,
            )
        return self._lanes[key]

    def _recount(self, pool: str, model: str) -> Callable[[pa.RecordBatch], pa.Array] | None:
        """How to count a pool's answers ourselves; None for our own engines, which count what they made."""
        directory = self._context.models[model].directory if model in self._context.models else None
        if directory is None or self._context.rehearse or self._specs[pool].kind == "vllm":
            return None
        tokenizer = model_tools(directory).tokenizer
        return lambda results: recount_results(results, tokenizer)

    def _announcer(self, slot: Slot, terms: Terms) -> Callable[[pa.RecordBatch], Future[None]] | None:
        """How a lane writes down what it is about to send. A rehearsal sends nothing; some engines keep their own
        journal, because what they have sent outlives us."""
        if self._context.rehearse or isinstance(slot.engine, Lasting):
            return None

        def announce(requests: pa.RecordBatch) -> Future[None]:
            self._dispatches += 1
            where = dispatch.directory(self._context.scratch_name)
            name = f"{where}/{self._task.prefix}-t{self._try:02d}-{self._dispatches:06d}.arrow"
            setup_ms = slot.meter().setup_ms if terms.price.by_time else 0
            written = self._dispatcher.submit(
                dispatch.write_dispatch, self._context.journal, name, requests, terms, setup_ms
            )
            written.add_done_callback(lambda _: self._wake.set())
            return written

        return announce

    def _admit(self, pool: str, lot: Lot) -> bool:
        # Asked again here because every way to an engine ends here: awards, hand-overs and whatever comes to be added.
        if self._heirs.may(pool, lot):
            return True
        self._keep_unsent(lot, all_tags(lot), "no_eligible_pool")
        return False

    def _open_lot(self, lot: Lot, engine: Engine) -> Future[LotRequests | None]:
        return self._opener.submit(self._opened_lot, lot, engine.wants)

    def _opened_lot(self, lot: Lot, wants: frozenset[str]) -> LotRequests | None:
        if len(self._left.settled):
            tags = all_tags(lot)
            left = tags[~np.isin(tags, self._left.settled)]
            if len(left) == 0:
                return None
            lot = {**lot, "places": places_of(left)}
        return self._door.open(lot, wants, ideal=self._context.rehearse, try_=self._try)

    # -- during ---------------------------------------------------------------------------------------------------

    def _disbelieve(self, pool: str) -> None:
        """What a pool declares of where it is has been refuted: for this shift, and for all that come after it."""
        spec = self._specs[pool]
        if (void := undeclared(spec)) != spec:
            self._specs[pool] = void
            note_refuted(self._context.journal, spec)

    def _hand_over(self, lane: Lane) -> None:
        """Gives what a dead pool was not asked for to the next best pools that are alive, as far as the reserve goes;
        what a stopped one was not asked for is left over."""
        left = lane.leftover()
        if left and not lane.stopped:
            self._purse.reckon()
        for lot, returned in left:
            tags = returned if lot.get("kind") == HEDGE else self._not_hedged(lane, returned)
            if not len(tags):
                continue
            if lane.stopped:
                self._keep_unsent(lot, tags, lane.stopped)
            elif lot.get("kind") != HEDGE and (target := self._heirs.taker(lot, tags)) is not None:
                target.queue.append(handed_on(lot, tags, target.pool))
            else:
                self._keep_unsent(lot, tags, "server", lane.pool)

    def _not_hedged(self, lane: Lane, tags: Tags) -> Tags:
        """Of requests that a pool gives back unsent those that no second pool is at."""
        others, failures = self._hedges.given_back(lane.pool, tags.tolist())
        for failed in failures:
            self._note_failures(failed)
        return np.array(others, np.int64)

    def _restart(self, key: tuple[str, str, int], lane: Lane) -> None:
        """Starts an engine of our own again that crashed or hung: what was in flight is booked as failed, the rest of
        its lots stay with it. The second time they move on."""
        if self._specs[lane.pool].kind != "vllm" or stopping.requested():
            return
        try:
            slot = self._slot(*key)
        except (ModelError, PoolDown):
            return
        if slot.dead:
            return
        if (rows := lane.settle(final=True)) is not None:
            self._closed_books.append((rows, lane.terms))
        self._slots[key] = slot
        slot.engine.listen(self._wake.set)
        meter = slot.meter if lane.terms.price.by_time else None
        lane.restart(slot.engine, meter, slot.loaded, self._announcer(slot, lane.terms))

    def _heed(self, lane: Lane) -> None:
        """Leads lots around a pool whose breaker has opened, where a runner-up is at work; what has none waits for the
        probes. A pool that no probe has reached counts as down."""
        if lane.breaker.openings == lane.heeded or not lane.open:
            return
        lane.heeded = lane.breaker.openings
        last = f" (last: {lane.last_error})" if lane.last_error else ""
        if lane.breaker.gave_up:
            lane.out = f"most of what it was asked failed, and so did every probe since{last}"
            return
        if not lane.ailing:
            lane.ailing = True
            lane.notes.append(_AILING.format(last=last))
        parts = []
        for lot, tags in lane.leftover():
            if lot.get("kind") == HEDGE:
                self._keep_unsent(lot, tags, "server")
            else:
                parts.append(({**lot, "places": places_of(tags)}, tags))
        lane.queue.extend(part for part, _ in parts)
        if parts:
            self._purse.reckon()
        moved = set[int]()
        for part, tags in parts:
            if (target := self._heirs.taker(part, tags, instead_of=lane)) is not None:
                target.queue.append(handed_on(part, tags, target.pool))
                moved.add(id(part))
        lane.queue = deque(part for part in lane.queue if id(part) not in moved)

    def _keep_unsent(self, lot: Lot, tags: Tags, why: str, pool: str | None = None) -> None:
        if lot.get("kind") == HEDGE:
            # What the first pool owes stays owed; what it has failed meanwhile is to be tried elsewhere.
            released, dropped = self._hedges.unsent(tags.tolist())
            for failed in released:
                self._note_failures(failed)
            for hedge in dropped:
                first = {**self._lots[lot["lot_id"]], "attempt_no": hedge.attempt_no - 1}
                self._left.keep_unsent(first, np.array([hedge.tag]), "server", hedge.pools[0])
            return
        self._left.keep_unsent(lot, tags, why, pool)

    def _note_failures(self, rows: pa.Table) -> None:
        lanes = self._lanes.values()
        stopped = {lane.pool: lane.stopped for lane in lanes if lane.stopped}
        repeating: dict[str, set[int]] = {}
        for lane in lanes:
            repeating[lane.pool] = repeating.get(lane.pool, set()) | lane.repeating
        self._left.note_failures(rows, stopped, repeating)

    def _check_walls(self, stop_at: float | None) -> float | None:
        """Deadline, reserved money and time, interruption: who gets no more, and what is cancelled."""
        deadline = self._context.deadline_at
        late = deadline is not None and self._now() >= deadline
        # Only a provider that reports more than the worst case gets this far: it is bought from no more.
        overspent = self._purse.overspent
        for lane in self._lanes.values():
            if lane.over_reserve(max(self._segment_s, 2 * _TICK_S)):
                self._end_time(lane)
            if lane.stopped or lane.down:
                continue
            if late:
                self._stop(lane, "deadline")
            elif overspent and not lane.terms.price.by_time:
                self._stop(lane, "budget")
        if stopping.requested():
            for lane in self._lanes.values():
                if not lane.stopped and not lane.down:
                    self._stop(lane, "interrupted")
            if stop_at is None:
                return time.monotonic() + _GRACE_S
            if time.monotonic() >= stop_at:
                for lane in self._lanes.values():
                    if isinstance(lane.engine, Lasting):
                        lane.engine.leave()
                    elif lane.engine_in_flight:
                        lane.engine.cancel()
                return time.monotonic() + _GRACE_S
        return stop_at

    def _end_time(self, lane: Lane) -> None:
        """Stops a lane that has used up its reserved time, whatever else has stopped it before."""
        if not lane.stopped and not lane.down:
            self._stop(lane, "budget")
        if lane.engine_in_flight:
            if not lane.cancelled:
                lane.cancelled = True
                lane.engine.cancel()
        elif lane.retire is None:
            # An engine that idles is paid for too: once that has used up what was held back for it, it goes.
            lane.let_go()

    def _stop(self, lane: Lane, why: str) -> None:
        lane.stopped = why
        if isinstance(lane.engine, Lasting):
            if why == "interrupted":
                lane.engine.leave()
            else:
                lane.engine.cancel()
        self._hand_over(lane)

    def _try_again(self) -> Generator[ShiftResult, None, bool]:
        """Once all is done: gives what failed another try in this round, where one may be had; whether any was."""
        yield from self._flush(final=False)
        again = False
        self._purse.reckon()
        for lane, lot in self._left.try_again(self._lanes_for, self._purse.promise):
            lane.queue.append(lot)
            again = True
        return again

    def _lanes_for(self, lot: Lot) -> Iterator[Lane]:
        """The lanes that may have another try at a lot: those of them that answer requests."""
        return (lane for lane in self._heirs.at_work(lot) if self._answers(lane))

    def _answers(self, lane: Lane) -> bool:
        """Whether a pool has answered at least as much as it has failed, in all rounds so far of all starts."""
        before = self._before.get(lane.pool, heartbeat.SoFar())
        answered, failed = self._context.answered.get(lane.pool, (0, 0))
        return failed + before.failed + lane.failed <= answered + before.settled + lane.settled

    def _hedge(self) -> None:
        """In the shift's tail: asks a second pool for what a remote one has been at for too long, once each; calls off
        what has become superfluous."""
        for tag, pool in self._hedges.superfluous():
            lane = next((each for key, each in self._lanes.items() if key[0] == pool and each.expects(tag)), None)
            if lane is not None and lane.withdraw(tag):
                self._hedges.unsent([tag])
            elif lane is not None and not lane.down:
                lane.call_off(tag)
        if not self._in_tail():
            return
        late = [
            (lane, lot_id, number, tag)
            for lane in self._lanes.values()
            # An engine of ours that makes no step is ended by its watchdog; one that makes steps is only busy.
            if self._specs[lane.pool].kind == "openai"
            for lot_id, number, tag in lane.overdue()
            if not self._hedges.knows(tag)
        ]
        if late:
            self._purse.reckon()
        for lane, lot_id, number, tag in late:
            lot = self._lots[lot_id]
            target = self._heirs.second(lane, lot, self._left.failed_on(tag))
            if target is None or not self._purse.promise(target.terms, lot, np.array([tag])):
                continue
            hedge = handed_on({**lot, "attempt_no": number + 1, "kind": HEDGE}, np.array([tag]), target.pool)
            target.queue.append(hedge)
            self._hedges.add(Hedge(tag, (lane.pool, target.pool), "primary" if number == 1 else "retry", number + 1))

    def _in_tail(self) -> bool:
        """Whether nothing is left to send, and next to nothing is out."""
        if self._context.rehearse or not self._context.hedging or stopping.requested():
            return False
        lanes = list(self._lanes.values())
        out = sum(lane.engine_in_flight for lane in lanes)
        return 0 < out * TAIL <= sum(lane.submitted for lane in lanes) and not any(lane.waiting for lane in lanes)

    def _flush(self, *, final: bool) -> Iterator[ShiftResult]:
        closed, self._closed_books = self._closed_books, []
        parts = [rows for rows, _ in closed]
        terms = {(each.price.price_id, each.model): each for _, each in closed}
        for lane in self._lanes.values():
            settled = lane.settle(final=final), lane.settle_unasked()
            if any(rows is not None for rows in settled):
                parts += [rows for rows in settled if rows is not None]
                for agreed in (lane.terms, *lane.agreed.values()):
                    terms[agreed.price.price_id, lane.model] = agreed
        if not parts:
            if final:
                yield from self._written(keep=0)
            return
        ruled = self._hedges.rule(pa.concat_tables(parts).unify_dictionaries())
        self._note_failures(ruled.failed)
        for pool, model, answered in ruled.passed_over:
            lane = next(each for key, each in self._lanes.items() if key[:2] == (pool, model))
            lane.settled, lane.failed = lane.settled - answered, lane.failed - (not answered)
        self._flushes += 1
        # Written beside the loop: a slow store must not leave an engine without work.
        self._purse.settled()
        self._writing.append(self._writer.submit(self._write, ruled.rows, tuple(terms.values())))
        yield from self._written(keep=0 if final or self._purse.waits else _WRITES_AHEAD)

    def _write(self, rows: pa.Table, terms: tuple[Terms, ...]) -> SegmentRef:
        prefix = f"{self._context.scratch_name}/segments/{self._task.prefix}"
        segment = write_segment(self._context.journal, prefix, self._number, rows, terms)
        self._number = segment_number(segment.name) + 1
        return segment

    def _written(self, *, keep: int) -> Iterator[ShiftResult]:
        """Segments that are on the store, in order; waits until no more than ``keep`` are not."""
        while self._writing and (len(self._writing) > keep or self._writing[0].done()):
            segment = self._writing.popleft().result()
            self._purse.written()
            yield ShiftResult(segment=segment)


def _last_failures(rows: pa.Table) -> pa.Table:
    """The last attempts (SEGMENT rows, in the order they were settled) of requests that had no answer in the end."""
    ok = pc.equal(rows.column("status").cast(pa.string()), "ok")
    tags = rows.column("tag")
    failed = rows.filter(
        pc.and_(pc.invert(pc.is_in(tags, value_set=tags.filter(ok).combine_chunks())), pc.is_valid(tags))
    )
    # Backwards: the first of each tag is its last.
    _, at = np.unique(failed.column("tag").to_numpy()[::-1], return_index=True)
    return failed.take(pa.array(np.sort(failed.num_rows - 1 - at)))
