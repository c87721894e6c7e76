"""Compaction: what a finished run keeps of its journal, so that a later start of it still pays nothing again.

The answers stand in the outputs; of the journal only the attempts' other columns stay, a small file per range beside
the name of the output file and the row that each answer stands in. Segments and scratch go. Should rows be added to
the input later, a start finds its answers here as it would have found them in segments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.schemas import SEGMENT
from bidbeam.connectors.store import Store
from bidbeam.transforms.run_context import RunContext, start_of

_DIRECTORY = "answers"
_OUTPUT = b"bidbeam.output"
_TEXT = ("output", "samples")

_NAMES = (
    "key", "request_id", "lot_id", "round", "attempt_id", "attempt_no", "kind", "pool", "model", "status",
    "error_class", "error_message", "input_tokens", "cached_tokens", "output_tokens", "finish_reason", "cost",
    "usage_source",
)  # fmt: skip
KEPT = pa.schema([*(SEGMENT.field(name) for name in _NAMES), pa.field("output_row", pa.int64())])
"""What publishing asks of an attempt, its texts apart, and the row of the output file that has these (NULL: the attempt
answered nothing). What it used and what each meter charged is in the ledger, once the run has ended."""


def keep_attempts(
    context: RunContext, range_: int, attempts: pa.Table, answers: npt.NDArray[np.int64], output: str | None
) -> None:
    """Keeps a range's attempts (SEGMENT). ``answers`` are the attempts behind each row of ``output``, in its order."""
    rows = np.full(attempts.num_rows, -1, np.int64)
    # Backwards: of an answer that serves several rows the first counts.
    rows[answers[::-1]] = np.arange(len(answers))[::-1]
    kept = attempts.select(_NAMES).append_column(KEPT.field("output_row"), pa.array(rows, mask=rows < 0))
    sink = pa.BufferOutputStream()
    schema = KEPT.with_metadata({_OUTPUT: (output or "").encode()})
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(kept.unify_dictionaries().combine_chunks().replace_schema_metadata(schema.metadata))
    context.journal.create(f"{_DIRECTORY}/s{context.start:03d}-{range_:06d}.arrow", sink.getvalue(), durable=False)


def kept_answers(context: RunContext) -> list[str]:
    """Names, relative to the journal, of what the latest start that ended has kept; none where none has."""
    return [] if context.ended_start is None else _files_of(context.journal, context.ended_start)


def _files_of(journal: Store, start: int) -> list[str]:
    return [entry.name for entry in journal.list(f"{_DIRECTORY}/s{start:03d}-")]


def is_kept(name: str) -> bool:
    """Whether a journal file is one of ``kept_answers`` rather than a segment."""
    return name.startswith(f"{_DIRECTORY}/")


def read_kept(context: RunContext, name: str, rows: pa.Array) -> pa.Table:
    """The given rows of a kept file as SEGMENT rows, their texts taken from the outputs again."""
    with context.journal.open_input(name) as source:
        reader = pa.ipc.open_file(source)
        output = (reader.schema.metadata or {}).get(_OUTPUT, b"").decode()
        kept = reader.read_all().replace_schema_metadata(None).take(rows)
    at = kept.column("output_row").combine_chunks()
    found = pa.Table.from_arrays(
        # An earlier version kept fewer of them.
        [
            kept.column(f.name) if f.name in _NAMES and f.name in kept.schema.names else pa.nulls(kept.num_rows, f.type)
            for f in SEGMENT
        ],
        schema=SEGMENT,
    )
    if not output:
        return found
    with context.run_dir.open_input(output) as source:
        names = [text for text in _TEXT if text in pq.read_schema(source).names]
    with context.run_dir.open_input(output) as source:
        texts = pq.read_table(source, columns=names)
    for text in names:
        field = SEGMENT.field(text)
        found = found.set_column(SEGMENT.get_field_index(text), field, texts.column(text).take(at).cast(field.type))
    return found


def compact(journal: Store, ended: int) -> None:
    """Once the manifest of start ``ended`` stands: takes away what of the journal it has made superfluous.

    Safe to call again, which the next start does in case this one was cut short.
    """
    mine = set(_files_of(journal, ended))
    for entry in journal.list(f"{_DIRECTORY}/"):
        if entry.name not in mine:
            journal.delete(entry.name)
    for start in sorted({start_of(entry.name) for entry in journal.list("start-")}):
        if start <= ended:
            journal.delete_tree(f"start-{start:03d}")
