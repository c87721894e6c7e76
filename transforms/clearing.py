"""Clearing a round: which pool gets which lot, at what reservation, and what nobody gets, with the reason.

A pure function from bids to awards. Walls: a pool's seconds before the deadline, the budget against worst cases, and
eligibility. Within them as many requests as possible are served, at the least total score.

A budget that does not cover all worst cases covers the lots that are cheapest per answer, and the others are awarded
*on what those leave*: with as much of their worst case reserved as there is, down to nothing. A shift sends each of
their requests once bills have left money for it, the cheaper ones first (see ``purse``).

Without a deadline a pool of known speed is dealt no more than the *default horizon*: the shortest time in which the
pools of known speed could serve everything they may serve, times ``slack``, so that several pools work at the same
time and the cheap ones fill first. It leaves no lot out: what does not fit goes to the pool that is done with it first.
A pool of unknown speed has no bound on its seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import AUCTIONS, AWARDS, COST
from bidbeam.transforms.affording import Costs, fallbacks, on_what_is_left, ranks, total, within_budget, written
from bidbeam.transforms.allocation import allocate, lower_bound, shortest_horizon
from bidbeam.transforms.bidding import BidMatrix, finish_times
from bidbeam.transforms.market import UNSERVED, Floats, Ints, Market, unserved_cost
from bidbeam.transforms.payments import PAYMENT_RULES, Awarded, PaymentRule, exact, pay_as_bid
from bidbeam.transforms.pricing import parts_per_million
from bidbeam.transforms.scoring import reserve_ppm

DEFAULT_SLACK = 1.25


@dataclass(frozen=True, slots=True, eq=False)
class Clearing:
    """The outcome of one round. Arrays have the shape (lots,) and hold indices of pools, -1 for none."""

    bids: BidMatrix
    pool_of: Ints
    runner_up: Ints
    """The next best eligible pool by score."""
    fallback: Ints
    """The runner-up where it may take the lot over within the budget, should the winner go down; else -1."""
    payment: str
    """The rule that was asked for; it binds internal pools, the others are paid as they bid."""
    price_paid: tuple[Decimal | None, ...]
    """Expected bill and rent (USD); None for unserved lots."""
    rent: tuple[Decimal | None, ...]
    """What the rule pays beyond the bid (see ``payments``): no charge, and no part of the budget."""
    worst: tuple[Decimal | None, ...]
    """What each award may cost at most (USD); None for unserved lots."""
    reserved: tuple[Decimal | None, ...]
    """The part of it that the budget covers (USD), whatever the other lots cost; None for unserved lots."""
    fallback_reserved: tuple[Decimal, ...]
    """What the budget covers beside for the fallbacks (USD)."""
    rank: Ints
    """0 where all of the worst case is reserved; else the higher the dearer the award is per answer."""
    fallback_rank: Ints
    """The same of each lot on its fallback."""
    committed: Decimal
    """The most that this round can cost (USD), fallbacks included; never above the budget."""
    unserved: Mapping[str, str]
    """lot_id -> reason: budget, deadline, capacity, no_eligible_pool or too_long."""
    objective: Decimal
    """The score of all awards together, as if all of each were served; ``lp_bound`` and ``regret`` are of the same
    lots."""
    lp_bound: Decimal | None
    regret: Decimal | None
    budget: Decimal | None
    """What there was to reserve (USD, at most 18 places); None: no wall."""
    room: Floats
    """Seconds that each pool has left (pools,); inf where nothing bounds them."""

    @property
    def reserve(self) -> pa.Array:
        """What the house would give for each lot in this round rather than see it fail (COST; see ``scoring``), null
        where nobody may serve it."""
        best = np.argmin(self.bids.score, axis=1) if self.bids.pools else np.zeros(len(self.bids.lots), np.int64)
        best = np.where(self.bids.eligible.any(axis=1), best, UNSERVED)
        least = exact(self.bids, best, np.full_like(best, UNSERVED), "score")
        worth = parts_per_million(pa.array(least, COST), reserve_ppm(self.bids.urgency))
        if self.budget is None:
            return worth
        left = pa.scalar(self.budget, COST)
        return pc.if_else(pc.greater(worth, left), left, worth)

    @property
    def short(self) -> frozenset[str]:
        """Ids of the lots that are not served for certain, by what is reserved for them."""
        ids = self.bids.lots.lot_id
        return frozenset([*self.unserved, *(ids[int(lot)].as_py() for lot in np.flatnonzero(self.rank))])

    @property
    def requests(self) -> int:
        """How many requests are awarded."""
        return int(self.bids.lots.requests[self.pool_of >= 0].sum())

    @property
    def lots_of(self) -> dict[str, tuple[int, ...]]:
        """Pool name -> rows of its lots, in prefix order; only pools that won something."""
        return {
            pool.spec.name: tuple(int(lot) for lot in np.flatnonzero(self.pool_of == at))
            for at, pool in enumerate(self.bids.pools)
            if np.any(self.pool_of == at)
        }

    @property
    def finish_at(self) -> dict[str, datetime | None]:
        """Pool name -> when it is expected to be done with its awards; None where its speed is unknown."""
        done = {}
        for name, lots in self.lots_of.items():
            at = next(at for at, pool in enumerate(self.bids.pools) if pool.spec.name == name)
            seconds = np.array([self.bids.seconds[list(lots), at].sum()])
            done[name] = finish_times(self.bids.pools[at], self.bids.now, seconds)[0].as_py()
        return done

    def bids_table(self, *, run_id: str, round_number: int) -> pa.Table:
        """All bids as they stood when the lots were awarded (BIDS): warm where the pool also won the lot before."""
        return self.bids.to_table(run_id=run_id, round_number=round_number, warm=self.bids.warm_where(self.pool_of))

    def awards_table(self, *, run_id: str, round_number: int) -> pa.Table:
        """One row per awarded lot (AWARDS), in prefix order."""
        lots = np.flatnonzero(self.pool_of >= 0)
        names = [pool.spec.name for pool in self.bids.pools]
        scores = exact(self.bids, self.pool_of, self.pool_of, "score")
        return pa.table(
            {
                "run_id": pa.array([run_id] * len(lots), AWARDS.field("run_id").type),
                "round": pa.array([round_number] * len(lots), pa.int16()),
                "lot_id": self.bids.lots.lot_id.take(pa.array(lots)),
                "pool": pa.array([names[self.pool_of[lot]] for lot in lots], AWARDS.field("pool").type),
                "score": pa.array([scores[lot] for lot in lots], AWARDS.field("score").type),
                "runner_up": pa.array(
                    [names[at] if at >= 0 else None for at in self.runner_up[lots]], AWARDS.field("runner_up").type
                ),
                "payment_rule": pa.array([self._rule(int(lot)) for lot in lots], AWARDS.field("payment_rule").type),
                "price_paid": pa.array([self.price_paid[lot] for lot in lots], AWARDS.field("price_paid").type),
                "reserved": pa.array([self.reserved[lot] for lot in lots], AWARDS.field("reserved").type),
                "fx_rate": pa.array([self.bids.rates[self.pool_of[lot]] for lot in lots], AWARDS.field("fx_rate").type),
                "rent": pa.array([self.rent[lot] for lot in lots], AWARDS.field("rent").type),
            },
            schema=AWARDS,
        )

    def _rule(self, lot: int) -> str:
        return self.payment if self.bids.pools[self.pool_of[lot]].spec.settlement == "internal" else "pay_as_bid"

    def auction_table(self, *, run_id: str, round_number: int) -> pa.Table:
        """The one row of this clearing (AUCTIONS)."""
        row = {
            "run_id": run_id,
            "round": round_number,
            "lots": len(self.bids.lots),
            "pools": len(self.bids.pools),
            "objective": self.objective,
            "lp_bound": self.lp_bound,
            "regret": self.regret,
            "awarded": int(np.count_nonzero(self.pool_of >= 0)),
            "cleared_at": self.bids.now,
            "rule": self.bids.rule,
            "budget": self.budget,
        }
        return pa.Table.from_pylist([row], schema=AUCTIONS)


def clear(
    bids: BidMatrix,
    *,
    budget: Decimal | None = None,
    payment: str = "pay_as_bid",
    slack: float | None = DEFAULT_SLACK,
) -> Clearing:
    """Awards the lots of one round. Deterministic.

    ``budget`` is what is left to reserve (USD), None for no wall; under it those lots are covered first that are
    cheapest per answer. ``slack`` stretches the default horizon; None: no horizon, so without a deadline the cheapest
    pool of each lot gets it. The deadline is the one that the bids were made for. Raises ConfigError for an unknown
    payment rule.
    """
    rule = PAYMENT_RULES.get(payment)
    if rule is None:
        raise ConfigError(
            f"no payment rule {payment!r}", key="auction.payment", expected="one of " + ", ".join(PAYMENT_RULES)
        )
    market, soft = _market(bids, slack)
    dealt = allocate(market)
    pool_of = dealt.pool_of
    if soft:
        pool_of = _finish_first(market, pool_of)
        # From here on the horizon is as long as it came to be.
        market = market.within(np.maximum(market.room, market.load(pool_of)))
    unserved = dict.fromkeys(np.flatnonzero(pool_of < 0), "capacity" if bids.deadline is None else "deadline")
    for lot in np.flatnonzero(~bids.eligible.any(axis=1)):
        unserved[lot] = bids.unserved_reason(int(lot)) or "no_eligible_pool"
    worst = Costs(bids.worst_case_cost)
    reserved = worst.of(pool_of)
    if budget is not None:
        budget = written(budget)
    if budget is not None and total(reserved) > budget:
        covered = within_budget(market, bids, pool_of, worst, budget, soft)
        unserved.update(dict.fromkeys(np.flatnonzero((pool_of >= 0) & (covered < 0)), "budget"))
        unbounded = market.within(np.full(len(market.room), np.inf))
        pool_of, reserved = on_what_is_left(unbounded if soft else market, bids, covered, pool_of, worst, budget)
        if soft:
            market = market.within(np.maximum(market.room, market.load(pool_of)))
        unserved = {lot: reason for lot, reason in unserved.items() if pool_of[lot] < 0}
    may_cost = worst.of(pool_of)
    rank = ranks(bids, pool_of, [part == whole for part, whole in zip(reserved, may_cost, strict=True)])
    runner_up = _runners_up(bids, pool_of)
    fallback, beside = fallbacks(bids, runner_up, worst, budget, total(reserved))
    certain = [
        budget is None or at < 0 or part == worst(lot, at)
        for lot, (at, part) in enumerate(zip(fallback.tolist(), beside, strict=True))
    ]
    rent = _premiums(market, bids, pool_of, runner_up, rule)
    bill = exact(bids, pool_of, pool_of, "expected")
    objective, bound, regret = _regret(market, bids, pool_of, None if unserved else dealt.prices)
    names = bids.lots.lot_id
    return Clearing(
        bids=bids,
        pool_of=pool_of,
        runner_up=runner_up,
        fallback=fallback,
        payment=payment,
        price_paid=tuple(
            None if cost is None or more is None else cost + more for cost, more in zip(bill, rent, strict=True)
        ),
        rent=tuple(rent),
        worst=tuple(may_cost),
        reserved=tuple(reserved),
        fallback_reserved=tuple(beside),
        rank=rank,
        fallback_rank=ranks(bids, fallback, certain),
        committed=total([*reserved, *beside]),
        unserved={names[int(lot)].as_py(): reason for lot, reason in sorted(unserved.items())},
        objective=objective,
        lp_bound=bound,
        regret=regret,
        budget=budget,
        room=np.full(len(bids.pools), np.inf) if soft else np.maximum(market.room - market.load(pool_of), 0.0),
    )


def _market(bids: BidMatrix, slack: float | None) -> tuple[Market, bool]:
    """The bids as an instance to allocate, and whether its room is only the default horizon's."""
    lots = bids.lots
    size = np.maximum(lots.input_tokens + lots.max_output, 1).astype(np.float64)
    shares = (lots.ideal_cached, lots.max_output, lots.requests * 100)
    unbounded = np.array([not pool.tokens_per_second for pool in bids.pools], dtype=np.bool_)
    market = Market(
        cost=bids.score,
        saving=bids.saving,
        seconds=np.nan_to_num(bids.seconds, nan=0.0),
        room=np.full(len(bids.pools), np.inf),
        unserved_cost=unserved_cost(bids.score, lots.requests),
        profile=np.column_stack([share / size for share in shares]),
        size=size,
    )
    if bids.deadline is not None:
        starts = [max(bids.now, pool.available_from) for pool in bids.pools]
        waits = [pool.turnaround_s for pool in bids.pools]
        left = [max((bids.deadline - at).total_seconds() - wait, 0.0) for at, wait in zip(starts, waits, strict=True)]
        return market.within(np.where(unbounded, np.inf, left)), False
    if slack is None or unbounded.all() or not len(lots):
        return market, False
    horizon = shortest_horizon(market, ~unbounded) * slack
    return market.within(np.where(unbounded, np.inf, horizon)), True


