"""The ledger's files: Parquet parts, created once, and the manifests that make them count.

How a part is encoded was measured on two cores with 1M attempts and 3M charges of a run in progress (before: Arrow's
defaults; after: as here). Attempts: 0.53 s, 35 MB before, 0.33 s, 29 MB after. Charges: 1.7 s, 97 MB before, 1.1 s,
91 MB after. What decides:

- Statistics cost a third of the time, most of it on decimals and UUIDs that nobody filters by: only the columns that
  queries select rows by have them.
- Attempt and charge ids are random: building a dictionary of them is wasted, and so is compressing them, except where
  one attempt's charges repeat its id.
- Times rise slowly: delta packing gives a quarter of the size at half the time of a dictionary.
- Counts, quantities and costs repeat, because token counts do: a dictionary makes 16 bytes one or two.
- Snappy and lz4 take the same time; zstd saves 15 % of the size for as much more time on ids that users chose.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.errors import AlreadyExists
from bidbeam.connectors.ledger_manifest import Manifest, PartFile, RunRow, run_directory
from bidbeam.connectors.ledger_views import VERSION_LINE, views_sql
from bidbeam.connectors.schemas import LEDGER_VERSION, TABLES
from bidbeam.connectors.store import Store

__all__ = ["PartFile", "RunRow", "ensure_ledger", "write_manifest", "write_part"]

ROW_GROUP_ROWS = 1 << 18
"""Enough for DuckDB's threads to share a file, little enough to hold in memory: 50 MB of charges."""

_FILTERED_BY = frozenset({"run_id", "run_date", "request_id", "lot_id", "pool", "charged_at", "started_at"})
_VERSION_KEY = "bidbeam.ledger_version"


def write_part(
    ledger: Store, table: str, run_date: date, run_id: str, part: str, data: pa.Table | Iterable[pa.RecordBatch]
) -> PartFile:
    """Writes ``<table>/run_date=…/run_id=…/part-<part>.parquet``; it counts once a manifest lists it.

    ``data`` has columns of ``TABLES[table]`` in any order: they are cast, and those it lacks are NULL. The same data
    gives the same bytes, so that repeating a write is no error. Raises ValueError for a column that the table has not,
    AlreadyExists where the file is there with other content.
    """
    return _write(ledger, table, run_directory(table, run_date, run_id), f"part-{part}.parquet", data)


def write_manifest(ledger: Store, run: RunRow, parts: Sequence[PartFile], sequence: int) -> None:
    """Makes ``parts``, and nothing else, the run's files, with ``run`` as its row of the table ``runs``.

    ``sequence`` is one more than the run's latest manifest has (``latest_manifest``), 0 for the first. Raises
    AlreadyExists where another start of the run took that number.
    """
    if any(part.table == "runs" for part in parts):
        raise ValueError("the row of the table runs comes from the run itself")
    row = pa.Table.from_pylist([dataclasses.asdict(run)], TABLES["runs"])
    directory = run_directory("runs", run.run_date, run.run_id)
    # Named by content: a start that died before its manifest must not be in the way of the next one.
    content = hashlib.sha256(repr(row.to_pylist()).encode()).hexdigest()[:8]
    row_part = _write(ledger, "runs", directory, f"part-{sequence:04d}-{content}.parquet", row)
    manifest = Manifest(run.run_id, run.run_date, run.status, sequence, (row_part, *parts))
    ledger.create(manifest.name, manifest.to_json())


def ensure_ledger(ledger: Store) -> None:
    """Lays an empty ledger, or brings an older one's ``views.sql`` up to date; a newer one's is left alone.

    DuckDB fails on a pattern that matches no file, so every table gets a file without rows, which no manifest lists.
    """
    for table in TABLES:
        if not ledger.exists(f"{table}/_schema.parquet"):
            # A ledger laid by another version keeps its own: the views name the columns themselves.
            try:
                _write(ledger, table, table, "_schema.parquet", TABLES[table].empty_table())
            except AlreadyExists:
                continue
    if _views_version(ledger) < LEDGER_VERSION:
        ledger.replace("views.sql", views_sql(ledger).encode())


def _views_version(ledger: Store) -> int:
    if not ledger.exists("views.sql"):
        return 0
    first = ledger.read("views.sql").decode(errors="replace").partition("\n")[0]
    version = first.removeprefix(VERSION_LINE)
    return int(version) if version != first and version.isdigit() else 0


def _write(ledger: Store, table: str, directory: str, name: str, data: pa.Table | Iterable[pa.RecordBatch]) -> PartFile:
    schema = _file_schema(table)
    rows = 0
    with ledger.scratch_file() as scratch:
        with pq.ParquetWriter(scratch, schema, **_encoding(table)) as writer:
            for group in _row_groups(schema, data):
                rows += group.num_rows
                writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
        with Path(scratch).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        ledger.create_from(f"{directory}/{name}", scratch)
    return PartFile(table, f"{directory}/{name}", rows, size, digest)


@cache
def _file_schema(table: str) -> pa.Schema:
    return TABLES[table].with_metadata({_VERSION_KEY: str(LEDGER_VERSION)})


@cache
def _encoding(table: str) -> dict[str, Any]:
    """The Parquet writer's arguments for a table, by the reasons at the top of this module."""
    schema = TABLES[table]
    times = [field.name for field in schema if pa.types.is_timestamp(field.type)]
    random = [field.name for field in schema if field.type == pa.uuid()]
    ids = [name for name in ("request_id", "provider_request_id") if name in schema.names]
    unique = {"charge_id"} | ({"attempt_id"} if table != "charges" else set())
    return {
        "use_dictionary": [name for name in schema.names if name not in {*times, *random, *ids}],
        "column_encoding": dict.fromkeys(times, "DELTA_BINARY_PACKED"),
        "compression": {name: "none" if name in unique else "snappy" for name in schema.names},
        "write_statistics": [name for name in schema.names if name in _FILTERED_BY],
    }


def _row_groups(schema: pa.Schema, data: pa.Table | Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables of ROW_GROUP_ROWS rows (the last one less), each column one chunk with one dictionary."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in data.to_batches() if isinstance(data, pa.Table) else data:
        shaped = _conform(batch, schema)
        while rows + shaped.num_rows >= ROW_GROUP_ROWS:
            room = ROW_GROUP_ROWS - rows
            yield _whole(schema, [*waiting, shaped.slice(0, room)])
            waiting, rows, shaped = [], 0, shaped.slice(room)
        if shaped.num_rows:
            waiting.append(shaped)
            rows += shaped.num_rows
    if waiting:
        yield _whole(schema, waiting)


def _whole(schema: pa.Schema, batches: list[pa.RecordBatch]) -> pa.Table:
    # A column chunk that changes its dictionary half-way is written without one.
    return pa.Table.from_batches(batches, schema).unify_dictionaries()


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema):
        return batch.replace_schema_metadata(schema.metadata)
    unknown = sorted(set(batch.schema.names) - set(schema.names))
    if unknown:
        raise ValueError(f"the ledger's table has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    columns = [
        _cast(batch.column(field.name), field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(column: pa.Array, type_: pa.DataType) -> pa.Array:
    if column.type == type_:
        return column
    if type_ == pa.uuid():
        return pa.ExtensionArray.from_storage(type_, column.cast(pa.binary(16)))
    if pa.types.is_dictionary(type_) and not pa.types.is_dictionary(column.type):
        return column.cast(type_.value_type).dictionary_encode().cast(type_)
    return column.cast(type_)
