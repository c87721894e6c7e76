"""A double of an OpenAI-compatible endpoint, for tests: true to the wire, deterministic, on loopback.

    with EndpointDouble(["tiny"]) as double:
        pool = ...  # base_url: double.base_url
        ...
        assert len(double.served) == 10

It answers like a vLLM server, counts tokens by words, and can be scripted to fail in every way an endpoint fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bidbeam.connectors.loopback import Handler, Loopback

_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge")
_LONGEST_ANSWER = 16
_LOOK_S = 0.05
"""Seconds between looks at whether the client of a reply that is held back is still there."""
CACHE_BLOCK = 4
"""Tokens to a block of the double's prefix cache; hits are whole blocks and never the last token."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request is answered. As it stands: the true answer, at once.

    ``body`` stands in for the true answer; ``delay_s`` holds it back; ``cut`` breaks the connection in the middle of
    the body (``truncate``) or before any of it (``reset``); ``drop`` names top-level fields to leave out of the true
    answer; ``merge`` adds or replaces some. ``times`` sends the body so often over, without saying how long it will be.
    A reply that is held back goes nowhere once the client has hung up.
    """

    status: int = 200
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: Literal["truncate", "reset"] | None = None
    drop: tuple[str, ...] = ()
    merge: Mapping[str, Any] = field(default_factory=dict)
    times: int = 1

    @classmethod
    def error(
        cls, status: int, message: str = "no", code: object = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """An error as providers send it."""
        error = {"message": message, "type": "error", "code": status if code is None else code}
        return cls(status, _json({"error": error}), headers or {})

    @classmethod
    def error_inside(cls, code: object, message: str = "no") -> Reply:
        """An error in the body of a 200, as routers send it once generation has begun."""
        return cls(200, _json({"error": {"code": code, "message": message}}))

    @classmethod
    def garbage(cls, body: bytes = b"<html>It works!</html>", content_type: str = "text/html") -> Reply:
        """A 200 that is no answer."""
        return cls(200, body, {"Content-Type": content_type})

    @classmethod
    def slow(cls, delay_s: float) -> Reply:
        """The true answer, late."""
        return cls(delay_s=delay_s)


OK = Reply()
TRUNCATED = Reply(cut="truncate")
RESET = Reply(cut="reset")
NO_USAGE = Reply(drop=("usage",))


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it came in. ``body`` is what was sent, ``number`` counts from 0, ``connection`` names the socket
    it came on, ``concurrent`` is how many were being answered at that time, itself included.
    """

    number: int
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    raw: bytes
    connection: int
    concurrent: int

    @property
    def prompt(self) -> str:
        """Its prompt, or the contents of its messages a line each; empty where it has neither."""
        return _prompt(self.body, self.path.endswith("/chat/completions"))


@dataclass(frozen=True, slots=True)
class Served:
    """The double's own books: what it counted for one true answer that went out whole. ``request`` is X-Request-Id."""

    request: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cache_write_tokens: int = 0


Behaviour = Reply | Sequence[Reply] | Callable[[Seen], Reply]
"""One reply for all; replies for the first requests, after which the true answer follows; or a choice by request."""


class _Handler(Handler):
    def setup(self) -> None:
        super().setup()
        self._connection = self.server.owner._connected(self.connection)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.owner._disconnected(self.connection)

    def serve(self) -> None:
        double: EndpointDouble = self.server.owner
        if self.command == "GET":
            self.send(double._page(self.path))
            return
        seen = double._enter(self.path, self.lower_headers(), self.read_body(), self._connection)
        try:
            reply, served = double._reply(seen)
            awaited = double._hold(reply.delay_s, self.connection) if reply.delay_s else True
            go = double._book(seen, reply, served, awaited)
        finally:
            double._leave()
        if not go:
            self.close_connection = True
            return
        try:
            self.send(reply)
        finally:
            double._sent()


