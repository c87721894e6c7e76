"""``bidbeam ledger``: the ledger's views in SQL."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bidbeam.pipelines.commands.invocation import (
    JsonOption,
    LedgerArgument,
    StorageOption,
    read_storage,
    refuse_beam_options,
)

if TYPE_CHECKING:
    import pyarrow as pa

app = typer.Typer(help="Query a ledger.", no_args_is_help=True, rich_markup_mode=None)
FORMATS = ("table", "csv", "json")


@app.callback()
def _ledger() -> None:
    """Query a ledger."""


@app.command("query")
def query(
    context: typer.Context,
    ledger: LedgerArgument,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="Read-only SQL over the ledger's views.", show_default=False)
    ],
    format_: Annotated[str, typer.Option("--format", metavar="|".join(FORMATS))] = "table",
    rehearsals: Annotated[bool, typer.Option("--rehearsals", help="The rehearsals' ledger instead.")] = False,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> int:
    """Run read-only SQL over the views of a ledger."""
    refuse_beam_options(context)
    if format_ not in FORMATS:
        from bidbeam.connectors.errors import ConfigError
        from bidbeam.pipelines.config_check import nearest

        raise ConfigError(
            f"unknown format {format_[:40]!r}",
            file="--format",
            expected=" or ".join(FORMATS),
            nearest=nearest(format_, FORMATS),
        )
    options = read_storage(storage)

    from bidbeam.connectors.ledger_reader import query_ledger

    table = query_ledger(ledger, sql, rehearsals=rehearsals, storage=options)
    if json:
        _print_json(table, as_object=True)
    elif format_ == "json":
        _print_json(table, as_object=False)
    elif format_ == "csv":
        _print_csv(table)
    else:
        _print_table(table)
    return 0


def _print_json(table: pa.Table, *, as_object: bool) -> None:
    """An array of row objects; as one object, it stands in ``rows`` beside the ``columns``."""
    from bidbeam.pipelines.jsonable import to_json

    rows = table.to_pylist()
    print(to_json({"columns": table.column_names, "rows": rows} if as_object else rows))


def _print_csv(table: pa.Table) -> None:
    from bidbeam.pipelines.show import cell_text

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(table.column_names)
    for batch in table.to_batches():
        columns = [[cell_text(value) for value in column.to_pylist()] for column in batch.columns]
        writer.writerows(zip(*columns, strict=True))


def _print_table(table: pa.Table) -> None:
    import pyarrow as pa

    from bidbeam.pipelines.show import cell_text, table_text

    numeric = [
        place
        for place, field in enumerate(table.schema)
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
    ]
    columns = [[cell_text(value, "NULL") for value in column.to_pylist()] for column in table.columns]
    print(table_text(table.column_names, list(zip(*columns, strict=True)), right=numeric))
    print(f"({table.num_rows:,} row{'' if table.num_rows == 1 else 's'})")
