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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_DOWN, Context, Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.schemas import AUCTIONS, AWARDS, COST
from bidbeam.transforms.allocation import allocate, lower_bound, shortest_horizon
from bidbeam.transforms.bidding import BidMatrix, finish_times
from bidbeam.transforms.market import UNSERVED, Floats, Ints, Market, unserved_cost
from bidbeam.transforms.payments import PAYMENT_RULES, Awarded, PaymentRule, exact, pay_as_bid
from bidbeam.transforms.pricing import parts_per_million
from bidbeam.transforms.scoring import reserve_ppm

DEFAULT_SLACK = 1.25
_BY_TOKEN = -1
"""All pools paid by the token together, beside single pools paid by time."""
_NEXT_TO_NOTHING, _STEP = 1e-12, 1.1
"""USD per answer from which on lots are told apart by their price, and by how much."""


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
    worst = _Costs(bids.worst_case_cost)
    reserved = worst.of(pool_of)
    if budget is not None:
        budget = _written(budget)
    if budget is not None and _total(reserved) > budget:
        covered = _within_budget(market, bids, pool_of, worst, budget, soft)
        unserved.update(dict.fromkeys(np.flatnonzero((pool_of >= 0) & (covered < 0)), "budget"))
        unbounded = market.within(np.full(len(market.room), np.inf))
        pool_of, reserved = _on_what_is_left(unbounded if soft else market, bids, covered, pool_of, worst, budget)
        if soft:
            market = market.within(np.maximum(market.room, market.load(pool_of)))
        unserved = {lot: reason for lot, reason in unserved.items() if pool_of[lot] < 0}
    may_cost = worst.of(pool_of)
    rank = _ranks(bids, pool_of, [part == whole for part, whole in zip(reserved, may_cost, strict=True)])
    runner_up = _runners_up(bids, pool_of)
    fallback, beside = _fallbacks(bids, runner_up, worst, budget, _total(reserved))
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
        fallback_rank=_ranks(bids, fallback, certain),
        committed=_total([*reserved, *beside]),
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


class _Costs:
    """Exact costs of (lot, pool) pairs, in USD; a pool's are computed when first asked for."""

    def __init__(self, of_pool: Callable[[int], pa.Array]) -> None:
        self._of_pool, self._columns, self._known = of_pool, dict[int, pa.Array](), dict[int, list[Decimal]]()

    def __call__(self, lot: int, pool: int) -> Decimal:
        if pool not in self._known:
            self._known[pool] = self._column(pool).to_pylist()
        return self._known[pool][lot]

    def of(self, pool_of: Ints) -> list[Decimal | None]:
        """Those of an assignment, None where a lot is unserved."""
        costs: list[Decimal | None] = [None] * len(pool_of)
        for pool in np.unique(pool_of[pool_of >= 0]):
            lots = np.flatnonzero(pool_of == pool)
            for lot, cost in zip(lots, self._column(int(pool)).take(pa.array(lots)).to_pylist(), strict=True):
                costs[lot] = cost
        return costs

    def _column(self, pool: int) -> pa.Array:
        if pool not in self._columns:
            self._columns[pool] = self._of_pool(pool)
        return self._columns[pool]


def _written(money: Decimal) -> Decimal:
    """So much of it as can be written down: what engines are held back leaves more places than that."""
    return money.quantize(Decimal("1e-18"), ROUND_DOWN, Context(prec=60))


def _total(costs: Iterable[Decimal | None]) -> Decimal:
    return sum((cost for cost in costs if cost is not None), Decimal(0))


def _within_budget(market: Market, bids: BidMatrix, pool_of: Ints, worst: _Costs, budget: Decimal, soft: bool) -> Ints:
    """The assignment with what the budget cannot cover left out: the cheapest per answer are covered first.

    The lots are covered where they are, or dealt anew from the cheapest on, whichever serves more requests; what is
    then served is allocated once more, for the room that the others leave. ``soft`` room keeps no lot waiting.
    """
    asked = np.maximum(bids.lots.requests, 1)
    dealt = np.where(pool_of >= 0, bids.score[np.arange(len(pool_of)), pool_of], np.inf)
    nobody = np.full_like(pool_of, UNSERVED)
    cheapest = np.argsort(bids.score.min(axis=1) / asked, kind="stable")
    tried = [
        _cover(market, bids, nobody, pool_of, np.argsort(dealt / asked, kind="stable"), worst, budget),
        _cover(market, bids, nobody, nobody, cheapest, worst, budget),
    ]
    best = min(tried, key=market.regarded)
    served = np.flatnonzero(best >= 0)
    if len(served):
        anew = allocate(market.only(served)).pool_of
        if np.all(anew >= 0) and sum(map(worst, served, anew), Decimal(0)) <= budget:
            best[served] = anew
    # Dealt anew they may leave money or room for one more.
    rest = market.within(np.full(len(market.room), np.inf)) if soft else market
    return _cover(rest, bids, best, nobody, cheapest[best[cheapest] < 0], worst, budget)


