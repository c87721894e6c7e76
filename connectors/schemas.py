"""The Arrow schemas of what is kept: the ledger's tables, the journal's segments, and the columns added to outputs.

Low-cardinality text is dictionary-encoded (``LABEL``) so that a constant costs nothing per row; DuckDB reads it as
VARCHAR. Ids of attempts and charges are UUIDs. Money and quantities are decimals: quantity (18,3), unit price
(20,15), cost (38,18), so that quantity x unit price is exactly a cost. Unknown is NULL, never 0.
"""

from __future__ import annotations

import pyarrow as pa

LEDGER_VERSION = 4

LABEL = pa.dictionary(pa.int32(), pa.string())
UTC = pa.timestamp("us", "UTC")
UUID = pa.uuid()
QUANTITY = pa.decimal128(18, 3)
UNIT_PRICE = pa.decimal128(20, 15)
COST = pa.decimal128(38, 18)
FX_RATE = pa.decimal128(38, 18)

DEAD_REASONS = (
    "invalid", "too_long", "no_eligible_pool", "budget", "deadline", "capacity", "refused", "bad_output", "failed",
)  # fmt: skip
RETRYABLE_REASONS = frozenset({"no_eligible_pool", "budget", "deadline", "capacity"})
"""Dead letters that a later start of the run tries again."""


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, type_) for name, type_ in columns])


RUNS = _schema(
    ("run_id", pa.string()), ("parent_run_id", pa.string()), ("name", pa.string()), ("run_date", pa.date32()),
    ("started_at", UTC), ("finished_at", UTC), ("status", pa.string()), ("requests", pa.int64()),
    ("served", pa.int64()), ("dead", pa.int64()), ("cost", COST), ("job", pa.string()), ("version", pa.string()),
    ("tags", pa.string()), ("starts", pa.int32()), ("input_tokens", pa.int64()), ("cached_tokens", pa.int64()),
    ("ideal_cached_tokens", pa.int64()), ("output_tokens", pa.int64()),
)  # fmt: skip

REQUESTS = _schema(
    ("run_id", LABEL), ("request_id", pa.string()), ("source_file", LABEL), ("source_row", pa.int64()),
    ("lot_id", LABEL), ("round", pa.int16()), ("tenant", LABEL), ("placement", LABEL), ("status", LABEL),
    ("reason", LABEL), ("attempt_id", UUID), ("shared_with", pa.string()), ("cost", COST), ("tags", LABEL),
)  # fmt: skip
"""``status`` is ``served`` or ``dead``; ``attempt_id`` is the attempt that served it, or the last one."""

PRICES = _schema(
    ("price_id", pa.string()), ("pool", pa.string()), ("meter", pa.string()), ("unit_price", UNIT_PRICE),
    ("currency", pa.string()), ("valid_from", UTC), ("source", pa.string()), ("valid_to", UTC), ("fetched_at", UTC),
)  # fmt: skip

LOTS = _schema(
    ("run_id", LABEL), ("lot_id", pa.string()), ("round", pa.int16()), ("model", LABEL), ("placement", LABEL),
    ("tenant", LABEL), ("requests", pa.int64()), ("input_tokens", pa.int64()), ("max_input_tokens", pa.int64()),
    ("ideal_cached_tokens", pa.int64()), ("max_output_tokens", pa.int64()), ("tokens_estimated", pa.bool_()),
    ("warm_tokens", pa.int64()), ("reserve", COST),
    ("urgency", pa.decimal128(7, 6)),
)  # fmt: skip
"""``input_tokens`` is the lot's sum, ``max_input_tokens`` its longest request, ``max_output_tokens`` the sum of
n x max_tokens, ``warm_tokens`` the part of the ideal that only a pool has which just served the lot before; ``urgency``
how little slack it had before the deadline in that round, 0 to 1; ``reserve`` what the house would have given for it
then rather than see it fail, USD, NULL where nobody might serve it."""

BIDS = _schema(
    ("run_id", LABEL), ("round", pa.int16()), ("lot_id", pa.string()), ("pool", LABEL), ("eligible", pa.bool_()),
    ("reject_reason", LABEL), ("expected_cached_tokens", pa.int64()), ("expected_output_tokens", pa.int64()),
    ("expected_cost", COST), ("worst_case_cost", COST), ("risk_cost", COST), ("lateness_cost", COST),
    ("finish_at", UTC), ("score", COST), ("price_id", LABEL), ("audit_cost", COST), ("exploration_credit", COST),
    ("demand_cost", COST), ("setup_cost", COST),
)  # fmt: skip
"""``score`` = expected + risk + lateness + audit + demand + setup cost - exploration credit, to the last digit."""

AWARDS = _schema(
    ("run_id", LABEL), ("round", pa.int16()), ("lot_id", pa.string()), ("pool", LABEL), ("score", COST),
    ("runner_up", LABEL), ("payment_rule", LABEL), ("price_paid", COST), ("reserved", COST), ("fx_rate", FX_RATE),
    ("rent", COST),
)  # fmt: skip

