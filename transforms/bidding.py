"""Every pool's bid for every lot: may it, what would it cost, at worst how much, and when would it be done.

A pure function from a table of lots and the states of pools to matrices of shape (lots, pools). The score of a bid is
money: the expected bill and what ``scoring`` adds to it. A pool bids *cold*; where it also wins the lot before, whose
prefix this one continues, or has served that in an earlier round, it bids *warm* (see ``affinity``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import BIDS, COST, UTC
from bidbeam.transforms.expecting import (
    DEFAULT_TOKENS_PER_SECOND,
    WORST_SLOWDOWN,
    LotColumns,
    PoolState,
    by_lot,
    expected_usage,
    prior_state,
    speed_of,
    worst_usage,
)
from bidbeam.transforms.placement import eligible
from bidbeam.transforms.pricing import Floats, Ints, Usage, bill, bill_float, parts_per_million, rate_of
from bidbeam.transforms.reputation import Reputation
from bidbeam.transforms.scoring import (
    AUDITS_PER_EXCESS,
    EXPLORE_DISCOUNT_PPM,
    PPM,
    demand_ppm,
    explored,
    lateness_ppm,
    ppm,
    risk_ppm,
    rule_text,
    setup_ppm,
    urgency,
)

__all__ = [
    "DEFAULT_TOKENS_PER_SECOND", "WORST_SLOWDOWN", "BidMatrix", "LotColumns",
    "PoolState", "expected_usage", "finish_times", "make_bids", "prior_state", "speed_of",
]  # fmt: skip

Bools = npt.NDArray[np.bool_]

_SUMMAND = pa.decimal128(37, 18)


def _reject_reasons(
    lots: LotColumns, pool: PoolState, rate: Decimal | None, *, finish: Floats, late: float
) -> pa.Array:
    """The first rule that keeps the pool from each lot, or null. ``finish`` and ``late`` are seconds from now."""
    n = len(lots)
    reason = pa.nulls(n, pa.string())
    reason = pc.if_else(pa.array(finish > late), "deadline", reason)
    if pool.context is not None:
        reason = pc.if_else(pa.array(lots.longest > pool.context), "too_long", reason)
    if pool.tokens_per_second is not None and pool.tokens_per_second <= 0:
        reason = pa.repeat("capacity", n)
    if rate is None:
        reason = pa.repeat("price", n)
    for text in lots.placement.unique().to_pylist():
        may, why = eligible(json.loads(text) if text else None, pool.spec.placement)
        if not may:
            here = pc.is_null(lots.placement) if text is None else pc.equal(lots.placement, text).fill_null(False)
            reason = pc.if_else(here, why, reason)
    served = pc.is_in(lots.model, value_set=pa.array(list(pool.spec.models), pa.string()))
    return pc.if_else(served, reason, "model")


@dataclass(frozen=True, slots=True, eq=False)
class BidMatrix:
    """All bids of one round. Matrices have the shape (lots, pools); money in them is float64 USD, for ranking only.

    What is written down comes from ``expected_cost``, ``worst_case_cost`` and ``to_table``, in exact decimals.
    """

    lots: LotColumns
    pools: tuple[PoolState, ...]
    rates: tuple[Decimal | None, ...]
    """USD per unit of each pool's currency; None: unknown, and the pool is not eligible."""
    reject: tuple[pa.Array, ...]
    """Per pool the reason for each lot, null where it is eligible."""
    eligible: Bools
    score: Floats
    """Of a cold bid; inf where not eligible."""
    saving: Floats
    """How much lower a warm bid's score is."""
    seconds: Floats
    """Time a lot alone takes on the pool; nan where its speed is unknown."""
    now: datetime
    deadline: datetime | None
    urgency: Floats
    """How little slack each lot has before the deadline, 0 to 1, (lots,)."""
    setup_ppm: Ints
    """What each pool's set-up adds to each of its bids, (pools,)."""

    def expected_cost(self, pool: int, warm: Bools | None = None) -> pa.Array:
        """Expected bill in USD per lot (COST) on one pool, null where it has no rate."""
        return self._bill(pool, expected_usage(self.lots, self.pools[pool], warm))

    def worst_case_cost(self, pool: int) -> pa.Array:
        """The most a lot may cost in USD on one pool (COST), never below ``expected_cost``; what an award reserves."""
        return self._bill(pool, worst_usage(self.lots, self.pools[pool]))

    def worst_case_seconds(self, pool: int) -> Floats:
        """Engine seconds that an award on a pool paid by time reserves, per lot."""
        return worst_usage(self.lots, self.pools[pool]).milliseconds / 1000.0

    def risk_cost(self, pool: int, expected: pa.Array) -> pa.Array:
        """Expected cost of failures (COST): what a lot costs again, with what its failed attempts are charged."""
        return parts_per_million(expected, _risk_ppm(self.lots, self.pools[pool], self.urgency))

    def lateness_cost(self, pool: int, expected: pa.Array) -> pa.Array:
        """What it is worth (COST) that the lot may not be done before the deadline."""
        return parts_per_million(expected, self._lateness_ppm(pool))

    def audit_cost(self, pool: int, expected: pa.Array) -> pa.Array:
        """What it costs (COST) to check the answers of a pool whose reports are in doubt."""
        return parts_per_million(expected, _audit_ppm(self.lots, self.pools[pool]))

    def demand_cost(self, pool: int, expected: pa.Array) -> pa.Array:
        """What the pool asks beside its price (COST), by supply and demand; negative where it asks less."""
        share = _demand_ppm(self.lots, self.pools[pool], self.now, self.deadline, self.seconds[:, pool])
        return parts_per_million(expected, np.full(len(self.lots), share, dtype=np.int64))

    def setup_cost(self, pool: int, expected: pa.Array) -> pa.Array:
        """Each lot's share (COST) of what it costs to set the pool up."""
        return parts_per_million(expected, np.full(len(self.lots), self.setup_ppm[pool], dtype=np.int64))

    def exploration_credit(self, pool: int, expected: pa.Array) -> pa.Array:
        """How much lower (COST) a newcomer's bid is scored where it may show what it can."""
        return parts_per_million(expected, _explore_ppm(self.lots, self.pools, pool))

    def score_of(self, pool: int, expected: pa.Array) -> pa.Array:
        """The exact score (COST) of bids with these expected costs: the sum of the published terms."""
        score = expected
        for term in (self.risk_cost, self.lateness_cost, self.audit_cost, self.demand_cost, self.setup_cost):
            score = pc.add(score.cast(_SUMMAND), term(pool, expected).cast(_SUMMAND))
        credit = self.exploration_credit(pool, expected)
        return pc.subtract(score.cast(_SUMMAND), credit.cast(_SUMMAND))

    @property
    def rule(self) -> str:
        """The scoring rule's parameters, as they are published with the auction."""
        return rule_text()

    def _lateness_ppm(self, pool: int) -> Ints:
        return _lateness_ppm(self.lots, self.pools[pool], self.now, self.deadline, self.seconds[:, pool])

    def warm_where(self, awarded: Ints) -> Bools:
        """Which bids are warm, (lots, pools): the pool has been awarded what the lot follows. ``awarded`` is -1 for
        none."""
        warm = np.zeros(self.eligible.shape, dtype=np.bool_)
        before = np.flatnonzero((awarded[:-1] >= 0) & self.lots.follows[1:])
        warm[before + 1, awarded[before]] = True
        return warm

    def unserved_reason(self, lot: int) -> str | None:
        """Why nobody may serve a lot (a dead letter's reason), or None where somebody may.

        The rule that a pool fails last is what stands in the way: no pool but for time, then room, then length.
        """
        if self.eligible[lot].any():
            return None
        reasons = {column[lot].as_py() for column in self.reject}
        return next(
            (reason for reason in ("deadline", "capacity", "too_long") if reason in reasons), "no_eligible_pool"
        )

    def to_table(self, *, run_id: str, round_number: int, warm: Bools | None = None) -> pa.Table:
        """One row per lot and pool, pool by pool (BIDS). ``warm`` as from ``warm_where``, once the lots are awarded."""
        parts = [self._bids_of(pool, run_id, round_number, warm) for pool in range(len(self.pools))]
        return pa.concat_tables(parts).unify_dictionaries() if parts else BIDS.empty_table()

    def _bids_of(self, pool: int, run_id: str, round_number: int, warm: Bools | None) -> pa.Table:
        state, n = self.pools[pool], len(self.lots)
        known = pa.array(self.eligible[:, pool])
        usage = expected_usage(self.lots, state, None if warm is None else warm[:, pool])
        expected = self._bill(pool, usage)
        finish = finish_times(state, self.now, self.seconds[:, pool])

        def label(value: str) -> pa.Array:
            return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value], pa.string()))

        def offered(column: pa.Array) -> pa.Array:
            return pc.if_else(known, column, pa.scalar(None, column.type))

        return pa.Table.from_arrays(
            [
                label(run_id),
                pa.array(np.full(n, round_number, np.int16)),
                self.lots.lot_id,
                label(state.spec.name),
                known,
                self.reject[pool].dictionary_encode(),
                offered(pa.array(usage.cached)),
                offered(pa.array(usage.output)),
                offered(expected),
                offered(self.worst_case_cost(pool)),
                offered(self.risk_cost(pool, expected)),
                offered(self.lateness_cost(pool, expected)),
                offered(finish),
                offered(self.score_of(pool, expected)),
                label(state.spec.price.price_id),
                offered(self.audit_cost(pool, expected)),
                offered(self.exploration_credit(pool, expected)),
                offered(self.demand_cost(pool, expected)),
                offered(self.setup_cost(pool, expected)),
            ],
            schema=BIDS,
        )

    def _bill(self, pool: int, usage: Usage) -> pa.Array:
        rate = self.rates[pool]
        if rate is None:
            return pa.nulls(len(self.lots), COST)
        return bill(usage, self.pools[pool].spec.price, rate)


