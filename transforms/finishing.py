"""The end of a run: the ledger's manifest and the output's, written last; then what nobody needs any more goes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

from bidbeam.connectors.errors import RunHeld, StoreError
from bidbeam.connectors.ledger_manifest import PartFile, RunRow, latest_manifest
from bidbeam.connectors.ledger_writer import write_manifest, write_part
from bidbeam.connectors.schemas import BASELINES
from bidbeam.connectors.store import Store
from bidbeam.transforms.charging import Baseline
from bidbeam.transforms.compaction import compact
from bidbeam.transforms.decisions import market_parts
from bidbeam.transforms.heartbeat import why_down
from bidbeam.transforms.published import OutputFile, PoolCount, Published
from bidbeam.transforms.run_context import RunContext

SUCCESS, INCOMPLETE = "_SUCCESS", "_INCOMPLETE"

_PART_OF_START = re.compile(r"^(?!runs/|requests/).*/part-s(\d+)-[^/]*$")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the ledger says of the run beside what happened in it. ``tolerated`` is how many dead letters still count as
    done; ``job`` the resolved job as JSON, secrets masked; ``fingerprint`` that of the input."""

    name: str
    job: str
    version: str
    tolerated: int
    fingerprint: str
    parent_run_id: str | None = None


def read_manifest(run_dir: Store) -> dict[str, Any] | None:
    """The manifest of a run that has ended; None while it has not. Raises StoreError for one that is damaged."""
    found = [_manifest(run_dir, name) for name in (SUCCESS, INCOMPLETE) if run_dir.exists(name)]
    # Both stand for a moment where a start ends otherwise than the one before.
    return max(found, key=lambda manifest: int(manifest["starts"]), default=None)


