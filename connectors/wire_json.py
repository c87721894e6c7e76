"""JSON as providers send it: read whatever comes, raise on none of it."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

_INT64_MAX = 2**63 - 1
MAX_DEPTH = 64
"""Levels of lists and objects that JSON of others may have where it is taken apart, copied or made a column: more
exhausts the stack of one library or another, and Parquet of more cannot be read back."""
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class _Garbage:
    """What is no JSON at all; not None, which is JSON's null."""


GARBAGE = _Garbage()


def read_json(body: bytes) -> object:
    """The JSON in ``body``, fractions as Decimal; an object that is no JSON value where it holds none. Never raises."""
    try:
        return json.loads(body, parse_float=Decimal, parse_constant=lambda _: None)
    except (ValueError, ArithmeticError, RecursionError):
        return GARBAGE


def depth_of(text: str) -> int:
    """How deep JSON text nests, by its brackets outside strings; text that is no JSON has some depth too."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0  # not deep enough to be looked at
    depth = deepest = 0
    for mark in _MARKS.findall(text):
        if mark in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "]}":
            depth -= 1
    return deepest


def pointer(document: object, path: str) -> Any:
    """The value at an RFC 6901 JSON pointer; None where there is none."""
    value = document
    for part in path.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and len(name) < 10 and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def whole(value: object) -> int | None:
    """A whole number from 0 on that fits into 64 bits; None for anything else."""
    if (
        isinstance(value, Decimal)
        and value.is_finite()
        and value.adjusted() < 19
        and value == value.to_integral_value()
    ):
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _INT64_MAX
    return value if good else None  # type: ignore[return-value]  # ``good`` says that it is an int
