"""A model's own chat template, rendered as Hugging Face renders it, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2 import nodes, parser

from bidbeam.connectors.errors import ModelError
from bidbeam.connectors.template_sandbox import LimitedSandbox

_SENTINEL = "\u2603bidbeam\u2603"
_EDGES = (
    "x", "two words", " leading", "trailing ", "\n\nlines\n\n", "\ttab\t", "  ", "\r\nreturn\r\n", "e\u0301",
    "\u00fcn\u00efc\u00f6d\u00e9 \u4f60\u597d \U0001f9ea", "\u00a0no-break\u00a0", "\x1cseparator\x1f",
    "<b>&amp;\"'</b>", "{{ x }}{% y %}{# z #}", "back\\slash\\n", "None", "0",
)  # fmt: skip
_MAX_PAIRS = 24
_MAX_TEXT = 64 * 1024 * 1024
_MAX_STEPS = 200_000


@dataclass(frozen=True, slots=True)
class Frame:
    """What the template puts around the one user message of a chat: ``head`` + content + ``tail``.

    ``content`` says what happens to the content itself: copied as it is, or stripped of white space at both ends.
    """

    head: str
    tail: str
    content: Literal["verbatim", "stripped"]


class BadChat(ValueError):  # noqa: N818 - named for what it says
    """Messages that the template refuses; the text never holds what they say."""


class ChatTemplate:
    """One compiled chat template. ``clock`` is what ``strftime_now`` reads."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, clock: Callable[[], datetime] = datetime.now
    ) -> None:
        # A model's files are as little ours as its answers: its template is held to limits too.
        environment = LimitedSandbox(
            max_text=_MAX_TEXT,
            max_steps=_MAX_STEPS,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = environment.limited(_tojson)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: clock().strftime(form)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from None
        self._environment = environment
        self._special_tokens = dict(special_tokens)
        self._literals = sorted({c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str) and c.value})
        self._frames: dict[str | None, Frame | None] = {}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a chat, ready for the answer. Raises BadChat where the template refuses the messages."""
        self._environment.begin()
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template can raise anything that an expression can
            said = str(error)
            # What the template says of itself may be repeated; anything else could quote the messages.
            why = said if said in self._literals else type(error).__name__
            raise BadChat(f"the model's chat template refuses it: {why}") from None

    def frame(self, system: str | None) -> Frame | None:
        """The frame around a single user message, or None where the content must be rendered row by row.

        Taken for granted only after trials: contents with white space at their edges, odd characters, and every text
        that the template itself mentions, alone, in front, behind and around, because a template can only look for
        what it mentions.
        """
        if system not in self._frames:
            self._frames[system] = self._find_frame(system)
        return self._frames[system]

    def one_user(self, content: str, system: str | None) -> str:
        """The text of a chat of one user message after an optional system message. Raises BadChat."""
        first = [] if system is None else [{"role": "system", "content": system}]
        return self.render([*first, {"role": "user", "content": content}])

    def _find_frame(self, system: str | None) -> Frame | None:
        try:
            head, *rest = self.one_user(_SENTINEL, system).split(_SENTINEL)
            if len(rest) != 1:
                return None
            verbatim = stripped = True
            for content in self._trials():
                text = self.one_user(content, system)
                verbatim = verbatim and text == head + content + rest[0]
                stripped = stripped and text == head + content.strip() + rest[0]
                if not (verbatim or stripped):
                    return None
        except BadChat:
            return None
        return Frame(head, rest[0], "verbatim" if verbatim else "stripped")

    def _trials(self) -> list[str]:
        trials = [*_EDGES]
        for text in self._literals:
            trials += [text, text + "x", "x" + text, "x" + text + "y", text + " x " + text]
        # The longest are the tell-tale ones (tags of thoughts and tools); the short ones are brackets and breaks.
        some = sorted(self._literals, key=len, reverse=True)[:_MAX_PAIRS]
        trials += [a + "x" + b for a in some for b in some]
        return trials


def read_chat_template(directory: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template of a model directory (None: it has none), and the names of its special tokens."""
    config = _json_file(directory / "tokenizer_config.json")
    tokens: dict[str, str] = {}
    for mapping in (_json_file(directory / "special_tokens_map.json"), config):
        for key, value in mapping.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), tokens
    template = config.get("chat_template") or _json_file(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return (template if isinstance(template, str) else None), tokens


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} does not read as JSON ({type(error).__name__}): fetch the model again") from None
    return value if isinstance(value, dict) else {}


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what a training loss counts; to render is all we do with it."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
