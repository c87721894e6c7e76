"""Files of dated figures, prices or rates: YAML, JSON or CSV, each row a block as the pools file has it."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

from bidbeam.connectors.errors import ConfigError
from bidbeam.pipelines.config_check import fault, shown
from bidbeam.pipelines.yaml_text import MAX_BYTES, Node, load

KINDS = (".json", ".yaml", ".yml", ".csv")


def rows_of(path: str, section: str) -> list[Node]:
    """The rows of a file, as maps: a list, or the list under ``section``, or one block; of a CSV its lines.

    Raises ConfigError, with file and line, for what cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise ConfigError("is no kind of file that is read here", file=path, expected=" or ".join(KINDS))
    if suffix == ".csv":
        return _csv(path)
    root = load(path)
    if root.kind == "map" and section in root.entries:
        root = root.entries[section]
    rows = list(root.items) if root.kind == "list" else [root]
    for row in rows:
        if row.kind != "map":
            raise fault(row, f"is {shown(row)}", f"a list of {section}, each a mapping")
    return rows


def without(row: Node, *names: str) -> Node:
    """The row without some of its entries."""
    return replace(row, entries={name: entry for name, entry in row.entries.items() if name not in names})


def _csv(path: str) -> list[Node]:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes", file=path)
    try:
        lines = csv.DictReader(io.StringIO(raw.decode("utf-8-sig")), strict=True)
        return [_row(path, lines.line_num, entries) for entries in lines]
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", file=path) from None
    except csv.Error as error:
        raise ConfigError(f"is no CSV: {error}", file=path) from None


def _row(path: str, line: int, entries: dict[str | None, str | list[str] | None]) -> Node:
    if None in entries or None in entries.values():
        raise ConfigError("has more or fewer cells than the header names columns", file=path, line=line)
    cells = {
        name.strip(): Node("scalar", path, line, name.strip(), text.strip(), "text" if text.strip() else "null")
        for name, text in entries.items()
        if isinstance(name, str) and isinstance(text, str)
    }
    return Node("map", path, line, "", entries=cells)
