"""What the market decided, and what ended a stage, stand in the journal as data: read back whole, or not at all."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from generated_runs import draw, ground

from bidbeam.connectors.errors import (
    AlreadyExists,
    BidbeamError,
    ConfigError,
    Interrupted,
    ModelError,
    UsageError,
)
from bidbeam.connectors.store import NotThere, Store
from bidbeam.transforms import bid, failures
from bidbeam.transforms.decisions import Decision, from_bytes, to_bytes


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> list[Decision]:
    """First rounds of a few generated runs, with and without a budget."""
    plan = ground(tmp_path_factory.mktemp("ground"), 0)
    runs = [draw(plan, seed) for seed in range(4)]
    found = [bid.decide(run.context, 1, run.lots, Decimal(0), run.clock.now()) for run in runs]
    assert any(decision.tasks and decision.tasks[0].awards for decision in found)
    return found


def test_a_decision_is_read_back_as_it_was_made(decided: list[Decision]) -> None:
    """Awards, terms to the last place, reservations, what waits, and the ledger's tables with their types."""
    for decision in decided:
        tasks = tuple(
            replace(task, tight=True, adopted=Decimal("0.5"), adopts=(("a", "m"),)) for task in decision.tasks
        )
        for each in (decision, replace(decision, tasks=tasks)):
            assert from_bytes(to_bytes(each)) == each


def test_a_changed_decision_is_none(decided: list[Decision]) -> None:
    """Whatever byte is changed, cut off or put in its place, it is a ValueError."""
    chance = random.Random(1)
    data = to_bytes(decided[0])
    cases: list[bytes] = [b"", data[: len(data) // 2], data[:-1], pickle.dumps(decided[0]), b"{}"]
    for _ in range(200):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        cases.append(bytes(changed))
    for case in cases:
        with pytest.raises(ValueError, match="not what was written"):
            from_bytes(case)


@pytest.mark.parametrize(
    "error",
    [
        UsageError("a"), ModelError("no such"), Interrupted("stop"), AlreadyExists("there"), BidbeamError(""),
        ConfigError("wrong", file="job.yaml", line=3, key="a.b", expected="a number", nearest="ab"), ConfigError("w"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}",
)  # fmt: skip
def test_what_ended_a_stage_reaches_the_driver(error: BidbeamError, tmp_path: Path) -> None:
    """With its class and its words; one of a class that only a module of its own knows as the nearest that all do."""
    store = Store.at(str(tmp_path))
    context: Any = type("C", (), {"scratch": store})()
    assert failures.failure_of(store) is None
    with pytest.raises(type(error)), failures.reported(context):
        raise error
    found = failures.failure_of(store)
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
    with pytest.raises(NotThere), failures.reported(context):
        raise NotThere("gone")
    assert type(failures.failure_of(store)).__name__ == "StoreError"


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b'{"type": "SystemExit", "message": "x"}', b'{"type": ["a"]}', b"[" * 100_000,
             pickle.dumps(BidbeamError("x"))],
)  # fmt: skip
def test_what_is_no_error_of_ours_is_none(data: bytes, tmp_path: Path) -> None:
    """Whatever else stands where a worker leaves its error says nothing, and runs nothing."""
    store = Store.at(str(tmp_path))
    store.replace("failure.json", data)
    assert failures.failure_of(store) is None
