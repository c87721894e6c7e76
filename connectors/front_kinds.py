"""What is particular about each provider's front: its path, whom it lets in, its list of models, what it adds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any

Prices = Mapping[str, Decimal]
"""US dollars for a million tokens, by ``input``, ``cached_input`` and ``output``."""
Feed = Callable[[Mapping[str, Prices | None]], dict[str, Any] | None]
"""The list of models, prices included, from the models that are served; None: there is no such list."""

TAO_USD = Decimal(350)
"""What a front of Chutes takes a TAO for."""


@dataclass(frozen=True, slots=True)
class FrontKind:
    """One provider's front. ``path`` stands before ``/chat/completions``, with ``{option}`` for a pool's options."""

    path: str
    feed: Feed
    public_feed: bool = False
    """Whether the list of models is told to anyone."""
    key_header: str = "authorization"
    key_prefix: str = "Bearer "
    takes_raw: bool = True
    names_model: bool = True
    tells_cost: bool = False
    id_header: str | None = None
    region_header: str | None = None
    """Where its answers name the ``region`` of the pool's options."""


def _plain(models: Mapping[str, Prices | None]) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "front"} for model in models]}


def _none(models: Mapping[str, Prices | None]) -> None:  # noqa: ARG001  # a feed that is not there
    return None


def _chutes(models: Mapping[str, Prices | None]) -> dict[str, Any]:
    """Figures per million tokens, under names that elsewhere mean per token; TAO at the price of the hour."""
    data = []
    for model, prices in models.items():
        entry: dict[str, Any] = {"id": model, "root": model, "object": "model", "created": int(time.time())}
        if prices is not None:
            usd = {"input": prices["input"], "output": prices["output"]}
            names = {"prompt": prices["input"], "completion": prices["output"]}
            if "cached_input" in prices:
                usd["input_cache_read"] = names["input_cache_read"] = prices["cached_input"]
            entry["price"] = {name: {"usd": float(price), "tao": float(price / TAO_USD)} for name, price in usd.items()}
            entry["pricing"] = {name: float(price) for name, price in names.items()}
        data.append(entry)
    return {"object": "list", "data": data}


def _prime(models: Mapping[str, Prices | None]) -> dict[str, Any]:
    names = {"input": "input_usd_per_mtok", "output": "output_usd_per_mtok", "cached_input": "cache_read_usd_per_mtok"}
    data = []
    for model, prices in models.items():
        entry: dict[str, Any] = {"id": model, "display_name": model, "created": int(time.time()), "serving": "hosted"}
        if prices is not None:
            entry["pricing"] = {names[meter]: float(price) for meter, price in prices.items()}
        entry["specs"] = {"context_window": 4096, "max_output_tokens": 1024, "supports_reasoning": False}
        data.append(entry)
    return {"object": "list", "data": data}


def _openrouter(models: Mapping[str, Prices | None]) -> dict[str, Any]:
    """Decimal text per token."""
    names = {"input": "prompt", "output": "completion", "cached_input": "input_cache_read"}
    data = []
    for model, prices in models.items():
        entry: dict[str, Any] = {"id": model, "name": model, "created": int(time.time()), "context_length": 4096}
        if prices is not None:
            told = {names[meter]: f"{price.scaleb(-6):f}" for meter, price in prices.items()}
            entry["pricing"] = {**told, "request": "0", "image": "0"}
        data.append(entry)
    return {"data": data}


KINDS: Mapping[str, FrontKind] = MappingProxyType(
    {
        "openai": FrontKind("/v1", _plain),
        "openrouter": FrontKind("/api/v1", _openrouter, public_feed=True, tells_cost=True, id_header="X-Generation-Id"),
        "chutes": FrontKind("/v1", _chutes, public_feed=True, id_header="X-Chutes-InvocationID"),
        "prime": FrontKind("/api/v1", _prime, public_feed=True),
        "pai3": FrontKind("/v1", _plain),
        "azure": FrontKind(
            "/openai/v1",
            _plain,
            key_header="api-key",
            key_prefix="",
            id_header="apim-request-id",
            region_header="x-ms-region",
        ),
        "vertex": FrontKind("/v1/projects/{project}/locations/{location}/endpoints/openapi", _none, takes_raw=False),
        "sagemaker": FrontKind(
            "/endpoints/{endpoint}/openai/v1", _none, takes_raw=False, names_model=False, id_header="x-amzn-RequestId"
        ),
    }
)
"""By profile."""
