"""What a report asks the ledger. Every query runs over the views of the runs that the report is about."""

from __future__ import annotations

RUNS = """
SELECT
    run_id, parent_run_id, name, run_date, started_at, finished_at, status, requests, served, dead, cost, input_tokens,
    cached_tokens, ideal_cached_tokens, output_tokens, starts, tags, version
FROM runs
ORDER BY started_at DESC, run_id"""

TOTALS = """
SELECT
    (SELECT CAST(bidbeam_whole(cost) AS DECIMAL(38, 18)) FROM charges) AS cost,
    (SELECT CAST(sum(charge.cost) AS DECIMAL(38, 18)) FROM charges AS charge
     JOIN attempts AS attempt ON attempt.attempt_id = charge.attempt_id
     WHERE attempt.status <> 'ok' OR attempt.kind NOT IN ('primary', 'retry')) AS waste,
    (SELECT count(*) FROM requests) AS requests,
    (SELECT count(*) FROM requests WHERE status = 'served') AS served,
    (SELECT count(*) FROM requests WHERE status = 'dead') AS dead,
    (SELECT count(*) FROM requests WHERE shared_with IS NOT NULL) AS shared,
    (SELECT count(*) FROM attempts WHERE request_id IS NOT NULL) AS attempts,
    (SELECT CAST(sum(input_tokens) AS BIGINT) FROM attempts) AS input_tokens,
    (SELECT CAST(sum(output_tokens) AS BIGINT) FROM attempts) AS output_tokens,
    (SELECT CAST(sum(cached_tokens) AS BIGINT) FROM runs) AS cached_tokens,
    (SELECT CAST(sum(ideal_cached_tokens) AS BIGINT) FROM runs) AS ideal_cached_tokens"""

BY_POOL = """
SELECT
    pool, currency, CAST(sum(attempts) AS BIGINT) AS attempts, CAST(sum(cost_native) AS DECIMAL(38, 18)) AS cost_native,
    CAST(sum(cost) AS DECIMAL(38, 18)) AS cost, CAST(sum(overhead_cost) AS DECIMAL(38, 18)) AS overhead_cost
FROM cost_by_pool
GROUP BY pool, currency
ORDER BY cost DESC NULLS FIRST, pool"""

BY_METER = """
SELECT
    meter, CAST(sum(quantity) AS DECIMAL(38, 3)) AS quantity,
    CAST(bidbeam_whole(cost) AS DECIMAL(38, 18)) AS cost
FROM charges
GROUP BY meter
ORDER BY cost DESC NULLS FIRST, meter"""

BY_MODEL = """
SELECT
    attempt.model, count(DISTINCT attempt.attempt_id) AS attempts,
    CAST(bidbeam_whole(charge.cost) AS DECIMAL(38, 18)) AS cost
FROM charges AS charge
JOIN attempts AS attempt ON attempt.attempt_id = charge.attempt_id
GROUP BY attempt.model
ORDER BY cost DESC NULLS FIRST, attempt.model"""

BY_DAY = """
SELECT day, CAST(sum(cost) AS DECIMAL(38, 18)) AS cost, count(DISTINCT pool) AS pools
FROM cost_by_day
GROUP BY day
ORDER BY day DESC"""

BY_TAG = """
SELECT tag, "value", CAST(sum(cost) AS DECIMAL(38, 18)) AS cost
FROM cost_by_tag
WHERE tag IS NOT NULL
GROUP BY tag, "value"
ORDER BY tag, cost DESC NULLS FIRST, "value\""""

SAVINGS = """
WITH paid AS (
    SELECT run_id, sum(cost) AS cost FROM charges GROUP BY run_id
), compared AS (
    SELECT
        run_id, baseline, count(*) AS requests, count(baseline_cost) AS compared,
        coalesce(sum(cost) FILTER (WHERE baseline_cost IS NULL), 0) AS apart, sum(baseline_cost) AS baseline_cost
    FROM savings
    WHERE status = 'served'
    GROUP BY run_id, baseline
)
SELECT
    baseline, CAST(sum(requests) AS BIGINT) AS requests, CAST(sum(compared) AS BIGINT) AS compared,
    CAST(sum(coalesce(paid.cost, 0) - apart) AS DECIMAL(38, 18)) AS cost,
    CAST(sum(baseline_cost) AS DECIMAL(38, 18)) AS baseline_cost
FROM compared LEFT JOIN paid ON paid.run_id = compared.run_id
GROUP BY baseline
ORDER BY baseline_cost DESC NULLS LAST, baseline"""

CACHE = """
SELECT
    pool, CAST(sum(attempts) AS BIGINT) AS attempts, CAST(sum(unreported_attempts) AS BIGINT) AS unreported,
    CAST(sum(input_tokens) AS BIGINT) AS input_tokens, CAST(sum(cached_tokens) AS BIGINT) AS cached_tokens,
    CAST(bidbeam_whole(saving) AS DECIMAL(38, 18)) AS saving
FROM cache_savings
GROUP BY pool
ORDER BY cached_tokens DESC NULLS LAST, pool"""

SPEED = """
SELECT
    pool, model, count(*) AS answers,
    quantile_cont(epoch_us(finished_at) - epoch_us(started_at), [0.5, 0.95, 1.0]) AS latency_us,
    CAST(sum(input_tokens) AS BIGINT) AS input_tokens, CAST(sum(output_tokens) AS BIGINT) AS output_tokens,
    epoch_us(max(finished_at)) - epoch_us(min(started_at)) AS span_us
FROM attempts
WHERE status = 'ok' AND request_id IS NOT NULL AND finished_at >= started_at AND run_id = $1
GROUP BY pool, model
ORDER BY answers DESC, pool, model"""

