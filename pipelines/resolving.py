"""Resolving: the prices and rates that a job only points at become figures, once, as a run, quote or probe starts.

From then on they stand: awards are made at them, and the ledger keeps them with where and when they were read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from bidbeam.connectors.errors import BidbeamError, ConfigError
from bidbeam.connectors.fetch import FeedError
from bidbeam.connectors.pools import Meter, PoolSpec, PriceSchedule
from bidbeam.pipelines.terms import FxRate, FxSource, PriceSource

if TYPE_CHECKING:
    from bidbeam.connectors.machines import Wanted
    from bidbeam.pipelines.job import Job

_THREADS = 8
_FEED_TIMEOUT_S = 15.0
_log = logging.getLogger("bidbeam.prices")


def resolve(job: Job, now: datetime) -> Job:
    """The job with every price and rate that its pools need. Raises ConfigError at the line of one that is not to be
    had; where the pools file has a ``fallback``, that counts instead, and a warning says so.
    """
    job, problems = resolve_each(job, now)
    for problem in problems.values():
        raise problem
    return job


def resolve_each(job: Job, now: datetime) -> tuple[Job, dict[str, ConfigError]]:
    """As ``resolve``, but a pool that cannot be priced keeps its place, and why not stands under its name."""
    if not job.price_sources and not job.fx_sources:
        return job, {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="prices") as workers:
        wanted = {pool.price.currency for pool in job.pools}
        fetched = {
            currency: workers.submit(_rate, job, source, now)
            for currency, source in job.fx_sources.items()
            if currency in wanted
        }
        outcomes = {currency: future.result() for currency, future in fetched.items()}
        rates = {c: found for c, found in outcomes.items() if isinstance(found, FxRate)}
        job = replace(job, fx={**job.fx, **rates}, fx_sources={})
        priced = list(workers.map(lambda place: _pool(job, place, outcomes, now), range(len(job.pools))))
    problems = {
        pool.name: found for pool, found in zip(job.pools, priced, strict=True) if isinstance(found, ConfigError)
    }
    pools = tuple(
        pool if isinstance(found, ConfigError) else found for pool, found in zip(job.pools, priced, strict=True)
    )
    return replace(job, pools=pools, price_sources={}), problems


def _pool(job: Job, place: int, rates: Mapping[str, FxRate | ConfigError], now: datetime) -> PoolSpec | ConfigError:
    pool = job.pools[place]
    rate = rates.get(pool.price.currency)
    if isinstance(rate, ConfigError):
        return rate
    source = job.price_sources.get(pool.name)
    if source is None:
        return _checked(job, place, pool) if rate is not None else pool
    try:
        priced = _priced(pool, source, job, now)
        check(priced.price, job.fx, source.expected or (source.fallback.unit_prices if source.fallback else None))
    except BidbeamError as error:
        if source.fallback is None:
            expected = "prices that are written down, or such prices under fallback" if source.kind != "dated" else None
            key = f"pools[{place}].price.source" if source.kind != "dated" else f"pools[{place}].price"
            return job.fault(key, str(error), expected=expected)
        _log.warning("pool %s: %s; its fallback price counts", pool.name, error)
        told = f"{source.fallback.source}, for {error}"[:300]
        from bidbeam.pipelines.prices import schedule_of

        fallback = schedule_of(pool.name, source.fallback.unit_prices, source.fallback.currency, told)
        priced = replace(pool, price=fallback)
        return _pinned(priced, source.served_by) if source.served_by is not None else priced
    return priced


def _checked(job: Job, place: int, pool: PoolSpec) -> PoolSpec | ConfigError:
    """A written-down price in a currency whose rate was not known when it was read."""
    try:
        check(pool.price, job.fx, None)
    except FeedError as error:
        return job.fault(f"pools[{place}].price", str(error), expected="a price in the unit that `per` names")
    return pool


def check(price: PriceSchedule, fx: Mapping[str, FxRate], expected: Mapping[Meter, Decimal] | None) -> None:
    """Raises FeedError for a price that cannot be right at this rate of exchange."""
    from bidbeam.connectors.price_feeds import check_plausible

    usd = Decimal(1) if price.currency == "USD" else fx[price.currency].rate
    check_plausible(price.unit_prices, usd, expected)


def _priced(pool: PoolSpec, source: PriceSource, job: Job, now: datetime) -> PoolSpec:
    """The pool at the price that its source tells; where that is one of a router's providers', bound to that one."""
    if source.kind != "live":
        return replace(pool, price=_price(pool, source, job, now))
    price, tag = _live(pool, source, now)
    return _pinned(replace(pool, price=price), tag) if tag is not None else replace(pool, price=price)


def _pinned(pool: PoolSpec, provider: str) -> PoolSpec:
    """The pool, which asks nobody else behind a router than the provider whose price it has."""
    from bidbeam.connectors.profiles import profile

    if "provider" not in profile(pool.profile).options:
        return pool
    named = pool.options.get("provider")
    if named not in (None, provider):
        raise ConfigError(f"the price is that of {provider!r}, and options.provider is {named!r}")
    return replace(pool, options={**pool.options, "provider": provider})


def _price(pool: PoolSpec, source: PriceSource, job: Job, now: datetime) -> PriceSchedule:
    from bidbeam.pipelines.prices import schedule_of

    if source.kind == "dated":
        return valid_at(source.dated, now)
    if source.kind == "file":
        return valid_at(_from_file(pool, source, job), now)
    from bidbeam.connectors.list_prices import list_price

    names = (source.model,) if source.model else tuple(dict.fromkeys((*pool.models.values(), *pool.models)))
    listed = list_price(source.provider or "", names, job.run_date, batch=pool.kind == "batch")
    return schedule_of(pool.name, listed.unit_prices, source.currency, listed.source, valid_from=listed.valid_from)


def _live(pool: PoolSpec, source: PriceSource, now: datetime) -> tuple[PriceSchedule, str | None]:
    """What a feed tells now, and the one of a router's providers that it is of."""
    from bidbeam.connectors.live_prices import live_hour, live_instance_hour, live_token_prices, of_aws
    from bidbeam.pipelines.prices import by_throughput, hour_prices, schedule_of

    if source.by_hour:
        hour, told = live_hour(source.feed or pool.profile or "", _wanted(pool, source), url=source.url)
        return schedule_of(pool.name, hour_prices(hour), source.currency, told, fetched_at=now), None
    if source.tokens_per_second is not None and of_aws(pool.profile, source.feed):
        hour, told = live_instance_hour(pool, source.machine or "", url=source.url)
        told += f": {hour:f} an hour at {source.tokens_per_second.normalize():f} tokens a second"
        served = by_throughput(hour, source.tokens_per_second)
        return schedule_of(pool.name, served, source.currency, told, fetched_at=now), None
    quoted = live_token_prices(
        pool, feed=source.feed, url=source.url, served_by=source.served_by, currency=source.currency
    )
    price = schedule_of(pool.name, quoted.unit_prices, source.currency, quoted.source, fetched_at=now)
    return price, quoted.tag