def _finish_first(market: Market, pool_of: Ints) -> Ints:
    """Gives each lot that the default horizon left over to the eligible pool that is done with it first."""
    pool_of = pool_of.copy()
    # Whatever a pool has beyond its room is time past the horizon that all share.
    past = market.load(pool_of) - market.room
    for lot in np.flatnonzero((pool_of < 0) & np.isfinite(market.cost).any(axis=1)):
        done = np.where(np.isfinite(market.cost[lot]), past + market.seconds[lot], np.inf)
        pool = int(np.lexsort((market.cost[lot], done))[0])
        pool_of[lot] = pool
        past[pool] += market.seconds[lot, pool]
    return pool_of


def _runners_up(bids: BidMatrix, pool_of: Ints) -> Ints:
    """The best eligible pool besides the winner, by the score of its bid as it stands (lots,)."""
    runner_up = np.full(len(pool_of), UNSERVED, dtype=np.int64)
    awarded = np.flatnonzero(pool_of >= 0)
    if len(awarded) == 0:
        return runner_up
    score = np.where(bids.warm_where(pool_of), bids.score - bids.saving, bids.score)[awarded]
    score[np.arange(len(awarded)), pool_of[awarded]] = np.inf
    best = np.argmin(score, axis=1)
    runner_up[awarded] = np.where(np.isfinite(score[np.arange(len(awarded)), best]), best, UNSERVED)
    return runner_up


