"""An answer to SQL as text: a table for people, CSV for spreadsheets, JSON for programs. Decimals keep every digit."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("table", "csv", "json")


def answer_text(table: pa.Table, format_: str, *, cut: bool = False) -> str:
    """The answer in one of FORMATS, without a line end. ``cut``: there were more rows than these."""
    if format_ == "json":
        from bidbeam.pipelines.jsonable import to_json

        return to_json(table.to_pylist())
    return _csv(table) if format_ == "csv" else _table(table, cut)


def _csv(table: pa.Table) -> str:
    from bidbeam.pipelines.show import cell_text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for batch in table.to_batches():
        columns = [[cell_text(value) for value in column.to_pylist()] for column in batch.columns]
        writer.writerows(zip(*columns, strict=True))
    return text.getvalue().removesuffix("\n")


def _table(table: pa.Table, cut: bool) -> str:
    import pyarrow as pa

    from bidbeam.pipelines.show import cell_text, table_text

    numeric = [
        place
        for place, field in enumerate(table.schema)
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
    ]
    columns = [[cell_text(value, "NULL") for value in column.to_pylist()] for column in table.columns]
    text = table_text(table.column_names, list(zip(*columns, strict=True)), right=numeric)
    if cut:
        return f"{text}\n(the first {table.num_rows:,} rows; there are more)"
    return f"{text}\n({table.num_rows:,} row{'' if table.num_rows == 1 else 's'})"
