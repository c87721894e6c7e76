"""The ledger's views as SQL: one for each table, and those derived from them in ``ledger_views.sql``.

The same derived views stand on two kinds of table views. ``views.sql``, in the ledger, is for any DuckDB: its table
views read the manifests at each query. Ours (``ledger_reader``) are given the files that the manifests list.

Charges and attempts are not deduplicated: a bundle that a runner executes twice writes the same part, byte for byte,
and a manifest lists a part once. Two rows with one id would be a fault that a view must not hide. Prices are: every
part of every run that paid by a schedule brings its rows, under the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import pyarrow as pa

from bidbeam.connectors.schemas import LEDGER_VERSION, TABLES
from bidbeam.connectors.store import Store

VERSION_LINE = "-- bidbeam ledger version "

DERIVED_VIEWS = (
    "cost_per_request", "cost_by_pool", "cost_by_kind", "cost_by_day", "cost_by_tag", "savings", "cache_savings",
    "regret", "reconciliation", "focus",
)  # fmt: skip
VIEWS = (*TABLES, *DERIVED_VIEWS)
"""Every view that users may name."""

_HEADER = """\
%(version)s
--
-- The ledger's views, for any DuckDB:  duckdb -init views.sql
-- They read the ledger in %(directory)s as it is at each query.
-- For a ledger that was moved or is reached by another path, say so first:
--     SET VARIABLE bidbeam_ledger = '/where/it/is/now';
-- Only files that the latest manifest of a run lists count; whatever else lies about is not seen.
-- Money is exact: add, subtract and multiply it. DuckDB's / and avg() turn decimals into floating point.

CREATE OR REPLACE MACRO bidbeam_ledger() AS
    rtrim(coalesce(getvariable('bidbeam_ledger'), %(literal)s), '/');

-- The same as a file pattern that matches only itself.
CREATE OR REPLACE MACRO bidbeam_pattern() AS regexp_replace(bidbeam_ledger(), '([*?\\[])', '[\\1]', 'g');

CREATE OR REPLACE VIEW bidbeam_manifests AS
SELECT manifest.*
FROM (
    SELECT from_json(content, '{
        "ledger_version": "INTEGER", "run_id": "VARCHAR", "run_date": "DATE", "status": "VARCHAR",
        "sequence": "BIGINT", "parts": [{
            "table": "VARCHAR", "path": "VARCHAR", "rows": "BIGINT", "size_bytes": "BIGINT", "sha256": "VARCHAR",
            "ledger_version": "INTEGER"}]}') AS manifest
    FROM read_text(bidbeam_pattern() || '/runs/*/*/manifest-*.json')
)
QUALIFY row_number() OVER (PARTITION BY manifest.run_id ORDER BY manifest.sequence DESC) = 1;
"""

_TABLE = """
CREATE OR REPLACE VIEW %(table)s AS
FROM (
SELECT %(columns)s
WHERE false
UNION ALL BY NAME
SELECT * EXCLUDE (filename)
FROM read_parquet(bidbeam_pattern() || '/%(table)s/**/*.parquet', union_by_name = true, filename = true,
                  hive_partitioning = false)
WHERE filename IN (
    SELECT bidbeam_ledger() || '/' || part.path
    FROM (SELECT unnest(parts) AS part FROM bidbeam_manifests)
    WHERE part."table" = '%(table)s'))%(once)s;
"""


def views_sql(ledger: Store) -> str:
    """The text of the ledger's ``views.sql``: the same for all its life, whatever runs are added."""
    header = _HEADER % {
        "version": f"{VERSION_LINE}{LEDGER_VERSION}",
        "directory": ledger.url.replace("\n", " "),
        "literal": sql_text(ledger.url),
    }
    tables = (_TABLE % {"table": table, "columns": _typed_columns(table), "once": _once(table)} for table in TABLES)
    return header + "".join(tables) + "\n" + derived_views_sql()


def table_view_sql(table: str, files: Sequence[str], *, same_columns: bool) -> str:
    """The view of one table over exactly these files, by the names that DuckDB opens them under.

    ``same_columns``: all are of this ledger version, so that DuckDB need not open each to learn its columns.
    """
    text = f"CREATE OR REPLACE VIEW {table} AS\nFROM (\nSELECT {_typed_columns(table)}\nWHERE false"
    if files:
        names = ", ".join(sql_text(escape_pattern(file)) for file in files)
        union = "false" if same_columns else "true"
        text += f"\nUNION ALL BY NAME\nFROM read_parquet([{names}], union_by_name = {union}, hive_partitioning = false)"
    return f"{text}){_once(table)};"


@cache
def derived_views_sql() -> str:
    """The derived views, which read the table views by their names."""
    return (resources.files(__package__) / "ledger_views.sql").read_text(encoding="utf-8")


def sql_text(value: str) -> str:
    """A string literal."""
    return "'" + value.replace("'", "''") + "'"


def escape_pattern(path: str) -> str:
    """A path that DuckDB's file patterns match as it stands."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def _once(table: str) -> str:
    if table != "prices":
        return ""
    return "\nQUALIFY row_number() OVER (PARTITION BY price_id, meter ORDER BY valid_from, fetched_at) = 1"


def _typed_columns(table: str) -> str:
    # Old files lack the columns that were added since: these give the view its columns, their order and types.
    return ", ".join(f'NULL::{duckdb_type(field.type)} AS "{field.name}"' for field in TABLES[table])


def duckdb_type(type_: pa.DataType) -> str:
    """DuckDB's name for a type of :mod:`bidbeam.connectors.schemas`."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_decimal(type_):
        return f"DECIMAL({type_.precision},{type_.scale})"
    return _DUCKDB_TYPES[type_]


_DUCKDB_TYPES = {
    pa.string(): "VARCHAR",
    pa.uuid(): "UUID",
    pa.timestamp("us", "UTC"): "TIMESTAMPTZ",
    pa.date32(): "DATE",
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
}
