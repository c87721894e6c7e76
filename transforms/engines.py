"""Which engine stands behind a pool, and its accelerator's clock: one of each per process, through the registry."""

from __future__ import annotations

import time
from collections.abc import Callable

from bidbeam.connectors import registry
from bidbeam.connectors.engine import Engine
from bidbeam.connectors.errors import ModelError
from bidbeam.connectors.pools import PoolSpec
from bidbeam.transforms.accelerator_time import AcceleratorMeter
from bidbeam.transforms.run_context import RunContext

LOAD_TIMEOUT_S = 3600.0
"""Seconds that an engine may take to load: large models on cold disks do take most of an hour."""


def clock_ms() -> int:
    """Milliseconds of this process's monotonic clock."""
    return time.monotonic_ns() // 1_000_000


class Slot:
    """An engine with the clock that its accelerator is paid by. What the registry keeps, and closes."""

    def __init__(self, engine: Engine, ready: Callable[[], int] | None = None) -> None:
        self.engine = engine
        self._ready = ready
        self._meter: AcceleratorMeter | None = None

    @property
    def dead(self) -> bool:
        return bool(getattr(self.engine, "dead", False))

    def meter(self) -> AcceleratorMeter:
        """The accelerator's clock; waits until the engine is loaded, because loading is setup. Raises ModelError."""
        if self._meter is None:
            setup_ms = self._ready() if self._ready is not None else 0
            self._meter = AcceleratorMeter(clock_ms, clock_ms(), setup_ms=setup_ms)
        return self._meter

    def close(self) -> None:
        self.engine.close()


def slot_for(context: RunContext, spec: PoolSpec, model: str, replica: int = 0) -> Slot:
    """The slot of one model on one pool in this process; starts loading on first use and returns at once."""
    key = (context.rehearse, spec.name, model, replica, repr(spec))
    return registry.acquire(key, lambda: _start(context, spec, model))


def _start(context: RunContext, spec: PoolSpec, model: str) -> Slot:
    # Engines are imported where they are needed: an HTTP pool needs no vLLM, a rehearsal neither.
    if context.rehearse:
        from bidbeam.connectors.stand_in import StandIn

        return Slot(StandIn(spec.name))
    if spec.kind == "vllm":
        from bidbeam.connectors.vllm_engine import VllmConfig, VllmEngine

        directory = context.models[model].directory
        if directory is None:
            raise ModelError(
                f"pool {spec.name!r}: model {model!r} has no source to load it from; give it one in the pools file"
            )
        config = VllmConfig.of(
            spec.name, directory, spec.engine, concurrency=spec.capacity.concurrency, cpu=spec.accelerator is None
        )
        share = sum(p.capacity.workers for p in context.pools if p.kind == "vllm" and p.accelerator is None)
        engine = VllmEngine.start(config, share=max(share, 1))

        def ready() -> int:
            return round(engine.ready(LOAD_TIMEOUT_S).load_s * 1000)

        return Slot(engine, ready)
    from bidbeam.connectors.http_engine import HttpEngine

    return Slot(HttpEngine(spec, model))
