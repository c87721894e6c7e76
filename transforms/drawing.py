"""What a lane asks of the purse that its requests are paid from, before they are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

if TYPE_CHECKING:
    from bidbeam.transforms.lane import Lane


class Draws(Protocol):
    """A purse that pays for requests one by one, each at its worst case, and takes back what their bills leave."""

    def worst(self, lane: Lane, lot: dict[str, Any], info: pa.RecordBatch) -> pa.Array:
        """What each of a lot's requests may cost on the lane at most (COST)."""
        ...

    def grant(self, lane: Lane, lot: dict[str, Any], tags: pa.Array, worst: pa.Array) -> int:
        """How many of a lot's next requests are paid for from here on: all of them, or as many as there is money."""
        ...

    def abandon(self, tags: pa.Array, worst: pa.Array) -> None:
        """These were written down as about to be sent, and were not: a crash would book them all the same."""
        ...
