"""A ledger small enough to check by hand: two finished runs with one request id in common, and one that is running.

Run A buys from ``chutes`` (by the token) and ``own`` (by the second); run B from ``subnet``, priced in TAO.
"""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from bidbeam.connectors.ledger_manifest import PartFile, RunRow
from bidbeam.connectors.ledger_writer import ensure_ledger, write_manifest, write_part
from bidbeam.connectors.schemas import TABLES
from bidbeam.connectors.store import Store

A, B, C = "copy-2026-11-21-aaaaaaaa", "copy-2026-11-22-bbbbbbbb", "copy-2026-11-23-cccccccc"
DAY_A, DAY_B, DAY_C = date(2026, 11, 21), date(2026, 11, 22), date(2026, 11, 23)
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
LATE = datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC)
SECOND = Decimal("0.000197222222222")
TAO = Decimal("401.5")

PRICES = {
    "p-chutes": ("chutes", "USD", {"uncached_input": "0.0000001", "cached_input": "0.00000001", "output": "0.0000004"}),
    "p-own": ("own", "USD", {"accelerator_second": str(SECOND), "accelerator_idle_second": str(SECOND)}),
    "p-subnet": ("subnet", "TAO", {"uncached_input": "8E-12", "cached_input": "2E-12", "output": "3.2E-11"}),
}


def attempt_id(name: str) -> bytes:
    return uuid.uuid5(uuid.NAMESPACE_OID, name).bytes


def table_of(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in TABLES[table].names} for row in rows], TABLES[table])


def run_row(run_id: str, day: date, status: str, **more: Any) -> RunRow:
    started = datetime(day.year, day.month, day.day, 6, tzinfo=UTC)
    return RunRow(run_id, "copy", day, started, status, "{}", "0.1.0", **more)


def prices(*price_ids: str) -> list[dict[str, Any]]:
    return [
        {"price_id": key, "pool": pool, "meter": meter, "unit_price": Decimal(price), "currency": currency}
        for key in price_ids
        for pool, currency, meters in [PRICES[key]]
        for meter, price in meters.items()
    ]


def charge(
    run_id: str, day: date, request_id: str | None, attempt: str, price_id: str, meter: str, quantity: str, **more: Any
) -> dict[str, Any]:
    pool, currency, meters = PRICES[price_id]
    native = Decimal(quantity) * Decimal(meters[meter])
    rate = TAO if currency == "TAO" else Decimal(1)
    return {
        "charge_id": attempt_id(f"{attempt}|{meter}"), "run_id": run_id, "run_date": day, "request_id": request_id,
        "attempt_id": attempt_id(attempt), "pool": pool, "meter": meter, "quantity": Decimal(quantity),
        "unit_price": Decimal(meters[meter]), "currency": currency, "cost_native": native, "fx_rate": rate,
        "fx_source": "file" if currency == "TAO" else None, "cost": native * rate, "price_id": price_id,
        "charged_at": NOON, "tags": '{"team": "growth"}', **more,
    }  # fmt: skip


def attempt(run_id: str, request_id: str | None, name: str, pool: str, **more: Any) -> dict[str, Any]:
    return {
        "run_id": run_id, "request_id": request_id, "lot_id": "s001-r00000-l00000", "round": 1,
        "attempt_id": attempt_id(name), "attempt_no": 1, "kind": "primary", "pool": pool, "model": "small",
        "started_at": NOON, "finished_at": NOON + timedelta(milliseconds=1250), "status": "ok",
        "usage_source": "reported", "jurisdiction": "DE", "operator": "cloud",
        "endpoint_host": f"{pool}.example", **more,
    }  # fmt: skip


def request(run_id: str, request_id: str, row: int, **more: Any) -> dict[str, Any]:
    return {
        "run_id": run_id, "request_id": request_id, "source_file": "prompts/a.parquet", "source_row": row,
        "lot_id": "s001-r00000-l00000", "round": 1, "status": "served", "cost": Decimal(0),
        "tags": '{"team": "growth"}', **more,
    }  # fmt: skip


