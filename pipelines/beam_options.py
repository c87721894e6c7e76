"""What stands after ``--``: Beam's options, held to what Beam knows before anything else is done with a job.

Beam itself takes any option and drops those that it does not know: a misspelt ``--runner`` would run on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from bidbeam.connectors.errors import ConfigError, UsageError
from bidbeam.connectors.near import near

if TYPE_CHECKING:
    import apache_beam as beam

_WHERE = "after --"
_OWN = ("--run-date", "--set", "--rehearse", "--retry-dead", "--quiet", "-q", "--json", "--traceback")
"""Ours, which stand before ``--``."""
_OF_JOB_SERVERS = ("portable", "flink", "spark")
"""Runners whose job server has options of its own, which nobody here knows."""
_PLAINLY = 0.85
"""How like an option of Beam's another one must be to be a misspelt one, where others may be right."""


def check_beam_options(given: Sequence[str]) -> None:
    """Whether Beam knows these options and the runner that they name. Raises ConfigError with the nearest name.

    Whatever a subclass of PipelineOptions that is imported declares is known.
    """
    if not given:
        return
    parser = _parser()
    try:
        told, unknown = parser.parse_known_args(list(given))
    except _Refused as error:
        raise ConfigError(str(error), file=_WHERE) from None
    runner = told.runner or ""
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    served = runner.lower().startswith(_OF_JOB_SERVERS)
    for text in unknown:
        _check_unknown(text, known, served=served)
    if runner:
        _check_runner(runner)


def _check_unknown(text: str, known: Sequence[str], *, served: bool) -> None:
    """Raises ConfigError for what no option is; ``served``: a job server may know it."""
    name = text.partition("=")[0]
    if name in _OWN:
        raise ConfigError(f"{name} is an option of bidbeam", file=_WHERE, expected="it before the --")
    if not name.startswith("-"):
        if served:
            return  # the value of an option that the job server knows
        raise ConfigError(f"{text[:40]!r} belongs to no option", file=_WHERE, expected="--option=value")
    meant = near(name, known, least=_PLAINLY) if served else near(name, known)
    if meant is not None or not served:
        raise ConfigError(f"{name[:60]} is no option of Beam's", file=_WHERE, nearest=meant)


def _check_runner(name: str) -> None:
    from apache_beam.options.pipeline_options import StandardOptions

    known = list(StandardOptions.KNOWN_RUNNER_NAMES)
    lower = {each.lower() for each in known}
    # Beam takes a runner's name in any case, without its last word too, or with the module that it is in.
    if "." not in name and not {name.lower(), f"{name.lower()}runner"} & lower:
        expected = "one of " + ", ".join(known)
        raise ConfigError(f"there is no runner {name[:60]!r}", file=_WHERE, key="--runner", expected=expected,
                          nearest=near(name, known))  # fmt: skip


def pipeline_of(flags: Sequence[str]) -> beam.Pipeline:
    """An empty pipeline with these options. Raises UsageError where its runner is not installed or lacks an option."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        return beam.Pipeline(options=PipelineOptions(list(flags)))
    except (ValueError, ImportError, AttributeError, SystemExit) as error:
        # Options that are right each by itself, and wrong together or here: a runner that is not installed, or that
        # needs another option.
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"Beam does not take these options: {' '.join(flags)}: {why}") from error


class _Refused(Exception):  # noqa: N818 - caught where it is raised
    """What a parser says of an option's value."""


def _parser() -> argparse.ArgumentParser:
    """One parser of every option that Beam knows."""
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    class Parser(_BeamArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _Refused(message)

    parser: Any = Parser(allow_abbrev=False, add_help=False)
    for kind in {str(kind): kind for kind in _all(PipelineOptions)}.values():
        if "_add_argparse_args" in vars(kind):
            with contextlib.suppress(argparse.ArgumentError):  # two that declare the same
                kind._add_argparse_args(parser)
    found: argparse.ArgumentParser = parser
    return found


def _all(kind: type[Any]) -> list[type[Any]]:
    return [each for child in kind.__subclasses__() for each in (child, *_all(child))]
