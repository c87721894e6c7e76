"""First request: what `bidbeam run` takes from being called to its first request, apart from loading the engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from small_jobs import DAY, by_the_hour, total, write_job, written
from smollm import SOURCE

from bidbeam.pipelines.job import Job

DEMO = Path(__file__).parents[2] / "examples" / "demo"
ROUNDS = 3


def test_first_request(benchmark: Any, figure: Callable[..., None], tmp_path: Path) -> None:
    """From the start of the process to the first request sent, less what the engine took to load; the demo's input."""
    prompts = tmp_path / "prompts"
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from make_prompts import write; write(Path(sys.argv[1]))",
            prompts,
        ],
        check=True,
        cwd=DEMO,
    )
    apart: list[tuple[float, float]] = []

    def once() -> None:
        job = write_job(
            tmp_path / str(len(apart)),
            None,
            [by_the_hour("own", engine={"block_size": 32, "max_model_len": 2048})],
            models={"tiny": {"source": SOURCE}},
            input=[str(prompts / "*.parquet"), str(prompts / "*.arrow")],
            prompt={"id": "request_id", "column": "messages"},
        )
        began = datetime.now(UTC)
        subprocess.run(
            [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(job), "--run-date", str(DAY), "--quiet"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = written(Job.from_yaml(job, run_date=DAY))
        first = min(attempt["started_at"] for attempt in found.attempts)
        loading = total([c for c in found.rows("charges") if c["meter"] == "setup"], "quantity")
        apart.append(((first - began).total_seconds(), float(loading)))

    benchmark.pedantic(once, rounds=ROUNDS)
    whole, loading = min(apart, key=lambda times: times[0] - times[1])
    figure(
        "first request",
        whole - loading,
        f"seconds; first request after {whole:.1f} s, of which the engine loaded for {loading:.1f} s, best of {ROUNDS}",
        most=5,
    )
