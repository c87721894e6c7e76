"""What a dead letter says: the ledger has a request's reason, the run's dead letters have the message with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bidbeam.connectors.errors import BidbeamError
from bidbeam.connectors.ledger_reader import REHEARSALS
from bidbeam.connectors.store import Store

_COLUMNS = ("request_id", "reason", "message")


def dead_message(
    run: Mapping[str, Any], request_id: str, reason: str, storage: Mapping[str, Mapping[str, Any]], *, rehearsals: bool
) -> str | None:
    """The message of a request that ended for ``reason``; None where the output is not to be had any more.

    ``run`` has the ``run_id``, ``run_date`` and resolved ``job`` of the ledger.
    """
    from bidbeam.transforms.finishing import read_manifest

    try:
        job = json.loads(run["job"] or "{}")
        output = Store.at(str(job["output"]), {**job.get("storage", {}), **storage})
        output = output.child(REHEARSALS) if rehearsals else output
        day: date = run["run_date"]
        run_dir = output.child(f"run_date={day.isoformat()}", f"run_id={run['run_id']}")
        manifest = read_manifest(run_dir)
        for file in (manifest or {}).get("dead_letters", ()):
            with run_dir.open_input(file["path"]) as source:
                rows = pq.ParquetFile(source).read(columns=list(_COLUMNS))
            mine = pc.and_(pc.equal(rows.column("request_id"), request_id), pc.equal(_reasons(rows), reason))
            found = rows.column("message").filter(mine)
            if len(found):
                message: str | None = found[0].as_py()
                return message
    except (BidbeamError, OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None  # the story is the ledger's: what stands elsewhere may have been moved, or be out of reach
    return None


def _reasons(rows: pa.Table) -> pa.ChunkedArray:
    return rows.column("reason").cast(pa.string())