def _ppm_by_lot(lots: LotColumns, pool: PoolState, otherwise: int, pick: Callable[[Reputation], float]) -> Ints:
    return by_lot(lots, pool, otherwise, lambda known: ppm(pick(known))).astype(np.int64)


def _risk_ppm(lots: LotColumns, pool: PoolState, pressing: Floats) -> Ints:
    """Without a ledger's word: the mean of a Beta(0, 1) prior updated with what happened, 0 until something failed."""
    rate = pool.failures / (pool.successes + pool.failures + 1)
    fails = by_lot(lots, pool, rate, lambda known: known.failure_rate)
    return risk_ppm(fails, by_lot(lots, pool, 0.0, lambda known: known.failed_cost), pressing)


def _audit_ppm(lots: LotColumns, pool: PoolState) -> Ints:
    return _ppm_by_lot(lots, pool, 0, lambda known: min(AUDITS_PER_EXCESS * known.doubt, 1.0))


def _lateness_ppm(lots: LotColumns, pool: PoolState, now: datetime, deadline: datetime | None, seconds: Floats) -> Ints:
    if deadline is None:
        return np.zeros(len(lots), dtype=np.int64)
    # However fast a pool is in all, a lot is not done before its requests are.
    waits = pool.spec.kind == "batch"
    latency = np.zeros(len(lots)) if waits else by_lot(lots, pool, 0.0, lambda known: known.latency_p95_s)
    spread = by_lot(lots, pool, 0.0, lambda known: known.spread)
    duration = np.maximum(np.nan_to_num(seconds, nan=0.0), latency)
    left = (deadline - now).total_seconds() - _wait_s(pool, now)
    return lateness_ppm(duration, spread, pool.turnaround_s + pool.loading_s, left)


