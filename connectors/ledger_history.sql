-- What pools did, summed by run, pool and model. Sums are of whole numbers, so that they do not depend on the order in
-- which DuckDB's threads add; where a lot's figures are shared among its requests, they are counted in thousandths.

-- name: tried
CREATE OR REPLACE TEMP VIEW tried AS
SELECT
    run_id, request_id, split_part(lot_id, '-', 1) AS start, round, lot_id, attempt_id, pool, model, kind, status,
    epoch_us(started_at) AS started_us, epoch_us(finished_at) AS finished_us,
    status = 'ok' AS ok,
    status = 'failed' AND coalesce(error_class, '') IN ('rate', 'capacity') AS refused,
    status = 'failed'
        AND coalesce(error_class, '') NOT IN ('rate', 'capacity', 'caller', 'policy', 'auth_funds') AS failed,
    status = 'ok' AND kind <> 'probe' AND lot_id IS NOT NULL AND input_tokens IS NOT NULL
        AND output_tokens IS NOT NULL AND coalesce(usage_source, 'estimate') <> 'estimate' AS answered,
    input_tokens, coalesce(cached_tokens, 0) AS cached_tokens, output_tokens,
    recount_input_tokens, recount_output_tokens, provider_cost, other_model
FROM attempts
WHERE kind IN ('primary', 'retry', 'hedge', 'probe') AND model IN (SELECT unnest(getvariable('history_models')))
    AND started_at IS NOT NULL AND finished_at IS NOT NULL;

-- name: outcomes
SELECT
    run_id, pool, model, max(finished_us) AS last_us,
    count(*) FILTER (ok) AS ok, count(*) FILTER (failed) AS failed, count(*) FILTER (refused) AS refused,
    CAST(sum(input_tokens) FILTER (ok AND recount_input_tokens IS NOT NULL) AS BIGINT) AS compared_input,
    CAST(sum(recount_input_tokens) FILTER (ok AND input_tokens IS NOT NULL) AS BIGINT) AS recount_input,
    CAST(sum(output_tokens) FILTER (ok AND recount_output_tokens IS NOT NULL) AS BIGINT) AS compared_output,
    CAST(sum(recount_output_tokens) FILTER (ok AND output_tokens IS NOT NULL) AS BIGINT) AS recount_output,
    CAST(sum(provider_cost) FILTER (ok) AS DECIMAL(38, 18)) AS provider_cost,
    count(other_model) AS named, count(*) FILTER (other_model) AS misnamed
FROM tried
GROUP BY run_id, pool, model;

-- name: minutes
SELECT run_id, pool, model, count(*) AS minutes, count(*) FILTER (5 * ok >= 4 * told) AS minutes_up
FROM (
    SELECT run_id, pool, model, count(*) FILTER (ok) AS ok, count(*) AS told
    FROM tried
    WHERE ok OR failed
    GROUP BY run_id, pool, model, finished_us // 60000000
    HAVING count(*) >= 10)
GROUP BY run_id, pool, model;

