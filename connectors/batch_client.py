"""The client of OpenAI-style batch files: upload a file, create a batch of it, look, cancel, fetch what it answered.

Nothing is retried here. All methods run on the loop of the HTTP engines.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import aiohttp

from bidbeam.connectors.batch_lines import overall_message
from bidbeam.connectors.credentials import Credentials
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.http_errors import classify, retry_after_s
from bidbeam.connectors.http_transport import Endpoint, read_body, transport_failure
from bidbeam.connectors.profiles import ErrorClass
from bidbeam.connectors.provider_text import provider_message
from bidbeam.connectors.wire_json import pointer, read_json

State = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]  # fmt: skip
STATES: frozenset[str] = frozenset(
    ("validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
)
ENDED: frozenset[str] = frozenset(("completed", "failed", "expired", "cancelled"))

META_RUN, META_INTENT = "bidbeam_run", "bidbeam_intent"
MAX_DOCUMENT_BYTES = 4 * 2**20
MAX_FILE_BYTES = 4 * 2**30
"""The most of one answer file that is taken: 50,000 answers of 80 kB."""
LONGEST_FILE_S = 6 * 3600.0
LONGEST_WAIT_S = 600.0
"""At most so much of the time that an endpoint asks to wait is heeded."""
_ID = re.compile(r"[A-Za-z0-9_.:=-]{1,256}")
_CHUNK = 1 << 20
_PAGES = 50
_FILE_WAITS = 120
_COMPLETION_WINDOW = "24h"


class BatchCallError(Exception):
    """A call that did not do what it should. ``sure``: it has certainly changed nothing at the provider.

    ``error_class`` as of an attempt; the text is fit for a ledger.
    """

    def __init__(
        self, message: str, error_class: ErrorClass, *, sure: bool, missing: bool = False, after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.sure, self.missing, self.after_s = sure, missing, after_s


@dataclass(frozen=True, slots=True)
class Look:
    """A batch as it stands. ``files`` are where its answers and errors are; ``errors`` say why it failed."""

    state: State
    files: tuple[str, ...] = ()
    errors: tuple[Mapping[str, Any], ...] = ()
    rows: str | None = None
    """The file that it was made of."""


class BatchClient(Protocol):
    """One provider's way with batches. Every method raises BatchCallError, and nothing else, where it fails."""

    async def upload(self, path: Path, intent: str) -> str:
        """Puts a file of rows where the provider finds it; gives its reference."""
        ...

    async def create(self, file: str, intent: str, *, chat: bool) -> str:
        """Begins a batch of an uploaded file; gives its id."""
        ...

    async def find(self, intent: str, since: datetime) -> str | None:
        """The id of the batch that carries this intent, begun not before ``since``; None where there is none."""
        ...

    async def look(self, batch: str) -> Look: ...

    async def cancel(self, batch: str) -> None: ...

    async def fetch(self, file: str, path: Path) -> None:
        """Writes an answer file to ``path``, in bounded memory."""
        ...

    async def forget(self, file: str) -> None:
        """Deletes a file of ours at the provider: rows, or answers that are in the journal."""
        ...


