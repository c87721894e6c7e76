"""Retries within a round: what failed is asked again, where that may end better, once everything else is done.

The round owns the only retry budget. In it a request gets at most ``TRIES`` attempts, on the pool that won its lot and
on those that the market found next best in turns, as long as these take requests and have answered most of them in
this run. A pool that charged for something unusable is asked the same once more at most, and after the others, and not
at all where it would answer the same again; and an attempt that was lost is not followed by another: it may have been
served. What still has no answer goes to the next round's auction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.schemas import COST
from bidbeam.transforms.estimates import worst_input
from bidbeam.transforms.settling import Terms, worst_case_cost

TRIES = 4
"""Attempts that a request gets in one round, at most."""

CHARGED_TRIES = 2
"""How often a pool may charge for a request in a round without answering it."""


class Retries:
    """Which pools each request of a round has failed on, and how."""

    def __init__(self) -> None:
        self._failures: dict[int, list[tuple[str, bool]]] = {}
        self._lost: set[int] = set()
        self._repeats: set[tuple[int, str]] = set()

    def note(self, tag: int, pool: str, *, charged: bool, lost: bool, repeats: bool = False) -> None:
        """A request failed: whether that was charged, whether its outcome is not known at all, and whether the pool
        would answer the same again."""
        if repeats:
            self._repeats.add((tag, pool))
        self._failures.setdefault(tag, []).append((pool, charged))
        if lost:
            self._lost.add(tag)

    def pools(self, tag: int) -> set[str]:
        """The pools that a request has failed on in this round."""
        return {pool for pool, _ in self._failures.get(tag, [])}

    def next_pool(self, tag: int, pools: Sequence[str]) -> str | None:
        """Which of ``pools`` is to be asked next: the one that charged least often for nothing, of these the one that
        was asked least, the first of equals; None for none."""
        failures = self._failures.get(tag, [])
        if not failures or len(failures) >= TRIES or tag in self._lost:
            return None
        asked = Counter(pool for pool, _ in failures)
        charged = Counter(pool for pool, charged in failures if charged)
        left = [pool for pool in pools if charged[pool] < CHARGED_TRIES and (tag, pool) not in self._repeats]
        return min(left, key=lambda pool: (charged[pool], asked[pool]), default=None)


def worst_case_of(order: pa.Table, places: np.ndarray[Any, Any], estimated: bool, *, terms: Terms) -> Decimal:
    """USD that the requests in these places of an order (ORDER) may cost at most under ``terms``, priced by token."""
    return sum_decimal(worst_cases_of(order, places, estimated, terms=terms))


def worst_cases_of(order: pa.Table, places: np.ndarray[Any, Any], estimated: bool, *, terms: Terms) -> pa.Array:
    """The same of each of them (COST)."""
    here = order.select(["input_tokens", "max_tokens", "n"]).take(pa.array(places))
    tokens = worst_input(here.column("input_tokens"), pa.scalar(not estimated))
    here = here.set_column(0, "input_tokens", tokens).combine_chunks()
    return pa.concat_arrays([worst_case_cost(batch, terms) for batch in here.to_batches()] or [pa.array([], COST)])
