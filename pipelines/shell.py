"""The ledger's views at a prompt: read-only SQL, statement by statement, until the input ends.

A statement may span lines and ends with ``;``. One that fails says why and ends nothing. On a terminal lines are
edited, remembered and completed; from a pipe they are read as they come, and nothing but the answers is written.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import UsageError
from bidbeam.pipelines.answers import FORMATS, answer_text

if TYPE_CHECKING:
    import duckdb

ROWS_SHOWN = 1_000
"""On a terminal; a pipe gets every row."""

_PROMPTS = ("bidbeam> ", "    ...> ")
_HISTORY_LINES = 2_000
_HELP = """\
.tables         the ledger's views
.schema VIEW    a view's columns
.format NAME    how answers are written: table, csv or json
.help           this
.quit           leave; so does the end of the input
Anything else is SQL, which may span lines and ends with a semicolon."""
_COMMANDS = (".tables", ".schema", ".format", ".help", ".quit", ".exit")

_PIECES = re.compile(
    r"""(?P<end>;)
      | (?P<comment>--[^\n]*(?:\n|\Z) | /\*.*?\*/)
      | [eE]'(?:\\.|''|[^'\\])*' | '(?:''|[^'])*' | "(?:""|[^"])*"
      | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
      | (?P<open>['"]|/\*|\$[A-Za-z_]*\$)""",
    re.VERBOSE | re.DOTALL,
)


def split_statements(text: str) -> tuple[list[str], str]:
    """The statements that ``text`` ends with ``;``, and what is left: quotes and comments are seen as what they are."""
    complete, at = [], 0
    for piece in _PIECES.finditer(text):
        if piece["open"]:
            break
        if piece["end"]:
            complete.append(text[at : piece.start()].strip())
            at = piece.end()
    return [statement for statement in complete if not _is_blank(statement)], text[at:]


def _is_blank(text: str) -> bool:
    """Whether there is nothing in it but space and comments."""
    return not _PIECES.sub(lambda piece: " " if piece["comment"] else piece[0], text).strip()


class Shell:
    """Answers statements on one connection of ``open_ledger``. ``failed`` counts those that could not be."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        *,
        most: int | None = None,
        write: Callable[[str], Any] = print,
        complain: Callable[[str], Any] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self.failed = 0
        self._connection, self._most, self._write, self._complain = connection, most, write, complain
        self._format = FORMATS[0]
        self._waiting = ""

    @property
    def prompt(self) -> str:
        """What asks for the next line."""
        return _PROMPTS[bool(self._waiting)]

    def drop(self) -> None:
        """Forgets what was typed of a statement that is not complete."""
        self._waiting = ""

    def take(self, line: str) -> bool:
        """Takes one line and answers what it completes. False: the user leaves."""
        if not self._waiting and line.lstrip().startswith("."):
            return self._command(line.split())
        statements, rest = split_statements(f"{self._waiting}{line}\n")
        self._waiting = "" if _is_blank(rest) else rest
        for statement in statements:
            self._answer(statement, self._most)
        return True

    def end(self) -> None:
        """The input is over: what stands there without a semicolon is meant all the same."""
        rest, self._waiting = self._waiting.strip(), ""
        if rest:
            self._answer(rest, self._most)

    def _answer(self, statement: str, most: int | None) -> None:
        from bidbeam.connectors.ledger_reader import run_query

        try:
            table = run_query(self._connection, statement, most=None if most is None else most + 1)
        except UsageError as error:
            self._fail(str(error))
            return
        cut = most is not None and table.num_rows > most
        self._write(answer_text(table.slice(0, most) if cut else table, self._format, cut=cut))

    def _fail(self, why: str) -> None:
        self.failed += 1
        self._complain(f"error: {why}")

    def _command(self, words: list[str]) -> bool:
        name, *arguments = words
        if name in {".quit", ".exit"}:
            return False
        if name == ".tables":
            self._write("\n".join(_described()))
        elif name == ".schema" and len(arguments) == 1:
            self._answer(f"SELECT column_name, column_type FROM (DESCRIBE {_quoted(arguments[0])})", None)  # noqa: S608
        elif name == ".format" and len(arguments) == 1 and arguments[0] in FORMATS:
            self._format = arguments[0]
        elif name == ".format":
            self._fail(f".format takes one of {', '.join(FORMATS)}")
        elif name == ".help":
            self._write(_HELP)
        else:
            near = difflib.get_close_matches(name, _COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near and near[0] != name else ".help says what there is"
            self._fail(f"{' '.join(words)} is no command here; {hint}")
        return True


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _described() -> list[str]:
    from bidbeam.connectors.ledger_views import DERIVED_VIEWS
    from bidbeam.connectors.schemas import TABLES
    from bidbeam.pipelines.show import aligned

    return [aligned([("tables", ", ".join(TABLES)), ("derived", ", ".join(DERIVED_VIEWS))])]


def run_shell(ledger: str, *, rehearsals: bool = False, storage: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """Answers standard input until it ends. Returns 0, or 2 where a statement that came from a pipe failed."""
    from bidbeam.connectors.ledger_reader import open_ledger

    with open_ledger(ledger, rehearsals=rehearsals, storage=storage) as connection:
        if sys.stdin.isatty() and sys.stdout.isatty():
            print(f"{ledger}, read-only; .help says what there is")
            with _line_editing(connection):
                _converse(Shell(connection, most=ROWS_SHOWN))
            return 0
        shell = Shell(connection)
        if all(shell.take(line.removesuffix("\n")) for line in sys.stdin):
            shell.end()
        return 2 if shell.failed else 0


def _converse(shell: Shell) -> None:
    while True:
        try:
            if not shell.take(input(shell.prompt)):
                return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            # It ends a statement, typed or running, and not the session.
            shell.drop()
            print()


@contextlib.contextmanager
def _line_editing(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Editing, history over sessions, and completion of names; nothing without readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    names = connection.execute("SELECT DISTINCT column_name FROM duckdb_columns() WHERE NOT internal").fetchall()
    words = _words(name for (name,) in names)

    def complete(typed: str, nth: int) -> str | None:
        found = [word for word in words if word.lower().startswith(typed.lower())]
        return found[nth] if nth < len(found) else None

    readline.set_completer_delims(" \t\n(),=<>+-*/;'\"")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    history = _history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_completer(None)
        readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.write_history_file(history)


def _words(columns: Iterable[str]) -> list[str]:
    from bidbeam.connectors.ledger_views import VIEWS

    return sorted({*columns, *VIEWS, *_COMMANDS})


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "bidbeam" / "sql_history"
