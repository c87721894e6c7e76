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
CORES = sorted(os.sched_getaffinity(0))
OURS, THEIRS = (CORES[: len(CORES) // 2] or CORES), CORES[len(CORES) // 2 :]
"""Cores of the engines here and of the server: two CPU engines on one core are many times slower."""
ENGINE = {"block_size": BLOCK, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20, "cores": OURS}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SPECULATING = ENGINE | {"speculative_config": DRAFTS, "disable_log_stats": False}
INSTRUCTIONS = (
    "Describe the product in two short sentences for a shop's page. Name what it is made of and whom it is for. "
    "Write plainly, use no exclamation marks, and never promise what the sheet does not say. Shelf"
)
WORDS = (
    "kettle",
    "lamp",
    "brass",
    "linen",
    "shade",
    "steel",
    "red",
    "kitchen",
    "parcel",
    "returns",
    "report",
    "reader",
)


# -- what stands behind the pools, and what the answers are held against --


@pytest.fixture(scope="session")
def processes() -> Iterator[tuple[Starting, BareEngine]]:
    """A vLLM server and a bare engine of the tiny model: started together, so that they load side by side."""
    with contextlib.ExitStack() as stack:
        bare = BareEngine(tiny_model(), ENGINE, cores=OURS)
        stack.callback(bare.close)
        options = {"block_size": BLOCK, "max_num_seqs": 16}
        server = Starting(tiny_model(), ["tiny", "vendor/tiny"], options, cores=THEIRS)
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


# -- what the job file passes through to the engine of our own --


def speculating_job(
    home: Path, rows: Sequence[Mapping[str, Any]], *others: dict[str, Any], max_tokens: int = 8
) -> Path:
    """A job whose own engine drafts tokens; fast enough on paper to win every lot."""
    own = own_pool(engine=SPECULATING, capacity={"tokens_per_second": 100_000})
    return write_job(
        home,
        pa.Table.from_pylist([{"id": f"q{i:03d}", **row} for i, row in enumerate(rows)]),
        [own, *others],
        models={"tiny": {"source": tiny_model()}},
        sampling={"max_tokens": max_tokens, "temperature": 0},
    )


def own_engine() -> VllmEngine:
    """The engine that a run in this process has left in the registry."""
    (slot,) = (s for s in registry._registry._engines.values() if isinstance(s.engine, VllmEngine))
    return slot.engine


def test_schemas_and_speculation_pass_through_the_job_file(
    tmp_path: Path, kept_engines: pytest.MonkeyPatch, bare: Callable[..., list[str]]
) -> None:
    """A row's JSON schema binds its answer, drafted tokens are used, and plain greedy answers stay what they were."""
    wanted = json.dumps(
        {"type": "json_schema", "json_schema": {"name": "kind", "schema": {"enum": ["kettle", "lamp"]}}}
    )
    texts = items(16, shelves=2)
    rows = [{"prompt": text, "response_format": wanted if i % 2 else None} for i, text in enumerate(texts)]
    summary, found = run(speculating_job(tmp_path, rows, max_tokens=32))
    assert summary.exit_code == 0
    check_conserved(found, len(rows))
    outputs = [row["output"] for row in found.outputs.sort_by("request_id").to_pylist()]
    for answer in outputs[1::2]:
        assert json.loads(answer) in {"kettle", "lamp"}
    assert outputs[::2] == bare(texts[::2], max_tokens=32)
    assert own_engine().stats()["vllm:spec_decode_num_draft_tokens"] > 0


# -- when an engine dies --


@pytest.fixture
def killed_engines(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """The first engines that have answered a request are killed, one unless the test asks for more; their ids."""
    killed: list[int] = []
    poll, most = VllmEngine.poll, getattr(request, "param", 1)

    def deadly(self: VllmEngine) -> list[pa.RecordBatch]:
        batches = poll(self)
        if any(batch.num_rows for batch in batches) and len(killed) < most and self._process.pid not in killed:
            killed.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)
        return batches

    monkeypatch.setattr(VllmEngine, "poll", deadly)
    return killed


def test_an_engine_that_dies_is_loaded_again(
    tmp_path: Path, kept_engines: pytest.MonkeyPatch, killed_engines: list[int], bare: Callable[..., list[str]]
) -> None:
    """After SIGKILL in the middle of its work it is started again; every row is answered, right, by the new one."""
    texts = items(40, seed=6)
    summary, found = run(speculating_job(tmp_path, [{"prompt": text} for text in texts]))
    assert summary.exit_code == 0
    # Nobody waited for another auction.
    assert {row["round"] for row in found.rows("awards")} == {1}
    check_conserved(found, len(texts))
    outputs = {row["request_id"]: row["output"] for row in found.outputs.to_pylist()}
    assert [outputs[f"q{i:03d}"] for i in range(40)] == bare(texts, max_tokens=8)
    died = [a for a in found.attempts if a["status"] != "ok"]
    assert {a["round"] for a in died} == {1}
    assert 0 < len(died) <= ENGINE["max_num_seqs"] + 8  # what its window held
    retried = {a["request_id"] for a in found.attempts if a["kind"] == "retry" and a["status"] == "ok"}
    assert retried == {a["request_id"] for a in died}
    assert len(found.attempts) == len(texts) + len(died)
    (first,) = killed_engines
    assert not psutil.pid_exists(first)
    assert own_engine()._process.pid != first


@pytest.mark.parametrize("killed_engines", [2], indirect=True)
def test_an_engine_that_dies_twice_hands_its_lots_to_the_runner_up(
    tmp_path: Path, kept_engines: pytest.MonkeyPatch, killed_engines: list[int], server: VllmServer
) -> None:
    """What it was not asked for by its second death moves to the endpoint in the same round, what it dropped then in
    the next."""
    texts = items(120, seed=7)
    near = remote("near", server.base_url, models={"tiny": "vendor/tiny"})
    before = server.counters()
    summary, found = run(speculating_job(tmp_path, [{"prompt": text} for text in texts], near))
    assert summary.exit_code == 0
    check_conserved(found, len(texts))
    by_pool = Counter((a["pool"], a["round"]) for a in found.attempts if a["status"] == "ok")
    dropped = sum(a["status"] != "ok" for a in found.attempts)
    assert by_pool["own", 1] > 0
    assert by_pool["near", 1] > 0
    assert dropped > by_pool["near", 2] > 0
    assert len(killed_engines) == 2
    assert sum(by_pool.values()) == len(texts)
    assert server.counters()["requests"] - before["requests"] == by_pool["near", 1] + by_pool["near", 2]
    assert {row["pool"] for row in found.rows("awards") if row["round"] == 1} == {"own"}


# -- when the run itself is stopped --


class Cli:
    """``bidbeam run`` as a process of its own; a variable marks it and everything that comes of it."""

    def __init__(self, job: Path) -> None:
        self.mark = f"BIDBEAM_TEST_RUN={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(job), "--run-date", str(DAY), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {name: value},
            start_new_session=True,
        )

    def ends(self, timeout_s: float = 90) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def family(self) -> list[psutil.Process]:
        """Itself and every process that comes of it, orphans included, as long as they live."""
        found = []
        name, _, value = self.mark.partition("=")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def __enter__(self) -> Cli:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.communicate()


def wait_until(true: Callable[[], object], cli: Cli, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert cli.process.poll() is None, cli.process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stopped_run_leaves_no_orphan_and_resumes(tmp_path: Path, server: VllmServer) -> None:
    """SIGTERM ends a run with 4 and says how to go on, SIGKILL ends it too; no process outlives either, and the next
    start finishes the run without asking for anything again that was answered."""
    operators = ["own", "cloud"]
    rows = [
        {"id": f"q{i:03d}", "prompt": text, "placement": json.dumps({"operators": [operators[i % 2]]})}
        for i, text in enumerate(items(72, seed=8))
    ]
    path = write_job(
        tmp_path,
        pa.Table.from_pylist(rows),
        [
            own_pool(engine=ENGINE | {"max_num_seqs": 2}),
            remote("near", server.base_url, placement={"operator": "cloud"}, capacity={"concurrency": 2}),
        ],
        models={"tiny": {"source": tiny_model()}},
        sampling={"max_tokens": 160, "temperature": 0, "ignore_eos": True},
    )
    job = job_of(path)
    journal = tmp_path / "out" / f"run_date={DAY}" / f"run_id={job.run_id}" / "_journal"
    before = server.counters()

    for start, stop in enumerate([signal.SIGTERM, signal.SIGKILL], 1):
        with Cli(path) as cli:
            wait_until(lambda at=start: [*journal.glob(f"start-{at:03d}/segments/*")], cli)
            assert len(cli.family()) > 1
            cli.process.send_signal(stop)
            code, _, err = cli.ends()
            if stop == signal.SIGTERM:
                assert code == 4
                assert "The same command resumes" in err
                assert cli.family() == []
            _, alive = psutil.wait_procs(cli.family(), timeout=20)
            assert alive == []

    with Cli(path) as cli:
        code, out, err = cli.ends()
        assert code == 0, err
        assert json.loads(out)["requests"] == len(rows)
        assert cli.family() == []
    found = written(job)
    check_conserved(found, len(rows))
    served = Counter(a["request_id"] for a in found.attempts if a["status"] == "ok")
    assert served == dict.fromkeys((row["id"] for row in rows), 1)
    near = [a for a in found.attempts if a["pool"] == "near" and a["status"] == "ok"]
    asked = server.counters()["requests"] - before["requests"]
    # Twice the concurrency is in flight at most when a start is killed; only that much may be asked for again.
    assert len(near) <= asked <= len(near) + 2 * 2


def test_a_signal_while_engines_load_ends_the_run(tmp_path: Path) -> None:
    """SIGINT before anything was sent ends the run with 4 without waiting for the engine, and takes it along."""
    path = write_job(
        tmp_path,
        pa.table({"id": ["q0"], "prompt": [items(1)[0]]}),
        [own_pool()],
        models={"tiny": {"source": tiny_model()}},
    )
    with Cli(path) as cli:
        wait_until(lambda: [*tmp_path.glob("out/*/*/_journal/start-001/progress/*")], cli)
        cli.process.send_signal(signal.SIGINT)
        code, _, err = cli.ends()
        assert code == 4
        assert "The same command resumes" in err
        assert cli.family() == []


def test_a_model_that_does_not_load_costs_nothing(tmp_path: Path, server: VllmServer) -> None:
    """A damaged model ends a run with 2 and the reason before an endpoint is asked anything, however it is priced."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny_model()).iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    rows = [
        {"id": f"q{i}", "prompt": text, "placement": json.dumps({"operators": [["own", "cloud"][i % 2]]})}
        for i, text in enumerate(items(8))
    ]
    prices = [{"accelerator_hour": "0.71"}, {"input": "0.01", "output": "0.02", "per": "1M tokens", "currency": "USD"}]
    before = server.counters()
    with contextlib.ExitStack() as stack:
        runs = []
        for number, (price, cores) in enumerate(zip(prices, (OURS, THEIRS), strict=True)):
            path = write_job(
                tmp_path / str(number),
                pa.Table.from_pylist(rows),
                [
                    own_pool(price=price, engine=ENGINE | {"cores": cores}),
                    remote("near", server.base_url, placement={"operator": "cloud"}),
                ],
                models={"tiny": {"source": str(broken)}},
            )
            runs.append(stack.enter_context(Cli(path)))
        for cli in runs:
            code, out, err = cli.ends()
            assert code == 2, err
            assert cli.family() == []
            assert "'own'" in err
            assert str(broken) in err
            assert json.loads(out)["error"]["exit_code"] == 2
    assert server.counters() == before
