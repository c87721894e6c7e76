"""The engine's door: a lot's spilled rows become the request batches that engines take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.engine import REQUEST_FIELDS
from bidbeam.connectors.errors import BidbeamError
from bidbeam.connectors.schemas import LABEL
from bidbeam.transforms.lots import lot_places
from bidbeam.transforms.merging import piece_starts, read_range
from bidbeam.transforms.order import read_order, shared_with_previous
from bidbeam.transforms.placement import combine
from bidbeam.transforms.prefix import cacheable_tokens
from bidbeam.transforms.prefix_group import prefix_ids
from bidbeam.transforms.rendering import messages_json, prompt_text, token_lists
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.spilling import SpillRef, layout_of

_KEPT_RANGES = 2
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


_BINDING = ("placement", "tenant")
"""What a lot says of its requests that decides who may see them."""


def _check_lot(lot: dict[str, object], spilled: pa.Table) -> None:
    """Raises BidbeamError where the lot claims less than its rows ask for: then nothing of it is sent anywhere."""
    placement, tenant = (pc.unique(_array(spilled, name)).to_pylist() for name in _BINDING)
    said = lot["placement"]
    awarded = json.loads(str(said)) if said else None
    if any(row != said and combine(awarded, row) != said for row in placement):
        raise BidbeamError(f"lot {lot['lot_id']} was awarded under another placement than its requests have")
    if tenant != [lot["tenant"]]:
        raise BidbeamError(f"lot {lot['lot_id']} was awarded under another tenant than its requests have")


def _constant(value: str | None, rows: int) -> pa.Array:
    if value is None:
        return pa.nulls(rows, LABEL)
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value], pa.string()))


def attempt_ids(
    context: RunContext, tags: npt.NDArray[np.int64], attempt_no: int, round_: int, try_: int = 0
) -> pa.Array:
    """Deterministic 16-byte ids, one per (run, start, round, attempt, try, place): splitmix64 over a digest of the
    former.

    They are made from where a request stands, not from what it says, so a ledger gives nothing of a prompt away.
    """
    text = f"{context.run_id}|{context.start}|{round_}|{attempt_no}" + (f"|{try_}" if try_ else "")
    salt = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8")
    halves = np.empty((len(tags), 2), np.uint64)
    with np.errstate(over="ignore"):
        for half in range(2):
            z = tags.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt[half]
            z = (z ^ (z >> np.uint64(30))) * _MIX[0]
            z = (z ^ (z >> np.uint64(27))) * _MIX[1]
            halves[:, half] = z ^ (z >> np.uint64(31))
    return pa.Array.from_buffers(pa.binary(16), len(tags), [None, pa.py_buffer(halves.tobytes())])


def cache_salt(context: RunContext, tenant: str | None) -> str | None:
    """What keeps one tenant's prefix cache apart from another's; secret with the run's seed."""
    if tenant is None:
        return None
    return hashlib.blake2b(tenant.encode(), key=context.seed.to_bytes(16, "little"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class LotRequests:
    """One lot, ready for an engine: ``requests`` (REQUEST_FIELDS) and, row by row, ``info`` for settling."""

    lot_id: str
    requests: pa.RecordBatch
    info: pa.RecordBatch


class Door:
    """Builds lots' requests for one worker; keeps the ranges it read last, because lots come in their order."""

    def __init__(self, context: RunContext, spills: Sequence[SpillRef]) -> None:
        self._context, self._spills = context, spills
        self._layout = layout_of(context)
        # Where the text of an input column is the key, it is not there twice.
        self._key_name = self._layout.schema.field(self._layout.index("key")).name.removeprefix("bidbeam:")
        self._ranges: dict[tuple[int, frozenset[str]], tuple[pa.Table, pa.Table, npt.NDArray[np.int64]]] = {}

    def open(self, lot: dict[str, object], wants: frozenset[str], *, ideal: bool = False, try_: int = 0) -> LotRequests:
        """The requests of one row of a LOT table; ``ideal`` adds ``ideal_cached_tokens`` for a stand-in.

        ``try_`` counts how often a worker has begun on the same lots before and been cut short.
        """
        context = self._context
        range_ = int(str(lot["range"]))
        order, rows, starts = self._range(range_, wants)
        places = lot_places(bytes(lot["places"]))  # type: ignore[call-overload]  # a binary column of LOT
        here = order.take(pa.array(places))
        at = starts[here.column("piece").to_numpy()] + here.column("index").to_numpy()
        spilled = rows.take(pa.array(at)).combine_chunks()
        _check_lot(lot, spilled)
        n = len(places)
        tags = (np.int64(range_) << 32) | places
        ids = attempt_ids(context, tags, int(str(lot["attempt_no"])), int(str(lot["round"])), try_)
        tenant = lot["tenant"]
        columns: dict[str, pa.Array] = {
            "tag": pa.array(tags),
            "attempt_id": ids,
            "input_tokens": _array(spilled, "input_tokens"),
            "max_tokens": _array(spilled, "max_tokens"),
            "sampling": _array(spilled, "sampling"),
            "cache_salt": _constant(cache_salt(context, None if tenant is None else str(tenant)), n),
        }
        full = self._rendered(spilled) if wants & {"messages", "prompt"} else None
        if "tokens" in wants:
            columns["tokens"] = token_lists(_array(spilled, "key"), int(_array(spilled, "key_width")[0].as_py()))
        if "messages" in wants and full is not None:
            columns["messages"] = messages_json(full, context.render)
        if "prompt" in wants and full is not None:
            columns["prompt"] = prompt_text(full, context.render)
        if "prefix_id" in wants:
            parts = (str(lot["model"]), None if tenant is None else str(tenant))
            columns["prefix_id"] = prefix_ids(_array(spilled, self._key_name), context.seed, parts)
        block = context.models[str(lot["model"])].cache_block
        lengths = columns["input_tokens"].to_numpy().astype(np.int64)
        reusable = cacheable_tokens(shared_with_previous(order, places), lengths, block)
        if ideal:
            columns["ideal_cached_tokens"] = pa.array(reusable.astype(np.int32))
        # The run's ideal also has what the first one shares with the lot before, whoever served that.
        best = reusable.copy()
        if int(places[0]) == lot["start"]:
            best[0] = max(int(best[0]), int(str(lot["warm_tokens"])))
        attempt_no = int(str(lot["attempt_no"]))
        info = pa.RecordBatch.from_pydict(
            {
                "tag": columns["tag"],
                "key": here.column("key").combine_chunks(),
                "attempt_id": ids,
                "request_id": _array(spilled, "request_id"),
                "lot_id": _constant(str(lot["lot_id"]), n),
                "round": pa.array(np.full(n, int(str(lot["round"])), np.int16)),
                "attempt_no": pa.array(np.full(n, attempt_no, np.int16)),
                "kind": _constant(str(lot.get("kind") or ("primary" if attempt_no == 1 else "retry")), n),
                "input_tokens": columns["input_tokens"],
                "tokens_exact": _array(spilled, "tokens_exact"),
                "sampling": columns["sampling"],
                "max_tokens": columns["max_tokens"],
                "n": _array(spilled, "n").cast(pa.int16()),
                "ideal_cached_tokens": pa.array(best.astype(np.int32)),
            }
        )
        # An engine that outlives this process keeps the books of what it sent itself.
        columns |= {name: info.column(name) for name in info.schema.names if name in wants - columns.keys()}
        requests = pa.RecordBatch.from_arrays(
            [
                a.cast(REQUEST_FIELDS[k]) if k in REQUEST_FIELDS and a.type != REQUEST_FIELDS[k] else a
                for k, a in columns.items()
            ],
            names=list(columns),
        )
        return LotRequests(str(lot["lot_id"]), requests, info)

    def _range(self, range_: int, wants: frozenset[str]) -> tuple[pa.Table, pa.Table, npt.NDArray[np.int64]]:
        key = (range_, wants)
        if key not in self._ranges:
            while len(self._ranges) >= _KEPT_RANGES:
                del self._ranges[next(iter(self._ranges))]
            columns = self._columns(wants)
            rows = read_range(self._context, self._spills, range_, columns).combine_chunks()
            rows = rows.rename_columns([name.removeprefix("bidbeam:") for name in rows.column_names])
            self._ranges[key] = (read_order(self._context, range_), rows, piece_starts(self._spills, range_))
        return self._ranges[key]

    def _columns(self, wants: frozenset[str]) -> list[int] | None:
        if wants & {"messages", "prompt"}:
            return None
        names = ["request_id", "sampling", "input_tokens", "max_tokens", "n", "tokens_exact", *_BINDING]
        if "tokens" in wants:
            names += ["key", "key_width"]
        elif "prefix_id" in wants:
            names.append("key")
        return sorted(self._layout.index(name) for name in names)

    def _rendered(self, spilled: pa.Table) -> pa.Table:
        """Input columns under their own names, ours behind them, as rendering reads them."""
        inputs = self._layout.input_table(spilled)
        ours = spilled.select(range(len(self._context.input_schema), spilled.num_columns))
        # The input's fields say which of its texts are JSON.
        return pa.Table.from_arrays([*inputs.columns, *ours.columns], schema=pa.schema([*inputs.schema, *ours.schema]))


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.array([], column.type) if column.num_chunks == 0 else pc.take(column, pa.array(range(len(column))))