class EndpointDouble(Loopback):
    """A context manager that serves ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models`` on a free port.

    The answer is drawn from a digest of the prompt, within ``max_tokens``. ``api_key``: the bearer that must come, else
    401. ``count_tokens``: text to token count instead of words. ``report_cached``: whether usage tells cached tokens;
    ``report_written``: whether also those that it wrote to its cache.
    """

    handler = _Handler

    def __init__(
        self,
        models: Sequence[str],
        behaviour: Behaviour = OK,
        *,
        api_key: str | None = None,
        count_tokens: Callable[[str], int] | None = None,
        report_cached: bool = True,
        report_written: bool = False,
        port: int = 0,
    ) -> None:
        self.models = tuple(models)
        self.requests: list[Seen] = []
        self.served: list[Served] = []
        self.connections = 0
        self.max_concurrent = 0
        self._behaviour = behaviour
        self._api_key = api_key
        self._count = count_tokens or (lambda text: len(text.split()))
        self._report_cached, self._report_written = report_cached, report_written
        self._cache: set[bytes] = set()
        self._concurrent = 0
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._held: socket.socket | None = None
        """The port while nothing listens there."""
        super().__init__(port)

    @property
    def base_url(self) -> str:
        """Where it serves, ``/v1`` included."""
        return f"http://{self.host}/v1"

    def _stop_listening(self) -> None:
        """Refuses and drops every connection. The port stays ours: nobody else must answer there meanwhile."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(self._server.server_address)
        with self._lock:
            for connection in self._sockets:
                # Its handler's thread closes it.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _listen_again(self) -> None:
        """Serves on the same port as before."""
        self._bind(self._server.server_address)
        self._release()
        self._thread.start()

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def close(self) -> None:
        """Stops serving and frees the port; requests that are being held back are dropped."""
        super().close()
        self._release()

    # What follows is called by the handler's threads.

    def _connected(self, connection: socket.socket) -> int:
        with self._lock:
            self.connections += 1
            self._sockets.add(connection)
            return self.connections

    def _disconnected(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(connection)

    def _page(self, path: str) -> Reply:
        """What a GET finds."""
        if path == "/health":
            return Reply(body=b"")
        if path == "/v1/models":
            data = [{"id": model, "object": "model", "owned_by": "double"} for model in self.models]
            return Reply(body=_json({"object": "list", "data": data}))
        return Reply.error(404, "Not Found")

    def _hold(self, seconds: float, connection: socket.socket) -> bool:
        """Holds a reply back; whether somebody still waits for it."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stopping.wait(min(left, _LOOK_S)):
            if select.select([connection], [], [], 0)[0] and not _peek(connection):
                return False
        return not self._stopping.is_set()

    def _book(self, seen: Seen, reply: Reply, served: Served | None, awaited: bool) -> bool:  # noqa: ARG002
        """Books what goes out. ``awaited``: whether the client is still there, and so are we. Gives whether to send."""
        if served is not None and not self._stopping.is_set():
            with self._lock:
                self.served.append(served)
        return awaited

    def _sent(self) -> None:
        """What was booked went out, or did not, where nobody took it."""

    def _enter(self, path: str, headers: Mapping[str, str], raw: bytes, connection: int) -> Seen:
        try:
            body = json.loads(raw)
        except ValueError:
            body = {}
        with self._lock:
            self._concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self._concurrent)
            seen = Seen(
                len(self.requests),
                path,
                headers,
                body if isinstance(body, dict) else {},
                raw,
                connection,
                self._concurrent,
            )
            self.requests.append(seen)
        return seen

    def _leave(self) -> None:
        with self._lock:
            self._concurrent -= 1

    def _reply(self, seen: Seen) -> tuple[Reply, Served | None]:
        """The reply with its body, and what to book once it went out."""
        if self._api_key is not None and seen.headers.get("authorization") != f"Bearer {self._api_key}":
            return Reply.error(401, "Incorrect API key provided."), None
        scripted = self._scripted(seen)
        if scripted.body is not None:
            return scripted, None
        document, served = self._answer(seen)
        if served is None:
            return Reply.error(document["code"], document["message"]), None
        document = {name: value for name, value in document.items() if name not in scripted.drop}
        return replace(scripted, body=_json({**document, **scripted.merge})), None if scripted.cut else served

    def _scripted(self, seen: Seen) -> Reply:
        if isinstance(self._behaviour, Reply):
            return self._behaviour
        if callable(self._behaviour):
            return self._behaviour(seen)
        return self._behaviour[seen.number] if seen.number < len(self._behaviour) else OK

    def _answer(self, seen: Seen) -> tuple[dict[str, Any], Served | None]:
        body = seen.body
        chat = seen.path == "/v1/chat/completions"
        if not chat and seen.path != "/v1/completions":
            return {"code": 404, "message": "Not Found"}, None
        model = body.get("model")
        if model not in self.models:
            return {"code": 404, "message": f"The model {model!r} does not exist."}, None
        text = _prompt(body, chat)
        n, limit = body.get("n", 1), body.get("max_tokens", _LONGEST_ANSWER)
        if not text or not _positive(n) or not _positive(limit):
            return {"code": 400, "message": "The request is not valid."}, None
        prompt_tokens = self._count(text)
        cached, written = self._hit(str(body.get("cache_salt", "")), text, prompt_tokens)
        answers = [_words(text, sample, limit) for sample in range(n)]
        output_tokens = sum(self._count(answer) for answer in answers)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        }
        if self._report_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if self._report_written:
            usage.setdefault("prompt_tokens_details", {})["cache_write_tokens"] = written
        document = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{hashlib.sha256(seen.raw).hexdigest()[:16]}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": index,
                    "finish_reason": "length" if len(answer.split()) == limit else "stop",
                    "logprobs": None,
                }
                | ({"message": {"role": "assistant", "content": answer}} if chat else {"text": answer})
                for index, answer in enumerate(answers)
            ],
            "usage": usage,
        }
        name = seen.headers.get("x-request-id", "")
        served = Served(name, str(model), prompt_tokens, cached, output_tokens, written)
        return document, served

    def _hit(self, salt: str, text: str, prompt_tokens: int) -> tuple[int, int]:
        """Tokens of the prompt's beginning that earlier prompts of the same salt brought in, by words; and those that
        this one brings in."""
        words = text.split()
        digest = hashlib.sha256(salt.encode())
        hit, written, unbroken = 0, 0, True
        with self._lock:
            for end in range(CACHE_BLOCK, len(words) + 1, CACHE_BLOCK):
                digest.update("\0".join(words[end - CACHE_BLOCK : end]).encode("utf-8", "replace"))
                block = digest.digest()
                unbroken = unbroken and block in self._cache
                if unbroken and end < len(words):
                    hit = end
                written += 0 if block in self._cache else CACHE_BLOCK
                self._cache.add(block)
        hit = min(hit, max(0, prompt_tokens - 1))
        return hit, min(written, prompt_tokens - hit)


def _peek(connection: socket.socket) -> bytes:
    """What the client has sent beyond its request; nothing where it has hung up."""
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _prompt(body: Mapping[str, Any], chat: bool) -> str:
    if not chat:
        prompt = body.get("prompt")
        return prompt if isinstance(prompt, str) else ""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ""
    return "\n".join(str(each.get("content", "")) for each in messages if isinstance(each, dict))


def _words(text: str, sample: int, limit: int) -> str:
    digest = hashlib.sha256(f"{sample}\0{text}".encode("utf-8", "replace")).digest()
    length = 1 + digest[0] % min(limit, _LONGEST_ANSWER)
    return " ".join(_WORDS[byte % len(_WORDS)] for byte in digest[1 : 1 + length])
