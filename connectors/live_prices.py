"""Live prices: which feed tells a pool's price, by the token or by the hour, and what it tells now."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.fetch import FeedError
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.price_feeds import DEAREST_HOUR_USD, Quoted, feed_names, fetch_prices, has_feed

if TYPE_CHECKING:
    from bidbeam.connectors.machines import Offer, Wanted

HOUR_FEEDS = ("targon", "prime")
"""Feeds of machines by the hour, for pools that are paid so; ``price_feeds`` has those of tokens."""
AWS = "aws"
"""AWS's price list, for a SageMaker endpoint: an instance's hour, which measured throughput makes a token's price."""


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
) -> Quoted:
    """Prices per single token or request in ``currency``, and where they are from. Raises FeedError."""
    return fetch_prices(spec, feed=feed, url=url, served_by=served_by, currency=currency)


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


def live_hour(feed: str, wanted: Wanted, *, url: str | None) -> tuple[Decimal, str]:
    """USD for an hour of a machine that a feed (of HOUR_FEEDS) offers now, and where that is from. Raises FeedError."""
    from bidbeam.connectors.fetch import bare, checked_host
    from bidbeam.connectors.machines import cheapest

    name, own, read = _hour_feed(feed, url)
    base = url or own
    checked_host(base)
    try:
        found = cheapest(read(base), wanted)
    except PoolDown as error:
        raise FeedError(str(error)) from None
    if isinstance(found, str):
        raise FeedError(f"{name} offers no {wanted.machine!r} now; {found}")
    hour, offer = found
    if hour > DEAREST_HOUR_USD:
        raise FeedError(f"an hour of {wanted.machine!r} comes to {hour.normalize():f} USD, which cannot be")
    return hour, f"{feed} {offer.told} {bare(base)}"


def _hour_feed(feed: str, url: str | None) -> tuple[str, str, Callable[[str], list[Offer]]]:
    """A feed's name, its own address, and how it is read."""
    if feed == "targon":
        from bidbeam.connectors import targon

        return "Targon", targon.TARGON_URL, targon.targon_offers
    from bidbeam.connectors import prime_gpus

    key = prime_gpus.prime_key() if url is None else None
    return "Prime Intellect", prime_gpus.PRIME_URL, lambda base: prime_gpus.prime_offers(base, key)