-- name: usage
WITH per_lot AS (
    SELECT
        run_id, round, lot_id, pool, model, count(*) AS answers, sum(input_tokens) AS input_tokens,
        sum(cached_tokens) AS cached_tokens, sum(output_tokens) AS output_tokens
    FROM tried
    WHERE answered
    GROUP BY run_id, round, lot_id, pool, model
), lot AS (
    SELECT
        lots.run_id, lots.round, lots.lot_id, lots.requests, lots.input_tokens, lots.max_output_tokens,
        -- A pool that served something else in between has lost what only the lot before had left in its cache.
        lots.ideal_cached_tokens - CASE
            WHEN awards.pool = lag(awards.pool) OVER (
                PARTITION BY lots.run_id, lots.round, split_part(lots.lot_id, '-', 1) ORDER BY lots.lot_id) THEN 0
            ELSE coalesce(lots.warm_tokens, 0) END AS reusable_tokens
    FROM lots
    LEFT JOIN awards
        ON awards.run_id = lots.run_id AND awards.round = lots.round AND awards.lot_id = lots.lot_id
)
SELECT
    per_lot.run_id, per_lot.pool, per_lot.model, CAST(sum(answers) AS BIGINT) AS answers,
    CAST(sum(per_lot.input_tokens) AS BIGINT) AS input_tokens,
    CAST(sum(per_lot.cached_tokens) AS BIGINT) AS cached_tokens,
    CAST(sum(per_lot.output_tokens) AS BIGINT) AS output_tokens,
    CAST(sum(1000 * answers * lot.input_tokens // lot.requests) AS DOUBLE) / 1000 AS planned_tokens,
    CAST(sum(1000 * answers * lot.reusable_tokens // lot.requests) AS DOUBLE) / 1000 AS reusable_tokens,
    CAST(sum(1000 * answers * lot.max_output_tokens // lot.requests) AS DOUBLE) / 1000 AS most_output_tokens
FROM per_lot
JOIN lot ON lot.run_id = per_lot.run_id AND lot.round = per_lot.round AND lot.lot_id = per_lot.lot_id
WHERE lot.requests > 0
GROUP BY per_lot.run_id, per_lot.pool, per_lot.model;

-- name: times
SELECT
    run_id, pool, model, CAST(sum(busy_us) AS BIGINT) AS busy_us, CAST(sum(window_us) AS BIGINT) AS window_us
FROM (
    SELECT
        run_id, pool, model, sum(finished_us - started_us) AS busy_us, max(finished_us) - min(started_us) AS window_us
    FROM tried
    WHERE answered
    -- Rounds are counted anew by each start of a run; between them nothing was asked.
    GROUP BY run_id, start, round, pool, model)
GROUP BY run_id, pool, model;

-- name: money
SELECT
    tried.run_id, tried.pool, tried.model,
    CAST(sum(charges.cost) FILTER (ok) AS DECIMAL(38, 18)) AS ok_cost,
    CAST(sum(charges.cost) FILTER (failed) AS DECIMAL(38, 18)) AS failed_cost,
    CAST(sum(charges.cost) FILTER (ok AND provider_cost IS NOT NULL) AS DECIMAL(38, 18)) AS compared_cost,
    CAST(1000 * sum(charges.quantity) FILTER (answered AND meter = 'accelerator_second') AS BIGINT) AS accelerator_ms
FROM charges
JOIN tried ON tried.attempt_id = charges.attempt_id
GROUP BY tried.run_id, tried.pool, tried.model;

-- name: retried
SELECT
    lost.run_id, lost.pool, lost.model, count(*) AS retried, count(*) FILTER (tried.pool = lost.pool) AS retried_here
FROM (SELECT DISTINCT run_id, request_id, pool, model FROM tried WHERE failed AND request_id IS NOT NULL) AS lost
JOIN tried ON tried.run_id = lost.run_id AND tried.request_id = lost.request_id
WHERE tried.ok
GROUP BY lost.run_id, lost.pool, lost.model;

-- name: latencies
SELECT
    run_id, pool, model, CAST(floor(4 * log2(greatest(finished_us - started_us, 1))) AS INTEGER) AS place,
    count(*) AS answers
FROM tried
WHERE answered
GROUP BY run_id, pool, model, place;

-- name: lengths
SELECT
    tried.run_id, tried.pool, tried.model,
    CAST(least(100, 100 * tried.output_tokens * lots.requests // lots.max_output_tokens) AS INTEGER) AS place,
    count(*) AS answers
FROM tried
JOIN lots ON lots.run_id = tried.run_id AND lots.round = tried.round AND lots.lot_id = tried.lot_id
WHERE answered AND lots.max_output_tokens > 0
GROUP BY tried.run_id, tried.pool, tried.model, place;

-- name: overhead
SELECT
    run_id, pool, CAST(1000 * sum(quantity) AS BIGINT) AS overhead_ms,
    CAST(1000 * sum(quantity) FILTER (meter = 'setup') AS BIGINT) AS setup_ms,
    count(*) FILTER (meter = 'setup') AS setups
FROM charges
WHERE request_id IS NULL AND meter IN ('setup', 'accelerator_idle_second')
GROUP BY run_id, pool;
