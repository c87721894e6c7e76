"""What the ledger knows of one request: the values that ``bidbeam explain`` prints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date, datetime
from decimal import Decimal, localcontext
from typing import Any


@dataclass(frozen=True, slots=True)
class Bid:
    """One pool's offer for the lot. All USD; the lowest ``score`` is the best.

    ``score`` = expected + risk + lateness + audit + demand + setup cost - exploration credit; the last four are None in
    a ledger from before they were scored.
    """

    pool: str
    eligible: bool
    reject_reason: str | None
    expected_cached_tokens: int | None
    expected_output_tokens: int | None
    expected_cost: Decimal | None
    risk_cost: Decimal | None
    lateness_cost: Decimal | None
    score: Decimal | None
    worst_case_cost: Decimal | None
    finish_at: datetime | None
    price_id: str | None
    audit_cost: Decimal | None = None
    exploration_credit: Decimal | None = None
    demand_cost: Decimal | None = None
    setup_cost: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Clearing:
    """One round's auction of the lot that the request was in. ``winner`` None: nobody was awarded the lot.

    ``margin`` is the runner-up's score minus the winner's; negative where the clearing gave the cheaper pool's
    capacity to other lots. ``price_paid``, ``reserved`` and ``reserve``, what it was worth to the house rather than see
    it fail, are USD for the whole lot.
    """

    round: int
    lot_id: str
    start: int | None
    """Which start of the run: rounds begin anew with each. None in a ledger from before it stood there."""
    model: str | None
    requests: int | None
    input_tokens: int | None
    ideal_cached_tokens: int | None
    bids: tuple[Bid, ...]
    winner: str | None
    runner_up: str | None
    margin: Decimal | None
    payment_rule: str | None
    price_paid: Decimal | None
    reserved: Decimal | None
    reserve: Decimal | None = None
    urgency: Decimal | None = None
    """How little slack the lot had before the deadline, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Charge:
    """quantity x unit_price = cost_native in ``currency``; x fx_rate = cost in USD."""

    charge_id: str
    meter: str
    quantity: Decimal
    unit_price: Decimal
    currency: str
    cost_native: Decimal
    fx_rate: Decimal | None
    fx_source: str | None
    cost: Decimal | None
    price_id: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try. ``request_id`` is another request's where the answer was shared; that one paid."""

    attempt_id: str
    request_id: str
    round: int
    lot_id: str | None
    attempt_no: int | None
    kind: str
    pool: str
    model: str | None
    status: str
    error_class: str | None
    error_message: str | None
    http_status: int | None
    started_at: datetime | None
    finished_at: datetime | None
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    usage_source: str | None
    provider_request_id: str | None
    provider_cost: Decimal | None
    jurisdiction: str | None
    operator: str | None
    endpoint_host: str | None
    finish_reason: str | None
    cache_write_tokens: int | None
    model_returned: str | None
    other_model: bool | None
    """Whether the answer plainly names another model than was asked for."""
    charges: tuple[Charge, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that the ledger knows of one request in one run. Costs are USD; ``cost`` includes retries and other waste."""

    run_id: str
    run_date: date
    run_status: str
    other_runs: tuple[str, ...]
    """Other runs with a request of this id, the latest first."""
    request_id: str
    rows_with_this_id: int
    """More than 1: the others of the run's input are invalid, because the first one wins."""
    source_file: str | None
    source_row: int | None
    """Counts from 0."""
    tenant: str | None
    placement: str | None
    status: str
    reason: str | None
    message: str | None
    """What the run's dead letters say of it; None where it was served, or they are not to be had."""
    shared_with: str | None
    cost: Decimal | None
    tags: str | None
    clearings: tuple[Clearing, ...]
    attempts: tuple[Attempt, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object: decimals are strings with all their digits, times are ISO 8601 in UTC."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), default=_json_value))
        return found


def exact_sum(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """The sum with all its digits; None where one is unknown, 0 of nothing."""
    total = Decimal(0)
    with localcontext(prec=80):  # the default would round from 28 digits on
        for amount in amounts:
            if amount is None:
                return None
            total += amount
    return total


def _json_value(value: Any) -> str:
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
