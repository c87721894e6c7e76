"""What pools did in the ledger's earlier runs, summed by run, pool and model: DuckDB counts, Python sees only sums.

The query's time is bounded, however large the ledger: only runs of a few dates are looked for (the partitions of the
others are not even listed), the newest ones first, at most ``MOST_RUNS`` of them, and at most about ``MOST_ROWS`` of
their attempts, a quarter of them of one run, in whole parts from all over it. A ledger that cannot be read teaches
nothing; it is no reason not to run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.ledger_manifest import Manifest, PartFile, manifests_of_dates
from bidbeam.connectors.store import Store

if TYPE_CHECKING:
    import duckdb

MOST_RUNS = 200
MOST_ROWS = 2_000_000

_log = logging.getLogger(__name__)
_SMALL = ("lots", "awards")
_LARGE = ("attempts", "charges")


@dataclass(frozen=True, slots=True)
class Deeds:
    """What one pool did with one model in one run. Tokens, microseconds, milliseconds and money (USD) are sums."""

    run_id: str
    pool: str
    model: str
    same_job: bool
    """Whether the run was one of the job that asks."""
    last_at: datetime
    ok: int = 0
    failed: int = 0
    """By the pool's fault. Refusals for want of room are ``refused``; the caller's faults are neither."""
    refused: int = 0
    retried: int = 0
    retried_here: int = 0
    """Answers to requests that had failed here, and those of them that it gave itself in the end."""
    minutes: int = 0
    minutes_up: int = 0
    """Minutes with enough attempts to tell, and those in which most of them succeeded."""
    answers: int = 0
    """Answered attempts at a lot's requests, of known usage: what the following sums are over."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """0 where the pool did not report any: that is what it charges."""
    output_tokens: int = 0
    planned_tokens: float = 0.0
    reusable_tokens: float = 0.0
    most_output_tokens: float = 0.0
    """What the lots said of these requests: input, ideal cached tokens (without those of a lot before that went
    elsewhere), and n x max_tokens."""
    busy_us: int = 0
    window_us: int = 0
    """Sum of the attempts' own times, and of the times from the first one's start to the last one's end."""
    latencies: Mapping[int, int] = field(default_factory=dict)
    """Histogram: floor(4 log2(microseconds)) -> answers."""
    lengths: Mapping[int, int] = field(default_factory=dict)
    """Histogram: output in hundredths of what was allowed -> answers."""
    compared_input: int = 0
    recount_input: int = 0
    compared_output: int = 0
    recount_output: int = 0
    """Reported tokens of the attempts that were recounted, and the recount."""
    provider_cost: Decimal = Decimal(0)
    compared_cost: Decimal = Decimal(0)
    """What the provider says it billed, and what we booked for the same attempts."""
    named: int = 0
    misnamed: int = 0
    """Answers whose model could be held against the one that was asked for, and those that named plainly another."""
    ok_cost: Decimal = Decimal(0)
    failed_cost: Decimal = Decimal(0)
    accelerator_ms: int = 0
    overhead_ms: int = 0
    """Milliseconds of an engine paid by time: at work on these attempts, and loading or idle in the run."""
    setup_ms: int = 0
    setups: int = 0
    """The part of it that loading took, and how often one was loaded or rented."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.run_id, self.pool, self.model

    @property
    def tokens(self) -> int:
        """What takes time: uncached input and output."""
        return self.input_tokens - self.cached_tokens + self.output_tokens


def read_deeds(ledger: Store, *, job: str, models: Sequence[str], around: Sequence[date], days: int) -> list[Deeds]:
    """The deeds of the runs whose run date is at most ``days`` before one of ``around``, or the day after it.

    ``around`` are today and the asking run's own date: a run for a date long past learns from its neighbours.
    ``job`` is the name by which runs count as the same job's.
    """
    dates = sorted({day + timedelta(1 - back) for day in around for back in range(days + 2)}, reverse=True)
    try:
        manifests = manifests_of_dates(ledger, dates, MOST_RUNS)
        files = _files(manifests)
        if not files["attempts"]:
            return []
        return _query(ledger, files, _same_job(manifests, job), models)
    except StoreError as error:
        _log.warning("the ledger's history is not used: %s", error)
        return []


def _same_job(manifests: Sequence[Manifest], job: str) -> list[str]:
    # A run id is name, date and eight digits of a digest.
    return [m.run_id for m in manifests if m.run_id[:-8] == f"{job}-{m.run_date.isoformat()}-"]


def _files(manifests: Sequence[Manifest]) -> dict[str, list[PartFile]]:
    """The files to read, by table: attempts and charges of the newest runs, as far as the bound on rows goes."""
    files: dict[str, list[PartFile]] = {table: [] for table in (*_SMALL, *_LARGE)}
    left = MOST_ROWS
    for manifest in manifests:
        if left <= 0:
            break
        of_run: dict[str, list[PartFile]] = {}
        for part in manifest.parts:
            of_run.setdefault(part.table, []).append(part)
        attempts = _spread_over(of_run.get("attempts", []), min(left, MOST_ROWS // 4))
        if not attempts:
            continue
        left -= sum(part.rows for part in attempts)
        # Attempts and their charges stand in parts of one name.
        names = {part.path.rpartition("/")[2] for part in attempts}
        files["attempts"] += attempts
        files["charges"] += [part for part in of_run.get("charges", []) if part.path.rpartition("/")[2] in names]
        for table in _SMALL:
            files[table] += of_run.get(table, [])
    return files


def _spread_over(parts: list[PartFile], rows: int) -> list[PartFile]:
    """As many of the parts as hold about so many rows, from all over the run: its prompts are sorted."""
    parts = sorted((part for part in parts if part.rows), key=lambda part: part.path)
    total = sum(part.rows for part in parts)
    if total <= rows:
        return parts
    every = -(-total // rows)
    return parts[::every]


def _query(
    ledger: Store, files: Mapping[str, Sequence[PartFile]], same_job: Sequence[str], models: Sequence[str]
) -> list[Deeds]:
    import duckdb

    from bidbeam.connectors.ledger_reader import open_files

    try:
        with open_files(ledger, files) as connection:
            return _deeds(connection, frozenset(same_job), models)
    except duckdb.Error as error:
        _log.warning("the ledger's history is not used: %s", str(error).partition("\n")[0])
        return []


def _deeds(connection: duckdb.DuckDBPyConnection, same_job: frozenset[str], models: Sequence[str]) -> list[Deeds]:
    statements = _statements()
    connection.execute("SET VARIABLE history_models = $1::VARCHAR[]", [list(models)])
    connection.execute(statements["tried"])
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name in ("outcomes", "minutes", "usage", "times", "money", "retried"):
        for row in _rows(connection, statements[name]):
            rows.setdefault(_key(row), {}).update({k: v for k, v in row.items() if v is not None})
    for name in ("latencies", "lengths"):
        for row in _rows(connection, statements[name]):
            rows.setdefault(_key(row), {}).setdefault(name, {})[row["place"]] = row["answers"]
    overhead = {(row.pop("run_id"), row.pop("pool")): row for row in _rows(connection, statements["overhead"])}
    found = []
    for key, row in rows.items():
        # Charges without an attempt among those that were read belong to parts that were not.
        if (last_us := row.pop("last_us", None)) is not None:
            last_at = datetime.fromtimestamp(last_us / 1_000_000, UTC)
            row |= {name: value for name, value in overhead.get(key[:2], {}).items() if value is not None}
            found.append(Deeds(same_job=key[0] in same_job, last_at=last_at, **row))
    return found


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["run_id"], row["pool"], row["model"]


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    result = connection.execute(sql)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


@cache
def _statements() -> dict[str, str]:
    """Name -> statement, of ``ledger_history.sql``; each is headed by a line ``-- name: …``."""
    text = (resources.files(__package__) / "ledger_history.sql").read_text(encoding="utf-8")
    parts = (part.partition("\n") for part in text.split("-- name: ")[1:])
    return {name.strip(): sql for name, _, sql in parts}
