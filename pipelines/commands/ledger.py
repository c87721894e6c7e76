"""``bidbeam ledger``: its views in SQL."""

from __future__ import annotations

from typing import Annotated

import typer

from bidbeam.pipelines.answers import FORMATS, answer_text
from bidbeam.pipelines.commands.invocation import (
    JsonOption,
    LedgerArgument,
    StorageOption,
    read_storage,
    refuse_beam_options,
)

_ABOUT = "Ask a ledger in SQL, report on it, verify it."
app = typer.Typer(help=_ABOUT, no_args_is_help=True, rich_markup_mode=None)


@app.callback(help=_ABOUT)
def _ledger() -> None:
    """Holds the verbs together."""


RunOption = Annotated[str | None, typer.Option("--run", metavar="RUN_ID", help="Default: every run of the ledger.")]
RehearsalsOption = Annotated[bool, typer.Option("--rehearsals", help="The rehearsals' ledger instead.")]


@app.command("query")
def query(
    context: typer.Context,
    ledger: LedgerArgument,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="Read-only SQL over the ledger's views.", show_default=False)
    ],
    format_: Annotated[str, typer.Option("--format", metavar="|".join(FORMATS), help="How it is written.")] = "table",
    rehearsals: RehearsalsOption = False,
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
        from bidbeam.pipelines.jsonable import to_json

        print(to_json({"columns": table.column_names, "rows": table.to_pylist()}))
    else:
        print(answer_text(table, format_))
    return 0


@app.command("shell", short_help="Ask in SQL at a prompt, or from a pipe.")
def shell(
    context: typer.Context,
    ledger: LedgerArgument,
    rehearsals: RehearsalsOption = False,
    storage: StorageOption = None,
) -> int:
    """Ask a ledger in SQL at a prompt, or statement by statement from a pipe."""
    refuse_beam_options(context)
    options = read_storage(storage)

    from bidbeam.pipelines.shell import run_shell

    return run_shell(ledger, rehearsals=rehearsals, storage=options)


@app.command("report", short_help="Write one page: the bill, savings, cache, speed, market.")
def report(
    context: typer.Context,
    ledger: LedgerArgument,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")],
    run: RunOption = None,
    rehearsals: RehearsalsOption = False,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> int:
    """Write one self-contained page: the bill, savings, cache, speed, market and failures, with plots."""
    refuse_beam_options(context)
    options = read_storage(storage)

    from bidbeam.pipelines.jsonable import to_json
    from bidbeam.pipelines.report import write_report

    written = write_report(ledger, output, run_id=run, rehearsals=rehearsals, storage=options)
    print(to_json(written) if json else f"{written.output}: {written.size_bytes:,} bytes, runs: {len(written.runs):,}")
    return 0


@app.command("verify")
def verify(
    context: typer.Context,
    ledger: LedgerArgument,
    run: RunOption = None,
    rehearsals: RehearsalsOption = False,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> int:
    """Recompute every charge, sum and commitment from the files. Exits with 1 where something does not add up."""
    refuse_beam_options(context)
    options = read_storage(storage)

    from bidbeam.pipelines.jsonable import jsonable, to_json
    from bidbeam.pipelines.verify import verification_text, verify_ledger

    found = verify_ledger(ledger, run_id=run, rehearsals=rehearsals, storage=options)
    print(to_json({"ok": found.ok, **jsonable(found)}) if json else verification_text(found))
    return 0 if found.ok else 1
