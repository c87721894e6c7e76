"""What lots are expected to use of a pool, and at worst: its state, what is known of it, and the columns bids need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.batch_options import read_options
from bidbeam.connectors.lease_terms import LeaseTerms
from bidbeam.connectors.pools import PoolSpec
from bidbeam.transforms.affinity import follows
from bidbeam.transforms.estimates import WORST_ESTIMATE, WORST_TEMPLATE_TOKENS
from bidbeam.transforms.pricing import Floats, Ints, Usage
from bidbeam.transforms.reputation import Reputation

Bools = npt.NDArray[np.bool_]

REMOTE_CACHE_SHARE = 0.5
"""Prior for a remote pool that sells cached input: it has caches, but more than one, and spreads requests over them."""

DEFAULT_TOKENS_PER_SECOND = {True: 2000.0, False: 200.0}
"""Per engine, for the bill of a pool paid by time whose speed is unknown: with an accelerator, and without."""

WORST_SLOWDOWN = 4
"""A reservation by time is for a pool this many times slower than expected; a lot that takes longer is cancelled."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool as the auction sees it: what it declares, and what is known of it by now.

    ``of_model`` is what the ledger taught of each of its models; where that is silent the pool's own fields stand in.
    """

    spec: PoolSpec
    context: int | None
    """Longest prompt plus answer in tokens; None: unknown, restricts nothing."""
    cache_share: float
    """Cached tokens that this pool reports per token of a lot's ideal."""
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
    loading_s: float = 0.0
    """Seconds until an engine of ours serves, as earlier runs saw it load: it makes a bid late, but is no wall."""
    setup_s: float = 0.0
    """Seconds of each engine paid by time that pass, and are paid for, before it serves anything."""
    of_model: Mapping[str, Reputation] = field(default_factory=dict)


def prior_state(
    spec: PoolSpec, *, now: datetime, context: int | None = None, cache_block: int | None = None
) -> PoolState:
    """A pool of which nothing has been measured.

    Our own engine caches all that can be cached, on a rented node too; a remote pool with a price for cached input half
    of it; any other nothing, which is also what it charges. Answers are expected as long as they may be.
    """
    sells_cache = "cached_input" in spec.price.unit_prices
    share = 1.0 if spec.kind in ("vllm", "lease") else REMOTE_CACHE_SHARE * sells_cache
    turnaround_s = _turnaround_s(spec)
    return PoolState(
        spec=spec,
        context=spec.context if context is None else context,
        cache_share=share,
        output_share=1.0,
        tokens_per_second=spec.capacity.tokens_per_second,
        available_from=now,
        cache_block=cache_block,
        turnaround_s=turnaround_s,
        setup_s=turnaround_s if spec.kind == "lease" else 0.0,
    )


def _turnaround_s(spec: PoolSpec) -> float:
    """What the pool declares: how long a batch may wait its turn, or how long a node takes to come up."""
    if spec.kind == "batch":
        return read_options(spec.options).window_s
    return LeaseTerms.of(spec).turnaround_s if spec.kind == "lease" else 0.0


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
    follows: Bools
    """Whether a lot begins right behind the one in the row before."""
    held_by: pa.Array
    """The pool that has served what comes right before a lot, in an earlier round; null: nobody."""

    @classmethod
    def of(cls, lots: pa.Table) -> LotColumns:
        """From a table with lot_id, model, placement, requests, input_tokens, ideal_cached_tokens, warm_tokens,
        max_output_tokens, longest_tokens and tokens_estimated; rows in prefix order. Without range, end, before and
        held_by every lot follows the one in the row before."""

        def ints(name: str) -> Ints:
            return np.asarray(lots.column(name), dtype=np.int64)

        def text(name: str) -> pa.Array:
            return pa.array(lots.column(name).combine_chunks().cast(pa.string()))

        placed = "before" in lots.column_names
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
            follows=follows(lots) if placed else np.arange(lots.num_rows) > 0,
            held_by=text("held_by") if placed else pa.nulls(lots.num_rows, pa.string()),
        )

    def __len__(self) -> int:
        return len(self.requests)

    def of_model(self, model: str) -> Bools:
        """Which lots are of this model, (lots,)."""
        found: Bools = np.asarray(pc.equal(self.model, model).fill_null(False))
        return found


