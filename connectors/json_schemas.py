"""JSON Schemas as people give them: checked before anything is sent, and held against answers.

Nothing is ever fetched: a reference that leads out of the schema is refused. Schemas come with rows and values from
models, so that neither may take for ever: patterns are matched in linear time, and rules are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

MAX_RULES = 100_000
"""Rules that one value may be held against, references unfolded; a list without duplicates counts by its pairs."""
_MAX_UNFOLDED = 12
"""References that a schema may have beside ``unevaluated...``, which unfolds them out of our sight."""


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
        from jsonschema import Draft202012Validator, validators
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        try:
            kind = validator_for(schema, default=Draft202012Validator)
            kind.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"no JSON Schema: see {_path(error.absolute_path)}") from None
        except (RecursionError, TypeError):
            raise ValueError("no JSON Schema") from None
        _check_rules(schema)
        self._left = MAX_RULES
        rules = {**kind.VALIDATORS, "pattern": _pattern, "patternProperties": _pattern_properties}
        rules |= {"additionalProperties": _additional} if "additionalProperties" in rules else {}
        counted = {name: self._counted(name, rule) for name, rule in rules.items()}
        # An empty registry of its own: the default one would fetch what a reference names.
        self._validator = validators.extend(kind, counted)(schema, registry=referencing.Registry())

    def problem(self, value: Any) -> str | None:
        """Which rule a value breaks, by its place in the schema, or None. Nothing of the value is told."""
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        self._left = MAX_RULES
        try:
            error = best_match(self._validator.iter_errors(value))
        except _TooMuch:
            return "its size"
        except Unresolvable:
            return "a reference that leads out of the schema"
        except RecursionError:
            return "its depth"
        return None if error is None else _path(error.absolute_schema_path)

    def _counted(self, name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
        def checked(validator: Any, asked: Any, value: Any, schema: Any) -> Iterator[Any]:
            pairs = len(value) ** 2 // 2 if name == "uniqueItems" and isinstance(value, list) else 0
            self._left -= 1 + pairs
            if self._left < 0:
                raise _TooMuch
            yield from rule(validator, asked, value, schema) or ()

        return checked


class _TooMuch(Exception):  # noqa: N818 - a limit that was met
    pass


def _matches(pattern: str, text: str) -> bool:
    """Whether the pattern is found in the text, by RE2, which no pattern can keep busy. Raises pa.ArrowInvalid."""
    found: bool = pc.match_substring_regex(pa.scalar(text, pa.large_string()), pattern).as_py()
    return found


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001
    from jsonschema.exceptions import ValidationError

    if isinstance(value, str) and not _matches(pattern, value):
        yield ValidationError("does not match")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], value: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001
    if isinstance(value, dict):
        for pattern, inner in patterns.items():
            for name, each in value.items():
                if _matches(pattern, name):
                    yield from validator.descend(each, inner, path=name, schema_path=pattern)


def _additional(validator: Any, allowed: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if not isinstance(value, dict):
        return
    patterns = schema.get("patternProperties", {})
    for name, each in value.items():
        if name in schema.get("properties", {}) or any(_matches(pattern, name) for pattern in patterns):
            continue
        if isinstance(allowed, Mapping):
            yield from validator.descend(each, allowed, path=name)
        elif not allowed:
            yield ValidationError("is one too many")


def _check_rules(schema: Mapping[str, Any]) -> None:
    """Raises ValueError for patterns that are none, and for rules whose work cannot be counted."""
    references, unfolds = 0, False
    left: list[Any] = [schema]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left += each.values()
            references += sum(name in each for name in ("$ref", "$dynamicRef", "$recursiveRef"))
            unfolds = unfolds or any(name in each for name in ("unevaluatedProperties", "unevaluatedItems"))
            named = each.get("patternProperties")
            patterns = [*(named if isinstance(named, Mapping) else ()), each.get("pattern")]
            for pattern in patterns:
                try:
                    _matches(pattern if isinstance(pattern, str) else "", "")
                except (pa.ArrowInvalid, UnicodeEncodeError):
                    raise ValueError("a pattern that is no regular expression, or looks around or back") from None
        elif isinstance(each, list | tuple):
            left += each
    if unfolds and references > _MAX_UNFOLDED:
        raise ValueError(f"more than {_MAX_UNFOLDED} references beside what is unevaluated")


def _path(parts: Any) -> str:
    return "/" + "/".join(str(part) for part in parts)
