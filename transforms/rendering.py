"""From input rows to requests: rendered, validated, counted and hashed; a bad row becomes a dead letter with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from bidbeam.connectors.schemas import LABEL


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """Which columns make a request. ``template`` (Jinja) stands instead of ``column``."""

    id: str | None = None
    column: str | None = "prompt"
    template: str | None = None
    system: str | None = None
    format: Literal["chat", "raw"] = "chat"
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class RenderSpec:
    """What a job says about rendering. ``longest_context``: model -> longest prompt plus answer any pool takes."""

    prompt: PromptSpec
    model: str | None
    sampling: Mapping[str, Any]
    placement: Mapping[str, Any]
    longest_context: Mapping[str, int | None]


RENDERED = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("model", LABEL),
        pa.field("tenant", LABEL),
        pa.field("placement", LABEL),  # canonical JSON of job and row constraint; null: none
        pa.field("sampling", LABEL),  # canonical JSON object: sorted keys, numbers' text kept
        pa.field("max_tokens", pa.int32()),
        pa.field("n", pa.int16()),
        pa.field("greedy", pa.bool_()),  # temperature 0: identical requests may share an answer
        pa.field("key", pa.binary()),  # sort key: big-endian token ids, or the text's UTF-8
        pa.field("key_width", pa.int8()),  # bytes per token: 2 or 4; 1: the key is text
        pa.field("input_tokens", pa.int32()),
        pa.field("tokens_exact", pa.bool_()),
        pa.field("text", pa.large_string()),  # only of template prompts
        pa.field("content", pa.binary(16)),
        pa.field("reason", LABEL),  # null: a good row; else invalid or too_long
        pa.field("message", pa.string()),
    ]
)
