"""Whole runs on real engines: vLLM in the worker and a real vLLM server behind HTTP, held against bare vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bare_engine import BareEngine
from small_jobs import DAY, Written, by_the_hour, check_conserved, remote, total, write_job, written
from tiny_model import tiny_model
from tokenizers import Tokenizer
from vllm_server import Starting, VllmServer

from bidbeam.connectors import registry
from bidbeam.connectors.vllm_engine import VllmEngine
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job
from bidbeam.pipelines.summary import RunSummary
from bidbeam.transforms.accelerator_time import AcceleratorMeter

pytestmark = pytest.mark.engine

BLOCK = 32
ENGINE = {"block_size": BLOCK, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SPECULATING = ENGINE | {"speculative_config": DRAFTS, "disable_log_stats": False}
INSTRUCTIONS = (
    "Describe the product in two short sentences for a shop's page. Name what it is made of and whom it is for. "
    "Write plainly, use no exclamation marks, and never promise what the sheet does not say. Shelf"
)
WORDS = "kettle lamp brass linen shade steel red kitchen ticket parcel shipping returns billing report reader".split()


# -- what stands behind the pools, and what the answers are held against --


@pytest.fixture(scope="session")
def processes() -> Iterator[tuple[Starting, BareEngine]]:
    """A vLLM server and a bare engine of the tiny model: started together, so that they load side by side."""
    with contextlib.ExitStack() as stack:
        bare = BareEngine(tiny_model(), ENGINE, cores=sorted(os.sched_getaffinity(0)))
        stack.callback(bare.close)
        server = Starting(tiny_model(), ("tiny", "vendor/tiny"), {"block_size": BLOCK, "max_num_seqs": 16})
        stack.callback(server.stop)
        yield server, bare


@pytest.fixture(scope="session")
def server(processes: tuple[Starting, BareEngine]) -> VllmServer:
    return processes[0].ready()


@pytest.fixture(scope="session")
def bare(processes: tuple[Starting, BareEngine]) -> Callable[..., list[str]]:
    """Greedy answers of the bare engine to texts, as one user message each."""
    tokenizer = Tokenizer.from_file(f"{tiny_model()}/tokenizer.json")

    def answer(texts: Sequence[str], max_tokens: int) -> list[str]:
        chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts]
        prompts = [tokenizer.encode(chat, add_special_tokens=False).ids for chat in chats]
        return processes[1].run(prompts, {"max_tokens": max_tokens, "temperature": 0}).outputs

    return answer


@pytest.fixture(scope="module")
def kept_engines() -> Iterator[pytest.MonkeyPatch]:
    """Runs in this process leave their engines to the next test, which would load the same ones; closed at the end."""
    with pytest.MonkeyPatch.context() as patch:
        close = registry.close_all
        patch.setattr(registry, "close_all", lambda: None)
        yield patch
        close()


def own_pool(**keys: Any) -> dict[str, Any]:
    return by_the_hour("own", **{"engine": ENGINE, "placement": {"operator": "own"}, **keys})


def items(count: int, *, shelves: int = 4, seed: int = 5) -> list[str]:
    """Prompts of ``shelves`` long beginnings, shuffled, all different."""
    source = random.Random(seed)
    texts = [f"{INSTRUCTIONS} {n % shelves}, item {n}: {' '.join(source.choices(WORDS, k=4))}" for n in range(count)]
    return source.sample(texts, count)


def job_of(path: Path) -> Job:
    return Job.from_yaml(path, run_date=DAY)


def run(path: Path) -> tuple[RunSummary, Written]:
    job = job_of(path)
    summary = run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
    return summary, written(job)


def children() -> set[int]:
    """Every living descendant of this process."""
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def quantity(found: Written, pool: str, meter: str) -> Decimal:
    return total([c for c in found.rows("charges") if (c["pool"], c["meter"]) == (pool, meter)], "quantity")


# -- three pools at once --


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory, server: VllmServer) -> Iterator[Any]:
    """One run over an engine of ours and two endpoints of one server, Parquet and Arrow input; and what it left."""
    home = tmp_path_factory.mktemp("market")
    rows = market_rows()
    (home / "in").mkdir()
    pq.write_table(rows.slice(0, 70), home / "in" / "a.parquet", row_group_size=16)
    with pa.ipc.new_file(home / "in" / "b.arrow", rows.schema) as writer:
        writer.write_table(rows.slice(70), max_chunksize=25)
    pools = [
        own_pool(),
        remote("near", server.base_url, models={"tiny": "vendor/tiny"}, placement={"operator": "cloud"}),
        remote(
            "far",
            server.base_url,
            price={"input": "0.05", "output": "0.30"},
            placement={"operator": "community"},
        ),
    ]
    path = write_job(
        home,
        None,
        pools,
        models={"tiny": {"source": tiny_model()}},
        input=[str(home / "in" / "*.parquet"), str(home / "in" / "*.arrow")],
        baseline={"name": "list", "input": "1", "output": "4", "per": "1M tokens"},
    )
    clocked = Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        close, take = AcceleratorMeter.close, AcceleratorMeter.take_setup

        def noted_close(self: AcceleratorMeter, now_ms: int | None = None) -> tuple[int, int]:
            busy, idle = close(self, now_ms)
            clocked.update(accelerator_second=busy, accelerator_idle_second=idle)
            return busy, idle

        def noted_take(self: AcceleratorMeter) -> int:
            setup = take(self)
            clocked.update(setup=setup)
            return setup

        patch.setattr(AcceleratorMeter, "close", noted_close)
        patch.setattr(AcceleratorMeter, "take_setup", noted_take)
        before, alive, started = server.counters(), children(), time.monotonic()
        summary, found = run(path)
        took = time.monotonic() - started
        after = server.counters()
        yield Market(rows, summary, found, {k: after[k] - before[k] for k in after}, clocked, took, children() - alive)


class Market:
    """The run of ``market``: its input, what it left, what the server and the accelerator's clock counted meanwhile."""

    def __init__(
        self,
        rows: pa.Table,
        summary: RunSummary,
        found: Written,
        served: Mapping[str, int],
        clocked: Mapping[str, int],
        took_s: float,
        left_alive: set[int],
    ) -> None:
        self.rows, self.summary, self.found, self.served = rows.to_pylist(), summary, found, served
        self.clocked, self.took_s, self.left_alive = clocked, took_s, left_alive
        self.attempts = found.attempts
        self.outputs = {row["request_id"]: row for row in found.outputs.to_pylist()}


