"""Chat messages of a row, brought to one form: a list of {role, content} with known roles and text content."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from json import encoder
from typing import Any

from bidbeam.transforms.row_values import UNREADABLE

ROLES = ("system", "user", "assistant", "tool", "developer")
_MORE_KEYS = ("name", "tool_call_id", "tool_calls", "refusal")
"""Keys of a message that go to endpoint and chat template as they are."""

Message = dict[str, Any]

json_text: Callable[[str], str] = getattr(encoder, "c_encode_basestring", None) or encoder.encode_basestring
"""A text as a JSON string, non-ASCII characters kept; written in C where there is C."""


class BadMessages(ValueError):  # noqa: N818 - named for what it says
    """Messages that no model takes; the text says which message and why, never what it holds."""


def normalise(value: Any, system: str | None) -> list[Message]:
    """The messages of one row. ``system`` stands first unless the row has its own. Raises BadMessages.

    Content may be a text or a list of text parts, which become lines of one text, as vLLM does it. Content may be
    missing only beside ``tool_calls``.
    """
    if value is UNREADABLE:
        raise BadMessages("is not UTF-8")
    if value is None or not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadMessages("is not a list of messages" if value not in (None, []) else "is null or empty")
    messages = [_message(item, i + 1) for i, item in enumerate(value)]
    if not any(message.get("content") for message in messages):
        raise BadMessages("has no content in any message")
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(item: Any, place: int) -> Message:
    if isinstance(item, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in item):
        item = dict(item)  # an Arrow map
    if item is UNREADABLE or not isinstance(item, Mapping):
        raise BadMessages(f"message {place} is not an object of role and content")
    role = item.get("role")
    if role not in ROLES:
        near = get_close_matches(role, ROLES, 1) if isinstance(role, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadMessages(f"message {place} has an unknown role (expected {', '.join(ROLES)}){hint}")
    more = {key: item[key] for key in _MORE_KEYS if item.get(key) is not None}
    content = item.get("content")
    if isinstance(content, list):
        content = _join_parts(content, place)
    if not isinstance(content, str) and not (content is None and more.get("tool_calls")):
        raise BadMessages(f"message {place} has no text content")
    if content is not None:
        _check_unicode(content, place)
    return {"role": role, "content": content, **more}


def _join_parts(parts: list[Any], place: int) -> str:
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise BadMessages(f"message {place} has a part that is not text")
    return "\n".join(texts)  # type: ignore[arg-type]  # all are texts


def _check_unicode(text: str, place: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadMessages(f"message {place} holds half a surrogate pair, which is no text") from None


def messages_text(messages: Sequence[Message]) -> str:
    """Canonical JSON of normalised messages: hashed and sorted where no tokenizer is known, and sent by HTTP."""
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"), default=str)


def user_frame(system: str | None) -> tuple[str, str]:
    """What stands before and behind the JSON text of a single user message in ``messages_text``."""
    head = f'{{"role":"system","content":{json_text(system)}}},' if system is not None else ""
    return f'[{head}{{"role":"user","content":', "}]"
