"""What a pool is: a priced source of tokens, described by values that pickle and hold no secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

Meter = Literal[
    "uncached_input", "cached_input", "cache_write", "output", "request", "accelerator_second",
    "accelerator_idle_second", "setup",
]  # fmt: skip
METERS: tuple[Meter, ...] = (
    "uncached_input", "cached_input", "cache_write", "output", "request", "accelerator_second",
    "accelerator_idle_second", "setup",
)  # fmt: skip

Settlement = Literal["external", "internal"]
"""Whether a pool is paid what it posts, or by the job's payment rule: a pool of one's own house or of a partner."""

SETTLEMENTS: tuple[Settlement, ...] = ("external", "internal")

PoolKind = Literal["vllm", "openai", "batch", "lease"]
"""An engine in our workers; an endpoint asked request by request; a provider's batch API; a node that is rented for the
run, on which vLLM serves."""


@dataclass(frozen=True, slots=True)
class Demand:
    """How an engine of ours bids by supply and demand: its price times ``least`` while nobody asks for it, rising
    smoothly to ``most`` where all its time before the deadline is asked for. What it charges stays its price.
    """

    least: Decimal
    most: Decimal


@dataclass(frozen=True, slots=True)
class PriceSchedule:
    """A pool's unit price per meter, per single token, request or second, in ``currency``.

    ``unit_prices`` holds at most 15 decimal places each. A pool priced by the accelerator hour has the meters
    ``accelerator_second``, ``accelerator_idle_second`` and ``setup``, all at the hour's price / 3600 rounded half-even
    at 15 places once. A token pool without a cached price charges cached tokens as uncached ones: the mapping then
    simply has no ``cached_input``.
    """

    price_id: str
    """Deterministic: a digest of pool, meters, prices, currency and source."""
    pool: str
    unit_prices: Mapping[Meter, Decimal]
    currency: str = "USD"
    valid_from: datetime | None = None
    source: str = "pools file"
    valid_to: datetime | None = None
    """When it ends; None: not known to."""
    fetched_at: datetime | None = None
    """When it was read from a feed; None where it was written down."""
    demand: Demand | None = None

    @property
    def by_time(self) -> bool:
        """Whether the pool is paid by the accelerator second rather than by the token."""
        return "accelerator_second" in self.unit_prices


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a pool takes at once. ``tokens_per_second`` counts uncached input plus output; None is unknown."""

    concurrency: int | None = None
    tokens_per_second: float | None = None
    workers: int = 1
    """Engines of this pool in our workers, each with its own copy of the model (``kind: vllm``)."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool of the pools file, validated. Pickles; the key itself never is in it, only where to find it."""

    name: str
    kind: PoolKind
    models: Mapping[str, str]
    """Model name in the job -> name at the pool (the same for an engine in our workers)."""
    price: PriceSchedule
    capacity: Capacity = Capacity()
    placement: Mapping[str, Any] = field(default_factory=dict)
    """Declared labels (jurisdiction, operator, zdr, ...); an absent or None label is undeclared."""
    accelerator: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Engine arguments passed through to vLLM as they are (``kind: vllm``)."""
    profile: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    api_key_file: str | None = None
    context: int | None = None
    """Longest prompt plus answer in tokens; None is unknown (for vllm: taken from the model)."""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    """Seconds that one request may take before it counts as ``timeout``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the profile asks for beside an address and a key: region, project, endpoint name, image, ..."""
    settlement: Settlement = "external"
    answers_as: Mapping[str, str] = field(default_factory=dict)
    """Model name in the job -> what an answer must call it, else it is no answer; absent: see ``model_echo``."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the pools file. ``source`` None: no tokenizer, token counts are estimates."""

    name: str
    source: str | None = None
    trust_remote_code: bool = False