def _wanted(pool: PoolSpec, source: PriceSource) -> Wanted:
    """The machines that a pool is made of: those where it is said to be, and of whom, as far as that is declared."""
    from bidbeam.connectors.machines import Wanted
    from bidbeam.transforms.placement import countries_of

    gpus = math.prod(_whole(pool.engine.get(f"{how}_parallel_size")) for how in ("tensor", "pipeline"))
    operator = pool.placement.get("operator")
    # Targon's inventory says neither: what it offers is the community's, wherever it stands.
    if (source.feed or pool.profile) == "targon":
        return Wanted(source.machine or "", gpus)
    return Wanted(
        source.machine or "",
        gpus,
        countries_of(pool.placement.get("jurisdiction")),
        vetted=operator not in (None, "community"),
    )


def _whole(value: object) -> int:
    """An engine argument that counts accelerators; absent it is one."""
    return value if isinstance(value, int) and value > 0 else 1


def _from_file(pool: PoolSpec, source: PriceSource, job: Job) -> list[PriceSchedule]:
    """The file's prices of this pool, or of all."""
    from bidbeam.pipelines import fx
    from bidbeam.pipelines.dated_files import rows_of, without
    from bidbeam.pipelines.prices import price_of

    path = source.path or ""
    mine = []
    for row in rows_of(path, "prices"):
        named = row.entries.get("pool")
        if named is None or named.is_null or named.text == pool.name:
            mine.append(
                price_of(
                    without(row, "pool"),
                    pool.name,
                    fx.known(job.fx, job.fx_sources),
                    by_hour=source.by_hour,
                    tokens_per_second=source.tokens_per_second,
                    source=path,
                )
            )
    if not mine:
        raise ConfigError(f"has no price of the pool {pool.name!r}", file=path, expected="a row with its name")
    for price in mine:
        if price.currency != source.currency:
            raise ConfigError(
                f"has prices of {pool.name!r} in {price.currency}, and the pools file says {source.currency}", file=path
            )
    return mine