def _demand_ppm(lots: LotColumns, pool: PoolState, now: datetime, deadline: datetime | None, seconds: Floats) -> int:
    demand = pool.spec.price.demand
    if demand is None:
        return 0
    # All lots of its models, whoever may win them: what is known before any bid.
    models = pa.array(list(pool.spec.models), pa.string())
    asked = seconds[np.asarray(pc.is_in(lots.model, value_set=models))]
    left = None if deadline is None else (deadline - max(now, pool.available_from)).total_seconds()
    return demand_ppm(demand, float(np.nansum(asked)), left)


def _setup_ppm(lots: LotColumns, pool: PoolState, usage: Usage, may: Bools) -> int:
    """Of engines paid by time, one to a model and worker; what they cost is shared by all lots that they may serve."""
    if not pool.setup_s or not pool.spec.price.by_time:
        return 0
    models = len(pc.unique(lots.model.filter(pa.array(may))))
    engines = pool.spec.capacity.workers if pool.spec.kind == "vllm" else 1
    return setup_ppm(pool.setup_s * engines * models, float(usage.milliseconds[may].sum()) / 1000)


def _explore_ppm(lots: LotColumns, pools: Sequence[PoolState], at: int) -> Ints:
    """A newcomer's discount on its share of the lots of each model that better-known pools serve too."""
    credit = np.zeros(len(lots), dtype=np.int64)
    for model, known in pools[at].of_model.items():
        if known.newcomer:
            new = [place for place, pool in enumerate(pools) if (k := pool.of_model.get(model)) and k.newcomer]
            mine = explored(np.flatnonzero(lots.of_model(model)), len(new))[new.index(at)]
            credit[mine] = EXPLORE_DISCOUNT_PPM
    return credit


