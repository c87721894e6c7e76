"""Reads checked values out of job and pools files; what is wrong becomes a ConfigError saying where and what next."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.near import near
from bidbeam.pipelines.yaml_text import Node

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[-+]?\d{1,18}", re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[dhms]))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms])", re.ASCII)
_UNIT_SECONDS = {
    "d": Decimal(86400), "h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001"),
}  # fmt: skip
_SLUG = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?", re.ASCII)
MAX_DIGITS = 38


def fault(node: Node, problem: str, expected: str | None = None, nearest: str | None = None) -> ConfigError:
    """The error of a node: its file, line and dotted key, what is wrong, and what would be right."""
    return ConfigError(
        problem, file=node.file, line=node.line, key=node.key or None, expected=expected, nearest=nearest
    )


def nearest(wrong: str, names: Iterable[str]) -> str | None:
    """The valid name that ``wrong`` most likely stands for, upper and lower case alike; None if none is close."""
    return near(wrong, names)


def shown(node: Node) -> str:
    """The value as a message may quote it: one line, cut short."""
    if node.kind != "scalar":
        return "a list" if node.kind == "list" else "a mapping"
    if node.is_null:
        return "nothing"
    text = " ".join(node.text.split())
    return repr(text if len(text) <= 40 else text[:39] + "…")


class Fields:
    """The entries of a map, of which ``known`` are all that may be there."""

    def __init__(self, node: Node, known: Iterable[str]) -> None:
        self.node = node
        names = tuple(known)
        if node.kind != "map":
            raise fault(node, f"is {shown(node)}", "a mapping with " + ", ".join(names))
        for name, entry in node.entries.items():
            if name not in names:
                raise fault(entry, "unknown key", "one of " + ", ".join(names), nearest(name, names))

    def get(self, name: str) -> Node | None:
        """The entry, or None where it is absent or null."""
        entry = self.node.entries.get(name)
        return None if entry is None or entry.is_null else entry

    def need(self, name: str, expected: str) -> Node:
        """The entry. Raises ConfigError where it is absent or null."""
        entry = self.get(name)
        if entry is not None:
            return entry
        at = self.node.entries.get(name, self.node)
        key = f"{self.node.key}.{name}" if self.node.key else name
        raise ConfigError("is missing", file=at.file, line=at.line, key=key, expected=expected)

    def need_all(self, expected: Mapping[str, str]) -> None:
        """Raises ConfigError where one of these entries is absent or null; one error tells of all that are."""
        missing = [name for name in expected if self.get(name) is None]
        if len(missing) < 2:
            for name in missing:
                self.need(name, expected[name])
            return
        first, *others = missing
        told = "; ".join(f"{name}: {expected[name]}" for name in missing)
        more = " is " if len(others) == 1 else " are "
        key = f"{self.node.key}.{first}" if self.node.key else first
        raise ConfigError(
            f"is missing, and so{more}{', '.join(others)}",
            file=self.node.file, line=self.node.line, key=key, expected=told,
        )  # fmt: skip

    def read(self, name: str, reader: Callable[[Node], T], default: T) -> T:
        """What ``reader`` makes of the entry, or the default where it is absent or null."""
        entry = self.get(name)
        return default if entry is None else reader(entry)

    def maybe(self, name: str, reader: Callable[[Node], T]) -> T | None:
        """What ``reader`` makes of the entry, or None where it is absent or null."""
        entry = self.get(name)
        return None if entry is None else reader(entry)


def text_of(node: Node) -> str:
    """A scalar's text, as it is written: ``1.10`` stays ``1.10``."""
    if node.kind != "scalar" or node.is_null or not node.text.strip():
        raise fault(node, f"is {shown(node)}", "text")
    return node.text


def texts_of(node: Node) -> tuple[str, ...]:
    """One text, or a list of at least one."""
    if node.kind == "list":
        if not node.items:
            raise fault(node, "is an empty list", "at least one text")
        return tuple(text_of(item) for item in node.items)
    return (text_of(node),)


def text_map_of(node: Node) -> dict[str, str]:
    """A map of texts."""
    if node.kind != "map":
        raise fault(node, f"is {shown(node)}", "a mapping of names to text")
    return {name: text_of(entry) for name, entry in node.entries.items()}


def choice_of(node: Node, choices: Iterable[str]) -> str:
    """One of some texts."""
    names = tuple(choices)
    text = node.text if node.kind == "scalar" else ""
    if text in names:
        return text
    raise fault(node, f"is {shown(node)}", "one of " + ", ".join(names), nearest(text, names))


def flag_of(node: Node) -> bool:
    """true or false."""
    if node.kind != "scalar" or node.type != "bool":
        raise fault(node, f"is {shown(node)}", "true or false")
    return node.is_true


def whole_of(node: Node, low: int = 0, high: int = 2**63 - 1) -> int:
    """A whole number within bounds."""
    expected = f"a whole number from {low}" + (f" to {high}" if high < 2**31 else "")
    if node.kind != "scalar" or not _WHOLE.fullmatch(node.text):
        raise fault(node, f"is {shown(node)}", expected)
    value = int(node.text)
    if not low <= value <= high:
        raise fault(node, f"is {value}", expected)
    return value


