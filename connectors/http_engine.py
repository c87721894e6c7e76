"""The engine of a remote pool: an async client for OpenAI-compatible endpoints.

All HTTP engines of a process share one event loop on one thread. The shift's thread only appends to a queue and takes
finished rows. Nothing is retried here: the round owns the retry budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import aiohttp
import pyarrow as pa

from bidbeam.connectors.concurrency import FIRST_PAUSE_S, Aimd
from bidbeam.connectors.credentials import Credentials, credentials_for
from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import ConfigError, PoolDown
from bidbeam.connectors.http_transport import (
    CONNECT_S,
    LOOP,
    Endpoint,
    endpoint,
    failure,
    open_session,
    read_body,
    transport_failure,
)
from bidbeam.connectors.http_wire import (
    Outcome,
    Sampling,
    SamplingError,
    read_answer,
    read_sampling,
    request_body,
)
from bidbeam.connectors.model_echo import echo_of
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.provider_text import provider_message
from bidbeam.connectors.wire_json import pointer, read_json

DEFAULT_CONCURRENCY = 16
MAX_ANSWER_BYTES = 32 * 2**20
DOWN_AFTER = 5
"""Connections that fail in a row before the pool counts as down."""
DRAIN_S = 30.0
"""How long what is in flight may still take to end once a pool is down: it may have been paid for."""
_THERE_S = 10.0
"""How long an endpoint that was lost may take to say that it is there again."""
_CLOSE_S = 5.0
_UNSENT = Outcome("cancelled", error_message="not sent")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class _Job:
    tag: int
    started_at: datetime
    attempt: str
    chat: bool
    prompt_text: str
    n: int
    body: bytes
    begun: int = 0
    """What the window of requests said when it was begun."""


@dataclass(frozen=True, slots=True)
class _Settled:
    tag: int
    started_at: datetime
    finished_at: datetime
    outcome: Outcome


class HttpEngine:
    """Implements ``Engine`` for one model at one OpenAI-compatible endpoint.

    A row with ``messages`` goes to ``/chat/completions``, one with ``prompt`` to ``/completions``, at most
    ``capacity.concurrency`` (16) at a time, begun in order; fewer, after a pause, where the endpoint pushes back (see
    ``concurrency``). ``started_at`` is when ``submit`` took the row. Tokens are replaced before they end, while
    requests wait.

    The pool is down, and ``poll`` raises PoolDown once everything has come back, when the endpoint refuses us as such
    (key, funds, model name, address), when ``down_after`` connections in a row fail, or when two windows of requests
    in a row get no answer. What was not sent by then comes back as ``cancelled`` at once; what is in flight gets
    ``drain_s`` seconds to end. The usage of what is cancelled is not known.

    Raises ConfigError on construction: unknown model or profile, wrong address or option, unset key.
    """

    wants: frozenset[str] = frozenset({"messages", "prompt"})

    def __init__(
        self,
        spec: PoolSpec,
        model: str,
        *,
        now: Callable[[], datetime] = _now,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        down_after: int = DOWN_AFTER,
        drain_s: float = DRAIN_S,
        first_pause_s: float = FIRST_PAUSE_S,
        credentials: Credentials | None = None,
    ) -> None:
        if model not in spec.models:
            near = difflib.get_close_matches(model, spec.models, n=1)
            raise ConfigError(
                f"pool {spec.name} does not serve model {model!r}",
                key=f"pools.{spec.name}.models",
                expected=" or ".join(spec.models),
                nearest=near[0] if near else None,
            )
        self._name = spec.name
        self._model = spec.models[model]
        self._endpoint = endpoint(spec)
        self._echo = echo_of(spec, model, self._endpoint.profile)
        self._timeout_s = spec.timeout_s
        self._now = now
        self._max_answer_bytes = max_answer_bytes
        self._down_after = down_after
        self._drain_s = drain_s
        self._urls = {True: self._endpoint.url("chat/completions"), False: self._endpoint.url("completions")}
        self._forbidden = frozenset(self._endpoint.profile.body)
        self._credentials = credentials or credentials_for(spec, self._endpoint.profile.auth, now=now)

        # Touched by the shift's thread alone.
        self._in_flight = 0
        self._closed = False
        # Shared: appended to by the loop's thread, taken by the shift's.
        self._lock = threading.Lock()
        self._settled: list[_Settled] = []
        self._down: str | None = None
        self._wake: Callable[[], None] = lambda: None
        # Touched by the loop's thread alone.
        self._queue: deque[_Job] = deque()
        self._active: dict[asyncio.Task[Outcome], _Job] = {}
        self._unconnected = 0
        self._unanswered = 0
        self._resuming: asyncio.TimerHandle | None = None
        self._loop = LOOP.get()
        self._ceiling = spec.capacity.concurrency or DEFAULT_CONCURRENCY
        self._window = Aimd(self._ceiling, self._loop.time, first_pause_s=first_pause_s)
        self._session: aiohttp.ClientSession = LOOP.run(self._open(spec), CONNECT_S)

    def __repr__(self) -> str:
        return f"HttpEngine({self._name!r}, {self._endpoint.host!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine lives in one process: pickle its PoolSpec instead")

    async def _open(self, spec: PoolSpec) -> aiohttp.ClientSession:
        return open_session(self._endpoint, spec, None, self._ceiling)

    # The shift's side.

    @property
    def room(self) -> int:
        # Twice the window: the queue bridges the time until the shift comes round again.
        return 0 if self._closed or self._down else max(0, 2 * self._window.limit - self._in_flight)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def dead(self) -> bool:
        """Whether it serves nothing any more."""
        return self._closed or self._down is not None

    def listen(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def submit(self, requests: pa.RecordBatch) -> None:
        if self._closed:
            raise PoolDown(f"pool {self._name}: its engine is closed")
        if self._down and self._in_flight == 0:
            raise PoolDown(self._down)  # else what is in flight comes back first, and these rows with it
        started_at = self._now()
        jobs: list[_Job] = []
        refused: list[_Settled] = []
        for row in self._rows(requests):
            made = self._job(row, started_at)
            if isinstance(made, _Job):
                jobs.append(made)
            else:
                refused.append(_Settled(row["tag"], started_at, started_at, made))
        self._in_flight += len(jobs) + len(refused)
        self._loop.call_soon_threadsafe(self._take, jobs, refused)

    def poll(self) -> list[pa.RecordBatch]:
        with self._lock:
            settled, self._settled = self._settled, []
        self._in_flight -= len(settled)
        if self._down and self._in_flight == 0 and not self._closed:
            if not settled:
                raise PoolDown(self._down)
            self._wake()  # so that the caller comes back to learn that the pool is down
        return [_batch(settled, self._endpoint.host)] if settled else []

    def cancel(self, tags: Collection[int] | None = None) -> None:
        self._loop.call_soon_threadsafe(self._give_up, None if tags is None else frozenset(tags))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(FutureTimeout):  # a connection that does not close dies with the process
            LOOP.run(self._shut(), _CLOSE_S)

    def _rows(self, requests: pa.RecordBatch) -> list[dict[str, Any]]:
        wanted = ("tag", "attempt_id", "max_tokens", "sampling", "cache_salt", "messages", "prompt")
        return requests.select([name for name in wanted if name in requests.schema.names]).to_pylist()  # type: ignore[no-any-return]

    def _job(self, row: dict[str, Any], started_at: datetime) -> _Job | Outcome:
        messages, prompt = row.get("messages"), row.get("prompt")
        if messages is None and prompt is None:
            return failure("caller", "the request holds neither messages nor a prompt")
        try:
            sampling: Sampling = read_sampling(
                row["sampling"], self._endpoint.profile.max_tokens_field, self._forbidden
            )
        except SamplingError as error:
            return failure("caller", str(error))
        if messages is None and not self._endpoint.profile.takes_raw:
            return _UNSENT
        body = request_body(
            self._endpoint.profile,
            self._model,
            messages=messages,
            prompt=prompt,
            sampling=sampling,
            max_tokens=row["max_tokens"],
            cache_salt=row.get("cache_salt"),
        )
        chat = messages is not None
        return _Job(row["tag"], started_at, row["attempt_id"].hex(), chat, messages or prompt or "", sampling.n, body)

    # The loop's side.

    def _take(self, jobs: list[_Job], refused: list[_Settled]) -> None:
        self._queue.extend(jobs)
        self._hand_out(refused)
        if any(each.outcome is _UNSENT for each in refused):
            self._fall(f"profile {self._endpoint.profile.name} takes chats only, no raw prompts")
        if self._down:
            self._drop_queue()
        self._pump()

    def _pump(self) -> None:
        """Begins as many requests, in order, as the concurrency allows."""
        pause = self._window.pause_s
        if pause > 0 and self._queue:
            if self._resuming is not None:
                self._resuming.cancel()
            self._resuming = self._loop.call_later(pause, self._pump)
            return
        while self._queue and len(self._active) < self._window.limit:
            job = self._queue.popleft()
            job.begun = self._window.begin()
            task = self._loop.create_task(self._ask(job))
            self._active[task] = job
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Outcome]) -> None:
        job = self._active.pop(task)
        if task.cancelled():
            outcome = Outcome("cancelled", error_message="given up in flight")
        elif (error := task.exception()) is not None:
            # Ours, not the endpoint's: say what it was without its text, which may hold anything.
            outcome = failure("server", f"the client failed with {type(error).__name__}")
        else:
            outcome = task.result()
        self._watch(job, outcome)
        self._hand_out([_Settled(job.tag, job.started_at, self._now(), outcome)])
        self._pump()

    def _watch(self, job: _Job, outcome: Outcome) -> None:
        """Learns from how a request ended whether the pool is still there, and how much it wants to be asked."""
        if outcome.http_status is not None:
            self._unconnected = self._unanswered = 0
        elif outcome.status == "failed":
            self._unanswered += 1
        if outcome.error_class == "auth_funds" or self._unconnected >= self._down_after:
            self._fall(outcome.error_message or "unusable")
        elif self._unanswered >= max(2 * self._ceiling, self._down_after):
            self._fall(f"{self._unanswered} requests in a row got no answer")
        if outcome.error_class in ("rate", "capacity"):
            self._window.pushed_back(job.begun, outcome.retry_after_s)
        elif outcome.http_status is not None:
            self._window.answered(job.begun)
            if outcome.retry_after_s:
                self._window.wait(outcome.retry_after_s)

    def _fall(self, why: str) -> None:
        if self._down is None:
            self._down = f"pool {self._name} at {self._endpoint.host} is down: {why}"
            self._drop_queue()
            self._loop.call_later(self._drain_s, self._cancel_active)

    def _drop_queue(self, tags: Collection[int] | None = None) -> None:
        """Gives back what waits, or of it these."""
        at = self._now()
        dropped = [job for job in self._queue if tags is None or job.tag in tags]
        self._queue = deque(job for job in self._queue if tags is not None and job.tag not in tags)
        self._hand_out([_Settled(job.tag, job.started_at, at, _UNSENT) for job in dropped])

    def _cancel_active(self, tags: Collection[int] | None = None) -> None:
        for task, job in list(self._active.items()):
            if tags is None or job.tag in tags:
                task.cancel()

    def _give_up(self, tags: Collection[int] | None) -> None:
        self._drop_queue(tags)
        self._cancel_active(tags)

    def _hand_out(self, settled: list[_Settled]) -> None:
        if settled:
            with self._lock:
                self._settled.extend(settled)
            self._wake()

    async def _shut(self) -> None:
        self._queue.clear()
        self._cancel_active()
        if self._active:
            await asyncio.wait(list(self._active))
        await self._session.close()

    async def _ask(self, job: _Job) -> Outcome:
        try:
            headers = await self._let_in()
        except ConfigError as error:
            return failure("auth_funds", error.problem)
        profile = self._endpoint.profile
        if profile.sends_request_id is not None:
            headers[profile.sends_request_id] = job.attempt
        try:
            async with self._session.post(
                self._urls[job.chat], data=job.body, headers=headers, allow_redirects=False
            ) as response:
                status = response.status
                body = await read_body(response, self._max_answer_bytes)
                if body is None:
                    return failure("bad_output", f"the answer is larger than {self._max_answer_bytes} bytes", status)
                return read_answer(
                    profile,
                    status,
                    {name.lower(): value for name, value in response.headers.items()},
                    body,
                    chat=job.chat,
                    n=job.n,
                    prompt_text=job.prompt_text,
                    secrets=self._credentials.secrets,
                    now=self._now,
                    echo=self._echo,
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return self._no_answer(error)

    async def _let_in(self) -> dict[str, str]:
        """The headers that let a request in. Raises ConfigError where they are not to be had any more."""
        headers = self._credentials.current()
        if headers is None:
            # Fetching takes its time, on a thread of its own: this one serves every pool.
            headers = await asyncio.to_thread(self._credentials.refresh)
        return dict(headers)

    def _no_answer(self, error: Exception) -> Outcome:
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            self._unconnected += 1
        return transport_failure(error, self._timeout_s)


def _batch(settled: list[_Settled], host: str) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        name: [getattr(each.outcome, name) for each in settled] for name in Outcome.__dataclass_fields__
    }
    columns["tag"] = [each.tag for each in settled]
    columns["started_at"] = [each.started_at for each in settled]
    columns["finished_at"] = [each.finished_at for each in settled]
    columns["endpoint_host"] = [host] * len(settled)
    return pa.RecordBatch.from_pydict({name: columns[name] for name in RESULT_SCHEMA.names}, schema=RESULT_SCHEMA)


def list_models(spec: PoolSpec) -> list[str]:
    """The names of the models that a pool's endpoint says it serves. Raises PoolDown where it does not answer as it
    should, ConfigError where the pool is misconfigured.
    """
    where, credentials, status, body = _ask_for_models(spec, spec.timeout_s)
    at = f"pool {spec.name} at {where.host}"
    document = read_json(body or b"")
    listed = pointer(document, "/data")
    if status != 200 or not isinstance(listed, list):
        said = provider_message(pointer(document, "/error"), "", credentials.secrets)
        raise PoolDown(f"{at} does not list its models ({status}{': ' + said if said else ''})")
    names = (pointer(each, "/id") for each in listed)
    return [name for name in names if isinstance(name, str)]


def is_there(spec: PoolSpec) -> bool:
    """Whether a pool's endpoint answers at all, be it with an error that is not its own fault."""
    try:
        return _ask_for_models(spec, min(spec.timeout_s, _THERE_S))[2] < 500
    except (PoolDown, ConfigError):
        return False


def _ask_for_models(spec: PoolSpec, timeout_s: float) -> tuple[Endpoint, Credentials, int, bytes | None]:
    where = endpoint(spec)
    credentials = credentials_for(spec, where.profile.auth)
    headers = credentials.refresh()

    async def ask() -> tuple[int, bytes | None]:
        async with (
            open_session(where, spec, None, 1) as session,
            session.get(where.url("models"), headers=headers, allow_redirects=False) as response,
        ):
            return response.status, await read_body(response, MAX_ANSWER_BYTES)

    try:
        status, body = LOOP.run(ask(), timeout_s + _CLOSE_S)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        said = transport_failure(error, timeout_s).error_message
        raise PoolDown(f"pool {spec.name} at {where.host}: {said}") from None
    return where, credentials, status, body
