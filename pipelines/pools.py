"""Pools: every pool of a job probed at once: is it there, does it serve the model, at what price, and how fast."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import BidbeamError, ConfigError
from bidbeam.connectors.pools import Meter, PoolSpec
from bidbeam.pipelines.probing import Measured, measurable, measure
from bidbeam.pipelines.resolving import resolve_each

if TYPE_CHECKING:
    import pyarrow as pa

    from bidbeam.pipelines.job import Job
    from bidbeam.transforms.settling import Terms

_THREADS = 16
_LIST_TIMEOUT_S = 15.0
_NO_LIST = re.compile(r"\((404|405|501)\b")
"""In the client's own message: the endpoint is there and has no list of models, as some providers have none."""
_ANSWERED = re.compile(r"\(\d{3}\b")


@dataclass(frozen=True, slots=True)
class ModelProbe:
    """One model at one pool. ``served``: whether the pool lists it, None where it lists none. None is unknown."""

    model: str
    theirs: str
    """Its name at the pool."""
    served: bool | None = None
    latency_s: float | None = None
    tokens_per_second: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: Decimal | None = None
    """USD that the probe cost; None where none was sent."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PoolProbe:
    """What was found of one pool. ``problems`` say in plain words what has to be mended; without any it is ``ok``."""

    pool: str
    kind: str
    profile: str | None
    endpoint_host: str | None
    ok: bool
    reachable: bool | None
    """None where there is nothing to reach: an engine in our workers."""
    reach_s: float | None
    """Seconds that its list took to come: what a call costs there before any token is made."""
    models: tuple[ModelProbe, ...]
    price: str | None
    """As people read it; None where it is not to be had now."""
    unit_prices: Mapping[Meter, Decimal]
    currency: str
    price_source: str | None
    price_id: str | None
    placement: Mapping[str, Any]
    """The labels that it declares."""
    undeclared: tuple[str, ...]
    eligible: bool
    """Whether the job's placement lets its prompts go there."""
    why_not: str | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether each of its models has answered a request."""
        return all(model.latency_s is not None for model in self.models)


@dataclass(frozen=True, slots=True)
class PoolsReport:
    """All pools of a job. ``run_id`` is where the ledger has the probes that cost money; ``cost`` is their USD."""

    pools: tuple[PoolProbe, ...]
    run_id: str | None = None
    ledger_url: str | None = None
    cost: Decimal = Decimal(0)
    probed_at: datetime | None = None
    exit_code: int = 0


@dataclass(slots=True)
class _Found:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reachable: bool | None = None
    reach_s: float | None = None
    host: str | None = None
    listed: frozenset[str] | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    rows: list[tuple[pa.Table, Terms]] = field(default_factory=list)


def probe_pools(job: Job, *, measuring: bool = True, now: datetime | None = None) -> PoolsReport:
    """Probes every pool, none in another's way. ``measuring`` sends each model of a remote pool one tiny request.

    Raises UsageError where the ledger cannot be written: before anything is sent. What a pool has wrong stands in its
    own ``problems``; then ``exit_code`` is 3.
    """
    from bidbeam.connectors.ledger_writer import ensure_ledger
    from bidbeam.pipelines.begin import places
    from bidbeam.pipelines.probing import book

    started_at = now or datetime.now(UTC)
    job, unpriced = resolve_each(job, started_at)
    ledger = places(job, rehearse=False)[1]
    measuring = measuring and any(measurable(pool) for pool in job.pools)
    if measuring:
        ledger.probe_create_only()
        ensure_ledger(ledger)
    for name, problem in _stale(job, started_at).items():
        unpriced.setdefault(name, problem)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="probe") as workers:
        found = list(workers.map(lambda pool: _probe(job, pool, unpriced.get(pool.name), measuring), job.pools))
    rows = [row for each in found for row in each.rows]
    run_id = book(job, ledger, started_at, rows) if rows else None
    pools = tuple(_told(job, pool, each, unpriced.get(pool.name)) for pool, each in zip(job.pools, found, strict=True))
    return PoolsReport(
        pools,
        run_id,
        ledger.url if run_id else None,
        sum((m.cost or Decimal(0) for each in found for m in each.measured.values()), Decimal(0)),
        started_at,
        0 if all(pool.ok for pool in pools) else 3,
    )


def _stale(job: Job, now: datetime) -> dict[str, ConfigError]:
    """The pools whose written-down rate of exchange is too old to charge with."""
    from bidbeam.pipelines.job import check_fx

    stale = {}
    for pool in job.pools:
        try:
            if pool.price.currency in job.fx:
                check_fx(replace(job, pools=(pool,)), now)
        except ConfigError as error:
            stale[pool.name] = error
    return stale


def _probe(job: Job, pool: PoolSpec, unpriced: ConfigError | None, measuring: bool) -> _Found:
    """Whatever goes wrong with a pool is said of that pool, and hides no other."""
    from bidbeam.connectors.secrets import mask
    from bidbeam.transforms.placement import eligible

    found = _Found()
    try:
        if pool.kind == "vllm":
            _look_at_engine(job, pool, found)
        elif _has_key(pool, found):
            _reach(pool, found)
            if measuring and measurable(pool) and found.reachable is not False:
                if unpriced is not None:
                    found.notes.append("not measured, for nobody knows what that would cost")
                elif not eligible(job.placement, pool.placement)[0]:
                    found.notes.append("not measured: the job's placement keeps everything from it")
                else:
                    _measure(job, pool, found)
            elif measuring and pool.kind in ("batch", "lease"):
                what = "a batch takes hours" if pool.kind == "batch" else "no node is rented for a probe"
                found.notes.append(f"not measured: {what}")
    except BidbeamError as error:
        found.problems.append(str(error))
    except Exception as error:  # a pool's fault, whatever it is, must not hide the others
        found.problems.append(mask(f"unexpected {type(error).__name__}: {error}"[:200]))
    return found


def _look_at_engine(job: Job, pool: PoolSpec, found: _Found) -> None:
    import importlib.util
    from pathlib import Path

    where = "on this machine's CPU" if pool.accelerator is None else f"on workers with {pool.accelerator}"
    found.notes.append(f"an engine in our workers, {where}; not loaded for a probe")
    if importlib.util.find_spec("vllm") is None:
        found.notes.append("vLLM is not installed here: the workers need it")
    for model in pool.models:
        source = job.models[model].source or ""
        if source.startswith("/") and not Path(source).exists():
            found.problems.append(f"model {model!r}: there is no {source}")


def _has_key(pool: PoolSpec, found: _Found) -> bool:
    from bidbeam.pipelines.pools_file import check_keys

    try:
        check_keys((pool,))
    except ConfigError as error:
        found.problems.append(error.problem + (f" (expected {error.expected})" if error.expected else ""))
        return False
    return True


def _reach(pool: PoolSpec, found: _Found) -> None:
    """Asks for what costs nothing: the list of models, or of rented nodes."""
    from bidbeam.connectors.errors import PoolDown
    from bidbeam.connectors.http_engine import list_models
    from bidbeam.connectors.http_transport import endpoint
    from bidbeam.connectors.profiles import profile

    found.host = endpoint(pool).host
    quick = replace(pool, timeout_s=min(pool.timeout_s, _LIST_TIMEOUT_S))
    began = time.monotonic()
    if pool.kind == "lease":
        _reach_nodes(quick, found)
    elif profile(pool.profile).transport == "http":
        try:
            found.listed, found.reachable = frozenset(list_models(quick)), True
        except PoolDown as error:
            said = str(error)
            found.reachable = _ANSWERED.search(said) is not None
            if _NO_LIST.search(said):
                found.notes.append("lists no models")
            else:
                found.problems.append(said)
        missing = [name for name in pool.models.values() if found.listed is not None and name not in found.listed]
        found.problems += [f"does not list the model {name!r}{_near(name, found.listed)}" for name in missing]
    if found.reachable:
        found.reach_s = time.monotonic() - began


def _reach_nodes(pool: PoolSpec, found: _Found) -> None:
    from bidbeam.connectors.json_call import NoAnswer
    from bidbeam.connectors.leases import NodeApi

    try:
        NodeApi(pool).find("bidbeam-probe")
        found.reachable = True
    except NoAnswer as error:
        found.reachable = _ANSWERED.search(str(error)) is not None
        if not _NO_LIST.search(str(error)):
            found.problems.append(str(error))


def _near(name: str, listed: frozenset[str] | None) -> str:
    from bidbeam.pipelines.config_check import nearest

    near = nearest(name, sorted(listed or ())[:10_000])
    return f"; did you mean {near!r}?" if near else ""


def _measure(job: Job, pool: PoolSpec, found: _Found) -> None:
    for model, theirs in pool.models.items():
        if found.listed is not None and theirs not in found.listed:
            continue  # it would cost an error and teach nothing
        measured, row, terms = measure(pool, model, job.fx)
        found.measured[model] = measured
        found.rows.append((row, terms))
        if measured.ok:
            found.reachable = True
        else:
            found.problems.append(f"model {model!r}: {measured.error}")


def _told(job: Job, pool: PoolSpec, found: _Found, unpriced: ConfigError | None) -> PoolProbe:
    from bidbeam.pipelines.offers import price_text
    from bidbeam.pipelines.price_sources import FALLBACK
    from bidbeam.transforms.placement import LABELS, eligible

    problems, notes = list(dict.fromkeys(found.problems)), list(found.notes)
    if pool.price.source.startswith(FALLBACK):
        notes.append("its feed does not tell its price: a run would pay the fallback")
    if unpriced is not None:
        problems.insert(0, f"no price: {unpriced.problem}")
    priced = bool(pool.price.unit_prices)
    allowed, why_not = eligible(job.placement, pool.placement)
    return PoolProbe(
        pool=pool.name,
        kind=pool.kind,
        profile=pool.profile,
        endpoint_host=found.host,
        ok=not problems,
        reachable=found.reachable,
        reach_s=found.reach_s,
        models=tuple(_model(name, theirs, found) for name, theirs in pool.models.items()),
        price=price_text(pool) if priced else None,
        unit_prices=dict(pool.price.unit_prices),
        currency=pool.price.currency,
        price_source=pool.price.source if priced else None,
        price_id=pool.price.price_id or None,
        placement={label: value for label, value in pool.placement.items() if value is not None},
        undeclared=tuple(label for label in LABELS if pool.placement.get(label) is None),
        eligible=allowed,
        why_not=why_not,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _model(name: str, theirs: str, found: _Found) -> ModelProbe:
    served = None if found.listed is None else theirs in found.listed
    measured = found.measured.get(name)
    if measured is None:
        return ModelProbe(name, theirs, served)
    return ModelProbe(
        name,
        theirs,
        True if measured.ok else served,
        measured.latency_s,
        measured.tokens_per_second,
        measured.input_tokens,
        measured.output_tokens,
        measured.cost,
        measured.error,
    )
