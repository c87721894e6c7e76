"""Progress of a run, shown where people look: nowhere, as plain log lines, or live on a terminal.

The driver feeds snapshots about once a second; each reporter decides what is worth showing. All of it goes to stderr,
and nothing but a terminal ever gets a control character.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from bidbeam.connectors.errors import BidbeamError

if TYPE_CHECKING:
    from rich.console import RenderableType

_NOISE = ("apitools not found",)
"""What Beam logs about optional packages that no run of ours uses."""


_RAREST = 60


@dataclass(frozen=True, slots=True)
class PoolProgress:
    """One pool in this start. ``spend`` is USD; ``tokens_per_s`` counts uncached input plus output, None is unknown.

    ``in_flight`` are requests that are at the pool; ``waits`` says what it waits for where nothing moves.
    """

    name: str
    in_flight: int = 0
    settled: int = 0
    failed: int = 0
    tokens_per_s: float | None = None
    spend: Decimal = Decimal(0)
    waits: str | None = None


@dataclass(frozen=True, slots=True)
class ProgressSnapshot:
    """The run at one moment, over all of its starts. ``total`` and ``settled`` None: not counted yet; token counts are
    those of this start, None: nothing reported yet.

    Of ``settled``, ``before`` were there when this start began; ``shared`` get the answer of another, and count as
    settled once all the others are. ``dead`` are the rows that died while the plan was made.
    """

    phase: str
    total: int | None = None
    settled: int | None = 0
    before: int = 0
    shared: int = 0
    dead: int = 0
    spend: Decimal = Decimal(0)
    budget: Decimal | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    ideal_cached_tokens: int | None = None
    output_tokens: int | None = None
    pools: tuple[PoolProgress, ...] = ()

    @property
    def done(self) -> tuple[object, ...]:
        """What the run has come to, without rates and what is under way."""
        return self.phase, self.total, self.settled, self.dead, self.spend, self.cached_tokens, self.output_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Over all pools; None where none of them knows."""
        known = [pool.tokens_per_s for pool in self.pools if pool.tokens_per_s is not None]
        return sum(known) if known else None


