"""What a lane has handed to its engine and not settled yet."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors.money import sum_decimal

Tags = np.ndarray[Any, np.dtype[np.int64]]

_SENT_S = "sent_s"
"""The lane's clock when a request was handed to the engine, beside what settling asks of it."""
WORST = "worst"
"""A request's worst case (COST), beside what settling asks of it, where the lane draws on a purse."""


class Outstanding:
    """Batches of requests as ``settling.settle`` asks for them. Falsy where there is none."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []

    def __bool__(self) -> bool:
        return bool(self._batches)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return iter(self._batches)

    def add(self, info: pa.RecordBatch, sent_s: float, worst: pa.Array | None) -> None:
        """These were handed over at this time of the lane's clock; ``worst`` (COST) where each was paid for."""
        info = info.append_column(_SENT_S, pa.repeat(pa.scalar(sent_s), info.num_rows))
        self._batches.append(info if worst is None else info.append_column(WORST, worst))

    @property
    def tags(self) -> Tags:
        """Of all of them."""
        found: Tags = np.concatenate([batch.column("tag").to_numpy() for batch in self._batches])
        return found

    @property
    def worst(self) -> Decimal:
        """USD that all of them may cost, where they were paid for."""
        return sum((sum_decimal(batch.column(WORST)) for batch in self._batches), Decimal(0))

    def sent_before(self, time_s: float) -> list[tuple[str, int, int]]:
        """(lot, attempt number, tag) of what was handed over before that time of the lane's clock."""
        late = [batch.filter(pc.less(batch.column(_SENT_S), time_s)) for batch in self._batches]
        return [
            (str(lot_id), number, tag)
            for batch in late
            for lot_id, number, tag in zip(
                *(batch.column(name).to_pylist() for name in ("lot_id", "attempt_no", "tag")), strict=True
            )
        ]

    def take(self, wanted: Tags) -> pa.RecordBatch:
        """Those with these tags, in their order; they are outstanding no more."""
        sent = self.take_all()
        tags = sent.column("tag").to_numpy()
        by_tag = np.argsort(tags, kind="stable")
        found = by_tag[np.searchsorted(tags, wanted, sorter=by_tag)]
        if len(found) < len(tags):
            rest = np.ones(len(tags), bool)
            rest[found] = False
            self._batches = [sent.filter(pa.array(rest))]
        return sent if np.array_equal(found, np.arange(len(tags))) else sent.take(pa.array(found))

    def take_all(self) -> pa.RecordBatch:
        """All of them, in the order they were handed over."""
        sent = pa.Table.from_batches(self._batches).unify_dictionaries().combine_chunks().to_batches()[0]
        self._batches = []
        return sent
