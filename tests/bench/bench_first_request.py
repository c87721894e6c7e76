"""First request: what `bidbeam run` takes from being called to its first request, apart from loading the engine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from small_jobs import DAY, by_the_hour, write_job
from smollm import SOURCE

from bidbeam.connectors.store import Store
from bidbeam.transforms.journal import list_segments, read_segment

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
        command = [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(job), "--run-date", str(DAY), "--quiet"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not (segments := [*job.parent.glob("out/*/*/_journal/*/segments/*.arrow")]):
                assert process.poll() is None
                time.sleep(0.1)
            # The first answers are in; the engine goes with its parent.
            process.kill()
        journal = Store.at(str(segments[0].parents[2]))
        rows, _ = read_segment(journal, list_segments(journal)[0])
        first = pc.min(rows.filter(pc.is_valid(rows.column("tag"))).column("started_at")).as_py()
        apart.append(((first - began).total_seconds(), float(pc.sum(rows.column("q_setup")).as_py())))

    benchmark.pedantic(once, rounds=ROUNDS)
    whole, loading = min(apart, key=lambda times: times[0] - times[1])
    figure(
        "first request",
        whole - loading,
        f"seconds; first request after {whole:.1f} s, of which the engine loaded for {loading:.1f} s, best of {ROUNDS}",
        most=5,
    )