def _on_what_is_left(
    market: Market, bids: BidMatrix, covered: Ints, pool_of: Ints, worst: _Costs, budget: Decimal
) -> tuple[Ints, list[Decimal | None]]:
    """The assignment with the lots that the budget does not cover, the cheapest per answer first, each on its pool in
    ``pool_of`` or else the cheapest with room; and what is reserved of each lot's worst case (USD).

    Such a lot is paid from what others leave, so that nothing of it need be reserved: of pools paid by the token, as
    long as they hold together what one of its requests may cost; of one paid by time, which is cancelled with all that
    it is at when its time is up, as long as that is enough for all of its lots as they are expected to go.
    """
    pool_of, dealt = covered.copy(), pool_of
    reserved = worst.of(covered)
    left = budget - _total(reserved)
    by_time = np.array([pool.spec.price.by_time for pool in bids.pools], dtype=np.bool_)
    expected = _Costs(bids.expected_cost)
    held = dict.fromkeys([_BY_TOKEN, *np.flatnonzero(by_time).tolist()], Decimal(0))
    busy = dict.fromkeys(held, Decimal(0))
    for lot in np.flatnonzero(covered >= 0):
        at = int(covered[lot]) if by_time[covered[lot]] else _BY_TOKEN
        held[at] += reserved[lot] or 0
        busy[at] += expected(int(lot), at) if at >= 0 else 0
    room = market.room - market.load(covered)
    order = np.argsort(bids.score.min(axis=1) / np.maximum(bids.lots.requests, 1), kind="stable")
    for lot in order[covered[order] < 0]:
        here = int(dealt[lot])
        ranked = np.argsort(bids.score[lot], kind="stable")[: np.count_nonzero(bids.eligible[lot])].tolist()
        for pool in [*([here] if here >= 0 else []), *ranked]:
            cost = worst(lot, pool)
            at = pool if by_time[pool] else _BY_TOKEN
            needs = busy[at] + expected(lot, pool) if at >= 0 else cost / int(max(bids.lots.requests[lot], 1))
            if market.seconds[lot, pool] <= room[pool] and needs <= held[at] + left:
                part = min(cost, left)
                pool_of[lot], reserved[lot] = pool, part
                left -= part
                held[at] += part
                busy[at] += expected(lot, pool) if at >= 0 else 0
                room[pool] -= market.seconds[lot, pool]
                break
    return pool_of, reserved


def _cover(
    market: Market, bids: BidMatrix, covered: Ints, pool_of: Ints, order: Ints, worst: _Costs, budget: Decimal
) -> Ints:
    """What is ``covered`` already, and lots in this order, each on its pool in ``pool_of`` or else the cheapest with
    room, as far as the budget goes."""
    left, covered = budget - _total(worst.of(covered)), covered.copy()
    wanted = np.where(covered >= 0, covered, pool_of)
    room = market.room - market.load(wanted)
    for lot in order:
        here = int(pool_of[lot])
        if here >= 0:
            room[here] += market.seconds[lot, here]
        ranked = np.argsort(bids.score[lot], kind="stable")
        for pool in [*([here] if here >= 0 else []), *ranked[: np.count_nonzero(bids.eligible[lot])].tolist()]:
            if market.seconds[lot, pool] <= room[pool] and worst(lot, pool) <= left:
                covered[lot] = pool
                left -= worst(lot, pool)
                room[pool] -= market.seconds[lot, pool]
                break
    return covered


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


def _fallbacks(
    bids: BidMatrix, runner_up: Ints, worst: _Costs, budget: Decimal | None, committed: Decimal
) -> tuple[Ints, list[Decimal]]:
    """The runners-up that may take over, and what is reserved for each (USD) beside the ``committed`` awards.

    A winner may go down when part of a lot is paid for, so both worst cases are covered as far as the budget goes. A
    pool paid by time is no fallback under a budget: what bounds it are the seconds of its own awards.
    """
    beside = [Decimal(0)] * len(runner_up)
    if budget is None:
        return runner_up, beside
    fallback, left = runner_up.copy(), budget - committed
    for lot in np.flatnonzero(runner_up >= 0):
        pool = int(runner_up[lot])
        if bids.pools[pool].spec.price.by_time:
            fallback[lot] = UNSERVED
        else:
            beside[lot] = min(worst(lot, pool), left)
            left -= beside[lot]
    return fallback, beside


def _ranks(bids: BidMatrix, pool_of: Ints, covered: Sequence[bool]) -> Ints:
    """In which order lots on these pools are paid for: 0 what is ``covered``, then the cheapest per answer, a tenth
    more from each rank to the next. Lots of about the same price keep the order that their prefixes are in."""
    rank = np.zeros(len(pool_of), dtype=np.int64)
    lots = np.flatnonzero((pool_of >= 0) & ~np.array(covered, dtype=np.bool_))
    if len(lots):
        each = np.maximum(bids.score[lots, pool_of[lots]], 0.0) / np.maximum(bids.lots.requests[lots], 1)
        paid = each > 0
        rank[lots] = 1
        # From a fixed price on, so that ranks on different pools compare.
        rank[lots[paid]] = 1 + np.maximum(np.ceil(np.log(each[paid] / _NEXT_TO_NOTHING) / np.log(_STEP)), 1)
    return rank


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
