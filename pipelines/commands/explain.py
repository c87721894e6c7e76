"""``bidbeam explain``: why a request went where it went, and what each attempt cost."""

from __future__ import annotations

from typing import Annotated

import typer

from bidbeam.pipelines.commands.invocation import (
    JsonOption,
    LedgerArgument,
    StorageOption,
    read_storage,
    refuse_beam_options,
)


def explain(
    context: typer.Context,
    ledger: LedgerArgument,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="As in the outputs.", show_default=False)],
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Default: the latest run that has the request.")
    ] = None,
    rehearsals: Annotated[bool, typer.Option("--rehearsals", help="The rehearsals' ledger instead.")] = False,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> int:
    """Show every bid for a request's lot, why the winner won, each attempt and each charge."""
    refuse_beam_options(context)
    options = read_storage(storage)

    from bidbeam.pipelines.explain import explain_request
    from bidbeam.pipelines.explain_text import render_text
    from bidbeam.pipelines.jsonable import to_json

    explanation = explain_request(ledger, request_id, run_id=run, storage=options, rehearsals=rehearsals)
    print(to_json(explanation) if json else render_text(explanation), end="\n" if json else "")
    return 0
