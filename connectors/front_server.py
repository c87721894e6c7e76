"""What the fronts of providers share: a small HTTP server on loopback that answers as a function of what was called."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.loopback import Handler, Loopback


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it came in. ``headers`` has lower-case names; ``path`` is without the query."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> Mapping[str, Any]:
        """The JSON object in it; empty where there is none."""
        try:
            document = json.loads(self.raw)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


class _Handler(Handler):
    def serve(self) -> None:
        front: FrontServer = self.server.owner
        target = urlsplit(self.path)
        call = Call(self.command, target.path, dict(parse_qsl(target.query)), self.lower_headers(), self.read_body())
        front.calls.append(call)
        reply = front.answer(call)
        if reply.delay_s:
            front._stopping.wait(reply.delay_s)
        self.send(reply)


class FrontServer(Loopback):
    """A context manager that serves ``answer`` on a free port, each request on a thread of its own."""

    handler = _Handler

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.calls: list[Call] = []

    def answer(self, call: Call) -> Reply:
        """How one request is answered. Runs on many threads at once."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"http://{self.host}"


def as_json(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply with a JSON body."""
    return Reply(status, json.dumps(document).encode(), headers or {})


def forwarded(base_url: str, path: str, raw: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """What the OpenAI-compatible server at ``base_url`` (on loopback, ``/v1`` included) answers to this body."""
    parts = urlsplit(base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    try:
        connection.request("POST", f"{parts.path}/{path}", raw, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