def _run_a() -> dict[str, list[dict[str, Any]]]:
    both = '{"team": "growth", "tier": "gold"}'
    lot = "s001-r00000-l00000"
    score = Decimal("0.0001")
    return {
        "requests": [
            request(A, "r1", 0, attempt_id=attempt_id("a1"), cost=Decimal("0.00001616")),
            request(A, "r2", 1, attempt_id=attempt_id("a3"), round=2, cost=Decimal("0.0002565277777775")),
            request(A, "r3", 2, attempt_id=attempt_id("a1"), shared_with="r1"),
            request(A, "r4", 3, status="dead", reason="budget"),
            request(A, "r1", 4, status="dead", reason="invalid", lot_id=None, round=None),
            request(A, "r6", 5, attempt_id=attempt_id("a6"), cost=Decimal("0.000009"), tags=both, tenant="acme"),
        ],
        "attempts": [
            attempt(A, "r1", "a1", "chutes", input_tokens=120, cached_tokens=96, output_tokens=32,
                    recount_input_tokens=118, recount_output_tokens=32, provider_cost=Decimal("0.00001617"),
                    provider_request_id="gen-1"),
            attempt(A, "r2", "a2", "chutes", input_tokens=100, status="failed", error_class="server",
                    error_message="HTTP 502 without a body", http_status=502),
            attempt(A, "r2", "a3", "own", round=2, attempt_no=2, kind="retry", started_at=NOON + timedelta(seconds=9),
                    finished_at=NOON + timedelta(seconds=10, milliseconds=250), input_tokens=100, cached_tokens=64,
                    output_tokens=20, recount_input_tokens=100, recount_output_tokens=20, operator="own",
                    usage_source="recount", endpoint_host=None),
            attempt(A, "r6", "a6", "chutes", input_tokens=50, output_tokens=10),
            attempt(A, None, "idle", "own", kind="overhead", lot_id=None, round=None, attempt_no=None, model=None),
        ],
        "charges": [
            charge(A, DAY_A, "r1", "a1", "p-chutes", "uncached_input", "24", baseline_cost=Decimal("0.00004848")),
            charge(A, DAY_A, "r1", "a1", "p-chutes", "cached_input", "96"),
            charge(A, DAY_A, "r1", "a1", "p-chutes", "output", "32"),
            charge(A, DAY_A, "r2", "a2", "p-chutes", "uncached_input", "100"),
            charge(A, DAY_A, "r2", "a3", "p-own", "accelerator_second", "1.250",
                   baseline_cost=Decimal("0.00003672")),
            charge(A, DAY_A, "r6", "a6", "p-chutes", "uncached_input", "50", tags=both,
                   baseline_cost=Decimal("0.000027")),
            charge(A, DAY_A, "r6", "a6", "p-chutes", "output", "10", tags=both),
            charge(A, DAY_A, None, "idle", "p-own", "accelerator_idle_second", "0.500", tags="{}"),
        ],
        "prices": prices("p-chutes", "p-own"),
        "baselines": [
            {"run_id": A, "baseline": name, "meter": meter, "unit_price": Decimal(price), "source": "job file"}
            for name, meter, price in (
                ("vertex", "uncached_input", "0.0000003"), ("vertex", "cached_input", "0.00000003"),
                ("vertex", "output", "0.0000012"), ("plain", "uncached_input", "0.0000002"),
                ("plain", "output", "0.000001"),
            )
        ],
        "lots": [{"run_id": A, "lot_id": lot, "round": round_, "model": "small", "requests": requests,
                  "input_tokens": tokens, "ideal_cached_tokens": cached}
                 for round_, requests, tokens, cached in ((1, 3, 270, 160), (2, 1, 100, 64))],
        "bids": [
            {"run_id": A, "round": 1, "lot_id": lot, "pool": "chutes", "eligible": True, "expected_cached_tokens": 160,
             "expected_output_tokens": 96, "expected_cost": score, "worst_case_cost": Decimal("0.0005"),
             "risk_cost": Decimal("0.00001"), "lateness_cost": Decimal(0), "finish_at": NOON + timedelta(minutes=5),
             "score": Decimal("0.00011"), "price_id": "p-chutes"},
            {"run_id": A, "round": 1, "lot_id": lot, "pool": "own", "eligible": True, "expected_cached_tokens": 160,
             "expected_output_tokens": 96, "expected_cost": Decimal("0.0003"), "worst_case_cost": Decimal("0.0006"),
             "risk_cost": Decimal(0), "lateness_cost": Decimal(0), "finish_at": NOON + timedelta(minutes=9),
             "score": Decimal("0.0003"), "price_id": "p-own"},
            {"run_id": A, "round": 1, "lot_id": lot, "pool": "far", "eligible": False,
             "reject_reason": "jurisdiction US is not in [DE, EEA]"},
            {"run_id": A, "round": 2, "lot_id": lot, "pool": "own", "eligible": True, "expected_cost": score,
             "risk_cost": Decimal(0), "lateness_cost": Decimal(0), "score": score, "price_id": "p-own"},
        ],
        "awards": [
            {"run_id": A, "round": 1, "lot_id": lot, "pool": "chutes", "score": Decimal("0.00011"), "runner_up": "own",
             "payment_rule": "pay_as_bid", "price_paid": score, "reserved": Decimal("0.0005")},
            {"run_id": A, "round": 2, "lot_id": lot, "pool": "own", "score": score, "payment_rule": "pay_as_bid",
             "price_paid": score, "reserved": Decimal("0.0006")},
        ],
        "auctions": [
            {"run_id": A, "round": 1, "lots": 1, "pools": 3, "objective": Decimal("0.00011"),
             "lp_bound": Decimal("0.0001"), "regret": Decimal("0.1"), "awarded": 1, "cleared_at": NOON},
        ],
    }  # fmt: skip


