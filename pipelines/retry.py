"""Retry: a run's dead letters become the input of a run of their own, with the columns that their rows came with."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.errors import AlreadyExists, InputError, UsageError
from bidbeam.connectors.schemas import DEAD_LETTER_COLUMNS

if TYPE_CHECKING:
    from bidbeam.connectors.store import Store
    from bidbeam.pipelines.job import Job

_RUN_ID = re.compile(r"[\w.-]+-(\d{4}-\d{2}-\d{2})-[0-9a-f]{8}")


def retried(job: Job, run_id: str, *, rehearse: bool = False, run_date: date | None = None) -> Job:
    """The job over the dead letters of its run ``run_id``, on that run's day unless ``run_date`` says another.

    The letters are copied, as the input had their rows, into that run's journal, once for each way it has ended; so
    the same call gives the same run again, which resumes it. Raises UsageError for a run that is not there, has not
    ended or has no dead letters.
    """
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
    files = tuple(_copy(run_dir, file["path"], copies) for file in manifest["dead_letters"])
    day = run_date or date.fromisoformat(match[1])
    return replace(job, input=files, run_date=day, parent_run_id=run_id)


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
