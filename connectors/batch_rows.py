"""The rows of one batch: gathered into a file as they come, and found again when its answers come back."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bidbeam.connectors.batch_journal import INTENT_ROWS, Intent
from bidbeam.connectors.batch_lines import prompt_of
from bidbeam.connectors.http_engine import MAX_ANSWER_BYTES

NOBODY = -1
"""The tag of a row that nobody asks for."""

_INFO = [field.name for field in INTENT_ROWS if field.name != "custom_id"]


class Gathering:
    """Rows that wait for their batch to close, in a file of their own. One thread at a time."""

    def __init__(self, path: Path, chat: bool) -> None:
        self.path, self.chat, self.size = path, chat, 0
        # Arrays, and what only gathering needs goes with ``close``: a million rows may wait for hours.
        self.tags = array("q")
        self._offsets, self._lengths = array("q"), array("q")
        self._names: list[str] = []
        self._rows: list[pa.RecordBatch] = []
        self._pending: list[int] = []
        self._seen: Counter[bytes] = Counter()
        self._file: BinaryIO = path.open("w+b")

    def __len__(self) -> int:
        return len(self.tags)

    def occurrence(self, key: bytes) -> int:
        """How many rows of this key came before."""
        return self._seen[key]

    def add(self, index: int, tag: int, key: bytes, name: str, line: bytes) -> None:
        """Takes row ``index`` of the requests that ``absorb`` gets next."""
        self._pending.append(index)
        self._seen[key] += 1
        self.tags.append(tag)
        self._names.append(name)
        self._offsets.append(self.size)
        self._lengths.append(len(line))
        self._file.write(line)
        self.size += len(line)

    def absorb(self, requests: pa.RecordBatch) -> None:
        """Keeps what booking takes of the rows added since the last call."""
        if self._pending:
            info = pa.RecordBatch.from_arrays(
                [requests.column(name).cast(INTENT_ROWS.field(name).type) for name in _INFO], names=_INFO
            )
            self._rows.append(info.take(pa.array(self._pending)))
            self._pending = []

    def close(self) -> pa.Table:
        """INTENT_ROWS of all rows, in the order of the file, which is whole from here on."""
        self._file.flush()
        rows = pa.Table.from_batches(self._rows).unify_dictionaries() if self._rows else INTENT_ROWS.empty_table()
        names = pa.array(self._names, pa.string())
        self._rows, self._names, self._seen = [], [], Counter()
        return pa.Table.from_arrays([names, *(rows.column(name) for name in _INFO)], schema=INTENT_ROWS)

    def prompt(self, place: int) -> str | None:
        """The prompt of one row, read back from the file; None where that is gone."""
        try:
            self._file.seek(self._offsets[place])
            return prompt_of(self._file.read(self._lengths[place]))
        except (OSError, ValueError, KeyError):
            return None

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


class Batch:
    """One batch and who asks for which of its rows. ``adopted``: another start or try of ours began it.

    ``booked`` (bool[n]) are rows that the journal holds already.
    """

    def __init__(
        self, intent: Intent, asked: Gathering, *, adopted: bool = False, booked: npt.NDArray[np.bool_] | None = None
    ) -> None:
        n = intent.rows.num_rows
        self.intent, self.asked, self.adopted = intent, asked, adopted
        self.booked = np.zeros(n, np.bool_) if booked is None else booked
        self.place = np.full(n, NOBODY, np.int64)
        """Per row its place in ``asked``; NOBODY where nobody asks for it."""
        if not adopted:
            self.place = np.arange(n, dtype=np.int64)
        self.cancel = asyncio.Event()
        """Set on the loop, where the batch is to be cancelled."""
        self.creating = False
        """Whether it is just being created: then its id is worth waiting for."""
        self.collecting = False
        """Whether its answers are being read: who asks now comes too late."""

    def __len__(self) -> int:
        return len(self.place)

    @property
    def cancelling(self) -> bool:
        return self.cancel.is_set()

    @property
    def unasked(self) -> int:
        """Rows that nobody asks for and nobody has booked."""
        return int(((self.place == NOBODY) & ~self.booked).sum())

    def tag(self, row: int) -> int:
        place = int(self.place[row])
        return NOBODY if place == NOBODY else self.asked.tags[place]

    def prompt(self, row: int) -> str | None:
        place = int(self.place[row])
        return None if place == NOBODY else self.asked.prompt(place)

    def claimable(self) -> Iterator[tuple[bytes, int]]:
        """(content key, row) of what nobody asks for yet."""
        keys: Sequence[bytes] = self.intent.rows.column("key").to_pylist()
        return ((keys[row], row) for row in np.flatnonzero((self.place == NOBODY) & ~self.booked).tolist())


def lines_of(path: Path, longest: int = MAX_ANSWER_BYTES) -> Iterator[bytes | None]:
    """The lines of a file that are not blank; None for one that is longer than ``longest`` bytes."""
    with path.open("rb") as file:
        while raw := file.readline(longest + 1):
            if len(raw) > longest:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(longest)
                yield None
            elif raw.strip():
                yield raw


def new_intent(name: str, pool: str, model: str, gathered: Gathering, at: datetime, terms: str | None) -> Intent:
    """The intent of a gathering that is now closed."""
    return Intent(name, pool, model, gathered.chat, at, gathered.close(), terms=terms)
