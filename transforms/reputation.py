"""Reputation: what the ledger's earlier runs teach of each pool and model, and what is believed before they do.

Counts weigh half as much for every ``HALF_LIFE_DAYS`` of their age, so that a pool is judged by what it does now and a
bad week is forgotten. What depends on the prompts (the length of answers, how a provider counts tokens, what of the
ideal its cache achieves) is taken from the narrowest evidence that is enough: this job's own answers from the pool,
then this job's from any pool, then the pool's from any job. A pure function from sums to values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from bidbeam.connectors.pools import PoolSpec

if TYPE_CHECKING:
    from bidbeam.connectors.ledger_history import Deeds

HALF_LIFE_DAYS = 14.0
HISTORY_DAYS = 90
"""Runs further back weigh less than a hundredth, and are not read."""

PRIOR_FAILURES, PRIOR_SUCCESSES = 1.0, 49.0
"""The Beta prior of an attempt's failure: one in fifty, for a pool of which nothing is known."""
PRIOR_SPREAD = 0.3
"""Relative spread of the time that work takes, until runs have shown it; worth as much as ``_SPREAD_RUNS`` runs."""
_SPREAD_RUNS = 3.0

ENOUGH_ANSWERS = 30
"""Answers from which their mean is taken as it is."""
SOME_ANSWERS = 8
"""Answers of the job itself from which they say more than a prior."""
NEWCOMER_ATTEMPTS = 30.0
"""A pool of fewer attempts, by weight, is a newcomer where another one has more."""

RECOUNT_TOLERANCE = 0.02
"""Reports may differ from our recount by this much: templates and tokenizers' versions do."""
BILL_TOLERANCE = 0.01

_LEAST_TIMED_US = 100_000
"""A run whose answers took less in all, such as a rehearsal, says nothing of speed."""
_REFUSES = 0.01
"""Share of refused attempts from which what a pool served is taken for all that it can."""
_HIGH = 0.95


@dataclass(frozen=True, slots=True)
class Reputation:
    """What is believed of one pool and model. None is unknown: the pool's own declaration or a prior then stands in."""

    successes: float = 0.0
    failures: float = 0.0
    """Attempts by outcome, weighted by age; rate limits, callers' faults and what was cancelled are neither."""
    answers: int = 0
    """Answers that the figures below rest on, of whatever age."""
    uptime: float | None = None
    """Share of the minutes with at least ten attempts in which at least four of five succeeded."""
    latency_s: float | None = None
    latency_p95_s: float | None = None
    """Seconds from handing a request over to its answer: the mean, and what 95 % stay below."""
    tokens_per_second: float | None = None
    """Uncached input plus output, with all the concurrency or engines that the pool declares."""
    limit_tokens_per_second: float | None = None
    """What it served while it refused more; None: it has refused nothing, its limit is not known."""
    spread: float = PRIOR_SPREAD
    """Relative standard deviation of the time that the same work takes from run to run."""
    cache_share: float | None = None
    """Cached tokens that it reported per token of the lots' ideal."""
    input_ratio: float | None = None
    """Input tokens that it reported per token that we planned with."""
    output_share: float | None = None
    """Output tokens per token of ``max_tokens``; ``output_share_p95`` is that of the longest answers."""
    output_share_p95: float | None = None
    failed_cost: float = 0.0
    """What a failed attempt is charged, as a share of what an answered one is."""
    retried_here: float = 0.0
    """Share of the requests that failed here which it answered itself in the end; the others went to the runner-up."""
    excess: float | None = None
    """How much more it reports or bills than we count, beyond what is tolerated, as a share; None: never compared."""
    misnamed: float | None = None
    """Share of its answers that plainly name another model than was asked for; None: never compared."""
    overhead_s: float | None = None
    """Seconds of loading and idling that a run pays an engine for; None where the pool is not paid by time."""
    setup_s: float | None = None
    """Seconds until one of its engines serves: loading it, or renting the node; None: never seen."""
    newcomer: bool = False

    @property
    def doubt(self) -> float:
        """How far what it says of its answers is to be doubted, as a share: by the worse of the two above."""
        return max(self.excess or 0.0, self.misnamed or 0.0)

    @property
    def failure_rate(self) -> float:
        """The mean of the Beta posterior."""
        failures = self.failures + PRIOR_FAILURES
        return failures / (failures + self.successes + PRIOR_SUCCESSES)

    @property
    def seen_failure_rate(self) -> float:
        """The share of attempts that failed, without a prior; 0 of none."""
        return self.failures / (self.successes + self.failures) if self.failures else 0.0


