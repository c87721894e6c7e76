"""Cache: what a run's order gets out of a KV cache far too small for its prefixes, beside arrival order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_engine import BareEngine
from smollm import model_dir, run_job, texts, token_ids, write_engine_job

PREFIX_TOKENS, UNIQUE_TOKENS, PROMPTS_A_PREFIX = 64, 4, 4
ENGINE = {
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 48,  # eight running prompts and a dozen prefixes
}
MAX_TOKENS = 1


@pytest.mark.parametrize("prefixes", [64, 256, 512])
def test_cache(
    benchmark: Any, figure: Callable[..., None], scaled: Callable[[int], int], tmp_path: Path, prefixes: int
) -> None:
    """Cached tokens over the run's ideal, on shuffled input; the same input as it comes, on bare vLLM, beside it."""
    # One token, and one that shows: an answer of white space alone is none, and would be asked for again.
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 0, "allowed_token_ids": token_ids(["x"])[0][:1]}
    prompts = texts(scaled(prefixes * PROMPTS_A_PREFIX), prefixes, PREFIX_TOKENS, UNIQUE_TOKENS)
    manifest = benchmark.pedantic(
        lambda: run_job(write_engine_job(tmp_path, prompts, ENGINE, sampling)).manifest, rounds=1
    )
    bare = BareEngine(model_dir(), ENGINE, cores=sorted(os.sched_getaffinity(0)))
    try:
        as_it_comes = sum(bare.run(token_ids(prompts), sampling).cached_tokens)
    finally:
        bare.close()
    ideal = manifest["ideal_cached_tokens"]
    figure(
        f"cache, {prefixes} prefixes",
        manifest["cached_tokens"] / ideal,
        f"{manifest['cached_tokens']:,} of {ideal:,} tokens; in arrival order {as_it_comes / ideal:.3f} of the ideal",
        least=0.98,
    )
    figure(f"arrival order, {prefixes} prefixes", as_it_comes / ideal, "of the ideal, bare vLLM", most=2 / 3)