class Wire:
    """How one pool's batch API is called: with what lets us in, in bounded time and memory. ``address`` is where its
    paths begin."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        where: Endpoint,
        address: str,
        run_id: str,
        *,
        timeout_s: float,
        credentials: Credentials,
        now: Callable[[], datetime],
    ) -> None:
        self.run_id = run_id
        self._session, self._profile, self._address = session, where.profile, address.rstrip("/")
        self._timeout_s, self._credentials, self._now = timeout_s, credentials, now
        # A large file may take long while anything moves at all, but not for ever.
        self.long = aiohttp.ClientTimeout(total=LONGEST_FILE_S, sock_connect=timeout_s, sock_read=timeout_s)

    async def call(self, method: str, path: str, **options: Any) -> object:
        changes = method == "POST"
        options["headers"] = await self._let_in() | options.get("headers", {})
        try:
            async with self._session.request(
                method, f"{self._address}/{path}", allow_redirects=False, **options
            ) as response:
                if not 200 <= response.status < 300:
                    raise await self._refused(response, changes=changes, quiet=path == "files")
                body = await read_body(response, MAX_DOCUMENT_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreached(error, changes=changes) from None
        document = read_json(body or b"")
        if not isinstance(document, dict):
            raise BatchCallError("the endpoint's answer is not JSON", "bad_output", sure=not changes)
        return document

    async def _let_in(self) -> dict[str, str]:
        headers = self._credentials.current()
        if headers is None:
            try:
                headers = await asyncio.to_thread(self._credentials.refresh)
            except ConfigError as error:
                raise BatchCallError(str(error)[:200], "auth_funds", sure=True) from None
        return dict(headers)

    async def _refused(self, response: aiohttp.ClientResponse, *, changes: bool, quiet: bool = False) -> BatchCallError:
        document = read_json(await read_body(response, MAX_DOCUMENT_BYTES) or b"")
        status, headers = response.status, {name.lower(): value for name, value in response.headers.items()}
        error = pointer(document, "/error")
        # Of an uploaded file the endpoint may quote a row.
        secrets = self._credentials.secrets
        said = overall_message(error, secrets) if quiet else provider_message(error, "", secrets)
        reason = provider_message(response.reason, "", secrets)
        wait_s = retry_after_s(self._profile, headers, self._now)
        return BatchCallError(
            f"{status}: {said or reason or 'no reason given'}"[:200],
            classify(self._profile, status, document),
            sure=not changes or status < 500,
            missing=status == 404,
            after_s=None if wait_s is None else min(wait_s, LONGEST_WAIT_S),
        )

    def _unreached(self, error: Exception, *, changes: bool) -> BatchCallError:
        outcome = transport_failure(error, self._timeout_s)
        # A connection that never stood carried nothing.
        unsent = isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
        message, found = outcome.error_message or "no answer", outcome.error_class or "server"
        return BatchCallError(message, found, sure=unsent or not changes)

    async def download(self, source: str, path: Path) -> None:
        try:
            async with self._session.get(
                f"{self._address}/{source}",
                headers=await self._let_in(),
                allow_redirects=False,
                timeout=self.long,
            ) as response:
                if response.status != 200:
                    raise await self._refused(response, changes=False)
                size = 0
                with path.open("wb") as target:
                    async for chunk in response.content.iter_chunked(_CHUNK):
                        size += len(chunk)
                        if size > MAX_FILE_BYTES:
                            response.close()
                            raise BatchCallError(
                                f"an answer file is larger than {MAX_FILE_BYTES} bytes", "bad_output", sure=True
                            )
                        target.write(chunk)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreached(error, changes=False) from None


class OpenAIBatchClient:
    """``/files`` and ``/batches`` below an endpoint's address: OpenAI, Azure's v1 path and their likes."""

    def __init__(self, wire: Wire, *, route: str, poll_s: float) -> None:
        self._wire, self._route, self._poll_s = wire, route, poll_s

    async def upload(self, path: Path, intent: str) -> str:
        with path.open("rb") as file, aiohttp.MultipartWriter("form-data") as form:
            purpose = form.append("batch")
            purpose.set_content_disposition("form-data", name="purpose")
            rows = form.append(file, {"Content-Type": "application/jsonl"})
            rows.set_content_disposition("form-data", name="file", filename=f"{intent}.jsonl")
            found = await self._wire.call(
                "POST", "files", data=form, headers={"Content-Type": form.content_type}, timeout=self._wire.long
            )
        reference = _text(found, "/id")
        for _ in range(_FILE_WAITS):
            # Azure takes a while to look a file over, and refuses a batch of it meanwhile.
            if pointer(found, "/status") not in ("pending", "running", "notRunning"):
                break
            await asyncio.sleep(min(self._poll_s, 5.0))
            found = await self._wire.call("GET", f"files/{reference}")
        if pointer(found, "/status") in ("error", "failed"):
            raise BatchCallError("the provider cannot read the uploaded file", "server", sure=True)
        return reference

    async def create(self, file: str, intent: str, *, chat: bool) -> str:
        asked = {
            "input_file_id": file,
            "endpoint": f"{self._route}/{'chat/completions' if chat else 'completions'}",
            "completion_window": _COMPLETION_WINDOW,
            "metadata": {META_RUN: self._wire.run_id[:512], META_INTENT: intent},
        }
        return _text(await self._wire.call("POST", "batches", data=json.dumps(asked).encode()), "/id")

    async def find(self, intent: str, since: datetime) -> str | None:
        after = ""
        for _ in range(_PAGES):
            page = await self._wire.call("GET", f"batches?limit=100{after}")
            listed = pointer(page, "/data")
            if not isinstance(listed, list):
                raise BatchCallError("the endpoint does not list its batches", "bad_output", sure=True)
            for each in listed:
                mine = pointer(each, f"/metadata/{META_INTENT}") == intent
                if mine and pointer(each, f"/metadata/{META_RUN}") == self._wire.run_id[:512]:
                    return _text(each, "/id")
            created = pointer(listed[-1], "/created_at") if listed else None
            # The newest come first; a day's grace for clocks that differ.
            past = isinstance(created, int) and created < since.timestamp() - 86_400
            last = pointer(listed[-1], "/id") if listed else None
            if past or not isinstance(last, str) or not _ID.fullmatch(last) or pointer(page, "/has_more") is not True:
                return None
            after = f"&after={last}"
        return None

    async def look(self, batch: str) -> Look:
        found = await self._wire.call("GET", f"batches/{batch}")
        state = pointer(found, "/status")
        if state not in STATES:
            raise BatchCallError("the endpoint gives the batch no state we know", "bad_output", sure=True)
        files = (pointer(found, "/output_file_id"), pointer(found, "/error_file_id"))
        errors = pointer(found, "/errors/data")
        return Look(
            state,
            tuple(file for file in files if isinstance(file, str) and _ID.fullmatch(file)),
            tuple(each for each in errors if isinstance(each, dict)) if isinstance(errors, list) else (),
            rows if isinstance(rows := pointer(found, "/input_file_id"), str) and _ID.fullmatch(rows) else None,
        )

    async def cancel(self, batch: str) -> None:
        await self._wire.call("POST", f"batches/{batch}/cancel")

    async def fetch(self, file: str, path: Path) -> None:
        await self._wire.download(f"files/{file}/content", path)

    async def forget(self, file: str) -> None:
        await self._wire.call("DELETE", f"files/{file}")


def _text(document: object, path: str) -> str:
    value = pointer(document, path)
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise BatchCallError("the endpoint's answer names no id", "bad_output", sure=False)
    return value
