"""How far a shift is, written beside the journal about once a second, for whoever draws the progress."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.store import Store
from bidbeam.transforms import stopping
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.waiting import wait_of

if TYPE_CHECKING:
    from bidbeam.transforms.lane import Lane

_EVERY_S = {True: 1.0, False: 5.0}
"""Seconds between beats, on a local disk and on an object store."""


_OF_ROUND = re.compile(r"progress/r(\d+)-")


def name_of(prefix: str) -> str:
    return f"progress/{prefix}.json"


def last_sign(journal: Store, scratch_name: str, shift: str) -> datetime | None:
    """When a shift was last known to be alive; None where it never said so."""
    name = f"{scratch_name}/{name_of(shift)}"
    try:
        return datetime.fromisoformat(json.loads(journal.read(name))["at"]) if journal.exists(name) else None
    except (ValueError, KeyError):
        return None


@dataclass(slots=True)
class SoFar:
    """What became of the requests that a pool was asked in earlier rounds, and whether it was down at the last."""

    settled: int = 0
    failed: int = 0
    down: bool = False
    round: int = 0


def so_far(scratch: Store, before: int) -> dict[str, SoFar]:
    """How the pools have fared in the rounds ``before`` this one, by name."""
    pools: dict[str, SoFar] = {}
    for entry in scratch.list("progress/"):
        found = _OF_ROUND.match(entry.name)
        if found is None or int(found[1]) >= before:
            continue
        with contextlib.suppress(ValueError, KeyError, StoreError, OSError):
            for beat in json.loads(scratch.read(entry.name))["pools"]:
                pool, round_, down = pools.setdefault(beat["pool"], SoFar()), int(found[1]), bool(beat["down"])
                pool.settled += beat["settled"]
                pool.failed += beat["failed"]
                if round_ >= pool.round:
                    # Of several engines of a pool one that is up is enough.
                    pool.down = down and (pool.down or round_ > pool.round)
                    pool.round = round_
    return pools


def why_down(scratch: Store) -> dict[str, str]:
    """Why pools were down at the end of this start, by name: those of whose requests some failed, or none was served.

    In the last round that each was in; a node that was given back after its work is not told.
    """
    found: dict[str, tuple[int, str]] = {}
    up: set[tuple[str, int]] = set()
    for entry in scratch.list("progress/"):
        told = _OF_ROUND.match(entry.name)
        if told is None:
            continue
        with contextlib.suppress(ValueError, KeyError, StoreError, OSError):
            for beat in json.loads(scratch.read(entry.name))["pools"]:
                pool, round_ = beat["pool"], int(told[1])
                if not beat["down"] or (beat["settled"] and not beat["failed"]):
                    up.add((pool, round_))
                if round_ >= found.get(pool, (0, ""))[0]:
                    found[pool] = (round_, str(beat["down"] or ""))
    return {pool: why for pool, (round_, why) in found.items() if why and (pool, round_) not in up}


def snapshot(lanes: Iterable[Lane]) -> dict[str, Any]:
    """Counts per pool; tokens are None while nothing is known of them."""
    return {
        "at": datetime.now(UTC).isoformat(),
        "pools": [
            {
                "pool": lane.pool,
                "model": lane.model,
                "in_flight": lane.sent,
                "wait": None if (wait := wait_of(lane)) is None else asdict(wait),
                "settled": lane.settled,
                "failed": lane.failed,
                "input_tokens": lane.input_tokens,
                "cached_tokens": lane.cached_tokens,
                "output_tokens": lane.output_tokens,
                "ideal_cached_tokens": lane.ideal_cached_tokens,
                "cost": str(lane.cost),
                "down": lane.down or lane.out,
                "notes": lane.notes,
            }
            for lane in lanes
        ],
    }


def note(scratch: Store, name: str, notes: Mapping[str, str]) -> None:
    """Says something of pools, by name, that no shift is at work with."""
    nothing = dict.fromkeys(
        ("in_flight", "settled", "failed", "input_tokens", "cached_tokens", "output_tokens", "ideal_cached_tokens"), 0
    )
    pools = [
        {**nothing, "pool": pool, "model": None, "cost": "0", "down": None, "notes": [text]}
        for pool, text in notes.items()
    ]
    with contextlib.suppress(OSError, StoreError):
        scratch.replace(name_of(name), json.dumps({"at": datetime.now(UTC).isoformat(), "pools": pools}).encode())


@contextlib.contextmanager
def of(context: RunContext, prefix: str, lanes: Callable[[], Iterable[Lane]]) -> Iterator[Callable[[], None]]:
    """Writes a beat now and then until the block ends; the yielded function writes one at once."""
    lock = threading.Lock()
    ended = threading.Event()

    def beat() -> None:
        # Progress is for the eye: a store that stumbles here must not stop the run.
        with lock, contextlib.suppress(OSError, StoreError, RuntimeError):
            context.scratch.replace(name_of(prefix), json.dumps(snapshot(list(lanes()))).encode())

    def keep() -> None:
        while not ended.wait(_EVERY_S[context.scratch.is_local]):
            beat()
            with contextlib.suppress(OSError, StoreError):
                if context.scratch.exists(stopping.FILE):
                    stopping.request()

    beater = threading.Thread(target=keep, name="bidbeam-heartbeat", daemon=True)
    beater.start()
    try:
        yield beat
    finally:
        ended.set()
        beater.join()
