"""Read-only SQL over a ledger: DuckDB, locked to the files that the manifests list.

A local ledger's files are opened by DuckDB itself, a remote one's through the store. Either way the connection can
reach nothing else: no other file, no network, no extension, no setting, and no statement but a SELECT.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.ledger_manifest import PartFile, latest_manifests, listed_files
from bidbeam.connectors.ledger_views import VIEWS, derived_views_sql, escape_pattern, sql_text, table_view_sql
from bidbeam.connectors.near import near, nears
from bidbeam.connectors.schemas import LEDGER_VERSION, TABLES
from bidbeam.connectors.store import Store

REHEARSALS = "_rehearsals"
"""The directory in a ledger that is the ledger of the rehearsals."""

_NEAREST = 3
"""Names that a message tells of many."""

_UNKNOWN_TABLE = re.compile(r"Table with name (.+?) does not exist")
_UNKNOWN_COLUMN = re.compile(
    r'Referenced column "([^"]+)" (?:was )?not found'
    r'|does not have a column named "([^"]+)"'
    r'|Referenced table "[^"]+" not found'
)


@contextmanager
def open_ledger(
    url: str, *, rehearsals: bool = False, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the ledger's views, as its manifests stand now; runs added later do not show in it.

    ``storage`` is fsspec's options by protocol, as in a job. Raises UsageError where there is no ledger, or none with
    a run yet. Give users' SQL to :func:`run_query`, which lets only SELECTs through.
    """
    store = ledger_store(url, rehearsals=rehearsals, storage=storage)
    manifests = latest_manifests(store)
    if not manifests:
        raise UsageError(no_ledger(store, rehearsals=rehearsals))
    with open_files(store, listed_files(manifests)) as connection:
        yield connection


@contextmanager
def open_files(store: Store, files: Mapping[str, Sequence[PartFile]]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the ledger's views over these files alone, by table."""
    with duckdb.connect(":memory:") as connection:
        root = _reachable(connection, store)
        names = {table: [f"{root}{part.path}" for part in files.get(table, ())] for table in TABLES}
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET parquet_metadata_cache = true")
        allowed = [name for of_table in names.values() for name in of_table]
        _lock(connection, allowed)
        for table, of_table in names.items():
            same = all(part.ledger_version == LEDGER_VERSION for part in files.get(table, ()))
            connection.execute(table_view_sql(table, of_table, same_columns=same))
        connection.execute(derived_views_sql())
        connection.execute("SET lock_configuration = true")
        yield connection


def ledger_store(
    url: str, *, rehearsals: bool = False, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> Store:
    """The ledger's store, or that of its rehearsals."""
    store = Store.at(url, storage)
    return store.child(REHEARSALS) if rehearsals else store


def query_ledger(
    url: str, sql: str, *, rehearsals: bool = False, storage: Mapping[str, Mapping[str, Any]] | None = None
) -> pa.Table:
    """The answer to one SELECT over the ledger's views, decimals exact. Raises UsageError with what to do."""
    _single_select(sql)
    with open_ledger(url, rehearsals=rehearsals, storage=storage) as connection:
        return run_query(connection, sql)


def run_query(connection: duckdb.DuckDBPyConnection, sql: str, *, most: int | None = None) -> pa.Table:
    """One SELECT (WITH, VALUES, FROM, DESCRIBE, SHOW and SUMMARIZE count as one) on a connection of ``open_ledger``.

    ``most`` cuts the answer to so many rows. Raises UsageError for anything else, and with DuckDB's message and the
    nearest name where the SQL is at fault.
    """
    _single_select(sql)
    try:
        answer = connection.sql(sql)
        return (answer if most is None else answer.limit(most)).to_arrow_table()
    except duckdb.Error as error:
        raise UsageError(_explained(connection, error)) from None


def _reachable(connection: duckdb.DuckDBPyConnection, store: Store) -> str:
    """What stands before a part's path for DuckDB to open it."""
    if store.is_local:
        return f"{store.url.rstrip('/')}/"
    from bidbeam.connectors.ledger_files import PROTOCOL, StoreFiles

    connection.register_filesystem(StoreFiles(store))
    return f"{PROTOCOL}://"


def _lock(connection: duckdb.DuckDBPyConnection, allowed: list[str]) -> None:
    # Large sorts and joins spill there; DuckDB's own default is the working directory.
    spill = os.path.join(tempfile.gettempdir(), f"bidbeam-sql-{os.getpid()}")  # noqa: PTH118 - a plain string for SQL
    connection.execute(f"SET temp_directory = {sql_text(spill)}")
    paths = ", ".join(sql_text(name) for path in allowed for name in {path, escape_pattern(path)})
    connection.execute(f"SET allowed_paths = [{paths}]")
    for setting in ("python_enable_replacements", "autoinstall_known_extensions", "autoload_known_extensions"):
        connection.execute(f"SET {setting} = false")
    connection.execute("SET enable_external_access = false")


def no_ledger(store: Store, *, rehearsals: bool) -> str:
    """Why there is nothing to read, and what to do."""
    if rehearsals:
        return f"no rehearsal has been written to {store.url}; run one with: bidbeam run JOB --rehearse"
    if any(entry.name.startswith(f"{REHEARSALS}/runs/") for entry in store.list(f"{REHEARSALS}/runs/")[:1]):
        return f"{store.url} holds rehearsals only; read them with --rehearsals, or run the job without --rehearse"
    if store.exists("views.sql"):
        return f"the ledger {store.url} has no run yet; start one with: bidbeam run JOB"
    return f"{store.url} is not a ledger; give the directory that a job names as its ledger and has run with"


def no_run(run_id: str, known: Sequence[str]) -> str:
    """What to say of a run that a ledger does not have; ``known`` are those that it has, the latest first."""
    like = nears(run_id, known, _NEAREST)
    if like:
        return f"the ledger has no run {run_id}; the nearest: {', '.join(like)}"
    more = f" and {len(known) - _NEAREST:,} more" if len(known) > _NEAREST else ""
    return f"the ledger has no run {run_id}, nor one of a name like it; it has {', '.join(known[:_NEAREST])}{more}"


def _single_select(sql: str) -> None:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise UsageError(str(error)) from None
    if len(statements) != 1:
        raise UsageError(f"give one SELECT, not {len(statements)} statements" if statements else "give a SELECT")
    kind = statements[0].type
    if kind != duckdb.StatementType.SELECT:
        name = "PIVOT without an IN list" if kind == duckdb.StatementType.MULTI else kind.name
        raise UsageError(f"the ledger is read-only: only a SELECT is answered, not {name}")


def _explained(connection: duckdb.DuckDBPyConnection, error: duckdb.Error) -> str:
    text = str(error)
    if matched := _UNKNOWN_TABLE.search(text):
        meant = near(matched[1], VIEWS)
        hint = f"did you mean {meant}?" if meant else f"there are: {', '.join(VIEWS)}"
        return f"no view is called {matched[1]}; {hint}"
    if (matched := _UNKNOWN_COLUMN.search(text)) and (wanted := matched[1] or matched[2]):
        columns = [name for (name,) in connection.execute(_COLUMN_NAMES).fetchall()]
        # A column of that very name may stand in some other view.
        meant = near(wanted, (name for name in columns if name.lower() != wanted.lower()))
        hint = f"; did you mean {meant}?" if meant else ""
        return f"no column is called {wanted}{hint}\n{text}"
    return text


_COLUMN_NAMES = "SELECT DISTINCT column_name FROM duckdb_columns() WHERE NOT internal ORDER BY column_name"
