"""A breaker: a pool whose answers mostly fail is left alone for a while, then asked one request at a time.

Closed it lets everything through. Where more than half of the recent outcomes are the pool's own failures, or all of
the first few, it opens, and nothing is sent. After a while one request, the probe, may go: if it is answered the
breaker closes, if it fails it stays open twice as long. What the caller got wrong, what a policy forbade and what came
too fast says nothing here: it would be no different if the pool were well.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

COUNTED = frozenset({"server", "timeout", "bad_output", "capacity"})
"""Classes of error that speak against the pool."""

FIRST_OPEN_S = 0.5
LONGEST_OPEN_S = 60.0
_RECENT = 50
_RECENT_S = 60.0
_LEAST = 5
"""Failures in a row, and nothing before them, that say enough."""
_ENOUGH = 20
"""Outcomes that there must be before their ratio means anything: a pool that fails three in ten would often open at
fewer."""
_PROBES = 6
"""Probes that may fail in a row before the pool counts as down."""

UNLIMITED = sys.maxsize


class Breaker:
    """The breaker of one pool and model. Seconds of ``clock``. Not thread-safe.

    It judges the last 50 outcomes of the last minute. The time for which it opens doubles with each failed probe and
    with each opening that follows an unproven recovery, up to a minute; there is no jitter, because one shift alone
    asks. Requests under way when it opens are judged no more.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, first_s: float | None = None) -> None:
        self._clock = clock
        self._first_s = FIRST_OPEN_S if first_s is None else first_s
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=_RECENT)
        self._until: float | None = None
        self._in_a_row = 0
        self._probe: int | None = None
        self.failed_probes = 0
        """In a row."""
        self.openings = 0
        """How often it has opened, failed probes included."""

    @property
    def closed(self) -> bool:
        """Whether everything may go."""
        return self._until is None

    @property
    def allowance(self) -> int:
        """How many requests may be sent now: UNLIMITED, one probe, or 0."""
        if self._until is None:
            return UNLIMITED
        return 1 if self._probe is None and self._clock() >= self._until else 0

    @property
    def pause_s(self) -> float:
        """Seconds until a probe may go; 0 where one may, or all."""
        return 0.0 if self._until is None else max(0.0, self._until - self._clock())

    @property
    def probe(self) -> int | None:
        """The tag of the probe that is under way; None where there is none."""
        return self._probe

    @property
    def gave_up(self) -> bool:
        """Whether so many probes in a row failed that the pool counts as down."""
        return self.failed_probes >= _PROBES

    def sent(self, tag: int) -> None:
        """A request went out; where the breaker is not closed it is the probe."""
        if self._until is not None:
            self._probe = tag

    def note(self, answered: int, failed: int) -> None:
        """So many requests were answered, and so many failed by a class of COUNTED."""
        if self._until is not None:
            return
        now = self._clock()
        # Which of them came first is not known; the failures last, so that a window of failures is seen as one.
        self._outcomes.extend([(now, True)] * min(answered, _RECENT))
        self._outcomes.extend([(now, False)] * min(failed, _RECENT))
        self._judge(now)

    def spoil(self, number: int) -> None:
        """So many answers that were noted turned out to be unusable."""
        if self._until is not None:
            return
        for at in range(len(self._outcomes) - 1, -1, -1):
            if number and self._outcomes[at][1]:
                self._outcomes[at] = (self._outcomes[at][0], False)
                number -= 1
        self._judge(self._clock())

    def probed(self, answered: bool | None) -> None:
        """The probe ended: well, badly, or (None) in a way that says nothing of the pool, so that another may go."""
        if self._probe is None:
            return
        self._probe = None
        if answered is None:
            return
        if answered:
            self._until, self.failed_probes = None, 0
        else:
            self.failed_probes += 1
            self._open(self._clock())

    def _judge(self, now: float) -> None:
        while self._outcomes and now - self._outcomes[0][0] > _RECENT_S:
            self._outcomes.popleft()
        failed, known = sum(not answered for _, answered in self._outcomes), len(self._outcomes)
        if (known >= _LEAST and failed == known) or (known >= _ENOUGH and 2 * failed > known):
            self._open(now)
        elif known >= _ENOUGH:
            self._in_a_row = 0

    def _open(self, now: float) -> None:
        self._until = now + min(self._first_s * 2.0 ** min(self._in_a_row, 32), LONGEST_OPEN_S)
        self._in_a_row += 1
        self.openings += 1
        self._outcomes.clear()
