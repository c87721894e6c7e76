"""A front of Prime Intellect's availability feed, for tests: its path, its key, its pages, its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.front_server import Call, FrontServer, as_json


def listing(
    cloud_id: str,
    gpu_type: str,
    gpu_count: int,
    on_demand: float | None,
    country: str | None,
    *,
    security: str = "secure_cloud",
    stock: str = "Available",
    **more: Any,
) -> dict[str, Any]:
    """One entry of the feed; the price is that of the whole machine."""
    return {
        "cloudId": cloud_id,
        "gpuType": gpu_type,
        "socket": "SXM5",
        "provider": "a-cloud",
        "dataCenter": "one",
        "country": country,
        "gpuCount": gpu_count,
        "gpuMemory": 80 * gpu_count,
        "stockStatus": stock,
        "security": security,
        "isSpot": False,
        "prepaidTime": None,
        "provisioningTime": 5,
        "prices": {"onDemand": on_demand, "communityPrice": None, "isVariable": None, "currency": "USD"},
        **more,
    }


class PrimeFront(FrontServer):
    """Serves ``listings`` at ``/api/v1/availability/gpus`` to who shows ``key``, at most ``page`` at a time."""

    def __init__(self, listings: Sequence[Mapping[str, Any]], *, key: str, page: int = 100) -> None:
        super().__init__()
        self.listings, self._key, self._page = list(listings), key, page

    def answer(self, call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {self._key}":
            return as_json({"detail": "Unauthorized"}, 401)
        if (call.method, call.path) != ("GET", "/api/v1/availability/gpus"):
            return as_json({"detail": "Not Found"}, 404)
        size = min(int(call.query.get("page_size", self._page)), self._page)
        begin = (int(call.query.get("page", 1)) - 1) * size
        return as_json({"items": self.listings[begin : begin + size], "totalCount": len(self.listings)})
