"""Data path: all but the engines, against DuckDB sorting the same file; and with a tokenizer, against that alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from side import Side
from small_jobs import remote, write_job
from smollm import SOURCE, model_dir

BYTES, PREFIX_BYTES, PREFIXES = 400, 200, 64
ROUNDS = 5
MIB = 1 << 20


def write_prompts(path: Path, rows: int) -> Path:
    """``rows`` prompts of 400 random letters; the first 200 are one of 64 beginnings."""
    source = np.random.default_rng(0)
    letters = source.integers(97, 123, (rows, BYTES), dtype=np.uint8)
    heads = source.integers(97, 123, (PREFIXES, PREFIX_BYTES), dtype=np.uint8)
    letters[:, :PREFIX_BYTES] = heads[source.integers(0, PREFIXES, rows)]
    offsets = pa.py_buffer(np.arange(rows + 1, dtype=np.int32) * BYTES)
    prompts = pa.Array.from_buffers(pa.string(), rows, [None, offsets, pa.py_buffer(letters.tobytes())])
    pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=65_536)
    return path


def write_rehearsal(home: Path, rows: int, **model: str) -> dict[str, Any]:
    """A job over so many prompts, and the file they are in."""
    home.mkdir()
    source = write_prompts(home / "p.parquet", rows)
    job = write_job(
        home,
        None,
        [remote("near")],
        models={"tiny": model},
        input=str(source),
        prompt={"column": "prompt", "format": "raw"},
    )
    return {"job": str(job), "source": str(source), "rows": rows}


def test_data_path(benchmark: Any, figure: Callable[..., None], scaled: Callable[[int], int], tmp_path: Path) -> None:
    """A rehearsal of 1,000,000 prompts, everything written, against COPY ... ORDER BY; its memory; and its growth."""
    sizes = sorted({scaled(rows) for rows in (10_000, 100_000, 1_000_000)})
    jobs = [write_rehearsal(tmp_path / str(rows), rows) for rows in sizes]
    largest, target = jobs[-1], str(tmp_path / "sorted.parquet")
    seconds: dict[int, list[float]] = {rows: [] for rows in sizes}
    copies: list[float] = []
    with Side("run") as run, Side("copy") as copy:

        def interleaved() -> None:
            for number in range(ROUNDS + 1):
                for job in jobs:
                    took = run.call(job=job["job"])
                    assert took["requests"] == job["rows"]
                    seconds[job["rows"]] += [took["seconds"]] if number else []  # the first round is the warm-up
                copied = copy.call(source=largest["source"], target=target)["seconds"]
                copies.extend([copied] if number else [])

        benchmark.pedantic(interleaved, rounds=1)
        peak, start_s, copy_start_s = run.peak_bytes, run.start_s, copy.start_s
    best = {rows: min(times) for rows, times in seconds.items()}
    mine, theirs = best[largest["rows"]], min(copies)
    figure(
        "data path",
        mine / theirs,
        f"rehearsal {mine:.2f} s, COPY ... ORDER BY {theirs:.2f} s, best of {ROUNDS} interleaved, "
        f"{largest['rows']:,} prompts; apart from that, start-up {start_s:.1f} s and {copy_start_s:.1f} s",
        most=6,
    )
    figure("data path, peak memory in MiB", peak / MIB, "of the process and its children", most=1536)
    each = {rows: 1e6 * best[rows] / rows for rows in sizes}
    figure(
        "data path, growth",
        max(each[b] / each[a] for a, b in itertools.pairwise(sizes)),
        "most that the time per row grows at ten times the rows; "
        + ", ".join(f"{rows:,}: {micros:.1f} µs a row" for rows, micros in each.items()),
        most=1,
    )


def test_tokenizer(benchmark: Any, figure: Callable[..., None], scaled: Callable[[int], int], tmp_path: Path) -> None:
    """The same with SmolLM2's tokenizer, in tokens a second of the whole run, beside the bare tokenizer."""
    job = write_rehearsal(tmp_path / "job", scaled(200_000), source=SOURCE)
    runs: list[dict[str, Any]] = []
    encodings: list[dict[str, Any]] = []
    with Side("run") as run, Side("encode") as encode:

        def interleaved() -> None:
            for _ in range(3):
                runs.append(run.call(job=job["job"]))
                encodings.append(encode.call(source=job["source"], model=model_dir()))

        benchmark.pedantic(interleaved, rounds=1)
    assert {r["tokens"] for r in runs} == {e["tokens"] for e in encodings}
    mine, theirs = (max(one["tokens"] / one["seconds"] for one in side) for side in (runs, encodings))
    figure(
        "data path with a tokenizer",
        mine / theirs,
        f"{mine / 1e6:.2f} million tokens/s in the whole run, {theirs / 1e6:.2f} by the bare tokenizer, "
        f"{job['rows']:,} prompts, best of 3 interleaved",
    )
