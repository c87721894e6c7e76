"""A front of a provider's batch API, for tests: OpenAI-style batch files, run by an endpoint of ours behind it.

    with BatchFront(server.base_url, key=KEY) as front:
        pool = ...  # kind: batch, base_url: front.base_url
        ...
        assert len(front.batches) == 1 and front.served[0].prompt_tokens == 12

It has the provider's routes for files and batches, walks a batch through its states, and keeps books of what it ran. A
``Fate`` says how a batch ends. On loopback, plain http.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.loopback import Handler, Loopback

_ENDED = ("completed", "failed", "expired", "cancelled")
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Fate:
    """How a batch fares: it ends as ``ends`` after ``run`` of its rows (None: all) were run.

    ``errors`` are what a failed one says; ``lines`` gets a last word on the lines of the output file. ``tells`` is
    whether rows that were not run stand in the error file.
    """

    ends: Literal["completed", "failed", "expired", "cancelled"] = "completed"
    run: int | None = None
    errors: tuple[Mapping[str, Any], ...] = ()
    lines: Callable[[list[bytes]], list[bytes]] = lambda lines: lines
    tells: bool = True


@dataclass(frozen=True, slots=True)
class Ran:
    """One row that was run: its name, the status it got, and tokens as the endpoint behind counted them."""

    batch: str
    custom_id: str
    status: int
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None


@dataclass(slots=True)
class Submitted:
    """One batch as it was created. ``state`` is where it truly is; who looks sees it come there step by step."""

    id: str
    input_file: str
    endpoint: str
    metadata: Mapping[str, str]
    rows: tuple[Mapping[str, Any], ...]
    created_at: int
    fate: Fate
    state: str = "validating"
    looks: int = 0
    cancel: threading.Event = field(default_factory=threading.Event)
    output: str | None = None
    errors: str | None = None
    done: int = 0


class _Handler(Handler):
    def serve(self) -> None:
        front: BatchFront = self.server.owner
        reply = front._answer(self.command, self.path, self.lower_headers(), self.read_body())
        if reply.status:
            self.send(reply)
        else:
            self.close_connection = True


class BatchFront(Loopback):
    """A context manager that serves ``/files`` and ``/batches`` below ``/v1`` on a free port.

    ``key``: what must come as ``key_header``, else 401. ``models``: its own names, and what each is called at
    ``upstream`` (an address that ends in ``/v1``). ``fates``: those of the first batches; the rest complete.
    ``intercept`` may answer a call (method, path) itself, or hold it up; a reply with status 0 lets the call take
    effect and then breaks the connection. While ``held`` no batch goes on: see ``release``.
    """

    handler = _Handler

    def __init__(
        self,
        upstream: str,
        *,
        key: str | None = None,
        key_header: str = "authorization",
        models: Mapping[str, str] | None = None,
        fates: Sequence[Fate] = (),
        intercept: Callable[[str, str], Reply | None] | None = None,
        held: bool = False,
        port: int = 0,
    ) -> None:
        self.batches: list[Submitted] = []
        self.files: dict[str, bytes] = {}
        self.served: list[Ran] = []
        self.calls: list[tuple[str, str]] = []
        self._upstream = urlsplit(upstream)
        self._key, self._key_header, self._models = key, key_header, models
        self._fates, self._intercept = tuple(fates), intercept
        self._lock = threading.Lock()
        self._go = threading.Event()
        if not held:
            self._go.set()
        self._workers = ThreadPoolExecutor(4)
        super().__init__(port)

    @property
    def base_url(self) -> str:
        """Where it serves, ``/v1`` included."""
        return f"http://{self.host}/v1"

    def release(self) -> None:
        """Lets held batches go on."""
        self._go.set()

    def close(self) -> None:
        """Stops serving and frees the port; batches that are still at work are given up."""
        self._go.set()
        super().close()
        self._workers.shutdown(cancel_futures=True)

    # What follows is called by the handler's threads.

    def _answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        where = urlsplit(path)
        name = where.path.removeprefix("/v1/")
        with self._lock:
            self.calls.append((method, name))
        if self._key is not None and headers.get(self._key_header, "").removeprefix("Bearer ") != self._key:
            return Reply.error(401, "Incorrect API key provided.", "invalid_api_key")
        scripted = None if self._intercept is None else self._intercept(method, name)
        if scripted is not None and scripted.status:
            return scripted
        reply = self._route(method, name, parse_qs(where.query), headers, body)
        return scripted or reply

    def _route(
        self, method: str, name: str, query: Mapping[str, list[str]], headers: Mapping[str, str], body: bytes
    ) -> Reply:
        parts = name.split("/")
        if (method, name) == ("POST", "files"):
            return self._upload(headers, body)
        if parts[0] == "files" and len(parts) >= 2 and parts[1] in self.files:
            if method == "DELETE":
                del self.files[parts[1]]
                return _json({"id": parts[1], "object": "file", "deleted": True})
            if parts[2:] == ["content"]:
                return Reply(200, self.files[parts[1]], {"Content-Type": "application/octet-stream"})
            return _json(self._file(parts[1]))
        if (method, name) == ("POST", "batches"):
            return self._create(json.loads(body))
        if (method, name) == ("GET", "batches"):
            return self._list(query)
        batch = next((each for each in self.batches if len(parts) >= 2 and each.id == parts[1]), None)
        if parts[0] == "batches" and batch is not None:
            if parts[2:] == ["cancel"]:
                return self._cancel(batch)
            return _json(self._document(batch, looking=True))
        return Reply.error(404, "Not Found", "not_found")

    def _upload(self, headers: Mapping[str, str], body: bytes) -> Reply:
        fields = _multipart(headers.get("content-type", ""), body)
        if fields.get("purpose") != b"batch" or "file" not in fields:
            return Reply.error(400, "A file and its purpose are needed.", "invalid_request")
        with self._lock:
            name = f"file-{len(self.files) + 1:06d}-in"
            self.files[name] = fields["file"]
        return _json(self._file(name))

    def _file(self, name: str) -> dict[str, Any]:
        size = len(self.files[name])
        return {"id": name, "object": "file", "bytes": size, "purpose": "batch", "status": "processed"}

    def _create(self, asked: Mapping[str, Any]) -> Reply:
        data = self.files.get(str(asked.get("input_file_id")))
        if data is None or asked.get("completion_window") != "24h":
            return Reply.error(400, "No such file, or no such window.", "invalid_request")
        rows = tuple(json.loads(line) for line in data.splitlines())
        names = [row["custom_id"] for row in rows]
        if len(set(names)) < len(names) or any(row["url"] != asked["endpoint"] for row in rows):
            return Reply.error(400, "The rows are not what they should be.", "invalid_request")
        with self._lock:
            number = len(self.batches)
            batch = Submitted(
                f"batch_{number + 1:06d}",
                str(asked["input_file_id"]),
                str(asked["endpoint"]),
                dict(asked.get("metadata") or {}),
                rows,
                int(time.time()),
                self._fates[number] if number < len(self._fates) else Fate(),
            )
            self.batches.append(batch)
        self._workers.submit(self._run, batch)
        return _json(self._document(batch))

    def _list(self, query: Mapping[str, list[str]]) -> Reply:
        newest = list(reversed(self.batches))
        after = query.get("after", [""])[0]
        start = next((at + 1 for at, batch in enumerate(newest) if batch.id == after), 0)
        limit = int(query.get("limit", ["20"])[0])
        page = newest[start : start + limit]
        data = [self._document(batch) for batch in page]
        return _json({"object": "list", "data": data, "has_more": start + limit < len(newest)})

    def _cancel(self, batch: Submitted) -> Reply:
        if batch.state in _ENDED:
            return Reply.error(409, "The batch has ended.", "batch_ended")
        batch.state = "cancelling"
        batch.cancel.set()
        return _json(self._document(batch))

    def _document(self, batch: Submitted, *, looking: bool = False) -> dict[str, Any]:
        batch.looks += looking
        state = batch.state
        if state in ("completed", "expired") and batch.looks <= 2:
            state = ("validating", "in_progress", "finalizing")[batch.looks]
        ended = state in _ENDED
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "errors": {"object": "list", "data": list(batch.fate.errors)} if state == "failed" else None,
            "input_file_id": batch.input_file,
            "completion_window": "24h",
            "status": state,
            "output_file_id": batch.output if ended else None,
            "error_file_id": batch.errors if ended else None,
            "created_at": batch.created_at,
            "expires_at": batch.created_at + 86_400,
            "request_counts": {"total": len(batch.rows), "completed": batch.done, "failed": 0},
            "metadata": dict(batch.metadata),
        }

    # The provider at work, on threads of its own.

    def _run(self, batch: Submitted) -> None:
        while not self._go.wait(0.01) and not batch.cancel.is_set():
            pass
        if batch.fate.ends == "failed":
            batch.state = "failed"
            return
        if batch.state == "validating":
            batch.state = "in_progress"
        rows = batch.rows[: len(batch.rows) if batch.fate.run is None else batch.fate.run]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = [each for each in pool.map(lambda row: self._run_row(batch, row), rows) if each is not None]
        run = {name for name, _, _ in answers}
        good = [line for _, ok, line in answers if ok]
        bad = [line for _, ok, line in answers if not ok]
        ends = "cancelled" if batch.cancel.is_set() else batch.fate.ends
        if batch.fate.tells and ends == "expired":
            bad += [_not_run(row, f"batch_{ends}") for row in batch.rows if row["custom_id"] not in run]
        if good:
            batch.output = self._write(batch, "out", batch.fate.lines(good))
        if bad:
            batch.errors = self._write(batch, "err", bad)
        batch.state = ends

    def _write(self, batch: Submitted, kind: str, lines: list[bytes]) -> str:
        name = f"file-{batch.id}-{kind}"
        self.files[name] = b"".join(line + b"\n" for line in lines)
        return name

    def _run_row(self, batch: Submitted, row: Mapping[str, Any]) -> tuple[str, bool, bytes] | None:
        """(name, whether it went well, its line); None where the batch was cancelled before."""
        if batch.cancel.is_set() or self._stopping.is_set():
            return None
        body = dict(row["body"])
        status: int = 404
        answer: dict[str, Any] = {"error": {"message": "no such model", "code": "model_not_found"}}
        if self._models is None or body.get("model") in self._models:
            body["model"] = body["model"] if self._models is None else self._models[body["model"]]
            status, answer = self._forward(str(row["url"]).removeprefix("/v1"), body)
        usage = answer.get("usage") or {}
        ran = Ran(
            batch.id,
            row["custom_id"],
            status,
            usage.get("prompt_tokens"),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            usage.get("completion_tokens"),
        )
        with self._lock:
            self.served.append(ran)
            batch.done += 1
        response = {"status_code": status, "request_id": f"req-{row['custom_id']}", "body": answer}
        line = {"id": f"row-{row['custom_id']}", "custom_id": row["custom_id"], "response": response, "error": None}
        return row["custom_id"], status == 200, json.dumps(line).encode()

    def _forward(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self._upstream.netloc, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"{self._upstream.path}{path}", json.dumps(body).encode(), headers)
            reply = connection.getresponse()
            return reply.status, dict(json.loads(reply.read()))
        except (OSError, ValueError, http.client.HTTPException):
            return 500, {"error": {"message": "the model failed", "code": "server_error"}}
        finally:
            connection.close()


def _json(document: object) -> Reply:
    return Reply(200, json.dumps(document).encode())


def _not_run(row: Mapping[str, Any], code: str) -> bytes:
    error = {"code": code, "message": "This request could not be executed before the completion window expired."}
    return json.dumps({"id": "", "custom_id": row["custom_id"], "response": None, "error": error}).encode()


def _multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a form by name."""
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    if found is None:
        return {}
    fields = {}
    for part in body.split(b"--" + found[1].encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="([^"]+)"', head)
        if name is not None:
            fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields
