"""Begin: everything that is found out, checked and written down before a run's graph is built."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import bidbeam
from bidbeam.connectors import registry
from bidbeam.connectors.errors import BidbeamError, ModelError
from bidbeam.connectors.inputs import InputPlan, is_openai_batch, plan_input
from bidbeam.connectors.ledger_writer import ensure_ledger
from bidbeam.connectors.model_files import prepare_model
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.store import Store
from bidbeam.pipelines.earlier import Earlier, take_over
from bidbeam.pipelines.job import Job, check_fx, check_input, check_keys
from bidbeam.pipelines.known import known_pools
from bidbeam.pipelines.lease import Lease
from bidbeam.pipelines.resolving import resolve
from bidbeam.transforms import stopping
from bidbeam.transforms.charging import Baseline
from bidbeam.transforms.engines import slot_for
from bidbeam.transforms.finishing import RunRecord, note_status, read_manifest
from bidbeam.transforms.region_check import believed
from bidbeam.transforms.rendering import RenderSpec
from bidbeam.transforms.run_context import FxQuote, ModelFacts, RunContext

_RANGE_ROWS = 131_072
_RANGE_BYTES = 64 << 20
_LOT_TOKENS = (4_096, 1_048_576)
_LOTS_PER_POOL = 16
_DEFAULT_BLOCK = 16
_CPU_BLOCK = 128
_log = logging.getLogger("bidbeam.pools")


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that may be built: its context and input, the record for the ledger, and the lease that holds it.

    ``manifest`` is that of an earlier start which has finished all this one could do; then there is nothing to do, and
    no lease. A context manager: on leaving it, engines are closed and the run is free for the next start.
    """

    context: RunContext
    plan: InputPlan
    record: RunRecord
    lease: Lease | None
    manifest: Mapping[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lease is None:
            # Nothing was begun: what is open in this process is another run's.
            return
        registry.close_all()
        stopping.clear()
        if error is not None:
            with contextlib.suppress(BidbeamError, OSError):
                note_status(self.context, self.record, "interrupted")
        self.lease.release()


def places(job: Job, *, rehearse: bool) -> tuple[Store, Store]:
    """The run's directory and the ledger; a rehearsal's stand apart from the real ones."""
    output, ledger = Store.at(job.output, job.storage), Store.at(job.ledger, job.storage)
    if rehearse:
        output, ledger = output.child("_rehearsals"), ledger.child("_rehearsals")
    return output.child(f"run_date={job.run_date.isoformat()}", f"run_id={job.run_id}"), ledger


def begin(job: Job, *, rehearse: bool = False, warm: bool = True, now: datetime | None = None) -> Begun:
    """Checks all that can be checked before anything is spent, takes the run's lease and enters it into the ledger.

    ``warm`` starts the engines of this process's own pools at once, so that they load while the plan is made. Raises
    UsageError for whatever the user has to mend.
    """
    started_at = now or datetime.now(UTC)
    if not rehearse:
        check_keys(job)
    job = resolve(job, started_at)
    if not rehearse:
        check_fx(job, started_at)
    run_dir, ledger = places(job, rehearse=rehearse)
    with ThreadPoolExecutor(4) as workers:
        models = prepare_models(job, workers)
        plan = plan_input(job.input, job.storage)
        spec = render_spec(job, plan)
        check_input(job, spec, plan.schema)
        for store in (run_dir, ledger):
            store.probe_create_only()
        facts = model_facts(job, {name: future.result() for name, future in models.items()}, rehearse=rehearse)
    lease = Lease.take(run_dir.child("_journal"), job.run_id)
    try:
        # Only now: the holder before us may have ended the run a moment ago.
        manifest = read_manifest(run_dir)
        if not rehearse:
            give_back_nodes(job, run_dir.child("_journal"), manifest)
        earlier = take_over(run_dir.child("_journal"), manifest, job.run_id)
        context = replace(
            make_context(job, plan, spec, facts, run_dir, ledger, started_at, rehearse=rehearse, earlier=earlier),
            known=known_pools(job, ledger, started_at),
        )
        record = RunRecord(
            name=job.name,
            job=job.resolved_json(),
            version=bidbeam.__version__,
            tolerated=tolerated(job, plan.rows),
            fingerprint=plan.fingerprint,
            parent_run_id=job.parent_run_id,
        )
        if manifest is not None and not more_to_do(manifest, plan):
            lease.release()
            return Begun(context, plan, record, None, manifest)
        if warm:
            for pool in job.pools:
                for model in pool.models:
                    if pool.kind == "vllm" and facts[model].directory is not None:
                        slot_for(context, pool, model)
        ensure_ledger(ledger)
        note_status(context, record, "running")
    except BaseException:
        registry.close_all()
        lease.release()
        raise
    return Begun(context, plan, record, lease)


def give_back_nodes(job: Job, journal: Store, manifest: Mapping[str, Any] | None) -> None:
    """Whatever an earlier start of this run rented and could not give back ends now, before anything else."""
    from bidbeam.connectors.leases import DIRECTORY

    if journal.list(DIRECTORY):
        from bidbeam.transforms.lease_recovery import recover_leases

        quotes = {c: FxQuote(r.rate, r.source, r.at) for c, r in job.fx.items()}
        recover_leases(journal, job.pools, quotes, ended_start=None if manifest is None else int(manifest["starts"]))


def more_to_do(manifest: Mapping[str, Any], plan: InputPlan) -> bool:
    """Whether a start after one that ended has anything to do: new rows, or dead letters that may yet be answered."""
    from bidbeam.connectors.schemas import RETRYABLE_REASONS

    return manifest["input"] != plan.fingerprint or bool(RETRYABLE_REASONS & set(manifest["dead"]))


def prepare_models(job: Job, workers: ThreadPoolExecutor) -> dict[str, Future[str | None]]:
    """Starts to fetch and convert, in the background, every model that a pool serves."""
    served = sorted({model for pool in job.pools for model in pool.models})

    def prepare(name: str) -> str | None:
        return prepare_model(job.models[name], storage=job.storage, base_dir=job.source_dir).dir

    return {name: workers.submit(prepare, name) for name in served}


def render_spec(job: Job, plan: InputPlan, contexts: Mapping[str, int | None] | None = None) -> RenderSpec:
    """How rows become requests. OpenAI-batch input names its rows by ``custom_id`` unless the job says otherwise."""
    prompt = job.prompt
    if prompt.id is None and is_openai_batch(plan.schema):
        prompt = replace(prompt, id="custom_id")
    served = {model for pool in job.pools for model in pool.models}
    return RenderSpec(
        prompt=prompt,
        model=job.model,
        sampling=job.sampling,
        placement=job.placement,
        longest_context=contexts or dict.fromkeys(sorted(served)),
    )


def model_facts(job: Job, directories: Mapping[str, str | None], *, rehearse: bool) -> dict[str, ModelFacts]:
    """Where each model is and in what blocks its caches work. Raises ModelError for an engine without its model."""
    facts = {}
    for name, directory in directories.items():
        owners = [pool for pool in job.pools if pool.kind == "vllm" and name in pool.models]
        if owners and directory is None and not rehearse:
            raise ModelError(
                f"pool {owners[0].name!r} runs model {name!r}, which has no source in the pools file; add one, such as "
                "source: package:NAME, a directory, a hub id or a URL"
            )
        facts[name] = ModelFacts(
            name, directory, _block(owners), name in job.models and job.models[name].trust_remote_code
        )
    return facts


def _block(owners: list[PoolSpec]) -> int:
    for pool in owners:
        block = pool.engine.get("block_size")
        if block is not None:
            return int(block)
    return _DEFAULT_BLOCK if not owners or owners[0].accelerator else _CPU_BLOCK


def longest_contexts(job: Job, facts: Mapping[str, ModelFacts]) -> dict[str, int | None]:
    """Per model the longest prompt plus answer that any pool takes; None where some pool's limit is not known."""
    longest: dict[str, int | None] = {}
    for name in facts:
        limits = [pool_context(pool, facts[name]) for pool in job.pools if name in pool.models]
        known = [limit for limit in limits if limit is not None]
        longest[name] = max(known) if known and len(known) == len(limits) else None
    return longest


def pool_context(pool: PoolSpec, facts: ModelFacts) -> int | None:
    """Longest prompt plus answer on one pool; an engine of ours takes what its arguments or else its model say."""
    if pool.context is not None or pool.kind != "vllm":
        return pool.context
    told = pool.engine.get("max_model_len")
    if told is not None:
        return int(told)
    if facts.directory is None:
        return None
    config = json.loads(Path(facts.directory, "config.json").read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings")
    return None if length is None else int(length)


def tolerated(job: Job, rows: int) -> int:
    """How many dead letters still count as done."""
    low, high = 0, rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if job.tolerate_dead.allows(middle, rows) else (low, middle - 1)
    return low


def make_context(
    job: Job,
    plan: InputPlan,
    spec: RenderSpec,
    facts: Mapping[str, ModelFacts],
    run_dir: Store,
    ledger: Store,
    started_at: datetime,
    *,
    rehearse: bool,
    earlier: Earlier,
) -> RunContext:
    """The context of the next start of this run."""
    contexts = longest_contexts(job, facts)
    size = sum(split.size_bytes for split in plan.splits)
    trusted = believed(run_dir.child("_journal"), job.pools)
    for void, pool in zip(trusted, job.pools, strict=True):
        if void != pool:
            _log.warning(
                "pool %s: it answered this run from elsewhere than it declares, so that counts no more", pool.name
            )
    pools = tuple(
        replace(pool, context=max((pool_context(pool, facts[m]) or 0 for m in pool.models), default=0) or None)
        for pool in trusted
    )
    counted = baselines(job)
    return RunContext(
        run_id=job.run_id,
        run_date=job.run_date,
        start=earlier.start,
        started_at=started_at,
        run_dir=run_dir,
        ledger=ledger,
        render=replace(spec, longest_context=contexts),
        models=facts,
        pools=pools,
        input_schema=plan.schema,
        storage=job.storage,
        seed=earlier.seed,
        rows=plan.rows,
        ranges=max(1, -(-plan.rows // _RANGE_ROWS), -(-size // _RANGE_BYTES)),
        rounds=job.auction.rounds,
        lot_tokens=lot_tokens(size, plan.rows, job),
        rehearse=rehearse,
        placement=job.placement,
        max_cost=job.max_cost,
        payment=job.auction.payment,
        hedging=job.auction.hedging,
        patience_s=job.auction.patience.total_seconds(),
        spent=earlier.spent,
        answered=earlier.answered,
        deadline_at=job.deadline_at(started_at),
        tags=json.dumps(dict(job.tags), sort_keys=True) if job.tags else None,
        baseline=counted[0] if counted else None,
        other_baselines=counted[1:],
        origins=job.origins,
        samples=asks_for_samples(job, plan),
        has_history=earlier.has_history,
        ended_start=earlier.ended,
        damaged=earlier.damaged,
        fx={c: FxQuote(r.rate, r.source, r.at) for c, r in job.fx.items()},
    )


def lot_tokens(size_bytes: int, rows: int, job: Job) -> int:
    """The budget of a lot: so that each pool may win several, within bounds that amortise a prefix and bound a loss."""
    answer = int(job.sampling.get("max_tokens") or 128)
    total = size_bytes // 4 + rows * answer
    low, high = _LOT_TOKENS
    return min(max(total // (_LOTS_PER_POOL * max(len(job.pools), 1)), low), high)


def asks_for_samples(job: Job, plan: InputPlan) -> bool:
    """Whether any request may ask for several samples."""
    return job.sampling.get("n", 1) != 1 or "n" in plan.schema.names or is_openai_batch(plan.schema)


def baselines(job: Job) -> tuple[Baseline, ...]:
    """The baselines of the job; the first is the one that ``charges.baseline_cost`` counts."""
    by_name: dict[str, list[Baseline]] = {}
    for spec in job.baseline:
        prices = spec.unit_prices
        free = Decimal(0)  # where the request alone is paid
        each = Baseline(
            spec.name,
            prices.get("uncached_input", free),
            prices.get("output", free),
            prices.get("cached_input"),
            prices.get("request"),
            spec.model,
            source=spec.source,
            valid_from=spec.valid_from,
        )
        by_name.setdefault(spec.name, []).append(each)
    return tuple(replace(same[0], also=tuple(same[1:])) for same in by_name.values())
