"""Why a request went where it went: its lot's bids, the award, each attempt and each charge, from the ledger alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.ledger_reader import no_run, open_ledger
from bidbeam.connectors.near import nears
from bidbeam.pipelines.dead_message import dead_message
from bidbeam.pipelines.explain_text import render_text
from bidbeam.pipelines.explanation import Attempt, Bid, Charge, Clearing, Explanation, exact_sum

if TYPE_CHECKING:
    import duckdb

__all__ = ["Explanation", "explain_request", "render_text"]


def explain_request(
    ledger_url: str,
    request_id: str,
    *,
    run_id: str | None = None,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    rehearsals: bool = False,
) -> Explanation:
    """The request's story in ``run_id``, or in the latest run that had it.

    Raises UsageError for a run or a request that the ledger does not have, naming the nearest ones.
    """
    with open_ledger(ledger_url, storage=storage, rehearsals=rehearsals) as ledger:
        runs = _rows(ledger, _RUNS_OF_REQUEST, request_id)
        wanted = [run for run in runs if run_id in (None, run["run_id"])]
        if not wanted:
            raise UsageError(_unknown(ledger, request_id, run_id, [str(run["run_id"]) for run in runs]))
        run = wanted[0]
        same_id = _rows(ledger, _REQUEST, run["run_id"], request_id)
        request = same_id[0]
        attempts = _attempts(ledger, request)
        return Explanation(
            run_id=run["run_id"],
            run_date=run["run_date"],
            run_status=run["status"],
            other_runs=tuple(str(other["run_id"]) for other in runs if other["run_id"] != run["run_id"]),
            request_id=request_id,
            rows_with_this_id=len(same_id),
            message=None
            if request["reason"] is None
            else dead_message(run, request_id, request["reason"], storage or {}, rehearsals=rehearsals),
            clearings=_clearings(ledger, request, attempts),
            attempts=attempts,
            cost=exact_sum(
                charge.cost for attempt in attempts if attempt.request_id == request_id for charge in attempt.charges
            ),
            **{name: request[name] for name in _REQUEST_FIELDS},
        )


def _attempts(ledger: duckdb.DuckDBPyConnection, request: Mapping[str, Any]) -> tuple[Attempt, ...]:
    run_id = request["run_id"]
    charges: dict[str, list[Charge]] = {}
    for row in _rows(ledger, _CHARGES, run_id, request["request_id"], request["attempt_id"]):
        charges.setdefault(row.pop("attempt_id"), []).append(Charge(**row))
    return tuple(
        Attempt(**row, charges=tuple(charges.get(row["attempt_id"], ())))
        for row in _rows(ledger, _ATTEMPTS, run_id, request["request_id"], request["attempt_id"])
    )


def _clearings(
    ledger: duckdb.DuckDBPyConnection, request: Mapping[str, Any], attempts: Sequence[Attempt]
) -> tuple[Clearing, ...]:
    """One for each round that the request was in, as its attempts came; where it ended unserved, at the end."""
    places = [*((attempt.round, attempt.lot_id) for attempt in attempts), (request["round"], request["lot_id"])]
    # Rounds start anew with each start of a run, so they do not tell the order.
    known = [(round_, lot_id) for round_, lot_id in dict.fromkeys(places) if round_ is not None and lot_id is not None]
    return tuple(_clearing(ledger, request["run_id"], round_, lot_id) for round_, lot_id in known)


def _clearing(ledger: duckdb.DuckDBPyConnection, run_id: str, round_: int, lot_id: str) -> Clearing:
    key = (run_id, round_, lot_id)
    bids = tuple(Bid(**row) for row in _rows(ledger, _BIDS, *key))
    lot = next(iter(_rows(ledger, _LOT, *key)), dict.fromkeys(_LOT_FIELDS))
    award = next(iter(_rows(ledger, _AWARD, *key)), dict.fromkeys(_AWARD_FIELDS))
    scores = {bid.pool: bid.score for bid in bids}
    best, second = scores.get(award["winner"] or ""), scores.get(award["runner_up"] or "")
    margin = exact_sum((second, best.copy_negate())) if best is not None and second is not None else None
    return Clearing(round=round_, lot_id=lot_id, bids=bids, margin=margin, **lot, **award)


def _unknown(ledger: duckdb.DuckDBPyConnection, request_id: str, run_id: str | None, elsewhere: list[str]) -> str:
    if run_id is not None:
        known = [str(row["run_id"]) for row in _rows(ledger, _RUNS)]
        if run_id not in known:
            return no_run(run_id, known)
        if elsewhere:
            return f"run {run_id} has no request {request_id}; these have: {', '.join(elsewhere)}"
    known = [str(row["request_id"]) for row in _rows(ledger, _NEAREST_REQUESTS, run_id, request_id)]
    where = f"run {run_id}" if run_id else "the ledger"
    if not known:
        return f"{where} has no request {request_id}; no run there has published its requests yet"
    like = nears(request_id, known)
    hint = f"; the nearest: {', '.join(like)}" if like else f", nor one of an id like it; one that it has is {known[0]}"
    return f"{where} has no request {request_id}{hint}"


def _rows(ledger: duckdb.DuckDBPyConnection, sql: str, *parameters: Any) -> list[dict[str, Any]]:
    result = ledger.execute(sql, parameters)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


_REQUEST_FIELDS = (
    "source_file", "source_row", "tenant", "placement", "status", "reason", "shared_with", "tags",
)  # fmt: skip
_LOT_FIELDS = ("start", "model", "requests", "input_tokens", "ideal_cached_tokens", "reserve", "urgency")
_AWARD_FIELDS = ("winner", "runner_up", "payment_rule", "price_paid", "reserved")

_RUNS_OF_REQUEST = """
SELECT runs.run_id, runs.run_date, runs.status, runs.job
FROM runs
WHERE runs.run_id IN (SELECT run_id FROM requests WHERE request_id = $1)
ORDER BY runs.started_at DESC, runs.run_id DESC"""

_REQUEST = """
FROM requests
WHERE run_id = $1 AND request_id = $2
ORDER BY attempt_id IS NULL, source_file, source_row"""

_ATTEMPTS = """
SELECT
    CAST(attempt_id AS VARCHAR) AS attempt_id, request_id, round, lot_id, attempt_no, kind, pool, model, status,
    error_class, error_message, http_status, started_at, finished_at, input_tokens, cached_tokens, output_tokens,
    usage_source, provider_request_id, provider_cost, jurisdiction, "operator", endpoint_host,
    finish_reason, cache_write_tokens, model_returned, other_model
