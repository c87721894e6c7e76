"""What providers say of an error, made fit for a ledger: short, one line, without keys and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from bidbeam.connectors.secrets import mask
from bidbeam.connectors.wire_json import GARBAGE, read_json

MESSAGE_CHARS = 200
ECHO_CHARS = 20
"""A provider's message that repeats this many characters of the prompt is left out."""
MESSAGE_READ = 1_000
"""How much of a provider's message is looked at, so that a huge one costs nothing."""


def provider_message(error: object, prompt_text: str, secrets: Iterable[str]) -> str:
    """What the provider says went wrong, fit for a ledger: one line, cut short, keys masked; empty where it says
    nothing or repeats a piece of the prompt.
    """
    if isinstance(error, dict):
        error = next((error[name] for name in ("message", "detail", "code") if isinstance(error.get(name), str)), None)
    if not isinstance(error, str):
        return ""
    line = _one_line(error[:MESSAGE_READ])
    shown = mask(line, secrets)[:MESSAGE_CHARS]
    # Only what may be shown is compared, for a prompt may be large.
    if any(_echoes(text, prompt_text) for text in {line[:MESSAGE_CHARS], shown}):
        return ""
    return shown


def _one_line(text: str) -> str:
    """``text`` with what does not print (controls, line ends, marks of direction, lone surrogates) as single spaces."""
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(text.split())


def _echoes(line: str, prompt_text: str) -> bool:
    """Whether ``line`` repeats 20 characters of the prompt, or all of a shorter one, as it is or escaped as JSON."""
    for told in _prompt_strings(prompt_text):
        for shape in {_one_line(told), _one_line(json.dumps(told)[1:-1])}:
            width = min(ECHO_CHARS, len(shape))
            if width and any(line[at : at + width] in shape for at in range(len(line) - width + 1)):
                return True
    return False


def _prompt_strings(prompt_text: str) -> Iterable[str]:
    """The texts of a prompt: of each message where it is a JSON list of messages, else itself."""
    messages = read_json(prompt_text.encode("utf-8", "replace")) if prompt_text.startswith("[") else GARBAGE
    if not isinstance(messages, list):
        return [prompt_text]
    return [prompt_text, *_strings(messages)]


def _strings(value: object) -> Iterable[str]:
    """Every text in it, however deep: without recursion, which what others sent could exhaust."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, list):
            left += each
        elif isinstance(each, dict):
            left += (inner for name, inner in each.items() if name not in ("role", "type"))
