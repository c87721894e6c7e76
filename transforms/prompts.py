"""What each row asks: plain text or chat messages, taken from a column, a template or an OpenAI batch request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError, InputError
from bidbeam.connectors.inputs import is_json_text, is_openai_batch
from bidbeam.connectors.near import near
from bidbeam.transforms.chat import BadMessages, Message, normalise
from bidbeam.transforms.prompt_template import PromptTemplate, TemplateProblem, compile_template
from bidbeam.transforms.row_values import UNREADABLE, is_text, python_values, readable_text
from bidbeam.transforms.sampling import parse_json

_TRANSPORT_KEYS = frozenset({"model", "messages", "prompt", "stream", "stream_options", "user", "metadata", "store"})
"""Keys of a batch line's body that do not say how the answer is drawn."""


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """Which columns make a request. ``template`` (Jinja over the row's columns) stands instead of ``column``.

    ``format`` chat: a text becomes one user message and goes through the model's chat template; raw: it is sent as it
    is. ``system`` stands first in chats that bring no system message of their own.
    """

    id: str | None = None
    column: str | None = "prompt"
    template: str | None = None
    system: str | None = None
    format: Literal["chat", "raw"] = "chat"
    tenant: str | None = None


@dataclass(slots=True)
class Prompts:
    """The prompts of a table's rows: each row has a text or a chat, or neither and a problem."""

    texts: pa.Array | None
    """Text of rows that have one; null elsewhere. Type string or large_string."""
    chats: list[list[Message] | None] | None = None
    """Messages of rows that have them."""
    raw: npt.NDArray[np.bool_] | bool = False
    """Rows whose text is sent as it is."""
    made: bool = False
    """Whether the texts came from a template, so that no column holds them."""
    problems: dict[int, str] = field(default_factory=dict)
    """Why rows have no prompt, by row."""
    models: list[str | None] | None = None
    samplings: list[dict[str, Any]] | None = None
    """Of OpenAI batch lines: each row's own model and sampling."""

    def text_of(self, rows: npt.NDArray[np.int64]) -> pa.Array:
        """The texts of these rows, ascending, all of which have one."""
        if self.texts is None:
            raise ValueError("these rows have messages")
        return self.texts if len(rows) == len(self.texts) else self.texts.take(pa.array(rows))


def id_column(spec: PromptSpec, schema: pa.Schema) -> str | None:
    """The column that names a row."""
    return spec.id if spec.id is not None or not is_openai_batch(schema) else "custom_id"


@lru_cache(maxsize=8)
def _compiled(text: str) -> PromptTemplate:
    return compile_template(text)


def check_prompt_columns(spec: PromptSpec, schema: pa.Schema) -> None:
    """Raises InputError where a column that the job names is missing, with the nearest name, or of a wrong type;
    ConfigError where the template does not compile or the keys of ``prompt`` contradict each other."""
    if spec.format == "raw" and spec.system is not None:
        raise ConfigError("a raw prompt has no system message", key="prompt.system", expected="format: chat")
    for key, name in (("id", spec.id), ("tenant", spec.tenant)):
        if name is not None:
            _require(key, name, schema)
            if pa.types.is_nested(schema.field(name).type):
                problem = f"column {name!r} is {schema.field(name).type}; expected text or a number"
                raise InputError(problem, key=f"prompt.{key}")
    if spec.template is not None:
        for name in sorted(_compiled(spec.template).columns):
            _require("template", name, schema)
    elif not is_openai_batch(schema):
        if spec.column is None:
            raise ConfigError("nothing says where the prompt is", key="prompt", expected="column or template")
        _require("column", spec.column, schema)
        type_ = schema.field(spec.column).type
        if _is_messages(type_):
            if spec.format == "raw":
                problem = f"is raw, but column {spec.column!r} holds messages; expected text"
                raise InputError(problem, key="prompt.format")
        elif not is_text(type_) and not pa.types.is_null(type_):
            problem = f"column {spec.column!r} is {type_}; expected text or a list of {{role, content}}"
            raise InputError(problem, key="prompt.column")


def _require(key: str, name: str, schema: pa.Schema) -> None:
    count = schema.names.count(name)
    if count == 1:
        return
    if count:
        raise InputError(f"the input has {count} columns named {name!r}", key=f"prompt.{key}")
    meant = near(name, schema.names)
    if meant is not None:
        hint = f"; did you mean {meant!r}?"
    elif schema.names:
        hint = f"; its columns are {', '.join(map(repr, schema.names[:20]))}"
    else:
        hint = ", nor any other: its files are empty"
    raise InputError(f"the input has no column {name!r}{hint}", key=f"prompt.{key}")


_BODY = "body"
_APART = (
    "lines of an OpenAI batch file and rows with a prompt column do not mix: put the ones and the others into files, "
    "and jobs, of their own"
)


def _is_messages(type_: pa.DataType) -> bool:
    if not (pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_list_view(type_)):
        return False
    return bool(pa.types.is_struct(type_.value_type) or pa.types.is_map(type_.value_type))