def _premiums(
    market: Market, bids: BidMatrix, pool_of: Ints, runner_up: Ints, rule: PaymentRule
) -> list[Decimal | None]:
    """What each awarded lot is paid beyond its bid; nothing to pools that are not settled inside the house."""
    lots = np.flatnonzero(pool_of >= 0)
    internal = np.array([pool.spec.settlement == "internal" for pool in bids.pools], dtype=np.bool_)
    premiums: list[Decimal | None] = [None if pool < 0 else Decimal(0) for pool in pool_of]
    if rule is pay_as_bid or not np.any(internal[pool_of[lots]]):
        return premiums
    scores, seconds = exact(bids, pool_of, pool_of, "score"), exact(bids, runner_up, pool_of, "score")
    awarded = Awarded(
        market=market.only(lots),
        pool_of=pool_of[lots],
        scores=[score for score in scores if score is not None],
        runner_up_scores=[seconds[lot] for lot in lots],
    )
    for lot, premium in zip(lots, rule(awarded, internal), strict=True):
        premiums[lot] = premium
    return premiums


def _regret(
    market: Market, bids: BidMatrix, pool_of: Ints, prices: Floats | None
) -> tuple[Decimal, Decimal | None, Decimal | None]:
    """The awarded lots' total score, a lower bound for it within the same room, and how far above that it is."""
    awarded = np.flatnonzero(pool_of >= 0)
    scores = [score for score in exact(bids, pool_of, pool_of, "score") if score is not None]
    objective = sum(scores, Decimal(0))
    if len(awarded) == 0:
        return objective, None, None
    bound = Decimal(lower_bound(market.only(awarded), pool_of[awarded], prices))
    # The float's rounding must not lift the bound over what is exact.
    bound = min(bound.quantize(Decimal("1e-18")), objective)
    if bound <= 0:
        return objective, max(bound, Decimal(0)), None
    return objective, bound, ((objective - bound) / bound).quantize(Decimal("1e-15"))