AUCTIONS = _schema(
    ("run_id", LABEL), ("round", pa.int16()), ("lots", pa.int64()), ("pools", pa.int64()), ("objective", COST),
    ("lp_bound", COST), ("regret", pa.decimal128(20, 15)), ("awarded", pa.int64()), ("cleared_at", UTC),
    ("rule", pa.string()), ("budget", COST),
)  # fmt: skip
"""``regret`` = (objective - lp_bound) / lp_bound over the awarded lots, as if all of each were served; NULL where the
bound is 0 or unknown. ``rule`` is the scoring rule that bids were told before: its parameters as JSON, with a digest of
them. ``budget`` is what there was to reserve, USD, NULL where there was no wall: where it is less than the worst cases,
awards reserve all of it together, and a lot with less than its worst case is served from what others leave."""

ATTEMPTS = _schema(
    ("run_id", LABEL), ("request_id", pa.string()), ("lot_id", LABEL), ("round", pa.int16()), ("attempt_id", UUID),
    ("attempt_no", pa.int16()), ("kind", LABEL), ("pool", LABEL), ("model", LABEL), ("started_at", UTC),
    ("finished_at", UTC), ("status", LABEL), ("error_class", LABEL), ("error_message", LABEL),
    ("http_status", pa.int16()), ("input_tokens", pa.int64()), ("cached_tokens", pa.int64()),
    ("output_tokens", pa.int64()), ("recount_input_tokens", pa.int64()), ("recount_output_tokens", pa.int64()),
    ("usage_source", LABEL), ("provider_request_id", pa.string()), ("provider_cost", COST), ("jurisdiction", LABEL),
    ("operator", LABEL), ("endpoint_host", LABEL), ("finish_reason", LABEL), ("cache_write_tokens", pa.int64()),
    ("model_returned", LABEL), ("other_model", pa.bool_()),
)  # fmt: skip
"""``jurisdiction`` is where the answer says that it was processed; where it says nothing, what the pool declares.
``finish_reason`` is the provider's word; ``length``: cut off at max_tokens, as at least one of the samples was.
``cache_write_tokens`` are input tokens too, and none of the cached ones. ``model_returned`` is the model that the
answer names, ``other_model`` whether that is plainly another one than was asked for; NULL: nothing to compare."""

CHARGES = _schema(
    ("charge_id", UUID), ("run_id", LABEL), ("run_date", pa.date32()), ("request_id", pa.string()),
    ("attempt_id", UUID), ("pool", LABEL), ("meter", LABEL), ("quantity", QUANTITY), ("unit_price", UNIT_PRICE),
    ("currency", LABEL), ("cost_native", COST), ("fx_rate", FX_RATE), ("fx_source", LABEL), ("fx_at", UTC),
    ("cost", COST), ("baseline_cost", COST), ("price_id", LABEL), ("charged_at", UTC), ("tags", LABEL),
    ("baseline", LABEL),
)  # fmt: skip
"""``baseline`` names the list price that ``baseline_cost`` is counted by; NULL: the run had none when it was booked."""

BASELINES = _schema(
    ("run_id", pa.string()), ("baseline", pa.string()), ("meter", pa.string()), ("unit_price", UNIT_PRICE),
    ("valid_from", UTC), ("source", pa.string()), ("model", pa.string()), ("start", pa.int32()),
)  # fmt: skip
"""The list prices (USD) that the run's savings are counted against; the first one is ``charges.baseline_cost``.
``model`` NULL: of every model. ``start``: which start of the run wrote the row; a list may change between two."""

START = pa.field("start", pa.int32())
"""Which start of the run a round was of: rounds begin anew with each. Of a market's tables, from where it is written
down (``decisions``): the market itself knows of no start."""

TABLES: dict[str, pa.Schema] = {
    "runs": RUNS, "requests": REQUESTS, "prices": PRICES, "lots": LOTS.append(START), "bids": BIDS.append(START),
    "awards": AWARDS.append(START), "auctions": AUCTIONS.append(START), "attempts": ATTEMPTS, "charges": CHARGES,
    "baselines": BASELINES,
}  # fmt: skip

METER_COLUMNS = {
    "uncached_input": "q_uncached_input", "cached_input": "q_cached_input", "cache_write": "q_cache_write",
    "output": "q_output", "request": "q_request", "accelerator_second": "q_accelerator_second",
    "accelerator_idle_second": "q_accelerator_idle_second", "setup": "q_setup",
}  # fmt: skip

SEGMENT = _schema(
    ("tag", pa.int64()),
    ("key", pa.binary(16)),
    *((field.name, field.type) for field in ATTEMPTS if field.name != "run_id"),
    ("output", pa.large_string()),
    ("samples", pa.list_(pa.large_string())),
    *((name, QUANTITY) for name in METER_COLUMNS.values()),
    ("price_id", LABEL),
    ("cost", COST),
)
"""One settled attempt a row: the attempt, its answer and what it is charged, in one create-only file.

``tag`` is range << 32 | position in the range's order (NULL for ``overhead``); ``key`` is the request's content key.
The meters' quantities are NULL where the pool's price schedule has no such meter. ``cost`` is in USD.
"""

OUTPUT_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("request_id", pa.string()), ("output", pa.large_string()), ("finish_reason", pa.string()), ("model", pa.string()),
    ("pool", pa.string()), ("input_tokens", pa.int64()), ("cached_tokens", pa.int64()), ("output_tokens", pa.int64()),
    ("cost", COST), ("attempts", pa.int32()),
)  # fmt: skip
"""What ``outputs`` adds to the input's columns; ``samples`` follows where n > 1."""

DEAD_LETTER_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("request_id", pa.string()), ("reason", pa.string()), ("message", pa.string()), ("attempts", pa.int32()),
)  # fmt: skip