def reputations(
    deeds: Sequence[Deeds], pools: Sequence[PoolSpec], *, now: datetime
) -> dict[tuple[str, str], Reputation]:
    """(pool, model) -> what is believed of it, for every model that each of the pools serves. Deterministic."""
    weighed = [(deed, _weight(deed.last_at, now)) for deed in sorted(deeds, key=lambda deed: deed.key)]
    found = {
        (spec.name, model): _of_pool(spec, [each for each in weighed if each[0].model == model])
        for spec in pools
        for model in spec.models
    }
    proven = {model for (_, model), each in found.items() if _attempts(each) >= NEWCOMER_ATTEMPTS}
    return {
        key: replace(each, newcomer=True) if key[1] in proven and _attempts(each) < NEWCOMER_ATTEMPTS else each
        for key, each in found.items()
    }


def _attempts(known: Reputation) -> float:
    return known.successes + known.failures


def _weight(at: datetime, now: datetime) -> float:
    age_days = max((now - at).total_seconds(), 0.0) / 86_400
    return math.exp2(-age_days / HALF_LIFE_DAYS)


Weighed = Sequence[tuple["Deeds", float]]


def _of_pool(spec: PoolSpec, of_model: Weighed) -> Reputation:
    """One pool and model; ``of_model`` holds all pools' deeds with that model."""
    mine = [(deed, weight) for deed, weight in of_model if deed.pool == spec.name]
    job = [(deed, weight) for deed, weight in of_model if deed.same_job]
    both = [(deed, weight) for deed, weight in mine if deed.same_job]
    answers = _narrowest((both, SOME_ANSWERS), (job, SOME_ANSWERS), (mine, ENOUGH_ANSWERS), (of_model, ENOUGH_ANSWERS))
    counted = _narrowest((both, SOME_ANSWERS), (job, SOME_ANSWERS), (mine, ENOUGH_ANSWERS))
    cached = _narrowest((both, SOME_ANSWERS), (mine, ENOUGH_ANSWERS))
    minutes = sum(deed.minutes for deed, _ in mine)
    failed = sum(deed.failed for deed, _ in mine)
    served = sum(deed.ok for deed, _ in mine)
    failed_cost = _ratio(mine, lambda d: float(d.failed_cost), lambda d: d.failed)
    served_cost = _ratio(mine, lambda d: float(d.ok_cost), lambda d: d.ok)
    speed, limit = _speeds(spec, mine)
    return Reputation(
        successes=sum(weight * deed.ok for deed, weight in mine),
        failures=sum(weight * deed.failed for deed, weight in mine),
        answers=sum(deed.answers for deed, _ in mine),
        uptime=sum(deed.minutes_up for deed, _ in mine) / minutes if minutes else None,
        latency_s=_scaled(_ratio(mine, lambda d: d.busy_us, lambda d: d.answers), 1e-6),
        latency_p95_s=_quantile((deed.latencies for deed, _ in mine), _latency_of),
        tokens_per_second=speed,
        limit_tokens_per_second=limit,
        spread=_spread(spec, mine),
        cache_share=_ratio(cached, lambda d: d.cached_tokens, lambda d: d.reusable_tokens),
        input_ratio=_ratio(counted, lambda d: d.input_tokens, lambda d: d.planned_tokens),
        output_share=_ratio(answers, lambda d: d.output_tokens, lambda d: d.most_output_tokens),
        output_share_p95=_quantile((deed.lengths for deed, _ in answers), _length_of),
        failed_cost=failed_cost / served_cost if failed and served and failed_cost and served_cost else 0.0,
        retried_here=_ratio(mine, lambda d: d.retried_here, lambda d: d.retried) or 0.0,
        excess=_excess(mine),
        misnamed=_ratio(mine, lambda d: d.misnamed, lambda d: d.named),
        overhead_s=_overhead(spec, both or mine),
        setup_s=_scaled(_ratio(mine, lambda d: d.setup_ms, lambda d: d.setups), 1e-3),
    )


def _narrowest(*levels: tuple[Weighed, int]) -> Weighed:
    """The first of the levels that has as many answers as it asks for; else nothing."""
    return next((deeds for deeds, least in levels if sum(deed.answers for deed, _ in deeds) >= least), ())


