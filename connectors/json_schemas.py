"""JSON Schemas as people give them: checked before anything is sent, and held against answers.

Nothing is ever fetched: a reference that leads out of the schema is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def schema_of(response_format: Any) -> Mapping[str, Any] | bool | None:
    """The schema in an OpenAI ``response_format``; True where any JSON object will do, None where any text will.

    Raises ValueError for a format that is none of ``text``, ``json_object`` and ``json_schema``.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return True
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping):
            return schema
    raise ValueError("neither text nor json_object nor a json_schema with its schema")


class Checker:
    """Holds values against one schema. Raises ValueError on construction where it is no schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        import referencing
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"no JSON Schema: see {_path(error.absolute_path)}") from None
        # An empty registry of its own: the default one would fetch what a reference names.
        self._validator = kind(schema, registry=referencing.Registry())

    def problem(self, value: Any) -> str | None:
        """Which rule a value breaks, by its place in the schema, or None. Nothing of the value is told."""
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        try:
            error = best_match(self._validator.iter_errors(value))
        except Unresolvable:
            return "a reference that leads out of the schema"
        except RecursionError:
            return "its depth"
        return None if error is None else _path(error.absolute_schema_path)


def _path(parts: Any) -> str:
    return "/" + "/".join(str(part) for part in parts)
