"""Machines by the hour: what a marketplace offers, as its feed tells it, and which of its offers prices a pool."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal

from bidbeam.connectors.price_feeds import money_of

COMMUNITY = "community_cloud"
"""The ``security`` of machines that anybody may have put up."""
_DEAREST_HOUR = Decimal(100_000)
_NAME = re.compile(r"[ -~]{1,128}")
_PLACES = Decimal("1e-12")
_WIDE = Context(prec=100)


@dataclass(frozen=True, slots=True)
class Offer:
    """One kind of machine. ``price_per_hour`` is USD for all its GPUs together; ``available`` None: not said."""

    name: str
    gpu_type: str
    gpu_count: int
    price_per_hour: Decimal
    available: int | None
    type: str = ""
    country: str | None = None
    """Where it stands, ISO 3166-1 alpha-2; None: not said."""
    security: str | None = None
    """Whose it is: ``secure_cloud`` or ``community_cloud``; None: not said."""
    provider: str | None = None

    @property
    def free(self) -> bool:
        return self.available is None or self.available > 0

    @property
    def told(self) -> str:
        """What there is to know of it, for the source of a price."""
        return " ".join(part for part in (self.name, self.provider, self.country, self.security) if part)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a pool says of its machines: only an offer that is no other prices it.

    ``countries`` None: wherever it stands. ``vetted``: not one of the community's. What an offer does not say does not
    fit a pool that says it.
    """

    machine: str
    """An offer's name, or an accelerator."""
    gpus: int = 1
    countries: frozenset[str] | None = None
    vetted: bool = False

    def fits(self, offer: Offer) -> bool:
        """Whether the offer stands where the pool is said to, and is of whom."""
        if self.countries is not None and offer.country not in self.countries:
            return False
        return not self.vetted or offer.security not in (None, COMMUNITY)


def cheapest(offers: Iterable[Offer], wanted: Wanted) -> tuple[Decimal, Offer] | str:
    """USD for an hour, and the offer that it is of: the whole machine where it is named, else ``gpus`` of those
    accelerators where one costs least. Why there is none, where there is none.
    """
    offers = list(offers)
    name = wanted.machine.casefold()
    named = [each for each in offers if each.name.casefold() == name]
    like = named or [each for each in offers if each.gpu_type.casefold() == name]
    fitting = [each for each in like if wanted.fits(each)]
    free = [each for each in fitting if each.free]
    if free:
        priced = [(each.price_per_hour if named else _share(each, wanted.gpus), each) for each in free]
        return min(priced, key=lambda found: (found[0], found[1].name))
    if fitting:
        return "all are taken"
    if like:
        places = ", ".join(
            sorted({f"{each.country or 'a country not told'} {each.security or ''}".strip() for each in like})
        )
        return f"those that it has are not where or of whom the pool declares: {places[:200]}"
    return f"it has {', '.join(sorted({each.name for each in offers})[:10]) or 'nothing'}"


def _share(offer: Offer, gpus: int) -> Decimal:
    share = _WIDE.divide(_WIDE.multiply(offer.price_per_hour, Decimal(gpus)), Decimal(max(offer.gpu_count, 1)))
    return share.quantize(_PLACES, ROUND_HALF_EVEN, _WIDE)


def name_of(value: object) -> str | None:
    """A feed's name for something; None where it is none that prints."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def hour_price(value: object) -> Decimal | None:
    """A price above 0: a machine that costs nothing is a gap in the feed, not an offer."""
    price = money_of(value)
    return price if price is not None and 0 < price < _DEAREST_HOUR else None
