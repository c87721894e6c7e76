"""A model's tokenizer and chat template, loaded from its directory without transformers or torch.

Text that looks like a special token (``<|im_end|>`` inside a prompt) is encoded as that token, as vLLM's chat endpoint
and Hugging Face tokenizers do it: counts then equal what the engine counts, and the risk is the same as there.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers

from bidbeam.connectors.chat_template import BadChat, ChatTemplate, Frame, read_chat_template
from bidbeam.connectors.errors import ModelError

_BATCH = 4096
_SPLIT_TRIALS = (
    "x",
    " x ",
    "\n\nx\n\n",
    "  ",
    "",
    "\u00fc\u4f60 \U0001f9ea",
    "1 234",
    "x" * 40,
    "a.b,c",
    "\tx\r\n",
    "<",
    "|>",
    "'s",
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Prompts as sort keys: token ids as big-endian unsigned integers of ``key_width`` bytes, so bytes sort as tokens.

    ``keys`` is binary; ``lengths`` counts tokens, shape (n,).
    """

    keys: pa.Array
    lengths: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A frame cut at special tokens: the ids before and behind, and the text between that varies with the content."""

    head: tuple[int, ...]
    before: str
    behind: str
    tail: tuple[int, ...]


class ModelTools:
    """What rendering needs of one model. Get one with :func:`model_tools`; never pickled: pass the directory."""

    def __init__(self, directory: str, *, clock: Callable[[], datetime] = datetime.now) -> None:
        path = Path(directory)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{directory} has no tokenizer.json: write it once with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file} does not load as a tokenizer ({error}): fetch the model again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.directory = directory
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        """One more than the largest token id."""
        self.key_width = 2 if self.vocab_size <= 65536 else 4
        config = _config(path / "config.json")
        self.context: int | None = _context(config)
        """Longest prompt plus answer in tokens that the model was made for, where its config says so."""
        self.eos_ids: tuple[int, ...] = _eos(config)
        template, special = read_chat_template(path)
        self._chat = ChatTemplate(template, special, clock=clock) if template is not None else None
        self._cuts: dict[str | None, _Cut | None] = {}

    def __reduce__(self) -> NoReturn:
        raise TypeError("ModelTools does not pickle: pass its directory and call model_tools() where it is used")

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer itself: no truncation, no padding."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @property
    def chat(self) -> ChatTemplate:
        """The model's chat template. Raises ModelError where it has none."""
        if self._chat is None:
            raise ModelError(
                f"{self.directory} has no chat template: set prompt.format to raw, or put a chat_template.jinja there"
            )
        return self._chat

    def encode(self, texts: Sequence[str], *, special: bool) -> Encoded:
        """Texts to keys. ``special``: whether the tokenizer adds its own (raw prompts); chat templates write theirs."""
        return self._keys(self._ids(texts, special=special), len(texts), (), ())

    def encode_user(self, contents: Sequence[str], system: str | None) -> tuple[Encoded, dict[int, str]]:
        """Single user messages, after an optional system message, to keys; and why rows failed, by place.

        The template runs once where trials prove that it copies the content (else for each row), and what it puts
        around the content is tokenized once where it ends in special tokens, at which tokenizers cut a text anyway.
        """
        frame = self.chat.frame(system)
        if frame is None:
            return self._encode_chats([functools.partial(self.chat.one_user, c, system) for c in contents])
        if frame.content == "stripped":
            contents = [content.strip() for content in contents]
        if system not in self._cuts:
            self._cuts[system] = self._find_cut(frame)
        cut = self._cuts[system]
        head, tail = (frame.head, frame.tail) if cut is None else (cut.before, cut.behind)
        ids = self._ids([f"{head}{content}{tail}" for content in contents], special=False)
        return self._keys(ids, len(contents), *(((), ()) if cut is None else (cut.head, cut.tail))), {}

    def encode_messages(self, chats: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Encoded, dict[int, str]]:
        """Chats of any messages to keys, row by row through the template; and why rows failed, by place."""
        return self._encode_chats([functools.partial(self.chat.render, messages) for messages in chats])

    def _encode_chats(self, renders: Sequence[Callable[[], str]]) -> tuple[Encoded, dict[int, str]]:
        texts, problems = [], dict[int, str]()
        for i, render in enumerate(renders):
            try:
                texts.append(render())
            except BadChat as problem:
                texts.append("")
                problems[i] = str(problem)
        return self.encode(texts, special=False), problems

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids back to text, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _ids(self, texts: Sequence[str], *, special: bool) -> Iterable[list[int]]:
        # In batches: an Encoding is far larger than its ids.
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer.encode_batch_fast(list(texts[start : start + _BATCH]), add_special_tokens=special)
            for encoding in batch:
                yield encoding.ids

    def _keys(self, ids: Iterable[list[int]], rows: int, head: tuple[int, ...], tail: tuple[int, ...]) -> Encoded:
        middle = np.zeros(rows, np.int64)
        pieces = []
        row = 0
        rest = iter(ids)
        while lists := list(itertools.islice(rest, _BATCH)):
            counts = np.fromiter(map(len, lists), np.int64, len(lists))
            middle[row : row + len(lists)] = counts
            pieces.append(np.fromiter(itertools.chain.from_iterable(lists), np.uint32, int(counts.sum())))
            row += len(lists)
        unit = np.dtype(f">u{self.key_width}")
        flat = np.concatenate(pieces).astype(unit) if pieces else np.zeros(0, unit)
        lengths = middle + len(head) + len(tail)
        ends = np.cumsum(lengths)
        if head or tail:
            whole = np.empty(int(ends[-1]) if rows else 0, unit)
            varying = np.ones(len(whole), bool)
            starts = ends - lengths
            for constant, at in ((head, starts), (tail, ends - len(tail))):
                places = at[:, None] + np.arange(len(constant))
                whole[places] = np.array(constant, unit)
                varying[places] = False
            whole[varying] = flat
            flat = whole
        offsets = np.concatenate([[0], ends]) * self.key_width
        if offsets[-1] > np.iinfo(np.int32).max:
            raise ModelError("more than 2 GiB of token ids in one piece of input: write it with smaller row groups")
        keys = pa.Array.from_buffers(
            pa.binary(), rows, [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(flat)]
        )
        return Encoded(keys, lengths.astype(np.int32))

    def _find_cut(self, frame: Frame) -> _Cut | None:
        """Where the frame can be tokenized apart from the content: at the special token next to it on each side.

        A tokenizer cuts a text at its special tokens before anything else, so the parts do not see each other. That
        holds only for tokens matched as they are written (no stripping, no word borders, before normalization) and
        where no other added token can span the cut; trials confirm it.
        """
        added = self._tokenizer.get_added_tokens_decoder().values()
        names = [token.content for token in added]
        plain = {
            t.content for t in added if not (t.lstrip or t.rstrip or t.single_word or t.normalized) and t.content
        }  # fmt: skip
        before_at = max((frame.head.rfind(name) + len(name) for name in plain if name in frame.head), default=0)
        behind_at = min((frame.tail.find(name) for name in plain if name in frame.tail), default=len(frame.tail))
        head, before = frame.head[:before_at], frame.head[before_at:]
        behind, tail = frame.tail[:behind_at], frame.tail[behind_at:]
        for left, right in ((name[:i], name[i:]) for name in names for i in range(1, len(name))):
            # The token would lie across the cut: left ends the head, or right begins the tail.
            if head.endswith(left) and (before.startswith(right) or right.startswith(before)):
                head, before = "", frame.head
            if tail.startswith(right) and (behind.endswith(left) or left.endswith(behind)):
                behind, tail = frame.tail, ""
        if not (head or tail):
            return None
        encode = self._tokenizer.encode
        cut = _Cut(
            tuple(encode(head, add_special_tokens=False).ids),
            before,
            behind,
            tuple(encode(tail, add_special_tokens=False).ids),
        )
        for content in (*_SPLIT_TRIALS, *names[:64]):
            whole = encode(frame.head + content + frame.tail, add_special_tokens=False).ids
            middle = encode(before + content + behind, add_special_tokens=False).ids
            if whole != [*cut.head, *middle, *cut.tail]:
                return None
        return cut


@functools.lru_cache(maxsize=16)
def model_tools(directory: str) -> ModelTools:
    """The tools of a model directory, one set a process. Raises ModelError where they do not load."""
    return ModelTools(directory)


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} does not read as JSON ({type(error).__name__}): fetch the model again") from None
    return value if isinstance(value, dict) else {}


def _context(config: Mapping[str, Any]) -> int | None:
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def _eos(config: Mapping[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else ()
