"""What a pool says of the nodes that it rents: which, where, how they are reached, how long they are waited for."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.pools import PoolSpec

TURNAROUND_S = 300.0
READY_WITHIN_S = 900.0
IDLE_AFTER_S = 60.0
GIVING_BACK_S = 30.0
"""Seconds that giving a node back is allowed for when money is reserved."""
_PORT = 8000
_ADDRESS = "https://{public_ip}:{port}/v1"
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_KNOWN = ("public_ip", "port", "node_id")
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]{0,62}\.)+[A-Za-z][A-Za-z0-9-]{0,62}")
"""A name with a dot in it: neither this machine's nor an address in another spelling."""
_LOOPBACK = re.compile(r"http://(?:127\.\d+\.\d+\.\d+|localhost|\[::1\])(?::(?:\d+|\{port\}))?(?:/|$)")


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """The options of a pool of ``kind: lease``, checked. Times are seconds."""

    gpu_tier: str
    image: str
    region: str | None = None
    ssh_key_id: str | None = None
    port: int = _PORT
    address: str = _ADDRESS
    node_key_env: str | None = None
    turnaround_s: float = TURNAROUND_S
    """How long a node is expected to take until it serves; what the auction counts with."""
    ready_within_s: float = READY_WITHIN_S
    idle_after_s: float = IDLE_AFTER_S

    @classmethod
    def of(cls, spec: PoolSpec) -> LeaseTerms:
        """From a pool. Raises ConfigError that names the option."""
        options = spec.options

        def text(name: str) -> str | None:
            value = options.get(name)
            return None if value in (None, "") else str(value)

        found = {name: text(name) for name in ("gpu_tier", "image", "region", "ssh_key_id", "node_key_env")}
        for name in ("gpu_tier", "image"):
            if found[name] is None:
                raise _fault(spec, name, "is not there", "what the node is to be")
        if not spec.price.by_time:
            raise ConfigError(
                "a rented node is paid by the hour", key=f"pools.{spec.name}.price", expected="accelerator_hour"
            )
        return cls(
            **found,  # type: ignore[arg-type]  # those that must be there are
            port=int(_number(spec, "port", _PORT, 1, 65535)),
            address=_address(spec, text("address") or _ADDRESS),
            turnaround_s=_number(spec, "turnaround", TURNAROUND_S, 0, 86_400),
            ready_within_s=_number(spec, "ready_within", READY_WITHIN_S, 1, 86_400),
            idle_after_s=_number(spec, "idle_after", IDLE_AFTER_S, 0, 86_400),
        )

    @property
    def held_s(self) -> float:
        """The most seconds of a node that no request bears: until it serves, idle, and while it is given back."""
        return self.ready_within_s + self.idle_after_s + GIVING_BACK_S

    def address_of(self, node: Mapping[str, str]) -> str:
        """Where the node is reached; ``node`` has ``public_ip`` and ``node_id``, as the provider tells them.

        Raises ValueError where the address it tells can be no node's: prompts go where it points.
        """
        told = {**node, "port": str(self.port)}
        if "{public_ip}" in self.address:
            told["public_ip"] = _host_of(node["public_ip"])
        return _PLACEHOLDER.sub(lambda match: told[match[1]], self.address).rstrip("/")


def _address(spec: PoolSpec, template: str) -> str:
    unknown = [name for name in _PLACEHOLDER.findall(template) if name not in _KNOWN]
    if unknown:
        raise _fault(spec, "address", f"names {{{unknown[0]}}}", "{public_ip}, {port} and {node_id} at most")
    # Said before a node is rented, not after: prompts go to another machine encrypted or not at all.
    if not template.startswith("https://") and not _LOOPBACK.match(template):
        raise _fault(spec, "address", "is neither https nor on this machine", f"{_ADDRESS}, or a tunnel's loopback end")
    return template


def _host_of(told: str) -> str:
    try:
        address = ipaddress.ip_address(told)
    except ValueError:
        if not _HOST.fullmatch(told) or len(told) > 253:
            raise ValueError("the address it is given is none") from None
        return told
    if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        raise ValueError("the address it is given is that of no other machine")
    return f"[{told}]" if address.version == 6 else told


def _number(spec: PoolSpec, name: str, otherwise: float, low: float, high: float) -> float:
    value: Any = spec.options.get(name)
    if value in (None, ""):
        return otherwise
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not low <= number <= high or (name == "port" and number != int(number)):
        raise _fault(spec, name, "is no number that will do", f"{low:g} to {high:g}")
    return number


def _fault(spec: PoolSpec, name: str, problem: str, expected: str) -> ConfigError:
    return ConfigError(problem, key=f"pools.{spec.name}.options.{name}", expected=expected)
