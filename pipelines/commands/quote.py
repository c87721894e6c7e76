"""``bidbeam quote``: what a run would buy, from whom and for how much; sends nothing."""

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


def quote(
    context: typer.Context,
    job: JobArgument,
    run_date: RunDateOption = None,
    set_: SetOption = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Price its rehearsal, by earlier rehearsals.")] = False,
    json: JsonOption = False,
) -> int:
    """Price a job on its pools without sending anything."""
    refuse_beam_options(context)
    read = read_job(job, run_date, set_)

    from bidbeam.pipelines.jsonable import to_json
    from bidbeam.pipelines.progress import LogProgress, logs_noted
    from bidbeam.pipelines.show import quote_text

    with logs_noted(LogProgress()):
        # Imported late: Beam logs while it is being imported.
        from bidbeam.pipelines.quote import quote_job

        quoted = quote_job(read, rehearse=rehearse)
    print(to_json(quoted) if json else quote_text(quoted))
    return 0
