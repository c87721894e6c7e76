"""What a run has at providers' batch APIs, and the books of what comes back of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.batch_journal import BatchJournal, Intent
from bidbeam.connectors.engine import Engine, Lasting
from bidbeam.transforms.compaction import kept_answers
from bidbeam.transforms.journal import list_segments, terms_from_json
from bidbeam.transforms.region_check import check_regions
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms, book_lost, settle

_DIRECTORY = "batches"


def batches_of(context: RunContext) -> BatchJournal:
    """Where this run writes down what it has at providers."""
    return BatchJournal(context.journal.child(_DIRECTORY))


def booked_rows(context: RunContext, intent: Intent) -> npt.NDArray[np.bool_]:
    """Which rows of a batch (bool[n]) stand in the journal: attempts on its pool, at its key, begun when it was."""
    found: Counter[bytes] = Counter()
    for name in (*kept_answers(context), *list_segments(context.journal)):
        with context.journal.open_input(name) as source:
            schema = pa.ipc.open_file(source).schema
        wanted = [schema.get_field_index(column) for column in ("key", "pool", "started_at")]
        with context.journal.open_input(name) as source:
            rows = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted)).read_all()
        mine = pc.and_(
            pc.equal(rows.column("pool").cast(pa.string()), intent.pool), pc.equal(rows.column("started_at"), intent.at)
        )
        found.update(rows.column("key").filter(mine).drop_null().to_pylist())
    booked = np.zeros(intent.rows.num_rows, np.bool_)
    for row, key in enumerate(intent.rows.column("key").to_pylist()):
        if found[key]:
            found[key] -= 1
            booked[row] = True
    return booked


def earlier_terms(engine: Engine, terms: Terms) -> dict[datetime, Terms]:
    """By the ``started_at`` of its results, what was agreed when an earlier start sent what this engine has taken over;
    without what is no other than ``terms`` say.

    A price that is the same at another rate of exchange is a schedule of its own: it has an id of its own here.
    """
    found: dict[datetime, Terms] = {}
    if isinstance(engine, Lasting):
        for at, text in engine.earlier.items():
            agreed = terms_from_json(json.loads(text))
            if agreed.price.price_id == terms.price.price_id:
                if (agreed.fx_rate, agreed.fx_at) == (terms.fx_rate, terms.fx_at):
                    continue
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                agreed = replace(agreed, price=replace(agreed.price, price_id=digest))
            found[at] = agreed
    return found


def settle_strays(
    engine: Engine, terms: Terms, labels: Mapping[str, Any]
) -> tuple[pa.Table | None, str | None, list[Terms]]:
    """SEGMENT rows, without a tag, of what came back to an engine and nobody asks for any more; None of nothing.

    And what the first of them says that was processed where ``labels`` do not declare the pool to be (see
    ``check_regions``), and the terms of earlier starts that some of them are booked under.
    """
    if not isinstance(engine, Lasting):
        return None, None, []
    parts: list[pa.RecordBatch] = []
    astray, used = None, []
    earlier = earlier_terms(engine, terms)
    for requests, results in engine.strays():
        # All of them are of one batch.
        agreed = earlier.get(results.column("started_at")[0].as_py(), terms)
        used += [agreed] if agreed is not terms else []
        unknown = pc.and_(pc.equal(results.column("status"), "cancelled"), pc.is_null(results.column("input_tokens")))
        lost, known = results.filter(unknown), results.filter(pc.invert(unknown))
        if lost.num_rows:
            parts.append(book_lost(requests.filter(unknown), agreed, lost.column("finished_at")[0].as_py()))
        if known.num_rows:
            known, said = check_regions(known, labels)
            astray = astray or said
            parts.append(settle(requests.filter(pc.invert(unknown)), known, agreed, accelerator_ms=None))
    return pa.Table.from_batches(parts).unify_dictionaries() if parts else None, astray, used
