"""The small values of a job's terms: deadline, tolerance, auction, baseline, exchange rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from decimal import Decimal
from typing import Literal
from zoneinfo import ZoneInfo

from bidbeam.connectors.pools import Meter, PriceSchedule

Payment = Literal["pay_as_bid", "second_score", "uniform", "vcg"]
PAYMENTS: tuple[Payment, ...] = ("pay_as_bid", "second_score", "uniform", "vcg")


@dataclass(frozen=True, slots=True)
class Deadline:
    """Either a duration from the start, or a clock time: the next such time in the job's time zone."""

    text: str
    duration: timedelta | None = None
    clock: time | None = None

    def at(self, started_at: datetime, timezone: str) -> datetime:
        """The moment, in the zone of ``started_at`` (which must be aware). A clock time lies after the start."""
        if self.duration is not None:
            return started_at + self.duration
        assert self.clock is not None  # noqa: S101 - one of the two is always set
        zone = ZoneInfo(timezone)
        day = started_at.astimezone(zone).date()
        while True:
            moment = datetime.combine(day, self.clock, zone).astimezone(started_at.tzinfo)
            if moment > started_at:
                return moment
            day += timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How many dead letters still count as done: a count, or a percentage of the requests."""

    count: int | None = 0
    percent: Decimal | None = None

    def allows(self, dead: int, requests: int) -> bool:
        """Whether so many dead letters of so many requests are still done."""
        if self.percent is not None:
            return Decimal(dead) * 100 <= self.percent * requests
        return dead <= (self.count or 0)


@dataclass(frozen=True, slots=True)
class AuctionSpec:
    """How lots are cleared."""

    payment: Payment = "pay_as_bid"
    rounds: int = 3
    hedging: bool = True
    """Whether the last stragglers are asked of a second pool."""
    patience: timedelta = timedelta(minutes=10)
    """How long pools that have answered are waited for once none does."""


@dataclass(frozen=True, slots=True)
class BaselineSpec:
    """A price that savings are counted against: USD per single token or request, at most 15 places."""

    name: str
    unit_prices: Mapping[Meter, Decimal]
    source: str = "job file"
    valid_from: datetime | None = None
    model: str | None = None
    """The job's model that this is a price of; None: of every model. One baseline may have a price for each."""


@dataclass(frozen=True, slots=True)
class FxRate:
    """USD per unit of ``currency``, as of ``at``; older than ``max_age`` (None: no limit) it is stale."""

    currency: str
    rate: Decimal
    at: datetime
    source: str
    max_age: timedelta | None = None

    def stale(self, now: datetime) -> bool:
        """Whether the rate is too old to charge with."""
        return self.max_age is not None and now - self.at > self.max_age


@dataclass(frozen=True, slots=True)
class FxSource:
    """Where a currency's rate is fetched when a run starts: the first of ``feeds`` that tells one."""

    currency: str
    feeds: tuple[str, ...]
    """Of ``connectors.fx_feeds.FEEDS``, or ``file``."""
    max_age: timedelta
    symbol: str | None = None
    url: str | None = None
    path: str | None = None


PriceSourceKind = Literal["live", "list", "file", "dated"]


@dataclass(frozen=True, slots=True)
class PriceSource:
    """Where a pool's price is looked up when a run starts: a provider's feed, a published list, a file of dated prices,
    or several dated prices that stand in the pools file itself.
    """

    kind: PriceSourceKind
    currency: str = "USD"
    feed: str | None = None
    """live: the profile whose feed it is, where that is not the pool's own."""
    url: str | None = None
    served_by: str | None = None
    machine: str | None = None
    """live, by the hour: which of the machines that are offered."""
    provider: str | None = None
    """list: whose list."""
    model: str | None = None
    """list: the model's name there, where it is not the pool's."""
    path: str | None = None
    by_hour: bool = False
    tokens_per_second: Decimal | None = None
    """What the pool serves in a second, where an hour's price has to become a token's."""
    dated: tuple[PriceSchedule, ...] = ()
    fallback: PriceSchedule | None = None
    """What counts where the source does not answer."""
    expected: Mapping[Meter, Decimal] | None = None
    """What the prices are about; a source that is far off is not believed."""
