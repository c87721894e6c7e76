"""JSON Lines input: one pass finds line-aligned byte ranges and a schema, then any range is read by itself.

Blank lines are no rows. A line that is no JSON object, is not UTF-8, is too long or does not fit its columns becomes a
row of nulls with the reason in ``BAD``. A column whose values share no Arrow type (text here, a list there) holds each
value's JSON text instead, as does ``body`` of an OpenAI batch file, exactly as it stands in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from json import JSONDecodeError, decoder, dumps, loads
from re import compile as pattern
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pj

from bidbeam.connectors import input_lines
from bidbeam.connectors.input_lines import Lines, blocks, cut_units, find_lines, first_byte
from bidbeam.connectors.input_parts import Inspected, Unit, is_json_text, json_field
from bidbeam.connectors.input_schema import merge_fields
from bidbeam.connectors.wire_json import MAX_DEPTH, depth_of

BAD = "_bidbeam_bad"
"""The extra last column of what is read: null, or why the line is not a row; never any of the line's text."""

_BATCH_TEXT = ("custom_id", "method", "url")
_BATCH_BODY = "body"


class _BadLine(Exception):  # noqa: N818 - named for what it says
    """Why a line is not a row, in words that hold none of it."""


def is_openai_batch(schema: pa.Schema) -> bool:
    """Whether rows are OpenAI batch requests: text ``custom_id``, ``method``, ``url``, and ``body`` as JSON text.

    ``body`` holds ``model``, ``messages`` and the sampling of its row.
    """
    return all(
        name in schema.names and (pa.types.is_string(t := schema.field(name).type) or pa.types.is_large_string(t))
        for name in (*_BATCH_TEXT, _BATCH_BODY)
    )


def inspect(file: pa.NativeFile, unit_bytes: int) -> Inspected:
    """Reads the file once. Units are runs of lines of about ``unit_bytes``; ``ArrowInvalid`` where no line is a row."""
    size = file.size()
    units: list[Unit] = []
    columns: dict[str, pa.Field] = {}
    line, batch, any_row = 0, None, False
    for block in blocks(file, first_byte(file), size):
        if block.data is None:
            units.append(Unit(block.offset, block.offset + block.length, 1, block.length, line))
            line += 1
            continue
        lines = find_lines(block.data)
        units.extend(cut_units(block, lines, unit_bytes, line))
        line += lines.total
        if batch is None:
            batch = _looks_like_batch(block.data, lines)
            if batch:
                columns = {name: pa.field(name, pa.string()) for name in _BATCH_TEXT}
                columns[_BATCH_BODY] = json_field(_BATCH_BODY)
        fixed = {_BATCH_BODY} if batch else set()
        any_row |= _infer(block.data, lines, fixed, columns)
    if any(unit.rows for unit in units) and not any_row:
        raise pa.ArrowInvalid("none of its lines is a JSON object; JSON Lines has one object on each line")
    return Inspected(pa.schema(list(columns.values())), tuple(units))


def read(file: pa.NativeFile, start: int, end: int, line_start: int, schema: pa.Schema) -> pa.Table:
    """The rows of the bytes from ``start`` up to ``end``, which are whole lines, with the columns of ``schema``.

    Types are those of ``schema`` where JSON can be read as them, else ones that cast to them. Last comes ``BAD``.
    """
    tables = []
    line = line_start
    for block in blocks(file, start, end):
        if block.data is None:
            tables.append(_table([{}], schema, [f"line {line + 1}: {_too_long()}"], [line + 1]))
            line += 1
            continue
        lines = find_lines(block.data)
        if len(lines.starts):
            tables.append(_read_block(block.data, lines, line, schema))
        line += lines.total
    return pa.concat_tables(tables) if tables else _table([], schema, [], [])


