"""The rows of batch files as pure functions: a request to its line, a line of an answer file to its outcome.

Nothing here does I/O, and nothing here raises on what a provider sends.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from bidbeam.connectors.http_errors import classify, error_of
from bidbeam.connectors.http_wire import Outcome, read_document
from bidbeam.connectors.model_echo import NO_ECHO, Echo
from bidbeam.connectors.profiles import ErrorClass, Profile
from bidbeam.connectors.secrets import mask
from bidbeam.connectors.wire_json import pointer, read_json

_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NOT_RUN = frozenset({"batch_expired", "batch_cancelled"})
"""Codes of lines whose request was never run: nothing is owed for it."""

_OVERALL: tuple[tuple[str, ErrorClass], ...] = (
    ("insufficient_quota", "auth_funds"),
    ("billing", "auth_funds"),
    ("token_limit", "capacity"),
    ("quota", "capacity"),
    ("rate_limit", "rate"),
    ("model_not_found", "auth_funds"),
    ("mismatched_model", "auth_funds"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked in one row, as far as reading its answer needs it."""

    n: int
    prompt: Callable[[], str | None]
    """The prompt as ``read_answer`` takes it, read only where something went wrong; None where it is not at hand."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an answer file. ``not_run``: its request was never begun, the outcome says no more than that."""

    custom_id: str
    outcome: Outcome
    not_run: bool = False


def custom_id(key: bytes, seed: int, occurrence: int) -> str:
    """The name of a row: a digest of its content key, keyed with the run's secret; nothing can be read from it."""
    digest = hashlib.blake2b(key, key=seed.to_bytes(16, "little"), digest_size=16).hexdigest()
    return f"{digest}-{occurrence}"


def request_line(name: str, url: str, body: bytes) -> bytes:
    """One row of a batch file; ``body`` is JSON."""
    head = f'{{"custom_id":{json.dumps(name)},"method":"POST","url":{json.dumps(url)},"body":'
    # A line end between two tokens of JSON is as good as a space.
    return head.encode() + body.replace(b"\n", b" ").replace(b"\r", b" ") + b"}\n"


def prompt_of(line: bytes) -> str:
    """The prompt in one of our own rows, as ``read_answer`` takes it."""
    body = json.loads(line)["body"]
    return json.dumps(body["messages"]) if "messages" in body else str(body.get("prompt", ""))


def read_line(
    raw: bytes,
    profile: Profile,
    *,
    chat: bool,
    find: Callable[[str], Asked | None],
    secrets: Sequence[str],
    now: Callable[[], datetime],
    echo: Echo = NO_ECHO,
) -> Line | None:
    """What a line of an output or error file says of which row; None where it says nothing of any.

    ``find`` gives what a row of that name asked, None where there is no such row; ``echo`` says what an answer may
    call its model.
    """
    document = read_json(raw)
    if not isinstance(document, dict):
        return None
    name = document.get("custom_id")
    asked = find(name) if isinstance(name, str) else None
    if asked is None or not isinstance(name, str):
        return None

    def answer(status: int, body: object, request_id: object) -> Outcome:
        fine = status == 200 and bool(pointer(body, "/choices")) and error_of(body) is None
        prompt = "" if fine else asked.prompt()
        outcome = read_document(
            profile,
            status,
            {header: request_id for header in profile.request_id_headers if isinstance(request_id, str)},
            body,
            len(raw),
            chat=chat,
            n=asked.n,
            prompt_text=prompt or "",
            secrets=secrets,
            now=now,
            echo=echo,
        )
        if outcome.status == "failed" and prompt is None:
            # What was said may repeat a prompt that is not here to compare with.
            return replace(outcome, error_message=f"{status}: no reason kept")
        return outcome

    response, error = document.get("response"), document.get("error")
    if isinstance(response, dict):
        # Vertex gives the answer itself where others wrap it.
        wrapped = "status_code" in response or "body" in response
        status = response.get("status_code", 200)
        if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status < 600:
            return Line(name, Outcome("failed", "bad_output", "the line has no status"))
        return Line(name, answer(status, response.get("body") if wrapped else response, response.get("request_id")))
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code in NOT_RUN:
        return Line(name, Outcome("failed", "timeout", "the batch ended before this request was run"), not_run=True)
    if error:
        told = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else ""}
        outcome = answer(200, {"error": told}, None)
        return Line(name, outcome)
    return Line(name, Outcome("failed", "bad_output", "the line holds neither an answer nor an error"))


def overall_class(profile: Profile, code: str, message: str) -> ErrorClass:
    """The class of an error that a provider names for a batch as a whole.

    Never ``caller``: whatever is wrong with the file, another pool may well answer its requests.
    """
    text = f"{code} {message}".lower()
    for part, found in _OVERALL:
        if part in text:
            return found
    found = classify(profile, 400, {"error": {"code": code, "message": message}})
    return "server" if found in ("caller", "policy") else found


def overall_message(error: Any, secrets: Sequence[str] = ()) -> str:
    """What a provider says of a batch as a whole, fit for a ledger: its code alone, for its text may quote a row."""
    code = error.get("code") if isinstance(error, dict) else None
    return mask(code, secrets) if isinstance(code, str) and _CODE.fullmatch(code) else "no reason given"
