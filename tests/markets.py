"""Small markets for tests: lots and pools written by hand, and seeded random ones."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from bidbeam.connectors.pools import Capacity, Meter, PoolSpec, PriceSchedule, Settlement
from bidbeam.transforms.bidding import PoolState, prior_state

NOW = datetime(2026, 11, 22, 6, tzinfo=UTC)
LOTS = pa.schema(
    [
        ("lot_id", pa.string()),
        ("round", pa.int16()),
        ("model", pa.string()),
        ("placement", pa.string()),
        ("tenant", pa.string()),
        ("requests", pa.int64()),
        ("input_tokens", pa.int64()),
        ("max_input_tokens", pa.int64()),
        ("ideal_cached_tokens", pa.int64()),
        ("warm_tokens", pa.int64()),
        ("max_output_tokens", pa.int64()),
        ("longest_tokens", pa.int64()),
        ("tokens_estimated", pa.bool_()),
    ]
)


def lots_of(*rows: dict[str, Any]) -> pa.Table:
    """A table of lots; what a row does not say is one small lot of model ``m``."""
    usual = {
        "round": 1, "model": "m", "placement": None, "tenant": None, "requests": 10, "input_tokens": 1000,
        "max_input_tokens": 100, "ideal_cached_tokens": 0, "warm_tokens": 0, "max_output_tokens": 200,
        "longest_tokens": 120, "tokens_estimated": False,
    }  # fmt: skip
    return pa.Table.from_pylist([{"lot_id": f"l{at}", **usual, **row} for at, row in enumerate(rows)], schema=LOTS)


def price(name: str, *, currency: str = "USD", **per_million: str) -> PriceSchedule:
    """A price per million tokens or requests; ``hour`` instead is per accelerator hour."""
    meters: dict[str, Meter] = {
        "input": "uncached_input", "cached": "cached_input", "write": "cache_write", "output": "output",
        "request": "request",
    }  # fmt: skip
    if "hour" in per_million:
        second = (Decimal(per_million["hour"]) / 3600).quantize(Decimal("1e-15"))
        unit: dict[Meter, Decimal] = dict.fromkeys(("accelerator_second", "accelerator_idle_second", "setup"), second)
    else:
        unit = {meters[name]: Decimal(text) / 1_000_000 for name, text in per_million.items()}
    return PriceSchedule(f"price-{name}", name, unit, currency)


def pool(
    name: str,
    *,
    tokens_per_second: float | None = None,
    context: int | None = None,
    placement: dict[str, Any] | None = None,
    models: Sequence[str] = ("m",),
    state: dict[str, Any] | None = None,
    currency: str = "USD",
    settlement: Settlement = "external",
    **prices: str,
) -> PoolState:
    """A pool of which nothing is measured but what ``state`` says."""
    spec = PoolSpec(
        name,
        "vllm" if "hour" in prices else "openai",
        {model: model for model in models},
        price(name, currency=currency, **prices),
        Capacity(tokens_per_second=tokens_per_second),
        placement or {},
        context=context,
        settlement=settlement,
    )
    prior = prior_state(spec, now=NOW)
    fields = {field: getattr(prior, field) for field in prior.__dataclass_fields__}
    return PoolState(**{**fields, **(state or {})})


def random_market(lots: int, pools: int, seed: int, *, timed: float = 1.0) -> tuple[pa.Table, list[PoolState]]:
    """Lots of widely differing sizes and shapes, pools of both kinds of price; a share ``timed`` declares its speed."""
    r = np.random.default_rng(seed)
    requests = r.integers(50, 500, lots)
    tokens, answers = requests * r.integers(200, 4000, lots), requests * r.integers(16, 800, lots)
    ideal = (tokens * r.uniform(0, 0.95, lots)).astype(np.int64)
    warm = np.minimum(ideal, r.integers(0, 2000, lots))
    warm[:1] = 0
    asked = [None, '{"jurisdictions":["EEA"]}', '{"zdr":true}']
    table = lots_of(
        *(
            {
                "placement": asked[int(r.integers(0, 3))],
                "requests": int(requests[at]),
                "input_tokens": int(tokens[at]),
                "ideal_cached_tokens": int(ideal[at]),
                "warm_tokens": int(warm[at]),
                "max_output_tokens": int(answers[at]),
            }
            for at in range(lots)
        )
    )
    states = []
    for at in range(pools):
        speed = float(r.uniform(2000, 20000)) if r.random() < timed else None
        labels = {"jurisdiction": ("DE", "FR", "US")[at % 3], "zdr": bool(r.random() < 0.5)}
        if at % 5 == 0:
            prices: dict[str, Any] = {"hour": str(round(r.uniform(0.5, 4), 2))}
        else:
            paid = r.uniform(0.1, 1)
            prices = {"input": str(round(paid, 3)), "output": str(round(r.uniform(0.3, 4), 3))}
            if r.random() < 0.7:
                prices["cached"] = str(round(paid / 10, 4))
        states.append(pool(f"pool{at}", tokens_per_second=speed, placement=labels, **prices))
    return table, states
