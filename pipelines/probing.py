"""Probing: one tiny request to each model of a remote pool, timed, and booked in the ledger like any other attempt."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.pools import PoolSpec
from bidbeam.pipelines.terms import FxRate

if TYPE_CHECKING:
    import pyarrow as pa

    from bidbeam.connectors.engine import Engine
    from bidbeam.connectors.store import Store
    from bidbeam.pipelines.job import Job
    from bidbeam.transforms.settling import Terms

PROMPT = "Count from one to twenty in words."
"""What a probe says: nothing of anybody's."""
MAX_TOKENS = 32
_TIMEOUT_S = 60.0
_INPUT_TOKENS = 32
"""What the prompt can come to at most, with any chat template: the worst case where usage is not told."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one probe showed of one model at one pool. Seconds are to the last token; None is unknown."""

    model: str
    ok: bool
    latency_s: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: Decimal | None = None
    """USD."""
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens a second, of this one request."""
        if not self.latency_s or not self.output_tokens:
            return None
        return self.output_tokens / self.latency_s


def measurable(spec: PoolSpec) -> bool:
    """Whether one request can be sent there by itself: no engine is loaded and no node rented for a probe."""
    return spec.kind == "openai"


def measure(spec: PoolSpec, model: str, fx: Mapping[str, FxRate]) -> tuple[Measured, pa.Table, Terms]:
    """Sends one request and waits for it: what it showed, its SEGMENT row and the terms it is charged under.

    Raises BidbeamError where nothing could be sent.
    """
    import pyarrow as pa

    from bidbeam.transforms.region_check import check_regions
    from bidbeam.transforms.settling import settle

    terms = terms_of(spec, model, fx)
    attempt_id = secrets.token_bytes(16)
    asked = _request(attempt_id)
    engine = _engine(replace(spec, timeout_s=min(spec.timeout_s, _TIMEOUT_S)), model)
    try:
        result, _ = check_regions(_answer(engine, asked), spec.placement)
    finally:
        engine.close()
    row = settle(_known(attempt_id), result, terms, accelerator_ms=None if not terms.price.by_time else 0)
    told = row.to_pylist()[0]
    ok = told["status"] == "ok"
    seconds = (told["finished_at"] - told["started_at"]).total_seconds()
    measured = Measured(
        model,
        ok,
        seconds if ok else None,
        told["input_tokens"],
        told["output_tokens"],
        told["cost"],
        None if ok else told["error_message"] or told["error_class"] or told["status"],
    )
    # The answer is no business of the ledger's.
    return measured, pa.Table.from_batches([row]), terms


def terms_of(spec: PoolSpec, model: str, fx: Mapping[str, FxRate]) -> Terms:
    """The terms of one pool and model, at the rate that holds now."""
    from bidbeam.transforms.settling import Terms

    rate = fx.get(spec.price.currency)
    return Terms(
        pool=spec.name,
        model=model,
        price=spec.price,
        fx_rate=Decimal(1) if rate is None else rate.rate,
        fx_source=None if rate is None else rate.source,
        fx_at=None if rate is None else rate.at,
        jurisdiction=spec.placement.get("jurisdiction"),
        operator=spec.placement.get("operator"),
    )


def book(job: Job, ledger: Store, now: datetime, rows: Sequence[tuple[pa.Table, Terms]]) -> str:
    """Writes the probes' attempts, charges and prices as a run of their own, and returns its id."""
    import pyarrow as pa

    import bidbeam
    from bidbeam.connectors.ledger_writer import RunRow, write_manifest, write_part
    from bidbeam.connectors.money import sum_decimal
    from bidbeam.transforms.booking import price_rows
    from bidbeam.transforms.charging import explode

    run_id = run_id_of(job, now)
    segment = pa.concat_tables([table for table, _ in rows]).unify_dictionaries()
    schedules = {terms.price.price_id: terms for _, terms in rows}
    tags = json.dumps(dict(job.tags), sort_keys=True) if job.tags else None
    attempts, charges = explode(segment, schedules=schedules, run_id=run_id, run_date=job.run_date, tags=tags)
    parts = [
        write_part(ledger, name, job.run_date, run_id, "probe", table)
        for name, table in (("attempts", attempts), ("charges", charges), ("prices", price_rows(schedules)))
    ]
    row = RunRow(
        run_id=run_id,
        name=job.name,
        run_date=job.run_date,
        started_at=now,
        status="complete",
        job=job.resolved_json(),
        version=bidbeam.__version__,
        finished_at=datetime.now(UTC),
        requests=0,
        served=0,
        dead=0,
        cost=sum_decimal(segment.column("cost")),
        tags=tags,
        starts=1,
    )
    write_manifest(ledger, row, parts, 0)
    return run_id


