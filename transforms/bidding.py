"""Every pool's bid for every lot: may it, what would it cost, at worst how much, and when would it be done.

A pure function from a table of lots and the states of pools to matrices of shape (lots, pools). The score of a bid is
money: expected bill + expected cost of failure + of lateness. A pool bids *cold*; where it also wins the lot before,
whose prefix this one continues, it bids *warm* (see ``BidMatrix.warm_where``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.schemas import BIDS, COST, UTC
from bidbeam.transforms.placement import eligible
from bidbeam.transforms.pricing import Floats, Ints, Usage, bill, bill_float, rate_of, scaled

Bools = npt.NDArray[np.bool_]

_SUMMAND = pa.decimal128(37, 18)

REMOTE_CACHE_SHARE = 0.5
"""Prior for a remote pool that sells cached input: it has caches, but more than one, and spreads requests over them."""

DEFAULT_TOKENS_PER_SECOND = {True: 2000.0, False: 200.0}
"""Per engine, for the bill of a pool paid by time whose speed is unknown: with an accelerator, and without."""

WORST_SLOWDOWN = 4
"""A reservation by time is for a pool this many times slower than expected; a lot that takes longer is cancelled."""

WORST_ESTIMATE = 4
WORST_TEMPLATE_TOKENS = 64
"""Where token counts are estimates (a token per four bytes): at worst every byte is a token, and the pool's own chat
template adds this many to each request."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool as the auction sees it: what it declares, and what is known of it by now."""

    spec: PoolSpec
    context: int | None
    """Longest prompt plus answer in tokens; None: unknown, restricts nothing."""
    cache_share: float
    """Share of a lot's ideal cached tokens that this pool achieves, 0 to 1."""
    output_share: float
    """Expected output as a share of the most that was asked for, 0 to 1; 1 until measured."""
    tokens_per_second: float | None
    """Uncached input plus output, of all its engines together; None: unknown, and then no bound on its capacity."""
    available_from: datetime
    successes: int = 0
    failures: int = 0
    """Requests tried so far, by outcome; callers' faults and rate limits count as neither."""
    cache_block: int | None = None
    """Tokens that the engine caches as a whole; None for a remote pool."""
    turnaround_s: float = 0.0
    """Seconds before the first answer can be expected: a node that has to start, a batch that has to wait its turn."""


def prior_state(
    spec: PoolSpec, *, now: datetime, context: int | None = None, cache_block: int | None = None
) -> PoolState:
    """A pool of which nothing has been measured.

    Our own engine caches all that can be cached; a remote pool with a price for cached input half of it; any other
    nothing, which is also what it charges. Answers are expected as long as they may be.
    """
    sells_cache = "cached_input" in spec.price.unit_prices
    share = 1.0 if spec.kind == "vllm" else REMOTE_CACHE_SHARE * sells_cache
    return PoolState(
        spec=spec,
        context=spec.context if context is None else context,
        cache_share=share,
        output_share=1.0,
        tokens_per_second=spec.capacity.tokens_per_second,
        available_from=now,
        cache_block=cache_block,
    )


@dataclass(frozen=True, slots=True)
class LotColumns:
    """The columns of a table of lots that bids are made from; numeric ones of shape (lots,)."""

    lot_id: pa.Array
    model: pa.Array
    placement: pa.Array
    requests: Ints
    input_tokens: Ints
    ideal_cached: Ints
    warm: Ints
    """The part of ``ideal_cached`` that only a pool has which just served the lot before."""
    max_output: Ints
    longest: Ints
    estimated: Bools

    @classmethod
    def of(cls, lots: pa.Table) -> LotColumns:
        """From a table with lot_id, model, placement, requests, input_tokens, ideal_cached_tokens, warm_tokens,
        max_output_tokens, longest_tokens and tokens_estimated; rows in prefix order."""

        def ints(name: str) -> Ints:
            return np.asarray(lots.column(name), dtype=np.int64)

        def text(name: str) -> pa.Array:
            return pa.array(lots.column(name).combine_chunks().cast(pa.string()))

        return cls(
            lot_id=text("lot_id"),
            model=text("model"),
            placement=text("placement"),
            requests=ints("requests"),
            input_tokens=ints("input_tokens"),
            ideal_cached=ints("ideal_cached_tokens"),
            warm=np.minimum(ints("warm_tokens"), ints("ideal_cached_tokens")),
            max_output=ints("max_output_tokens"),
            longest=ints("longest_tokens"),
            estimated=np.asarray(lots.column("tokens_estimated").combine_chunks().fill_null(True), dtype=np.bool_),
        )

    def __len__(self) -> int:
        return len(self.requests)


def expected_usage(lots: LotColumns, pool: PoolState, warm: Bools | None = None) -> Usage:
    """What each lot is expected to use of the pool; ``warm`` (lots,) marks those that follow the lot before on it."""
    reusable = lots.ideal_cached - lots.warm if warm is None else lots.ideal_cached - np.where(warm, 0, lots.warm)
    cached = np.minimum(np.floor(reusable * float(pool.cache_share)).astype(np.int64), lots.input_tokens)
    output = np.minimum(np.ceil(lots.max_output * float(pool.output_share)).astype(np.int64), lots.max_output)
    uncached = lots.input_tokens - cached
    return Usage(uncached, cached, output, lots.requests, _engine_milliseconds(uncached + output, pool))


