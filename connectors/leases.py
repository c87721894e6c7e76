"""Leases: rented nodes, each written down before it is asked for and until it has been given back.

The routes are those of Render Network's compute API as its clients know them; there is no published reference to hold
them against. Every call is made by a client that needs no event loop, because a node must also be given back while the
interpreter is on its way out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from bidbeam.connectors.errors import AlreadyExists, PoolDown, StoreError
from bidbeam.connectors.json_call import Answer, NoAnswer, call_json
from bidbeam.connectors.lease_terms import LeaseTerms
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.store import Store
from bidbeam.connectors.wire_json import pointer

DIRECTORY = "nodes"
"""Where in a run's journal its leases are written down."""
RELEASE_WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses between tries to give a node back."""

State = Literal["waiting", "ready", "ending", "ended"]
_STATES: dict[str, State] = {
    **dict.fromkeys(("ready", "running", "active"), "ready"),
    **dict.fromkeys(("provisioning", "starting", "queued", "pending"), "waiting"),
    **dict.fromkeys(("stopping", "draining"), "ending"),
    **dict.fromkeys(("terminated", "failed", "expired"), "ended"),
}
_PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_:-]|\.(?!\.)){0,127}|:[0-9a-fA-F:.]{1,44}")
_log = logging.getLogger("bidbeam.leases")


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the provider shows it. ``public_ip`` None: not given out yet."""

    node_id: str
    state: State
    public_ip: str | None = None
    name: str | None = None


class Unknown(PoolDown):
    """A node was asked for, and whether there is one now is not known."""