class Progress(Protocol):
    """Where a run's driver reports to. Used as a context manager around the run; thread-safe is not required."""

    def update(self, snapshot: ProgressSnapshot) -> None:
        """The run as it is now."""
        ...

    def note(self, message: str) -> None:
        """One line that must be seen, such as a pool that went down."""
        ...

    def close(self) -> None:
        """Leaves the last state standing. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullProgress:
    """Shows nothing."""

    def update(self, snapshot: ProgressSnapshot) -> None:
        """Drops the snapshot."""

    def note(self, message: str) -> None:
        """Drops the message."""

    def close(self) -> None:
        """Has nothing to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LogProgress(NullProgress):
    """A plain line every ``every_s`` seconds while something gets done, and at once when the phase changes.

    While nothing gets done the lines come ever less often, down to one in ``_RAREST`` times as long.
    """

    def __init__(
        self, stream: TextIO | None = None, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._every_s, self._clock = every_s, clock
        self._shown: ProgressSnapshot | None = None
        self._latest: ProgressSnapshot | None = None
        self._shown_at = 0.0
        self._still = 0

    def update(self, snapshot: ProgressSnapshot) -> None:
        """Prints the snapshot when it is due."""
        self._latest = snapshot
        now = self._clock()
        if self._shown is None or snapshot.phase != self._shown.phase:
            self._show(snapshot, now)
            return
        still = self._still if snapshot.done == self._shown.done else 0
        if snapshot != self._shown and now - self._shown_at >= self._every_s * min(2**still, _RAREST):
            self._show(snapshot, now)

    def note(self, message: str) -> None:
        """Prints the message."""
        print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Prints the last snapshot if more was done since the last line."""
        if self._latest is not None and (self._shown is None or self._latest.done != self._shown.done):
            self._show(self._latest, self._clock())

    def _show(self, snapshot: ProgressSnapshot, now: float) -> None:
        print(line_of(snapshot), file=self._stream, flush=True)
        self._still = self._still + 1 if self._shown is not None and snapshot.done == self._shown.done else 0
        self._shown, self._shown_at = snapshot, now


def line_of(snapshot: ProgressSnapshot) -> str:
    """The snapshot as one line of plain text."""
    parts = [snapshot.phase, *_headline(snapshot)]
    parts += [
        f"{pool.name}: {pool.settled:,} done, {pool.in_flight:,} in flight"
        + (f", {pool.failed:,} failed" if pool.failed else "")
        + (f", {pool.waits}" if pool.waits else "")
        for pool in snapshot.pools
    ]
    return " | ".join(parts)


def _headline(snapshot: ProgressSnapshot) -> list[str]:
    parts: list[str] = []
    if snapshot.total is not None and snapshot.settled is not None:
        share = f" ({100 * snapshot.settled // snapshot.total}%)" if snapshot.total else ""
        parts.append(f"{snapshot.settled:,}/{snapshot.total:,} prompts{share}")
    elif snapshot.settled or snapshot.total:
        parts.append(f"{snapshot.settled or snapshot.total:,} prompts")
    if snapshot.before:
        parts.append(f"{snapshot.before:,} settled before this start")
    if snapshot.shared:
        parts.append(f"{snapshot.shared:,} share another's answer")
    if snapshot.dead:
        parts.append(f"{snapshot.dead:,} dead")
    if snapshot.tokens_per_s is not None:
        parts.append(f"{snapshot.tokens_per_s:,.0f} tokens/s")
    if snapshot.spend or snapshot.budget is not None:
        parts.append("spent " + usd(snapshot.spend) + (f" of {usd(snapshot.budget)}" if snapshot.budget else ""))
    if snapshot.cached_tokens is not None and snapshot.input_tokens:
        hits = f"cache {_share(snapshot.cached_tokens, snapshot.input_tokens)}"
        if snapshot.ideal_cached_tokens is not None:
            # Caches may be warm from before, and endpoints count otherwise than we do.
            beyond = snapshot.cached_tokens > snapshot.ideal_cached_tokens
            ideal = _share(snapshot.ideal_cached_tokens, snapshot.input_tokens)
            hits += f", above the ideal {ideal}" if beyond else f", ideal {ideal}"
        parts.append(hits)
    return parts


def usd(amount: Decimal) -> str:
    """Dollars for people: cents, or as many places as a small amount needs to show two digits."""
    if amount == 0:
        return "$0.00"
    places = max(2, 1 - amount.adjusted())
    text = f"{amount:,.{min(places, 18)}f}"
    return f"-${text[1:]}" if text.startswith("-") else f"${text}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


class RichProgress(NullProgress):
    """A live panel on a terminal: the run's bar and headline, and a row per pool."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=sys.stderr if stream is None else stream)
        self._live: Any = Live(console=self._console, auto_refresh=False, transient=False)
        self._started = False

    def update(self, snapshot: ProgressSnapshot) -> None:
        """Redraws the panel."""
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(_panel(snapshot), refresh=True)

    def note(self, message: str) -> None:
        """Prints the message above the panel."""
        self._console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last panel on the screen."""
        if self._started:
            self._live.stop()
            self._started = False


def _panel(snapshot: ProgressSnapshot) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text("  ".join((snapshot.phase, *_headline(snapshot))))]
    if snapshot.total:
        line = Table.grid()  # a bar alone does not end its line
        line.add_row(ProgressBar(total=snapshot.total, completed=min(snapshot.settled or 0, snapshot.total), width=60))
        parts.append(line)
    if snapshot.pools:
        table = Table(box=None, pad_edge=False)
        table.add_column("pool")
        for heading in ("done", "in flight", "failed", "tokens/s", "spent"):
            table.add_column(heading, justify="right")
        if any(pool.waits for pool in snapshot.pools):
            table.add_column("")
        for pool in snapshot.pools:
            rate = "" if pool.tokens_per_s is None else f"{pool.tokens_per_s:,.0f}"
            cells = [f"{pool.settled:,}", f"{pool.in_flight:,}", f"{pool.failed:,}", rate, usd(pool.spend)]
            table.add_row(Text(pool.name), *cells, *([Text(pool.waits)] if pool.waits else ()))
        parts.append(table)
    return Group(*parts)


class _NoteHandler(logging.Handler):
    """Log records as notes, with whatever has the shape of a key masked."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        from bidbeam.connectors.secrets import mask

        try:
            self._progress.note(mask(f"{record.levelname.lower()}: {record.getMessage()}"))
        except Exception:
            self.handleError(record)


def _is_told_anyway(record: logging.LogRecord) -> bool:
    """Whether a record is Beam's, of an error of ours that ended a stage: the command says it in its own words."""
    if not record.name.startswith("apache_beam"):
        return False
    error = record.exc_info[1] if record.exc_info else None
    while error is not None:
        if isinstance(error, BidbeamError):
            return True
        error = error.__cause__ or error.__context__
    return "bidbeam.connectors.errors." in str(record.msg)


@contextmanager
def logs_noted(progress: Progress) -> Iterator[None]:
    """Shows libraries' warnings and errors through the progress, so that they do not tear a live panel."""
    root, handler = logging.getLogger(), _NoteHandler(progress)
    handler.addFilter(lambda record: not str(record.msg).startswith(_NOISE) and not _is_told_anyway(record))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def for_stream(stream: TextIO | None = None) -> Progress:
    """A live panel where the stream is a terminal, plain lines where it is not."""
    out = sys.stderr if stream is None else stream
    return RichProgress(out) if out.isatty() else LogProgress(out)