def _run_b() -> dict[str, list[dict[str, Any]]]:
    return {
        "requests": [request(B, "r1", 0, attempt_id=attempt_id("b1"), cost=Decimal("0.000005832992"))],
        "attempts": [
            attempt(B, "r1", "b1", "subnet", input_tokens=1064, cached_tokens=64, output_tokens=200,
                    recount_input_tokens=1064, recount_output_tokens=205, started_at=LATE, finished_at=LATE),
        ],
        "charges": [
            charge(B, DAY_B, "r1", "b1", "p-subnet", meter, quantity, charged_at=LATE)
            for meter, quantity in (("uncached_input", "1000"), ("cached_input", "64"), ("output", "200"))
        ],
        "prices": prices("p-subnet", "p-chutes"),
    }  # fmt: skip


def write_run(ledger: Store, row: RunRow, tables: dict[str, list[dict[str, Any]]], sequence: int = 0) -> list[PartFile]:
    parts = [
        write_part(ledger, table, row.run_date, row.run_id, "s001", table_of(table, rows))
        for table, rows in tables.items()
    ]
    write_manifest(ledger, row, parts, sequence)
    return parts


def write_small_ledger(ledger: Store) -> None:
    ensure_ledger(ledger)
    write_manifest(ledger, run_row(A, DAY_A, "running", starts=1), [], 0)
    done = run_row(
        A, DAY_A, "complete", finished_at=NOON, requests=6, served=4, dead=2, cost=Decimal("0.0003802988888885"),
        tags='{"team": "growth"}', starts=1,
    )  # fmt: skip
    write_run(ledger, done, _run_a(), 1)
    write_run(ledger, run_row(B, DAY_B, "complete", finished_at=LATE, requests=1, served=1, dead=0), _run_b())
    write_manifest(ledger, run_row(C, DAY_C, "running", starts=1), [], 0)