FROM attempts
WHERE run_id = $1 AND (request_id = $2 OR attempt_id = $3)
ORDER BY started_at, attempt_no, attempt_id"""

_CHARGES = """
SELECT
    CAST(charge_id AS VARCHAR) AS charge_id, CAST(attempt_id AS VARCHAR) AS attempt_id, meter, quantity, unit_price,
    currency, cost_native, fx_rate, fx_source, cost, price_id
FROM charges
WHERE run_id = $1 AND (request_id = $2 OR attempt_id = $3)
ORDER BY attempt_id, cost DESC NULLS LAST, meter"""

_BIDS = """
SELECT
    pool, eligible, reject_reason, expected_cached_tokens, expected_output_tokens, expected_cost, risk_cost,
    lateness_cost, score, worst_case_cost, finish_at, price_id, audit_cost, exploration_credit,
    demand_cost, setup_cost
FROM bids
WHERE run_id = $1 AND round = $2 AND lot_id = $3
ORDER BY eligible DESC, score NULLS LAST, pool"""

_LOT = """
SELECT "start", model, requests, input_tokens, ideal_cached_tokens, reserve, urgency
FROM lots
WHERE run_id = $1 AND round = $2 AND lot_id = $3"""

_AWARD = """
SELECT pool AS winner, runner_up, payment_rule, price_paid, reserved
FROM awards
WHERE run_id = $1 AND round = $2 AND lot_id = $3"""

_RUNS = "SELECT run_id FROM runs ORDER BY started_at DESC, run_id DESC"

_NEAREST_REQUESTS = """
SELECT request_id
FROM requests
WHERE request_id IS NOT NULL AND ($1 IS NULL OR run_id = $1)
GROUP BY request_id
ORDER BY levenshtein(request_id, $2), request_id
LIMIT 12"""
