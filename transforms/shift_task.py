"""What a shift is given to do: the pools that one worker drives in a round, each with its ordered lots."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

import pyarrow as pa

from bidbeam.transforms.settling import Terms


@dataclass(frozen=True, slots=True)
class Award:
    """One pool's part of a shift: its lots in order (LOT plus ``runner_up`` and ``next_best``), under terms frozen at
    the award.

    Where money is tight the lots also have ``rank`` and ``worst``, the USD that they may cost on this pool, and
    ``fallback_rank``, their rank on the runner-up: see ``purse``. Those of rank 0 come first, then the cheaper.
    """

    pool: str
    replica: int
    lots: pa.Table
    terms: dict[str, Terms]
    """By model."""
    reserved_ms: int | None


@dataclass(frozen=True, slots=True)
class ShiftTask:
    """The element that generate works through. Pickles small: lots are references."""

    round: int
    shift: int
    awards: tuple[Award, ...]
    runner_up_terms: dict[tuple[str, str], Terms] = field(default_factory=dict)
    """Terms of (pool, model) pairs that lots may be handed to."""
    reserved: Decimal | None = None
    """USD that this round may cost on pools paid by the token; None: there is no budget."""
    tight: bool = False
    """Whether the lots may cost more than that, so that each request waits until there is money for it."""
    adopted: Decimal = Decimal(0)
    """The part of ``reserved`` (USD) that is for batches of an earlier start."""
    adopts: tuple[tuple[str, str], ...] = ()
    """(pool, model) pairs that have batches of an earlier start: waited for, whether or not they are awarded a lot."""

    @property
    def prefix(self) -> str:
        return f"r{self.round:03d}-s{self.shift:03d}"
