"""Accelerator time: measured in disjoint segments of milliseconds, shared among attempts to the last one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_INT64_LIMIT = 1 << 63


def share_milliseconds(total_ms: int, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Shares ``total_ms`` among ``weights`` (tokens that each attempt computed; int64[n]), as int64[n].

    Cumulative rounding: share i is the difference of two neighbours of floor(total x weights so far / all weights), so
    that the shares always sum to ``total_ms`` exactly and each is within one millisecond of its due. Where every
    weight is 0 the split is equal. Raises ValueError for anything negative, and for time that no attempt bears.
    """
    if total_ms < 0 or (len(weights) and int(weights.min()) < 0):
        raise ValueError("neither milliseconds nor computed tokens can be negative")
    if len(weights) == 0:
        if total_ms:
            raise ValueError("no attempt bears this time; book it with overhead_row instead")
        return np.zeros(0, np.int64)
    if not weights.any():
        weights = np.ones(len(weights), np.int64)
    if int(weights.max()) * len(weights) * max(total_ms, 1) < _INT64_LIMIT:
        so_far = np.cumsum(weights, dtype=np.int64)
        bounds = so_far * total_ms // so_far[-1]
    else:
        # Beyond int64, in Python's integers; tokens and milliseconds of one segment do not reach here.
        exact = np.cumsum(weights.astype(object))
        bounds = (exact * total_ms // exact[-1]).astype(np.int64)
    return np.diff(bounds, prepend=np.int64(0))


class AcceleratorMeter:
    """One engine's time since ``started_ms``, told apart by whether anything was in flight.

    The engine's owner calls ``busy`` when the first request goes in and ``idle`` when the last result comes out, as
    often as it likes, and ``close`` when a segment of the journal is written. Segments are disjoint and leave nothing
    out: over all of them busy + idle is the time from ``started_ms`` to the last ``close``. A clock that steps back
    stands still until it has caught up. ``now_ms`` defaults to the clock.

    ``setup_ms`` is what loading the engine took, before ``started_ms``; :meth:`take_setup` hands it out once.
    """

    def __init__(self, clock_ms: Callable[[], int], started_ms: int, *, setup_ms: int = 0) -> None:
        self._clock_ms = clock_ms
        self._until_ms = started_ms
        self._in_use = False
        self._busy_ms = 0
        self._idle_ms = 0
        self.setup_ms = setup_ms

    def busy(self, now_ms: int | None = None) -> None:
        """From now on something is in flight."""
        self._advance(now_ms)
        self._in_use = True

    def idle(self, now_ms: int | None = None) -> None:
        """From now on nothing is in flight."""
        self._advance(now_ms)
        self._in_use = False

    def close(self, now_ms: int | None = None) -> tuple[int, int]:
        """(busy, idle) milliseconds since the last close; the next segment begins now, in the same state."""
        self._advance(now_ms)
        closed = self._busy_ms, self._idle_ms
        self._busy_ms = self._idle_ms = 0
        return closed

    @property
    def open_ms(self) -> int:
        """Milliseconds since the last close, busy and idle."""
        return self._busy_ms + self._idle_ms + max(self._clock_ms() - self._until_ms, 0)

    def take_setup(self) -> int:
        """The milliseconds of setup that nobody was charged for yet."""
        taken, self.setup_ms = self.setup_ms, 0
        return taken

    def _advance(self, now_ms: int | None) -> None:
        now = self._clock_ms() if now_ms is None else now_ms
        elapsed = max(now - self._until_ms, 0)
        if self._in_use:
            self._busy_ms += elapsed
        else:
            self._idle_ms += elapsed
        self._until_ms += elapsed
