"""What must hold in a ledger, as SQL that selects the rows where it does not.

A rule looks at all rows of one table. Its query gives the rows at fault, each with what names it, what stands there and
what should: the arithmetic is DuckDB's own, in decimals, and shares no code with what wrote the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """``table`` says what is counted as checked; ``faults`` is a query over the ledger's views."""

    name: str
    says: str
    table: str
    faults: str


RULES = (
    Rule(
        "charges.cost_native",
        "cost_native is quantity x unit_price, to the last digit",
        "charges",
        """
        SELECT run_id, charge_id, meter, quantity, unit_price, cost_native, quantity * unit_price AS expected
        FROM charges
        WHERE cost_native IS DISTINCT FROM quantity * unit_price OR quantity < 0 OR unit_price < 0""",
    ),
    Rule(
        "charges.cost",
        "cost is cost_native x fx_rate, half-even at 18 places, and the rate of a dollar is 1",
        "charges",
        """
        SELECT
            run_id, charge_id, currency, cost_native, fx_rate, cost,
            bidbeam_convert(cost_native, fx_rate) AS expected
        FROM charges
        WHERE cost IS DISTINCT FROM bidbeam_convert(cost_native, fx_rate) OR (currency = 'USD') <> (fx_rate = 1)""",
    ),
    Rule(
        "charges.price_id",
        "every charge is at the price, and in the currency, of a schedule that its run lists",
        "charges",
        """
        SELECT
            charge.run_id, charge.charge_id, charge.price_id, charge.meter, charge.pool, charge.unit_price,
            price.unit_price AS expected, charge.currency
        FROM charges AS charge
        LEFT JOIN prices AS price ON price.price_id = charge.price_id AND price.meter = charge.meter
        WHERE price.price_id IS NULL OR price.unit_price IS DISTINCT FROM charge.unit_price
            OR price.currency IS DISTINCT FROM charge.currency OR price.pool IS DISTINCT FROM charge.pool""",
    ),
    Rule(
        "charges.attempt_id",
        "every charge is of an attempt of its run, on the same pool and for the same request, once for each meter",
        "charges",
        """
        SELECT charge.run_id, charge.charge_id, charge.attempt_id, charge.meter, charge.pool, charge.request_id
        FROM charges AS charge
        LEFT JOIN attempts AS attempt ON attempt.attempt_id = charge.attempt_id AND attempt.run_id = charge.run_id
        WHERE attempt.attempt_id IS NULL OR attempt.pool IS DISTINCT FROM charge.pool
            OR attempt.request_id IS DISTINCT FROM charge.request_id
        UNION ALL
        SELECT any_value(run_id), any_value(charge_id), attempt_id, meter, any_value(pool), any_value(request_id)
        FROM charges
        GROUP BY attempt_id, meter
        HAVING count(*) > 1""",
    ),
    # Which baseline counted stands on the charge; its list may have changed between two starts of the run, and a start
    # books what one before it had settled. A ledger from before the name stood there is held to any list of the run.
    Rule(
        "charges.baseline_cost",
        "baseline_cost is what the served attempt's tokens cost at the run's list, once, and unknown where they are",
        "charges",
        """
        WITH listed AS (
            SELECT
                run_id, "start", baseline, model,
                max(unit_price) FILTER (WHERE meter = 'uncached_input') AS input_price,
                max(unit_price) FILTER (WHERE meter = 'cached_input') AS cached_price,
                max(unit_price) FILTER (WHERE meter = 'output') AS output_price,
                max(unit_price) FILTER (WHERE meter = 'request') AS request_price
            FROM baselines
            GROUP BY run_id, "start", baseline, model
        ), counted AS (
            SELECT
                run_id, attempt_id, count(baseline_cost) AS times, max(baseline_cost) AS baseline_cost,
                max(baseline) AS baseline, count(DISTINCT baseline) AS baselines
            FROM charges
            GROUP BY run_id, attempt_id
        ), compared AS (
            SELECT
                counted.run_id, counted.attempt_id, counted.baseline, counted.baseline_cost, counted.times,
                counted.baselines,
                CASE WHEN attempt.status = 'ok' AND attempt.kind NOT IN ('audit', 'hedge', 'overhead', 'probe')
                    AND attempt.usage_source <> 'estimate' THEN CAST(
                        (attempt.input_tokens - coalesce(attempt.cached_tokens, 0)) * listed.input_price
                        + coalesce(attempt.cached_tokens, 0) * coalesce(listed.cached_price, listed.input_price)
                        + attempt.output_tokens * listed.output_price
                        + coalesce(listed.request_price, 0) AS DECIMAL(38, 18)) END AS expected
            FROM counted
            JOIN attempts AS attempt
                ON attempt.attempt_id = counted.attempt_id AND attempt.run_id = counted.run_id
            LEFT JOIN listed
                ON listed.run_id = counted.run_id AND (listed.model IS NULL OR listed.model = attempt.model)
                AND (counted.baseline IS NULL OR listed.baseline = counted.baseline)
        )
        SELECT
            run_id, attempt_id, any_value(baseline) AS baseline, any_value(baseline_cost) AS baseline_cost,
            any_value(expected) AS expected
        FROM compared
        GROUP BY run_id, attempt_id
        HAVING any_value(times) > 1 OR any_value(baselines) > 1 OR NOT (
            bool_or(baseline_cost IS NOT DISTINCT FROM expected)
            OR (any_value(baseline) IS NULL AND any_value(baseline_cost) IS NULL))""",
    ),
    Rule(
        "attempts.attempt_id",
        "no attempt stands there twice",
        "attempts",
        """
        SELECT attempt_id, count(*) AS times
        FROM attempts
        GROUP BY attempt_id
        HAVING count(*) > 1 OR attempt_id IS NULL""",
    ),
    Rule(
        "attempts.tokens",
        "cached and cache-written tokens are parts of the input, no count is negative, nothing ends before it starts",
        "attempts",
        """
        SELECT
            run_id, attempt_id, input_tokens, cached_tokens, cache_write_tokens, output_tokens, started_at, finished_at
        FROM attempts
        WHERE coalesce(cached_tokens, 0) + coalesce(cache_write_tokens, 0) > input_tokens
            OR (coalesce(cached_tokens, cache_write_tokens) IS NOT NULL AND input_tokens IS NULL)
            OR least(input_tokens, cached_tokens, cache_write_tokens, output_tokens) < 0
            OR finished_at < started_at""",
    ),
    Rule(
        "attempts.charged",
        "the quantities that are charged by the token are the attempt's tokens",
        "attempts",
        """
        WITH charged AS (
            SELECT
                attempt_id,
                sum(quantity) FILTER (WHERE meter IN ('uncached_input', 'cached_input', 'cache_write'))
                    AS charged_input,
                sum(quantity) FILTER (WHERE meter = 'output') AS charged_output
            FROM charges
            GROUP BY attempt_id)
        SELECT
            attempt.run_id, attempt.attempt_id, attempt.input_tokens, charged.charged_input, attempt.output_tokens,
            charged.charged_output
        FROM attempts AS attempt
        JOIN charged ON charged.attempt_id = attempt.attempt_id
        WHERE (charged_input IS NOT NULL AND charged_input IS DISTINCT FROM attempt.input_tokens)
            OR (charged_output IS NOT NULL AND charged_output IS DISTINCT FROM attempt.output_tokens)""",
    ),
    Rule(
        "requests.status",
        "a served request names the attempt that answered it, a dead one its reason",
        "requests",
        """
        SELECT
            request.run_id, request.request_id, request.source_file, request.source_row, request.status, request.reason,
            request.attempt_id, attempt.status AS attempt_status
        FROM requests AS request
        LEFT JOIN attempts AS attempt ON attempt.attempt_id = request.attempt_id AND attempt.run_id = request.run_id
        WHERE NOT coalesce(CASE request.status
            WHEN 'served' THEN attempt.status = 'ok' AND request.reason IS NULL
            WHEN 'dead' THEN request.reason IS NOT NULL AND (request.attempt_id IS NULL OR attempt.status IS NOT NULL)
            END, false)""",
    ),
    Rule(
        "requests.shared_with",
        "a request that shares another's answer costs nothing and names one of its run that does not share",
        "requests",
        """
        SELECT request.run_id, request.request_id, request.shared_with, request.cost
        FROM requests AS request
        WHERE request.shared_with IS NOT NULL AND (request.cost IS DISTINCT FROM 0 OR NOT EXISTS (
            SELECT 1 FROM requests AS leader
            WHERE leader.run_id = request.run_id AND leader.request_id = request.shared_with
                AND leader.shared_with IS NULL))""",
    ),
    # An answer is kept by what was asked. Where a row of the input changed or moved between two starts of a run, the
    # charges under its id are not all its own: then its cost lies between those of its last attempt and all of them.
    Rule(
        "requests.cost",
        "a request costs what all its attempts were charged",
        "requests",
        """
        WITH charged AS (
            SELECT attempt_id, bidbeam_whole(cost) AS cost FROM charges GROUP BY attempt_id
        ), tried AS (
            SELECT
                attempt.run_id, attempt.request_id,
                sum(coalesce(charged.cost, CAST(0 AS DECIMAL(38, 18)))) AS cost,
                count(DISTINCT regexp_extract(attempt.lot_id, '^s[0-9]+')) AS starts
            FROM attempts AS attempt
            LEFT JOIN charged ON charged.attempt_id = attempt.attempt_id
            WHERE attempt.request_id IS NOT NULL
            GROUP BY attempt.run_id, attempt.request_id
        ), compared AS (
            SELECT
                request.run_id, request.request_id, request.cost, request.attempt_id,
                CASE WHEN request.attempt_id IS NULL THEN CAST(0 AS DECIMAL(38, 18)) ELSE tried.cost END AS expected,
                CASE WHEN last_charged.attempt_id IS NULL THEN CAST(0 AS DECIMAL(38, 18)) ELSE last_charged.cost
                    END AS at_least,
                coalesce(tried.starts, 1) AS starts, last.request_id AS tried_as
            FROM requests AS request
            LEFT JOIN tried ON tried.run_id = request.run_id AND tried.request_id = request.request_id
            LEFT JOIN attempts AS last ON last.attempt_id = request.attempt_id AND last.run_id = request.run_id
            LEFT JOIN charged AS last_charged ON last_charged.attempt_id = request.attempt_id
            WHERE request.shared_with IS NULL
        )
        SELECT run_id, request_id, attempt_id, cost, expected
        FROM compared
        WHERE CASE
            WHEN tried_as IS DISTINCT FROM request_id AND attempt_id IS NOT NULL
                THEN NOT coalesce(cost >= at_least, false)
            WHEN starts > 1 THEN NOT coalesce(cost BETWEEN at_least AND expected, false)
            ELSE cost IS DISTINCT FROM expected END""",
    ),
    Rule(
        "runs.cost",
        "a finished run costs the sum of its charges",
        "runs",
        """
        SELECT runs.run_id, runs.cost, coalesce(charged.cost, 0) AS expected
        FROM runs
        LEFT JOIN (SELECT run_id, bidbeam_whole(cost) AS cost FROM charges GROUP BY run_id) AS charged
            ON charged.run_id = runs.run_id
        WHERE runs.finished_at IS NOT NULL AND runs.status IN ('complete', 'incomplete')
            AND runs.cost IS DISTINCT FROM coalesce(charged.cost, 0)""",
    ),
    Rule(
        "runs.requests",
        "a finished run's requests, served and dead, are those of the table requests, each input row once",
        "runs",
        """
        WITH counted AS (
            SELECT
                run_id, count(*) AS requests, count(*) FILTER (WHERE status = 'served') AS served,
                count(*) FILTER (WHERE status = 'dead') AS dead,
                count(DISTINCT (source_file, source_row)) AS input_rows
            FROM requests
            GROUP BY run_id)
        SELECT
            runs.run_id, runs.requests, counted.requests AS counted, counted.input_rows, runs.served,
            counted.served AS counted_served, runs.dead, counted.dead AS counted_dead
        FROM runs
        LEFT JOIN counted ON counted.run_id = runs.run_id
        WHERE runs.finished_at IS NOT NULL AND runs.status IN ('complete', 'incomplete') AND (
            runs.requests IS DISTINCT FROM coalesce(counted.requests, 0)
            OR runs.served IS DISTINCT FROM coalesce(counted.served, 0)
            OR runs.dead IS DISTINCT FROM coalesce(counted.dead, 0) OR counted.input_rows <> counted.requests)""",
    ),
    Rule(
        "runs.tokens",
        "a finished run's tokens are those of the attempts that answered",
        "runs",
        """
        WITH counted AS (
            SELECT
                request.run_id, CAST(sum(attempt.input_tokens) AS BIGINT) AS input_tokens,
                CAST(sum(attempt.cached_tokens) AS BIGINT) AS cached_tokens,
                CAST(sum(attempt.output_tokens) AS BIGINT) AS output_tokens
            FROM requests AS request
            JOIN attempts AS attempt ON attempt.attempt_id = request.attempt_id AND attempt.run_id = request.run_id
            WHERE request.status = 'served' AND request.shared_with IS NULL
            GROUP BY request.run_id)
        SELECT
            runs.run_id, runs.input_tokens, counted.input_tokens AS counted_input, runs.cached_tokens,
            counted.cached_tokens AS counted_cached, runs.output_tokens, counted.output_tokens AS counted_output
        FROM runs
        LEFT JOIN counted ON counted.run_id = runs.run_id
        WHERE runs.finished_at IS NOT NULL AND runs.status IN ('complete', 'incomplete') AND (
            coalesce(runs.input_tokens, 0) <> coalesce(counted.input_tokens, 0)
            OR coalesce(runs.cached_tokens, 0) <> coalesce(counted.cached_tokens, 0)
            OR coalesce(runs.output_tokens, 0) <> coalesce(counted.output_tokens, 0))""",
    ),
    Rule(
        "bids.score",
        "a bid is eligible or says why not; its score is the sum of its parts; its worst case covers what it expects",
        "bids",
        """
        SELECT run_id, round, lot_id, pool, eligible, reject_reason, score, expected_cost, worst_case_cost
        FROM bids
        WHERE eligible IS DISTINCT FROM (reject_reason IS NULL) OR worst_case_cost < expected_cost
            OR (eligible AND score IS DISTINCT FROM expected_cost + risk_cost + lateness_cost
                + coalesce(audit_cost, 0) + coalesce(demand_cost, 0) + coalesce(setup_cost, 0)
                - coalesce(exploration_credit, 0))""",
    ),
    Rule(
        "awards.pool",
        "winner and runner-up of every award had an eligible bid for that lot, and are two pools",
        "awards",
        """
        SELECT award.run_id, award.round, award.lot_id, award.pool, award.runner_up
        FROM awards AS award
        LEFT JOIN bids AS won ON won.run_id = award.run_id AND won."start" IS NOT DISTINCT FROM award."start"
            AND won.round = award.round AND won.lot_id = award.lot_id AND won.pool = award.pool AND won.eligible
        LEFT JOIN bids AS next_best ON next_best.run_id = award.run_id
            AND next_best."start" IS NOT DISTINCT FROM award."start" AND next_best.round = award.round
            AND next_best.lot_id = award.lot_id AND next_best.pool = award.runner_up AND next_best.eligible
        WHERE won.pool IS NULL OR (award.runner_up IS NOT NULL AND next_best.pool IS NULL)
            OR award.runner_up = award.pool""",
    ),
    # A request that a pool charged for without an answer may be asked of it again, within what the round reserved for
    # all of its lots, or without a wall where there is no budget: an award reserves one try of each of its requests.
    # Where the budget does not cover them all, some are served from what others leave of their reserve.
    Rule(
        "awards.reserved",
        "what was paid by the token for lots, one try of each request, is within worst cases and what was reserved",
        "awards",
        """
        WITH by_time AS (
            SELECT DISTINCT price_id FROM prices WHERE meter LIKE 'accelerator%'
        ), tries AS (
            SELECT
                attempt.run_id, attempt.round, attempt.lot_id, attempt.pool, attempt.request_id, attempt.attempt_id,
                sum(charge.cost) AS cost
            FROM charges AS charge
            JOIN attempts AS attempt ON attempt.attempt_id = charge.attempt_id AND attempt.run_id = charge.run_id
            WHERE attempt.kind IN ('primary', 'retry') AND charge.price_id NOT IN (SELECT price_id FROM by_time)
            GROUP BY ALL
        ), dearest AS (
            SELECT run_id, round, lot_id, pool, request_id, max(cost) AS cost FROM tries GROUP BY ALL
        ), spent AS (
            SELECT run_id, round, lot_id, pool, sum(cost) AS spent FROM dearest GROUP BY ALL
        ), held AS (
            SELECT
                award.run_id, award.round, award.lot_id, award.pool, award.reserved, offer.worst_case_cost AS worst,
                spent.spent, award.price_paid, award.payment_rule,
                sum(CASE WHEN offer.price_id NOT IN (SELECT price_id FROM by_time) THEN award.reserved END)
                    OVER together AS covered,
                sum(spent.spent) OVER together AS paid, sum(award.reserved) OVER together AS together, auction.budget
            FROM awards AS award
            LEFT JOIN bids AS offer ON offer.run_id = award.run_id
                AND offer."start" IS NOT DISTINCT FROM award."start" AND offer.round = award.round
                AND offer.lot_id = award.lot_id AND offer.pool = award.pool
            LEFT JOIN spent ON spent.run_id = award.run_id AND spent.round = award.round
                AND spent.lot_id = award.lot_id AND spent.pool = award.pool
            LEFT JOIN auctions AS auction ON auction.run_id = award.run_id
                AND auction."start" IS NOT DISTINCT FROM award."start" AND auction.round = award.round
            WINDOW together AS (PARTITION BY award.run_id, award."start", award.round))
        SELECT run_id, round, lot_id, pool, reserved, worst, spent, price_paid, covered, paid, budget
        FROM held
        WHERE reserved > worst OR spent > worst OR paid > covered
            OR (reserved < worst AND together IS DISTINCT FROM budget)
            OR (payment_rule = 'pay_as_bid' AND price_paid > worst)""",
    ),
    Rule(
        "auctions.lp_bound",
        "no clearing claims to be better than the bound, and each awarded as many lots as there are awards",
        "auctions",
        """
        WITH cleared AS (
            SELECT run_id, "start", round, sum(awarded) AS awarded FROM auctions GROUP BY run_id, "start", round
        ), made AS (
            SELECT run_id, "start", round, count(*) AS awards FROM awards GROUP BY run_id, "start", round)
        SELECT
            auction.run_id, auction."start", auction.round, auction.objective, auction.lp_bound, auction.regret,
            cleared.awarded, made.awards
        FROM auctions AS auction
        JOIN cleared ON cleared.run_id = auction.run_id AND cleared."start" IS NOT DISTINCT FROM auction."start"
            AND cleared.round = auction.round
        LEFT JOIN made ON made.run_id = auction.run_id AND made."start" IS NOT DISTINCT FROM auction."start"
            AND made.round = auction.round
        WHERE auction.objective < auction.lp_bound OR auction.regret < 0
            OR cleared.awarded IS DISTINCT FROM coalesce(made.awards, 0)""",
    ),
)

SEEN_PLACES = """
SELECT lot.placement, attempt.jurisdiction, attempt."operator", count(*) AS attempts,
    any_value(attempt.run_id) AS run_id, any_value(attempt.pool) AS pool,
    any_value(CAST(attempt.attempt_id AS VARCHAR)) AS attempt_id
FROM attempts AS attempt
JOIN lots AS lot ON lot.run_id = attempt.run_id AND lot.round = attempt.round AND lot.lot_id = attempt.lot_id
WHERE lot.placement IS NOT NULL
GROUP BY lot.placement, attempt.jurisdiction, attempt."operator"
"""
"""Where attempts were made, beside the placement that their lots were auctioned under."""

PUBLISHED = """
SELECT coalesce(published.request_id, request.request_id) AS request_id, published.cost AS published, request.cost
FROM published
FULL JOIN (SELECT request_id, cost FROM requests WHERE run_id = getvariable('run_id') AND status = 'served') AS request
    ON request.request_id = published.request_id
WHERE published.cost IS DISTINCT FROM request.cost OR published.request_id IS NULL OR request.request_id IS NULL
"""
"""Outputs (the table ``published``) whose cost is not that of their request in the ledger."""
