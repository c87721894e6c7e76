"""The engine of a pool that answers in hours: rows gathered into batch files, sent, watched and collected.

What it sends outlives this process. Every batch is written down before it is sent (see ``batch_journal``), so that
whoever comes next takes it over instead of sending it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets as tokens
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import aiohttp
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bidbeam.connectors.batch_answers import UNKNOWN, UNSENT, read_answers
from bidbeam.connectors.batch_client import BatchClient, OpenAIBatchClient, Wire
from bidbeam.connectors.batch_courier import Courier, GivenUpError, LostError, RefusedError
from bidbeam.connectors.batch_intake import Intake
from bidbeam.connectors.batch_journal import INTENT_ROWS, BatchJournal, Intent
from bidbeam.connectors.batch_options import BatchOptions, read_options
from bidbeam.connectors.batch_rows import NOBODY, Batch, Gathering, new_intent
from bidbeam.connectors.batch_vertex import VertexBatchClient
from bidbeam.connectors.credentials import Credentials, credentials_for
from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.http_transport import CONNECT_S, LOOP, endpoint, failure, open_session
from bidbeam.connectors.http_wire import Outcome
from bidbeam.connectors.model_echo import echo_of
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.store import Store

MOST_ROWS = 1_000_000
"""Requests that are on their way at once, over all batches."""
_BURST = 4_096
"""Requests that it takes between two polls."""
_CHUNK = 2_048
_CLOSE_S = 12.0
_TIDY_S = 3.0
_CONNECTIONS = 8
_CREATING_S = 5.0
_PASSING = frozenset({"rate", "capacity"})
_log = logging.getLogger(__name__)


def _now() -> datetime:
    return datetime.now(UTC)


class _Settled(NamedTuple):
    tag: int
    started_at: datetime
    finished_at: datetime
    outcome: Outcome


class _Collected(NamedTuple):
    """A batch that was read to its end: its name, and its files at the provider."""

    name: str
    files: tuple[str, ...]


class BatchEngine:
    """Implements ``Engine`` and ``Lasting`` for one model at one provider's batch API.

    ``journal`` is where the run's batches are written down; ``booked`` says which rows of one the run has settled
    already (bool[n]). ``terms`` is written down with what is sent; ``earlier`` has those of what was taken over.
    Files of rows and answers pass through ``directory``, by default the system's place for such, and are gone when it
    closes. Batches of this pool and model that are still open are taken over: a request whose content is in one is
    served from it. ``started_at`` of a result is when its batch was first intended.

    The pool is down where the provider takes no batches from us as configured, or cannot be reached to create one. A
    batch that cannot be looked at for longer than ``patience`` comes back as ``cancelled`` without usage, to be booked
    at its worst case. Raises ConfigError on construction: unknown profile, wrong address or options, unset key.
    """

    wants: frozenset[str] = frozenset({"messages", "prompt", *INTENT_ROWS.names}) - {"custom_id"}

    def __init__(
        self,
        spec: PoolSpec,
        model: str,
        journal: BatchJournal,
        *,
        run_id: str,
        seed: int,
        booked: Callable[[Intent], npt.NDArray[np.bool_]],
        terms: str | None = None,
        now: Callable[[], datetime] = _now,
        credentials: Credentials | None = None,
        storage: Mapping[str, Mapping[str, Any]] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._name, self._model, self._their_model = spec.name, model, spec.models[model]
        self._endpoint = endpoint(spec)
        self._echo = echo_of(spec, model, self._endpoint.profile)
        self._options: BatchOptions = read_options(spec.options, spec.name, self._endpoint.profile.name)
        self._journal, self._now, self._storage, self._terms = journal, now, storage, terms
        self.earlier: dict[datetime, str] = {}
        self._credentials = credentials or credentials_for(spec, self._endpoint.profile.auth, now=now)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="sending-", dir=directory))

        # Touched by the shift's thread alone.
        self._intake = Intake(
            self._endpoint.profile, self._their_model, self._options, seed, self._directory, self._send_off
        )
        self._told_all = False
        self._burst = 0
        self._closed = False
        # Shared between the threads.
        self._lock = threading.Lock()
        self._wake: Callable[[], None] = lambda: None
        self._asked = 0
        self._unasked = 0
        self._settled: list[_Settled] = []
        self._strays: list[tuple[Batch, list[int], list[Outcome]]] = []
        self._read: list[_Collected] = []
        self._returned: list[_Collected] = []
        self._down: str | None = None
        self._broken: BaseException | None = None
        self._left = False
        # Touched by the loop's thread alone.
        self._tasks: dict[asyncio.Task[None], Batch] = {}
        self._tidying: set[asyncio.Task[None]] = set()
        self._all_asked = asyncio.Event()
        self._loop = LOOP.get()
        self._session: aiohttp.ClientSession = LOOP.run(self._open(spec), CONNECT_S)
        self._courier = Courier(self._client(spec, run_id), journal, self._options, now, self._others)
        self._adopt(booked)

    def __repr__(self) -> str:
        return f"BatchEngine({self._name!r}, {self._endpoint.host!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine lives in one process: pickle its PoolSpec instead")

    async def _open(self, spec: PoolSpec) -> aiohttp.ClientSession:
        return open_session(self._endpoint, spec, None, _CONNECTIONS)

    def _client(self, spec: PoolSpec, run_id: str) -> BatchClient:
        staged = self._options.staging is not None
        address = VertexBatchClient.address(self._endpoint) if staged else self._endpoint.base_url
        wire = Wire(
            self._session,
            self._endpoint,
            address,
            run_id,
            timeout_s=spec.timeout_s,
            credentials=self._credentials,
            now=self._now,
        )
        if self._options.staging is not None:
            return VertexBatchClient(wire, self._their_model, Store.at(self._options.staging, self._storage))
        return OpenAIBatchClient(wire, route=self._options.route, poll_s=self._options.poll_s)

    def _adopt(self, booked: Callable[[Intent], npt.NDArray[np.bool_]]) -> None:
        """Takes over the batches of this pool and model that the run has open."""
        for intent in self._journal.open():
            if (intent.pool, intent.model) != (self._name, self._model):
                continue
            done = booked(intent)
            if intent.creating_at is None or done.all():
                # Never asked for, or collected and settled to the last row.
                self._journal.drop(intent.name)
                continue
            batch = Batch(intent, self._intake.new_file(intent.chat), adopted=True, booked=done)
            if intent.terms is not None:
                self.earlier[intent.at] = intent.terms
            self._unasked += batch.unasked
            self._intake.adopt(batch)
            self._loop.call_soon_threadsafe(self._begin, batch)

    # The shift's side.

    @property
    def room(self) -> int:
        # A million rows at once would keep the shift's other pools waiting.
        return 0 if self.dead else max(0, min(MOST_ROWS - self.in_flight, _BURST - self._burst))

    @property
    def in_flight(self) -> int:
        """Requests not yet returned, and rows of batches taken over that nobody asks for but that are to be booked."""
        with self._lock:
            return 0 if self._left else self._asked + self._unasked

    @property
    def dead(self) -> bool:
        """Whether it takes nothing any more."""
        return self._closed or self._left or self._down is not None

    def listen(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def submit(self, requests: pa.RecordBatch) -> None:
        if self._closed or self._left:
            raise PoolDown(f"pool {self._name}: its engine is closed")
        if self._down and self.in_flight == 0:
            raise PoolDown(self._down)
        with self._lock:
            self._asked += requests.num_rows
        at = self._now()
        claimed, refused = self._intake.take(requests)
        with self._lock:
            self._unasked -= claimed
        self._hand([_Settled(tag, at, at, outcome) for tag, outcome in refused])
        self._burst += requests.num_rows
        self._wake()  # so that the caller comes back at once with more

    def gathered(self) -> None:
        self._intake.send_all()
        if not self._told_all:
            self._told_all = True
            self._loop.call_soon_threadsafe(self._all_asked.set)

    def poll(self) -> list[pa.RecordBatch]:
        self._burst = 0
        with self._lock:
            if self._broken is not None:
                raise self._broken
            settled, self._settled = self._settled, []
            self._returned += self._read
            self._read = []
            self._asked -= len(settled)
        if self._down and self.in_flight == 0 and not self._closed:
            if not settled:
                raise PoolDown(self._down)
            self._wake()  # so that the caller comes back to learn that the pool is down
        return [_results(settled, self._endpoint.host)] if settled else []

    def strays(self) -> list[tuple[pa.RecordBatch, pa.RecordBatch]]:
        with self._lock:
            strays, self._strays = self._strays, []
            self._unasked -= sum(len(rows) for _, rows, _ in strays)
        found = []
        for batch, rows, outcomes in strays:
            info = batch.intent.rows.take(pa.array(rows)).combine_chunks().to_batches()[0]
            nobody = pa.nulls(len(rows), pa.int64())
            at = self._now()
            settled = [_Settled(NOBODY, batch.intent.at, at, outcome) for outcome in outcomes]
            results = _results(settled, self._endpoint.host)
            arrays = [nobody, *results.columns[1:]]
            found.append((info.append_column("tag", nobody), pa.RecordBatch.from_arrays(arrays, results.schema.names)))
        return found

    def booked(self) -> None:
        with self._lock:
            collected, self._returned = self._returned, []
        for each in collected:
            self._journal.drop(each.name)
            # Nobody needs them any more: they hold prompts, and providers count what is kept.
            self._loop.call_soon_threadsafe(self._tidy, each.files)

    def cancel(self, tags: Collection[int] | None = None) -> None:
        """Gives up everything in flight; a batch cannot give up single requests, so that ``tags`` are let be."""
        if tags is not None:
            return
        at = self._now()
        self._hand([_Settled(tag, at, at, UNSENT) for tag in self._intake.drop_all()])
        self.gathered()
        self._loop.call_soon_threadsafe(self._give_up)

    def leave(self) -> None:
        with self._lock:
            self._left = True
            # Strays stay: whoever polled the rest of their batch books them too.
            self._settled, self._read = [], []
        self._loop.call_soon_threadsafe(self._let_go)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(FutureTimeout):
            LOOP.run(self._shut(), _CLOSE_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send_off(self, gathering: Gathering) -> None:
        self._loop.call_soon_threadsafe(self._begin, self._batch_of(gathering))

    def _batch_of(self, gathering: Gathering) -> Batch:
        name = f"{self._name}-{tokens.token_hex(6)}"
        return Batch(new_intent(name, self._name, self._model, gathering, self._now(), self._terms), gathering)

    # The loop's side.

    def _begin(self, batch: Batch) -> None:
        if self._left or self._closed:
            return
        if self._down is not None and not batch.adopted:
            self._hand([self._settle(batch, row, UNSENT) for row in range(len(batch))])
            return
        task = self._loop.create_task(self._work(batch))
        self._tasks[task] = batch
        task.add_done_callback(self._done)

    async def _work(self, batch: Batch) -> None:
        """Everything that happens to one batch."""
        try:
            batch_id = batch.intent.batch_id
            if batch_id is None:
                batch_id = await (self._courier.recover(batch) if batch.adopted else self._courier.send(batch))
            if batch_id is None:
                await self._void(batch)
                return
            _log.info("pool %s: batch %s of %d requests is at the provider", self._name, batch_id, len(batch))
            look = await self._courier.until_ended(batch, batch_id)
            files = await self._courier.fetch(look, self._new_file)
        except GivenUpError:
            self._hand([self._settle(batch, row, UNSENT) for row in range(len(batch))])
        except RefusedError as error:
            self._refused(batch, error)
        except LostError as error:
            _log.warning("pool %s: batch %s is booked as lost: %s", self._name, batch.intent.name, error)
            await self._collect(batch, ((row, UNKNOWN) for row in range(len(batch))))
        else:
            profile = self._endpoint.profile
            outcomes = read_answers(batch, look, files, profile, self._echo, self._credentials.secrets, self._now)
            await self._collect(batch, outcomes, (*look.files, *((look.rows,) if look.rows else ())))
            for file in files:
                file.unlink(missing_ok=True)
        if batch.asked is not None:
            batch.asked.discard()

    def _refused(self, batch: Batch, error: RefusedError) -> None:
        call = error.call
        if call.error_class in _PASSING:
            outcome = failure(call.error_class, f"the provider takes no batch: {call}")
        else:
            self._fall(f"it takes no batches: {call}")
            outcome = UNSENT
        self._hand([self._settle(batch, row, outcome) for row in range(len(batch))])

    async def _void(self, batch: Batch) -> None:
        """What never came to be is sent as if it were new, as far as somebody asks for it."""
        await self._all_asked.wait()
        unasked = await asyncio.to_thread(self._intake.last_call, batch)
        await asyncio.to_thread(self._journal.drop, batch.intent.name)
        with self._lock:
            self._unasked -= unasked
        self._wake()
        if len(batch.asked):
            self._begin(self._batch_of(batch.asked))
        else:
            batch.asked.discard()

    async def _collect(
        self, batch: Batch, outcomes: Iterable[tuple[int, Outcome]], files: tuple[str, ...] = ()
    ) -> None:
        """Hands out what became of a batch's rows: to who asked for them, the others as strays."""
        if batch.adopted:
            await self._all_asked.wait()
            await asyncio.to_thread(self._intake.last_call, batch)
        await asyncio.to_thread(self._hand_out, batch, outcomes, files)

    def _hand_out(self, batch: Batch, outcomes: Iterable[tuple[int, Outcome]], files: tuple[str, ...]) -> None:
        waiting = iter(outcomes)
        while chunk := list(islice(waiting, _CHUNK)):
            asked = [self._settle(batch, row, outcome) for row, outcome in chunk if batch.place[row] != NOBODY]
            stray = [(row, o) for row, o in chunk if batch.place[row] == NOBODY and not batch.booked[row]]
            with self._lock:
                if stray and not self._left:
                    self._strays.append((batch, [row for row, _ in stray], [outcome for _, outcome in stray]))
            self._hand(asked)
        with self._lock:
            if not self._left:
                self._read.append(_Collected(batch.intent.name, files))
        self._wake()

    def _settle(self, batch: Batch, row: int, outcome: Outcome) -> _Settled:
        return _Settled(batch.tag(row), batch.intent.at, self._now(), outcome)

    def _hand(self, settled: list[_Settled]) -> None:
        if settled:
            with self._lock:
                if not self._left:
                    self._settled.extend(settled)
            self._wake()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            with self._lock:
                self._broken = error
            self._wake()

    def _fall(self, why: str) -> None:
        if self._down is None:
            self._down = f"pool {self._name} at {self._endpoint.host} is down: {why}"

    def _others(self, batch: Batch) -> bool:
        """Whether other batches are on their way."""
        return any(each is not batch for each in self._tasks.values())

    def _new_file(self) -> Path:
        return self._directory / f"{tokens.token_hex(6)}.answers"

    def _give_up(self) -> None:
        for batch in self._tasks.values():
            batch.cancel.set()

    def _let_go(self) -> None:
        """Stops watching; whatever is just being created is waited for in ``_shut``."""
        for task, batch in list(self._tasks.items()):
            if not batch.creating:
                task.cancel()

    def _tidy(self, files: tuple[str, ...]) -> None:
        for file in files:
            task = self._loop.create_task(self._courier.forget(file))
            self._tidying.add(task)
            task.add_done_callback(self._tidying.discard)

    async def _shut(self) -> None:
        creating = [task for task, batch in self._tasks.items() if batch.creating]
        if creating:
            # Its id in the journal spares the next start a search.
            until = self._loop.time() + _CREATING_S
            while any(self._tasks[t].creating for t in creating if t in self._tasks) and self._loop.time() < until:
                await asyncio.sleep(0.02)
        if self._tidying:
            await asyncio.wait(list(self._tidying), timeout=_TIDY_S)
        left = [*self._tasks, *self._tidying]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        await self._session.close()


def _results(settled: Sequence[_Settled], host: str) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        name: [getattr(each.outcome, name) for each in settled] for name in Outcome.__dataclass_fields__
    }
    columns["tag"] = [each.tag for each in settled]
    columns["started_at"] = [each.started_at for each in settled]
    columns["finished_at"] = [each.finished_at for each in settled]
    columns["endpoint_host"] = [host] * len(settled)
    return pa.RecordBatch.from_pydict({name: columns[name] for name in RESULT_SCHEMA.names}, schema=RESULT_SCHEMA)