SPAN = """
SELECT epoch_us(min(started_at)) AS first_us, epoch_us(max(finished_at)) AS last_us
FROM attempts
WHERE status = 'ok' AND request_id IS NOT NULL AND run_id = $1"""

TIMELINE = """
WITH answered AS (
    SELECT pool, epoch_us(finished_at) AS moment, input_tokens + output_tokens AS tokens
    FROM attempts
    WHERE status = 'ok' AND request_id IS NOT NULL AND run_id = $1
), span AS (
    SELECT min(epoch_us(started_at)) AS first, max(epoch_us(finished_at)) AS last
    FROM attempts
    WHERE status = 'ok' AND request_id IS NOT NULL AND run_id = $1
)
SELECT
    pool, least((moment - first) * $2 // greatest(last - first, 1), $2 - 1) AS bucket,
    CAST(sum(tokens) AS BIGINT) AS tokens, any_value(first) AS first_us, any_value(last) AS last_us
FROM answered, span
GROUP BY pool, bucket
ORDER BY pool, bucket"""

AUCTIONS = """
SELECT
    auction.run_id, auction.round, auction.cleared_at, auction.lots, auction.awarded, auction.pools, auction.objective,
    auction.lp_bound, auction.gap, auction.regret
FROM regret AS auction
ORDER BY auction.cleared_at DESC NULLS LAST, auction.run_id, auction.round"""

MARKET = """
WITH asked AS (
    SELECT pool, count(*) AS bids, count(*) FILTER (WHERE eligible) AS eligible FROM bids GROUP BY pool
), won AS (
    SELECT
        award.pool, count(*) AS lots, CAST(sum(bid.expected_cost) AS DECIMAL(38, 18)) AS expected_cost,
        CAST(sum(award.reserved) AS DECIMAL(38, 18)) AS reserved
    FROM awards AS award
    LEFT JOIN bids AS bid ON bid.run_id = award.run_id AND bid.round = award.round AND bid.lot_id = award.lot_id
        AND bid.pool = award.pool
    GROUP BY award.pool
), paid AS (
    SELECT pool, CAST(sum(cost) AS DECIMAL(38, 18)) AS cost FROM charges WHERE request_id IS NOT NULL GROUP BY pool
)
SELECT asked.pool, asked.bids, asked.eligible, coalesce(won.lots, 0) AS lots, won.expected_cost, won.reserved, paid.cost
FROM asked
LEFT JOIN won ON won.pool = asked.pool
LEFT JOIN paid ON paid.pool = asked.pool
ORDER BY lots DESC, asked.eligible DESC, asked.pool"""

REFUSALS = """
SELECT pool, reject_reason, count(*) AS bids
FROM bids
WHERE NOT eligible
GROUP BY pool, reject_reason
ORDER BY bids DESC, pool, reject_reason"""

DEAD = """
SELECT reason, count(*) AS requests, CAST(sum(cost) AS DECIMAL(38, 18)) AS cost
FROM requests
WHERE status = 'dead'
GROUP BY reason
ORDER BY requests DESC, reason"""

ATTEMPTS = """
WITH charged AS (
    SELECT attempt_id, sum(cost) AS cost FROM charges GROUP BY attempt_id
)
SELECT
    attempt.pool, attempt.kind, attempt.status, attempt.error_class, count(*) AS attempts,
    CAST(sum(charged.cost) AS DECIMAL(38, 18)) AS cost, any_value(attempt.error_message) AS example
FROM attempts AS attempt
LEFT JOIN charged ON charged.attempt_id = attempt.attempt_id
GROUP BY attempt.pool, attempt.kind, attempt.status, attempt.error_class
ORDER BY attempt.pool, attempts DESC, attempt.kind, attempt.status, attempt.error_class"""

RECONCILIATION = """
SELECT
    pool, model, CAST(sum(attempts) AS BIGINT) AS attempts,
    CAST(sum(compared_input) AS BIGINT) AS compared_input, CAST(sum(input_tokens_off) AS BIGINT) AS input_off,
    CAST(sum(compared_output) AS BIGINT) AS compared_output, CAST(sum(output_tokens_off) AS BIGINT) AS output_off,
    CAST(sum(compared_cost) AS BIGINT) AS compared_cost, CAST(sum(cost_off) AS DECIMAL(38, 18)) AS cost_off,
    CAST(sum(other_model) AS BIGINT) AS other_model
FROM reconciliation
GROUP BY pool, model
ORDER BY pool, model"""

PLACES = """
SELECT pool, jurisdiction, "operator", endpoint_host, count(*) AS attempts
FROM attempts
WHERE request_id IS NOT NULL
GROUP BY pool, jurisdiction, "operator", endpoint_host
ORDER BY attempts DESC, pool"""

PRICES = """
SELECT
    price.pool, price.meter, price.unit_price, price.currency, price.valid_from, price.source
FROM prices AS price
WHERE price.price_id IN (SELECT price_id FROM charges)
ORDER BY price.pool, price.price_id, price.meter"""

RATES = """
SELECT currency, fx_rate, fx_source, fx_at
FROM charges
WHERE currency <> 'USD'
GROUP BY currency, fx_rate, fx_source, fx_at
ORDER BY currency, fx_at DESC NULLS LAST"""
