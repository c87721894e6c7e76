"""Targon's inventory: machines with accelerators, what an hour of each costs and how many are free.

Targon (Bittensor's subnet 4) rents machines; it has no documented API that sells tokens. What it publishes is capacity
with a price, which is all a price source needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.json_call import NoAnswer, call_json
from bidbeam.connectors.price_feeds import money_of
from bidbeam.connectors.wire_json import pointer

TARGON_URL = "https://api.targon.com"
_PATH = "/tha/v2/inventory?gpu=true"
"""Without ``type``: its names have changed (``serverless`` became ``rental``), and a machine is known by its GPUs."""
_DEAREST_HOUR = Decimal(100_000)
_NAME = re.compile(r"[ -~]{1,128}")


@dataclass(frozen=True, slots=True)
class Offer:
    """One kind of machine. ``price_per_hour`` is USD for all its GPUs together; ``available`` None: not said."""

    name: str
    gpu_type: str
    gpu_count: int
    price_per_hour: Decimal
    available: int | None
    type: str = ""


def targon_offers(base_url: str | None = None, key: str | None = None) -> list[Offer]:
    """What the inventory offers now, free or not. ``base_url`` is scheme and host (https, or http to this machine),
    Targon's own by default; the feed asks for no key, but takes one.

    Entries that are not whole (no price, no GPU, a name that does not print) are left out. Raises PoolDown where the
    feed does not answer as it should.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = call_json(
            "GET", (base_url or TARGON_URL).rstrip("/") + _PATH, headers=headers, secrets=(key,) if key else ()
        )
    except NoAnswer as error:
        raise PoolDown(f"Targon's inventory: {error}") from None
    listed = answer.document
    if isinstance(listed, dict):
        listed = listed.get("items")
    if not answer.ok or not isinstance(listed, list):
        said = f": {answer.said}" if answer.said else ""
        raise PoolDown(f"Targon's inventory is not to be had ({answer.status}{said})")
    return [offer for offer in map(_offer, listed) if offer is not None]


def _offer(entry: object) -> Offer | None:
    name, gpu = pointer(entry, "/name"), pointer(entry, "/spec/gpu_type")
    count, price = _whole(pointer(entry, "/spec/gpu_count")), _price(pointer(entry, "/cost_per_hour"))
    if not isinstance(name, str) or not isinstance(gpu, str) or not count or price is None:
        return None
    if not _NAME.fullmatch(name) or not _NAME.fullmatch(gpu):
        return None
    kind = pointer(entry, "/type")
    return Offer(name, gpu, count, price, _whole(pointer(entry, "/available")), kind if isinstance(kind, str) else "")


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _price(value: Any) -> Decimal | None:
    """A price above 0: a machine that costs nothing is a gap in the feed, not an offer."""
    price = money_of(value)
    return price if price is not None and 0 < price < _DEAREST_HOUR else None