def market_rows() -> pa.Table:
    """A third for each pool, by placement: greedy rows, some of them asked twice, sampled rows, several samples."""
    operators = {"own": "own", "near": "cloud", "far": "community"}
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(items(96)):
        pool = list(operators)[number % 3]
        row = {"prompt": text, "operator": pool, "placement": json.dumps({"operators": [operators[pool]]})}
        if number % 8 == 7:
            row |= {"temperature": 0.8, "seed": number, "max_tokens": 5}
        if number % 24 == 9:
            row |= {"temperature": 1.0, "seed": 3, "n": 3}  # of the pool ``own``
        rows += [row, row] if number % 6 == 2 else [row]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("prompt", pa.string()),
            ("operator", pa.dictionary(pa.int8(), pa.string())),
            ("placement", pa.string()),
            ("temperature", pa.float64()),
            ("seed", pa.int64()),
            ("max_tokens", pa.int32()),
            ("n", pa.int16()),
        ]
    )
    return pa.Table.from_pylist([{"id": f"q{i:03d}", **row} for i, row in enumerate(rows)], schema=schema)


def test_three_pools_at_once_answer_every_row(market: Market) -> None:
    """Own engine and two endpoints serve their rows at the same time; rows and money are conserved."""
    assert market.summary.exit_code == 0
    assert len(market.outputs) == len(market.rows)
    check_conserved(market.found, len(market.rows))
    asked = {row["id"]: row for row in market.rows}
    assert {(asked[i]["operator"], row["pool"]) for i, row in market.outputs.items()} == {
        ("own", "own"),
        ("near", "near"),
        ("far", "far"),
    }
    spans = [
        (min(a["started_at"] for a in mine), max(a["finished_at"] for a in mine))
        for pool in ("own", "near", "far")
        if (mine := [a for a in market.attempts if a["pool"] == pool])
    ]
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_answers_are_those_of_the_bare_engine(market: Market, bare: Callable[..., list[str]]) -> None:
    """Greedy answers equal bare vLLM's by request id, whichever pool gave them; several samples come as a list."""
    greedy = [row for row in market.rows if row["temperature"] is None]
    expected = bare([row["prompt"] for row in greedy], max_tokens=8)
    assert {row["id"]: market.outputs[row["id"]]["output"] for row in greedy} == dict(
        zip([row["id"] for row in greedy], expected, strict=True)
    )
    for row in market.rows:
        output = market.outputs[row["id"]]
        if row["n"] == 3:
            assert output["output"] == output["samples"][0]
            assert (len(output["samples"]), output["output_tokens"] <= 24) == (3, True)
        else:
            assert output["samples"] is None
            assert output["output_tokens"] <= (row["max_tokens"] or 8)


