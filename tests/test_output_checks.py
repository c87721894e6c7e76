"""Output checks: what is no answer counts as a failed attempt, and nobody's text is told."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.json_schemas import Checker
from bidbeam.transforms.output_checks import CUT_OFF, EMPTY, NO_JSON, NO_OBJECT, NOTHING_YET, check_answers
from bidbeam.transforms.sampling import BadSampling, resolve

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
AS_PERSON = json.dumps({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}})
AS_OBJECT = json.dumps({"response_format": {"type": "json_object"}})


def check(*rows: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row is its sampling and what differs from a plain answer."""
    at = "2026-01-02T00:00:00+00:00"
    stamps = {"started_at": pa.scalar(at).cast(pa.timestamp("us", "UTC")).as_py()}
    stamps["finished_at"] = stamps["started_at"]
    results = [
        {"tag": tag, "status": "ok", "output": "yes", "output_tokens": 3, **stamps, **given}
        for tag, (_, given) in enumerate(rows)
    ]
    sampling = pa.array([text for text, _ in rows], pa.string()).dictionary_encode()
    checked = check_answers(sampling, pa.RecordBatch.from_pylist(results, schema=RESULT_SCHEMA))
    assert checked.schema == RESULT_SCHEMA
    told: list[dict[str, Any]] = checked.to_pylist()
    return told


@pytest.mark.parametrize(
    ("sampling", "given", "problem"),
    [
        ("{}", {"output": ""}, EMPTY),
        ("{}", {"output": " \n\t"}, EMPTY),
        ("{}", {"output": " ", "finish_reason": "length"}, NOTHING_YET),
        ("{}", {"output": "a", "samples": ["a", " ", "c"]}, EMPTY),
        ("{}", {"output": "a", "samples": ["a", "b"]}, None),
        ("{}", {"output": "no JSON, and none was asked for"}, None),
        (AS_OBJECT, {"output": '{"a": 1}'}, None),
        (AS_OBJECT, {"output": "[1]"}, NO_OBJECT),
        (AS_OBJECT, {"output": "Sure! {}"}, NO_JSON),
        (AS_OBJECT, {"output": '{"a": ', "finish_reason": "length"}, CUT_OFF),
        (AS_PERSON, {"output": '{"name": "Ann", "age": 7}'}, None),
        (AS_PERSON, {"output": '{"age": 7}'}, "the answer breaks its schema: /required"),
        (AS_PERSON, {"output": '{"name": "Ann", "age": "x"}'}, "the answer breaks its schema: /properties/age/type"),
        (AS_PERSON, {"output": '{"name": "Ann"}', "samples": ['{"name": "Ann"}', "{"]}, NO_JSON),
    ],
)
def test_each_kind_of_bad_answer_is_told_apart(sampling: str, given: dict[str, Any], problem: str | None) -> None:
    """Empty, cut off, no JSON, not what the schema asks; the usage stays, because it is charged."""
    (row,) = check((sampling, given))
    assert row["output_tokens"] == 3
    if problem is None:
        assert (row["status"], row["output"], row["error_class"]) == ("ok", given["output"], None)
    else:
        assert (row["status"], row["error_class"], row["error_message"]) == ("failed", "bad_output", problem)
        assert row["output"] is None
        assert row["samples"] is None


def test_a_failure_is_left_as_it_is() -> None:
    """Only what claims to be an answer is checked; rows of other samplings are not touched by a schema."""
    failed = {"status": "failed", "error_class": "server", "output": None}
    rows = check((AS_PERSON, failed), ("{}", {}), (AS_PERSON, {"output": "{"}))
    assert [(row["status"], row["error_class"]) for row in rows] == [
        ("failed", "server"),
        ("ok", None),
        ("failed", "bad_output"),
    ]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES | st.fixed_dictionaries({"name": st.text(max_size=5)}, optional={"age": st.integers()}))
def test_an_answer_passes_exactly_if_it_has_the_form_that_was_asked(value: Any) -> None:
    """Of any JSON value, those pass that have a name and perhaps an age, and no message holds a piece of the value."""
    (row,) = check((AS_PERSON, {"output": json.dumps(value)}))
    fits = (
        isinstance(value, dict)
        and set(value) <= {"name", "age"}
        and isinstance(value.get("name"), str)
        and ("age" not in value or (isinstance(value["age"], int) and not isinstance(value["age"], bool)))
    )
    assert (row["status"] == "ok") == fits


def test_a_schema_reaches_for_nothing_outside_itself() -> None:
    """A reference to the network or a file is never followed."""
    for target in ("http://127.0.0.1:9/schema.json", "file:///etc/passwd"):
        assert Checker({"$ref": target}).problem({}) == "a reference that leads out of the schema"


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}},
        {"type": "json_schema"},
        {"type": "yaml"},
        {},
    ],
)
def test_a_format_that_no_answer_can_have_is_a_bad_sampling_value(given: dict[str, Any]) -> None:
    """It ends as a dead letter before anything is sent."""
    with pytest.raises(BadSampling, match="response_format is not an object of type"):
        resolve({"response_format": given}, {})
