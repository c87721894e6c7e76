"""Live prices: which feed tells a pool's price, by the token or by the hour, and what it tells now."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.fetch import FeedError
from bidbeam.connectors.pools import Meter, PoolSpec
from bidbeam.connectors.price_feeds import feed_names, fetch_prices, has_feed

HOUR_FEEDS = ("targon",)
"""Feeds of machines by the hour, for pools that are paid so; ``price_feeds`` has those of tokens."""
AWS = "aws"
"""AWS's price list, for a SageMaker endpoint: an instance's hour, which measured throughput makes a token's price."""
DEAREST_HOUR_USD = Decimal(1000)
"""An accelerator's hour dearer than this is a price in another unit."""

_WIDE = Context(prec=100)


def feeds_for(*, by_hour: bool) -> tuple[str, ...]:
    """The feeds that a pool may name: a pool that is paid by the hour those of hours."""
    return HOUR_FEEDS if by_hour else (*feed_names(), AWS)


def has_live_price(profile: str | None, *, by_hour: bool) -> bool:
    """Whether a pool of this profile has a feed without naming one."""
    return profile in HOUR_FEEDS if by_hour else of_aws(profile, None) or has_feed(profile)


def of_aws(profile: str | None, feed: str | None) -> bool:
    """Whether a remote pool's live price is that of an instance's hour at AWS."""
    return feed == AWS if feed is not None else (profile or "").startswith("sagemaker")


def live_token_prices(
    spec: PoolSpec, *, feed: str | None, url: str | None, served_by: str | None, currency: str
) -> tuple[Mapping[Meter, Decimal], str]:
    """Prices per single token or request in ``currency``, and where they are from. Raises FeedError."""
    quoted = fetch_prices(spec, feed=feed, url=url, served_by=served_by, currency=currency)
    return quoted.unit_prices, quoted.source


def live_instance_hour(spec: PoolSpec, instance: str, *, url: str | None) -> tuple[Decimal, str]:
    """USD for an hour of the instance behind a SageMaker endpoint, and where that is from. Raises FeedError."""
    from bidbeam.connectors.aws_prices import instance_hour

    region, aws_profile = spec.options.get("region"), spec.options.get("aws_profile")
    if not region:
        raise FeedError("AWS's price list goes by region; give the pool's options.region")
    hour, told = instance_hour(
        instance, str(region), url=url, aws_profile=None if not aws_profile else str(aws_profile)
    )
    if hour > DEAREST_HOUR_USD:
        raise FeedError(f"an hour of {instance!r} comes to {hour:f} USD, which cannot be")
    return hour, told


def live_hour(machine: str, *, url: str | None, gpus: int = 1) -> tuple[Decimal, str]:
    """USD for an hour of ``gpus`` accelerators of a machine that Targon offers, and where that is from.

    ``machine`` is the offer's name or its accelerator; of several that have it, the cheapest that is free counts.
    Raises FeedError.
    """
    from bidbeam.connectors.fetch import bare, checked_host
    from bidbeam.connectors.targon import TARGON_URL, targon_offers

    base = url or TARGON_URL
    checked_host(base)
    try:
        offers = targon_offers(base)
    except PoolDown as error:
        raise FeedError(str(error)) from None
    named = [each for each in offers if machine.casefold() in (each.name.casefold(), each.gpu_type.casefold())]
    free = [each for each in named if each.available is None or each.available > 0]
    if not free:
        known = ", ".join(sorted({each.name for each in offers})[:10])
        raise FeedError(
            f"Targon offers no {machine!r} now" + ("; all are taken" if named else f"; it has {known or 'nothing'}")
        )
    best = min(free, key=lambda each: (each.price_per_hour / max(each.gpu_count, 1), each.name))
    hour = _WIDE.divide(best.price_per_hour * gpus, Decimal(max(best.gpu_count, 1)))
    hour = hour.quantize(Decimal("1e-12"), ROUND_HALF_EVEN, _WIDE)
    if hour > DEAREST_HOUR_USD:
        raise FeedError(f"an hour of {machine!r} comes to {hour.normalize():f} USD, which cannot be")
    return hour, f"targon {best.name} {bare(base)}"
