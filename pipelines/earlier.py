"""Earlier: what a run's former starts left in its journal, taken over by the next one or only looked at by a quote."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from bidbeam.connectors.errors import AlreadyExists, StoreError
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.store import Store
from bidbeam.transforms.compaction import compact
from bidbeam.transforms.decisions import refuse_pickles
from bidbeam.transforms.dispatch import book_open, open_rows
from bidbeam.transforms.journal import SegmentRef, answered_and_failed, list_segments, segment_ref, sound_segments
from bidbeam.transforms.run_context import start_of


@dataclass(frozen=True, slots=True)
class Earlier:
    """What the next start of a run begins with."""

    start: int
    """The number of that start."""
    spent: Decimal
    """USD that the run has cost so far."""
    answered: Mapping[str, tuple[int, int]]
    """How many requests each pool has answered and failed in starts that were cut short."""
    has_history: bool
    ended: int | None
    """The latest start that ran to its end."""
    seed: int
    damaged: frozenset[str] = frozenset()
    """Segments that cannot be read, and were not set aside."""


def take_over(journal: Store, manifest: Mapping[str, Any] | None, run_id: str) -> Earlier:
    """For a start, which holds the run: tidies up behind the earlier ones and books what they had in flight.

    Raises UsageError where an earlier version began it, StoreError where the run's secret is gone or damaged.
    """
    ended = _ended(manifest)
    if ended is not None:
        # That start may have been cut short while it tidied up.
        compact(journal, ended)
    refuse_pickles(journal, run_id)
    found = sound_segments(journal)
    for start in _starts(journal):
        # A start that was cut short had requests in flight: from here on they count as spent.
        found += book_open(journal, f"start-{start:03d}")
    return _earlier(journal, manifest, found, Decimal(0), _seed(journal))


def look_at(journal: Store, manifest: Mapping[str, Any] | None) -> Earlier:
    """For a quote: the same, but writes nothing. Whoever holds the run may be at work."""
    ended, damaged = _ended(manifest) or 0, set[str]()
    found, lost = list[SegmentRef](), Decimal(0)
    for name in list_segments(journal):
        if start_of(name) <= ended:
            continue
        try:
            found.append(segment_ref(journal, name))
        except StoreError:
            raise
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            damaged.add(name)
    for start in _starts(journal):
        if start > ended:
            for _, _, rows, _ in open_rows(journal, f"start-{start:03d}"):
                lost += sum_decimal(rows.column("cost"))
    seed = _read_seed(journal) if journal.exists("seed") else int(_new_seed(), 16)
    return _earlier(journal, manifest, found, lost, seed, frozenset(damaged))


def _earlier(
    journal: Store,
    manifest: Mapping[str, Any] | None,
    found: list[SegmentRef],
    lost: Decimal,
    seed: int,
    damaged: frozenset[str] = frozenset(),
) -> Earlier:
    ended = _ended(manifest)
    return Earlier(
        start=max([ended or 0, *_starts(journal)]) + 1,
        spent=sum((segment.cost for segment in found), Decimal(0 if manifest is None else manifest["cost"])) + lost,
        answered=answered_and_failed(found),
        has_history=bool(found) or ended is not None,
        ended=ended,
        seed=seed,
        damaged=damaged,
    )


def _ended(manifest: Mapping[str, Any] | None) -> int | None:
    return None if manifest is None else int(manifest["starts"])


def _starts(journal: Store) -> list[int]:
    return sorted({start_of(entry.name) for entry in journal.list("start-")})


def _seed(journal: Store) -> int:
    """The secret of the run's content keys: made once, kept beside the prompts it protects."""
    if not journal.exists("seed"):
        if journal.list("start-") or journal.list("answers/"):
            raise StoreError(_SEEDLESS.format(f"{journal.url_of('seed')} is gone", journal.url))
        # Another start may be as quick: whoever was first made the seed.
        with contextlib.suppress(AlreadyExists):
            journal.create("seed", _new_seed().encode())
    return _read_seed(journal)


def _read_seed(journal: Store) -> int:
    try:
        return int(journal.read("seed"), 16)
    except ValueError:
        raise StoreError(_SEEDLESS.format(f"{journal.url_of('seed')} is damaged", journal.url)) from None


_SEEDLESS = (
    "{}: without it no answer in the journal is known to be whose. Restore it, or remove {}: then everything is asked "
    "and paid for again"
)


def _new_seed() -> str:
    return secrets.token_hex(8)
