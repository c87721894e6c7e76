"""The model that an answer names, held against the one that was asked for.

Endpoints answer with dated snapshots, aliases that they resolved, other spellings and other vendors' prefixes: none of
that is a fault. What counts as another model is a name that nothing of the kind explains. A pool that says what its
answers call a model (``answers_as`` in the pools file) is held to that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.profile_record import Profile

_PART = re.compile(r"[^\W_]+")
_DATED = re.compile(r"\d{3,8}|v\d+")
_BEFORE = frozenset((
    "ai", "amazon", "anthropic", "google", "meta", "microsoft", "mistralai", "moonshotai", "nvidia", "openai", "xai",
    "zai", "us", "eu", "apac", "global",
))  # fmt: skip
"""What a name may begin with and mean nothing by: who made the model, or where it is asked."""
_SERVED = frozenset((
    "latest", "preview", "exp", "stable", "maas", "hf", "tee", "free", "awq", "gptq", "gguf", "fp4", "fp8", "fp16",
    "bf16", "int4", "int8", "mxfp4", "nvfp4",
))  # fmt: skip
"""What a name may end with and be of the same model: how it is served."""
_RESPELT = {("gpt", "35"): ("gpt", "3", "5")}
"""How names begin that some clouds cannot spell as others do: Azure's have no dot."""


@dataclass(frozen=True, slots=True)
class Echo:
    """What an answer may call its model: any of ``names``; or, where the pool is held to one, only ``expected``.

    Without either there is nothing to compare.
    """

    names: tuple[str, ...] = ()
    expected: str | None = None

    def other(self, returned: str | None) -> bool | None:
        """Whether ``returned`` is plainly another model; None where nothing can be said."""
        if returned is None:
            return None
        if self.expected is not None:
            return not names_it(self.expected, returned)
        return not any(one_family(name, returned) for name in self.names) if self.names else None


NO_ECHO = Echo()


def echo_of(spec: PoolSpec, model: str, profile: Profile) -> Echo:
    """What the answers of a pool to requests for ``model`` (a name of the job) may call it."""
    names = (spec.models[model], model) if profile.echoes_model else ()
    return Echo(names, spec.answers_as.get(model))


@lru_cache(maxsize=4096)
def one_family(asked: str, returned: str) -> bool:
    """Whether two names may be of one model: equal but for case, separators, the vendor before them, how it is served,
    and a date or version that only one of them has, or has in full. A name without a letter or digit may be any.
    """
    (one, dated), (other, resolved) = _stem_and_date(asked), _stem_and_date(returned)
    if not one or not other:
        return True
    longer, shorter = sorted((dated, resolved), key=len, reverse=True)
    return one == other and (longer.startswith(shorter) or longer.endswith(shorter))


@lru_cache(maxsize=4096)
def names_it(expected: str, returned: str) -> bool:
    """Whether ``returned`` is ``expected``, or that with a date, a version or a way to serve it added."""
    one, other = _parts(expected), _parts(returned)
    return other[: len(one)] == one and _are_added(other[len(one) :])


def _parts(name: str) -> tuple[str, ...]:
    """The words and numbers of a name, without the vendor's part, path or variant around it."""
    last = name.casefold().rstrip("/").rpartition("/")[2].partition(":")[0].rpartition("--")[2]
    parts = _PART.findall(last)
    while len(parts) > 1 and parts[0] in _BEFORE:
        del parts[0]
    return (*_RESPELT.get(tuple(parts[:2]), parts[:2]), *parts[2:])


def _stem_and_date(name: str) -> tuple[tuple[str, ...], str]:
    parts = _parts(name)
    end = next((at for at in range(1, len(parts)) if _are_added(parts[at:])), len(parts))
    return parts[:end], "".join(part for part in parts[end:] if part not in _SERVED)


def _are_added(parts: tuple[str, ...]) -> bool:
    """Whether these parts, at the end of a name, are dates, versions and ways to serve it alone."""
    # After the first of them a short number is a month, a day or the second half of a version.
    return all(
        part in _SERVED or _DATED.fullmatch(part) is not None or (place > 0 and part.isdigit())
        for place, part in enumerate(parts)
    )