def finish_times(pool: PoolState, now: datetime, seconds: Floats) -> pa.Array:
    """When the pool would be done with this much work (UTC), null where its speed is unknown.

    A batch is done within its turnaround, whatever it holds, unless its pool declares a speed.
    """
    if pool.spec.kind == "batch":
        seconds = np.nan_to_num(seconds, nan=0.0)
    start = max(now, pool.available_from)
    micros = np.where(np.isnan(seconds), 0, np.ceil(seconds * 1e6)).astype(np.int64) + int(
        (start.timestamp() + pool.turnaround_s + pool.loading_s) * 1_000_000
    )
    return pa.array(micros, mask=np.isnan(seconds)).cast(UTC)


def make_bids(
    lots: pa.Table,
    pools: Sequence[PoolState],
    *,
    now: datetime,
    deadline: datetime | None = None,
    started_at: datetime | None = None,
    rates: Mapping[str, Decimal] | None = None,
) -> BidMatrix:
    """Every pool's bid for every lot; ``rates`` are USD per unit of each currency other than USD.

    A pool that may not serve a lot says why: ``model``, ``placement:<label>``, ``price`` (a currency without a rate),
    ``capacity`` (a speed of zero), ``too_long``, ``deadline`` (not even alone in time); the first of these that holds.
    ``started_at`` is when the time to the deadline began to run, None: now. Raises ConfigError for a placement that
    cannot be read.
    """
    if len({pool.spec.name for pool in pools}) < len(pools):
        raise ConfigError("two pools have the same name", key="pools", expected="names that differ")
    columns, shape = LotColumns.of(lots), (lots.num_rows, len(pools))
    score, saving, seconds = np.full(shape, np.inf), np.zeros(shape), np.full(shape, np.nan)
    may, some_day = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    reject = []
    known_rates = [rate_of(pool.spec.price.currency, rates or {}) for pool in pools]
    setup = np.zeros(len(pools), dtype=np.int64)
    left_s = None if deadline is None else (deadline - now).total_seconds()
    for at, (pool, rate) in enumerate(zip(pools, known_rates, strict=True)):
        cold, warm = expected_usage(columns, pool), expected_usage(columns, pool, columns.follows)
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds[:, at] = (cold.uncached + cold.output) / speed_of(columns, pool)
        # A speed that nobody declared and no refusal confirmed may make a bid dear, but keeps no pool from bidding.
        walled = np.nan_to_num(seconds[:, at], nan=0.0) if pool.tokens_per_second else np.zeros(len(columns))
        finish = _wait_s(pool, now) + pool.turnaround_s + walled
        reasons = _reject_reasons(columns, pool, rate, finish=finish, late=np.inf if left_s is None else left_s)
        reject.append(reasons)
        may[:, at] = np.asarray(pc.is_null(reasons))
        some_day[:, at] = may[:, at] | np.asarray(pc.fill_null(pc.equal(reasons, "deadline"), False))
        setup[at] = _setup_ppm(columns, pool, cold, may[:, at])
        if rate is not None:
            score[:, at] = bill_float(cold, pool.spec.price, rate)
            saving[:, at] = score[:, at] - bill_float(warm, pool.spec.price, rate)
    # As if nobody were too late: a pool that no longer makes it must not lighten what the others have to do.
    delay_s = np.array([_wait_s(pool, now) + pool.turnaround_s + pool.loading_s for pool in pools])
    pressing = urgency(seconds, delay_s, some_day, left_s=left_s, gone=_gone(now, deadline, started_at))
    for at, pool in enumerate(pools):
        added = (
            _risk_ppm(columns, pool, pressing)
            + _lateness_ppm(columns, pool, now, deadline, seconds[:, at])
            + _audit_ppm(columns, pool)
            + _demand_ppm(columns, pool, now, deadline, seconds[:, at])
            + setup[at]
            - _explore_ppm(columns, pools, at)
        )
        weight = 1 + added / PPM
        saving[:, at] = np.maximum(saving[:, at] * weight, 0.0)
        score[:, at] = np.where(may[:, at], score[:, at] * weight, np.inf)
    return BidMatrix(
        lots=columns,
        pools=tuple(pools),
        rates=tuple(known_rates),
        reject=tuple(reject),
        eligible=may,
        score=score,
        saving=saving,
        seconds=seconds,
        now=now,
        deadline=deadline,
        urgency=pressing,
        setup_ppm=setup,
    )


def _wait_s(pool: PoolState, now: datetime) -> float:
    return (max(pool.available_from, now) - now).total_seconds()


def _gone(now: datetime, deadline: datetime | None, started_at: datetime | None) -> float:
    """The share of the time from ``started_at`` to the deadline that has passed."""
    if deadline is None or started_at is None:
        return 0.0
    whole = (deadline - started_at).total_seconds()
    return (now - started_at).total_seconds() / whole if whole > 0 else 1.0
