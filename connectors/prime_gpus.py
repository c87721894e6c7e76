"""Prime Intellect's availability feed: machines with accelerators of many clouds, what an hour costs, where, and whose.

It asks for a key, and gives a page at a time. Spot machines are left out: they go when somebody pays more, and so does
their price.
"""

from __future__ import annotations

import os
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.json_call import NoAnswer, call_json
from bidbeam.connectors.machines import Offer, hour_price, name_of
from bidbeam.connectors.wire_json import pointer, whole

PRIME_URL = "https://api.primeintellect.ai"
KEY_ENV = "PRIME_API_KEY"
_PATH = "/api/v1/availability/gpus"
_PAGE = 100
_MOST_PAGES = 30
_STOCK = {"available": None, "high": None, "medium": None, "low": None}
"""What is in stock, by the feed's word for it; it does not say how many."""


def prime_key() -> str | None:
    """The key of Prime's usual variable, which goes to Prime's own address and to no other."""
    return (os.environ.get(KEY_ENV) or "").strip() or None


def prime_offers(base_url: str | None = None, key: str | None = None) -> list[Offer]:
    """What the feed offers now, in stock or not. ``base_url`` is scheme and host, Prime's own by default.

    Entries that are not whole (no price in USD, no accelerator) are left out, and so are spot machines. Raises PoolDown
    where the feed does not answer as it should.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    listed: list[Any] = []
    for page in range(1, _MOST_PAGES + 1):
        asked = f"{(base_url or PRIME_URL).rstrip('/')}{_PATH}?{urlencode({'page': page, 'page_size': _PAGE})}"
        try:
            answer = call_json("GET", asked, headers=headers, secrets=(key,) if key else ())
        except NoAnswer as error:
            raise PoolDown(f"Prime's availability: {error}") from None
        found = pointer(answer.document, "/items")
        if not answer.ok or not isinstance(found, list):
            said = f": {answer.said}" if answer.said else ""
            hint = f"; is {KEY_ENV} set and valid?" if answer.status in (401, 403) else ""
            raise PoolDown(f"Prime's availability is not to be had ({answer.status}{said}){hint}")
        listed += found
        if not found or len(listed) >= (whole(pointer(answer.document, "/totalCount")) or 0):
            break
    return [offer for offer in map(_offer, listed) if offer is not None]


def _offer(entry: object) -> Offer | None:
    name, gpu = name_of(pointer(entry, "/cloudId")), name_of(pointer(entry, "/gpuType"))
    count, price = whole(pointer(entry, "/gpuCount")), _price(pointer(entry, "/prices"))
    if name is None or gpu is None or not count or price is None or pointer(entry, "/isSpot") is True:
        return None
    stock, country = pointer(entry, "/stockStatus"), name_of(pointer(entry, "/country"))
    return Offer(
        name,
        gpu,
        count,
        price,
        _STOCK.get(stock.casefold(), 0) if isinstance(stock, str) else 0,
        country=None if country is None else country.upper(),
        security=name_of(pointer(entry, "/security")),
        provider=name_of(pointer(entry, "/provider")),
    )


def _price(prices: object) -> Decimal | None:
    """The hour of the whole machine: of those that anybody offers it is their own price."""
    if pointer(prices, "/currency") not in (None, "USD"):
        return None
    community = pointer(prices, "/communityPrice")
    return hour_price(pointer(prices, "/onDemand") if community is None else community)
