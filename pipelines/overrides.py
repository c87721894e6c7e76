"""``--set key.path=value``: one value of a job or pools file replaced before anything is checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bidbeam.connectors.errors import ConfigError
from bidbeam.pipelines.config_check import fault, nearest, refuse_secrets
from bidbeam.pipelines.yaml_text import Node, key_moved, parse

WHERE = "--set"


@dataclass(frozen=True, slots=True)
class Override:
    """The parts of the dotted key, and the value."""

    parts: tuple[str, ...]
    value: Node


def read_override(text: str, where: str = WHERE) -> Override:
    """Reads ``key.path=value``; the value is YAML. Raises ConfigError, for a secret too, which it does not repeat."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[^\s.=]+(?:\.[^\s.=]+)*", key):
        raise ConfigError("is not of the form key.path=value", file=where, expected="such as budget.max_cost=25.00")
    node = parse(value.strip(), where, key=key, located=False)
    refuse_secrets(Node("map", where, None, "", entries={key: node}))
    return Override(tuple(key.split(".")), node)


def apply(root: Node, override: Override) -> Node:
    """The tree with the value at its key. Blocks that are missing on the way are made; pools go by name or number."""
    return _placed(root, override.parts, override)


def _placed(node: Node, parts: tuple[str, ...], override: Override) -> Node:
    if not parts:
        return key_moved(override.value, node.key)
    if node.kind == "list":
        return _placed_in_list(node, parts, override)
    if node.kind == "map" or node.is_null:
        # Names may hold dots: the longest one that is there wins.
        width = next((n for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in node.entries), 1)
        name, rest = ".".join(parts[:width]), parts[width:]
        path = f"{node.key}.{name}" if node.key else name
        child = node.entries.get(name) or Node("scalar", override.value.file, None, path)
        return replace(node, kind="map", entries={**node.entries, name: _placed(child, rest, override)})
    raise fault(override.value, f"{node.key} is a single value and holds no {parts[0]!r}")


def _placed_in_list(node: Node, parts: tuple[str, ...], override: Override) -> Node:
    names = [item.entries["name"].text if "name" in item.entries else "" for item in node.items]
    for width in range(len(parts), 0, -1):
        name = ".".join(parts[:width])
        if name in names:
            place = names.index(name)
            break
        if width == 1 and name.isdecimal() and int(name) < len(node.items):
            place = int(name)
            break
    else:
        expected = "one of " + ", ".join(name for name in names if name) if any(names) else "a number"
        raise fault(override.value, f"{node.key} holds no {parts[0]!r}", expected, nearest(parts[0], names))
    items = list(node.items)
    items[place] = _placed(items[place], parts[width:], override)
    return replace(node, items=tuple(items))
