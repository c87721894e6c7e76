"""Which engine stands behind a pool, and its accelerator's clock: one of each per process, through the registry."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bidbeam.connectors import registry
from bidbeam.connectors.engine import Engine, Lasting
from bidbeam.connectors.errors import Interrupted, ModelError
from bidbeam.connectors.pools import PoolSpec
from bidbeam.transforms import stopping
from bidbeam.transforms.accelerator_time import AcceleratorMeter
from bidbeam.transforms.run_context import RunContext

if TYPE_CHECKING:
    from bidbeam.connectors.lease_engine import LeaseEngine

LOAD_TIMEOUT_S = 3600.0
"""Seconds that an engine may take to load: large models on cold disks do take most of an hour."""
_TICK_S = 0.25
_TERMS = frozenset({"price", "placement", "context"})
"""What a pool may say anew, about itself or its prices, and still be the same engine."""


def clock_ms() -> int:
    """Milliseconds of this process's monotonic clock."""
    return time.monotonic_ns() // 1_000_000


class Slot:
    """An engine with the clock that its accelerator is paid by. What the registry keeps, and closes.

    ``setup`` waits so many seconds for the engine to load and gives the milliseconds that loading took, None while it
    still does; it raises ModelError where it never will. Without one the engine needs no loading.
    """

    def __init__(self, engine: Engine, setup: Callable[[float], int | None] | None = None) -> None:
        self.engine = engine
        self._setup = setup
        self._meter: AcceleratorMeter | None = None
        self.retire: Callable[[], None] | None = None
        """Gives back what was rented for this engine; None where nothing was."""

    @property
    def dead(self) -> bool:
        return bool(getattr(self.engine, "dead", False))

    def loaded(self, timeout_s: float = 0.0) -> bool:
        """Whether the engine has loaded, at the latest in ``timeout_s``. Raises ModelError where it never will."""
        if self._meter is None:
            setup_ms = self._setup(timeout_s) if self._setup is not None else 0
            if setup_ms is None:
                return False
            self._meter = AcceleratorMeter(clock_ms, clock_ms(), setup_ms=setup_ms)
        return True

    def wait(self) -> None:
        """Waits until the engine has loaded. Raises ModelError where it does not, Interrupted on a signal meanwhile."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while not self.loaded(_TICK_S):
            if stopping.requested():
                raise Interrupted("stopped by a signal before the engines were loaded; nothing was sent")
            if time.monotonic() >= deadline:
                raise ModelError(
                    f"an engine did not load within {LOAD_TIMEOUT_S:.0f} s; see whether the model's store answers"
                )

    def meter(self) -> AcceleratorMeter:
        """The accelerator's clock, which starts when the engine has loaded: loading is setup. Waits like ``wait``."""
        self.wait()
        return cast(AcceleratorMeter, self._meter)

    def booked(self) -> None:
        """The journal has everything that came of it so far."""
        if isinstance(self.engine, Lasting):
            self.engine.booked()

    def close(self) -> None:
        self.engine.close()


class LeaseSlot(Slot):
    """The slot of a rented node. Nobody but its own lane waits for it, and its time runs from asking to giving back."""

    def __init__(self, engine: LeaseEngine) -> None:
        super().__init__(engine)
        self._lease = engine
        self.retire = engine.close

    def loaded(self, timeout_s: float = 0.0) -> bool:
        """Raises PoolDown where the node never serves."""
        if self._meter is None:
            if not self._lease.serving(timeout_s):
                return False
            self.meter()
        return True

    def wait(self) -> None:
        """Waits for nothing: other pools serve while the node comes up."""

    def meter(self) -> AcceleratorMeter:
        """All that was rented before the first call is setup."""
        if self._meter is None:
            asked = self._lease.asked_ms
            now = 0 if asked is None else self._lease.clock_ms()
            clock = self._lease.clock_ms if asked is not None else lambda: 0
            self._meter = AcceleratorMeter(clock, now, setup_ms=0 if asked is None else now - asked)
        return self._meter

    def booked(self) -> None:
        self._lease.booked()


def slot_for(context: RunContext, spec: PoolSpec, model: str, replica: int = 0) -> Slot:
    """The slot of one model on one pool in this process; starts loading on first use and returns at once."""
    same = [getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name not in _TERMS]
    # What a batch pool sends is written down in the run's own journal.
    home = context.journal.url if spec.kind == "batch" else None
    key = (context.rehearse, model, replica, repr(same), home)
    return registry.acquire(key, lambda: _start(context, spec, model))


def _start(context: RunContext, spec: PoolSpec, model: str) -> Slot:
    # Engines are imported where they are needed: an HTTP pool needs no vLLM, a rehearsal neither.
    if context.rehearse:
        from bidbeam.connectors.stand_in import StandIn

        return Slot(StandIn(spec.name))
    if spec.kind == "vllm":
        from bidbeam.connectors.vllm_engine import VllmConfig, VllmEngine

        facts = context.models[model]
        directory = facts.directory
        if directory is None:
            raise ModelError(
                f"pool {spec.name!r}: model {model!r} has no source to load it from; give it one in the pools file"
            )
        config = VllmConfig.of(
            spec.name,
            directory,
            # No code of a model's runs unless the pools file says so, of the model or among the engine's arguments.
            {"trust_remote_code": facts.trust_remote_code, **spec.engine},
            concurrency=spec.capacity.concurrency,
            cpu=spec.accelerator is None,
        )
        share = sum(p.capacity.workers for p in context.pools if p.kind == "vllm" and p.accelerator is None)
        engine = VllmEngine.start(config, share=max(share, 1))

        def setup(timeout_s: float) -> int | None:
            return round(engine.ready().load_s * 1000) if engine.wait(timeout_s) else None

        return Slot(engine, setup)
    if spec.kind == "batch":
        from bidbeam.connectors.batch_engine import BatchEngine
        from bidbeam.transforms.batches import batches_of, booked_rows
        from bidbeam.transforms.bid import terms_of
        from bidbeam.transforms.journal import terms_to_json

        return Slot(
            BatchEngine(
                spec,
                model,
                batches_of(context),
                run_id=context.run_id,
                seed=context.seed,
                storage=context.storage,
                # Prompts stay where the plan has spilled them, even if this process does not live to clear up.
                directory=Path(context.scratch.url) if context.scratch.is_local else None,
                booked=lambda intent: booked_rows(context, intent),
                terms=json.dumps(terms_to_json(terms_of(context, spec, model))),
            )
        )
    if spec.kind == "lease":
        from bidbeam.connectors.lease_engine import LeaseEngine
        from bidbeam.connectors.leases import LeaseBook

        return LeaseSlot(
            LeaseEngine(spec, model, LeaseBook(context.journal), run_id=context.run_id, start=context.start)
        )
    from bidbeam.connectors.profiles import profile

    if profile(spec.profile).transport == "sagemaker":
        from bidbeam.connectors.sagemaker_engine import SagemakerEngine

        return Slot(SagemakerEngine(spec, model))
    from bidbeam.connectors.http_engine import HttpEngine

    return Slot(HttpEngine(spec, model))
