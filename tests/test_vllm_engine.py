"""The vLLM engine in its child process, for real: answers, cache, failures, and that it never outlives its parent."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from tiny_model import CONTEXT, VOCAB, tiny_model

from bidbeam.connectors.engine import REQUEST_FIELDS, RESULT_SCHEMA, Engine
from bidbeam.connectors.errors import ConfigError, ModelError, PoolDown
from bidbeam.connectors.registry import Registry
from bidbeam.connectors.vllm_engine import VllmConfig, VllmEngine

pytestmark = pytest.mark.engine

BLOCK = 32
SMALL_CACHE_BLOCKS = 24
ENGINE = {"block_size": BLOCK, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20}
TIGHT = ENGINE | {
    "num_gpu_blocks_override": SMALL_CACHE_BLOCKS,
    "max_num_seqs": 2,
    "max_model_len": 512,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    "disable_log_stats": False,
    "cores": [min(os.sched_getaffinity(0))],
    "env": {"BIDBEAM_TEST_MARK": "here"},
}
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


def text(**sampling: Any) -> str:
    """A sampling object as the canonical JSON that requests carry."""
    return json.dumps(GREEDY | sampling, sort_keys=True)


def requests(
    prompts: Sequence[list[int] | None], sampling: str | Sequence[str] | None = None, salt: str | None = None
) -> pa.RecordBatch:
    """A batch of requests, tagged 0, 1, ...; ``sampling`` is one text for all or one each."""
    count = len(prompts)
    texts = [sampling or text()] * count if sampling is None or isinstance(sampling, str) else list(sampling)
    columns = {
        "tag": list(range(count)),
        "attempt_id": [uuid.uuid4().bytes for _ in prompts],
        "input_tokens": [len(prompt or ()) for prompt in prompts],
        "max_tokens": [json.loads(one).get("max_tokens", 7) for one in texts],
        "sampling": texts,
        "cache_salt": [salt] * count,
        "tokens": prompts,
    }
    return pa.record_batch([pa.array(columns[name], REQUEST_FIELDS[name]) for name in columns], names=list(columns))


def drive(engine: VllmEngine, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Runs a batch as a shift does (room, wake, poll) and returns the rows in the order in which they came back."""
    woken = threading.Event()
    engine.listen(woken.set)
    rows: list[dict[str, Any]] = []
    sent = 0
    while len(rows) < batch.num_rows:
        woken.clear()
        for result in engine.poll():
            assert result.schema == RESULT_SCHEMA
            rows += result.to_pylist()
        count = min(engine.room, batch.num_rows - sent)
        if count:
            engine.submit(batch.slice(sent, count))
            sent += count
        elif len(rows) < batch.num_rows:
            assert woken.wait(60)
    assert engine.in_flight == 0
    return rows


def by_tag(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["tag"])


def shared_prompts(prefixes: int, each: int, prefix: int = 100, suffix: int = 20, seed: int = 1) -> list[list[int]]:
    """Prompts of ``prefixes`` groups, each with ``prefix`` tokens in common, sorted."""
    source = random.Random(seed)
    heads = [[source.randrange(3, VOCAB) for _ in range(prefix)] for _ in range(prefixes)]
    return sorted(head + [source.randrange(3, VOCAB) for _ in range(suffix)] for head in heads for _ in range(each))


