"""Watch: reads the shifts' heartbeats about once a second and tells the progress display."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from decimal import Decimal
from typing import Any

from bidbeam.connectors.errors import StoreError
from bidbeam.pipelines.progress import PoolProgress, Progress, ProgressSnapshot
from bidbeam.pipelines.show import duration_text
from bidbeam.transforms.planned import Planned, read_planned
from bidbeam.transforms.run_context import RunContext

_EVERY_S = {True: 0.5, False: 5.0}


class Watch:
    """A context manager around a run. Reads what workers write to the store, so it works with any runner."""

    def __init__(self, context: RunContext, progress: Progress) -> None:
        self._context, self._progress = context, progress
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._down: set[str] = set()
        self._noted: set[tuple[str, str]] = set()
        self._seen = False
        self._thread = threading.Thread(target=self._keep, name="bidbeam-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._show()

    def _keep(self) -> None:
        while not self._ended.wait(_EVERY_S[self._context.scratch.is_local]):
            self._show()

    def _show(self) -> None:
        # What is shown is for the eye: a hiccup of the store is no reason to stop.
        with contextlib.suppress(StoreError, OSError, ValueError):
            snapshot = self.snapshot()
            # At the very end the scratch is tidied away, heartbeats and all.
            if snapshot.pools or not self._seen:
                self._seen = bool(snapshot.pools)
                self._progress.update(snapshot)

    def snapshot(self) -> ProgressSnapshot:
        """The run at this moment, over all shifts of this start."""
        pools: dict[str, list[dict[str, Any]]] = {}
        rounds = set()
        for entry in self._context.scratch.list("progress"):
            beat = json.loads(self._context.scratch.read(entry.name))
            rounds.add(entry.name.split("/")[-1].split("-")[0])
            for pool in beat["pools"]:
                pools.setdefault(pool["pool"], []).append(pool)
                self._note_down(pool)
        lanes = [lane for of_pool in pools.values() for lane in of_pool]
        # Ranges are planned one after another: until lots go out the counts would jump.
        planned = read_planned(self._context.scratch) if rounds else Planned()
        answered = min(sum(lane["settled"] for lane in lanes), planned.open)
        over = answered == planned.open and not any(lane["in_flight"] for lane in lanes)
        phase = "planning"
        if rounds:
            phase = "publishing" if over else f"generating, round {len(rounds)}"
        return ProgressSnapshot(
            phase=phase,
            total=self._context.rows,
            settled=planned.before + answered + (planned.shared if over else 0) if rounds else None,
            before=planned.before,
            shared=planned.shared,
            dead=planned.invalid,
            spend=self._context.spent + sum((Decimal(lane["cost"]) for lane in lanes), Decimal(0)),
            budget=self._context.max_cost,
            input_tokens=sum(lane["input_tokens"] for lane in lanes) if lanes else None,
            cached_tokens=sum(lane["cached_tokens"] for lane in lanes) if lanes else None,
            ideal_cached_tokens=sum(lane["ideal_cached_tokens"] for lane in lanes) if lanes else None,
            output_tokens=sum(lane["output_tokens"] for lane in lanes) if lanes else None,
            pools=tuple(self._pool(name, of_pool) for name, of_pool in sorted(pools.items())),
        )

    def _pool(self, name: str, lanes: list[dict[str, Any]]) -> PoolProgress:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        computed = sum(lane["input_tokens"] - lane["cached_tokens"] + lane["output_tokens"] for lane in lanes)
        return PoolProgress(
            name=name,
            in_flight=sum(lane["in_flight"] for lane in lanes),
            settled=sum(lane["settled"] for lane in lanes),
            failed=sum(lane["failed"] for lane in lanes),
            tokens_per_s=computed / elapsed if computed else None,
            spend=sum((Decimal(lane["cost"]) for lane in lanes), Decimal(0)),
            waits=next((self._wait_text(name, lane["wait"]) for lane in lanes if lane.get("wait")), None),
        )

    def _wait_text(self, pool: str, wait: dict[str, Any]) -> str:
        whole = max(1, round(wait["seconds"]))
        seconds = f"{whole} s" if whole < 60 else duration_text(whole)
        match wait["reason"]:
            case "ready":
                return f"getting ready for {seconds}"
            case "pause":
                return f"waits {seconds} as it asked"
            case "breaker":
                return f"waits {seconds} before it is tried again"
            case "probe":
                return f"one request tries it, for {seconds}"
            case "batch":
                return f"waits for its batches, for {seconds}"
        limit = next((f" of at most {each.timeout_s:g} s" for each in self._context.pools
                      if each.name == pool and each.kind == "openai"), "")  # fmt: skip
        return f"no answer for {seconds}{limit}"

    def _note_down(self, pool: dict[str, Any]) -> None:
        if pool["down"] and pool["pool"] not in self._down:
            self._down.add(pool["pool"])
            # What an engine says of itself names its pool.
            told = str(pool["down"]).startswith(f"pool {pool['pool']}")
            self._progress.note(pool["down"] if told else f"pool {pool['pool']} is down: {pool['down']}")
        for note in pool.get("notes", ()):
            if (pool["pool"], note) not in self._noted:
                self._noted.add((pool["pool"], note))
                self._progress.note(f"pool {pool['pool']}: {note}")
