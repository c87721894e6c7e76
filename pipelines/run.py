"""Run: one start of a job, from its file to its manifest, with the progress shown and everything closed behind it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from types import FrameType
from typing import Any

from bidbeam.connectors.errors import BidbeamError, Interrupted, RunHeld
from bidbeam.connectors.processes import workers_end_with_us
from bidbeam.pipelines.beam_options import check_beam_options, pipeline_of
from bidbeam.pipelines.begin import Begun, begin
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress, Progress
from bidbeam.pipelines.summary import PoolTotal, RunSummary
from bidbeam.pipelines.watch import Watch
from bidbeam.transforms import stopping
from bidbeam.transforms.batches import batches_of
from bidbeam.transforms.failures import failure_of
from bidbeam.transforms.finishing import read_manifest
from bidbeam.transforms.run_context import RunContext

_RUNNER_LOG = "apache_beam.runners.portability.fn_api_runner.fn_runner"
_MOST_WORKERS = 4
"""Threads that planning and publishing run on here; each holds a range in memory."""


def run(job: Job, beam_options: Sequence[str] = (), *, rehearse: bool = False) -> RunSummary:
    """Runs a job to its end, quietly; what the command line calls, without its progress. Raises BidbeamError."""
    return run_job(job, rehearse=rehearse, beam_options=list(beam_options), progress=NullProgress())


def run_job(job: Job, *, rehearse: bool, beam_options: list[str], progress: Progress) -> RunSummary:
    """One start of a run: resumes what an earlier start left, or says that there is nothing to do.

    Raises UsageError before anything is spent where the job, the pools or the input are at fault; Interrupted after a
    signal, once what was in flight is settled.
    """
    clock = time.monotonic()
    check_beam_options(beam_options)
    local = not _names_runner(beam_options)
    with begin(job, rehearse=rehearse, warm=local and not _in_other_processes(beam_options)) as begun:
        if begun.lease is None:
            return summary(job, begun.manifest or {}, time.monotonic() - clock, rehearse=rehearse, nothing_to_do=True)
        manifest = _start(begun, beam_options, progress)
    return summary(job, manifest, time.monotonic() - clock, rehearse=rehearse)


def _start(begun: Begun, beam_options: list[str], progress: Progress) -> Mapping[str, Any]:
    context = begun.context
    with Watch(context, progress), _signals(context, progress):
        if begun.lease is not None:
            begun.lease.when_lost(partial(_stop_sending, context))
        try:
            _pipeline(begun, beam_options)
        except Exception as error:
            if begun.lease is not None and begun.lease.lost:
                raise RunHeld(
                    f"run {context.run_id} was taken over by another start, or its journal was removed, while this "
                    "one could not renew its lease; it sends nothing more. What it settled is kept"
                ) from error
            cause = failure_of(context.scratch) or error
            interrupted = isinstance(cause, Interrupted) or stopping.requested()
            if interrupted:
                raise Interrupted(
                    f"run {context.run_id} was stopped; everything settled is kept. The same command resumes it"
                    f"{_still_away(context)}"
                ) from error
            if isinstance(cause, BidbeamError):
                raise cause from error
            raise
    manifest = read_manifest(context.run_dir)
    if manifest is None:
        raise BidbeamError(f"run {context.run_id} ended without a manifest; start it again to resume")
    return manifest


def _still_away(context: RunContext) -> str:
    """What goes on without us, for the message of a run that was stopped."""
    with contextlib.suppress(BidbeamError, OSError):
        away = len(batches_of(context).names())
        if away:
            return f", and collects {away} batch{'es' * (away > 1)} that the provider goes on with"
    return ""


def _pipeline(begun: Begun, beam_options: list[str]) -> None:
    # Beam takes seconds to import: engines load meanwhile.
    from bidbeam.pipelines.batch import build

    flags = beam_options if _names_runner(beam_options) else [*local_options(begun, beam_options), *beam_options]
    pipeline = pipeline_of(flags)
    build(pipeline, begun.context, begun.plan.splits, begun.record)
    apart = _in_other_processes(beam_options) and not _names_runner(beam_options)
    with workers_end_with_us() if apart else contextlib.nullcontext():
        pipeline.run().wait_until_finish()


def local_options(begun: Begun, given: Sequence[str]) -> list[str]:
    """Beam's options for this machine: its runner in this process, with as many workers as the input keeps busy."""
    # Checking the element types of a graph that is always the same costs a quarter of a second a run.
    options = ["--runner=FnApiRunner", "--no_pipeline_type_check"]
    workers = min(len(os.sched_getaffinity(0)), len(begun.plan.splits), _MOST_WORKERS)
    if workers > 1 and not any(option.startswith("--direct_") for option in given):
        # In memory the runner spreads a stage over its workers too, as threads, without the wire between them, which
        # costs 50 ms a stage. It says that it does not.
        logging.getLogger(_RUNNER_LOG).addFilter(_is_no_warning_of_workers)
        options += ["--direct_running_mode=in_memory", f"--direct_num_workers={workers}"]
    return options


