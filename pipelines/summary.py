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
    """What the served requests would have cost at the baseline's prices; None: no baseline, or not known for all."""
    input_tokens: int | None = None
    cached_tokens: int | None = None
    ideal_cached_tokens: int | None = None
    output_tokens: int | None = None
    pools: tuple[PoolTotal, ...] = ()
    elapsed_s: float = 0.0
    started: datetime | None = None
    exit_code: int = 0
    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class QuotePool:
    """What one pool would do. ``why_not`` says why it was awarded nothing; costs are USD."""

    pool: str
    price: str
    """The price as people read it, such as ``0.10 / 0.40 USD per 1M tokens``."""
    lots: int
    requests: int
    expected_cost: Decimal
    worst_case_cost: Decimal
    finish_s: float | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class Quote:
    """A dry run: what the run would buy, from whom, for how much and by when. Costs are USD; nothing was sent."""

    run_id: str
    requests: int
    input_tokens: int
    ideal_cached_tokens: int
    estimated: bool
    """Whether token counts are estimates, because a model's tokenizer is not known."""
    dead_invalid: int
    """Rows that would end as dead letters before any pool is asked."""
    expected_cost: Decimal
    worst_case_cost: Decimal
    pools: tuple[QuotePool, ...] = ()
    lots: int = 0
    unserved: Mapping[str, int] = field(default_factory=dict)
    """Requests that no pool would take, by reason."""
    lp_bound: Decimal | None = None
    regret: Decimal | None = None
    finish_at: datetime | None = None
    deadline_at: datetime | None = None
    budget: Decimal | None = None
    baseline_cost: Decimal | None = None
