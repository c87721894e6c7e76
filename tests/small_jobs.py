"""Small jobs for tests of whole runs: written as files, run in this process, read back from what they wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.ledger_manifest import latest_manifest
from bidbeam.connectors.store import Store
from bidbeam.pipelines.job import Job

DAY = date(2026, 1, 2)
PRICE = {"input": "0.10", "cached_input": "0.01", "output": "0.40"}
LATIN = "Label this product by the words that follow and say nothing else at all please:"


def remote(name: str, base_url: str = "http://127.0.0.1:9/v1", **keys: Any) -> dict[str, Any]:
    """An endpoint of the pools file; ``price`` and the rest may be given."""
    pool: dict[str, Any] = {
        "name": name,
        "kind": "openai",
        "base_url": base_url,
        "models": ["tiny"],
        "price": PRICE,
        "capacity": {"concurrency": 4},
        "context": 4096,
    }
    pool |= keys
    pool["price"] = {"per": "1M tokens", "currency": "USD", **pool["price"]}
    return pool


def by_the_hour(name: str, **keys: Any) -> dict[str, Any]:
    """An engine of our own, for rehearsals: its model's source is never opened."""
    pool: dict[str, Any] = {"name": name, "kind": "vllm", "models": ["tiny"], "price": {"accelerator_hour": "0.71"}}
    return pool | keys


def prompts(count: int, *, start: int = 0, shared: str = LATIN) -> pa.Table:
    """Rows of id and prompt, all of them different, with one long beginning."""
    numbers = range(start, start + count)
    return pa.table({"id": [f"q{n}" for n in numbers], "prompt": [f"{shared} item {n} of the list" for n in numbers]})