def expected_usage(lots: LotColumns, pool: PoolState, warm: Bools | None = None) -> Usage:
    """What each lot is expected to use of the pool; ``warm`` (lots,) marks those that follow the lot before on it.
    What it has served right before a lot in an earlier round is warm in any case."""
    held = np.asarray(pc.equal(lots.held_by, pool.spec.name).fill_null(False))
    reusable = lots.ideal_cached - np.where(held if warm is None else held | warm, 0, lots.warm)
    cache_share = by_lot(lots, pool, float(pool.cache_share), lambda known: known.cache_share)
    output_share = by_lot(lots, pool, float(pool.output_share), lambda known: known.output_share)
    input_ = np.minimum(_counted_input(lots, pool), _worst_input(lots, pool))
    cached = np.minimum(np.floor(reusable * cache_share).astype(np.int64), input_)
    output = np.minimum(np.ceil(lots.max_output * output_share).astype(np.int64), lots.max_output)
    uncached = input_ - cached
    return Usage(uncached, cached, output, lots.requests, _engine_milliseconds(lots, uncached + output, pool))


def worst_usage(lots: LotColumns, pool: PoolState) -> Usage:
    """The most that each lot may use: nothing cached, every answer at its full length, the pool at its slowest."""
    tokens = _worst_input(lots, pool)
    time = _engine_milliseconds(lots, (tokens + lots.max_output) * WORST_SLOWDOWN, pool)
    return Usage(tokens, np.zeros_like(tokens), lots.max_output, lots.requests, time, worst=True)


def _counted_input(lots: LotColumns, pool: PoolState) -> Ints:
    """Input tokens as the pool counts them."""
    ratio = by_lot(lots, pool, 1.0, lambda known: known.input_ratio)
    counted: Ints = np.ceil(lots.input_tokens * ratio).astype(np.int64)
    return counted


def _worst_input(lots: LotColumns, pool: PoolState) -> Ints:
    """At worst a byte is a token where ours are estimates, and a pool counts at least as many as it was seen to."""
    ours = np.where(
        lots.estimated, lots.input_tokens * WORST_ESTIMATE + lots.requests * WORST_TEMPLATE_TOKENS, lots.input_tokens
    )
    worst: Ints = np.maximum(ours, np.where(lots.estimated, 0, _counted_input(lots, pool)))
    return worst


def by_lot(lots: LotColumns, pool: PoolState, otherwise: float, pick: Callable[[Reputation], float | None]) -> Floats:
    """(lots,): what is known of the pool with each lot's model; ``otherwise`` where that is nothing."""
    values = np.full(len(lots), otherwise)
    for model, known in pool.of_model.items():
        value = pick(known)
        if value is not None:
            values[lots.of_model(model)] = value
    return values


def speed_of(lots: LotColumns, pool: PoolState) -> Floats:
    """Tokens per second, (lots,): measured, or else declared; nan where neither."""
    declared = pool.tokens_per_second or np.nan
    if pool.spec.kind == "batch":
        # What was measured of a batch is mostly its wait, which stands in the turnaround already.
        return np.full(len(lots), declared)
    return by_lot(lots, pool, declared, lambda known: known.tokens_per_second)


def _engine_milliseconds(lots: LotColumns, tokens: Ints, pool: PoolState) -> Ints:
    """Milliseconds of all the pool's engines together, rounded up."""
    engines = max(pool.spec.capacity.workers, 1)
    fast = pool.spec.accelerator is not None or pool.spec.kind == "lease"
    speed = np.nan_to_num(speed_of(lots, pool), nan=engines * DEFAULT_TOKENS_PER_SECOND[fast])
    milliseconds: Ints = np.ceil(tokens * (1000.0 * engines / speed)).astype(np.int64)
    return milliseconds
