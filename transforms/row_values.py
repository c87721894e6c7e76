"""Columns as Python values where rows must be looked at one by one, and no bad row hides the others."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc


class Unreadable:
    """Stands for a value that has no Python form: broken UTF-8, a date out of range."""


UNREADABLE: Final = Unreadable()


def python_values(column: pa.Array) -> list[Any]:
    """The column's values, None for null, UNREADABLE where a value cannot be read."""
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)  # Python knows no nanoseconds
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, ArithmeticError):
        values = [_value(scalar) for scalar in column]
    return values


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, ArithmeticError):
        return UNREADABLE


def readable_text(column: pa.Array) -> tuple[pa.Array, list[int]]:
    """A text, binary or dictionary column as plain text, and the rows that are not UTF-8 (null in the result)."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        large = pa.types.is_large_binary(column.type)
        column = column.view(pa.large_string() if large else pa.string())
    try:
        column.validate(full=True)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        values = [_value(scalar) for scalar in column]
        bad = [i for i, value in enumerate(values) if value is UNREADABLE]
        good = pa.array([value is not UNREADABLE for value in values])
        return pc.if_else(good, column, pa.scalar(None, column.type)), bad
    return column, []


def is_text(type_: pa.DataType) -> bool:
    """Whether a column of this type holds text (binary counts: some writers mark text so)."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
        pa.types.is_large_binary, pa.types.is_binary_view,
    )  # fmt: skip
    return any(kind(type_) for kind in kinds)
