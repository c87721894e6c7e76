"""Verify, file by file: bytes, rows, types and ids, streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.ledger_manifest import PartFile
from bidbeam.connectors.pools import METERS
from bidbeam.connectors.schemas import CHARGES, LEDGER_VERSION, TABLES
from bidbeam.connectors.store import Store
from bidbeam.transforms.charging import charge_ids

EXAMPLES = 5
BATCH_ROWS = 65_536
_CHUNK_BYTES = 1 << 20
_READERS = 4

Fault = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold. ``checked`` counts rows or files; ``faults`` are the first of the ``failed``."""

    name: str
    says: str
    checked: int
    failed: int
    faults: tuple[Fault, ...] = ()


def check_files(store: Store, parts: Sequence[PartFile]) -> tuple[Check, set[str]]:
    """The check of all files, and the paths of those that can be read as what they should be."""
    with ThreadPoolExecutor(_READERS) as readers:
        problems = list(readers.map(lambda part: _problems_of(store, part), parts))
    faults = [{"file": part.path, **fault} for part, (found, _) in zip(parts, problems, strict=True) for fault in found]
    readable = {part.path for part, (_, can_read) in zip(parts, problems, strict=True) if can_read}
    broken = sum(bool(found) for found, _ in problems)
    says = "every listed file has the bytes, the rows and the column types that it should"
    return Check("files", says, len(parts), broken, tuple(faults[:EXAMPLES])), readable


def _problems_of(store: Store, part: PartFile) -> tuple[list[Fault], bool]:
    found: list[Fault] = []
    try:
        size, digest = _digest(store, part.path)
        with store.open_input(part.path) as source:
            parquet = pq.ParquetFile(source)
            rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
    except (StoreError, OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return [{"problem": f"cannot be read: {first[:200]}"}], False
    for what, listed, there in (("size_bytes", part.size_bytes, size), ("sha256", part.sha256, digest)):
        if listed != there:
            found.append({"problem": f"another {what} than listed", "listed": listed, "found": there})
    if rows != part.rows:
        found.append({"problem": "another number of rows than listed", "listed": part.rows, "found": rows})
    wrong = list(_wrong_columns(part, schema))
    return [*found, *wrong], not wrong


def _digest(store: Store, path: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with store.open_input(path) as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _wrong_columns(part: PartFile, schema: pa.Schema) -> Iterator[Fault]:
    for wanted in TABLES.get(part.table, pa.schema([])):
        if wanted.name not in schema.names:
            # Columns are only ever added: an older file may lack the newer ones.
            if part.ledger_version >= LEDGER_VERSION:
                yield {"problem": f"has no column {wanted.name}"}
            continue
        there = schema.field(wanted.name).type
        if _plain(there) != _plain(wanted.type):
            yield {"problem": f"column {wanted.name} has another type", "listed": str(wanted.type), "found": str(there)}


def _plain(type_: pa.DataType) -> pa.DataType:
    """A type without the ways in which Parquet and Arrow keep the same values."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    return pa.string() if pa.types.is_large_string(type_) else type_


def check_charge_ids(store: Store, parts: Sequence[PartFile]) -> Check:
    checked = failed = 0
    faults: list[Fault] = []
    for part in parts:
        with store.open_input(part.path) as source:
            for batch in pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=["charge_id", "attempt_id", "meter"]):
                checked += batch.num_rows
                for meter, rows in _by_meter(batch):
                    given, attempts = _storage(rows.column("charge_id")), _storage(rows.column("attempt_id"))
                    known = meter in METERS and attempts.null_count == 0
                    ids = charge_ids(attempts, meter).storage if known else pa.nulls(len(given), given.type)
                    wrong = rows.filter(pc.invert(pc.fill_null(pc.equal(given, ids), False)))
                    failed += wrong.num_rows
                    faults += [{"file": part.path, **row} for row in wrong.slice(0, EXAMPLES).to_pylist()]
    says = "a charge's id is the one that its attempt and meter give"
    return Check("charges.charge_id", says, checked, failed, tuple(faults[:EXAMPLES]))


def _by_meter(batch: pa.RecordBatch) -> Iterator[tuple[Any, pa.RecordBatch]]:
    meters = batch.column("meter").cast(pa.string())
    for meter in pc.unique(meters).to_pylist():
        yield meter, batch.filter(pc.is_null(meters) if meter is None else pc.equal(meters, meter))


def _storage(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column.cast(CHARGES.field("charge_id").type)
