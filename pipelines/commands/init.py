"""``bidbeam init``: files to start from."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from bidbeam.pipelines.commands.invocation import JsonOption, refuse_beam_options


def init(
    context: typer.Context,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Where to write; made if need be.", show_default=False)
    ],
    json: JsonOption = False,
) -> int:
    """Write a job, pools and sample prompts to start from."""
    refuse_beam_options(context)

    from bidbeam.pipelines.init import write_starter
    from bidbeam.pipelines.jsonable import to_json

    written = write_starter(directory)
    if json:
        print(to_json({"directory": directory, "files": written}))
        return 0
    job = shlex.quote(written[0])
    print("\n".join(f"wrote {path}" for path in written))
    print(f"\nnext: bidbeam run {job} --rehearse   nothing is sent or spent")
    print(f"      bidbeam quote {job}            what it would cost")
    return 0
