"""An outage: pools that answered a moment ago are waited for; what never answered is not."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from small_jobs import check_conserved, make_job, prompts, remote, written
from small_plans import make_context, make_plan, write_input
from test_shift import pool

from bidbeam.connectors.chaos import ChaosDouble
from bidbeam.connectors.pools import PoolSpec
from bidbeam.pipelines.run import run
from bidbeam.transforms import outage, stopping
from bidbeam.transforms.outage import wait_out

AT = datetime(2026, 1, 2, tzinfo=UTC)


class Clock:
    """Tells the time, and passes it."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def now(self) -> datetime:
        return AT + timedelta(seconds=self.slept_s)

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


def waited(
    home: Path,
    beats: dict[str, tuple[int, bool]],
    *,
    back_after_s: float = 1e9,
    stop_after_s: float = 1e9,
    pools: Any = None,
    **keys: Any,
) -> tuple[float, str]:
    """Seconds waited before round 2, and what was told. ``beats``: how many each pool answered in round 1, and whether
    it then went down; all are back after so many seconds."""
    specs = pools or tuple(replace(pool(name), base_url="http://127.0.0.1:9/v1") for name in beats)
    plan = write_input(home, {"a.parquet": prompts(4).select(["prompt"])}, 4)
    planned = make_plan(make_context(home, plan, pools=specs, **keys), plan)
    context = planned.context
    document = {
        "at": AT.isoformat(),
        "pools": [
            {"pool": name, "settled": settled, "failed": 5, "down": "gone" if down else None}
            for name, (settled, down) in beats.items()
        ],
    }
    context.scratch.replace("progress/r001-s000.json", json.dumps(document).encode())
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.slept_s >= stop_after_s:
            context.scratch.replace(stopping.FILE, b"stop")

    wait_out(context, 2, planned.lots, there=lambda _: clock.slept_s >= back_after_s, now=clock.now, sleep=sleep)
    told = [context.scratch.read(entry.name).decode() for entry in context.scratch.list("progress/r002")]
    return clock.slept_s, " ".join(told)


def test_pools_that_answered_are_waited_for_until_one_is_back(tmp_path: Path) -> None:
    """However many there are: the next round begins soon after the first answers, and meanwhile people are told."""
    slept_s, told = waited(tmp_path, {"near": (3, True), "far": (0, True)}, back_after_s=20)
    assert 20 <= slept_s <= 60
    assert "nobody answers; waiting for it until 00:10:00 UTC" in told


def test_the_wait_ends(tmp_path: Path) -> None:
    """With the job's patience, and with its deadline."""
    gone = {"near": (3, True)}
    assert waited(tmp_path / "a", gone)[0] == pytest.approx(600, abs=1)
    assert waited(tmp_path / "b", gone, patience_s=90.0)[0] == pytest.approx(90, abs=1)
    assert waited(tmp_path / "c", gone, deadline_at=AT + timedelta(seconds=40))[0] == pytest.approx(40, abs=1)


def test_who_is_asked_to_stop_does_not_wait(tmp_path: Path) -> None:
    """A signal ends the wait at once."""
    stopping.request()
    try:
        assert waited(tmp_path, {"near": (3, True)})[0] == 0
    finally:
        stopping.clear()


def test_a_worker_in_another_process_hears_that_the_driver_was_stopped(tmp_path: Path) -> None:
    """The driver says so in the scratch; no shift is at work that would look there."""
    try:
        slept_s, _ = waited(tmp_path, {"near": (3, True)}, stop_after_s=5)
        assert 5 <= slept_s <= 10
    finally:
        stopping.clear()


def _own(name: str) -> PoolSpec:
    return replace(pool(name), kind="vllm", base_url=None)


@pytest.mark.parametrize("why", ["never", "another", "unasked", "own", "rehearsal", "placement"])
def test_nobody_is_waited_for(tmp_path: Path, why: str) -> None:
    """Where no pool ever answered, another is well or was not asked yet, what is gone cannot come back by itself, and
    where nothing is sent at all. Who may not serve what is left is no reason either way."""
    near, far = (replace(pool(name), base_url="http://127.0.0.1:9/v1") for name in ("near", "far"))
    match why:
        case "never":
            assert waited(tmp_path, {"near": (0, True)}) == (0, "")
        case "another":
            assert waited(tmp_path, {"near": (3, True), "far": (3, False)}) == (0, "")
        case "unasked":
            assert waited(tmp_path, {"near": (3, True)}, pools=(near, far)) == (0, "")
        case "own":
            assert waited(tmp_path, {"near": (3, True)}, pools=(_own("near"),)) == (0, "")
        case "rehearsal":
            assert waited(tmp_path, {"near": (3, True)}, rehearse=True) == (0, "")
        case "placement":
            elsewhere = replace(far, models={"k": "k"})
            slept_s, _ = waited(tmp_path, {"near": (3, True)}, pools=(near, elsewhere), patience_s=30.0)
            assert slept_s == pytest.approx(30, abs=1)


def test_a_run_outlives_an_outage_of_all_its_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt is answered in one start although nobody answered for a while."""
    monkeypatch.setattr(outage, "_FIRST_S", 0.1)
    with ChaosDouble(["tiny"], {}, seed=1, dies_after=20, revives_after_s=1.5) as double:
        job = make_job(tmp_path, prompts(60), [remote("near", double.base_url)])
        summary = run(job)
    assert (summary.status, summary.served, summary.dead) == ("complete", 60, {})
    check_conserved(written(job), 60)