def worst_usage(lots: LotColumns, pool: PoolState) -> Usage:
    """The most that each lot may use: nothing cached, every answer at its full length, the pool at its slowest."""
    tokens = np.where(
        lots.estimated, lots.input_tokens * WORST_ESTIMATE + lots.requests * WORST_TEMPLATE_TOKENS, lots.input_tokens
    )
    time = _engine_milliseconds((tokens + lots.max_output) * WORST_SLOWDOWN, pool)
    return Usage(tokens, np.zeros_like(tokens), lots.max_output, lots.requests, time, worst=True)


def _engine_milliseconds(tokens: Ints, pool: PoolState) -> Ints:
    """Milliseconds of all the pool's engines together, rounded up."""
    engines = max(pool.spec.capacity.workers, 1)
    speed = pool.tokens_per_second or engines * DEFAULT_TOKENS_PER_SECOND[pool.spec.accelerator is not None]
    milliseconds: Ints = np.ceil(tokens * (1000.0 * engines / speed)).astype(np.int64)
    return milliseconds


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
        """Expected cost of failures (COST): what a lot costs again, times the pool's failure rate."""
        return scaled(expected, _failure_rate(self.pools[pool]))

    def score_of(self, pool: int, expected: pa.Array) -> pa.Array:
        """The exact score (COST) of bids with these expected costs."""
        return pc.add(expected.cast(_SUMMAND), self.risk_cost(pool, expected).cast(_SUMMAND))

    def warm_where(self, awarded: Ints) -> Bools:
        """Which bids are warm, (lots, pools): the pool has been awarded the lot before. ``awarded`` is -1 for none."""
        warm = np.zeros(self.eligible.shape, dtype=np.bool_)
        before = np.flatnonzero(awarded[:-1] >= 0)
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
        risk = self.risk_cost(pool, expected)
        lateness = pa.repeat(pa.scalar(Decimal(0), COST), n)
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
                offered(risk),
                offered(lateness),
                offered(finish),
                offered(self.score_of(pool, expected)),
                label(state.spec.price.price_id),
            ],
            schema=BIDS,
        )

    def _bill(self, pool: int, usage: Usage) -> pa.Array:
        rate = self.rates[pool]
        if rate is None:
            return pa.nulls(len(self.lots), COST)
        return bill(usage, self.pools[pool].spec.price, rate)


def _failure_rate(pool: PoolState) -> Decimal:
    """Mean of a Beta(0, 1) prior updated with what happened: 0 until something failed."""
    rate = Decimal(pool.failures) / Decimal(pool.successes + pool.failures + 1)
    return rate.quantize(Decimal("1e-6"))


def finish_times(pool: PoolState, now: datetime, seconds: Floats) -> pa.Array:
    """When the pool would be done with this much work (UTC), null where its speed is unknown."""
    start = max(now, pool.available_from)
    micros = np.where(np.isnan(seconds), 0, np.ceil(seconds * 1e6)).astype(np.int64) + int(
        (start.timestamp() + pool.turnaround_s) * 1_000_000
    )
    return pa.array(micros, mask=np.isnan(seconds)).cast(UTC)


def make_bids(
    lots: pa.Table,
    pools: Sequence[PoolState],
    *,
    now: datetime,
    deadline: datetime | None = None,
    rates: Mapping[str, Decimal] | None = None,
) -> BidMatrix:
    """Every pool's bid for every lot; ``rates`` are USD per unit of each currency other than USD.

    A pool that may not serve a lot says why: ``model``, ``placement:<label>``, ``price`` (a currency without a rate),
    ``capacity`` (a speed of zero), ``too_long``, ``deadline`` (not even alone in time); the first of these that holds.
    Raises ConfigError for a placement that cannot be read.
    """
    columns, shape = LotColumns.of(lots), (lots.num_rows, len(pools))
    score, saving, seconds = np.full(shape, np.inf), np.zeros(shape), np.full(shape, np.nan)
    may = np.zeros(shape, dtype=np.bool_)
    everything_warm = np.ones(lots.num_rows, dtype=np.bool_)
    everything_warm[:1] = False
    reject, known_rates = [], []
    if len({pool.spec.name for pool in pools}) < len(pools):
        raise ConfigError("two pools have the same name", key="pools", expected="names that differ")
    for at, pool in enumerate(pools):
        rate = rate_of(pool.spec.price.currency, rates or {})
        known_rates.append(rate)
        cold, warm = expected_usage(columns, pool), expected_usage(columns, pool, everything_warm)
        wait, late = (max(pool.available_from, now) - now).total_seconds(), np.inf
        if pool.tokens_per_second:
            seconds[:, at] = (cold.uncached + cold.output) / pool.tokens_per_second
        if deadline is not None:
            late = (deadline - now).total_seconds()
        finish = wait + pool.turnaround_s + np.nan_to_num(seconds[:, at], nan=0.0)
        reasons = _reject_reasons(columns, pool, rate, finish=finish, late=late)
        reject.append(reasons)
        may[:, at] = np.asarray(pc.is_null(reasons))
        if rate is not None:
            weight = 1 + float(_failure_rate(pool))
            cost = bill_float(cold, pool.spec.price, rate) * weight
            score[:, at] = np.where(may[:, at], cost, np.inf)
            saving[:, at] = np.maximum(cost - bill_float(warm, pool.spec.price, rate) * weight, 0.0)
    return BidMatrix(
        columns, tuple(pools), tuple(known_rates), tuple(reject), may, score, saving, seconds, now, deadline
    )