def test_each_question_is_bought_once(market: Market) -> None:
    """One attempt for each distinct greedy row and each sampled row, none failed; the rest share and cost nothing."""
    distinct = {
        (row["operator"], row["prompt"], row["id"] if row["temperature"] else None): row["operator"]
        for row in market.rows
    }
    assert Counter(a["pool"] for a in market.attempts) == Counter(distinct.values())
    assert {(a["status"], a["kind"], a["usage_source"]) for a in market.attempts} == {("ok", "primary", "reported")}
    assert {a["endpoint_host"] for a in market.attempts if a["pool"] == "own"} == {None}
    assert all("127.0.0.1" in a["endpoint_host"] for a in market.attempts if a["pool"] != "own")
    shared = [row for row in market.found.rows("requests") if row["shared_with"] is not None]
    assert len(shared) == len(market.rows) - len(distinct) > 0
    assert {row["cost"] for row in shared} == {Decimal(0)}


def test_the_ledger_counts_what_the_server_counts(market: Market) -> None:
    """Prompt, cached and generated tokens of the endpoints' attempts equal the server's own counters, exactly."""
    bought = [a for a in market.attempts if a["pool"] in {"near", "far"}]
    booked = {name: sum(a[name] for a in bought) for name in ("input_tokens", "cached_tokens", "output_tokens")}
    assert booked["cached_tokens"] > 0
    assert market.served == {
        **booked,
        "queried_tokens": booked["input_tokens"],
        "requests": len(bought),
    }
    assert all(a["recount_input_tokens"] == a["input_tokens"] for a in bought)


def test_bills_are_exact(market: Market) -> None:
    """Each endpoint's bill is its tokens times its prices; the own pool's is its clock, setup and idling included."""
    million = Decimal(1_000_000)
    for pool, prices in {"near": ("0.10", "0.01", "0.40"), "far": ("0.05", "0.05", "0.30")}.items():
        mine = [a for a in market.attempts if a["pool"] == pool]
        cached = sum(a["cached_tokens"] for a in mine)
        tokens = (sum(a["input_tokens"] for a in mine) - cached, cached, sum(a["output_tokens"] for a in mine))
        bill = sum(count * Decimal(price) for count, price in zip(tokens, prices, strict=True)) / million
        assert total([c for c in market.found.rows("charges") if c["pool"] == pool]) == bill
    milliseconds = {meter: quantity(market.found, "own", meter) * 1000 for meter in market.clocked}
    assert milliseconds == {meter: Decimal(ms) for meter, ms in market.clocked.items()}
    assert milliseconds["accelerator_second"] > 0
    assert milliseconds["setup"] > 0
    assert sum(milliseconds.values()) <= market.took_s * 1000
    per_second = (Decimal("0.71") / 3600).quantize(Decimal("1e-15"))
    own = total([c for c in market.found.rows("charges") if c["pool"] == "own"])
    assert own == sum(milliseconds.values()) * per_second / 1000


def test_a_run_leaves_no_process_behind(market: Market) -> None:
    """When the run is over, so is its engine's process."""
    assert market.left_alive == set()
