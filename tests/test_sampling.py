"""Sampling: checked, merged and written canonically."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.transforms.sampling import DEFAULT_MAX_TOKENS, BadSampling, canonical_json, distinct, parse_json, resolve

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.decimals(allow_nan=False, allow_infinity=False, places=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(json_values)
def test_canonical_json_reads_back_as_the_same_value(value: Any) -> None:
    """Canonical JSON is JSON, and reading and writing it again changes nothing."""
    text = canonical_json(value)
    json.loads(text)
    assert canonical_json(parse_json(text)) == text


@given(st.dictionaries(st.text(), st.integers(), max_size=6))
def test_canonical_json_does_not_see_the_order_of_keys(value: dict[str, int]) -> None:
    """Two objects that differ only in the order of their keys have one canonical text."""
    assert canonical_json(value) == canonical_json(dict(reversed(list(value.items()))))


def test_numbers_keep_their_text() -> None:
    """A temperature written 0.70 goes to the engine as 0.70."""
    made = resolve({"temperature": Decimal("0.70"), "max_tokens": 16}, {})
    assert made.text == '{"max_tokens":16,"temperature":0.70}'


def test_a_rows_value_wins_and_null_does_not() -> None:
    """A row's sampling value replaces the job's; a null one leaves it."""
    made = resolve({"max_tokens": 16, "temperature": 0, "top_k": 5}, {"max_tokens": 32, "temperature": None})
    assert (made.max_tokens, made.greedy, json.loads(made.text)["top_k"]) == (32, True, 5)


def test_without_max_tokens_there_is_a_limit_all_the_same() -> None:
    """An answer's length is always bounded, because its worst case must be priced."""
    assert resolve({}, {}).max_tokens == DEFAULT_MAX_TOKENS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "12"), ("max_tokens", True),
        ("max_tokens", 2**31), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.01), ("top_p", [1]), ("n", 0), ("n", 1.2), ("seed", "x"), ("seed", 2**63),
        ("stop", ""), ("stop", [1]), ("stop", {"a": 1}), ("response_format", "json"), ("response_format", [1]),
        ("min_p", float("inf")), ("logit_bias", {"a": b"bytes"}),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name_only(key: str, value: Any) -> None:
    """A value of a wrong type or range is refused; the message names the key and what was expected."""
    with pytest.raises(BadSampling) as raised:
        resolve({"max_tokens": 4}, {key: value})
    assert raised.value.key == key


def test_a_whole_float_is_a_whole_number() -> None:
    """128.0, which a nullable integer column becomes in many tools, counts as 128."""
    assert resolve({}, {"max_tokens": 128.0}).text == '{"max_tokens":128}'


def test_response_format_may_be_json_text() -> None:
    """A response_format column of text holds the JSON object."""
    made = resolve({}, {"max_tokens": 1, "response_format": '{"type": "json_object"}'})
    assert json.loads(made.text)["response_format"] == {"type": "json_object"}


def test_distinct_numbers_rows_by_their_values() -> None:
    """Rows with equal sampling values share a code; nested and narrow float columns included."""
    columns = {
        "stop": pa.array([["a"], None, ["a"], ["b"]]),
        "temperature": pa.array([0.7, 0.7, 0.7, None], pa.float32()),
    }
    codes, rows = distinct(columns, 4)
    assert [rows[code] for code in codes] == [
        {"stop": ["a"], "temperature": 0.7},
        {"stop": None, "temperature": 0.7},
        {"stop": ["a"], "temperature": 0.7},
        {"stop": ["b"], "temperature": None},
    ]
    assert codes[0] == codes[2]
