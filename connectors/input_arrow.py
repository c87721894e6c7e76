"""Arrow IPC input, file and stream: inspected by its message headers alone, read by record batch."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from bidbeam.connectors.input_parts import Inspected, Unit

_MAGIC = b"ARROW1"
_FEATHER_V1 = b"FEA1"
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3


@dataclass(frozen=True, slots=True)
class _Message:
    """One message of the IPC format: where it stands, header included, and for a record batch its rows."""

    kind: int
    offset: int
    size: int
    rows: int


def inspect(file: pa.NativeFile) -> Inspected:
    """The schema and record batches. A unit's ``size_bytes`` is as stored."""
    kind = _kind(file)
    batches = [message for message in _messages(file, kind) if message.kind == _RECORDS]
    units = tuple(Unit(index, index + 1, message.rows, message.size) for index, message in enumerate(batches))
    file.seek(0)
    if kind == "stream":
        return Inspected(pa.ipc.open_stream(file).schema.remove_metadata(), units)
    reader = pa.ipc.open_file(file)
    if reader.num_record_batches != len(units):
        raise pa.ArrowInvalid("the footer and the messages count different record batches")
    return Inspected(reader.schema.remove_metadata(), units)


def read(file: pa.NativeFile, start: int, end: int) -> pa.Table:
    """The rows of the record batches from ``start`` up to ``end``, checked to be sound."""
    if _kind(file) == "file":
        file.seek(0)
        reader = pa.ipc.open_file(file)
        table = pa.Table.from_batches([reader.get_batch(index) for index in range(start, end)], reader.schema)
    else:
        table = _read_stream(file, start, end)
    # Unlike Parquet's decoder, the IPC reader takes buffers as they come; wrong ones would be read out of bounds.
    table.validate(full=True)
    return table.replace_schema_metadata(None)


def _read_stream(file: pa.NativeFile, start: int, end: int) -> pa.Table:
    """Batches out of the middle of a stream: the schema, the dictionaries up to there, and those batches."""
    parts, batch = [], 0
    for message in _messages(file, "stream"):
        if message.kind == _RECORDS:
            batch += 1
            if not start < batch <= end:
                continue
        file.seek(message.offset)
        parts.append(file.read(message.size))
        if batch == end:
            break
    return pa.ipc.open_stream(pa.BufferReader(b"".join(parts))).read_all()


def _kind(file: pa.NativeFile) -> Literal["file", "stream"]:
    size = file.size()
    file.seek(0)
    head = file.read(8)
    if head.startswith(_FEATHER_V1):
        raise pa.ArrowInvalid("it is Feather version 1; write it again as version 2")
    if not head.startswith(_MAGIC):
        return "stream"
    file.seek(max(0, size - len(_MAGIC)))
    if size < 2 * len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
        raise pa.ArrowInvalid("its end is missing")
    return "file"


def _messages(file: pa.NativeFile, kind: Literal["file", "stream"]) -> list[_Message]:
    """All messages in order, read header by header; ``ArrowInvalid`` where they run past the end of the file."""
    size = file.size()
    offset = 8 if kind == "file" else 0
    found: list[_Message] = []
    while offset < size:
        file.seek(offset)
        prefix = file.read(8)
        if len(prefix) < 4:
            raise pa.ArrowInvalid("it ends within a message")
        marker, length = struct.unpack("<ii", prefix.ljust(8, b"\0"))
        head = 8
        if marker != -1:  # before Arrow 0.15 there was no marker
            head, length = 4, marker
        if length == 0:
            break
        if length < 0 or offset + head + length > size:
            raise pa.ArrowInvalid("it ends within a message, or is not Arrow IPC")
        file.seek(offset + head)
        type_, rows, body = _parse_header(file.read(length))
        end = offset + head + length + body
        if end > size:
            raise pa.ArrowInvalid("it ends within a record batch")
        found.append(_Message(type_, offset, end - offset, rows))
        offset = end
    if not found or found[0].kind != _SCHEMA:
        raise pa.ArrowInvalid("it is not Arrow IPC")
    return found


def _parse_header(header: bytes) -> tuple[int, int, int]:
    """``(type, rows, body length)`` of a message's flatbuffer; rows are 0 but for a record batch."""
    try:
        root = struct.unpack_from("<I", header, 0)[0]
        type_ = struct.unpack_from("<B", header, _field(header, root, 1))[0]
        body_at = _field(header, root, 3)
        body = struct.unpack_from("<q", header, body_at)[0] if body_at else 0
        rows = 0
        if type_ == _RECORDS:
            table_at = _field(header, root, 2)
            table = table_at + struct.unpack_from("<I", header, table_at)[0]
            rows_at = _field(header, table, 0)
            rows = struct.unpack_from("<q", header, rows_at)[0] if rows_at else 0
    except struct.error as error:
        raise pa.ArrowInvalid("a message header is corrupt, or it is not Arrow IPC") from error
    if body < 0 or rows < 0:
        raise pa.ArrowInvalid("a message header is corrupt, or it is not Arrow IPC")
    return type_, rows, body


def _field(buffer: bytes, table: int, index: int) -> int:
    """Where field ``index`` of the flatbuffer table at ``table`` stands; 0 where it has its default."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if vtable < 0:
        raise struct.error("a table outside of its buffer")
    if 4 + 2 * index >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", buffer, vtable + 4 + 2 * index)[0]
    return table + offset if offset else 0
