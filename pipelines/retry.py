"""Retry: a run's dead letters become the input of a run of their own, with the columns that their rows came with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bidbeam.connectors.errors import AlreadyExists, InputError, StoreError, UsageError
from bidbeam.connectors.schemas import DEAD_LETTER_COLUMNS
from bidbeam.transforms.origins import ORIGIN, write_origins

if TYPE_CHECKING:
    from bidbeam.connectors.store import Store
    from bidbeam.pipelines.job import Job

_PART = re.compile(r"dead_letters/part-(?P<start>(?:s\d+-)?)(?P<unread>unread-)?(?P<number>\d+)\.parquet")
_RUN_ID = re.compile(r"[\w.-]+-(\d{4}-\d{2}-\d{2})-[0-9a-f]{8}")


def retried(job: Job, run_id: str, *, rehearse: bool = False, run_date: date | None = None) -> Job:
    """The job over the dead letters of its run ``run_id``, on that run's day unless ``run_date`` says another.

    The letters are copied, as the input had their rows, into that run's journal, once for each way it has ended; so
    the same call gives the same run again, which resumes it. Raises UsageError for a run that is not there, has not
    ended or has no dead letters.
    """
    from bidbeam.connectors.ledger_manifest import latest_manifest
    from bidbeam.connectors.store import Store
    from bidbeam.transforms.finishing import read_manifest

    output = Store.at(job.output, job.storage)
    output = output.child("_rehearsals") if rehearse else output
    match = _RUN_ID.fullmatch(run_id)
    run_dir = output.child(f"run_date={match[1]}", f"run_id={run_id}") if match else None
    if match is None or run_dir is None or not run_dir.children():
        raise UsageError(_unknown(output, run_id))
    manifest = read_manifest(run_dir)
    if manifest is None:
        raise UsageError(f"run {run_id} has not ended; run it again to resume it, then its dead letters can be retried")
    if not manifest["dead_letters"]:
        raise UsageError(f"run {run_id} has no dead letters; there is nothing to run again")
    copies = run_dir.child("_journal", "retry", f"s{manifest['starts']:03d}")
    paths = [file["path"] for file in manifest["dead_letters"]]
    files = tuple(_copy(run_dir, path, copies) for path in paths)
    ledger = Store.at(job.ledger, job.storage)
    ledger = ledger.child("_rehearsals") if rehearse else ledger
    listed = latest_manifest(ledger, date.fromisoformat(match[1]), run_id)
    parts = [part.path for part in listed.parts if part.table == "requests"] if listed is not None else []
    origins = {
        copy: copies.url_of(name)
        for copy, path in zip(files, paths, strict=True)
        if (name := _note_origins(run_dir, path, copies, ledger, parts)) is not None
    }
    day = run_date or date.fromisoformat(match[1])
    return replace(job, input=files, run_date=day, parent_run_id=run_id, origins=origins)


def _note_origins(run_dir: Store, path: str, copies: Store, ledger: Store, parts: Sequence[str]) -> str | None:
    """Writes down where the rows of one file of dead letters stood in the parent's own input; gives the name.

    The dead among the rows of a part of ``requests`` are, in their order, those of the file that was written with it.
    None where the ledger does not have them (any more).
    """
    match = _PART.fullmatch(path)
    name = f"origins/{path.removeprefix('dead_letters/')}"
    if match is None or copies.exists(name):
        return None if match is None else name
    wanted = f"part-{match['start']}{'d' if match['unread'] else 'r'}{match['number']}.parquet"
    part = next((each for each in parts if each.rpartition("/")[2] == wanted), None)
    if part is None:
        return None
    try:
        with ledger.open_input(part) as source:
            rows = pq.read_table(source, columns=["status", *ORIGIN.names])
        with run_dir.open_input(path) as source:
            letters = pq.read_metadata(source).num_rows
    except (StoreError, pa.ArrowException):
        return None
    dead = rows.filter(pc.equal(rows.column("status").cast(pa.string()), "dead")).select(ORIGIN.names)
    if dead.num_rows != letters:
        return None
    write_origins(copies, name, dead)
    return name


def _copy(run_dir: Store, path: str, copies: Store) -> str:
    """Copies one file of dead letters, without our columns and under the input's names; gives the copy's URL."""
    name = path.removeprefix("dead_letters/")
    if not copies.exists(name):
        try:
            with run_dir.open_input(path) as source, copies.scratch_file() as scratch:
                letters = pq.ParquetFile(source)
                fields = list(letters.schema_arrow)[: -len(DEAD_LETTER_COLUMNS)]
                schema = pa.schema([_original(field) for field in fields])
                with pq.ParquetWriter(scratch, schema, compression="snappy") as writer:
                    for group in range(letters.num_row_groups):
                        rows = letters.read_row_group(group)
                        columns = [rows.column(at) for at in range(len(fields))]
                        writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                copies.create_from(name, scratch)
        except AlreadyExists:
            pass
        except pa.ArrowException as error:
            raise InputError(f"{run_dir.url_of(path)} cannot be read: {error}") from error
    return copies.url_of(name)


def _original(field: pa.Field) -> pa.Field:
    from bidbeam.transforms.publishing import ORIGINAL_NAME

    name = (field.metadata or {}).get(ORIGINAL_NAME)
    return field if name is None else field.with_name(name.decode())


def _unknown(output: Store, run_id: str) -> str:
    days = [name for name in output.children() if name.startswith("run_date=")]
    known = [name.removeprefix("run_id=") for day in days for name in output.child(day).children()]
    near = difflib.get_close_matches(run_id, known, n=3, cutoff=0.3)
    return f"{output.url} holds no run {run_id!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
