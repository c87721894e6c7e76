"""What the verbs share: the call itself, options that several take, and errors as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bidbeam.connectors.errors import BidbeamError, ConfigError, InputError, UsageError

if TYPE_CHECKING:
    from bidbeam.pipelines.job import Job


@dataclass(frozen=True, slots=True)
class Invocation:
    """What stands after ``--`` on the command line."""

    beam_options: tuple[str, ...] = ()


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job file.", show_default=False)]
RunDateOption = Annotated[
    str | None, typer.Option("--run-date", metavar="YYYY-MM-DD", help="Default: today in the job's time zone.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one value, such as budget.max_cost=25.00. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
LedgerArgument = Annotated[
    str, typer.Argument(metavar="LEDGER", help="The ledger's directory or URL.", show_default=False)
]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage", metavar="PROTOCOL.KEY=VALUE", help="fsspec option, such as s3.endpoint_url=… Repeatable."
    ),
]


def read_job(path: str, run_date: str | None, overrides: Sequence[str] | None) -> Job:
    """The job of a command; what is odd about it, but may be meant so, is told on stderr. Raises ConfigError."""
    from bidbeam.pipelines.config_check import day_from
    from bidbeam.pipelines.job import Job
    from bidbeam.pipelines.sampling_names import odd_sampling_keys

    day: date | None = None
    if run_date is not None:
        day = day_from(run_date)
        if day is None:
            raise ConfigError(f"{run_date[:40]!r} is not a date", file="--run-date", expected="YYYY-MM-DD")
    job = Job.from_yaml(path, run_date=day, set=tuple(overrides or ()))
    for odd in odd_sampling_keys(job):
        print(f"warning: {odd}", file=sys.stderr)
    return job


def refuse_beam_options(context: typer.Context) -> None:
    """Raises for options after ``--`` on a verb that runs no pipeline."""
    if context.obj is not None and context.obj.beam_options:
        raise UsageError(f"{context.command_path} runs no pipeline; only run takes options after --")


def read_storage(options: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """fsspec options by protocol, from ``protocol.key=value`` texts. Raises ConfigError, for a credential too."""
    from bidbeam.pipelines.job_file import storage_of
    from bidbeam.pipelines.overrides import apply, read_override
    from bidbeam.pipelines.yaml_text import Node

    root = Node("map", "--storage", None, "")
    for text in options or ():
        root = apply(root, read_override(text, "--storage"))
    return storage_of(root)


def error_object(error: BidbeamError) -> dict[str, Any]:
    """An error as JSON has it: what it is, what it says, and for a wrong key where that is."""
    from bidbeam.connectors.secrets import known_secrets, mask

    message = mask(str(error), known_secrets(environment=False))
    told: dict[str, Any] = {"type": type(error).__name__, "message": message, "exit_code": error.exit_code}
    if isinstance(error, InputError) and error.key is not None:
        told |= {name: getattr(error, name) for name in ("problem", "file", "line", "key")}
    if isinstance(error, ConfigError):
        told |= {name: getattr(error, name) for name in ("problem", "file", "line", "key", "expected", "nearest")}
    return told