class NodeApi:
    """The provider's routes for one pool: ask, look, find, give back. Raises ConfigError on construction."""

    def __init__(self, spec: PoolSpec, *, call: Callable[..., Answer] = call_json) -> None:
        from bidbeam.connectors.credentials import credentials_for
        from bidbeam.connectors.http_transport import endpoint

        where = endpoint(spec)
        credentials = credentials_for(spec, where.profile.auth)
        self.host = where.host
        self._pool = spec.name
        self._nodes = where.url("compute/nodes")
        self._headers = {**spec.headers, **credentials.refresh()}
        self._secrets = credentials.secrets
        self._call = call

    def __repr__(self) -> str:
        return f"NodeApi({self._pool!r}, {self.host!r})"

    def ask(self, name: str, terms: LeaseTerms) -> Node:
        """Asks for a node. Raises PoolDown where there is none to be had, Unknown where that cannot be told."""
        body = {"name": name, "gpu_tier": terms.gpu_tier, "container_image": terms.image}
        body |= {key: value for key in ("region", "ssh_key_id") if (value := getattr(terms, key)) is not None}
        try:
            answer = self._send("POST", self._nodes, body)
        except NoAnswer as error:
            raise Unknown(f"pool {self._pool}: no answer to the request for a node: {error}") from None
        if answer.ok and (node := _node(answer.document)) is not None:
            return node
        # An error that the service itself words is one; a gateway's may hide a node.
        if answer.ok or (answer.status >= 500 and not isinstance(answer.document, dict)):
            raise Unknown(f"pool {self._pool}: the request for a node was answered with nothing of use")
        raise PoolDown(f"pool {self._pool}: no node to be had ({answer.status}{_said(answer)})")

    def look(self, node_id: str) -> Node | None:
        """The node as it is now; None where there is none. Raises NoAnswer."""
        answer = self._send("GET", f"{self._nodes}/{node_id}")
        if answer.status in (404, 410):
            return None
        node = _node(answer.document) if answer.ok else None
        if node is None:
            raise NoAnswer(f"the node's state is not told ({answer.status}{_said(answer)})")
        return node

    def find(self, name: str) -> Node | None:
        """The living node of this name, None where there is none. Raises NoAnswer where nodes are not listed."""
        answer = self._send("GET", self._nodes)
        listed = pointer(answer.document, "/nodes")
        if listed is None:
            listed = pointer(answer.document, "/data")
        if not answer.ok or not isinstance(listed, list):
            raise NoAnswer(f"the nodes are not listed ({answer.status}{_said(answer)})")
        nodes = (_node(each) for each in listed)
        return next((node for node in nodes if node and node.name == name and node.state != "ended"), None)

    def give_back(self, node_id: str) -> None:
        """Ends a node; one that is gone is well. Raises NoAnswer where the provider does not confirm it."""
        answer = self._send("DELETE", f"{self._nodes}/{node_id}")
        if not answer.ok and answer.status not in (404, 410):
            raise NoAnswer(f"answered with {answer.status}{_said(answer)}")

    def _send(self, method: str, url: str, body: object = None) -> Answer:
        return self._call(method, url, headers=self._headers, body=body, secrets=self._secrets)


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A lease as it is written down. ``node_id`` None: asked for, no answer yet. Times are UTC, ISO 8601."""

    name: str
    pool: str
    model: str
    host: str
    """Where it was asked for."""
    start: int
    asked_at: str
    """Or since when its time is not in the journal."""
    node_id: str | None = None
    released_at: str | None = None


class LeaseBook:
    """The leases of a run that are not settled yet, a file each in its journal."""

    def __init__(self, journal: Store) -> None:
        self._files = journal.child(DIRECTORY)

    def intend(self, record: LeaseRecord) -> None:
        """Before a node is asked for. Raises AlreadyExists where the name is taken."""
        if not self._files.create(_file(record.name), _text(record)):
            raise AlreadyExists(f"a lease named {record.name} is written down already")

    def note(self, record: LeaseRecord) -> None:
        self._files.replace(_file(record.name), _text(record), durable=True)

    def strike(self, name: str) -> None:
        """Once the node is given back and its time is in the journal. Idempotent."""
        self._files.delete(_file(name))

    def open(self) -> list[LeaseRecord]:
        """Every lease that stands here, by name."""
        found = []
        for entry in self._files.list():
            try:
                found.append(LeaseRecord(**json.loads(self._files.read(entry.name))))
            except (ValueError, TypeError, StoreError):
                _log.warning("%s cannot be read; see whether a node of that name runs", self._files.url_of(entry.name))
        return found


class Lease:
    """One node from asking to giving back. Not thread-safe. ``clock_ms`` is monotonic, ``sleep`` takes seconds."""

    def __init__(
        self,
        api: NodeApi,
        book: LeaseBook,
        record: LeaseRecord,
        *,
        clock_ms: Callable[[], int],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api, self._book, self._clock_ms, self._sleep = api, book, clock_ms, sleep
        self.record = record
        self.asked_ms: int | None = None
        """When the node was asked for; None where none was, or none was to be had."""
        self.ended_ms: int | None = None
        """When it was given back, or given up on; None while it costs money."""
        self.problem: str | None = None
        """Why it could not be given back."""

    def take(self, terms: LeaseTerms) -> None:
        """Writes the intent down, then asks for the node. Raises PoolDown where there is none; nothing is left then."""
        self._book.intend(self.record)
        self.asked_ms = self._clock_ms()
        try:
            node = self._api.ask(self.record.name, terms)
        except Unknown:
            raise  # ``release`` looks for it
        except PoolDown:
            self.asked_ms = None
            self._strike()
            raise
        self.record = replace(self.record, node_id=node.node_id)
        self._book.note(self.record)

    def look(self) -> Node | None:
        """The node now; None where it is gone. Raises NoAnswer."""
        return None if self.record.node_id is None else self._api.look(self.record.node_id)

    def release(self) -> bool:
        """Gives the node back, trying again for a while. Idempotent; False, and said loudly, where it did not work.

        The record stays until ``settled``, or for the next start to try again.
        """
        if self.asked_ms is None or self.ended_ms is not None:
            return self.problem is None
        existed, self.problem = give_back(self._api, self.record, self._sleep)
        if not existed:
            self.asked_ms = None
            self._strike()
            return True
        self.ended_ms = self._clock_ms()
        if self.problem is None:
            self.record = replace(self.record, released_at=utc_now())
            with contextlib.suppress(StoreError, OSError):  # the next start will find it gone
                self._book.note(self.record)
        return self.problem is None

    def settled(self) -> None:
        """The journal has all of its time so far. What may still run is remembered from now on, the rest forgotten."""
        if self.ended_ms is None:
            return
        if self.problem is None:
            self._strike()
        else:
            self.record = replace(self.record, asked_at=utc_now())
            with contextlib.suppress(StoreError, OSError):
                self._book.note(self.record)

    def _strike(self) -> None:
        with contextlib.suppress(StoreError, OSError):
            self._book.strike(self.record.name)


def give_back(
    api: NodeApi, record: LeaseRecord, sleep: Callable[[float], None] = time.sleep
) -> tuple[bool, str | None]:
    """Ends the node of a record, whatever is known of it: whether there was one, and, logged as well, why it may still
    run; None where it is certain that it does not.
    """
    problem = ""
    for wait in (*RELEASE_WAITS_S, None):
        try:
            node_id = record.node_id
            if node_id is None:
                found = api.find(record.name)
                node_id = found.node_id if found else None
            if node_id is not None:
                api.give_back(node_id)
                return True, None
            problem = ""  # not there yet, or never: a request without an answer may still arrive
        except NoAnswer as error:
            problem = str(error)
        if wait is not None:
            sleep(wait)
    if not problem:
        return False, None
    _log.critical(
        "pool %s: %s at %s COULD NOT BE GIVEN BACK (%s) and may go on costing money. End it at the provider, or start "
        "the same command again, which tries once more",
        record.pool,
        f"node {record.node_id}" if record.node_id else f"a node named {record.name}",
        record.host,
        problem,
    )
    return True, problem


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _node(document: Any) -> Node | None:
    for place in ("/node", "/data"):
        if isinstance(pointer(document, place), dict):
            document = pointer(document, place)
    node_id = pointer(document, "/node_id") or pointer(document, "/id")
    if not isinstance(node_id, str) or not _plain(node_id):
        return None
    state = pointer(document, "/state")
    address, name = pointer(document, "/public_ip") or pointer(document, "/ip"), pointer(document, "/name")
    return Node(
        node_id,
        # A state without a name of ours is one to wait in; the wait is bounded.
        _STATES.get(state.lower(), "waiting") if isinstance(state, str) else "waiting",
        address if isinstance(address, str) and _plain(address) else None,
        name if isinstance(name, str) else None,
    )


def _plain(text: str) -> bool:
    """Whether it may stand in an address: what a provider sends is not trusted to be what it should."""
    return _PLAIN.fullmatch(text) is not None


def _said(answer: Answer) -> str:
    return f": {answer.said}" if answer.said else ""


def _file(name: str) -> str:
    return f"{name}.json"


def _text(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record)).encode()
