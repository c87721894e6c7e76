"""Where requests for a batch pool come in: each to the batch that has it already, or into a file that fills up."""

from __future__ import annotations

import secrets as tokens
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from bidbeam.connectors.batch_lines import custom_id, request_line
from bidbeam.connectors.batch_options import BatchOptions
from bidbeam.connectors.batch_rows import Batch, Gathering
from bidbeam.connectors.http_transport import failure
from bidbeam.connectors.http_wire import Outcome, SamplingError, read_sampling, request_body
from bidbeam.connectors.profiles import Profile

_LINE_MORE = 256
"""Bytes of a row beside its body, at most."""
_WANTED = ("tag", "max_tokens", "sampling", "cache_salt", "messages", "prompt", "key")


class Intake:
    """Fills files with rows, one for chats and one for raw prompts; a file that is full goes to ``send``.

    ``model`` is the provider's name, ``seed`` the run's secret. On the shift's thread, but for ``last_call``.
    """

    def __init__(
        self,
        profile: Profile,
        model: str,
        options: BatchOptions,
        seed: int,
        directory: Path,
        send: Callable[[Gathering], None],
    ) -> None:
        self._profile, self._model, self._options, self._seed = profile, model, options, seed
        self._directory, self._send = directory, send
        self._gatherings: dict[bool, Gathering] = {}
        self._claimable: dict[bytes, list[tuple[Batch, int]]] = {}
        # Held while requests are matched with batches that were taken over, and while one of those begins to be read.
        self._claims = threading.Lock()

    def adopt(self, batch: Batch) -> None:
        """From now on requests may be answered by this batch."""
        for key, row in batch.claimable():
            self._claimable.setdefault(key, []).append((batch, row))

    def last_call(self, batch: Batch) -> int:
        """From here on nobody can ask for a row of this batch; gives how many nobody has."""
        with self._claims:
            batch.collecting = True
            return batch.unasked

    def new_file(self, chat: bool) -> Gathering:
        return Gathering(self._directory / f"{tokens.token_hex(6)}.jsonl", chat)

    def send_all(self) -> None:
        """Sends off what there is."""
        for chat in list(self._gatherings):
            self._send(self._gatherings.pop(chat))

    def drop_all(self) -> list[int]:
        """The tags of what was not sent off, which is forgotten."""
        tags: list[int] = []
        for gathering in self._gatherings.values():
            tags += gathering.tags
            gathering.discard()
        self._gatherings.clear()
        return tags

    def take(self, requests: pa.RecordBatch) -> tuple[int, list[tuple[int, Outcome]]]:
        """Finds each request its batch: how many were in one already, and (tag, outcome) of those that cannot be."""
        with self._claims:
            return self._take(requests)

    def _take(self, requests: pa.RecordBatch) -> tuple[int, list[tuple[int, Outcome]]]:
        claimed = 0
        refused: list[tuple[int, Outcome]] = []
        touched: dict[int, Gathering] = {}
        for index, row in enumerate(requests.select(_WANTED).to_pylist()):
            body, chat = self._body(row), row["messages"] is not None
            if isinstance(body, bytes) and len(body) + _LINE_MORE > self._options.max_bytes:
                body = failure("capacity", "the request is larger than one file may be")
            if isinstance(body, Outcome):
                refused.append((row["tag"], body))
                continue
            target = self._claim(row["key"])
            claimed += target is not None
            if target is None:
                target = self._room_for(chat, len(body) + _LINE_MORE, requests)
            name = custom_id(row["key"], self._seed, target.occurrence(row["key"]))
            route = f"{self._options.route}/{'chat/completions' if chat else 'completions'}"
            target.add(index, row["tag"], row["key"], name, request_line(name, route, body))
            touched[id(target)] = target
        for gathering in touched.values():
            gathering.absorb(requests)
        return claimed, refused

    def _body(self, row: dict[str, Any]) -> bytes | Outcome:
        messages, prompt = row["messages"], row["prompt"]
        if messages is None and prompt is None:
            return failure("caller", "the request holds neither messages nor a prompt")
        profile = self._profile
        if messages is None and not profile.takes_raw:
            return failure("capacity", f"profile {profile.name} takes chats only, no raw prompts")
        try:
            sampling = read_sampling(row["sampling"], profile.max_tokens_field, frozenset(profile.body))
        except SamplingError as error:
            return failure("caller", str(error))
        return request_body(
            profile,
            self._model,
            messages=messages,
            prompt=prompt,
            sampling=sampling,
            max_tokens=row["max_tokens"],
            cache_salt=row["cache_salt"],
        )

    def _claim(self, key: bytes) -> Gathering | None:
        """Where to put a request that a batch taken over answers; None where none does."""
        waiting = self._claimable.get(key)
        while waiting:
            batch, row = waiting.pop(0)
            if not batch.collecting:
                batch.place[row] = len(batch.asked)
                return batch.asked
        return None

    def _room_for(self, chat: bool, size: int, requests: pa.RecordBatch) -> Gathering:
        """The file that has room for one more row; one that is full is sent off."""
        gathering = self._gatherings.get(chat)
        full = gathering is not None and (
            len(gathering) >= self._options.max_rows or gathering.size + size > self._options.max_bytes
        )
        if gathering is not None and full:
            gathering.absorb(requests)
            self._send(self._gatherings.pop(chat))
        if chat not in self._gatherings:
            self._gatherings[chat] = self.new_file(chat)
        return self._gatherings[chat]
