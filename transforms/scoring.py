"""The scoring rule: what is added to a bid's expected bill before bids are compared, in parts per million of that bill.

    score = expected bill + risk + lateness + audit + demand + setup - exploration

All in money, and nothing in it depends on what another pool asks: no pool can move another's score by its price, and a
bid for less is never scored higher. The rule's parameters are published with every auction, in ``auctions.rule``.

risk         P(fail) x (the bill at the reserve + what a failed attempt is charged), P from the ledger's posterior
lateness     P(late) x LATENESS_WORTH x the bill; P from the spread of the finish time before the deadline
audit        AUDITS_PER_EXCESS x what a pool reports beyond our recount, or its answers that name another model, as a
             share of answers bought twice to check
demand       an engine of ours that bids by supply and demand asks for more, or less, than it will charge
setup        an engine that is yet to load, or a node to be rented, shares what that costs among all that it may serve
exploration  a newcomer's bid on every EXPLORE_EVERY-th lot is scored EXPLORE_DISCOUNT lower

A lot's *reserve* is what the house would give for it in this round rather than see it fail: 1 to LATENESS_WORTH times
its lowest score, rising with its urgency, and never more than is left of the budget. With all the time in the world a
try that fails is bought once more, at the bill; with none left it ends as a dead letter, as an answer that is late. So
the less slack there is, the dearer unreliable pools are, and what is left goes to those that answer. The reserve keeps
no lot waiting and bounds no payment: where every lot is served that may be, a bound would only teach pools to bid above
it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

import numpy as np
import numpy.typing as npt

from bidbeam.connectors.pools import Demand
from bidbeam.transforms import reputation
from bidbeam.transforms.pricing import Floats, Ints

Bools = npt.NDArray[np.bool_]

PPM = 1_000_000

LATENESS_WORTH = 10
"""An answer after the deadline is a dead letter: counted as so many times its bill."""
TURNAROUND_SPREAD = 0.1
"""Relative spread of what a pool declares to pass before its first answer."""
AUDITS_PER_EXCESS = 5
"""One token in a hundred too many, beyond what is tolerated: five answers in a hundred are worth a second opinion."""
EXPLORE_EVERY = 20
"""The newcomers to a model share every twentieth of its lots; with fewer lots than that they have none."""
EXPLORE_DISCOUNT_PPM = 200_000


@cache
def rule_text() -> str:
    """The rule as it is published: its parameters as JSON with sorted keys, and the SHA-256 of these."""
    parameters = {
        "score": "expected_cost + risk_cost + lateness_cost + audit_cost + demand_cost + setup_cost"
        " - exploration_credit",
        "audits_per_excess": AUDITS_PER_EXCESS,
        "bill_tolerance": reputation.BILL_TOLERANCE,
        "explore_discount": EXPLORE_DISCOUNT_PPM / PPM,
        "explore_every": EXPLORE_EVERY,
        "half_life_days": reputation.HALF_LIFE_DAYS,
        "history_days": reputation.HISTORY_DAYS,
        "lateness_worth": LATENESS_WORTH,
        "newcomer_attempts": reputation.NEWCOMER_ATTEMPTS,
        "prior_failures": reputation.PRIOR_FAILURES,
        "prior_spread": reputation.PRIOR_SPREAD,
        "prior_successes": reputation.PRIOR_SUCCESSES,
        "recount_tolerance": reputation.RECOUNT_TOLERANCE,
        "reserve": "lowest score x (1 + (lateness_worth - 1) x urgency), at most the budget left",
        "turnaround_spread": TURNAROUND_SPREAD,
    }
    text = json.dumps(parameters, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**parameters, "sha256": digest}, sort_keys=True)


def ppm(share: float) -> int:
    """A share as parts per million, at least 0."""
    return max(round(share * PPM), 0)


def urgency(seconds: Floats, delay_s: Floats, may: Bools, *, left_s: float | None, gone: float) -> Floats:
    """How little slack each lot has before the deadline, 0 (or no deadline) to 1 (none), (lots,).

    It is the larger of two shares: of the run's time that is ``gone``, and of the ``left_s`` seconds left that the work
    takes which is left, dealt to the pools that ``may`` serve it by their speed. ``seconds`` (lots, pools) is what each
    lot takes alone, nan where that is unknown, which counts as none; ``delay_s`` (pools,) passes before a pool's first
    answer.
    """
    if left_s is None:
        return np.zeros(len(seconds))
    with np.errstate(invalid="ignore"):
        timed = may & (seconds > 0)
    speed = np.divide(1.0, seconds, out=np.zeros(seconds.shape), where=timed).sum(axis=1)
    known = (speed > 0) & ~(may & np.isnan(seconds)).any(axis=1)
    each = np.divide(1.0, speed, out=np.zeros(len(speed)), where=known)
    busy = delay_s + each @ may
    need = np.where(may, busy, np.inf).min(axis=1, initial=np.inf)
    share = np.clip(need / left_s, 0.0, 1.0) if left_s > 0 else np.ones(len(need))
    pressing: Floats = np.maximum(np.where(np.isfinite(need), share, 0.0), min(max(gone, 0.0), 1.0))
    return pressing


def reserve_ppm(pressing: Floats) -> Ints:
    """A lot's reserve in millionths of its lowest score, by its urgency."""
    multiple: Ints = np.rint((1 + (LATENESS_WORTH - 1) * pressing) * PPM).astype(np.int64)
    return multiple


