"""From spilled rows back to what engines take: token ids, chat messages as JSON, raw text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from bidbeam.transforms.chat import json_text, messages_text, user_frame
from bidbeam.transforms.prompts import Prompts, one_chunk, read_prompts

if TYPE_CHECKING:
    from bidbeam.transforms.rendering import RenderSpec


def messages_json(rows: pa.Table, spec: RenderSpec) -> pa.Array:
    """Chats as JSON lists of {role, content}, type large_string; null where the request is raw.

    ``rows`` are good rows: the input's columns first, then those of RENDERED (a name may stand in both).
    """
    prompts = _prompts(rows, spec)
    made: list[str | None] = [None] * rows.num_rows
    if prompts.texts is not None and prompts.raw is False:
        head, tail = user_frame(spec.prompt.system)
        made = [None if text is None else f"{head}{json_text(text)}{tail}" for text in prompts.texts.to_pylist()]
    if prompts.chats is not None:
        made = [text if chat is None else messages_text(chat) for text, chat in zip(made, prompts.chats, strict=True)]
    return pa.array(made, pa.large_string())


def prompt_text(rows: pa.Table, spec: RenderSpec) -> pa.Array:
    """Raw prompts as they are, type large_string; null where the request is a chat. ``rows`` as for messages_json."""
    prompts = _prompts(rows, spec)
    if prompts.texts is None or prompts.raw is False:
        return pa.nulls(rows.num_rows, pa.large_string())
    return prompts.texts.cast(pa.large_string())


def token_lists(key: pa.Array, key_width: int) -> pa.Array:
    """Token ids, list<int32>, of keys that hold big-endian ids of ``key_width`` bytes (2 or 4); null where null."""
    if isinstance(key, pa.ChunkedArray):
        key = one_chunk(key)
    if key_width not in (2, 4):
        raise ValueError("these keys are text: their model has no tokenizer")
    width = np.int64 if pa.types.is_large_binary(key.type) else np.int32
    offsets = np.frombuffer(key.buffers()[1], width)[key.offset : key.offset + len(key) + 1].astype(np.int64)
    data = np.frombuffer(key.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    ids = np.ascontiguousarray(data).view(f">u{key_width}").astype(np.int32)
    places = ((offsets - offsets[0]) // key_width).astype(np.int32)
    mask = pa.array(key.is_null().to_numpy(zero_copy_only=False)) if key.null_count else None
    return pa.ListArray.from_arrays(pa.array(places), pa.array(ids), mask=mask)


def _source(rows: pa.Table) -> pa.Table:
    """The input's columns: of a name that stands twice, the first."""
    first = {name: i for i, name in reversed(list(enumerate(rows.column_names)))}
    return rows.select(sorted(first.values()))


def _prompts(rows: pa.Table, spec: RenderSpec) -> Prompts:
    if spec.prompt.template is None:
        return read_prompts(_source(rows), spec.prompt)
    # What the template made is not made again: the last column of that name is RENDERED's.
    place = max(i for i, name in enumerate(rows.column_names) if name == "text")
    return Prompts(one_chunk(rows.column(place)), raw=spec.prompt.format == "raw")
