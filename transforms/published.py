"""What publishing and booking give: files, ledger parts and counts, which add up over the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from bidbeam.connectors.ledger_manifest import PartFile


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One published file. ``path`` is relative to the run's directory."""

    path: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PoolCount:
    """What one pool did: requests it served, tokens of all its attempts, their cost in USD."""

    pool: str
    served: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost: Decimal
    other_model: int = 0
    """Answers that plainly name another model than was asked for."""


_MOST_NAMES = 8
OTHER_NAMES = "other names"


@dataclass(frozen=True, slots=True)
class Published:
    """What publishing one piece of the run gave: files, ledger parts and counts. Adds up over the run."""

    outputs: tuple[OutputFile, ...] = ()
    dead_letters: tuple[OutputFile, ...] = ()
    parts: tuple[PartFile, ...] = ()
    served: int = 0
    dead: Mapping[str, int] = field(default_factory=dict)
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = Decimal(0)
    baseline_cost: Decimal | None = None
    """What the served requests would have cost at the baseline, shared answers as often as they are used; None where
    there is none."""
    pools: tuple[PoolCount, ...] = ()
    baseline_unknown: int = 0
    """Served requests of which the baseline's cost is not known; while there is one, nor is that of the run."""
    wasted: Decimal = Decimal(0)
    """The part of ``cost`` that served nobody: failed and lost attempts, hedges, accelerators that load or idle."""
    truncated: int = 0
    """Served requests whose answer was cut off at ``max_tokens``."""
    other_models: Mapping[str, int] = field(default_factory=dict)
    """Answers that plainly name another model than was asked for, by the names they give; the rarest together."""
    estimated: int = 0
    """Answers whose usage nobody told and nobody could count: they are booked at their worst case."""

    def __add__(self, other: Published) -> Published:
        dead = {r: self.dead.get(r, 0) + other.dead.get(r, 0) for r in sorted({*self.dead, *other.dead})}
        return Published(
            self.outputs + other.outputs,
            self.dead_letters + other.dead_letters,
            self.parts + other.parts,
            self.served + other.served,
            dead,
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.cost + other.cost,
            _add(self.baseline_cost, other.baseline_cost),
            _merge_pools((*self.pools, *other.pools)),
            self.baseline_unknown + other.baseline_unknown,
            self.wasted + other.wasted,
            self.truncated + other.truncated,
            _most_common(self.other_models, other.other_models),
            self.estimated + other.estimated,
        )


def _add(one: Decimal | None, other: Decimal | None) -> Decimal | None:
    return other if one is None else one if other is None else one + other


def _most_common(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The sum of both, as far as names go that anybody reads: an endpoint may give a new one with every answer."""
    counts = Counter(one) + Counter(other)
    rest = counts.pop(OTHER_NAMES, 0)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest += sum(count for _, count in ranked[_MOST_NAMES:])
    return dict(ranked[:_MOST_NAMES]) | ({OTHER_NAMES: rest} if rest else {})


def _merge_pools(counts: Iterable[PoolCount]) -> tuple[PoolCount, ...]:
    merged: dict[str, PoolCount] = {}
    for count in counts:
        before = merged.get(count.pool)
        merged[count.pool] = (
            count
            if before is None
            else PoolCount(
                count.pool,
                before.served + count.served,
                before.input_tokens + count.input_tokens,
                before.cached_tokens + count.cached_tokens,
                before.output_tokens + count.output_tokens,
                before.cost + count.cost,
                before.other_model + count.other_model,
            )
        )
    return tuple(merged[name] for name in sorted(merged))