def decimal_of(node: Node, expected: str = 'an exact number such as "0.10"') -> Decimal:
    """An exact number of at most 38 digits on either side of the point, from its text."""
    if node.kind != "scalar" or not _NUMBER.fullmatch(node.text):
        raise fault(node, f"is {shown(node)}", expected)
    value = Decimal(node.text)
    if value and (value.adjusted() >= MAX_DIGITS or as_tuple_exponent(value) < -MAX_DIGITS):
        raise fault(node, f"is {shown(node)}, which has too many digits", expected)
    return value or abs(value)


def as_tuple_exponent(value: Decimal) -> int:
    """The exponent of a finite decimal: -2 for 0.10."""
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)  # noqa: S101 - only NaN and infinity have another
    return exponent


def money_of(node: Node, expected: str = 'USD such as "25.00"') -> Decimal:
    """An amount that is not negative, of at most 18 places and 20 digits before the point."""
    value = decimal_of(node, expected)
    if value < 0:
        raise fault(node, f"is negative: {shown(node)}", expected)
    if as_tuple_exponent(value.normalize()) < -18 or value.adjusted() >= 20:
        raise fault(node, f"is {shown(node)}: amounts have up to 18 places and 20 digits before them", expected)
    return value


def duration_of(node: Node) -> timedelta:
    """A length of time above zero: ``90s``, ``15m``, ``6h``, ``1h30m``, ``2d``."""
    value = duration_from(node.text) if node.kind == "scalar" else None
    if value is None:
        raise fault(node, f"is {shown(node)}", "a duration such as 90s, 15m, 6h, 1h30m or 2d")
    return value


def duration_from(text: str) -> timedelta | None:
    """The duration that a text means, or None. At most 10,000 days, above zero."""
    if len(text) > 60 or not _DURATION.fullmatch(text):
        return None
    seconds = sum((Decimal(n) * _UNIT_SECONDS[unit] for n, unit in _DURATION_PART.findall(text)), Decimal(0))
    return timedelta(microseconds=int(seconds * 1_000_000)) if 0 < seconds <= 864_000_000 else None


def moment_of(node: Node) -> datetime:
    """A date, or a date and time with its offset (``2026-11-22T06:00:00Z``), as UTC; a date is its midnight."""
    expected = "a date, or a date and time with an offset, such as 2026-11-22T06:00:00Z"
    try:
        value = datetime.fromisoformat(text_of(node))
    except ValueError:
        raise fault(node, f"is {shown(node)}", expected) from None
    if value.tzinfo is None:
        if "T" in node.text or " " in node.text:
            raise fault(node, f"is {shown(node)}, without an offset from UTC", expected)
        value = value.replace(tzinfo=UTC)
    return value.astimezone(UTC)


def day_from(text: str) -> date | None:
    """The date of ``YYYY-MM-DD``, or None."""
    try:
        return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII) else None
    except ValueError:
        return None


def slug_of(node: Node) -> str:
    """A name that is safe in paths and run ids: letters, digits, ``-`` and ``_``, up to 64."""
    text = text_of(node)
    if not _SLUG.fullmatch(text):
        expected = "up to 64 of a-z, A-Z, 0-9, - and _, with a letter or digit at both ends"
        raise fault(node, f"is {shown(node)}", expected)
    return text


def plain_of(node: Node, number: Callable[[str], Any] = Decimal) -> Any:
    """The value as plain Python: numbers with a point become ``number`` of their text, which keeps it."""
    if node.kind == "list":
        return [plain_of(item, number) for item in node.items]
    if node.kind == "map":
        return {name: plain_of(entry, number) for name, entry in node.entries.items()}
    match node.type:
        case "null":
            return None
        case "bool":
            return node.is_true
        case "int":
            if len(node.text) > 40:
                raise fault(node, "has too many digits")
            return int(node.text, 0) if node.text[:2] in {"0o", "0x"} else int(node.text)
        case "float":
            if len(node.text) > 60 or not math.isfinite(float(node.text.replace(".inf", "inf").replace(".nan", "nan"))):
                raise fault(node, f"is {shown(node)}", "a finite number")
            return number(node.text)
        case _:
            return node.text


def plain_map_of(node: Node, number: Callable[[str], Any] = Decimal) -> dict[str, Any]:
    """A map as plain Python (see ``plain_of``)."""
    if node.kind != "map":
        raise fault(node, f"is {shown(node)}", "a mapping")
    value: dict[str, Any] = plain_of(node, number)
    return value


def refuse_secrets(root: Node) -> None:
    """Raises ConfigError at the first value that looks like a key, password or token; the value is not repeated."""
    from bidbeam.connectors.secrets import looks_like_secret

    for node in root.walk():
        for name, entry in node.entries.items():
            if looks_like_secret(name):
                place = Node("scalar", entry.file, entry.line, node.key)
                raise fault(place, "a key in it holds a secret", "secrets in the environment or a file of their own")
        if node.kind == "scalar" and node.type != "null":
            leaf = re.sub(r"\[\d+\]$", "", node.key).rsplit(".", 1)[-1]
            if looks_like_secret(node.text, leaf):
                raise fault(
                    node, "looks like a secret", "the name of an environment variable (api_key_env) or of a file"
                )


def is_kind(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Whether there is such a file or directory; a name that no filesystem can hold names none."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def lines_of(root: Node) -> Mapping[str, tuple[str, int | None]]:
    """File and line of every key of a tree, by dotted key."""
    return {node.key: (node.file, node.line) for node in root.walk() if node.key}
