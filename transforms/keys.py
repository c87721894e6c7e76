"""The sort key of each request and its length in tokens.

With a tokenizer the key is the token ids, big-endian, so that the order of bytes is the order of tokens and a shared
prefix of bytes is a shared prefix of tokens. Without one it is text: a plain prompt's own bytes (a constant system
message is left out, it would only lengthen every key), or a chat's canonical JSON.

Estimated tokens: a quarter of the UTF-8 bytes, rounded up; of chats, 4 more for each message and the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.tokenizer import Encoded, ModelTools
from bidbeam.transforms.chat import messages_text
from bidbeam.transforms.prompts import Prompts, PromptSpec

Ints = npt.NDArray[np.int64]
_OVERHEAD = 4


@dataclass(slots=True)
class Keys:
    """Keys of n rows, all arrays of shape (n,). Rows that are not ``present`` have none; their values mean nothing."""

    bytes: pa.Array
    tokens: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int8]
    exact: npt.NDArray[np.bool_]
    present: npt.NDArray[np.bool_]
    kind: npt.NDArray[np.int8]
    """What the key's bytes are, as a place in ``kinds``: requests of different kinds are different."""
    kinds: tuple[str, ...]
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return bool(self.present.all())


@dataclass(frozen=True, slots=True)
class _Part:
    rows: Ints
    encoded: Encoded
    width: int
    kind: int


def make_keys(
    prompts: Prompts,
    spec: PromptSpec,
    model_codes: Ints,
    tools: Sequence[ModelTools | None],
    good: npt.NDArray[np.bool_],
) -> Keys:
    """Keys of the good rows. ``tools[model_codes[row]]`` is the row's model; None: it has no tokenizer.

    Raises ModelError where a chat's model has no chat template.
    """
    n = len(good)
    raw = np.full(n, prompts.raw) if isinstance(prompts.raw, bool) else prompts.raw
    chat = np.zeros(n, bool) if prompts.chats is None else np.array([c is not None for c in prompts.chats], bool)
    problems: dict[int, str] = {}
    parts: list[_Part] = []
    for code in np.unique(model_codes[good]).tolist():
        mine = good & (model_codes == code)
        for rows, kind in ((mine & ~chat & raw, 0), (mine & ~chat & ~raw, 1), (mine & chat, 2)):
            places = np.flatnonzero(rows)
            if len(places):
                model = tools[code]
                if model is None:
                    parts.append(_Part(places, _text_keys(prompts, spec, places, kind), 1, kind))
                else:
                    encoded = _token_keys(prompts, spec, model, places, kind, problems)
                    parts.append(_Part(places, encoded, model.key_width, 3))
    system = "" if spec.system is None else spec.system
    kinds = ("raw", "chat:" + system if spec.system is not None else "chat", "messages", "tokens")
    return _assemble(n, parts, kinds, problems)


def _text_keys(prompts: Prompts, spec: PromptSpec, rows: Ints, kind: int) -> Encoded:
    if kind == 2:
        chats = [(prompts.chats or [])[row] or [] for row in rows.tolist()]
        keys = pa.array([messages_text(chat).encode() for chat in chats], pa.binary())
        sizes = [
            sum(len((m["content"] or "").encode()) + 4 * _OVERHEAD for m in chat) + 4 * _OVERHEAD for chat in chats
        ]
        return Encoded(keys, _quarter(np.array(sizes, np.int64)))
    keys = prompts.text_of(rows).cast(pa.binary())
    lengths = pc.binary_length(keys).to_numpy(zero_copy_only=False).astype(np.int64)
    if kind == 1:
        messages = 1 if spec.system is None else 2
        lengths = lengths + len((spec.system or "").encode()) + 4 * _OVERHEAD * (messages + 1)
    return Encoded(keys, _quarter(lengths))


def _quarter(sizes: Ints) -> npt.NDArray[np.int32]:
    return np.minimum(-(-sizes // 4), np.iinfo(np.int32).max).astype(np.int32)


def _token_keys(
    prompts: Prompts, spec: PromptSpec, model: ModelTools, rows: Ints, kind: int, problems: dict[int, str]
) -> Encoded:
    if kind == 2 and prompts.chats is not None:
        encoded, bad = model.encode_messages([prompts.chats[row] or [] for row in rows.tolist()])
    else:
        texts = prompts.text_of(rows).to_pylist()
        encoded, bad = (model.encode(texts, special=True), {}) if kind == 0 else model.encode_user(texts, spec.system)
    for place, why in bad.items():
        problems[int(rows[place])] = why
    for place in np.flatnonzero(encoded.lengths == 0).tolist():
        problems.setdefault(int(rows[place]), "the prompt has no tokens")
    return encoded


def _assemble(n: int, parts: list[_Part], kinds: tuple[str, ...], problems: dict[int, str]) -> Keys:
    tokens, widths = np.zeros(n, np.int32), np.ones(n, np.int8)
    kind, present = np.zeros(n, np.int8), np.zeros(n, bool)
    for part in parts:
        tokens[part.rows], widths[part.rows] = part.encoded.lengths, part.width
        kind[part.rows], present[part.rows] = part.kind, True
    if len(parts) == 1 and len(parts[0].rows) == n:
        keys = parts[0].encoded.keys
    elif parts:
        place = np.full(n, -1, np.int64)
        place[np.concatenate([part.rows for part in parts])] = np.arange(int(present.sum()))
        joined = pa.concat_arrays([part.encoded.keys for part in parts])
        keys = joined.take(pa.array(place, mask=place < 0))
    else:
        keys = pa.nulls(n, pa.binary())
    present[list(problems)] = False
    return Keys(keys, tokens, widths, widths > 1, present, kind, kinds, problems)
