"""What a run and a quote come to: the values that the command line prints and a scheduler reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal

RunStatus = Literal["complete", "incomplete", "interrupted", "nothing_to_do"]


@dataclass(frozen=True, slots=True)
class PoolTotal:
    """What one pool did for a run. Tokens and cost (USD) include every attempt; None is unknown."""

    pool: str
    requests: int
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    cost: Decimal
    other_model: int = 0
    """Answers that plainly name another model than was asked for."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One start of a run, as it ended. Costs are USD; ``cost`` is that of all starts of the run."""

    run_id: str
    status: RunStatus
    requests: int
    served: int
    dead: Mapping[str, int]
    """Dead letters by reason."""
    cost: Decimal
    output_url: str
    ledger_url: str
    baseline_cost: Decimal | None = None
    """What the served requests would have cost at the baseline's prices, an answer that several share as often as it is
    used: there each would have been asked. None: no baseline, or not known for all."""
    input_tokens: int | None = None
    cached_tokens: int | None = None
    ideal_cached_tokens: int | None = None
    output_tokens: int | None = None
    pools: tuple[PoolTotal, ...] = ()
    elapsed_s: float = 0.0
    started: datetime | None = None
    exit_code: int = 0
    rehearsal: bool = False
    wasted: Decimal = Decimal(0)
    """The part of ``cost`` that served nobody; see the ledger's ``cost_by_kind``."""
    truncated: int = 0
    """Answers that were cut off at ``max_tokens``."""
    other_models: Mapping[str, int] = field(default_factory=dict)
    """Answers that plainly name another model than was asked for, by the names they give."""
    down: Mapping[str, str] = field(default_factory=dict)
    """Why pools were down when the start ended, by name: a wrong key, no funds, nobody there."""
    estimated: int = 0
    """Answers whose usage nobody told and nobody could count: they are booked at their worst case."""
    parent_run_id: str | None = None
    """The run whose dead letters these were."""


@dataclass(frozen=True, slots=True)
class QuotePool:
    """What one pool would do, and what it asks. ``why_not`` says why it was awarded nothing; costs are USD.

    ``expected_cost`` is what its awards come to in the end, second tries included; ``worst_case_cost`` is what they
    reserve. Below ``why_not`` stands what the ledger's earlier runs showed; None: nothing.
    """

    pool: str
    price: str
    """The price as people read it, such as ``0.10 / 0.40 USD per 1M tokens``."""
    lots: int
    requests: int
    expected_cost: Decimal
    worst_case_cost: Decimal
    finish_s: float | None = None
    why_not: str | None = None
    capacity: str = ""
    """What it takes at once and how fast it is, as people read it."""
    asks: Decimal | None = None
    asks_lots: int = 0
    """Its expected bill for all lots that it may serve, and how many they are; None where it may serve none."""
    answers: int = 0
    """Answers of earlier runs that its reputation rests on."""
    failure_rate: float | None = None
    uptime: float | None = None
    latency_p95_s: float | None = None
    tokens_per_second: float | None = None
    cache_share: float | None = None
    """Cached tokens that it reported per token of the ideal."""
    output_share: float | None = None
    output_share_p95: float | None = None
    """Output per token of ``max_tokens``: the mean, and what 95 % of the answers stay below."""
    excess: float | None = None
    """How much more it reports than we count, beyond what is tolerated."""
    misnamed: float | None = None
    """Share of its answers that plainly name another model than was asked for."""
    newcomer: bool = False


@dataclass(frozen=True, slots=True)
class Quote:
    """A dry run: what the run would buy, from whom, for how much and by when. Costs are USD; nothing was sent."""

    run_id: str
    requests: int
    """Rows of the input: those ``to_ask``, those ``settled`` or ``shared``, and those that are ``dead_invalid``."""
    input_tokens: int
    ideal_cached_tokens: int
    """Of the requests that are still to be asked."""
    estimated: bool
    """Whether token counts are estimates, because a model's tokenizer is not known."""
    dead_invalid: int
    """Rows that would end as dead letters before any pool is asked: unreadable, or with an earlier row's id."""
    expected_cost: Decimal
    """What the run will cost from here on, by what the ledger's earlier runs showed of its pools and its answers. How
    long an engine of ours loads and idles is known once one of them has paid for it: see ``overhead_unknown``."""
    worst_case_cost: Decimal | None
    """What it cannot cost more than from here on, whatever fails in whichever round; None: nothing bounds it, because
    there is no budget, and an engine that may serve is paid by time."""
    to_ask: int = 0
    """Requests that pools would be asked."""
    settled: int = 0
    """Rows that earlier starts of the run have answered, or ended for good; nobody is asked these again."""
    shared: int = 0
    """Rows that cost nothing, because a request ``to_ask`` answers them too."""
    spent: Decimal = Decimal(0)
    """What earlier starts of the run have cost; it counts against the budget, and is not in the costs here."""
    overhead_unknown: tuple[str, ...] = ()
    """Pools with awards that the run pays to load and idle, for nobody knows how long: that is not in the cost."""
    pools: tuple[QuotePool, ...] = ()
    lots: int = 0
    reserved_cost: Decimal | None = None
    """What the awards reserve: every request answered once, nothing cached, every answer at its full length; of that as
    much as the budget covers."""
    uncovered: int = 0
    """Requests, about, that the budget does not cover then: up to so many may end as ``budget`` dead letters."""
    expected_served: int | None = None
    """Requests that are expected to be served within the budget, as long as nobody fails; None: there is no market."""
    unserved: Mapping[str, int] = field(default_factory=dict)
    """Requests that no pool would take, by reason."""
    needed: Decimal | None = None
    """The least budget under which every lot could be reserved; None: it is not the budget that leaves some out."""
    lp_bound: Decimal | None = None
    regret: Decimal | None = None
    payment: str = "pay_as_bid"
    rent: Decimal | None = None
    """What the payment rule pays internal pools beyond their bids; None: there is no such pool for it to bind."""
    finish_at: datetime | None = None
    deadline_at: datetime | None = None
    budget: Decimal | None = None
    baseline_cost: Decimal | None = None
