"""Names near one that is not there: what a message may suggest, and nothing where nothing is like it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LEAST = 0.65
"""How like a name must be to be suggested, as difflib's ratio: one letter in three may be wrong, not two."""
_MOST = 10_000
"""Names that are looked at; a list of a provider's models may be long."""
_PARTS = re.compile(r"[\W_]+")


def near(wrong: str, names: Iterable[str], *, least: float = LEAST) -> str | None:
    """The name that ``wrong`` most likely stands for, upper and lower case alike; None if none is like it."""
    return next(iter(nears(wrong, names, 1, least=least)), None)


def nears(wrong: str, names: Iterable[str], most: int = 3, *, least: float = LEAST) -> list[str]:
    """Up to ``most`` names like ``wrong``, the nearest first; those that hold it as a part stand after them."""
    known = {name.casefold(): name for name, _ in zip(names, range(_MOST), strict=False)}
    wanted = wrong.casefold()
    like = difflib.get_close_matches(wanted, known, n=most, cutoff=least)
    parts = [name for name in known if len(wanted) > 2 and wanted in _PARTS.split(name)]
    return [known[name] for name in dict.fromkeys((*like, *parts))][:most]