def _ratio(deeds: Weighed, above: Callable[[Deeds], float], below: Callable[[Deeds], float]) -> float | None:
    """Weighted sum over weighted sum; None of nothing."""
    total = sum(weight * below(deed) for deed, weight in deeds)
    return sum(weight * above(deed) for deed, weight in deeds) / total if total > 0 else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _speeds(spec: PoolSpec, mine: Weighed) -> tuple[float | None, float | None]:
    """Tokens per second with all that the pool declares, and what it served while it refused more."""
    timed = [(deed, weight) for deed, weight in mine if deed.busy_us >= _LEAST_TIMED_US]
    if spec.price.by_time:
        by_engine = _ratio(mine, lambda d: 1000.0 * d.tokens, lambda d: d.accelerator_ms)
        return (by_engine * max(spec.capacity.workers, 1) if by_engine else None), None
    achieved = _ratio(timed, lambda d: 1e6 * d.tokens, lambda d: d.window_us)
    if not achieved:
        return None, None
    tried = sum(weight * (deed.ok + deed.failed + deed.refused) for deed, weight in mine)
    refused = sum(weight * deed.refused for deed, weight in mine)
    if refused > _REFUSES * tried:
        return achieved, achieved
    if spec.kind == "batch":
        return achieved, None
    from bidbeam.connectors.http_engine import DEFAULT_CONCURRENCY

    by_slot = _ratio(timed, lambda d: 1e6 * d.tokens, lambda d: d.busy_us) or 0.0
    return max(achieved, by_slot * (spec.capacity.concurrency or DEFAULT_CONCURRENCY)), None


def _spread(spec: PoolSpec, mine: Weighed) -> float:
    """How much the time per token varied from run to run, drawn towards the prior where runs are few."""
    paces = []
    for deed, weight in mine:
        time = deed.accelerator_ms * 1000 if spec.price.by_time else deed.busy_us
        if deed.tokens and time >= _LEAST_TIMED_US:
            paces.append((math.log(time / deed.tokens), weight))
    total = sum(weight for _, weight in paces)
    if not total:
        return PRIOR_SPREAD
    mean = sum(pace * weight for pace, weight in paces) / total
    squares = sum(weight * (pace - mean) ** 2 for pace, weight in paces)
    return math.sqrt((_SPREAD_RUNS * PRIOR_SPREAD**2 + squares) / (_SPREAD_RUNS + total))


def _excess(mine: Weighed) -> float | None:
    """How far the worst of three comparisons is beyond its tolerance: input, output, and the provider's own bill."""
    reported_input = _ratio(mine, lambda d: d.compared_input, lambda d: d.recount_input)
    reported_output = _ratio(mine, lambda d: d.compared_output, lambda d: d.recount_output)
    billed = _ratio(mine, lambda d: float(d.provider_cost), lambda d: float(d.compared_cost))
    beyond = [
        ratio - 1 - tolerance
        for ratio, tolerance in (
            (reported_input, RECOUNT_TOLERANCE),
            (reported_output, RECOUNT_TOLERANCE),
            (billed, BILL_TOLERANCE),
        )
        if ratio is not None
    ]
    return max([0.0, *beyond]) if beyond else None


def _overhead(spec: PoolSpec, deeds: Weighed) -> float | None:
    if not spec.price.by_time:
        return None
    return _ratio(deeds, lambda d: d.overhead_ms / 1000.0, lambda _: 1.0)


def _quantile(histograms: Iterable[Mapping[int, int]], value_of: Callable[[int], float]) -> float | None:
    """The value that 95 % of the counts are at or below, to the width of a bin; None of nothing."""
    counts: dict[int, int] = {}
    for histogram in histograms:
        for place, count in histogram.items():
            counts[place] = counts.get(place, 0) + count
    total, seen = sum(counts.values()), 0
    for place in sorted(counts):
        seen += counts[place]
        if seen >= _HIGH * total:
            return value_of(place)
    return None


def _latency_of(place: int) -> float:
    """Seconds at the upper edge of a bin; four bins to a doubling of microseconds."""
    return float(2.0 ** ((place + 1) / 4)) / 1e6


def _length_of(place: int) -> float:
    """Share of ``max_tokens``, in hundredths."""
    return place / 100
