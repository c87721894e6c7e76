"""Writes the demo's prompts: records of ISO 3166 and ISO 4217, as the package pycountry ships them, under instructions.

    python examples/demo/make_prompts.py DIRECTORY

Each row is a chat of a long instruction, shared by all rows of its task, and a record. Rows are shuffled; half of them
go to a Parquet file, half to an Arrow file of the same columns.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pycountry

HERE = Path(__file__).parent
ROWS_PER_TASK = 140
SEED = 4217

CURRENCY_SCHEMA = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "name": {"type": "string", "maxLength": 60},
        "number": {"type": "string", "pattern": "^[0-9]{3}$"},
    },
    "required": ["code", "name", "number"],
    "additionalProperties": False,
}
DRAWER_SCHEMA = {"type": "string", "enum": ["state", "province", "district", "city", "other"]}

COLUMNS = pa.schema(
    [
        ("request_id", pa.string()),
        ("task", pa.dictionary(pa.int8(), pa.string())),
        ("record", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("max_tokens", pa.int32()),
        ("response_format", pa.string()),
    ]
)


def records() -> Iterator[tuple[str, str, str]]:
    """Task, id and text of each record, in the order of the standards."""
    for country in pycountry.countries:
        official = getattr(country, "official_name", None)
        named = f"{country.name}, officially {official}" if official else country.name
        yield "atlas", country.alpha_3, f"{named}; codes {country.alpha_2} and {country.alpha_3}"
    for currency in pycountry.currencies:
        yield "currency", currency.alpha_3, f"{currency.alpha_3}, {currency.name}, number {currency.numeric}"
    for division in pycountry.subdivisions:
        yield "division", division.code, f"{division.name}, {division.code}, {division.type}"


def json_format(name: str, schema: dict[str, Any]) -> str:
    """A `response_format` that holds the engine to a JSON schema."""
    return json.dumps({"type": "json_schema", "json_schema": {"name": name, "schema": schema}})


def rows() -> list[dict[str, Any]]:
    """The prompts, shuffled: a seeded choice of each task's records."""
    choice = random.Random(SEED)  # noqa: S311 - the same prompts every time, on purpose
    answers = {
        "atlas": (48, None),
        "currency": (48, json_format("currency", CURRENCY_SCHEMA)),
        "division": (8, json_format("drawer", DRAWER_SCHEMA)),
    }
    by_task: dict[str, list[dict[str, Any]]] = {task: [] for task in answers}
    instructions = {task: (HERE / "instructions" / f"{task}.txt").read_text(encoding="utf-8") for task in answers}
    for task, name, record in records():
        max_tokens, response_format = answers[task]
        by_task[task].append(
            {
                "request_id": f"{task}-{name}",
                "task": task,
                "record": record,
                "messages": [
                    {"role": "system", "content": instructions[task]},
                    {"role": "user", "content": record},
                ],
                "max_tokens": max_tokens,
                "response_format": response_format,
            }
        )
    chosen = [row for of_task in by_task.values() for row in choice.sample(of_task, ROWS_PER_TASK)]
    choice.shuffle(chosen)
    return chosen


def write(directory: Path) -> int:
    """Writes the two files and returns the number of rows."""
    table = pa.Table.from_pylist(rows(), schema=COLUMNS)
    half = table.num_rows // 2
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, half), directory / "first.parquet")
    second = table.slice(half)
    with pa.ipc.new_file(directory / "second.arrow", second.schema) as writer:
        writer.write_table(second)
    return table.num_rows


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_prompts.py DIRECTORY")
    print(f"{write(Path(sys.argv[1]))} prompts in {sys.argv[1]}")
