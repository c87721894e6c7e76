"""One schema over many files: unified types, and tables brought to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.errors import InputError
from bidbeam.connectors.input_parts import is_json_text
from bidbeam.connectors.wire_json import MAX_DEPTH


def merge_fields(left: pa.Field, right: pa.Field) -> pa.Field | None:
    """The field that holds the values of both without loss of meaning, or None where there is none.

    Integers and floats widen, a null type becomes the other, structs gain each other's fields, a dictionary meets
    plain values as plain values. Text and bytes, text and numbers, text and JSON text do not meet.
    """
    nullable = left.nullable or right.nullable
    if left.type.equals(right.type) and is_json_text(left) == is_json_text(right):
        return left.with_nullable(nullable)
    if pa.types.is_null(left.type) or pa.types.is_null(right.type):
        return (right if pa.types.is_null(left.type) else left).with_nullable(True)
    if is_json_text(left) != is_json_text(right):
        return None
    types = [left.type, right.type]
    if sum(pa.types.is_dictionary(type_) for type_ in types) == 1:
        types = [type_.value_type if pa.types.is_dictionary(type_) else type_ for type_ in types]
    if _is_text(types[0]) != _is_text(types[1]):
        return None
    try:
        schemas = [pa.schema([(left.name, type_)]) for type_ in types]
        merged = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        for type_ in (left.type, right.type):
            pa.nulls(0, type_).cast(merged)
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return pa.field(left.name, merged, nullable, left.metadata)


def unify(files: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The schema of all files' columns, in the order in which they first appear.

    ``InputError`` that names both files and the column where two types do not meet, or the file and the column where
    a type cannot be written to Parquet, in which the outputs carry every input column.
    """
    fields: dict[str, Any] = {}
    origin: dict[str, str] = {}
    seen: list[pa.Schema] = []
    for url, schema in files:
        if any(schema.equals(other, check_metadata=True) for other in seen):
            continue
        for field in map(_clean, schema):
            known = fields.get(field.name)
            if known is None:
                merged, origin[field.name] = field.with_nullable(field.nullable or bool(seen)), url
            else:
                merged = merge_fields(known, field)
                if merged is None:
                    raise InputError(
                        f"column {field.name!r} is {known.type} in {origin[field.name]} but {field.type} in {url}; "
                        "make the types agree, or run the files as separate jobs"
                    )
                if not known.type.equals(merged.type):
                    origin[field.name] = url
            fields[field.name] = merged
        seen.append(schema)
        for name in fields.keys() - set(schema.names):
            fields[name] = fields[name].with_nullable(True)
    for field in fields.values():
        _check_writable(field, origin[field.name])
    return pa.schema(list(fields.values()))


def check_names(schema: pa.Schema, url: str) -> None:
    """``InputError`` where a column name appears twice."""
    names = sorted(schema.names)
    twice = [name for name, following in pairwise(names) if name == following]
    if twice:
        raise InputError(f"{url} has two columns named {twice[0]!r}; rename one of them")


def conform(table: pa.Table, schema: pa.Schema, url: str) -> pa.Table:
    """The table with exactly the columns and types of ``schema``, in one chunk each where its values fit one.

    Absent columns are null; columns that ``schema`` does not have are left out. ``InputError`` where a value does not
    survive the conversion to the type that all files share.
    """
    arrays = []
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            arrays.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        column = table.column(index)
        if not column.type.equals(field.type):
            try:
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InputError(
                    f"column {field.name!r} of {url} is {column.type} and has values that do not fit {field.type}, "
                    "its type over all files; make the types agree"
                ) from error
        arrays.append(column)
    if not arrays:
        return table.select([])
    return combine(pa.Table.from_arrays(arrays, schema=schema))


def combine(table: pa.Table) -> pa.Table:
    """One chunk per column, dictionaries unified; a column whose values need more stays in several."""
    if all(column.num_chunks <= 1 for column in table.columns):
        return table
    try:
        return table.combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowCapacityError):
        columns = []
        for column in table.columns:
            try:
                columns.append(column.combine_chunks() if column.num_chunks > 1 else column)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowCapacityError):
                columns.append(column)
        return pa.Table.from_arrays(columns, schema=table.schema)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _levels(type_: pa.DataType) -> int:
    """How deep a type nests: 1 for one that does not."""
    levels, left = 1, [(type_, 1)]
    while left and levels <= MAX_DEPTH:
        each, level = left.pop()
        levels = max(levels, level)
        if pa.types.is_dictionary(each):
            left.append((each.value_type, level + 1))
        left += ((each.field(place).type, level + 1) for place in range(each.num_fields))
    return levels


def _clean(field: pa.Field) -> pa.Field:
    """The field without the numbers that Parquet gave it: they mean nothing among other columns."""
    kept = {key: value for key, value in (field.metadata or {}).items() if key != b"PARQUET:field_id"}
    return field.with_metadata(kept or None)


def _check_writable(field: pa.Field, url: str) -> None:
    if _levels(field.type) > MAX_DEPTH:
        raise InputError(
            f"column {field.name!r} of {url} nests deeper than {MAX_DEPTH} levels, which Parquet does not read back; "
            "write it as JSON text, or leave it out"
        )
    try:
        pq.write_table(pa.schema([field]).empty_table(), pa.MockOutputStream())
    except UnicodeDecodeError as error:  # Arrow complains about a damaged type in bytes that are no text
        raise InputError(f"column {field.name!r} of {url} has a damaged type; write the file again") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"column {field.name!r} of {url} is {field.type}, which Parquet cannot hold, and outputs carry every "
            "input column; convert it or leave it out"
        ) from error
