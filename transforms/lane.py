"""A lane: one pool within a shift, with its ordered lots, what it has in flight, and its accelerator's clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import RESULT_SCHEMA, Engine, Lasting, Queueing
from bidbeam.connectors.errors import ModelError, PoolDown
from bidbeam.connectors.money import sum_decimal
from bidbeam.transforms.accelerator_time import AcceleratorMeter
from bidbeam.transforms.batches import earlier_terms, settle_strays
from bidbeam.transforms.breaker import COUNTED, Breaker
from bidbeam.transforms.door import LotRequests
from bidbeam.transforms.drawing import Draws
from bidbeam.transforms.given_up import died_with_the_pool, lost_rows, outcome_unknown
from bidbeam.transforms.hedging import HEDGE, LEAST_S, Latencies
from bidbeam.transforms.output_checks import check_answers, would_repeat
from bidbeam.transforms.outstanding import WORST, Outstanding, Tags
from bidbeam.transforms.region_check import check_regions
from bidbeam.transforms.settling import Terms, overhead_row, settle
from bidbeam.transforms.waiting import error_of

NOT_SENT = "not sent"
"""The message of a ``cancelled`` result whose request never left the engine: nothing is owed for it."""

_LEAST_NOTED = 8
"""Requests that are written down at a time before they are sent, where an engine's window is smaller."""
_EXACT = pa.decimal256(76, 36)

Lot = dict[str, Any]
"""One row of a LOT table, with ``runner_up``, the pool that gets it when its own goes down, and ``next_best``, those
that come after it. A hedge's has ``kind``."""


