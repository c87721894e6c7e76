"""How many requests an endpoint is asked at once: fewer when it pushes back, more again as it answers (AIMD)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Aimd:
    """A window of at most ``ceiling`` requests. It opens full: the ceiling is what the pools file says the pool takes.

    Pushed back (too fast, or no room), it halves; answered, it grows by one for every window of answers. What was
    already under way when it halved says nothing about the smaller window, and does not halve it again. After a
    push-back nothing is begun for as long as the endpoint asks, or, where it does not say, for ``first_pause_s``, twice
    as long each time in a row, up to a minute. Seconds of ``clock``. Not thread-safe.
    """

    def __init__(self, ceiling: int, clock: Callable[[], float], *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._ceiling, self._clock, self._first_pause_s = ceiling, clock, first_pause_s
        self._window = float(ceiling)
        self._cuts = 0
        self._in_a_row = 0
        self._until = 0.0

    @property
    def limit(self) -> int:
        """How many requests may be under way; at least one."""
        return int(self._window)

    @property
    def pause_s(self) -> float:
        """Seconds until the next request may begin; 0 where it may now."""
        return max(0.0, self._until - self._clock())

    def begin(self) -> int:
        """A request begins; the number goes back with how it ended."""
        return self._cuts

    def answered(self, begun: int) -> None:
        """A request was answered, well or badly, by an endpoint that had room for it."""
        self._window = min(float(self._ceiling), self._window + 1 / self._window)
        if begun == self._cuts:
            self._in_a_row = 0

    def pushed_back(self, begun: int, wait_s: float | None = None) -> None:
        """A request was refused for want of room, or for coming too fast. ``wait_s``: what the endpoint asks for."""
        if begun == self._cuts:
            self._window = max(1.0, self._window / 2)
            self._cuts += 1
            self._in_a_row += 1
            if wait_s is None:
                wait_s = self._first_pause_s * 2.0 ** min(self._in_a_row - 1, 10)
        if wait_s is not None:
            self.wait(wait_s)

    def wait(self, seconds: float) -> None:
        """The endpoint asks for nothing to be sent for so long; at most a minute is heeded."""
        self._until = max(self._until, self._clock() + min(seconds, LONGEST_PAUSE_S))


class Stuck:
    """When a request has been under way for so long that it says nothing of how much an endpoint takes at once.

    That is after ten times what 95 % of the last 200 answers took, and not before ``least_s`` seconds. Without that an
    endpoint that never answers some of its requests would in the end be asked nothing more. Not thread-safe.
    """

    def __init__(self, least_s: float = 10.0) -> None:
        self._least_s = least_s
        self._took_s: deque[float] = deque(maxlen=200)
        self._after_s: float | None = None

    def took(self, seconds: float) -> None:
        """A request was answered after so long."""
        self._took_s.append(seconds)
        if len(self._took_s) >= _ENOUGH and len(self._took_s) % _ENOUGH == 0:
            usual_s = sorted(self._took_s)[int(0.95 * (len(self._took_s) - 1))]
            self._after_s = max(10 * usual_s, self._least_s)

    @property
    def after_s(self) -> float | None:
        """Seconds; None while fewer than 20 answers are known."""
        return self._after_s


_ENOUGH = 20
