"""The ledger's prompt: statements over lines, errors that end nothing, and the same read-only wall as a query's."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_ledger import A, write_small_ledger

from bidbeam.connectors.ledger_reader import open_ledger
from bidbeam.connectors.store import Store
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.shell import Shell, split_statements

BIDBEAM = [sys.executable, "-c", "from bidbeam.pipelines.cli import main; main()"]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store.at(str(tmp_path_factory.mktemp("ledger")))
    write_small_ledger(store)
    return store.url


class Session:
    """A shell whose answers and complaints are kept."""

    def __init__(self, shell: Shell, out: list[str], err: list[str]) -> None:
        self.shell, self.out, self.err = shell, out, err

    def type(self, *lines: str) -> bool:
        return [self.shell.take(line) for line in lines][-1]


@pytest.fixture
def session(ledger: str) -> Iterator[Session]:
    with open_ledger(ledger) as connection:
        out: list[str] = []
        err: list[str] = []
        yield Session(Shell(connection, most=3, write=out.append, complain=err.append), out, err)


@pytest.mark.parametrize(
    ("text", "statements", "rest"),
    [
        ("FROM runs;", ["FROM runs"], ""),
        ("SELECT 1; SELECT 2;\n", ["SELECT 1", "SELECT 2"], "\n"),
        ("SELECT ';' AS x;", ["SELECT ';' AS x"], ""),
        ("SELECT 'it''s; so';", ["SELECT 'it''s; so'"], ""),
        ('SELECT 1 AS "a;b";', ['SELECT 1 AS "a;b"'], ""),
        (r"SELECT e'\';';", [r"SELECT e'\';'"], ""),
        ("SELECT $$;$$;", ["SELECT $$;$$"], ""),
        ("SELECT 1 -- ; not yet\n", [], "SELECT 1 -- ; not yet\n"),
        ("SELECT /* ; */ 1;", ["SELECT /* ; */ 1"], ""),
        ("SELECT 'open; and\n", [], "SELECT 'open; and\n"),
        ("SELECT 1 /* open;\n", [], "SELECT 1 /* open;\n"),
        (";;; -- nothing\n;", [], ""),
    ],
)
def test_where_a_statement_ends(text: str, statements: list[str], rest: str) -> None:
    """A semicolon ends a statement unless it stands in a quote or a comment."""
    assert split_statements(text) == (statements, rest)


@given(st.text(alphabet="ab ;'\"-/*$\n\\", max_size=30))
def test_any_text_is_split_and_nothing_is_lost(text: str) -> None:
    """No input breaks it, what is left is the end of the text, and a statement is never blank."""
    statements, rest = split_statements(text)
    assert text.endswith(rest)
    assert all(statement and statement in text for statement in statements)


def test_a_statement_may_span_lines(session: Session) -> None:
    """Nothing is answered before the semicolon, and the prompt shows that more is expected."""
    first = session.shell.prompt
    session.type("SELECT count(*) AS n", "-- a comment; in between", "FROM charges")
    assert session.out == []
    assert session.shell.prompt != first
    session.type("WHERE pool = 'own';")
    assert session.out[-1].splitlines()[2:] == ["2", "(1 row)"]
    assert session.shell.prompt == first


def test_an_error_ends_nothing(session: Session) -> None:
    """A mistake is explained, with the nearest name, and the next statement is answered."""
    assert session.type("FROM charge;", "SELECT costs FROM charges;", "DROP VIEW charges;", "SELECT 1 AS one;")
    assert "did you mean charges?" in session.err[0]
    assert "did you mean cost?" in session.err[1]
    assert "read-only" in session.err[2]
    assert (session.shell.failed, len(session.out)) == (3, 1)


def test_a_long_answer_is_cut_and_says_so(session: Session) -> None:
    """On a terminal only so many rows are fetched; the order of the query decides which."""
    session.type("SELECT quantity FROM charges ORDER BY quantity DESC;")
    assert session.out[0].endswith("(the first 3 rows; there are more)")
    assert session.out[0].splitlines()[2].strip() == "1000.000"


def test_commands(session: Session) -> None:
    """Views, their columns, other formats and help; a misspelt command brings the nearest; leaving leaves."""
    session.type(".tables", ".schema awards", ".format csv", "SELECT 1 AS a, 'b;c' AS b;", ".help")
    tables, columns, answer, help_ = session.out
    assert "charges" in tables
    assert "cost_by_day" in tables
    assert "price_paid" in columns
    assert "DECIMAL(38,18)" in columns
    assert answer == "a,b\n1,b;c"
    assert ".schema" in help_
    session.type(".tabels", ".schema", ".format xml", ".schema nothing")
    assert "did you mean .tables?" in session.err[0]
    assert len(session.err) == 4
    assert not session.type(".quit")
    assert not session.type(".exit")


def test_what_stands_without_a_semicolon_at_the_end_is_meant(session: Session) -> None:
    """The last statement of a pipe needs no semicolon, and blank input is no statement."""
    session.shell.take("SELECT 7 AS n")
    session.shell.end()
    session.shell.end()
    assert "7" in session.out[0]
    assert (len(session.out), session.shell.failed) == (1, 0)


def test_from_a_pipe(ledger: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A script's answers go to stdout and its errors to stderr; one that failed makes the exit code 2, in the end."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT run_id\nFROM runs ORDER BY 1 LIMIT 1;\nFROM charges"))
    assert invoke(["ledger", "shell", ledger]) == 0
    out, err = capsys.readouterr()
    assert A in out
    assert "(11 rows)" in out
    assert err == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("FROM nowhere;\nSELECT 42;\n.quit\nSELECT 43;"))
    assert invoke(["ledger", "shell", ledger]) == 2
    out, err = capsys.readouterr()
    assert "42" in out
    assert "43" not in out
    assert "no view is called nowhere" in err


def test_no_statement_gets_through_that_a_query_would_not(session: Session, tmp_path: Path) -> None:
    """Files, settings and writes are out of reach, one by one and side by side."""
    session.type(
        f"COPY charges TO '{tmp_path / 'x'}';", "SELECT 1; SET threads = 1; ATTACH 'x.db';", "FROM '/etc/passwd';"
    )
    assert session.shell.failed == 4
    assert not (tmp_path / "x").exists()


def test_on_a_terminal(ledger: str, tmp_path: Path) -> None:
    """It prompts, answers, and remembers what was typed for the next session, readable by its owner alone."""
    host, terminal = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    process = subprocess.Popen(
        [*BIDBEAM, "ledger", "shell", ledger], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    os.write(host, b"SELECT count(*) AS n FROM runs;\nFROM nowhere;\n.quit\n")
    seen = b""
    try:
        while chunk := os.read(host, 4096):
            seen += chunk
    except OSError:
        # The other end is closed: the shell has ended.
        pass
    assert process.wait(timeout=20) == 0
    os.close(host)
    assert b"bidbeam> " in seen
    assert b"(1 row)" in seen
    assert b"no view is called nowhere" in seen
    history = tmp_path / "bidbeam" / "sql_history"
    assert "FROM nowhere;" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
