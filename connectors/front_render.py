"""A front of Render Network's compute API, for tests: nodes that come up, serve and end, and every way that fails.

    with EndpointDouble(["tiny"]) as double, RenderFront() as front:
        pool = ...  # kind: lease, base_url: front.base_url, options.address: double's own
        ...
        assert not front.alive

The node itself is whatever OpenAI-compatible server stands at the address that the pool's options name.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

from bidbeam.connectors.doubles import Reply
from bidbeam.connectors.front_server import Call, FrontServer, as_json

KEY = "rndr-key-of-tests"
_NODES = "/v1/dispersed/compute/nodes"


@dataclass(slots=True)
class RentedNode:
    """A node in the front's own books."""

    node_id: str
    name: str
    gpu_tier: str
    region: str
    state: str
    looks: int = 0


class RenderFront(FrontServer):
    """Serves the four routes: ask for a node, list them, look at one, end one.

    A node is ``provisioning`` for ``looks`` looks and then ``running``. ``refuse`` answers requests for nodes instead;
    ``lose_ask``: the node is made and the answer lost; ``fail_ends``: so many requests to end one fail; ``end_in``: the
    state that a node ends in by itself once it has been looked at that often; ``lists``: whether nodes are listed.
    ``on_running`` is called when one begins to run.
    """

    def __init__(
        self,
        *,
        looks: int = 1,
        refuse: Reply | None = None,
        lose_ask: bool = False,
        fail_ends: int = 0,
        end_in: str | None = None,
        never: bool = False,
        lists: bool = True,
        on_running: Callable[[], None] | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(port)
        self.nodes: dict[str, RentedNode] = {}
        self.looks, self.refuse, self.lose_ask, self.fail_ends = looks, refuse, lose_ask, fail_ends
        self.end_in, self.never, self.lists, self.on_running = end_in, never, lists, on_running
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1/dispersed"

    @property
    def alive(self) -> list[str]:
        """The nodes that cost money now."""
        return [node.node_id for node in self.nodes.values() if node.state not in ("terminated", "failed", "expired")]

    def answer(self, call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {KEY}":
            return as_json({"error": {"code": "unauthorized", "message": "invalid api key"}}, 401)
        with self._lock:
            if call.path == _NODES:
                return self._ask(call) if call.method == "POST" else self._list()
            node = self.nodes.get(call.path.removeprefix(f"{_NODES}/"))
            if node is None:
                return as_json({"error": {"code": "not_found", "message": "no such node"}}, 404)
            return self._end(node) if call.method == "DELETE" else self._look(node)

    def _ask(self, call: Call) -> Reply:
        if self.refuse is not None:
            return self.refuse
        number = next(self._numbers)
        node = RentedNode(
            f"rn-{number:03d}",
            str(call.body.get("name")),
            str(call.body.get("gpu_tier")),
            str(call.body.get("region", "na-east")),
            "queued",
        )
        self.nodes[node.node_id] = node
        return Reply(cut="reset") if self.lose_ask else as_json(_shown(node), 201)

    def _list(self) -> Reply:
        if not self.lists:
            return as_json({"error": {"code": "method_not_allowed", "message": "not here"}}, 405)
        return as_json({"nodes": [_shown(node)["node"] for node in self.nodes.values()]})

    def _look(self, node: RentedNode) -> Reply:
        node.looks += 1
        if node.state in ("queued", "provisioning"):
            node.state = "provisioning"
            if self.end_in is not None and node.looks > self.looks:
                node.state = self.end_in
            elif not self.never and node.looks > self.looks:
                node.state = "running"
                if self.on_running is not None:
                    self.on_running()
        return as_json(_shown(node))

    def _end(self, node: RentedNode) -> Reply:
        if self.fail_ends > 0:
            self.fail_ends -= 1
            return as_json({"error": {"code": "internal", "message": "try again"}}, 500)
        node.state = "terminated"
        return as_json({}, 202)


def _shown(node: RentedNode) -> dict[str, dict[str, str]]:
    shown = {
        "node_id": node.node_id,
        "name": node.name,
        "state": node.state,
        "gpu_tier": node.gpu_tier,
        "region": node.region,
    }
    if node.state == "running":
        shown["public_ip"] = "127.0.0.1"
    return {"node": shown}
