"""ReadPrompts: what of the input one worker reads at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PBegin, PCollection

from bidbeam.connectors.inputs import Split


class ReadPrompts(beam.PTransform[Any, Any]):
    """The splits of the input as a PCollection of ``Split``: references, spread over the workers; no row is read yet.

    Errors of the input itself (missing, unreadable, wrong columns) are found when the run is begun, before the graph.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        super().__init__()
        self._splits = tuple(splits)

    def expand(self, pbegin: PBegin) -> PCollection[Any]:
        splits: PCollection[Any] = (
            pbegin | "List splits" >> beam.Create(self._splits, reshuffle=False) | "Spread splits" >> beam.Reshuffle()
        )
        return splits
