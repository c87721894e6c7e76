"""Verify: every file, charge, sum and commitment of a ledger, recomputed from the files alone.

Files are hashed and their types compared first; the arithmetic then runs over those that can be read, so that one
damaged file is named once and does not hide the rest. Files are streamed and joins spill to disk: memory does not grow
with the ledger. Nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.errors import BidbeamError, UsageError
from bidbeam.connectors.ledger_manifest import Manifest, PartFile, latest_manifests, listed_files
from bidbeam.connectors.ledger_reader import REHEARSALS, ledger_store, no_ledger, no_run, open_files
from bidbeam.connectors.schemas import TABLES
from bidbeam.connectors.store import Store
from bidbeam.pipelines.verify_files import BATCH_ROWS, EXAMPLES, Check, Fault, check_charge_ids, check_files
from bidbeam.pipelines.verify_rules import PUBLISHED, RULES, SEEN_PLACES, Rule

if TYPE_CHECKING:
    import duckdb

OUTPUTS = "outputs of "
"""What the names of checks of a run's outputs begin with."""
_ENDED = ("complete", "incomplete")
_WITH_OUTPUTS = """
    SELECT run_id, run_date, status, requests, served, dead, cost, job FROM runs
    WHERE NOT EXISTS (SELECT 1 FROM attempts WHERE attempts.run_id = runs.run_id AND attempts.kind = 'probe')
    ORDER BY ALL
"""
"""Every run but the probes of pools, which answer nobody."""
_RECORDED = frozenset({"jurisdictions", "jurisdictions_deny", "operators"})
"""Constraints on labels that attempts record."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked and what came of it. ``skipped``: what could not be looked at, with the reason."""

    ledger: str
    runs: tuple[str, ...]
    files: int
    size_bytes: int
    checks: tuple[Check, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not any(check.failed for check in self.checks)


def verify_ledger(
    url: str,
    *,
    run_id: str | None = None,
    rehearsals: bool = False,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
) -> Verification:
    """Checks a ledger, or one run of it, and the outputs of its runs where they can be reached.

    Raises UsageError where there is no ledger or no such run, and StoreError for a manifest that cannot be read: then
    nothing says what should be there.
    """
    store = ledger_store(url, rehearsals=rehearsals, storage=storage)
    manifests = latest_manifests(store)
    if not manifests:
        raise UsageError(no_ledger(store, rehearsals=rehearsals))
    chosen = [manifest for manifest in manifests if run_id in (None, manifest.run_id)]
    if not chosen:
        raise UsageError(no_run(str(run_id), [manifest.run_id for manifest in reversed(manifests)]))
    parts = [part for manifest in chosen for part in manifest.parts]
    files, readable = check_files(store, parts)
    skipped: dict[str, str] = {}
    with open_files(store, listed_files([_only(manifest, readable) for manifest in chosen])) as ledger:
        checks = [
            files,
            check_charge_ids(store, [part for part in parts if part.table == "charges" and part.path in readable]),
            *(_check_rule(ledger, rule) for rule in RULES),
            _check_places(ledger),
            *_check_outputs(ledger, storage or {}, skipped, rehearsals=rehearsals),
        ]
    return Verification(
        store.url,
        tuple(manifest.run_id for manifest in chosen),
        len(parts),
        sum(part.size_bytes for part in parts),
        tuple(checks),
        skipped,
    )


def _only(manifest: Manifest, readable: set[str]) -> Manifest:
    kept = tuple(part for part in manifest.parts if part.path in readable)
    return Manifest(manifest.run_id, manifest.run_date, manifest.status, manifest.sequence, kept)


# -- arithmetic and commitments --


def _check_rule(ledger: duckdb.DuckDBPyConnection, rule: Rule) -> Check:
    checked = int(_rows(ledger, f"SELECT count(*) AS n FROM {rule.table}")[0]["n"])  # noqa: S608
    return _check_query(ledger, rule.name, rule.says, checked, rule.faults)


def _check_query(ledger: duckdb.DuckDBPyConnection, name: str, says: str, checked: int, faults: str) -> Check:
    import duckdb

    try:
        failed = int(_rows(ledger, f"SELECT count(*) AS n FROM ({faults})")[0]["n"])  # noqa: S608
        first = _rows(ledger, f"FROM ({faults}) ORDER BY ALL LIMIT {EXAMPLES}") if failed else []
    except duckdb.Error as error:
        # A number that no ledger of ours can hold: what is wrong with it stands in the message.
        return Check(name, says, checked, 1, ({"problem": str(error).splitlines()[0]},))
    return Check(name, says, checked, failed, tuple(first))


def _check_places(ledger: duckdb.DuckDBPyConnection) -> Check:
    from bidbeam.transforms.placement import eligible

    checked = failed = 0
    faults: list[Fault] = []
    for row in _rows(ledger, SEEN_PLACES):
        asked = {key: value for key, value in json.loads(row["placement"]).items() if key in _RECORDED}
        may, why = eligible(asked, {"jurisdiction": row["jurisdiction"], "operator": row["operator"]})
        checked += row["attempts"]
        if not may:
            failed += row["attempts"]
            faults.append({**row, "problem": why})
    says = "no attempt was made where the placement of its lot does not allow"
    return Check("attempts.jurisdiction", says, checked, failed, tuple(faults[:EXAMPLES]))


# -- outputs --


def _check_outputs(
    ledger: duckdb.DuckDBPyConnection,
    storage: Mapping[str, Mapping[str, Any]],
    skipped: dict[str, str],
    *,
    rehearsals: bool,
) -> Iterator[Check]:
    """The outputs of every run that has ended, where they stand and can be read; why not is noted in ``skipped``."""
    for run in _rows(ledger, _WITH_OUTPUTS):
        if run["status"] not in _ENDED:
            skipped[f"{OUTPUTS}{run['run_id']}"] = f"the run is {run['status']}"
            continue
        try:
            job = json.loads(run["job"] or "{}")
            output = Store.at(str(job["output"]), {**job.get("storage", {}), **storage})
            output = output.child(REHEARSALS) if rehearsals else output
            yield from _check_outputs_of(
                ledger, run, output.child(f"run_date={run['run_date']}", f"run_id={run['run_id']}")
            )
        except (BidbeamError, OSError, ValueError, KeyError, TypeError) as error:
            skipped[f"{OUTPUTS}{run['run_id']}"] = (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_outputs_of(ledger: duckdb.DuckDBPyConnection, run: Mapping[str, Any], run_dir: Store) -> Iterator[Check]:
    from bidbeam.transforms.finishing import read_manifest

    manifest = read_manifest(run_dir)
    if manifest is None:
        raise UsageError(f"there is no manifest in {run_dir.url}")
    run_id = str(run["run_id"])
    files = [
        PartFile(kind, file["path"], file["rows"], file["size_bytes"], file["sha256"])
        for kind in ("outputs", "dead_letters")
        for file in manifest[kind]
    ]
    yield _check_manifest(run, manifest, files)
    found, readable = check_files(run_dir, files)
    yield Check(f"{OUTPUTS}{run_id}: files", found.says, found.checked, found.failed, found.faults)
    served = [part for part in files if part.table == "outputs" and part.path in readable]
    ledger.register("read_once", pa.RecordBatchReader.from_batches(_PUBLISHED, _costs(run_dir, served)))
    ledger.execute("CREATE OR REPLACE TEMP TABLE published AS FROM read_once")
    ledger.unregister("read_once")
    ledger.execute("SET VARIABLE run_id = $1", [run_id])
    says = "every row's cost is that of its request, and every served request has one row"
    yield _check_query(ledger, f"{OUTPUTS}{run_id}: cost", says, sum(part.rows for part in served), PUBLISHED)


_PUBLISHED = pa.schema([("request_id", pa.string()), ("cost", TABLES["requests"].field("cost").type)])


def _costs(run_dir: Store, parts: Iterable[PartFile]) -> Iterator[pa.RecordBatch]:
    for part in parts:
        with run_dir.open_input(part.path) as source:
            for batch in pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=_PUBLISHED.names):
                yield batch.select(_PUBLISHED.names).cast(_PUBLISHED)


def _check_manifest(run: Mapping[str, Any], manifest: Mapping[str, Any], files: Sequence[PartFile]) -> Check:
    from decimal import Decimal

    rows = {kind: sum(part.rows for part in files if part.table == kind) for kind in ("outputs", "dead_letters")}
    pairs = {
        "status": (manifest["status"], run["status"]),
        "requests": (manifest["requests"], run["requests"]),
        "served": (manifest["served"], run["served"]),
        "dead": (sum(manifest["dead"].values()), run["dead"]),
        "cost": (Decimal(manifest["cost"]), run["cost"]),
        "rows of outputs": (rows["outputs"], run["served"]),
        "rows of dead letters": (rows["dead_letters"], run["dead"]),
    }
    faults = tuple({"what": what, "manifest": a, "ledger": b} for what, (a, b) in pairs.items() if a != b)
    says = "the manifest says what the ledger says of the run"
    return Check(f"{OUTPUTS}{run['run_id']}: manifest", says, len(pairs), len(faults), faults)


def _rows(ledger: duckdb.DuckDBPyConnection, sql: str, *parameters: Any) -> list[dict[str, Any]]:
    result = ledger.execute(sql, parameters)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


# -- for people --


def verification_text(found: Verification) -> str:
    """A row per check, then the first rows at fault of each that failed, and what was not looked at."""
    from bidbeam.pipelines.show import aligned, cell_text, one_line, table_text

    # What is checked for the outputs of each run is one row for all of them.
    sums: dict[tuple[bool, str], tuple[int, int]] = {}
    for check in found.checks:
        key = check.name.startswith(OUTPUTS), check.says
        checked, failed = sums.get(key, (0, 0))
        sums[key] = checked + check.checked, failed + check.failed
    body = [
        (f"of outputs: {says}" if of_outputs else says, f"{checked:,}", f"{failed:,}" if failed else "-")
        for (of_outputs, says), (checked, failed) in sums.items()
    ]
    lines = [table_text(("what must hold", "checked", "at fault"), body, right=(1, 2)), ""]
    for check in found.checks:
        if check.failed:
            lines.append(f"AT FAULT {check.name}: {check.failed:,} of {check.checked:,}")
            lines += [
                one_line("  " + ", ".join(f"{k}={cell_text(v, 'NULL')}" for k, v in fault.items()))
                for fault in check.faults
            ]
            lines.append("")
    lines += [f"not checked: {what}: {why}" for what, why in found.skipped.items()]
    failed = sum(bool(check.failed) for check in found.checks)
    lines.append(
        aligned(
            [
                ("ledger", found.ledger),
                ("runs", f"{len(found.runs):,}"),
                ("files", f"{found.files:,} of the ledger, {found.size_bytes:,} bytes"),
                ("result", "everything adds up" if found.ok else f"{failed} of {len(found.checks)} checks failed"),
            ]
        )
    )
    return "\n".join(lines)
