"""What a lane waits for while nothing moves, for whoever watches a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import Lasting, Queueing

if TYPE_CHECKING:
    from bidbeam.transforms.lane import Lane

SILENT_S = 10.0
"""Seconds without an answer after which it is worth saying so."""

_MOST_TEXT = 200

Reason = Literal["ready", "pause", "breaker", "probe", "batch", "answer"]
"""An engine or node that is getting ready; a pause that the pool asked for; the breaker's; its probe; a batch; an
answer."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Why nothing moves. ``seconds``: how much longer for ``pause`` and ``breaker``, for how long already otherwise."""

    reason: Reason
    seconds: float


def wait_of(lane: Lane) -> Wait | None:
    """What a lane waits for; None where it is at work, or has nothing to do. Called from any thread."""
    if lane.down:
        return None
    engine, out, still_s = lane.engine, lane.engine_in_flight, lane.still_s
    if lane.waiting and not lane.ready:
        return Wait("ready", still_s)
    if isinstance(engine, Lasting):
        return Wait("batch", still_s) if out and still_s >= SILENT_S else None
    if lane.breaker.probe is not None and out:
        return Wait("probe", still_s)
    if lane.waiting and lane.breaker.pause_s > 0:
        return Wait("breaker", lane.breaker.pause_s)
    if isinstance(engine, Queueing) and engine.pause_s > 0 and (lane.waiting or out > engine.sent):
        return Wait("pause", engine.pause_s)
    return Wait("answer", still_s) if out and still_s >= SILENT_S else None


def error_of(results: pa.RecordBatch) -> str | None:
    """How the last of these results (RESULT_SCHEMA) that failed did so, in the ledger's words; None where none did."""
    failed = results.filter(pc.equal(results.column("status"), "failed"))
    if not failed.num_rows:
        return None
    last = failed.slice(failed.num_rows - 1).to_pylist()[0]
    parts = (last["error_class"], last["http_status"] and f"HTTP {last['http_status']}", last["error_message"])
    return ", ".join(str(part) for part in parts if part)[:_MOST_TEXT]
