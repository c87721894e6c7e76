"""Targon's inventory: machines with accelerators, what an hour of each costs and how many are free.

Targon (Bittensor's subnet 4) rents machines; it has no documented API that sells tokens. What it publishes is capacity
with a price, which is all a price source needs.
"""

from __future__ import annotations

from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.json_call import NoAnswer, call_json
from bidbeam.connectors.machines import Offer, hour_price, name_of
from bidbeam.connectors.wire_json import pointer, whole

TARGON_URL = "https://api.targon.com"
_PATH = "/tha/v2/inventory?gpu=true"
"""Without ``type``: its names have changed (``serverless`` became ``rental``), and a machine is known by its GPUs."""


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
    name, gpu = name_of(pointer(entry, "/name")), name_of(pointer(entry, "/spec/gpu_type"))
    count, price = whole(pointer(entry, "/spec/gpu_count")), hour_price(pointer(entry, "/cost_per_hour"))
    if name is None or gpu is None or not count or price is None:
        return None
    kind = pointer(entry, "/type")
    return Offer(name, gpu, count, price, whole(pointer(entry, "/available")), kind if isinstance(kind, str) else "")
