-- Derived views. They stand on the views of the tables and name their columns, so that a column added later changes
-- nothing here. Amounts named cost are USD. Unknown is NULL: a sum with an unknown part is NULL, never too small.

-- amount x rate, rounded half-even at 18 places, for amounts and rates of 18 places each. DuckDB's own product of two
-- such decimals has 36 places and overflows; this one works on whole numbers: u = |amount| x 10^18, r = rate x 10^18.
CREATE OR REPLACE MACRO bidbeam_units(value) AS
    CAST(replace(CAST(CAST(value AS DECIMAL(38, 18)) AS VARCHAR), '.', '') AS HUGEINT);

CREATE OR REPLACE MACRO bidbeam_halves(u, r) AS {
    'high': (u * (r // 1000000000)) // 1000000000,
    'low': ((u * (r // 1000000000)) % 1000000000) * 1000000000 + u * (r % 1000000000)};

CREATE OR REPLACE MACRO bidbeam_round_half_even(high, low) AS
    high + low // 1000000000000000000 + CASE
        WHEN low % 1000000000000000000 > 500000000000000000 THEN 1
        WHEN low % 1000000000000000000 = 500000000000000000
            THEN (high + low // 1000000000000000000) % 2
        ELSE 0 END;

CREATE OR REPLACE MACRO bidbeam_decimal(u) AS
    CAST(CAST(u // 1000000000000000000 AS VARCHAR) || '.'
         || lpad(CAST(u % 1000000000000000000 AS VARCHAR), 18, '0') AS DECIMAL(38, 18));

CREATE OR REPLACE MACRO bidbeam_convert(amount, rate) AS CASE
    WHEN rate = 1 THEN CAST(amount AS DECIMAL(38, 18))
    WHEN amount < 0 THEN -bidbeam_decimal(bidbeam_round_half_even(
        bidbeam_halves(-bidbeam_units(amount), bidbeam_units(rate)).high,
        bidbeam_halves(-bidbeam_units(amount), bidbeam_units(rate)).low))
    ELSE bidbeam_decimal(bidbeam_round_half_even(
        bidbeam_halves(bidbeam_units(amount), bidbeam_units(rate)).high,
        bidbeam_halves(bidbeam_units(amount), bidbeam_units(rate)).low)) END;

-- A sum that knows all its parts, or NULL.
CREATE OR REPLACE MACRO bidbeam_whole(part) AS CASE WHEN count(*) = count(part) THEN sum(part) END;

-- What each input row cost, retries and other waste included, beside what it became. A request that was served from
-- another one's answer (shared_with) costs 0.
CREATE OR REPLACE VIEW cost_per_request AS
WITH charged AS (
    SELECT run_id, request_id, bidbeam_whole(cost) AS cost, any_value(run_date) AS run_date
    FROM charges
    WHERE request_id IS NOT NULL
    GROUP BY run_id, request_id
), tried AS (
    SELECT run_id, request_id, count(*) AS attempts
    FROM attempts
    WHERE request_id IS NOT NULL
    GROUP BY run_id, request_id
)
SELECT
    request.run_id, runs.run_date, request.request_id, request.source_file, request.source_row, request.lot_id,
    request.tenant, request.status, request.reason, request.shared_with,
    last_attempt.pool, last_attempt.model, last_attempt.input_tokens, last_attempt.cached_tokens,
    last_attempt.output_tokens, last_attempt.usage_source,
    coalesce(tried.attempts, 0) AS attempts,
    CASE WHEN charged.request_id IS NULL THEN CAST(0 AS DECIMAL(38, 18)) ELSE charged.cost END AS cost,
    request.tags
FROM requests AS request
LEFT JOIN runs ON runs.run_id = request.run_id
LEFT JOIN attempts AS last_attempt ON last_attempt.attempt_id = request.attempt_id
-- Of rows with the same id only the first was ever tried; the others have no attempt, and must not show its cost.
LEFT JOIN charged
    ON charged.run_id = request.run_id AND charged.request_id = request.request_id AND request.attempt_id IS NOT NULL
LEFT JOIN tried
    ON tried.run_id = request.run_id AND tried.request_id = request.request_id AND request.attempt_id IS NOT NULL;

-- Each pool's bill for each run, in its own currency and in USD; idle time and other overhead included.
CREATE OR REPLACE VIEW cost_by_pool AS
SELECT
    run_id, run_date, pool, currency,
    count(DISTINCT attempt_id) AS attempts,
    CAST(bidbeam_whole(cost_native) AS DECIMAL(38, 18)) AS cost_native,
    CAST(bidbeam_whole(cost) AS DECIMAL(38, 18)) AS cost,
    CAST(bidbeam_whole(CASE WHEN request_id IS NULL THEN cost ELSE 0 END) AS DECIMAL(38, 18)) AS overhead_cost
FROM charges
GROUP BY run_id, run_date, pool, currency;

-- Where each run's money went: on answers (kind primary or retry, status ok), on second tries, on hedges that were not
-- needed, on what was lost, on accelerators that idled. An attempt that was charged for nothing costs 0.
CREATE OR REPLACE VIEW cost_by_kind AS
WITH charged AS (
    SELECT attempt_id, bidbeam_whole(cost) AS cost
    FROM charges
    GROUP BY attempt_id
)
SELECT
    attempt.run_id, attempt.pool, attempt.kind, attempt.status, attempt.error_class,
    count(*) AS attempts,
    CAST(bidbeam_whole(CASE WHEN charged.attempt_id IS NULL THEN 0 ELSE charged.cost END) AS DECIMAL(38, 18)) AS cost
FROM attempts AS attempt
LEFT JOIN charged ON charged.attempt_id = attempt.attempt_id
GROUP BY attempt.run_id, attempt.pool, attempt.kind, attempt.status, attempt.error_class;

-- What each pool charged each UTC day, to hold against its invoices.
CREATE OR REPLACE VIEW cost_by_day AS
SELECT
    -- Through microseconds: a cast would use the session's time zone.
    CAST(make_timestamp(epoch_us(charged_at)) AS DATE) AS day, pool, currency,
    count(DISTINCT run_id) AS runs,
    CAST(bidbeam_whole(cost_native) AS DECIMAL(38, 18)) AS cost_native,
    CAST(bidbeam_whole(cost) AS DECIMAL(38, 18)) AS cost
FROM charges
GROUP BY day, pool, currency;

-- Cost by each tag's values. A charge with two tags stands under both; one without any, under NULL.
CREATE OR REPLACE VIEW cost_by_tag AS
WITH tagged AS (
    SELECT run_id, run_date, CASE WHEN tags <> '{}' THEN tags END AS tags, bidbeam_whole(cost) AS cost
    FROM charges
    GROUP BY run_id, run_date, CASE WHEN tags <> '{}' THEN tags END
), entries AS (
    SELECT run_id, run_date, cost, unnest(
        CASE WHEN tags IS NULL THEN [{'key': NULL, 'value': NULL}]
        ELSE map_entries(CAST(CAST(tags AS JSON) AS MAP(VARCHAR, VARCHAR))) END) AS entry
    FROM tagged
)
SELECT
    run_id, run_date, entry.key AS tag, entry.value AS "value", CAST(bidbeam_whole(cost) AS DECIMAL(38, 18)) AS cost
FROM entries
GROUP BY run_id, run_date, tag, "value";

-- Each request against each baseline of its run: what the tokens of the attempt that served it cost at that list's
-- prices. Without a cached price, cached tokens cost what others do; without reported cached tokens, none were cached.
-- Tokens that are only estimated are compared with nothing. A shared answer is compared as often as it is used.
-- A list may price each model by itself; a request of a model that it has no price of has no baseline_cost.
CREATE OR REPLACE VIEW savings AS
WITH listed AS (
    SELECT
        run_id, baseline, model,
        max(unit_price) FILTER (WHERE meter = 'uncached_input') AS input_price,
        max(unit_price) FILTER (WHERE meter = 'cached_input') AS cached_price,
        max(unit_price) FILTER (WHERE meter = 'output') AS output_price,
        max(unit_price) FILTER (WHERE meter = 'request') AS request_price
    FROM (
        FROM baselines
        -- A list may have changed between two starts of a run: the latest one counts.
        QUALIFY "start" IS NOT DISTINCT FROM max("start") OVER (PARTITION BY run_id))
    GROUP BY run_id, baseline, model
), named AS (
    SELECT DISTINCT run_id, baseline FROM listed
), compared AS (
    SELECT
        request.run_id, request.run_date, request.request_id, request.pool, request.model, request.status,
        request.shared_with, named.baseline, request.cost, request.tags,
        CASE WHEN request.status = 'served' AND request.usage_source <> 'estimate' THEN CAST(
            (request.input_tokens - coalesce(request.cached_tokens, 0)) * listed.input_price
            + coalesce(request.cached_tokens, 0) * coalesce(listed.cached_price, listed.input_price)
            + request.output_tokens * listed.output_price
            + coalesce(listed.request_price, 0) AS DECIMAL(38, 18)) END AS baseline_cost
    FROM cost_per_request AS request
    JOIN named ON named.run_id = request.run_id
    LEFT JOIN listed
        ON listed.run_id = named.run_id AND listed.baseline = named.baseline
        AND (listed.model IS NULL OR listed.model = request.model)
)
SELECT
    run_id, run_date, request_id, pool, model, status, shared_with, baseline, cost, baseline_cost,
    CAST(baseline_cost - cost AS DECIMAL(38, 18)) AS saving, tags
FROM compared;

-- What prefix caching saved on each pool: cached tokens x (price of an uncached token - price of a cached one), in the
-- pool's currency and in USD. A pool paid by time shows it in its seconds, not by the token: NULL there.
CREATE OR REPLACE VIEW cache_savings AS
WITH counted AS (
    SELECT
        run_id, pool, count(*) AS attempts,
        CAST(sum(input_tokens) AS BIGINT) AS input_tokens, CAST(sum(cached_tokens) AS BIGINT) AS cached_tokens,
        count(*) FILTER (WHERE cached_tokens IS NULL) AS unreported_attempts
    FROM attempts
    WHERE request_id IS NOT NULL
    GROUP BY run_id, pool
), priced AS (
    SELECT
        price_id,
        max(unit_price) FILTER (WHERE meter = 'uncached_input') AS uncached_price,
        bool_or(meter LIKE 'accelerator%') AS by_time
    FROM prices
    GROUP BY price_id
), billed AS (
    SELECT
        run_id, pool, currency, price_id, fx_rate,
        CAST(sum(quantity) FILTER (WHERE meter = 'cached_input') AS DECIMAL(18, 3)) AS cached_quantity,
        max(unit_price) FILTER (WHERE meter = 'cached_input') AS cached_price
    FROM charges
    WHERE request_id IS NOT NULL
    GROUP BY run_id, pool, currency, price_id, fx_rate
), saved AS (
    SELECT
        billed.run_id, billed.pool, billed.currency, billed.fx_rate,
        CASE
            WHEN priced.price_id IS NULL OR priced.by_time THEN NULL
            -- Nothing was billed as cached: nothing was saved.
            WHEN billed.cached_quantity IS NULL THEN CAST(0 AS DECIMAL(38, 18))
            ELSE CAST(billed.cached_quantity * priced.uncached_price
                      - billed.cached_quantity * billed.cached_price AS DECIMAL(38, 18))
        END AS saving_native
    FROM billed
    LEFT JOIN priced ON priced.price_id = billed.price_id
), summed AS (
    SELECT
        run_id, pool, currency, CAST(bidbeam_whole(saving_native) AS DECIMAL(38, 18)) AS saving_native,
        CAST(bidbeam_whole(bidbeam_convert(saving_native, fx_rate)) AS DECIMAL(38, 18)) AS saving
    FROM saved
    GROUP BY run_id, pool, currency
)
SELECT
    counted.run_id, counted.pool, counted.attempts, counted.unreported_attempts, counted.input_tokens,
    counted.cached_tokens, summed.currency, summed.saving_native, summed.saving
FROM counted
LEFT JOIN summed ON summed.run_id = counted.run_id AND summed.pool = counted.pool;

-- How far each clearing was from the best that could be: in money (gap), and relative to that bound (regret). A run that
-- was started again has a clearing for each round of each start.
CREATE OR REPLACE VIEW regret AS
SELECT
    run_id, "start", round, cleared_at, lots, awarded, pools, objective, lp_bound,
    CAST(objective - lp_bound AS DECIMAL(38, 18)) AS gap, regret
FROM auctions;

-- What pools reported against what we counted ourselves, and what they say they billed against what we computed.
-- Differences (…_off: theirs minus ours) are over the attempts where both are known; compared_… says how many.
-- other_model counts the answers that plainly name another model than was asked for; other_models names them. flagged:
-- tokens are over ours by more than 2 %, or bills by more than 1 %, or an answer names another model.
CREATE OR REPLACE VIEW reconciliation AS
WITH computed AS (
    SELECT attempt_id, bidbeam_whole(cost) AS cost
    FROM charges
    GROUP BY attempt_id
)
SELECT
    attempt.run_id, attempt.pool, attempt.model,
    count(*) AS attempts,
    CAST(sum(attempt.input_tokens) AS BIGINT) AS input_tokens,
    CAST(sum(attempt.recount_input_tokens) AS BIGINT) AS recount_input_tokens,
    count(attempt.input_tokens - attempt.recount_input_tokens) AS compared_input,
    CAST(sum(attempt.input_tokens - attempt.recount_input_tokens) AS BIGINT) AS input_tokens_off,
    CAST(sum(attempt.output_tokens) AS BIGINT) AS output_tokens,
    CAST(sum(attempt.recount_output_tokens) AS BIGINT) AS recount_output_tokens,
    count(attempt.output_tokens - attempt.recount_output_tokens) AS compared_output,
    CAST(sum(attempt.output_tokens - attempt.recount_output_tokens) AS BIGINT) AS output_tokens_off,
    CAST(sum(computed.cost) AS DECIMAL(38, 18)) AS cost,
    CAST(sum(attempt.provider_cost) AS DECIMAL(38, 18)) AS provider_cost,
    count(attempt.provider_cost - computed.cost) AS compared_cost,
    CAST(sum(attempt.provider_cost - computed.cost) AS DECIMAL(38, 18)) AS cost_off,
    count(attempt.other_model) AS compared_model,
    count(*) FILTER (attempt.other_model) AS other_model,
    string_agg(DISTINCT attempt.model_returned, ', ' ORDER BY attempt.model_returned)
        FILTER (attempt.other_model) AS other_models,
    coalesce(
        50 * sum(attempt.input_tokens - attempt.recount_input_tokens)
        > sum(attempt.recount_input_tokens) FILTER (attempt.input_tokens IS NOT NULL), FALSE)
    OR coalesce(
        50 * sum(attempt.output_tokens - attempt.recount_output_tokens)
        > sum(attempt.recount_output_tokens) FILTER (attempt.output_tokens IS NOT NULL), FALSE)
    OR coalesce(
        100 * sum(attempt.provider_cost - computed.cost)
        > sum(computed.cost) FILTER (attempt.provider_cost IS NOT NULL), FALSE)
    OR count(*) FILTER (attempt.other_model) > 0 AS flagged
FROM attempts AS attempt
LEFT JOIN computed ON computed.attempt_id = attempt.attempt_id
WHERE attempt.kind <> 'overhead'
GROUP BY attempt.run_id, attempt.pool, attempt.model;

-- FinOps FOCUS 1.2, one row per run, pool, model, meter, price and UTC day. Names that FOCUS has not ratified start
-- with x_. The list price is the pool's own; the counterfactual baseline stands in x_BaselineCost.
CREATE OR REPLACE VIEW focus AS
WITH model_of AS (
    SELECT attempt_id, model, "operator", jurisdiction FROM attempts
), grouped AS (
    SELECT
        charge.run_id, charge.pool, charge.meter, charge.price_id, charge.unit_price, charge.currency, charge.fx_rate,
        charge.tags, model_of.model, model_of."operator", model_of.jurisdiction,
        date_trunc('day', make_timestamp(epoch_us(charge.charged_at))) AS day,
        sum(charge.quantity) AS quantity,
        CAST(bidbeam_whole(charge.cost_native) AS DECIMAL(38, 18)) AS cost_native,
        CAST(bidbeam_whole(charge.cost) AS DECIMAL(38, 18)) AS cost,
        CAST(sum(charge.baseline_cost) AS DECIMAL(38, 18)) AS baseline_cost
    FROM charges AS charge
    LEFT JOIN model_of ON model_of.attempt_id = charge.attempt_id
    GROUP BY ALL
), unit AS (
    SELECT
        *,
        bidbeam_convert(CAST(unit_price AS DECIMAL(38, 18)), fx_rate) AS unit_price_usd,
        CASE
            WHEN meter = 'request' THEN 'Requests'
            WHEN meter IN ('uncached_input', 'cached_input', 'cache_write', 'output') THEN 'Tokens'
            ELSE 'Seconds' END AS unit_name
    FROM grouped
)
SELECT
    unit.cost AS "BilledCost",
    unit.pool AS "BillingAccountId",
    unit.pool AS "BillingAccountName",
    'USD' AS "BillingCurrency",
    date_trunc('month', unit.day) AS "BillingPeriodStart",
    date_trunc('month', unit.day) + INTERVAL 1 MONTH AS "BillingPeriodEnd",
    'Usage' AS "ChargeCategory",
    CAST(NULL AS VARCHAR) AS "ChargeClass",
    unit.meter || ' on ' || unit.pool AS "ChargeDescription",
    'Usage-Based' AS "ChargeFrequency",
    unit.day AS "ChargePeriodStart",
    unit.day + INTERVAL 1 DAY AS "ChargePeriodEnd",
    unit.quantity AS "ConsumedQuantity",
    unit.unit_name AS "ConsumedUnit",
    unit.cost AS "ContractedCost",
    unit.unit_price_usd AS "ContractedUnitPrice",
    unit.cost AS "EffectiveCost",
    unit.pool AS "InvoiceIssuerName",
    unit.cost AS "ListCost",
    unit.unit_price_usd AS "ListUnitPrice",
    'Standard' AS "PricingCategory",
    unit.currency AS "PricingCurrency",
    unit.unit_price AS "PricingCurrencyContractedUnitPrice",
    unit.cost_native AS "PricingCurrencyEffectiveCost",
    unit.unit_price AS "PricingCurrencyListUnitPrice",
    unit.quantity AS "PricingQuantity",
    unit.unit_name AS "PricingUnit",
    unit.pool AS "ProviderName",
    coalesce(unit."operator", unit.pool) AS "PublisherName",
    'AI and Machine Learning' AS "ServiceCategory",
    'Model inference' AS "ServiceName",
    'Generative AI' AS "ServiceSubcategory",
    unit.pool || '/' || unit.meter AS "SkuId",
    unit.meter AS "SkuMeter",
    unit.price_id || '/' || unit.meter AS "SkuPriceId",
    runs.name AS "SubAccountId",
    runs.name AS "SubAccountName",
    unit.tags AS "Tags",
    unit.baseline_cost AS "x_BaselineCost",
    unit.fx_rate AS "x_FxRate",
    unit.jurisdiction AS "x_Jurisdiction",
    unit.model AS "x_ModelId",
    unit.run_id AS "x_RunId",
    CASE
        WHEN unit.meter IN ('uncached_input', 'cached_input', 'cache_write') THEN 'Input'
        WHEN unit.meter = 'output' THEN 'Output' END AS "x_TokenDirection",
    CASE unit.meter
        WHEN 'uncached_input' THEN 'Uncached' WHEN 'cached_input' THEN 'Read'
        WHEN 'cache_write' THEN 'Write' END AS "x_TokenCacheAction"
FROM unit
LEFT JOIN runs ON runs.run_id = unit.run_id;