def write_job(
    home: Path,
    rows: pa.Table | None,
    pools: Sequence[Mapping[str, Any]],
    *,
    models: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """Writes the job file, its pools and (unless None) its input; ``keys`` are the job file's own."""
    home.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        (home / "in").mkdir(exist_ok=True)
        pq.write_table(rows, home / "in" / "a.parquet")
    document: dict[str, Any] = {
        "name": "small",
        "input": str(home / "in" / "*.parquet"),
        "output": str(home / "out"),
        "ledger": str(home / "ledger"),
        "model": "tiny",
        "prompt": {"id": "id", "column": "prompt"},
        "sampling": {"max_tokens": 8, "temperature": 0},
        "auction": {"rounds": 2},
        "pools": "pools.yaml",  # or the list itself
        **keys,
    }
    # JSON is YAML.
    (home / "job.yaml").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    (home / "pools.yaml").write_text(json.dumps({"models": models or {"tiny": {}}, "pools": list(pools)}))
    return home / "job.yaml"


def make_job(home: Path, rows: pa.Table | None, pools: Sequence[Mapping[str, Any]], **keys: Any) -> Job:
    return Job.from_yaml(write_job(home, rows, pools, **keys), run_date=DAY)


@dataclass(frozen=True)
class Written:
    """What a run left: its tables, and its output's manifest."""

    manifest: dict[str, Any]
    run_dir: Path
    outputs: pa.Table
    dead: pa.Table
    ledger: dict[str, pa.Table]

    def rows(self, table: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ledger[table].to_pylist()
        return found

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Attempts at requests: without the accelerator's overhead."""
        return [row for row in self.rows("attempts") if row["kind"] != "overhead"]


def written(job: Job, *, rehearse: bool = False) -> Written:
    """Reads a run back, trusting nothing but what the manifests list, and holds the files to them."""
    output, ledger_dir = Path(job.output), Path(job.ledger)
    if rehearse:
        output, ledger_dir = output / "_rehearsals", ledger_dir / "_rehearsals"
    run_dir = output / f"run_date={job.run_date}" / f"run_id={job.run_id}"
    name = next(name for name in ("_SUCCESS", "_INCOMPLETE") if (run_dir / name).exists())
    manifest = json.loads((run_dir / name).read_bytes())
    for kind in ("outputs", "dead_letters"):
        there = {str(path.relative_to(run_dir)) for path in (run_dir / kind).glob("*")}
        assert there == {file["path"] for file in manifest[kind]}, f"{kind} holds what the manifest does not list"
    latest = latest_manifest(Store.at(str(ledger_dir)), job.run_date, job.run_id)
    assert latest is not None
    tables: dict[str, list[pa.Table]] = {}
    for part in latest.parts:
        table = pq.ParquetFile(ledger_dir / part.path).read()
        assert table.num_rows == part.rows
        tables.setdefault(part.table, []).append(table)
    ledger = {name: pa.concat_tables(parts, promote_options="permissive") for name, parts in tables.items()}
    for name in ("attempts", "charges", "requests", "awards", "bids", "lots", "auctions", "prices"):
        ledger.setdefault(name, pa.table({}))
    return Written(
        manifest,
        run_dir,
        _files(run_dir, manifest["outputs"]),
        _files(run_dir, manifest["dead_letters"]),
        ledger,
    )


def _files(run_dir: Path, files: Sequence[Mapping[str, Any]]) -> pa.Table:
    tables = [pq.ParquetFile(run_dir / file["path"]).read() for file in files]
    for table, file in zip(tables, files, strict=True):
        assert table.num_rows == file["rows"]
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def total(rows: Sequence[Mapping[str, Any]], column: str = "cost") -> Decimal:
    return sum((row[column] for row in rows if row[column] is not None), Decimal(0))


def check_conserved(found: Written, rows: int) -> None:
    """Rows and money are conserved: what every run must show, whatever happened in it."""
    assert found.outputs.num_rows + found.dead.num_rows == rows
    requests, attempts, charges = found.rows("requests"), found.rows("attempts"), found.rows("charges")
    assert len(requests) == rows
    assert len({(row["source_file"], row["source_row"]) for row in requests}) == rows
    served = [row for row in requests if row["status"] == "served"]
    assert len(served) == found.outputs.num_rows == found.manifest["served"]
    assert found.manifest["requests"] == rows
    reasons: dict[str, int] = {}
    for row in found.dead.to_pylist() if found.dead.num_rows else []:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    assert reasons == found.manifest["dead"]

    by_attempt: dict[Any, Decimal] = {}
    for charge in charges:
        assert charge["cost_native"] == charge["quantity"] * charge["unit_price"]
        by_attempt[charge["attempt_id"]] = by_attempt.get(charge["attempt_id"], Decimal(0)) + charge["cost"]
    assert len({charge["charge_id"] for charge in charges}) == len(charges)
    assert len({attempt["attempt_id"] for attempt in attempts}) == len(attempts)
    assert by_attempt.keys() <= {attempt["attempt_id"] for attempt in attempts}
    overhead = {row["attempt_id"] for row in attempts if row["kind"] == "overhead"}
    cost = total(charges)
    assert cost == Decimal(found.manifest["cost"]) == total(found.rows("runs"))
    waste = sum((by_attempt.get(attempt_id, Decimal(0)) for attempt_id in overhead), Decimal(0))
    assert total(requests) == cost - waste
    if found.outputs.num_rows:
        dead_cost = total([row for row in requests if row["status"] == "dead"])
        assert total(found.outputs.select(["cost"]).to_pylist()) == total(requests) - dead_cost
    served_by = {row["attempt_id"] for row in attempts if row["status"] == "ok" and row["kind"] in ("primary", "retry")}
    nobody = sum((cost for attempt_id, cost in by_attempt.items() if attempt_id not in served_by), Decimal(0))
    assert Decimal(found.manifest["wasted"]) == nobody
    pools = {pool["pool"]: pool for pool in found.manifest["pools"]}
    for name, pool in pools.items():
        mine = [attempt for attempt in attempts if attempt["pool"] == name]
        assert Decimal(pool["cost"]) == total([charge for charge in charges if charge["pool"] == name])
        for column in ("input_tokens", "cached_tokens", "output_tokens"):
            assert pool[column] == sum(attempt[column] or 0 for attempt in mine)
        assert pool["served"] == sum(row["status"] == "ok" and row["kind"] not in ("overhead", "hedge") for row in mine)
    assert set(pools) == {attempt["pool"] for attempt in attempts}