def ideal_cached(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens of each prompt that a cache which forgets nothing has seen: whole blocks, never the last token."""
    seen: set[tuple[int, ...]] = set()
    cached = []
    for prompt in prompts:
        hits = 0
        for end in range(BLOCK, len(prompt), BLOCK):
            if tuple(prompt[:end]) not in seen:
                break
            hits = end
        seen.update(tuple(prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK))
        cached.append(hits)
    return cached


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    engines = Registry()
    yield engines
    engines.close_all()


@pytest.fixture
def engine(registry: Registry) -> VllmEngine:
    """The engine that most tests share."""
    engine = registry.acquire("engine", lambda: VllmEngine(VllmConfig.of("own", tiny_model(), ENGINE)))
    engine.ready(240)
    return engine


@pytest.fixture
def tight(registry: Registry) -> VllmEngine:
    """An engine with a small KV cache, speculation, its own statistics, one core and a variable of its own."""
    engine = registry.acquire("tight", lambda: VllmEngine.start(VllmConfig.of("tight", tiny_model(), TIGHT)))
    engine.ready(240)
    return engine


# -- before anything is loaded --


def test_a_configuration_is_a_key_and_pickles() -> None:
    """Equal engine mappings make equal, hashable, picklable configurations, whatever the order of their keys."""
    one = VllmConfig.of("own", "m", {"block_size": 32, "max_model_len": 64, "env": {"A": 1}, "cores": [0]})
    other = VllmConfig.of("own", "m", {"cores": [0], "env": {"A": 1}, "max_model_len": 64, "block_size": 32})
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301
    assert one.cores == (0,)
    assert one.env == (("A", "1"),)


def test_engine_arguments_pass_through_over_our_defaults() -> None:
    """What the pools file says wins over what we would choose; ``env`` and ``cores`` are not vLLM's."""
    args = VllmConfig.of("own", "m", {"enforce_eager": False, "env": {"A": "1"}, "max_num_seqs": 3}, concurrency=9)
    assert args.engine_args["enforce_eager"] is False
    assert args.engine_args["max_num_seqs"] == 3
    assert args.engine_args["enable_prefix_caching"] is True
    assert not {"env", "cores"} & args.engine_args.keys()
    assert VllmConfig.of("own", "m", {}, concurrency=9).engine_args["max_num_seqs"] == 9


@pytest.mark.parametrize("engine", [{"cores": 1}, {"cores": []}, {"cores": ["0"]}, {"env": ["A=1"]}])
def test_our_own_keys_are_checked(engine: dict[str, Any]) -> None:
    """A wrong shape under one of our own engine keys is a configuration error that names the key."""
    with pytest.raises(ConfigError, match=r"pools\.own\.engine\."):
        VllmConfig.of("own", "m", engine)


def test_a_fixed_cache_size_replaces_our_default() -> None:
    """The default KV cache size steps back for an argument or a variable that sets it."""
    assert "kv_cache_memory_bytes" in VllmConfig.of("own", "m", {}).engine_args
    for engine in ({"gpu_memory_utilization": 0.1}, {"env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}):
        assert "kv_cache_memory_bytes" not in VllmConfig.of("own", "m", engine).engine_args
    assert "kv_cache_memory_bytes" not in VllmConfig.of("own", "m", {}, cpu=False).engine_args


def test_without_vllm_the_message_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM is not installed, starting an engine says which extra to install and starts nothing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"bidbeam\[vllm\].*bidbeam\[cpu\]"):
        VllmEngine(VllmConfig.of("own", "m", {}))


def test_what_is_cancelled_before_loading_comes_back_unpaid() -> None:
    """Requests given up before the engine is loaded come back as cancelled, with no tokens, at once."""
    engine = VllmEngine(VllmConfig.of("own", tiny_model(), ENGINE))
    try:
        engine.submit(requests([[5, 6], [7, 8]]))
        engine.cancel()
        rows = [row for batch in engine.poll() for row in batch.to_pylist()]
        assert [(row["tag"], row["status"], row["input_tokens"]) for row in rows] == [
            (0, "cancelled", 0),
            (1, "cancelled", 0),
        ]
        assert engine.in_flight == 0
    finally:
        engine.close()


def test_some_may_be_cancelled_before_loading() -> None:
    """Those that are named come back, the others wait for the engine."""
    engine = VllmEngine(VllmConfig.of("own", tiny_model(), ENGINE))
    try:
        engine.submit(requests([[5, 6], [7, 8], [9, 10]]))
        engine.cancel([1])
        assert [row["tag"] for batch in engine.poll() for row in batch.to_pylist()] == [1]
        assert engine.in_flight == 2
    finally:
        engine.close()


def test_closing_while_it_loads_ends_the_process_and_every_use() -> None:
    """An engine closed during loading is gone at once, for good, and closing again does nothing."""
    engine = VllmEngine(VllmConfig.of("own", tiny_model(), ENGINE))
    process = psutil.Process(engine._process.pid)
    engine.close()
    engine.close()
    assert not process.is_running()
    assert engine.dead
    with pytest.raises(PoolDown, match="closed"):
        engine.submit(requests([[5]]))
    with pytest.raises(PoolDown, match="closed"):
        engine.poll()
    with pytest.raises(ModelError):
        engine.ready(1)


def test_a_killed_parent_takes_its_engine_along(tmp_path: Path) -> None:
    """After SIGKILL of the process that started it, the engine's process disappears by itself."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from bidbeam.connectors.vllm_engine import VllmConfig, VllmEngine\n"
        f"engine = VllmEngine(VllmConfig.of('own', {tiny_model()!r}, {ENGINE!r}))\n"
        "print(engine._process.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_a_model_that_does_not_load_says_why() -> None:
    """A ModelError names the pool and what is wrong: the nearest engine argument, or the file, with keys masked."""
    planted = "Zq8planted0123456789abcdef"
    misspelt = VllmEngine(VllmConfig.of("own-l4", tiny_model(), ENGINE | {"block_sizes": 32}))
    missing = VllmEngine(
        VllmConfig.of("own-l5", tiny_model(), ENGINE | {"tokenizer": f"/none/{planted}", "env": {"A_KEY": planted}})
    )
    with pytest.raises(ModelError, match=r"own-l4.*'block_sizes'; did you mean 'block_size'"):
        misspelt.ready(120)
    with pytest.raises(ModelError, match=r"own-l5.*/none/") as caught:
        missing.ready(120)
    assert planted not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert missing.dead
    for engine in (misspelt, missing):
        engine.close()


# -- the shared engine --


def test_it_is_an_engine_and_knows_its_facts(engine: VllmEngine) -> None:
    """It has the seam's shape and reports the model's and cache's sizes."""
    facts = engine.ready(1)
    assert isinstance(engine, Engine)
    assert engine.wants == {"tokens"}
    assert (facts.max_model_len, facts.block_size, facts.max_num_seqs) == (CONTEXT, BLOCK, 16)
    assert facts.vocab_size == VOCAB
    assert facts.prefix_caching
    assert facts.load_started_at < facts.loaded_at
    assert engine.room > facts.max_num_seqs


def test_every_request_comes_back_once_with_exact_usage(engine: VllmEngine) -> None:
    """More requests than the window holds all come back, with the prompt's length and the tokens generated."""
    prompts = [[3 + i % 500, 7, 9 + i % 300] for i in range(100)]
    rows = by_tag(drive(engine, requests(prompts)))
    assert [row["tag"] for row in rows] == list(range(100))
    assert {row["status"] for row in rows} == {"ok"}
    assert {(row["input_tokens"], row["output_tokens"], row["usage_source"]) for row in rows} == {(3, 4, "reported")}
    assert {row["finish_reason"] for row in rows} == {"length"}
    assert all(row["output"] is not None and row["samples"] is None for row in rows)
    assert all(row["started_at"] <= row["finished_at"] for row in rows)
    assert {row["endpoint_host"] for row in rows} == {None}


def test_requests_begin_in_row_order(engine: VllmEngine) -> None:
    """Rows are handed to the engine in their order, whatever their length."""
    rows = by_tag(drive(engine, requests([[5] * (1 + 37 * i % 90) for i in range(60)])))
    starts = [row["started_at"] for row in rows]
    assert starts == sorted(starts)


def test_greedy_answers_do_not_depend_on_company(engine: VllmEngine) -> None:
    """Identical greedy prompts get identical answers, and a slice of a batch behaves like the batch."""
    batch = requests([[11, 12, 13]] * 6 + [[14, 15]] * 6)
    outputs = [row["output"] for row in by_tag(drive(engine, batch))]
    assert len(set(outputs[:6])) == len(set(outputs[6:])) == 1
    assert {row["output"] for row in drive(engine, batch.slice(6))} == {outputs[6]}


@pytest.mark.parametrize("length", [BLOCK * 4, BLOCK * 4 + 1, BLOCK * 4 - 1])
def test_a_repeated_prompt_caches_whole_blocks_but_never_its_last_token(engine: VllmEngine, length: int) -> None:
    """A duplicate, in the same step or later, caches ((L - 1) // block) x block tokens."""
    prompt = [random.Random(length).randrange(3, VOCAB) for _ in range(length)]
    ideal = (length - 1) // BLOCK * BLOCK
    assert [row["cached_tokens"] for row in by_tag(drive(engine, requests([prompt, prompt])))] == [0, ideal]
    assert [row["cached_tokens"] for row in drive(engine, requests([prompt]))] == [ideal]


def test_sorted_prompts_reach_the_ideal_cache_count_exactly(engine: VllmEngine) -> None:
    """In sorted order every prompt caches exactly what a cache that forgets nothing could give it."""
    prompts = shared_prompts(prefixes=12, each=8)
    rows = by_tag(drive(engine, requests(prompts)))
    assert [row["cached_tokens"] for row in rows] == ideal_cached(prompts)


def test_salts_keep_tenants_apart(engine: VllmEngine) -> None:
    """Equal prompts under different salts share no cache; under one salt they do."""
    prompt = [random.Random(99).randrange(3, VOCAB) for _ in range(BLOCK * 3)]
    counts = [drive(engine, requests([prompt], salt=salt))[0]["cached_tokens"] for salt in ("a", "b", None, "a")]
    assert counts == [0, 0, 0, BLOCK * 2]


def test_samples_and_seed(engine: VllmEngine) -> None:
    """``n`` gives that many samples, all counted; the same seed gives the same ones."""
    sampling = text(n=3, temperature=1, seed=5, max_tokens=6)
    first, again = by_tag(drive(engine, requests([[21, 22, 23]] * 2, sampling)))
    assert len(first["samples"]) == 3
    assert len(set(first["samples"])) > 1
    assert first["output"] == first["samples"][0]
    assert first["output_tokens"] == 18
    assert first["input_tokens"] == 3
    assert again["samples"] == first["samples"]


def test_stop_strings_end_an_answer(engine: VllmEngine) -> None:
    """An answer ends before its stop string, for the reason ``stop``."""
    sampling = {"temperature": 1, "seed": 3, "max_tokens": 20}
    whole = drive(engine, requests([[31, 32]], text(**sampling)))[0]["output"]
    stop = whole[len(whole) // 2 :][:3]
    row = drive(engine, requests([[31, 32]], text(**sampling, stop=[stop])))[0]
    assert row["output"] == whole[: whole.index(stop)]
    assert row["finish_reason"] == "stop"


def test_structured_output_holds_to_its_schema(engine: VllmEngine) -> None:
    """``response_format`` and vLLM's own ``structured_outputs`` bind a random model to the schema."""
    schema = {"type": "json_schema", "json_schema": {"name": "colour", "schema": {"enum": ["red", "green"]}}}
    forced = {"ignore_eos": False, "max_tokens": 24}
    rows = by_tag(
        drive(
            engine,
            requests(
                [[41, 42]] * 3,
                [
                    text(**forced, response_format=schema),
                    text(**forced, structured_outputs={"choice": ["kettle", "lamp"]}),
                    text(**forced, response_format={"type": "json_object"}),
                ],
            ),
        )
    )
    assert json.loads(rows[0]["output"]) in {"red", "green"}
    assert rows[1]["output"] in {"kettle", "lamp"}
    assert rows[2]["output"].lstrip().startswith("{")


def test_a_bad_request_fails_alone_and_blames_the_caller(engine: VllmEngine) -> None:
    """A request with an unknown key, a bad value or an impossible prompt fails, and its neighbours do not."""
    cases: list[tuple[list[int] | None, str, str]] = [
        ([5], text(temperatur=1), "'temperatur'.*'temperature'"),
        ([5], text(temperature=-1), "temperature"),
        ([5], text(top_p="high"), ""),
        ([5], text(response_format={"type": "xml"}), "response_format"),
        ([5], text(response_format={"type": "json_schema"}), "response_format"),
        (None, text(), "token ids"),
        ([], text(), "empty"),
        ([5] * (CONTEXT + 1), text(), str(CONTEXT)),
        ([VOCAB + 5000], text(), "vocabulary"),
    ]
    good = [[6, 7]] * 2
    prompts = [good[0], *(prompt for prompt, _, _ in cases), good[1]]
    rows = by_tag(drive(engine, requests(prompts, [text(), *(one for _, one, _ in cases), text()])))
    assert rows[0]["status"] == rows[-1]["status"] == "ok"
    for row, (_, _, reason) in zip(rows[1:-1], cases, strict=True):
        assert (row["status"], row["error_class"]) == ("failed", "caller")
        assert row["output_tokens"] == row["input_tokens"] == 0
        assert row["error_message"]
        assert len(row["error_message"]) <= 500
        assert re.search(reason, row["error_message"]), row["error_message"]


def test_max_tokens_of_the_column_serves_where_sampling_has_none(engine: VllmEngine) -> None:
    """A sampling object without ``max_tokens`` takes the request's column."""
    row = drive(engine, requests([[8, 9]], json.dumps({"temperature": 0, "ignore_eos": True})))[0]
    assert row["output_tokens"] == 7


def test_cancelling_some_leaves_the_others_running(engine: VllmEngine) -> None:
    """The request that is named comes back with what it computed; its neighbour goes on to its end."""
    engine.submit(requests([[60, 61, 62], [70, 71, 72]], text(max_tokens=40)))
    engine.cancel([1])
    rows: dict[int, dict[str, Any]] = {}
    woken = threading.Event()
    engine.listen(woken.set)
    while engine.in_flight:
        woken.wait(30)
        woken.clear()
        rows |= {row["tag"]: row for result in engine.poll() for row in result.to_pylist()}
    assert (rows[0]["status"], rows[0]["output_tokens"]) == ("ok", 40)
    assert rows[1]["status"] == "cancelled"
    assert rows[1]["output_tokens"] < 40


def test_cancelling_returns_everything_with_what_it_computed(engine: VllmEngine) -> None:
    """Everything in flight comes back as cancelled: running requests with their tokens, waiting ones with none."""
    batch = requests([[50 + i, 51, 52] for i in range(18)], text(max_tokens=1900))
    before = engine.stats()["steps"]
    engine.submit(batch)
    while engine.stats()["steps"] < before + 3:
        time.sleep(0.01)
    engine.cancel()
    woken = threading.Event()
    engine.listen(woken.set)
    rows: list[dict[str, Any]] = []
    while engine.in_flight:
        woken.wait(30)
        woken.clear()
        rows += [row for result in engine.poll() for row in result.to_pylist()]
    rows = by_tag(rows)
    assert [row["tag"] for row in rows] == list(range(18))
    assert {row["status"] for row in rows} == {"cancelled"}
    assert all(row["input_tokens"] == 3 and 0 < row["output_tokens"] < 1900 for row in rows[:16])
    assert all(row["input_tokens"] == row["output_tokens"] == 0 for row in rows[16:])
    assert drive(engine, requests([[60, 61]]))[0]["status"] == "ok"


def test_counters_add_up_to_the_results(engine: VllmEngine) -> None:
    """The engine's counters grow by exactly what the results of a batch say."""
    before = engine.stats()
    rows = drive(engine, requests(shared_prompts(prefixes=2, each=3, seed=8)))
    after = engine.stats()
    for name in ("input_tokens", "cached_tokens", "output_tokens"):
        assert after[name] - before[name] == sum(row[name] for row in rows)
    assert after["finished"] - before["finished"] == len(rows)


# -- the engine with the small cache --


def test_its_process_has_the_cores_the_variables_and_the_blocks_asked_for(tight: VllmEngine) -> None:
    """``cores``, ``env`` and engine arguments of the pools file reach the engine's process, and only that."""
    process = psutil.Process(tight._process.pid)
    assert process.cpu_affinity() == TIGHT["cores"]
    assert process.environ()["BIDBEAM_TEST_MARK"] == "here"
    assert "BIDBEAM_TEST_MARK" not in os.environ
    assert tight.ready(1).num_gpu_blocks == SMALL_CACHE_BLOCKS
    assert os.getsid(process.pid) == process.pid


def test_a_small_cache_serves_sorted_prompts_and_loses_shuffled_ones(tight: VllmEngine) -> None:
    """With room for few prefixes the sorted order still reaches the ideal, while arrival order loses most of it."""
    prompts = shared_prompts(prefixes=16, each=6, seed=3)
    ideal = sum(ideal_cached(prompts))
    shuffled = random.Random(4).sample(prompts, len(prompts))
    in_order = sum(row["cached_tokens"] for row in drive(tight, requests(prompts, salt="sorted")))
    as_it_comes = sum(row["cached_tokens"] for row in drive(tight, requests(shuffled, salt="shuffled")))
    assert in_order == ideal
    assert as_it_comes < ideal * 2 / 3


def test_speculation_is_used_and_changes_no_greedy_answer(tight: VllmEngine, engine: VllmEngine) -> None:
    """Speculative decoding drafts tokens, and greedy answers are those of the engine without it."""
    prompts = [[70, 71, 72, 70, 71, 72, 70, 71], [80, 81, 80, 81, 80, 81]]
    sampling = text(max_tokens=24)
    with_drafts = by_tag(drive(tight, requests(prompts, sampling)))
    without = by_tag(drive(engine, requests(prompts, sampling)))
    assert [row["output"] for row in with_drafts] == [row["output"] for row in without]
    assert [row["output_tokens"] for row in with_drafts] == [24, 24]
    assert tight.stats()["vllm:spec_decode_num_draft_tokens"] > 0


def test_vllms_own_counters_agree_with_ours(tight: VllmEngine) -> None:
    """Where vLLM keeps statistics, its prompt, cache and generation counters grow as ours do."""
    names = {
        "input_tokens": "vllm:prompt_tokens",
        "cached_tokens": "vllm:prefix_cache_hits",
        "output_tokens": "vllm:generation_tokens",
    }
    before = tight.stats()
    drive(tight, requests(shared_prompts(prefixes=3, each=4, seed=12)))
    after = tight.stats()
    for ours, theirs in names.items():
        assert after[theirs] - before[theirs] == after[ours] - before[ours]


def test_a_killed_engine_is_a_pool_down_after_its_last_results(tight: VllmEngine, registry: Registry) -> None:
    """When the engine's process dies, results that came first are handed out, then PoolDown names pool and cause."""
    woken = threading.Event()
    tight.submit(requests([[90, 91], [92, 93]], [text(), text(max_tokens=480)]))
    while not tight._arrived:
        time.sleep(0.005)
    os.kill(tight._process.pid, signal.SIGKILL)
    assert tight._gone.wait(20)
    tight.listen(woken.set)
    assert woken.is_set()
    assert [row["tag"] for batch in tight.poll() for row in batch.to_pylist()] == [0]
    with pytest.raises(PoolDown, match=r"tight.*SIGKILL"):
        tight.poll()
    with pytest.raises(PoolDown):
        tight.submit(requests([[5]]))
    assert tight.dead
    replacement = registry.acquire("tight", lambda: VllmEngine(VllmConfig.of("tight", tiny_model(), TIGHT)))
    assert replacement is not tight
    assert not replacement.dead


def test_a_hung_engine_is_ended_and_said_to_have_hung(tight: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has work and makes no step for too long is killed; one that is at work never is."""
    tight.submit(requests([[90, 91], [92, 93]], [text(), text(max_tokens=480)]))
    while not tight._arrived:
        time.sleep(0.005)
    os.kill(tight._process.pid, signal.SIGSTOP)
    assert [row["tag"] for batch in tight.poll() for row in batch.to_pylist()] == [0]
    assert not tight.dead
    later = time.monotonic() + 601
    monkeypatch.setattr(tight, "_clock", lambda: later)
    assert tight.poll() == []
    assert tight._gone.wait(20)
    with pytest.raises(PoolDown, match="it made no step for 600 s and was ended"):
        tight.poll()