def run_id_of(job: Job, now: datetime) -> str:
    """``<name>-<run_date>-probe-<8 hex>``: no two are the same."""
    digest = hashlib.sha256(f"{job.run_id} {now.isoformat()} {secrets.token_hex(8)}".encode()).hexdigest()[:8]
    return f"{job.name}-{job.run_date.isoformat()}-probe-{digest}"


def _engine(spec: PoolSpec, model: str) -> Engine:
    from bidbeam.connectors.profiles import profile

    if profile(spec.profile).transport == "sagemaker":
        from bidbeam.connectors.sagemaker_engine import SagemakerEngine

        return SagemakerEngine(spec, model)
    from bidbeam.connectors.http_engine import HttpEngine

    return HttpEngine(spec, model)


def _request(attempt_id: bytes) -> pa.RecordBatch:
    """The one request, as engines take it."""
    import pyarrow as pa

    from bidbeam.connectors.engine import REQUEST_FIELDS

    columns: dict[str, Any] = {
        "tag": 0,
        "attempt_id": attempt_id,
        "input_tokens": _INPUT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "sampling": json.dumps({"max_tokens": MAX_TOKENS, "temperature": 0}),
        "cache_salt": None,
        "messages": json.dumps([{"role": "user", "content": PROMPT}]),
        "prompt": None,
    }
    arrays = [pa.array([value], REQUEST_FIELDS[name]) for name, value in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _known(attempt_id: bytes) -> pa.RecordBatch:
    """What we know of the request ourselves, as settling asks for it; it belongs to no row of any input."""
    import pyarrow as pa

    columns = {
        "tag": pa.array([0], pa.int64()),
        "key": pa.nulls(1, pa.binary(16)),
        "attempt_id": pa.array([attempt_id], pa.binary(16)),
        "request_id": pa.nulls(1, pa.string()),
        "lot_id": pa.nulls(1, pa.string()),
        "round": pa.nulls(1, pa.int16()),
        "attempt_no": pa.array([1], pa.int16()),
        "kind": pa.array(["probe"]),
        "input_tokens": pa.array([_INPUT_TOKENS], pa.int32()),
        "tokens_exact": pa.array([False]),
        "max_tokens": pa.array([MAX_TOKENS], pa.int32()),
        "n": pa.array([1], pa.int32()),
    }
    return pa.RecordBatch.from_pydict(columns)


def _answer(engine: Engine, asked: pa.RecordBatch) -> pa.RecordBatch:
    """The result of the one request, which comes back in any case: answered, failed, or cancelled in the end."""
    woken = threading.Event()
    engine.listen(woken.set)
    engine.submit(asked)
    for waited_s in (_TIMEOUT_S + 5.0, 5.0):
        found = _wait(engine, woken, waited_s)
        if found is not None:
            return found
        engine.cancel()
    raise PoolDown("the probe got no answer and could not be taken back")


def _wait(engine: Engine, woken: threading.Event, seconds: float) -> pa.RecordBatch | None:
    import time

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for batch in engine.poll():
            if batch.num_rows:
                return batch
        woken.wait(min(0.25, max(until - time.monotonic(), 0.01)))
        woken.clear()
    return None
