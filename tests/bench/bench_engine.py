"""Engine efficiency: `bidbeam run` against a bare vLLM loop on the same prompts in the best order."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_engine import BareEngine
from smollm import model_dir, run_job, texts, token_ids, write_engine_job

PREFIXES, PREFIX_TOKENS, UNIQUE_TOKENS, ANSWER_TOKENS = 64, 128, 32, 16
ENGINE = {"block_size": 32, "max_model_len": 1024, "max_num_seqs": 64}
SAMPLING = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
ROUNDS = 3


@pytest.fixture(scope="module")
def bare() -> Iterator[BareEngine]:
    engine = BareEngine(model_dir(), ENGINE, cores=sorted(os.sched_getaffinity(0)))
    engine.ready()
    yield engine
    engine.close()


def test_engine_efficiency(
    benchmark: Any, figure: Callable[..., None], scaled: Callable[[int], int], bare: BareEngine, tmp_path: Path
) -> None:
    """From the first request to the last answer, against bare vLLM: the same tokens, arguments, cores, best order."""
    prompts = texts(scaled(512), PREFIXES, PREFIX_TOKENS, UNIQUE_TOKENS)
    ordered = sorted(token_ids(prompts))
    ours: list[float] = []
    theirs: list[float] = []
    cached: set[int] = set()

    def both() -> None:
        for number in range(ROUNDS):
            reference = bare.run(ordered, SAMPLING)
            theirs.append(reference.seconds)
            found = run_job(write_engine_job(tmp_path / str(number), prompts, ENGINE, SAMPLING))
            attempts = found.attempts
            assert {a["status"] for a in attempts} == {"ok"}
            assert sum(a["input_tokens"] for a in attempts) == sum(map(len, ordered))
            assert sum(a["output_tokens"] for a in attempts) == sum(reference.output_tokens)
            first, last = min(a["started_at"] for a in attempts), max(a["finished_at"] for a in attempts)
            ours.append((last - first).total_seconds())
            cached.add(sum(a["cached_tokens"] for a in attempts) - sum(reference.cached_tokens))
            print(f"\n  round {number + 1}: bidbeam {ours[-1]:.1f} s, bare {theirs[-1]:.1f} s", flush=True)

    benchmark.pedantic(both, rounds=1)
    mine, bare_s = statistics.median(ours), statistics.median(theirs)
    figure(
        "engine efficiency",
        mine / bare_s,
        f"bidbeam {mine:.1f} s, bare {bare_s:.1f} s, medians of {ROUNDS} interleaved; {len(prompts)} prompts of "
        f"{sum(map(len, ordered)) / len(ordered):.0f} tokens, {PREFIXES} prefixes; cached tokens differ by "
        f"{json.dumps(sorted(cached))}",
        most=1.05,
    )
