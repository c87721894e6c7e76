"""YAML 1.2 as a tree of nodes that know where they stand: ``NO`` is Norway, and numbers keep their text.

Only plain data is read: no tags, no second document, no key twice. Aliases are read, within a limit on the whole tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bidbeam.connectors.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_NODES = 50_000
MAX_DEPTH = 40

ScalarType = Literal["null", "bool", "int", "float", "text"]

# The core schema of YAML 1.2.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place. ``key`` is the dotted path; ``line`` is 1-based, None for a ``--set``.

    A scalar has ``type`` and its ``text`` as written; a list has ``items``; a map has ``entries`` by their keys' text.
    """

    kind: Literal["scalar", "list", "map"]
    file: str
    line: int | None
    key: str
    text: str = ""
    type: ScalarType = "null"
    items: tuple[Node, ...] = ()
    entries: Mapping[str, Node] = field(default_factory=dict)

    @property
    def is_null(self) -> bool:
        """Whether the value is null, or left empty."""
        return self.kind == "scalar" and self.type == "null"

    @property
    def is_true(self) -> bool:
        """Whether the value is a boolean true."""
        return self.kind == "scalar" and self.type == "bool" and _BOOL[self.text]

    def walk(self) -> Iterator[Node]:
        """This node and all beneath it, depth first."""
        yield self
        for child in (*self.items, *self.entries.values()):
            yield from child.walk()


def load(path: str | Path) -> Node:
    """The document in a file. Raises ConfigError for what cannot be read."""
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("there is no such file", file=name) from None
    except IsADirectoryError:
        raise ConfigError("is a directory", file=name, expected="a YAML file") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=name) from None
    return decode(raw, name)


def decode(raw: bytes, file: str) -> Node:
    """The document in some bytes. Raises ConfigError for more than 1 MiB, and for what is no UTF-8."""
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes", file=file)
    try:
        return parse(raw.decode("utf-8-sig"), file)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError("is not UTF-8 text", file=file, line=line) from None


def parse(text: str, file: str, *, key: str = "", located: bool = True) -> Node:
    """The one document in ``text``. ``key`` is where its root hangs; without ``located`` lines are left out.

    Raises ConfigError for anything but one document of plain data.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return _Builder(YAML(typ="safe", pure=True).parse(text), file, located).document(key)
    except MarkedYAMLError as error:
        mark, begun = error.problem_mark or error.context_mark, error.context_mark
        # What was begun and never ended stands where it was begun, which may be far above.
        where = (
            f" that begins on line {begun.line + 1}" if located and begun and mark and begun.line != mark.line else ""
        )
        problem = " ".join(part for part in (error.context and f"{error.context}{where},", error.problem) if part)
        tab = "; indent with spaces" if "'\\t'" in problem else ""
        line = mark.line + 1 if mark is not None and located else None
        raise ConfigError(f"not YAML: {problem}{tab}", file=file, line=line, key=key or None) from None
    except (YAMLError, ValueError):
        raise ConfigError("not YAML: it holds characters that no text has", file=file, key=key or None) from None


class _Builder:
    def __init__(self, events: Any, file: str, located: bool) -> None:
        self._events, self._file, self._located = events, file, located
        self._anchors: dict[str, Node] = {}
        self._nodes = 0

    def document(self, key: str) -> Node:
        from ruamel.yaml.events import DocumentEndEvent, DocumentStartEvent, StreamEndEvent

        root: Node | None = None
        for event in self._events:
            if isinstance(event, StreamEndEvent):
                break
            if isinstance(event, DocumentStartEvent):
                if root is not None:
                    raise self._fault(event, key, "a second document", "one document")
                root = self._node(next(self._events), key, None, 0)
            elif isinstance(event, DocumentEndEvent):
                continue
        if root is None:
            return self._counted(Node("scalar", self._file, 1 if self._located else None, key))
        return root

    def _node(self, event: Any, key: str, line: int | None, depth: int) -> Node:
        from ruamel.yaml.events import AliasEvent, MappingStartEvent, ScalarEvent

        line = line if line is not None else self._line(event)
        if depth > MAX_DEPTH:
            raise self._fault(event, key, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, AliasEvent):
            known = self._anchors.get(event.anchor)
            if known is None:
                raise self._fault(event, key, f"the alias *{event.anchor} has no anchor before it")
            return self._planted(known, key, line)
        if event.tag is not None:
            raise self._fault(event, key, "carries a YAML tag", "plain data")
        if isinstance(event, ScalarEvent) and "\0" in event.value:
            raise self._fault(event, key, "holds a NUL character", "plain text")
        if isinstance(event, ScalarEvent):
            type_ = scalar_type(event.value) if event.implicit[0] else "text"
            node = self._counted(Node("scalar", self._file, line, key, str(event.value), type_))
        elif isinstance(event, MappingStartEvent):
            node = self._map(key, line, depth)
        else:
            node = self._list(key, line, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _map(self, key: str, line: int | None, depth: int) -> Node:
        from ruamel.yaml.events import MappingEndEvent, ScalarEvent

        entries: dict[str, Node] = {}
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                break
            if not isinstance(event, ScalarEvent) or event.tag is not None or not str(event.value).isprintable():
                raise self._fault(event, key, "has a key that is not plain text", "plain text as a key")
            name = str(event.value)
            path = f"{key}.{name}" if key else name
            if name in entries:
                first = entries[name].line
                raise self._fault(event, path, "is there twice" + (f", first on line {first}" if first else ""))
            entries[name] = self._node(next(self._events), path, self._line(event), depth + 1)
        return self._counted(Node("map", self._file, line, key, entries=entries))

    def _list(self, key: str, line: int | None, depth: int) -> Node:
        from ruamel.yaml.events import SequenceEndEvent

        items: list[Node] = []
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._node(event, f"{key}[{len(items)}]", None, depth + 1))
        return self._counted(Node("list", self._file, line, key, items=tuple(items)))

    def _planted(self, node: Node, key: str, line: int | None) -> Node:
        """A copy of an anchored node under another key. Every node of it counts, so no bomb goes off."""
        moved = key_moved(node, key, self._counted)
        return replace(moved, line=line)

    def _counted(self, node: Node) -> Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ConfigError(f"holds more than {MAX_NODES} values", file=self._file, line=node.line)
        return node

    def _line(self, event: Any) -> int | None:
        return event.start_mark.line + 1 if self._located else None

    def _fault(self, event: Any, key: str, problem: str, expected: str | None = None) -> ConfigError:
        return ConfigError(problem, file=self._file, line=self._line(event), key=key or None, expected=expected)


def key_moved(node: Node, key: str, each: Any = lambda node: node) -> Node:
    """The node and all beneath it under another dotted key; ``each`` sees every copy."""
    items = tuple(key_moved(item, f"{key}[{place}]", each) for place, item in enumerate(node.items))
    entries = {name: key_moved(child, f"{key}.{name}" if key else name, each) for name, child in node.entries.items()}
    copy: Node = each(replace(node, key=key, items=items, entries=entries))
    return copy


def scalar_type(text: str) -> ScalarType:
    """What an unquoted scalar is in YAML 1.2's core schema."""
    if text in _NULL:
        return "null"
    if text in _BOOL:
        return "bool"
    if _INT.fullmatch(text):
        return "int"
    return "float" if _FLOAT.fullmatch(text) else "text"
