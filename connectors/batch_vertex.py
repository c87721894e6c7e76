"""The client of Vertex AI's batch prediction: rows and answers stand in a bucket, a job goes from one to the other.

The rows are the same as in OpenAI-style files. Objects are moved through the store, so that any bucket that fsspec
reaches will do; the job itself is asked for over REST, beside the address that completions go to.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from bidbeam.connectors.batch_client import BatchCallError, Look, State, Wire
from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.http_transport import Endpoint
from bidbeam.connectors.store import Store
from bidbeam.connectors.wire_json import pointer

_COMPLETIONS = "/endpoints/openapi"
_STATES: Mapping[str, State] = {
    "JOB_STATE_QUEUED": "validating",
    "JOB_STATE_PENDING": "validating",
    "JOB_STATE_RUNNING": "in_progress",
    "JOB_STATE_UPDATING": "in_progress",
    "JOB_STATE_PAUSED": "in_progress",
    "JOB_STATE_SUCCEEDED": "completed",
    "JOB_STATE_PARTIALLY_SUCCEEDED": "completed",
    "JOB_STATE_FAILED": "failed",
    "JOB_STATE_EXPIRED": "expired",
    "JOB_STATE_CANCELLING": "cancelling",
    "JOB_STATE_CANCELLED": "cancelled",
}
_CODES: Mapping[int, str] = {7: "permission_denied", 8: "quota_exceeded", 5: "model_not_found", 16: "unauthenticated"}
"""gRPC's codes by number, as far as they mean something to us."""
_CHUNK = 1 << 20
_MAX_FILE_BYTES = 4 * 2**30


class VertexBatchClient:
    """Implements ``BatchClient`` over ``batchPredictionJobs``. ``model`` is named as completions name it
    (``meta/llama-...``), ``staging`` the store that both sides reach."""

    def __init__(self, wire: Wire, model: str, staging: Store) -> None:
        self._wire, self._staging = wire, staging
        publisher, slash, name = model.partition("/")
        self._model = f"publishers/{publisher}/models/{name}" if slash and publisher != "publishers" else model

    @staticmethod
    def address(where: Endpoint) -> str:
        """Where the jobs are, from where completions are."""
        parts = urlsplit(where.base_url)
        path = parts.path.rstrip("/").removesuffix(_COMPLETIONS)
        return urlunsplit(parts._replace(path=path))

    async def upload(self, path: Path, intent: str) -> str:
        name = f"{intent}/rows.jsonl"

        def put() -> None:
            # ``create_from`` takes the file it is given; ours is still needed to read prompts back from.
            copy = path.with_suffix(".staged")
            copy.unlink(missing_ok=True)
            os.link(path, copy)
            self._staging.create_from(name, str(copy))

        await self._stored(put)
        return name

    async def create(self, file: str, intent: str, *, chat: bool) -> str:
        if not chat:
            raise BatchCallError("this batch API takes chats only", "auth_funds", sure=True)
        asked = {
            "displayName": self._shown(intent),
            "model": self._model,
            "inputConfig": {"instancesFormat": "jsonl", "gcsSource": {"uris": [self._staging.url_of(file)]}},
            "outputConfig": {
                "predictionsFormat": "jsonl",
                "gcsDestination": {"outputUriPrefix": self._staging.url_of(f"{intent}/answers")},
            },
        }
        found = await self._wire.call("POST", "batchPredictionJobs", data=json.dumps(asked).encode())
        return f"{self._number(found)}.{intent}"

    async def find(self, intent: str, since: datetime) -> str | None:  # noqa: ARG002 # its name finds it, however old
        chosen = quote(f'displayName="{self._shown(intent)}"', safe="")
        found = await self._wire.call("GET", f"batchPredictionJobs?filter={chosen}&pageSize=10")
        for job in pointer(found, "/batchPredictionJobs") or ():
            if pointer(job, "/displayName") == self._shown(intent):
                return f"{self._number(job)}.{intent}"
        return None

    async def look(self, batch: str) -> Look:
        number, _, intent = batch.partition(".")
        found = await self._wire.call("GET", f"batchPredictionJobs/{number}")
        state = _STATES.get(str(pointer(found, "/state")))
        if state is None:
            raise BatchCallError("the endpoint gives the job no state we know", "bad_output", sure=True)
        files: list[str] = []
        if state in ("completed", "failed", "expired", "cancelled"):
            await self._stored(lambda: files.extend(entry.name for entry in self._staging.list(f"{intent}/answers")))
        code = pointer(found, "/error/code")
        errors = ({"code": _CODES.get(code, f"error_{code}")},) if type(code) is int else ()
        answers = tuple(name for name in files if name.endswith(".jsonl"))
        # A job that failed half-way has been paid for as far as it came.
        return Look("completed" if state == "failed" and answers else state, answers, errors, f"{intent}/rows.jsonl")

    async def cancel(self, batch: str) -> None:
        await self._wire.call("POST", f"batchPredictionJobs/{batch.partition('.')[0]}:cancel", data=b"{}")

    async def fetch(self, file: str, path: Path) -> None:
        def get() -> None:
            with self._staging.open_input(file) as source, path.open("wb") as target:
                if source.size() > _MAX_FILE_BYTES:
                    raise BatchCallError("an answer file is larger than we take", "bad_output", sure=True)
                while chunk := source.read(_CHUNK):
                    target.write(chunk)

        await self._stored(get)

    async def forget(self, file: str) -> None:
        await self._stored(lambda: self._staging.delete(file))

    def _shown(self, intent: str) -> str:
        return f"bidbeam {self._wire.run_id} {intent}"[-128:]

    async def _stored(self, work: Callable[[], object]) -> None:
        try:
            await asyncio.to_thread(work)
        except (StoreError, OSError) as error:
            raise BatchCallError(f"the bucket failed: {type(error).__name__}", "server", sure=True) from None

    def _number(self, job: object) -> str:
        name = pointer(job, "/name")
        number = name.rsplit("/", 1)[-1] if isinstance(name, str) else ""
        if not number.isdecimal():
            raise BatchCallError("the endpoint's answer names no job", "bad_output", sure=False)
        return number
