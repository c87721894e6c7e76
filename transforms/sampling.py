"""How an answer is drawn: the job's sampling with a row's own values on top, checked and written canonically."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.json_schemas import Checker, schema_of
from bidbeam.connectors.wire_json import MAX_DEPTH, depth_of
from bidbeam.transforms.row_values import UNREADABLE, python_values

KEYS = ("max_tokens", "temperature", "top_p", "seed", "stop", "n", "response_format")
"""Keys that a row may always set by a column of that name, besides the keys that the job itself names."""

DEFAULT_MAX_TOKENS = 128
"""Output tokens where neither job nor row says: an answer without a limit could not be priced."""


class BadSampling(ValueError):  # noqa: N818 - named for what it says
    """A sampling value of a wrong type or range; ``key`` is which one. The text never holds the value."""

    def __init__(self, key: str, expected: str) -> None:
        self.key, self.expected = key, expected
        super().__init__(f"{key} is not {expected}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Checked sampling. ``text`` is a canonical JSON object: sorted keys, no spaces, numbers as they were written."""

    text: str
    max_tokens: int
    n: int
    greedy: bool
    """Temperature 0: equal prompts have equal answers."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and numbers as written (Decimal included). ValueError for what JSON has not."""
    if isinstance(value, Mapping):
        items = sorted((str(key), item) for key, item in value.items())
        return "{" + ",".join(f"{json.dumps(k, ensure_ascii=False)}:{canonical_json(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical_json, value)) + "]"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(value) if isinstance(value, Decimal) else repr(float(value))
    raise ValueError("not a JSON value")


def parse_json(text: str) -> Any:
    """JSON whose numbers keep their text (Decimal where they have a fraction or exponent). Raises ValueError, also for
    what nests deeper than can be taken apart and written again.
    """
    if depth_of(text) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(_text: str) -> Any:
    raise ValueError("NaN and Infinity are not JSON")


def resolve(job: Mapping[str, Any], row: Mapping[str, Any]) -> Sampling:
    """The job's sampling with the row's values winning; None anywhere means not given. Raises BadSampling."""
    given = {key: value for values in (job, row) for key, value in values.items() if value is not None}
    given.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        rule = _RULES.get(key)
        try:
            checked[key] = value if rule is None else rule[0](value)
            text = canonical_json(checked[key])
            text.encode()
        except (ValueError, TypeError, ArithmeticError):
            raise BadSampling(key, "a JSON value" if rule is None else rule[1]) from None
    temperature = checked.get("temperature")
    return Sampling(
        text=canonical_json(checked),
        max_tokens=int(checked["max_tokens"]),
        n=int(checked.get("n", 1)),
        greedy=temperature is not None and temperature == 0,
    )


def _number(value: Any) -> int | float | Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        raise TypeError
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        number = _number(value)
        whole = int(number)  # 128.0 is what a whole number becomes in a float column with nulls
        if whole != number or not low <= whole <= high:
            raise ValueError
        return whole

    return check


def _in_range(good: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        number = _number(value)
        if not good(number):
            raise ValueError
        return number

    return check


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
        raise TypeError
    return value


def _object(value: Any) -> Any:
    parsed = parse_json(value) if isinstance(value, str) else value
    if not isinstance(parsed, Mapping):
        raise TypeError
    return parsed


def _format(value: Any) -> Any:
    parsed = _object(value)
    schema = schema_of(parsed)
    if not isinstance(schema, bool | None):
        Checker(schema)
    return parsed


_RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "max_tokens": (_whole(1, 2**31 - 1), "a whole number from 1 to 2147483647"),
    "temperature": (_in_range(lambda v: v >= 0), "a number from 0"),
    "top_p": (_in_range(lambda v: 0 < v <= 1), "a number above 0 and at most 1"),
    "n": (_whole(1, 2**15 - 1), "a whole number from 1 to 32767"),
    "seed": (_whole(-(2**63), 2**63 - 1), "a whole number of 64 bits"),
    "stop": (_stop, "a text or a list of texts, none empty"),
    "response_format": (_format, "an object of type text, json_object or json_schema, with a valid schema"),
}


def row_keys(job: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Which input columns are sampling values: the known keys and those that the job's sampling names."""
    names = {*KEYS, *job}
    return [name for name in columns if name in names]


def distinct(
    columns: Mapping[str, pa.Array], rows: int, json_text: Collection[str] = ()
) -> tuple[npt.NDArray[np.int64], list[dict[str, Any]]]:
    """Code of each row and the distinct rows of sampling columns that the codes number; shape (rows,).

    The columns named in ``json_text`` hold each value as its JSON text.
    """
    codes = np.zeros(rows, np.int64)
    combinations: list[dict[str, Any]] = [{}]
    for name, column in columns.items():
        encoded, values = _encode(column)
        if name in json_text:
            values = [_parsed(value) if isinstance(value, str) else value for value in values]
        index = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False) + 1
        choices = [None, *values]
        used, codes = np.unique(codes * len(choices) + index, return_inverse=True)
        combinations = [
            {**combinations[code // len(choices)], name: choices[code % len(choices)]} for code in used.tolist()
        ]
    return codes, combinations


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return UNREADABLE


def _encode(column: pa.Array) -> tuple[pa.Array, list[Any]]:
    """A column as a dictionary array, and the Python values of its dictionary."""
    if pa.types.is_nested(column.type):
        # Arrow cannot tell nested values apart: their JSON text stands for them.
        texts, values = [], dict[str, Any]()
        for value in python_values(column):
            text = None if value is None else _text(_plain(value))
            texts.append(text)
            if text is not None:
                values.setdefault(text, _plain(value))
        encoded = pa.array(texts, pa.string()).dictionary_encode()
        return encoded, [values[text] for text in encoded.dictionary.to_pylist()]
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        column = column.cast(pa.string()).cast(pa.float64())  # 0.7 stays 0.7, not 0.699999988
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return encoded, [_plain(value) for value in python_values(encoded.dictionary)]


def _text(value: Any) -> str:
    try:
        return canonical_json(value)
    except ValueError:
        return "not JSON: " + repr(value)


def _plain(value: Any) -> Any:
    """Structs without their null members, which other rows put there; whole floats as whole numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
