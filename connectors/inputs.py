"""Prompts in: what files an input names, how they split into chunks that are read by themselves, and reading one.

Parquet splits by row group, Arrow IPC (file and stream) by record batch, JSON Lines by line-aligned byte range. Source
rows count from 0 in each file; blank lines of JSON Lines are no rows. OpenAI batch files keep ``custom_id``, ``method``
and ``url`` as text and ``body`` as its exact JSON text (see ``is_openai_batch``); ``is_json_text`` marks such columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa

from bidbeam.connectors import input_arrow, input_jsonl, input_parquet
from bidbeam.connectors.errors import InputError, StoreError
from bidbeam.connectors.input_files import Format, InputFile, Storage, find_files
from bidbeam.connectors.input_jsonl import BAD, is_openai_batch
from bidbeam.connectors.input_parts import Inspected, Unit, is_json_text
from bidbeam.connectors.input_schema import check_names, combine, conform, unify
from bidbeam.connectors.store import Store

__all__ = [
    "BAD", "FileInfo", "InputPlan", "Split", "is_json_text", "is_openai_batch", "plan_input", "read_split",
]  # fmt: skip

_JSONL_UNIT_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class FileInfo:
    """An input file: ``version`` changes whenever its content may have."""

    url: str
    size: int
    version: str
    rows: int


@dataclass(frozen=True, slots=True)
class Split:
    """A chunk of one file that is read by itself.

    ``unit_start`` up to ``unit_end`` are row groups, record batches or bytes; ``row_start`` is the source row, from 0,
    of its first row; ``size_bytes`` is about what it takes in memory; ``line_start`` counts the lines before it.
    """

    index: int
    file: str
    format: Format
    unit_start: int
    unit_end: int
    row_start: int
    rows: int
    size_bytes: int
    line_start: int = 0


@dataclass(frozen=True, slots=True)
class InputPlan:
    """What an input is: its chunks in order, the schema that all of them are read with, and what identifies it.

    ``fingerprint`` is a hex digest of the files' URLs, sizes and versions, whatever their order.
    """

    splits: tuple[Split, ...]
    schema: pa.Schema
    files: tuple[FileInfo, ...]
    rows: int
    fingerprint: str


def plan_input(
    patterns: Sequence[str], storage: Storage | None = None, *, target_bytes: int = 32 << 20, target_rows: int = 65_536
) -> InputPlan:
    """Find and inspect the files that ``patterns`` name: paths, globs and directories, local or any fsspec URL.

    Splits hold about ``target_bytes`` and ``target_rows`` at most, and at least one unit of their file. Parquet and
    Arrow are inspected by their metadata alone, JSON Lines in one pass over its text; several files at once.
    ``InputError`` where there is nothing to read, a file cannot be read, or the files' columns do not agree.
    """
    files = find_files(patterns, storage)
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        inspected = list(pool.map(lambda file: _inspect(file, target_bytes), files))
    schema = _unify(files, inspected)
    splits: list[Split] = []
    infos = []
    for file, parts in zip(files, inspected, strict=True):
        row = 0
        for group in _group(parts.units, target_bytes, target_rows):
            rows = sum(unit.rows for unit in group)
            size = sum(unit.size_bytes for unit in group)
            if rows:
                start, end = group[0].start, group[-1].end
                split = Split(len(splits), file.url, file.format, start, end, row, rows, size, group[0].line_start)
                splits.append(split)
            row += rows
        infos.append(FileInfo(file.url, file.entry.size, file.entry.version, row))
    total = sum(info.rows for info in infos)
    return InputPlan(tuple(splits), schema, tuple(infos), total, _fingerprint(infos))


def read_split(split: Split, schema: pa.Schema, storage: Storage | None = None) -> pa.Table:
    """The split's rows with exactly the columns of ``schema``, each in one chunk.

    A JSON Lines split has one column more, ``BAD`` (large_string): null, or why the line is not a row; the other
    columns of such a row are null. ``InputError`` where the file is no longer what was planned or is corrupt.
    """
    store, name = Store.of_file(split.file, storage)
    try:
        with store.open_input(name) as file:
            table = _read(file, split, schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, StoreError) and not isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"{split.file} cannot be read: {_reason(error)}; write it again") from error
    if table.num_rows != split.rows:
        raise InputError(f"{split.file} has changed since the run was planned; start the run again")
    return table


def _read(file: pa.NativeFile, split: Split, schema: pa.Schema) -> pa.Table:
    if split.format == "parquet":
        table = input_parquet.read(file, split.unit_start, split.unit_end, schema.names)
        return conform(table, schema, split.file)
    if split.format == "arrow":
        return conform(input_arrow.read(file, split.unit_start, split.unit_end), schema, split.file)
    table = input_jsonl.read(file, split.unit_start, split.unit_end, split.line_start, schema)
    return combine(conform(table, schema, split.file).append_column(BAD, table.column(BAD)))


def _inspect(file: InputFile, target_bytes: int) -> Inspected:
    try:
        with file.store.open_input(file.entry.name) as source:
            if file.format == "jsonl":
                found = input_jsonl.inspect(source, min(_JSONL_UNIT_BYTES, target_bytes))
            elif not file.entry.size:
                raise pa.ArrowInvalid("it is empty")
            else:
                found = (input_parquet if file.format == "parquet" else input_arrow).inspect(source)
            check_names(found.schema, file.url)
            str(found.schema)  # names of nested fields are decoded only when asked for; damaged ones fail here
    except StoreError as error:
        raise InputError(str(error)) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file.url} is not a readable {file.format} file: {_reason(error)}; write it again, or leave it out"
        ) from error
    if file.format == "jsonl" and BAD in found.schema.names:
        raise InputError(f"{file.url} has a column {BAD!r}, a name that is taken; rename it")
    return found


def _unify(files: Sequence[InputFile], inspected: Sequence[Inspected]) -> pa.Schema:
    """JSON Lines files agree on JSON text where their types differ; then all files agree or the input is refused."""
    lines = [parts.schema for file, parts in zip(files, inspected, strict=True) if file.format == "jsonl"]
    shared = reduce(input_jsonl.merge_columns, lines) if lines else pa.schema([])
    schemas = []
    for file, parts in zip(files, inspected, strict=True):
        schema = parts.schema
        if file.format == "jsonl":
            schema = pa.schema([shared.field(name) for name in schema.names])
        schemas.append((file.url, schema))
    return unify(schemas)


def _group(units: Sequence[Unit], target_bytes: int, target_rows: int) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    size = rows = 0
    for unit in units:
        if group and (size + unit.size_bytes > target_bytes or rows + unit.rows > target_rows):
            yield group
            group, size, rows = [], 0, 0
        group.append(unit)
        size += unit.size_bytes
        rows += unit.rows
    if group:
        yield group


def _fingerprint(files: Sequence[FileInfo]) -> str:
    digest = hashlib.sha256()
    for line in sorted(f"{len(file.url)}:{file.url}:{file.size}:{file.version}" for file in files):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """The error in a few words; a library's message is cut before it could quote what is in the file."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text[:160].rstrip(".")