@dataclass(slots=True)
class Lane:
    """Everything a shift knows of one pool and model. Only the shift's thread touches it."""

    pool: str
    model: str
    engine: Engine
    terms: Terms
    meter: Callable[[], AcceleratorMeter] | None
    """Set where the pool is paid by time."""
    admit: Callable[[Lot], bool]
    """Whether the pool may see a lot; one that it may not is left over elsewhere."""
    open_lot: Callable[[Lot, Engine], Future[LotRequests | None]]
    """A lot's requests that are still to be sent; None where an earlier try has settled them all."""
    announce: Callable[[pa.RecordBatch], Future[None]] | None
    """Writes down that these requests are about to be sent; done once they may be. None: nobody need know."""
    overhead_id: Callable[[int], bytes]
    """The attempt id of the lane's n-th overhead row."""
    round: int
    loaded: Callable[[], bool] = lambda: True
    """Whether the engine has loaded; nothing is sent before. Raises ModelError where it never will."""
    retire: Callable[[], None] | None = None
    """Gives back what was rented for this lane, before its books are closed: its time counts, used or not."""
    checks: bool = True
    """Whether answers are held against what was asked; a rehearsal's are made up."""
    recount: Callable[[pa.RecordBatch], pa.Array] | None = None
    """Our own count of the answers' tokens (int64), where the model's tokenizer is known and the pool is not ours."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What the pool declares, which its answers are held to."""
    reserved_ms: int | None = None
    """The most milliseconds that this round may use of the accelerator; None: no bound."""
    purse: Draws | None = None
    """What each request is paid from before it is sent; None: all that the lane is given is paid for."""
    short: bool = False
    """Whether its next request waits for money that others may leave."""
    freed: Decimal = Decimal(0)
    """What settled requests did not cost of their worst case (USD) and nobody has taken back yet: see ``purse``."""
    queue: deque[Lot] = field(default_factory=deque)
    down: str | None = None
    """Why the pool serves nothing any more."""
    closing: bool = False
    """Whether it has given requests back unsent: it is going down, and gets no more."""
    stopped: str | None = None
    """Why it gets no more requests in this shift (budget, deadline, interrupted)."""
    out: str | None = None
    """Why it counts as down although its engine lives; what is in flight still comes back."""
    breaker: Breaker = field(default_factory=Breaker)
    agreed: dict[str, Terms] = field(default_factory=dict)
    """By price id, what was agreed in earlier starts on what this one has collected."""
    strayed: bool = False
    """Whether an answer came from where the pool does not declare to be: it gets no more in this round."""
    heeded: int = 0
    """How many openings of the breaker its lots were led around."""
    notes: list[str] = field(default_factory=list)
    """What people should be told of it, once each."""
    ailing: bool = False
    """Whether people were told that its breaker opened."""
    last_error: str | None = None
    """How the last request that failed ended, as the ledger has it."""
    restarted: bool = False
    """Whether its engine was started again in this shift."""
    cancelled: bool = False
    """Whether what it had in flight was given up because its time was up."""
    used_ms: int = 0
    lots: dict[str, Lot] = field(default_factory=dict)
    submitted: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    ideal_cached_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = Decimal(0)
    settled: int = 0
    failed: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    repeating: set[int] = field(default_factory=set)
    """The requests to which it would give the same unusable answer again."""
    clock: Callable[[], float] = time.monotonic
    _opened: LotRequests | None = None
    _next: tuple[Lot, Future[LotRequests | None]] | None = None
    """The lot that is opened ahead: an engine must not wait for the store."""
    _noted: int = 0
    """Rows of the opened lot that may be sent."""
    _noting: tuple[int, Future[None]] | None = None
    """Up to which row more are being written down."""
    _window: int = _LEAST_NOTED
    _worst: pa.Array | None = None
    """The worst cases of the opened lot's requests (COST)."""
    _granted: int = 0
    """Rows of the opened lot that are paid for."""
    _at: int = 0
    _outstanding: Outstanding = field(default_factory=Outstanding)
    _results: list[pa.RecordBatch] = field(default_factory=list)
    _returned: list[tuple[Lot, Tags]] = field(default_factory=list)
    _called_off: set[int] = field(default_factory=set)
    _overheads: int = 0
    _ready: bool = False
    _used: bool = False
    """Whether this engine was sent anything."""
    _moved_at: float | None = None
    """The clock when it last came to know something: an answer, or that it may begin."""
    _let_go_ms: tuple[int, int, int] | None = None
    """What an engine that was let go had taken and nobody was charged for: busy, idle and setup."""

    @property
    def idle(self) -> bool:
        """Nothing in flight and nothing left to send."""
        return self.engine_in_flight == 0 and not self.waiting

    @property
    def engine_in_flight(self) -> int:
        return 0 if self.down else self.engine.in_flight

    @property
    def sent(self) -> int:
        """Requests that are at the pool; what waits in the engine's own queue is not among them."""
        return (
            min(self.engine.sent, self.engine_in_flight) if isinstance(self.engine, Queueing) else self.engine_in_flight
        )

    @property
    def ready(self) -> bool:
        """Whether the engine was found loaded."""
        return self._ready

    @property
    def still_s(self) -> float:
        """Seconds since anything came back, or since it began."""
        return 0.0 if self._moved_at is None else max(0.0, self.clock() - self._moved_at)

    @property
    def waiting(self) -> bool:
        """Whether there is something that it may still send."""
        return self.open and (self._opened is not None or bool(self.queue))

    @property
    def hungry(self) -> bool:
        """Whether it takes more at this very moment."""
        may = self._ready and not self.short and self.breaker.allowance > 0
        return self.waiting and may and self.engine.room > 0 and not self._held_up

    @property
    def _held_up(self) -> bool:
        """Whether nothing can be sent before more of it is written down."""
        return self._noting is not None and self._noted <= self._at and not self._noting[1].done()

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return not self.down and not self.stopped and not self.closing and not self.out

    @property
    def pending_results(self) -> int:
        return sum(batch.num_rows for batch in self._results)

    def fill(self) -> None:
        """Hands the engine the next requests, in lot order, until its window is full. May find the pool down."""
        try:
            if self._moved_at is None:
                self._moved_at = self.clock()
            self._ready = self._ready or (self.waiting and self.loaded())
            self.short = False
            while self.hungry:
                room = self.engine.room
                if self.engine.in_flight == 0:
                    self._window = max(room, _LEAST_NOTED)
                if self._opened is None:
                    lot = self.queue.popleft()
                    if not self.admit(lot):
                        continue
                    self._opened, self._at, self._noted, self._granted = self._open(lot), 0, 0, 0
                    if self._opened is None:
                        continue
                    if self.purse is not None:
                        self._worst = self.purse.worst(self, lot, self._opened.info)
                    if lot.get("kind") != HEDGE or self._opened.lot_id not in self.lots:
                        self.lots[self._opened.lot_id] = lot
                self._grant(self._opened)
                room = min(room, self._note_ahead(self._opened), self.breaker.allowance)
                if room == 0:
                    break
                part = self._opened.requests.slice(self._at, room)
                if self.meter is not None and self.engine.in_flight == 0:
                    self.meter().busy()
                if self.engine.in_flight == 0:
                    self._moved_at = self.clock()
                # An engine that is gone takes nothing: these rows are then left over.
                self.engine.submit(part)
                self.breaker.sent(part.column("tag")[0].as_py())
                worst = None if self._worst is None else self._worst.slice(self._at, room)
                self._outstanding.add(self._opened.info.slice(self._at, room), self.clock(), worst)
                self._at += part.num_rows
                self.submitted += part.num_rows
                self._used = True
                if self._at >= self._opened.requests.num_rows:
                    self._opened = None
            if not self.waiting and isinstance(self.engine, Lasting):
                self.engine.gathered()
        except (ModelError, PoolDown) as error:
            self.mark_down(str(error))

    def _grant(self, opened: LotRequests) -> None:
        """Has more of the opened lot's requests paid for, ahead of what is noted: a crash books all that is noted."""
        rows: int = opened.requests.num_rows
        if self.purse is None or self._worst is None:
            self._granted = rows
            return
        if self._granted < rows and self._granted - self._at < self._window:
            self._granted += self.purse.grant(
                self, self.lots[opened.lot_id], opened.info.column("tag").slice(self._granted, self._window),
                self._worst.slice(self._granted, self._window),
            )  # fmt: skip
        self.short = self._granted <= self._at

    def _note_ahead(self, opened: LotRequests) -> int:
        """How many of the lot's next requests may be sent; sees to it that there are always more."""
        rows = self._granted
        if self.announce is None:
            return rows - self._at
        if self._noting is not None and self._noting[1].done():
            noted, written = self._noting
            written.result()
            self._noted, self._noting = noted, None
        if self._noting is None and self._noted < rows and self._noted - self._at < self._window:
            end = min(self._noted + self._window, rows)
            self._noting = (end, self.announce(opened.info.slice(self._noted, end - self._noted)))
        return self._noted - self._at

    def _open(self, lot: Lot) -> LotRequests | None:
        """The lot's requests; meanwhile those of the lot after it are begun."""
        ahead, self._next = self._next, None
        opening = ahead[1] if ahead is not None and ahead[0] is lot else self.open_lot(lot, self.engine)
        if self.queue:
            self._next = (self.queue[0], self.open_lot(self.queue[0], self.engine))
        return opening.result()

    def poll(self) -> None:
        """Takes what has finished. May find the pool down; what came before its end is kept."""
        if self.down or self._let_go_ms is not None:
            # An engine that was let go is closed, not down.
            return
        try:
            for batch in self.engine.poll():
                self._take(batch)
        except PoolDown as error:
            self.mark_down(str(error))

    def _take(self, batch: pa.RecordBatch) -> None:
        """Keeps results for settling; what comes back unsent is left over instead, and was no attempt."""
        unsent = pc.fill_null(pc.equal(batch.column("error_message"), NOT_SENT), False)
        if pc.any(unsent).as_py():
            back = self._outstanding.take(batch.filter(unsent).column("tag").to_numpy())
            self.submitted -= back.num_rows
            if self.purse is not None and self.announce is not None:
                self.purse.abandon(back.column("tag"), back.column(WORST))
            # What another pool has answered meanwhile is nobody's to send, and says nothing of this one.
            called_off = pa.array(list(self._called_off), pa.int64())
            wanted = back.filter(pc.invert(pc.is_in(back.column("tag"), value_set=called_off)))
            if wanted.num_rows:
                self.closing = True
                self._returned += self._by_lot(wanted)
            if self.breaker.probe in back.column("tag").to_pylist():
                self.breaker.probed(None)
            batch = batch.filter(pc.invert(unsent))
        if batch.num_rows:
            batch, astray = check_regions(batch, self.labels)
            self._note_stray(astray)
            if self.checks:
                self.latencies.add(batch)
            self._weigh(batch)
            self._moved_at = self.clock()
            self.last_error = error_of(batch) or self.last_error
            self._results.append(batch)

    def _note_stray(self, astray: str | None) -> None:
        """An answer (None: no answer) from where the pool does not declare to be: it gets no more in this round."""
        if astray is not None and not self.strayed:
            self.strayed, self.out = True, self.out or astray

    def settle_unasked(self) -> pa.Table | None:
        """SEGMENT rows of what came back that nobody asks for any more; None where nothing did."""
        rows, astray, agreed = settle_strays(self.engine, self.terms, self.labels)
        self._note_stray(astray)
        self.agreed |= {terms.price.price_id: terms for terms in agreed}
        return rows

    def _weigh(self, batch: pa.RecordBatch) -> None:
        """Tells the breaker how requests ended; whether answers are any good is found when they are settled."""
        if isinstance(self.engine, Lasting):
            # A batch is one outcome, hours old: the next auction weighs it.
            return
        answered = int(pc.sum(pc.equal(batch.column("status"), "ok")).as_py() or 0)
        failed = _against(batch) if answered < batch.num_rows else None
        if (probe := self.breaker.probe) is not None and probe in (tags := batch.column("tag").to_pylist()):
            at = tags.index(probe)
            if batch.column("status")[at].as_py() != "ok":
                self.breaker.probed(False if failed is not None and failed[at].as_py() else None)
        else:
            self.breaker.note(answered, int(pc.sum(failed).as_py() or 0) if failed is not None else 0)

    def _weigh_answers(self, before: pa.RecordBatch, checked: pa.RecordBatch) -> None:
        """Tells the breaker of answers that did not stand their check, and of a probe that did."""
        if isinstance(self.engine, Lasting):
            return
        probe = self.breaker.probe
        if probe is not None and probe in (tags := checked.column("tag").to_pylist()):
            self.breaker.probed(checked.column("status")[tags.index(probe)].as_py() == "ok")
        elif checked is not before:
            self.breaker.spoil(pc.sum(pc.and_(_against(checked), pc.equal(before.column("status"), "ok"))).as_py() or 0)

    def overdue(self) -> list[tuple[str, int, int]]:
        """(lot, attempt number, tag) of what has been out for longer than 95 % of the answers so far took."""
        if (usual_s := self.latencies.p95_s) is None or self.down:
            return []
        since = self.clock() - max(usual_s, LEAST_S)
        polled = {tag for batch in self._results for tag in batch.column("tag").to_pylist()}
        return [each for each in self._outstanding.sent_before(since) if each[2] not in polled]

    @property
    def takes_at_once(self) -> bool:
        """Whether a request that comes to it now is sent now."""
        well = self.open and self.breaker.closed and not isinstance(self.engine, Lasting)
        return well and self.engine.room > 0 and self._has_loaded()

    def expects(self, tag: int) -> bool:
        """Whether a request is to be sent, or is out, or has come back and is not settled yet."""
        return any(tag in tags for _, tags in self.unsettled())

    def withdraw(self, tag: int) -> bool:
        """Takes a hedge out of the queue; False where it is not there any more."""
        for lot in self.queue:
            if lot.get("kind") == HEDGE and tag in all_tags(lot):
                self.queue.remove(lot)
                return True
        return False

    def call_off(self, tag: int) -> None:
        """Gives up one request that another pool has answered."""
        self._called_off.add(tag)
        self.engine.cancel([tag])

    def has_result_of(self, tags: Tags) -> bool:
        """Whether one of these requests has come back and is not settled yet."""
        return any(bool(np.isin(batch.column("tag").to_numpy(), tags).any()) for batch in self._results)

    def unsettled(self) -> list[tuple[Lot, Tags]]:
        """Lots with those of their requests that it was sent, or is to be sent, and that are not settled yet."""
        found = [(lot, all_tags(lot)) for lot in self.queue]
        if self._opened is not None:
            found += self._by_lot(self._opened.info.slice(self._at))
        return [*found, *(part for batch in self._outstanding for part in self._by_lot(batch))]

    @property
    def promised(self) -> Decimal:
        """USD that what is paid for and not settled may cost; 0 where it draws on no purse."""
        if self.purse is None:
            return Decimal(0)
        out = self._outstanding.worst
        if self._opened is not None and self._worst is not None:
            out += sum_decimal(self._worst.slice(self._at, self._granted - self._at))
        return out

    @property
    def unpaid(self) -> tuple[Lot, Decimal] | None:
        """The opened lot, and what the rest of it that is not paid for may cost (USD); None where none is open."""
        if self._opened is None or self._worst is None:
            return None
        return self.lots[self._opened.lot_id], sum_decimal(self._worst.slice(self._granted))

    def pass_over(self, left: Decimal) -> list[tuple[Lot, Tags]]:
        """Takes what comes next out of the opened lot as long as each of it may cost more than ``left`` (USD), where
        all that was paid for is sent: (lot, tags not sent)."""
        if self._opened is None or self._worst is None:
            return []
        cheap = pc.less_equal(self._worst.slice(self._at).cast(_EXACT), pa.scalar(left, _EXACT))
        first = pc.index(cheap, True).as_py()
        count = len(cheap) if first < 0 else first
        passed = self._by_lot(self._opened.info.slice(self._at, count))
        self._at += count
        self._granted = self._noted = self._at
        if self._at >= self._opened.requests.num_rows:
            self._opened = None
        return passed

    def _by_lot(self, info: pa.RecordBatch) -> list[tuple[Lot, Tags]]:
        """The lots of which these are rows, hedges apart from others, each with its tags."""
        lots = np.array(info.column("lot_id").cast(pa.string()).to_pylist(), dtype=object)
        hedges = pc.equal(info.column("kind").cast(pa.string()), HEDGE).to_numpy(zero_copy_only=False)
        tags, found = info.column("tag").to_numpy(), list[tuple[Lot, Tags]]()
        for lot_id in dict.fromkeys(lots.tolist()):
            lot = {name: value for name, value in self.lots[lot_id].items() if name != "kind"}
            for kind, mine in (({}, ~hedges), ({"kind": HEDGE}, hedges)):
                if len(part := tags[mine & (lots == lot_id)]):
                    found.append(({**lot, **kind}, part))
        return found

    @property
    def awaits_verdict(self) -> bool:
        """Whether all that it may send hangs on a probe that has come back and is not settled yet."""
        return self.breaker.probe is not None and self.pending_results > 0 and self.engine_in_flight == 0

    def look_once_more(self) -> None:
        """Finds out whether the engine is gone, where all that it was handed has come back and nothing is left."""
        if self.retire is None and not self.engine_in_flight and getattr(self.engine, "dead", False):
            self.poll()

    def mark_down(self, why: str) -> None:
        self.down = why

    @property
    def restartable(self) -> bool:
        """Whether it went down at work, for the first time, and has something left to send."""
        left = self._opened is not None or bool(self.queue)
        return bool(self.down) and self._ready and left and not self.restarted and not self.stopped

    def restart(
        self,
        engine: Engine,
        meter: Callable[[], AcceleratorMeter] | None,
        loaded: Callable[[], bool],
        announce: Callable[[pa.RecordBatch], Future[None]] | None,
    ) -> None:
        """Goes on with another engine, once the books of the one that is gone are closed: see ``settle``."""
        self.notes.append(f"its engine went down and was started again: {self.down}"[:300])
        self.engine, self.meter, self.loaded, self.announce = engine, meter, loaded, announce
        self.down, self.closing, self.restarted = None, False, True
        self._ready = self._used = self.short = False
        self.breaker, self.heeded = Breaker(), 0

    @property
    def last_waiting(self) -> Lot | None:
        """The lot that it comes to last; None where nothing waits, or only a hedge."""
        lot = self.queue[-1] if self.queue else None if self._opened is None else self.lots[self._opened.lot_id]
        return None if lot is None or lot.get("kind") == HEDGE else lot

    def leftover(self) -> list[tuple[Lot, Tags]]:
        """Lots, or the unsent parts of lots, that nobody was asked for: (lot, tags not sent). Empties the queue."""
        left, self._returned = self._returned, []
        if self._opened is not None:
            left += self._by_lot(self._opened.info.slice(self._at))
            if self.purse is not None and self._worst is not None and self.announce is not None:
                noted = (self._noted if self._noting is None else self._noting[0]) - self._at
                tags = self._opened.info.column("tag").slice(self._at, noted)
                self.purse.abandon(tags, self._worst.slice(self._at, noted))
            self._opened = None
        self._noting = None
        while self.queue:
            lot = self.queue.popleft()
            left.append((lot, all_tags(lot)))
        return left

    def settle(self, *, final: bool, now: datetime | None = None) -> pa.Table | None:
        """The SEGMENT rows of everything that finished since the last call, None where nothing did.

        ``final`` closes the books: time that no attempt bears is booked as overhead, and what is outstanding at a dead
        pool as failed where the pool is paid by time, which its seconds cover, else as lost.
        """
        if final and self.retire is not None:
            self.retire()
        promised, cost = self.promised, self.cost
        now = now or datetime.now(UTC)
        metered = self.meter is not None and self.terms.price.by_time
        if final and self.down and self._outstanding and metered:
            answered = [batch.column("tag").to_numpy() for batch in self._results]
            gone = np.setdiff1d(self._outstanding.tags, np.concatenate([np.zeros(0, np.int64), *answered]))
            self._results.append(died_with_the_pool(gone, str(self.down), now))
        rows: list[pa.RecordBatch] = []
        busy = idle = 0
        counts = self._used or self.retire is not None
        if metered and self.meter is not None and counts and (self._results or final):
            busy, idle, setup = self._take_time(self.meter())
            self.used_ms += busy + idle + setup
            rows += self._overhead("setup", setup, now)
            rows += self._overhead("accelerator_idle_second", idle, now)
        if self._results:
            results = pa.Table.from_batches(self._results, schema=RESULT_SCHEMA).combine_chunks().to_batches()[0]
            self._results = []
            requests = self._outstanding.take(results.column("tag").to_numpy())
            # Of what failed no tokens are counted either.
            answered = pc.equal(results.column("status"), "ok")
            self.ideal_cached_tokens += pc.sum(requests.column("ideal_cached_tokens").filter(answered)).as_py() or 0
            for terms, mine in self._by_terms(results.column("started_at")):
                asked, told = (each if mine is None else each.filter(mine) for each in (requests, results))
                rows += self._settled(asked, told, terms, now, busy if metered else None)
        elif busy:
            rows += self._overhead("accelerator_second", busy, now)
        if final and self.down and self._outstanding:
            rows.append(lost_rows(self._outstanding.take_all(), self.terms, now))
        for batch in rows:
            self._count(batch)
        self.freed += max(promised - self.promised - (self.cost - cost), Decimal(0))
        return pa.Table.from_batches(rows).unify_dictionaries() if rows else None

    def _by_terms(self, started_at: pa.Array) -> Iterator[tuple[Terms, pa.Array | None]]:
        """The terms of results that began then, and which of them each are of (bool[n]; None: all): what an earlier
        start had sent is paid as was agreed then."""
        earlier = earlier_terms(self.engine, self.terms)
        if not earlier:
            yield self.terms, None
            return
        left = pa.repeat(True, len(started_at))
        for at, terms in earlier.items():
            mine = pc.equal(started_at, pa.scalar(at, started_at.type))
            if pc.any(mine).as_py():
                self.agreed[terms.price.price_id] = terms
                yield terms, mine
                left = pc.and_(left, pc.invert(mine))
        if pc.any(left).as_py():
            yield self.terms, left

    def _settled(
        self, requests: pa.RecordBatch, results: pa.RecordBatch, terms: Terms, now: datetime, milliseconds: int | None
    ) -> Iterator[pa.RecordBatch]:
        """SEGMENT rows of results; ``milliseconds`` is what the accelerator was busy with them, None where that is not
        what is paid."""
        if milliseconds is None and (unknown := outcome_unknown(results)) is not None:
            yield lost_rows(requests.filter(unknown), terms, now, results.filter(unknown).column("started_at"))
            requests, results = requests.filter(pc.invert(unknown)), results.filter(pc.invert(unknown))
        if results.num_rows:
            checked = check_answers(requests.column("sampling"), results) if self.checks else results
            self._weigh_answers(results, checked)
            if checked is not results:
                self.repeating.update(would_repeat(requests.column("sampling"), results, checked))
            counted = self.recount(checked) if self.recount is not None else None
            yield settle(requests, checked, terms, accelerator_ms=milliseconds, recount_output_tokens=counted)

    def _count(self, rows: pa.RecordBatch) -> None:
        self.cost += sum_decimal(rows.column("cost"))
        rows = rows.filter(pc.is_valid(rows.column("tag")))
        ok = int(pc.sum(pc.equal(rows.column("status").cast(pa.string()), "ok")).as_py() or 0)
        self.settled += ok
        self.failed += rows.num_rows - ok
        for name in ("input_tokens", "cached_tokens", "output_tokens"):
            setattr(self, name, getattr(self, name) + int(pc.sum(rows.column(name)).as_py() or 0))

    def _has_loaded(self) -> bool:
        """Whether the engine has loaded; where it never will, ``fill`` finds out."""
        try:
            return self.loaded()
        except (ModelError, PoolDown):
            return False

    def over_reserve(self, margin_s: float) -> bool:
        """Whether the accelerator has run as long as this round reserved, or will have within ``margin_s`` seconds.

        All that is paid for counts: loading and idling too.
        """
        if self.reserved_ms is None or self.meter is None or self._let_go_ms is not None or not self._has_loaded():
            return False
        meter = self.meter()
        return self.used_ms + meter.setup_ms + meter.open_ms + margin_s * 1000 >= self.reserved_ms

    def let_go(self) -> None:
        """Ends an engine with nothing in flight whose time is up: what it took until now is booked, and no more."""
        if self.meter is not None and self._let_go_ms is None:
            self._let_go_ms = self._take_time(self.meter())
            self.engine.close()

    def _take_time(self, meter: AcceleratorMeter) -> tuple[int, int, int]:
        """Milliseconds busy, idle and loading that nobody was charged for yet; they count as taken from here on."""
        if self._let_go_ms is not None:
            taken, self._let_go_ms = self._let_go_ms, (0, 0, 0)
            return taken
        if self.engine_in_flight == 0:
            meter.idle()
        busy, idle = meter.close()
        return busy, idle, meter.take_setup()

    def _overhead(self, meter: Any, millis: int, now: datetime) -> list[pa.RecordBatch]:
        if millis <= 0 or meter not in self.terms.price.unit_prices:
            return []
        self._overheads += 1
        attempt_id = self.overhead_id(self._overheads)
        return [
            overhead_row(self.terms, meter=meter, millis=millis, at=now, attempt_id=attempt_id, round_no=self.round)
        ]


def _against(results: pa.RecordBatch) -> pa.Array:
    """Which results speak against the pool (bool[n])."""
    counted = pc.is_in(results.column("error_class"), value_set=pa.array(sorted(COUNTED)))
    return pc.and_(pc.not_equal(results.column("status"), "ok"), counted)


def all_tags(lot: Lot) -> Tags:
    """The tags of a lot's requests, ascending."""
    places = np.frombuffer(lot["places"], "<u4").astype(np.int64)
    tags: Tags = (np.int64(lot["range"]) << 32) | places
    return tags
