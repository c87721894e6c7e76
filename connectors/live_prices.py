"""Live prices: which feed tells a pool's price, by the token or by the hour, and what it tells now."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.fetch import FeedError
from bidbeam.connectors.pools import Meter, PoolSpec
from bidbeam.connectors.price_feeds import feed_names, fetch_prices, has_feed

if TYPE_CHECKING:
    from bidbeam.connectors.targon import Offer

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


def live_hour(machine: str, *, url: str | None, gpus: int) -> tuple[Decimal, str]:
    """USD for an hour of a machine that Targon offers, and where that is from.

    ``machine`` is an offer's name, and then the hour is that of the whole machine; or an accelerator, and then it is
    that of ``gpus`` of them, where one costs least. Only what is free counts. Raises FeedError.
    """
    from bidbeam.connectors.fetch import bare, checked_host
    from bidbeam.connectors.targon import TARGON_URL, targon_offers

    base = url or TARGON_URL
    checked_host(base)
    try:
        offers = targon_offers(base)
    except PoolDown as error:
        raise FeedError(str(error)) from None
    wanted = machine.casefold()
    named = [each for each in offers if each.name.casefold() == wanted]
    like = named or [each for each in offers if each.gpu_type.casefold() == wanted]
    free = [each for each in like if each.available is None or each.available > 0]
    if not free:
        known = ", ".join(sorted({each.name for each in offers})[:10])
        raise FeedError(
            f"Targon offers no {machine!r} now" + ("; all are taken" if like else f"; it has {known or 'nothing'}")
        )

    def hour_of(offer: Offer) -> Decimal:
        if named:
            return offer.price_per_hour
        share = _WIDE.divide(_WIDE.multiply(offer.price_per_hour, Decimal(gpus)), Decimal(max(offer.gpu_count, 1)))
        return share.quantize(Decimal("1e-12"), ROUND_HALF_EVEN, _WIDE)

    best = min(free, key=lambda each: (hour_of(each), each.name))
    hour = hour_of(best)
    if hour > DEAREST_HOUR_USD:
        raise FeedError(f"an hour of {machine!r} comes to {hour.normalize():f} USD, which cannot be")
    return hour, f"targon {best.name} {bare(base)}"
