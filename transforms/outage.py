"""An outage: a moment ago the pools answered, and now none that may serve what is left does. That is waited out.

A round's auction would only ask the same dead pools again, and with the last round the night would be over. A pool
that never answered in this start is another matter: that is a wrong address, and is said at once.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.http_engine import is_there
from bidbeam.connectors.pools import PoolSpec
from bidbeam.transforms import heartbeat, stopping
from bidbeam.transforms.heartbeat import SoFar
from bidbeam.transforms.placement import eligible
from bidbeam.transforms.run_context import RunContext

_FIRST_S, _LONGEST_S = 1.0, 30.0
"""Between two looks; the time doubles."""
_TICK_S = 1.0


def gone(context: RunContext, lots: pa.Table, before: Mapping[str, SoFar], answered: Collection[str]) -> list[PoolSpec]:
    """The pools to wait for before LOT rows are auctioned again; empty where there is somebody to ask, or nobody is
    known to have been well: ``answered`` are the pools that answered in the round before."""
    wanted = lots.group_by(["model", "placement"]).aggregate([])
    missed: dict[str, PoolSpec] = {}
    for model, placement in zip(wanted["model"].to_pylist(), wanted["placement"].to_pylist(), strict=True):
        constraint = json.loads(placement) if placement else None
        for spec in context.pools:
            if model not in spec.models or not eligible(constraint, spec.placement)[0]:
                continue
            if not before.get(spec.name, SoFar()).down:
                return []
            missed[spec.name] = spec
    asked = [spec for spec in missed.values() if spec.kind == "openai" and spec.base_url is not None]
    return asked if any(spec.name in answered for spec in asked) else []


def wait_out(
    context: RunContext,
    round_: int,
    lots: pa.Table,
    *,
    there: Callable[[PoolSpec], bool] = is_there,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Before a round: returns once a pool that was lost answers again, or nobody is to be waited for.

    It waits for at most ``context.patience_s``, never beyond the deadline, and not once it is asked to stop.
    """
    if context.rehearse or round_ == 1 or lots.num_rows == 0:
        return
    before, earlier = (heartbeat.so_far(context.scratch, each) for each in (round_, round_ - 1))
    answered = [name for name, each in before.items() if each.settled > earlier.get(name, SoFar()).settled]
    pools = gone(context, lots, before, answered)
    if not pools:
        return
    until = now() + timedelta(seconds=context.patience_s)
    if context.deadline_at is not None:
        until = min(until, context.deadline_at)
    heartbeat.note(
        context.scratch,
        f"r{round_:03d}-outage",
        {spec.name: f"nobody answers; waiting for it until {until:%H:%M:%S} UTC" for spec in pools},
    )
    pause_s = _FIRST_S
    while now() < until and not _stopped(context):
        if any(there(spec) for spec in pools):
            return
        again = min(now() + timedelta(seconds=pause_s), until)
        while (left_s := (again - now()).total_seconds()) > 0 and not _stopped(context):
            sleep(min(left_s, _TICK_S))
        pause_s = min(2 * pause_s, _LONGEST_S)


def _stopped(context: RunContext) -> bool:
    """Whether the driver was asked to stop: no shift is at work that would hear of it in another process."""
    with contextlib.suppress(OSError, StoreError):
        if context.scratch.exists(stopping.FILE):
            stopping.request()
    return stopping.requested()
