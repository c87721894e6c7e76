"""A front of Targon's inventory feed, for tests: its path, its query, its shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.front_server import Call, FrontServer, as_json


def machine(
    name: str, gpu_type: str, gpu_count: int, cost_per_hour: float, available: int, kind: str = "rental"
) -> dict[str, Any]:
    """One entry of the inventory as the feed has it; memory and storage in MB."""
    return {
        "name": name,
        "display_name": name.upper(),
        "description": "",
        "type": kind,
        "gpu": gpu_count > 0,
        "spec": {"gpu_type": gpu_type, "gpu_count": gpu_count, "vcpu": 16, "memory": 131072, "storage": 512000},
        "cost_per_hour": cost_per_hour,
        "available": available,
    }


class TargonFront(FrontServer):
    """Serves ``machines`` at ``/tha/v2/inventory``, filtered by ``type`` and ``gpu``; or ``failing``, come what may."""

    def __init__(self, machines: Sequence[Mapping[str, Any]], failing: Reply | None = None) -> None:
        super().__init__()
        self.machines, self.failing = list(machines), failing

    def answer(self, call: Call) -> Reply:
        if self.failing is not None:
            return self.failing
        if (call.method, call.path) != ("GET", "/tha/v2/inventory"):
            return as_json({"error": "Not Found"}, 404)
        kind, gpu = call.query.get("type"), call.query.get("gpu")
        if kind == "serverless":
            return Reply(400, json.dumps({"error": "inventory type serverless has been deprecated"}).encode())
        return as_json(
            [
                each
                for each in self.machines
                if (kind is None or each.get("type") == kind) and (gpu != "true" or each.get("gpu"))
            ]
        )