def _is_no_warning_of_workers(record: logging.LogRecord) -> bool:
    return "direct_num_workers" not in str(record.msg)


def _names_runner(beam_options: Sequence[str]) -> bool:
    return any(option == "--runner" or option.startswith("--runner=") for option in beam_options)


def _in_other_processes(beam_options: Sequence[str]) -> bool:
    return any("multi_processing" in option for option in beam_options)


@contextlib.contextmanager
def _signals(context: RunContext, progress: Progress) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the sending; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        if stopping.requested():
            raise KeyboardInterrupt
        stopping.request()
        name = signal.Signals(number).name
        progress.note(f"{name}: no more requests are sent; waiting for those in flight (again to stop at once)")
        threading.Thread(target=_tell_workers, args=(context,), daemon=True).start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_sending(context: RunContext) -> None:
    stopping.request()
    _tell_workers(context)


def _tell_workers(context: RunContext) -> None:
    with contextlib.suppress(BidbeamError, OSError):
        context.scratch.replace(stopping.FILE, b"stop")


def summary(
    job: Job, manifest: Mapping[str, Any], elapsed_s: float, *, rehearse: bool, nothing_to_do: bool = False
) -> RunSummary:
    """What a manifest says, as the command line prints it."""
    from datetime import datetime

    from bidbeam.pipelines.begin import places

    run_dir, ledger = places(job, rehearse=rehearse)
    complete = manifest["status"] == "complete"
    baseline = None if manifest.get("baseline_unknown") else manifest.get("baseline_cost")
    return RunSummary(
        run_id=job.run_id,
        status="nothing_to_do" if nothing_to_do else ("complete" if complete else "incomplete"),
        requests=manifest["requests"],
        served=manifest["served"],
        dead=dict(manifest["dead"]),
        cost=Decimal(manifest["cost"]),
        output_url=run_dir.url,
        ledger_url=ledger.url,
        baseline_cost=None if baseline is None else Decimal(baseline),
        input_tokens=manifest["input_tokens"],
        cached_tokens=manifest["cached_tokens"],
        ideal_cached_tokens=manifest["ideal_cached_tokens"],
        output_tokens=manifest["output_tokens"],
        pools=tuple(
            PoolTotal(
                pool=pool["pool"],
                requests=pool["served"],
                input_tokens=pool["input_tokens"],
                cached_tokens=pool["cached_tokens"],
                output_tokens=pool["output_tokens"],
                cost=Decimal(pool["cost"]),
                other_model=pool.get("other_model", 0),
            )
            for pool in manifest["pools"]
        ),
        elapsed_s=elapsed_s,
        started=datetime.fromisoformat(manifest["started_at"]),
        exit_code=0 if complete else 3,
        rehearsal=rehearse,
        wasted=Decimal(manifest.get("wasted", 0)),
        truncated=manifest.get("truncated", 0),
        other_models=dict(manifest.get("other_models", {})),
        down=dict(manifest.get("down", {})),
        estimated=manifest.get("estimated", 0),
        parent_run_id=job.parent_run_id,
    )
