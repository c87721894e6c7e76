"""What every stage of one start of a run knows: values that pickle, and no secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.store import Store
from bidbeam.transforms.charging import Baseline
from bidbeam.transforms.rendering import RenderSpec
from bidbeam.transforms.reputation import Reputation


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model of the run: where its files are (None: no tokenizer), and the block that its caches reuse.

    ``trust_remote_code``: whether the pools file lets an engine run code that comes with it.
    """

    name: str
    directory: str | None
    cache_block: int
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class FxQuote:
    """USD per unit of a currency, from ``source``, as of ``at``; frozen for the start."""

    rate: Decimal
    source: str
    at: datetime


@dataclass(frozen=True, slots=True)
class RunContext:
    """One start of one run. ``start`` counts from 1; each start has scratch of its own, segments are everybody's."""

    run_id: str
    run_date: date
    start: int
    started_at: datetime
    run_dir: Store
    ledger: Store
    render: RenderSpec
    models: Mapping[str, ModelFacts]
    pools: tuple[PoolSpec, ...]
    input_schema: pa.Schema
    storage: Mapping[str, Mapping[str, Any]]
    seed: int
    """Secret of the run's content keys; kept in the journal, which holds the prompts anyway."""
    rows: int
    ranges: int
    rounds: int
    lot_tokens: int
    rehearse: bool = False
    placement: Mapping[str, Any] = field(default_factory=dict)
    max_cost: Decimal | None = None
    payment: str = "pay_as_bid"
    """The payment rule of internal pools: see ``transforms.payments``."""
    hedging: bool = True
    """Whether the last stragglers of a shift are asked of a second pool: see ``transforms.hedging``."""
    patience_s: float = 600.0
    """Seconds that pools which have answered get to come back once none does: see ``transforms.outage``."""
    spent: Decimal = Decimal(0)
    """USD that earlier starts of the run have spent."""
    answered: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By pool: how many requests it answered and failed in earlier starts of the run that did not end."""
    deadline_at: datetime | None = None
    tags: str | None = None
    """The job's tags as canonical JSON text."""
    baseline: Baseline | None = None
    """What ``charges.baseline_cost`` counts."""
    other_baselines: tuple[Baseline, ...] = ()
    """What the view ``savings`` counts beside it."""
    fx: Mapping[str, FxQuote] = field(default_factory=dict)
    known: Mapping[tuple[str, str], Reputation] = field(default_factory=dict)
    """What the ledger's earlier runs taught of each (pool, model): see ``transforms.reputation``."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Of input files that were copied: by their URL, that of where their rows came from (see ``origins``)."""
    samples: bool = False
    """Whether a request may ask for several samples, so that outputs have the column."""
    has_history: bool = False
    """Whether earlier starts left segments whose answers this one can use."""
    ended_start: int | None = None
    """The latest start that ran to its end; its segments are gone for what it kept of them (see ``compaction``)."""
    damaged: frozenset[str] = frozenset()
    """Segments of the journal that cannot be read: what they settled is asked again."""
    scratch_home: Store | None = None
    """Where scratch stands instead of in the journal: that of a quote, which writes nothing there."""

    @property
    def journal(self) -> Store:
        return self.run_dir.child("_journal")

    @property
    def scratch(self) -> Store:
        """Where this start's plan stands: spilled rows, orders, the market's tables."""
        return (self.scratch_home or self.journal).child(self.scratch_name)

    @property
    def ended_before(self) -> bool:
        """Whether an earlier start ran to its end, so that what failed in it failed for good."""
        return self.ended_start is not None

    @property
    def fx_rates(self) -> dict[str, Decimal]:
        """USD per unit of each currency other than USD."""
        return {currency: quote.rate for currency, quote in self.fx.items()}

    @property
    def part_prefix(self) -> str:
        """What the names of this start's files begin with; a first start's files are plainly numbered."""
        return "" if self.start == 1 else f"s{self.start:03d}-"

    @property
    def scratch_name(self) -> str:
        """The scratch, relative to the journal."""
        return f"start-{self.start:03d}"


_START = re.compile(r"start-(\d+)/")


def start_of(name: str) -> int:
    """The number of the start that wrote a journal file."""
    match = _START.match(name)
    if match is None:
        raise ValueError(f"not a file of a start: {name}")
    return int(match.group(1))