def merge_columns(left: pa.Schema, right: pa.Schema) -> pa.Schema:
    """One schema over two JSON Lines files: where types do not meet, the column becomes JSON text in both."""
    columns = {field.name: field for field in left}
    for field in right:
        _merge_into(columns, field)
    return pa.schema(list(columns.values()))


# Values


_space = pattern(r"[ \t\n\r]*").match
# The standard library's own scanners: unlike ``loads`` they say where a value ends, so that its text can be kept.
_decoder: Any = decoder
_scan = _decoder.JSONDecoder().scan_once
_scan_string = _decoder.scanstring
_surrogate = pattern(r"\\u[dD][89a-fA-F]").search


def _split_object(text: str) -> dict[str, str]:
    """The JSON text of each value of an object, by key, exactly as it stands. ``_BadLine`` where it is none."""
    at = _space(text, 0).end()  # type: ignore[union-attr]
    if text[at : at + 1] != "{":
        raise _BadLine("not a JSON object")
    try:
        found = _scan_object(text, at + 1)
        if _surrogate(text):
            dumps(loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _BadLine("an escape is half a surrogate pair") from None
    except (JSONDecodeError, StopIteration, IndexError) as error:
        where = error.value if isinstance(error, StopIteration) else getattr(error, "pos", len(text))
        raise _BadLine(f"not valid JSON (at character {where + 1})") from None
    except ValueError:  # Python reads no number of thousands of digits
        raise _BadLine("a number has too many digits") from None
    except RecursionError:
        raise _BadLine("nested too deep") from None
    if depth_of(text) > MAX_DEPTH:
        raise _BadLine("nested too deep")
    return found


def _scan_object(text: str, at: int) -> dict[str, str]:
    found: dict[str, str] = {}
    at = _space(text, at).end()  # type: ignore[union-attr]
    closing = text[at] == "}"
    while not closing:
        if text[at] != '"':
            raise StopIteration(at)
        key, at = _scan_string(text, at + 1)
        at = _space(text, at).end()  # type: ignore[union-attr]
        if text[at] != ":":
            raise StopIteration(at)
        begin = _space(text, at + 1).end()  # type: ignore[union-attr]
        _, end = _scan(text, begin)
        if key in found:
            raise _BadLine("a key appears twice")
        found[key] = text[begin:end]
        at = _space(text, end).end()  # type: ignore[union-attr]
        if text[at] not in ",}":
            raise StopIteration(at)
        closing = text[at] == "}"
        if not closing:
            at = _space(text, at + 1).end()  # type: ignore[union-attr]
    at = _space(text, at + 1).end()  # type: ignore[union-attr]
    if at != len(text):
        raise StopIteration(at)
    return found


def _objects(data: bytes, lines: Lines) -> Iterator[dict[str, str] | _BadLine]:
    """Each line's values as JSON text, or why there are none."""
    for start, end in zip(lines.starts.tolist(), lines.ends.tolist(), strict=True):
        if end - start > input_lines.MAX_LINE_BYTES:
            yield _too_long()
            continue
        try:
            yield _split_object(data[start:end].decode())
        except UnicodeDecodeError:
            yield _BadLine("not valid UTF-8")
        except _BadLine as bad:
            yield bad


def _too_long() -> _BadLine:
    return _BadLine(f"longer than {input_lines.MAX_LINE_BYTES >> 20} MiB")


def _looks_like_batch(data: bytes, lines: Lines) -> bool | None:
    """Whether the first object of the block is an OpenAI batch request; None where the block has no object."""
    for found in _objects(data, lines):
        if not isinstance(found, _BadLine):
            return found.get("custom_id", "")[:1] == '"' and found.get(_BATCH_BODY, "")[:1] == "{"
    return None


# Schema


def _infer(data: bytes, lines: Lines, fixed: set[str], columns: dict[str, pa.Field]) -> bool:
    """Merge the block's columns into ``columns``; whether it has a row. ``fixed`` columns stay as they are."""
    if not len(lines.starts):
        return False
    if not fixed and _is_tidy(data, lines):
        try:
            fields = list(_parse(data, lines, None).schema)
        except pa.ArrowInvalid:
            pass
        else:
            for field in fields:
                _merge_into(columns, _usable(field))
            return True
    values: dict[str, list[str]] = {}
    any_row = False
    for found in _objects(data, lines):
        if not isinstance(found, _BadLine):
            any_row = True
            for key, text in found.items():
                values.setdefault(key, []).append(text)
    for key, texts in values.items():
        decided = key in fixed or (fixed and key in _BATCH_TEXT)
        if decided or (key in columns and is_json_text(columns[key])):
            continue
        _merge_into(columns, _infer_column(key, texts))
    return any_row


def _infer_column(key: str, texts: list[str]) -> pa.Field:
    rows = "\n".join(f'{{"x":{text}}}' for text in texts).encode("utf-8", "surrogatepass")
    try:
        found = pj.read_json(pa.BufferReader(rows), pj.ReadOptions(block_size=_block_size(max(map(len, texts)))))
    except pa.ArrowInvalid:
        return json_field(key)
    return _usable(found.schema.field("x").with_name(key))


def _usable(field: pa.Field) -> pa.Field:
    """What is read for an inferred field: text that looks like a time stays text, and a column with an object that
    never has a key, which Parquet cannot hold, is JSON text."""
    type_ = _map_type(field.type)
    return json_field(field.name) if type_ is None else pa.field(field.name, type_)


def _map_type(type_: pa.DataType) -> pa.DataType | None:
    if pa.types.is_timestamp(type_):
        return pa.string()
    if pa.types.is_list(type_):
        value = _map_type(type_.value_type)
        return None if value is None else pa.list_(value)
    if pa.types.is_struct(type_):
        children = [(child.name, _map_type(child.type)) for child in type_]
        return None if not children or any(child is None for _, child in children) else pa.struct(children)
    return type_


def _merge_into(columns: dict[str, pa.Field], field: pa.Field) -> None:
    known = columns.get(field.name)
    if known is None:
        columns[field.name] = field
    else:
        columns[field.name] = merge_fields(known, field) or json_field(field.name)


def _readable(type_: pa.DataType) -> pa.DataType:
    """The type that JSON is read as where ``type_`` is wanted; null where it can only have been null."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.list_(_readable(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([(child.name, _readable(child.type)) for child in type_])
    plain = (
        pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string,
        pa.types.is_decimal,
    )  # fmt: skip
    return type_ if any(test(type_) for test in plain) else pa.null()


# Rows


def _read_block(data: bytes, lines: Lines, line: int, schema: pa.Schema) -> pa.Table:
    count = len(lines.starts)
    texts = [field.name for field in schema if is_json_text(field)]
    if not texts and len(schema) and _is_tidy(data, lines):
        try:
            table = _parse(data, lines, _typed(schema))
        except pa.ArrowInvalid:
            pass
        else:
            # Every line starts with a brace and ends with one, so as many objects as lines are one on each line.
            if table.num_rows == count:
                return table.append_column(BAD, pa.nulls(count, pa.large_string()))
    rows: list[dict[str, str]] = []
    problems: list[str | None] = []
    for number, found in zip(lines.numbers.tolist(), _objects(data, lines), strict=True):
        bad = isinstance(found, _BadLine)
        rows.append({} if isinstance(found, _BadLine) else found)
        problems.append(f"line {line + number + 1}: {found}" if bad else None)
    return _table(rows, schema, problems, (lines.numbers + line + 1).tolist())


def _table(rows: list[dict[str, str]], schema: pa.Schema, problems: list[str | None], numbers: list[int]) -> pa.Table:
    """Rows of JSON texts by key to a table of ``schema``; rows that do not fit their types turn bad.

    ``problems`` says what is wrong with each row already, ``numbers`` are their lines.
    """
    typed = _typed(schema)
    wanted = set(typed.names)
    lines = [
        ("{" + ",".join(f"{dumps(key)}:{text}" for key, text in row.items() if key in wanted) + "}").encode(
            "utf-8", "surrogatepass"
        )
        for row in rows
    ]
    parts: list[pa.Table] = []
    misfits: list[int] = []
    _parse_or_halve(lines, 0, len(lines), typed, parts, misfits)
    for index in misfits:
        rows[index] = {}
        problems[index] = f"line {numbers[index]}: a value does not fit the type of its column"
    values = pa.concat_tables(parts) if parts else typed.empty_table()
    arrays = [
        pa.chunked_array([pa.array([_text(row.get(field.name)) for row in rows], pa.large_string())])
        if is_json_text(field)
        else values.column(field.name)
        for field in schema
    ]
    arrays.append(pa.chunked_array([pa.array(problems, pa.large_string())]))
    return pa.Table.from_arrays(arrays, names=[*schema.names, BAD])


def _text(value: str | None) -> str | None:
    return None if value == "null" else value


def _parse_or_halve(
    lines: list[bytes], start: int, end: int, typed: pa.Schema, parts: list[pa.Table], misfits: list[int]
) -> None:
    """Parse the lines from ``start`` up to ``end``, narrowing down to those that do not fit."""
    if start == end or not len(typed):
        return
    data = b"\n".join(lines[start:end])
    options = pj.ParseOptions(explicit_schema=typed, unexpected_field_behavior="ignore")
    try:
        longest = max(len(line) for line in lines[start:end])
        parts.append(pj.read_json(pa.BufferReader(data), pj.ReadOptions(block_size=_block_size(longest)), options))
    except pa.ArrowInvalid:
        if end - start == 1:
            misfits.append(start)
            parts.append(pa.Table.from_arrays([pa.nulls(1, field.type) for field in typed], schema=typed))
            return
        middle = (start + end) // 2
        _parse_or_halve(lines, start, middle, typed, parts, misfits)
        _parse_or_halve(lines, middle, end, typed, parts, misfits)


def _typed(schema: pa.Schema) -> pa.Schema:
    return pa.schema([(field.name, _readable(field.type)) for field in schema if not is_json_text(field)])


def _parse(data: bytes, lines: Lines, typed: pa.Schema | None) -> pa.Table:
    behaviour = "infer" if typed is None else "ignore"
    longest = int((lines.ends - lines.starts).max())
    return pj.read_json(
        pa.BufferReader(data),
        pj.ReadOptions(block_size=_block_size(longest)),
        pj.ParseOptions(explicit_schema=typed, unexpected_field_behavior=behaviour),
    )


def _is_tidy(data: bytes, lines: Lines) -> bool:
    """Whether every line is UTF-8, within the limit, and goes from a brace to a brace."""
    buffer = np.frombuffer(data, np.uint8)
    if not (np.all(buffer[lines.starts] == 123) and np.all(buffer[lines.ends - 1] == 125)):
        return False
    if int((lines.ends - lines.starts).max()) > input_lines.MAX_LINE_BYTES:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return not _may_be_deep(data, buffer)


def _may_be_deep(data: bytes, buffer: npt.NDArray[np.uint8]) -> bool:
    """Whether a line may nest deeper than is read: Arrow's parser takes a level of the stack for each. Brackets in
    texts count too; what is held back for them is looked at line by line."""
    if data.count(b"[") + data.count(b"{") - data.count(b"\n") <= MAX_DEPTH:
        return False
    opened = (buffer == 91) | (buffer == 123)
    closed = (buffer == 93) | (buffer == 125)
    depth = np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int32)
    # Within a line depth grows from where the lines before left it; texts may have left it anywhere.
    return bool(depth.max() - depth.min() > MAX_DEPTH)


def _block_size(longest: int) -> int:
    """Arrow's parser wants blocks longer than any line."""
    return max(1 << 20, 2 * longest + 64)