def _manifest(run_dir: Store, name: str) -> dict[str, Any]:
    try:
        manifest = json.loads(run_dir.read(name))
        int(manifest["starts"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise StoreError(
            f"{run_dir.url_of(name)} is damaged ({type(error).__name__}): it says that the run has ended, but not with "
            "what; restore it, or run the job under another name or run date"
        ) from error
    return dict(manifest)


def finish(context: RunContext, record: RunRecord, published: Sequence[Published], ideal: int) -> dict[str, Any]:
    """Writes both manifests and returns the output's. Safe to call again: what stands is met again."""
    before = read_manifest(context.run_dir)
    if before is not None and before["starts"] >= context.start:
        _clean_up(context, before)
        return before
    if before is not None and before["starts"] != context.ended_start:
        # What it booked is in neither our counts nor what they are added to.
        raise RunHeld(f"run {context.run_id} was ended by another start while this one worked; start it again")
    total = sum(published, _booked_before(before))
    dead = sum(total.dead.values())
    status = "complete" if dead <= record.tolerated else "incomplete"
    finished_at = datetime.now(UTC)
    parts = [*_kept_parts(context), *total.parts, *market_parts(context), *_baselines(context)]
    counts = {
        "requests": total.served + dead,
        "served": total.served,
        "input_tokens": total.input_tokens,
        "cached_tokens": total.cached_tokens,
        "ideal_cached_tokens": ideal,
        "output_tokens": total.output_tokens,
    }
    row = _row(context, record, status, finished_at, dead=dead, cost=total.cost, **counts)
    _write_ledger_manifest(context, row, parts)

    manifest = {
        "run_id": context.run_id,
        "run_date": context.run_date.isoformat(),
        "status": status,
        "starts": context.start,
        "started_at": context.started_at.isoformat(),
        "finished_at": finished_at.isoformat(),
        **counts,
        "dead": dict(total.dead),
        "tolerated": record.tolerated,
        "cost": f"{total.cost:f}",
        "baseline_cost": None if total.baseline_cost is None else f"{total.baseline_cost:f}",
        "baseline_unknown": total.baseline_unknown,
        "wasted": f"{total.wasted:f}",
        "truncated": total.truncated,
        "other_models": dict(total.other_models),
        "estimated": total.estimated,
        "pools": [{**asdict(pool), "cost": f"{pool.cost:f}"} for pool in total.pools],
        "down": why_down(context.scratch),
        "input": record.fingerprint,
        "version": record.version,
        "outputs": _files(total.outputs),
        "dead_letters": _files(total.dead_letters),
    }
    _write_output_manifest(context.run_dir, manifest, before)
    _clean_up(context, manifest)
    return manifest


def _clean_up(context: RunContext, manifest: Mapping[str, Any]) -> None:
    """What nobody needs any more, once the manifest stands. Safe to call again."""
    _clear_unlisted(context.run_dir, manifest)
    compact(context.journal, manifest["starts"])


def _booked_before(before: Mapping[str, Any] | None) -> Published:
    """What starts have booked whose segments are gone, so that nobody books it again."""
    if before is None:
        return Published()
    return Published(
        cost=Decimal(before["cost"]),
        pools=tuple(PoolCount(**{**pool, "cost": Decimal(pool["cost"])}) for pool in before["pools"]),
        wasted=Decimal(before.get("wasted", 0)),
        other_models=before.get("other_models", {}),
        estimated=before.get("estimated", 0),
    )


def _kept_parts(context: RunContext) -> list[PartFile]:
    """Ledger parts of starts whose segments are gone; their request rows are written anew by every start."""
    latest = latest_manifest(context.ledger, context.run_date, context.run_id) if context.ended_before else None
    if latest is None or context.ended_start is None:
        return []
    # A start that was cut short just before its output's manifest is listed too, but still has its segments.
    return [
        part
        for part in latest.parts
        if (found := _PART_OF_START.search(part.path)) is not None and int(found[1]) <= context.ended_start
    ]


def _files(files: Sequence[OutputFile]) -> list[dict[str, Any]]:
    return [asdict(file) for file in sorted(files, key=lambda file: file.path)]


def _write_output_manifest(run_dir: Store, manifest: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    name = SUCCESS if manifest["status"] == "complete" else INCOMPLETE
    data = json.dumps(manifest, indent=1).encode()
    if before is None:
        run_dir.create(name, data)
        return
    run_dir.replace(name, data)
    if name == SUCCESS:
        run_dir.delete(INCOMPLETE)
    else:
        run_dir.delete(SUCCESS)


def _clear_unlisted(run_dir: Store, manifest: Mapping[str, Any]) -> None:
    """Deletes what earlier starts published, whole or in part: it makes way only once the new files count."""
    for kind in ("outputs", "dead_letters"):
        listed = {file["path"] for file in manifest[kind]}
        for entry in run_dir.list(f"{kind}/"):
            if entry.name not in listed:
                run_dir.delete(entry.name)


def _write_ledger_manifest(context: RunContext, row: RunRow, parts: Sequence[PartFile]) -> None:
    unique = list({part.path: part for part in parts}.values())
    latest = latest_manifest(context.ledger, context.run_date, context.run_id)
    write_manifest(context.ledger, row, unique, 0 if latest is None else latest.sequence + 1)


def _row(
    context: RunContext, record: RunRecord, status: str, finished_at: datetime | None, **counts: int | Decimal
) -> RunRow:
    """The run's row; ``counts`` are the columns that are known only at its end."""
    return RunRow(
        run_id=context.run_id,
        name=record.name,
        run_date=context.run_date,
        started_at=context.started_at,
        status=status,
        job=record.job,
        version=record.version,
        parent_run_id=record.parent_run_id,
        finished_at=finished_at,
        tags=context.tags,
        starts=context.start,
        **counts,  # type: ignore[arg-type]  # each is a column of its own type
    )


def note_status(context: RunContext, record: RunRecord, status: str) -> None:
    """Says in the ledger that the run is ``running`` or was ``interrupted``; what it listed before stays listed."""
    latest = latest_manifest(context.ledger, context.run_date, context.run_id)
    kept = [] if latest is None else [part for part in latest.parts if part.table != "runs"]
    finished_at = datetime.now(UTC) if status == "interrupted" else None
    row = _row(context, record, status, finished_at)
    write_manifest(context.ledger, row, kept, 0 if latest is None else latest.sequence + 1)


def _baselines(context: RunContext) -> list[PartFile]:
    if context.baseline is None:
        return []
    rows = [
        {
            "run_id": context.run_id,
            "baseline": each.name,
            "meter": meter,
            "unit_price": unit_price,
            "valid_from": each.valid_from,
            "source": each.source,
            "model": each.model,
            "start": context.start,
        }
        for baseline in (context.baseline, *context.other_baselines)
        for each in (baseline, *baseline.also)
        for meter, unit_price in _meters(each).items()
        if unit_price is not None
    ]
    table = pa.Table.from_pylist(rows, schema=BASELINES)
    # Named as parts are that later starts keep: what this one booked was counted by it.
    part = f"s{context.start:03d}-list"
    return [write_part(context.ledger, "baselines", context.run_date, context.run_id, part, table)]


def _meters(baseline: Baseline) -> dict[str, Decimal | None]:
    return {
        "uncached_input": baseline.input,
        "cached_input": baseline.cached_input,
        "output": baseline.output,
        "request": baseline.request,
    }
