"""What is on its way at a provider, written down before it is sent, so that no start sends it twice.

A batch has up to three small files beside the run's segments, all create-only: the *intent* with the rows of the
batch, before anything is uploaded; a note that it is about to be created; and the provider's id for it. Whoever finds
an intent knows how far it came: without the second file nothing was asked for, without the third the provider has to
be asked whether it knows the batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from bidbeam.connectors.schemas import LABEL
from bidbeam.connectors.store import Store

INTENT_ROWS = pa.schema(
    [
        pa.field("custom_id", pa.string(), nullable=False),
        pa.field("key", pa.binary(16)),
        pa.field("attempt_id", pa.binary(16)),
        pa.field("request_id", pa.string()),
        pa.field("lot_id", LABEL),
        pa.field("round", pa.int16()),
        pa.field("attempt_no", pa.int16()),
        pa.field("kind", LABEL),
        pa.field("input_tokens", pa.int32()),
        pa.field("tokens_exact", pa.bool_()),
        pa.field("max_tokens", pa.int32()),
        pa.field("n", pa.int16()),
    ]
)
"""One row of a batch: how the provider names it, and all that booking it takes, whoever collects it."""

_META = b"bidbeam.batch"
_INTENT, _CREATING, _BATCH = ".intent.arrow", ".creating.json", ".batch.json"


@dataclass(frozen=True, slots=True)
class Intent:
    """One batch as the journal has it. ``name`` is in the batch's metadata at the provider, with the run's id.

    ``at`` is when its rows were handed over. ``creating_at`` None: it was never asked for. ``batch_id`` None: not
    known to have been created.
    """

    name: str
    pool: str
    model: str
    chat: bool
    at: datetime
    rows: pa.Table
    """INTENT_ROWS, in the order of the file."""
    creating_at: datetime | None = None
    batch_id: str | None = None
    terms: str | None = None
    """What was agreed when it was sent, in the words of whoever sent it: whoever collects it pays that."""


class BatchJournal:
    """The batches of one run. ``store`` is its journal's own directory for them; pickles."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def intend(self, intent: Intent) -> None:
        """Writes a new intent. Raises StoreError; then nothing may be sent."""
        meta = {
            "pool": intent.pool,
            "model": intent.model,
            "chat": intent.chat,
            "at": intent.at.isoformat(),
            "terms": intent.terms,
        }
        schema = INTENT_ROWS.with_metadata({_META: json.dumps(meta).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(
                intent.rows.unify_dictionaries().combine_chunks().replace_schema_metadata(schema.metadata)
            )
        self._store.create(intent.name + _INTENT, sink.getvalue())

    def note_creating(self, name: str, at: datetime) -> None:
        """From here on the provider may know the batch."""
        if not self._store.exists(name + _CREATING):
            self._store.create(name + _CREATING, json.dumps({"at": at.isoformat()}).encode())

    def note_batch(self, name: str, batch_id: str) -> None:
        """The batch is at the provider, under this id."""
        self._store.create(name + _BATCH, json.dumps({"id": batch_id}).encode())

    def drop(self, name: str) -> None:
        """Forgets a batch: its rows are in segments, or it never came to be. Safe to call again."""
        # The intent first: what is left without one is nobody's.
        for suffix in (_INTENT, _BATCH, _CREATING):
            self._store.delete(name + suffix)

    def names(self) -> list[str]:
        """The names of all batches that are not dropped."""
        return [e.name.removesuffix(_INTENT) for e in self._store.list() if e.name.endswith(_INTENT)]

    def open(self) -> list[Intent]:
        """All batches that are not dropped, of every pool and model, by name."""
        return [self._read(name) for name in self.names()]

    def _read(self, name: str) -> Intent:
        with self._store.open_input(name + _INTENT) as source:
            rows = pa.ipc.open_file(source).read_all()
        meta = json.loads(rows.schema.metadata[_META])
        creating, batch = self._note(name + _CREATING), self._note(name + _BATCH)
        return Intent(
            name=name,
            pool=meta["pool"],
            model=meta["model"],
            chat=meta["chat"],
            at=datetime.fromisoformat(meta["at"]),
            rows=rows.replace_schema_metadata(None),
            creating_at=None if creating is None else datetime.fromisoformat(creating["at"]),
            batch_id=None if batch is None else batch["id"],
            terms=meta.get("terms"),
        )

    def _note(self, name: str) -> Mapping[str, str] | None:
        if not self._store.exists(name):
            return None
        found: Mapping[str, str] = json.loads(self._store.read(name))
        return found