def valid_at(dated: Iterable[PriceSchedule], now: datetime) -> PriceSchedule:
    """The price that holds now: of those begun and not ended, the one begun last. Raises ConfigError for none."""
    several = list(dated)
    holding = [
        each
        for each in several
        if (each.valid_from is None or each.valid_from <= now) and (each.valid_to is None or now < each.valid_to)
    ]
    if holding:
        return max(holding, key=lambda each: (each.valid_from is not None, each.valid_from or now))
    ends = [each.valid_to for each in several if each.valid_to is not None and each.valid_to <= now]
    begins = [each.valid_from for each in several if each.valid_from is not None and each.valid_from > now]
    told = [f"the last one ended {max(ends):%Y-%m-%d %H:%M} UTC"] if ends else []
    told += [f"the next one begins {min(begins):%Y-%m-%d %H:%M} UTC"] if begins else []
    raise ConfigError("no price holds now: " + ", ".join(told), expected="a price with valid_from and valid_to around")


def _rate(job: Job, source: FxSource, now: datetime) -> FxRate | ConfigError:
    """The first rate that a feed of the currency tells and that is fresh enough."""
    from bidbeam.connectors.fx_feeds import fetch_rate

    why: list[str] = []
    for feed in source.feeds:
        try:
            if feed == "file":
                rate = _rate_from_file(source, now)
            else:
                told = fetch_rate(
                    feed, source.currency, now, symbol=source.symbol, url=source.url, timeout_s=_FEED_TIMEOUT_S
                )
                rate = FxRate(source.currency, told.rate, told.at, told.source, source.max_age)
        except BidbeamError as error:
            why.append(str(error))
            continue
        if not rate.stale(now):
            return rate
        why.append(f"{rate.source}: its rate of {rate.at:%Y-%m-%d %H:%M} UTC is older than {source.max_age}")
    expected = 'a feed that answers, several in order, or {rate: "…", at: …, source: …}'
    return job.fault(f"fx.{source.currency}.source", "; ".join(why), expected=expected)


def _rate_from_file(source: FxSource, now: datetime) -> FxRate:
    from bidbeam.pipelines.config_check import text_of
    from bidbeam.pipelines.dated_files import rows_of, without
    from bidbeam.pipelines.fx import rate_of
    from bidbeam.pipelines.yaml_text import Node

    path = source.path or ""
    rates = []
    for row in rows_of(path, "rates"):
        named = row.entries.get("currency")
        if named is None or text_of(named) == source.currency:
            entries = {"source": Node("scalar", path, row.line, "source", path, "text"), **row.entries}
            rate = rate_of(source.currency, without(replace(row, entries=entries), "currency"))
            rates.append(replace(rate, max_age=source.max_age))
    begun = [each for each in rates if each.at <= now]
    if not begun:
        raise ConfigError(
            f"has no rate of {source.currency} up to now", file=path, expected="a row with its rate and at"
        )
    return max(begun, key=lambda each: each.at)
