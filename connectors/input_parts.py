"""What every input format answers when it is inspected, and the mark on columns that hold JSON text."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

JSON_MARK = {b"bidbeam.json": b"1"}
"""Metadata of a ``large_string`` field whose values are JSON text, to be parsed before use."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest part of a file that can be read by itself: a row group, a record batch, some lines.

    ``start`` and ``end`` are in the format's own terms (row groups, record batches, bytes); ``line_start`` counts the
    lines before it, blank ones included, in formats that have lines.
    """

    start: int
    end: int
    rows: int
    size_bytes: int
    line_start: int = 0


@dataclass(frozen=True, slots=True)
class Inspected:
    """A file's own schema and its units, in order."""

    schema: pa.Schema
    units: tuple[Unit, ...]


def json_field(name: str) -> pa.Field:
    """A column of JSON text."""
    return pa.field(name, pa.large_string(), metadata=JSON_MARK)


def is_json_text(field: pa.Field) -> bool:
    """Whether a column's values are JSON text, because no Arrow type fits all of them or they must stay as they are."""
    return bool(field.metadata) and JSON_MARK.items() <= field.metadata.items()
