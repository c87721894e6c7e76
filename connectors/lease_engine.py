"""The engine of a rented node: it asks for one, waits until vLLM answers there, serves through it, and gives it back.

A thread of its own keeps the node from the first call to the last, so that whatever happens to the shift, to the model
or to the provider ends in the same place: the one where the node is given back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection
from typing import NoReturn

import pyarrow as pa

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.http_engine import HttpEngine
from bidbeam.connectors.json_call import NoAnswer, call_json
from bidbeam.connectors.lease_terms import LeaseTerms
from bidbeam.connectors.leases import Lease, LeaseBook, LeaseRecord, NodeApi, utc_now
from bidbeam.connectors.pools import PoolSpec

_LOOK_S = (0.05, 5.0)
"""First and longest pause between two looks at a node that does not serve yet."""
_HEALTH_S = 5.0
_CLOSE_S = 120.0
_log = logging.getLogger("bidbeam.leases")


def _clock_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class LeaseEngine:
    """Implements ``Engine`` for one model on one rented node. Asks for the node at once, and returns at once.

    ``clock_ms`` is the node's own clock: it stands still once the node is given back, so that what is booked is what
    was rented, to the millisecond. Raises ConfigError on construction: options, address, key.
    """

    wants: frozenset[str] = HttpEngine.wants

    def __init__(
        self,
        spec: PoolSpec,
        model: str,
        book: LeaseBook,
        *,
        run_id: str,
        start: int,
        clock_ms: Callable[[], int] = _clock_ms,
    ) -> None:
        self._spec, self._model, self._now_ms = spec, model, clock_ms
        self._terms = LeaseTerms.of(spec)
        api = NodeApi(spec)
        name = f"bidbeam-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}-{start}-{uuid.uuid4().hex[:8]}"
        record = LeaseRecord(name, spec.name, model, api.host, start, utc_now())
        self._closing = threading.Event()
        self._lease = Lease(api, book, record, clock_ms=clock_ms)
        self._lock = threading.Lock()
        self._inner: HttpEngine | None = None
        self._gone: str | None = None
        """Why it serves nothing any more."""
        self._known = threading.Event()  # serving, or gone
        self._ended = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        self._used_ms = clock_ms()
        self._thread = threading.Thread(target=self._keep, name=f"bidbeam-lease-{spec.name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"LeaseEngine({self._spec.name!r}, {self._lease.record.name!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine lives in one process: pickle its PoolSpec instead")

    # What the shift asks before there is an engine.

    def serving(self, timeout_s: float = 0.0) -> bool:
        """Whether the node serves, at the latest in ``timeout_s``. Raises PoolDown where it never will."""
        if not self._known.wait(timeout_s):
            return False
        if self._gone is not None:
            raise PoolDown(self._gone)
        return True

    @property
    def asked_ms(self) -> int | None:
        """When the node was asked for, by ``clock_ms``; None where none was, or none was to be had."""
        return self._lease.asked_ms

    def clock_ms(self) -> int:
        """Milliseconds of the clock, as far as the node runs: afterwards it stands still."""
        if self._lease.ended_ms is not None:
            return self._lease.ended_ms
        return self._now_ms()

    def booked(self) -> None:
        """The journal has all of the lease's time."""
        self._lease.settled()

    # Engine.

    @property
    def dead(self) -> bool:
        return self._gone is not None or (self._inner is not None and self._inner.dead)

    @property
    def room(self) -> int:
        inner = self._inner
        return 0 if inner is None or self._gone is not None else inner.room

    @property
    def in_flight(self) -> int:
        return 0 if self._inner is None else self._inner.in_flight

    @property
    def sent(self) -> int:
        return 0 if self._inner is None else self._inner.sent

    @property
    def pause_s(self) -> float:
        return 0.0 if self._inner is None else self._inner.pause_s

    def listen(self, wake: Callable[[], None]) -> None:
        with self._lock:
            self._wake = wake
            if self._inner is not None:
                self._inner.listen(wake)

    def submit(self, requests: pa.RecordBatch) -> None:
        with self._lock:
            if self._inner is None or self._gone is not None:
                raise PoolDown(self._gone or f"pool {self._spec.name}: its node does not serve yet")
            self._used_ms = self._now_ms()
            self._inner.submit(requests)

    def poll(self) -> list[pa.RecordBatch]:
        inner = self._inner
        if inner is None:
            if self._gone is not None:
                raise PoolDown(self._gone)
            return []
        try:
            found = inner.poll()
        except PoolDown as error:
            self._go(str(error))
            raise
        if found:
            self._used_ms = self._now_ms()
        elif self._gone is not None and inner.in_flight == 0:
            raise PoolDown(self._gone)
        return found

    def cancel(self, tags: Collection[int] | None = None) -> None:
        if self._inner is not None:
            self._inner.cancel(tags)

    def close(self) -> None:
        """Gives the node back and waits for that. Idempotent."""
        self._go(f"pool {self._spec.name}: its node is given back")
        if not self._ended.wait(_CLOSE_S):
            record = self._lease.record
            _log.critical(
                "pool %s: node %s is still not given back; see that it ends", record.pool, record.node_id or record.name
            )

    # The keeper's side.

    def _go(self, why: str) -> None:
        """From now on nothing is served, and the node is given back."""
        with self._lock:
            self._gone = self._gone or why
        self._known.set()
        self._closing.set()

    def _keep(self) -> None:
        try:
            self._lease.take(self._terms)
            self._bring_up()
            self._serve()
        except PoolDown as error:
            self._go(str(error))
        except Exception as error:  # whatever it is, the node must not outlive it
            self._go(f"pool {self._spec.name}: {type(error).__name__} while its node was rented")
            _log.exception("pool %s: the keeper of its node failed", self._spec.name)
        finally:
            try:
                if self._inner is not None:
                    self._inner.close()
            finally:
                self._lease.release()
                self._ended.set()
                self._wake()

    def _bring_up(self) -> None:
        """Looks after the node until vLLM answers there. Raises PoolDown where that takes too long or never happens."""
        pool, record = self._spec.name, self._lease.record
        deadline = self._now_ms() + self._terms.ready_within_s * 1000
        pause, last = _LOOK_S[0], "it was never seen"
        while not self._closing.wait(pause):
            pause = min(pause * 1.5, _LOOK_S[1])
            try:
                node = self._lease.look()
                if node is None or node.state in ("ending", "ended"):
                    raise PoolDown(f"pool {pool}: node {record.node_id} ended before it served")
                last = f"it is {node.state}"
                if node.state == "ready" and node.public_ip is not None:
                    last = "vLLM there does not answer"
                    try:
                        address = self._terms.address_of({"public_ip": node.public_ip, "node_id": node.node_id})
                    except ValueError as error:
                        raise PoolDown(f"pool {pool}: node {record.node_id} is of no use: {error}") from None
                    if call_json("GET", f"{address.removesuffix('/v1')}/health", timeout_s=_HEALTH_S).ok:
                        self._open(address)
                        return
            except NoAnswer as error:
                last = f"{last.partition(':')[0]}: {error}"
            if self._now_ms() >= deadline:
                raise PoolDown(
                    f"pool {pool}: node {record.node_id} did not serve within {self._terms.ready_within_s:g} s: {last}"
                )
        raise PoolDown(self._gone or f"pool {pool}: its node is given back")

    def _open(self, address: str) -> None:
        on_node = dataclasses.replace(
            self._spec,
            kind="openai",
            profile="vllm",
            base_url=address,
            options={},
            # The account's key stays with the account: the node has one of its own, or none.
            api_key_env=self._terms.node_key_env,
            api_key_file=None,
            headers={},
        )
        inner = HttpEngine(on_node, self._model)
        with self._lock:
            inner.listen(self._wake)
            self._inner, self._used_ms = inner, self._now_ms()
        self._known.set()
        self._wake()

    def _serve(self) -> None:
        """Until it is closed, or has had nothing to do for too long."""
        tick = min(max(self._terms.idle_after_s / 4, 0.05), 1.0)
        while not self._closing.wait(tick):
            with self._lock:
                idle_s = (self._now_ms() - self._used_ms) / 1000
                if self.in_flight == 0 and idle_s >= self._terms.idle_after_s:
                    self._gone = (
                        f"pool {self._spec.name}: its node had nothing to do for {idle_s:.0f} s and was given back"
                    )
                    break
