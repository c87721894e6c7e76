"""``bidbeam pools``: whether each pool is there, serves the model, costs what, and how fast it is."""

from __future__ import annotations

from typing import Annotated

import typer

from bidbeam.pipelines.commands.invocation import (
    JobArgument,
    JsonOption,
    RunDateOption,
    SetOption,
    read_job,
    refuse_beam_options,
)


def pools(
    context: typer.Context,
    job: JobArgument,
    run_date: RunDateOption = None,
    set_: SetOption = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--free",
            help="Send each model of a remote pool one tiny request, booked in the ledger; or only what costs nothing.",
        ),
    ] = True,
    json: JsonOption = False,
) -> int:
    """Probe each pool: reachable, model served, prices now, latency, throughput. Ends with 3 where one has faults."""
    refuse_beam_options(context)
    read = read_job(job, run_date, set_)

    from bidbeam.pipelines.jsonable import to_json
    from bidbeam.pipelines.pools import probe_pools
    from bidbeam.pipelines.pools_text import pools_text
    from bidbeam.pipelines.progress import LogProgress, logs_noted

    with logs_noted(LogProgress()):
        report = probe_pools(read, measuring=measure)
    print(to_json(report) if json else pools_text(report))
    return report.exit_code
