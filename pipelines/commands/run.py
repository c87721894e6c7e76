"""``bidbeam run``: runs a job, or resumes it."""

from __future__ import annotations

from typing import Annotated

import typer

from bidbeam.pipelines.commands.invocation import JobArgument, JsonOption, RunDateOption, SetOption, read_job


def run(
    context: typer.Context,
    job: JobArgument,
    run_date: RunDateOption = None,
    set_: SetOption = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="The whole run with stand-ins behind the pools; nothing is sent or spent."),
    ] = False,
    retry_dead: Annotated[
        str | None,
        typer.Option("--retry-dead", metavar="RUN_ID", help="Run the dead letters of that run again, as a run."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: JsonOption = False,
) -> int:
    """Run a job; the same command resumes it. Options after -- go to Beam."""
    read = read_job(job, run_date, set_)
    if retry_dead is not None:
        from bidbeam.pipelines.retry import retried

        read = retried(read, retry_dead, rehearse=rehearse, run_date=read.run_date if run_date else None)

    from bidbeam.pipelines.jsonable import to_json
    from bidbeam.pipelines.progress import NullProgress, for_stream, logs_noted
    from bidbeam.pipelines.show import summary_text

    with NullProgress() if quiet else for_stream() as progress, logs_noted(progress):
        # Imported late: Beam logs while it is being imported.
        from bidbeam.pipelines.run import run_job

        summary = run_job(read, rehearse=rehearse, beam_options=list(context.obj.beam_options), progress=progress)
    print(to_json(summary) if json else summary_text(summary))
    return summary.exit_code
