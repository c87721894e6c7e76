"""The scoring rule: what is added to a bid's expected bill before bids are compared, in parts per million of that bill.

    score = expected bill + risk + lateness + audit + demand - exploration

All in money, and nothing in it depends on another pool's bid: no pool can move another's score, and a bid for less is
never scored higher. The rule's parameters are published with every auction, in ``auctions.rule``.

risk         P(fail) x (the bill once more + what a failed attempt is charged), P from the ledger's posterior
lateness     P(late) x LATENESS_WORTH x the bill; P from the spread of the finish time before the deadline
audit        AUDITS_PER_EXCESS x what a pool reports beyond our recount, or its answers that name another model, as a
             share of answers bought twice to check
demand       an engine of ours that bids by supply and demand asks for more, or less, than it will charge
exploration  a newcomer's bid on every EXPLORE_EVERY-th lot is scored EXPLORE_DISCOUNT lower
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

import numpy as np

from bidbeam.connectors.pools import Demand
from bidbeam.transforms import reputation
from bidbeam.transforms.pricing import Floats, Ints

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
        "score": "expected_cost + risk_cost + lateness_cost + audit_cost + demand_cost - exploration_credit",
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
        "turnaround_spread": TURNAROUND_SPREAD,
    }
    text = json.dumps(parameters, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**parameters, "sha256": digest}, sort_keys=True)


def ppm(share: float) -> int:
    """A share as parts per million, at least 0."""
    return max(round(share * PPM), 0)


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


def explored(lots: Ints, newcomers: int) -> list[Ints]:
    """Which of a model's ``lots`` (ascending) each of its newcomers may have at a discount: spread evenly, none twice.

    Altogether one lot in EXPLORE_EVERY, in every round anew.
    """
    chosen = lots[EXPLORE_EVERY - 1 :: EXPLORE_EVERY]
    return [chosen[at::newcomers] for at in range(newcomers)]
