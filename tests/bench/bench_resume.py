"""Resume costs: starting a finished run again, and one that was cut short, against the run itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_data_path import write_rehearsal
from side import Side

ROUNDS = 3


def test_resume(benchmark: Any, figure: Callable[..., None], scaled: Callable[[int], int], tmp_path: Path) -> None:
    """A rehearsal of 1,000,000 prompts; started again once it has ended; and once it was cut short in the middle."""
    job = write_rehearsal(tmp_path / "job", scaled(1_000_000))
    whole: list[dict[str, Any]] = []
    ended: list[dict[str, Any]] = []
    cut: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    with Side("run") as run:
        run.call(job=job["job"])  # warm

        def once() -> None:
            for _ in range(ROUNDS):
                whole.append(run.call(job=job["job"]))
                ended.append(run.call(job=job["job"], keep=True))
                # As a crash half-way leaves it: half of what was settled is in the journal.
                cut.append(run.call(job=job["job"], crash=True))
                rest.append(run.call(job=job["job"], keep=True))

        benchmark.pedantic(once, rounds=1)
        peak = run.peak_bytes
    assert {one["status"] for one in ended} == {"nothing_to_do"}
    assert {one["sent"] for one in ended} == {0}
    assert {one["sent"] for one in whole} == {job["rows"]}
    kept = job["rows"] - max(one["sent"] for one in rest)
    assert kept > 0
    mine, best = min(one["seconds"] for one in ended), min(one["seconds"] for one in whole)
    figure(
        "resume, finished",
        mine / best,
        f"started again {mine:.2f} s, the run {best:.2f} s, best of {ROUNDS}; {job['rows']:,} prompts, none sent again",
        most=1 / 3,
    )
    again = min(one["seconds"] for one in rest)
    figure(
        "resume, cut short",
        again / best,
        f"{again:.2f} s for the rest after a crash at {cut[0]['seconds']:.2f} s; {kept:,} of {job['rows']:,} answers "
        f"were journalled and not asked again; peak memory {peak / 2**20:.0f} MiB",
    )