def risk_ppm(fails: Floats, charged: Floats, pressing: Floats) -> Ints:
    """What each lot's failure is worth: how likely it is, and what the failed try and another one cost."""
    worth: Ints = np.rint(fails * (reserve_ppm(pressing) / PPM + charged) * PPM).astype(np.int64)
    return worth


def lateness_ppm(duration_s: Floats, spread: Floats, turnaround_s: float, left_s: float | None) -> Ints:
    """What each lot's lateness is worth on one pool.

    ``duration_s`` is how long it takes alone, from now, without ``turnaround_s``; ``left_s`` the time to the deadline,
    None without one. The finish is taken as normal; without any spread there is no lateness.
    """
    if left_s is None:
        return np.zeros(len(duration_s), dtype=np.int64)
    from scipy.special import ndtr

    deviation = np.hypot(spread * duration_s, TURNAROUND_SPREAD * turnaround_s)
    slack = left_s - turnaround_s - duration_s
    with np.errstate(divide="ignore", invalid="ignore"):
        away = np.where(deviation > 0, slack / deviation, np.inf)
    worth: Ints = np.rint(ndtr(-away) * (LATENESS_WORTH * PPM)).astype(np.int64)
    return worth


def demand_ppm(demand: Demand | None, asked_s: float, left_s: float | None) -> int:
    """What a pool asks beside its price: least - 1 while idle to most - 1 where ``asked_s``, the seconds of all lots
    that may come to it, fill the time to the deadline; a smooth step between. Without a deadline no time is scarce.
    """
    if demand is None:
        return 0
    used = 0.0 if left_s is None else min(asked_s / left_s, 1.0) if left_s > 0 else 1.0
    least, most = float(demand.least), float(demand.most)
    return round((least + (most - least) * used * used * (3 - 2 * used) - 1) * PPM)


def setup_ppm(setup_s: float, asked_s: float) -> int:
    """What a pool's set-up adds to each of its bids: ``setup_s`` engine seconds shared by the ``asked_s`` of all lots
    that it may serve. Where it then wins too few of them to be worth it, the market does without (see ``bid``)."""
    return ppm(setup_s / asked_s) if asked_s > 0 else 0


def explored(lots: Ints, newcomers: int) -> list[Ints]:
    """Which of a model's ``lots`` (ascending) each of its newcomers may have at a discount: spread evenly, none twice.

    Altogether one lot in EXPLORE_EVERY, in every round anew.
    """
    chosen = lots[EXPLORE_EVERY - 1 :: EXPLORE_EVERY]
    return [chosen[at::newcomers] for at in range(newcomers)]
