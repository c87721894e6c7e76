"""Bidbeam: batch inference that buys its tokens, as an Apache Beam pipeline.

Everything is imported when it is first used: ``import bidbeam`` loads no engine, no Beam and no DuckDB.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bidbeam.connectors.errors import (
        AlreadyExists,
        BidbeamError,
        ConfigError,
        InputError,
        Interrupted,
        ModelError,
        PoolDown,
        RunHeld,
        StoreError,
        UsageError,
    )
    from bidbeam.pipelines.begin import begin
    from bidbeam.pipelines.job import Job
    from bidbeam.pipelines.run import run
    from bidbeam.transforms.bid import Bid
    from bidbeam.transforms.generate import Generate
    from bidbeam.transforms.plan_lots import PlanLots
    from bidbeam.transforms.read_prompts import ReadPrompts
    from bidbeam.transforms.write_ledger import WriteLedger
    from bidbeam.transforms.write_outputs import WriteOutputs

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "Bid",
    "BidbeamError",
    "ConfigError",
    "Generate",
    "InputError",
    "Interrupted",
    "Job",
    "ModelError",
    "PlanLots",
    "PoolDown",
    "ReadPrompts",
    "RunHeld",
    "StoreError",
    "UsageError",
    "WriteLedger",
    "WriteOutputs",
    "begin",
    "run",
]

_ERRORS = "bidbeam.connectors.errors"
_HOMES = {
    "AlreadyExists": _ERRORS,
    "Bid": "bidbeam.transforms.bid",
    "BidbeamError": _ERRORS,
    "ConfigError": _ERRORS,
    "Generate": "bidbeam.transforms.generate",
    "InputError": _ERRORS,
    "Interrupted": _ERRORS,
    "Job": "bidbeam.pipelines.job",
    "ModelError": _ERRORS,
    "PlanLots": "bidbeam.transforms.plan_lots",
    "PoolDown": _ERRORS,
    "ReadPrompts": "bidbeam.transforms.read_prompts",
    "RunHeld": _ERRORS,
    "StoreError": _ERRORS,
    "UsageError": _ERRORS,
    "WriteLedger": "bidbeam.transforms.write_ledger",
    "WriteOutputs": "bidbeam.transforms.write_outputs",
    "begin": "bidbeam.pipelines.begin",
    "run": "bidbeam.pipelines.run",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
