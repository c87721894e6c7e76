"""The command line: what is typed, what it ends with. Each verb has its file under ``commands``.

Exit codes: 0 done · 1 unexpected failure · 2 bad configuration or usage · 3 done, with more dead letters than
``tolerate`` · 4 interrupted, the same command resumes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from bidbeam.connectors.errors import BidbeamError, Interrupted
from bidbeam.pipelines.commands import explain, init, ledger, pools, quote, run
from bidbeam.pipelines.commands.invocation import Invocation, error_object
from bidbeam.pipelines.jsonable import to_json

_PARSER_ERRORS = tuple(kind for kind in typer.BadParameter.__mro__ if kind.__name__ in {"UsageError", "ClickException"})
_PARSERS_INTERRUPT = 130
"""What the parser turns a KeyboardInterrupt into; no verb returns it."""
_RESUMES = "interrupted; the same command resumes"
_TRACEBACK = "--traceback"
_EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong configuration or usage, nothing spent; 3 done, with more dead "
    "letters than tolerated; 4 interrupted, the same command resumes."
)

app = typer.Typer(
    name="bidbeam",
    help="Batch inference that buys its tokens: pools bid for the prompts, and a ledger says what each answer cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=_EXIT_CODES,
)


def _version(wanted: bool) -> None:
    if wanted:
        from bidbeam import __version__

        print(f"bidbeam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show where an error comes from; so does BIDBEAM_TRACEBACK=1.")
    ] = False,
) -> None:
    """Read before any verb; ``main`` has acted on both."""


app.command("init")(init.init)
app.command("run", epilog=_EXIT_CODES)(run.run)
app.command("quote")(quote.quote)
app.command("pools", short_help="Probe each pool: what it serves, for how much, how fast.")(pools.pools)
app.command("explain", short_help="Show why a request went where it went, and its cost.")(explain.explain)
app.add_typer(ledger.app, name="ledger")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code."""
    sys.exit(invoke(sys.argv[1:] if argv is None else argv))


def invoke(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code. What follows ``--`` is for Beam."""
    arguments, beam_options = _split(argv)
    traceback = _TRACEBACK in arguments or os.environ.get("BIDBEAM_TRACEBACK", "") not in {"", "0"}
    arguments = [argument for argument in arguments if argument != _TRACEBACK]
    as_json = "--json" in arguments
    invocation = Invocation(tuple(beam_options))
    try:
        code = app(args=arguments, prog_name="bidbeam", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _failed(_RESUMES, "Interrupted", Interrupted.exit_code, as_json)
    except Exception as error:
        if traceback:
            import traceback as traces

            from bidbeam.connectors.secrets import known_secrets, mask

            print(mask(traces.format_exc(), known_secrets(environment=True)), file=sys.stderr, end="")
        return _explained(error, as_json, traceback)
    if code == _PARSERS_INTERRUPT:
        return _failed(_RESUMES, "Interrupted", Interrupted.exit_code, as_json)
    return code if isinstance(code, int) else 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _explained(error: Exception, as_json: bool, traceback: bool) -> int:
    from bidbeam.connectors.secrets import known_secrets, mask

    if isinstance(error, BidbeamError):
        if as_json:
            print(to_json({"error": error_object(error)}))
        said = _plain(mask(str(error), known_secrets(environment=False)))
        # Who asked it to stop has done nothing wrong.
        print(said if isinstance(error, Interrupted) else f"error: {said}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, _PARSER_ERRORS):
        message: str = error.format_message()  # type: ignore[attr-defined]  # the parser's own errors all have it
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message, file=sys.stderr)
            return 2
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context is not None else ""
        return _failed(f"{message.rstrip('.')}{hint}", "UsageError", 2, as_json)
    first = mask((str(error).strip().splitlines() or [""])[0], known_secrets(environment=True))
    message = f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
    hint = "" if traceback else f" ({_TRACEBACK} or BIDBEAM_TRACEBACK=1 shows where)"
    return _failed(f"unexpected {message}{hint}", type(error).__name__, 1, as_json)


def _plain(message: str) -> str:
    """Without what a terminal would obey: names in files, and what providers say, come from anywhere."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in message)


def _failed(message: str, kind: str, code: int, as_json: bool) -> int:
    if as_json:
        print(to_json({"error": {"type": kind, "message": message, "exit_code": code}}))
    message = _plain(message)
    print(f"error: {message}" if code != Interrupted.exit_code else message, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