def read_prompts(table: pa.Table, spec: PromptSpec) -> Prompts:
    """The prompts of a table with one chunk a column. Never raises for a bad row."""
    if spec.template is not None:
        return _from_template(table, _compiled(spec.template), spec)
    if is_openai_batch(table.schema):
        return _from_batch(table, spec)
    name = str(spec.column)
    column = one_chunk(table.column(name))
    if _is_messages(column.type):
        return _from_messages(column, spec)
    if is_json_text(table.schema.field(name)):
        return _from_json(column, spec)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    texts, broken = readable_text(column)
    prompts = Prompts(texts, raw=spec.format == "raw")
    lengths = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
    broken_rows = set(broken)
    bodies = table.column(_BODY).is_valid() if _BODY in table.column_names and name != _BODY else None
    for row in np.flatnonzero(lengths == 0).tolist():
        said = "the prompt is not UTF-8" if row in broken_rows else "the prompt is null or empty"
        if bodies is not None and bodies[row].as_py():
            said += f"; its row has a 'body': {_APART}"
        prompts.problems[row] = f"column {name!r}: {said}"
    return prompts


def _from_template(table: pa.Table, template: PromptTemplate, spec: PromptSpec) -> Prompts:
    names = [name for name in table.column_names if name in template.names]
    columns = [python_values(one_chunk(table.column(name))) for name in names]
    texts: list[str | None] = []
    problems: dict[int, str] = {}
    for row in range(table.num_rows):
        values = {name: column[row] for name, column in zip(names, columns, strict=True)}
        text = None
        unreadable = [name for name, value in values.items() if value is UNREADABLE]
        if unreadable:
            problems[row] = f"column {unreadable[0]!r}: the value cannot be read (not UTF-8, or out of range)"
        else:
            try:
                text = template.render(values)
            except TemplateProblem as problem:
                problems[row] = f"prompt.template: {problem}"
        if text == "":
            problems[row], text = "prompt.template: the prompt is empty", None
        texts.append(text)
    return Prompts(pa.array(texts, pa.large_string()), raw=spec.format == "raw", made=True, problems=problems)


def _from_messages(column: pa.Array, spec: PromptSpec) -> Prompts:
    chats: list[list[Message] | None] = []
    problems: dict[int, str] = {}
    for row, value in enumerate(python_values(column)):
        try:
            chats.append(normalise(value, spec.system))
        except BadMessages as problem:
            chats.append(None)
            problems[row] = f"column {spec.column!r}: {problem}"
    return Prompts(None, chats, problems=problems)


def _from_json(column: pa.Array, spec: PromptSpec) -> Prompts:
    """A JSONL column of texts and messages side by side, each value as its JSON text."""
    texts: list[str | None] = []
    chats: list[list[Message] | None] = []
    problems: dict[int, str] = {}
    for row, value in enumerate(python_values(column)):
        text, chat = None, None
        try:
            asked = None if value is None else parse_json(value)
            if isinstance(asked, str):
                text = _plain_prompt(asked, "the prompt is")
            elif spec.format == "raw":
                problems[row] = f"column {spec.column!r}: a raw prompt must be text"
            else:
                chat = normalise(asked, spec.system)
        except BadMessages as problem:
            problems[row] = f"column {spec.column!r}: {problem}"
        except ValueError:
            problems[row] = f"column {spec.column!r}: is not JSON"
        texts.append(text)
        chats.append(chat)
    return Prompts(pa.array(texts, pa.large_string()), chats, raw=spec.format == "raw", problems=problems)


def _from_batch(table: pa.Table, spec: PromptSpec) -> Prompts:
    n = table.num_rows
    texts: list[str | None] = [None] * n
    chats: list[list[Message] | None] = [None] * n
    models: list[str | None] = [None] * n
    samplings: list[dict[str, Any]] = [{} for _ in range(n)]
    problems: dict[int, str] = {}
    for row, body in enumerate(python_values(one_chunk(table.column("body")))):
        if body is None:
            problems[row] = f"column 'body': there is none in this line; {_APART}"
            continue
        try:
            line = read_body(body)
            if "messages" in line:
                chats[row] = normalise(line["messages"], spec.system)
            else:
                texts[row] = _plain_prompt(line.get("prompt"), "it has no messages, and its prompt is")
        except BadMessages as problem:
            problems[row] = f"column 'body': {problem}"
            continue
        model = line.get("model")
        models[row] = model if isinstance(model, str) and model else None
        samplings[row] = _body_sampling(line)
    made = pa.array(texts, pa.large_string())
    return Prompts(made, chats, made.is_valid().to_numpy(zero_copy_only=False), False, problems, models, samplings)


def read_body(body: Any) -> dict[str, Any]:
    """The object that a batch line's body is. Raises BadMessages."""
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    try:
        line = parse_json(body) if isinstance(body, str) else None
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise BadMessages("is not a JSON object")
    return line


def _plain_prompt(prompt: Any, what: str) -> str:
    if not isinstance(prompt, str) or not prompt:
        raise BadMessages(f"{what} empty or no text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadMessages(f"{what} not text: it holds half a surrogate pair") from None
    return prompt


def _body_sampling(line: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in line.items() if key not in _TRANSPORT_KEYS}
    newer = given.pop("max_completion_tokens", None)
    if newer is not None and given.get("max_tokens") is None:
        given["max_tokens"] = newer
    return given


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    if column.num_chunks == 1:
        return column.chunk(0)
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
