"""The batch engine against the front of a provider: how batches end, what they leave, and who takes them over."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidbeam.connectors import batch_client, batch_courier
from bidbeam.connectors.batch_engine import BatchEngine
from bidbeam.connectors.batch_journal import INTENT_ROWS, BatchJournal, Intent
from bidbeam.connectors.batch_lines import custom_id, read_line
from bidbeam.connectors.batch_rows import lines_of
from bidbeam.connectors.credentials import StaticKey
from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.connectors.engine import REQUEST_FIELDS, Lasting
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.front_batch import BatchFront, Fate
from bidbeam.connectors.front_vertex import VertexBatchFront
from bidbeam.connectors.pools import PoolSpec, PriceSchedule
from bidbeam.connectors.profile_record import Auth, ToldRegion
from bidbeam.connectors.profiles import PROFILES, profile
from bidbeam.connectors.store import Store
from bidbeam.transforms.batches import settle_strays
from bidbeam.transforms.lane import Lane
from bidbeam.transforms.settling import Terms

pytestmark = pytest.mark.timeout(30)

SEED = 7
KEY = "test-key-of-the-front-0123456789"


@pytest.fixture
def upstream() -> Iterator[EndpointDouble]:
    with EndpointDouble(["tiny"]) as double:
        yield double


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way has arrived at once."""
    monkeypatch.setattr(batch_courier, "SETTLED_S", 0.05)


@dataclass
class Desk:
    """Engines of one run on one front, one after the other, and what came back."""

    front: BatchFront
    home: Path
    options: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    login: Any = None
    model: str = "tiny"
    booked: Callable[[Intent], Any] = lambda intent: np.zeros(intent.rows.num_rows, np.bool_)
    engines: list[BatchEngine] = field(default_factory=list)

    price = PriceSchedule("p", "slow", {"uncached_input": Decimal("1E-7"), "output": Decimal("4E-7")})

    @property
    def journal(self) -> BatchJournal:
        return BatchJournal(Store.at(str(self.home)).child("batches"))

    def open(self) -> BatchEngine:
        spec = PoolSpec(
            "slow",
            "batch",
            {"tiny": self.model},
            self.price,
            base_url=self.front.base_url,
            options={"poll": "5ms", **self.options},
            **self.keys,
        )
        engine = BatchEngine(
            spec, "tiny", self.journal, run_id="run-1", seed=SEED, booked=self.booked, credentials=self.login
        )
        self.wake = threading.Event()
        engine.listen(self.wake.set)
        self.engines.append(engine)
        return engine

    def work(self, engine: BatchEngine, *, gathered: bool = True) -> dict[int, dict[str, Any]]:
        """Drives an engine as a lane does, until it holds nothing any more."""
        found: dict[int, dict[str, Any]] = {}
        self.strays: list[dict[str, Any]] = []
        while engine.in_flight:
            if gathered:
                engine.gathered()
            for results in engine.poll():
                for row in results.to_pylist():
                    assert row["tag"] not in found, "a request came back twice"
                    found[row["tag"]] = row
            for info, results in engine.strays():
                pairs = zip(info.to_pylist(), results.to_pylist(), strict=True)
                self.strays += [one | {"result": other} for one, other in pairs]
            self.wake.wait(0.05)
            self.wake.clear()
        return found

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(front: BatchFront, **keys: Any) -> Desk:
        desks.append(Desk(front, tmp_path, **keys))
        return desks[-1]

    yield make
    for each in desks:
        each.close()


def asks(count: int, *, start: int = 0, raw: bool = False, n: int = 1, times: int = 1) -> pa.RecordBatch:
    """Requests as the door makes them for this engine; of ``times`` starts their attempt ids differ."""
    numbers = range(start, start + count)
    texts = [f"tell me about thing number {number}" for number in numbers]
    columns: dict[str, Any] = {
        "tag": list(numbers),
        "attempt_id": [hashlib.sha256(f"{times}|{number}".encode()).digest()[:16] for number in numbers],
        "input_tokens": [9] * count,
        "max_tokens": [8] * count,
        "sampling": [json.dumps({"max_tokens": 8, "temperature": 0, **({"n": n} if n > 1 else {})})] * count,
        "cache_salt": [None] * count,
        "messages": [None if raw else json.dumps([{"role": "user", "content": text}]) for text in texts],
        "prompt": [text if raw else None for text in texts],
        "key": [hashlib.sha256(text.encode()).digest()[:16] for text in texts],
        "request_id": [f"q{number}" for number in numbers],
        "lot_id": ["l1"] * count,
        "round": [1] * count,
        "attempt_no": [1] * count,
        "kind": ["primary"] * count,
        "tokens_exact": [False] * count,
        "n": [n] * count,
    }
    types = {**{f.name: f.type for f in INTENT_ROWS}, **REQUEST_FIELDS}
    return pa.RecordBatch.from_arrays([pa.array(v, types[k]) for k, v in columns.items()], names=list(columns))


def classes(found: dict[int, dict[str, Any]]) -> dict[str, int]:
    """How many ended how: ``ok``, or the class of error, or ``unsent``."""
    counts: dict[str, int] = {}
    for row in found.values():
        name = "unsent" if row["error_message"] == "not sent" else row["error_class"] or row["status"]
        counts[name] = counts.get(name, 0) + 1
    return counts


def test_rows_wait_for_the_rest_and_go_in_one_file(upstream: EndpointDouble, desk: Callable[..., Desk]) -> None:
    """Nothing is sent before the last row has come; answers carry usage, and the time the batch was handed over."""
    with BatchFront(upstream.base_url) as front:
        at = desk(front)
        engine = at.open()
        assert isinstance(engine, Lasting)
        engine.submit(asks(30))
        engine.submit(asks(20, start=30))
        assert (engine.in_flight, front.calls) == (50, [])
        found = at.work(engine)
        assert classes(found) == {"ok": 50}
        assert [len(batch.rows) for batch in front.batches] == [50]
        by_name = {row.custom_id: row for row in front.served}
        names = [custom_id(key, SEED, 0) for key in asks(50).column("key").to_pylist()]
        for tag, name in enumerate(names):
            assert found[tag]["input_tokens"] == by_name[name].prompt_tokens
            assert found[tag]["output_tokens"] == by_name[name].completion_tokens
        assert len({row["started_at"] for row in found.values()}) == 1
        assert at.journal.names()
        engine.booked()
        assert not at.journal.names()


@pytest.mark.parametrize("options", [{"max_rows": "20"}, {"max_bytes": "5000"}], ids=["rows", "bytes"])
def test_a_file_that_is_full_is_sent_off(
    upstream: EndpointDouble, desk: Callable[..., Desk], options: dict[str, str]
) -> None:
    """The provider's limits cut the rows into several batches, none over its limit, with nothing lost."""
    with BatchFront(upstream.base_url) as front:
        at = desk(front, options=options)
        engine = at.open()
        engine.submit(asks(55))
        assert classes(at.work(engine)) == {"ok": 55}
        assert len(front.batches) >= 3
        assert sum(len(batch.rows) for batch in front.batches) == 55
        for batch in front.batches:
            assert len(batch.rows) <= int(options.get("max_rows", 55))
            assert len(front.files[batch.input_file]) <= int(options.get("max_bytes", 10**9))


def test_chats_and_raw_prompts_go_in_files_of_their_own(upstream: EndpointDouble, desk: Callable[..., Desk]) -> None:
    """A batch has one address for all its rows; several samples come back as several."""
    with BatchFront(upstream.base_url) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(3, n=2))
        engine.submit(asks(4, start=3, raw=True))
        found = at.work(engine)
        assert classes(found) == {"ok": 7}
        assert len(found[0]["samples"]) == 2
        assert {batch.endpoint for batch in front.batches} == {"/v1/chat/completions", "/v1/completions"}


@pytest.mark.parametrize("tells", [True, False], ids=["told", "silent"])
def test_what_an_expired_batch_did_run_is_kept(
    upstream: EndpointDouble, desk: Callable[..., Desk], tells: bool
) -> None:
    """The other rows failed for want of time, without usage, whether or not the provider lists them."""
    with BatchFront(upstream.base_url, fates=[Fate("expired", run=12, tells=tells)]) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(20))
        found = at.work(engine)
        assert classes(found) == {"ok": 12, "timeout": 8}
        assert all(row["input_tokens"] is None for row in found.values() if row["status"] == "failed")


def test_a_batch_cancelled_by_someone_else_keeps_its_answers(
    upstream: EndpointDouble, desk: Callable[..., Desk]
) -> None:
    """Rows that it did not run are the provider's failure; rows of a batch that we cancel ourselves were no attempt."""
    with BatchFront(upstream.base_url, fates=[Fate("cancelled", run=5)]) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(9))
        assert classes(at.work(engine)) == {"ok": 5, "server": 4}


def test_cancelling_keeps_what_was_run_and_gives_the_rest_back_unsent(desk: Callable[..., Desk]) -> None:
    """The provider is told, its partial answers are collected, and whatever was never run may go elsewhere."""
    seen = threading.Event()

    def slowly(asked: Seen) -> Reply:
        if asked.number >= 3:
            seen.set()
        return Reply(delay_s=0.02)

    with EndpointDouble(["tiny"], slowly) as double, BatchFront(double.base_url) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(60))
        engine.gathered()
        assert seen.wait(20)
        engine.submit(asks(10, start=60))
        engine.cancel()
        found = at.work(engine)
        counts = classes(found)
        assert set(counts) == {"ok", "unsent"}
        assert counts["ok"] == len(front.served) < 60
        assert sum(counts.values()) == 70
        assert front.batches[0].state == "cancelled"
        assert len(front.batches) == 1


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (({"code": "token_limit_exceeded", "message": "Enqueued token limit reached"},), {"capacity": 5}),
        (({"code": "model_not_found", "message": "no"},), {"auth_funds": 5}),
        (({"code": "invalid_json_line", "message": "bad", "line": 2},), {"caller": 1, "server": 4}),
        ((), {"server": 5}),
    ],
)
def test_a_refused_file_fails_all_its_rows_with_a_class(
    upstream: EndpointDouble, desk: Callable[..., Desk], errors: Any, expected: dict[str, int]
) -> None:
    """What the provider says of the file tells the class; only rows that it names are at fault themselves."""
    with BatchFront(upstream.base_url, fates=[Fate("failed", errors=errors)]) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(5))
        assert classes(at.work(engine)) == expected
        assert not front.served


def test_lines_fail_one_by_one(desk: Callable[..., Desk]) -> None:
    """An error in a line is classified as the same answer to a single request would be, and quotes no prompt."""
    replies = {
        1: Reply.error(400, "the prompt 'tell me about thing number 1' is bad", "invalid_request"),
        2: Reply.error(429, "slow down", "rate_limit_exceeded"),
        3: Reply.error(500, "boom"),
        4: Reply.error(400, "no", "content_policy_violation"),
    }

    def answer(asked: Seen) -> Reply:
        return replies.get(int(asked.body["messages"][0]["content"].split()[-1]), Reply())

    with EndpointDouble(["tiny"], answer) as double, BatchFront(double.base_url) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(8))
        found = at.work(engine)
        assert classes(found) == {"ok": 4, "caller": 1, "rate": 1, "server": 1, "policy": 1}
        assert "tell me about" not in str([row["error_message"] for row in found.values()])
        assert found[1]["http_status"] == 400


def test_garbage_in_an_answer_file_costs_its_own_rows_only(upstream: EndpointDouble, desk: Callable[..., Desk]) -> None:
    """Lines that are no JSON, name no row, or come twice are told apart from rows that have no line at all."""

    def mangle(lines: list[bytes]) -> list[bytes]:
        return [b"\xff\xfe not json", b"[1]", b'{"custom_id": "nobody"}', lines[0], *lines[:-2], b"{" * 5000]

    with BatchFront(upstream.base_url, fates=[Fate(lines=mangle)]) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(10))
        found = at.work(engine)
        assert classes(found) == {"ok": 8, "bad_output": 2}


def test_a_wrong_key_puts_the_pool_down_and_gives_everything_back(
    upstream: EndpointDouble, desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch comes of it: the rows are unsent, and may go to a runner-up at once. The key is in no message."""
    monkeypatch.setenv("FRONT_KEY", "another-key-altogether-987654321")
    with BatchFront(upstream.base_url, key=KEY) as front:
        at = desk(front, keys={"api_key_env": "FRONT_KEY"})
        engine = at.open()
        engine.submit(asks(4))
        assert classes(at.work(engine)) == {"unsent": 4}
        with pytest.raises(PoolDown, match="takes no batches") as caught:
            engine.poll()
        assert "another-key" not in str(caught.value)
        assert not at.journal.names()


def test_a_provider_that_is_full_is_asked_again_and_then_failed(
    upstream: EndpointDouble, desk: Callable[..., Desk]
) -> None:
    """A full queue is no reason to give the pool up; the rows fail for want of room only when it stays full."""
    left = [2]

    def full(method: str, path: str) -> Reply | None:
        if (method, path) == ("POST", "batches") and left[0]:
            left[0] -= 1
            return Reply.error(429, "queue full", "token_limit_exceeded")
        return None

    with BatchFront(upstream.base_url, intercept=full) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(4))
        assert classes(at.work(engine)) == {"ok": 4}
        left[0] = 99
        engine.submit(asks(4, start=4))
        assert classes(at.work(engine)) == {"rate": 4}
        assert not engine.dead


def test_a_creation_whose_answer_is_lost_is_looked_up_and_not_repeated(
    upstream: EndpointDouble, desk: Callable[..., Desk]
) -> None:
    """The connection breaks after the batch was made: it is found by what we wrote on it."""
    broken = [1]

    def breaks(method: str, path: str) -> Reply | None:
        if (method, path) == ("POST", "batches") and broken[0]:
            broken[0] -= 1
            return Reply(status=0)
        return None

    with BatchFront(upstream.base_url, intercept=breaks) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(6))
        assert classes(at.work(engine)) == {"ok": 6}
        assert len(front.batches) == 1


def test_a_silent_provider_loses_the_batch_in_the_end(upstream: EndpointDouble, desk: Callable[..., Desk]) -> None:
    """What cannot be found out comes back as unknown, to be booked at its worst case; never a hang."""
    dead = threading.Event()

    def silent(method: str, path: str) -> Reply | None:
        return Reply.error(503, "down") if method == "GET" and dead.is_set() else None

    with BatchFront(upstream.base_url, intercept=silent, held=True) as front:
        at = desk(front, options={"patience": "100ms"})
        engine = at.open()
        engine.submit(asks(3))
        dead.set()
        found = at.work(engine)
        assert {(row["status"], row["input_tokens"]) for row in found.values()} == {("cancelled", None)}
        assert classes(found) == {"cancelled": 3}


# -- taken over --


def leave(at: Desk, requests: pa.RecordBatch) -> None:
    """An engine that sends a batch and then dies."""
    engine = at.open()
    engine.submit(requests)
    engine.gathered()
    while not any(intent.batch_id for intent in at.journal.open()):
        at.wake.wait(0.01)
    engine.leave()
    assert engine.in_flight == 0
    engine.close()


def test_the_next_engine_takes_an_open_batch_over(upstream: EndpointDouble, desk: Callable[..., Desk]) -> None:
    """Requests that are in it are answered from it, others go in a batch of their own; what nobody asks for is handed
    out for the books, under the identity of the attempt that sent it."""
    with BatchFront(upstream.base_url, held=True) as front:
        at = desk(front)
        leave(at, asks(10))
        engine = at.open()
        assert engine.in_flight == 10
        engine.submit(asks(12, start=4, times=2))
        front.release()
        found = at.work(engine)
        assert classes(found) == {"ok": 12}
        assert sorted(found) == list(range(4, 16))
        assert [len(batch.rows) for batch in front.batches] == [10, 6]
        first = asks(10)
        assert sorted(row["request_id"] for row in at.strays) == ["q0", "q1", "q2", "q3"]
        assert {row["attempt_id"] for row in at.strays} == set(first.column("attempt_id").to_pylist()[:4])
        assert all(row["tag"] is None and row["result"]["status"] == "ok" for row in at.strays)
        engine.booked()
        assert not at.journal.names()


def test_rows_that_are_booked_already_are_neither_asked_nor_handed_out_again(
    upstream: EndpointDouble, desk: Callable[..., Desk]
) -> None:
    """A start that died between two segments: what the first one holds is not paid for a second time."""
    with BatchFront(upstream.base_url) as front:
        at = desk(front)
        leave(at, asks(10))
        at.booked = lambda intent: np.arange(intent.rows.num_rows) < 7
        engine = at.open()
        engine.submit(asks(2, start=7, times=2))
        assert sorted(at.work(engine)) == [7, 8]
        assert [row["request_id"] for row in at.strays] == ["q9"]
        engine.close()
        at.booked = lambda intent: np.ones(intent.rows.num_rows, np.bool_)
        assert at.open().in_flight == 0
        assert not at.journal.names()
        assert len(front.batches) == 1


@pytest.mark.parametrize("reached", ["upload", "create"])
def test_a_death_on_the_way_sends_nothing_twice(
    upstream: EndpointDouble, desk: Callable[..., Desk], reached: str
) -> None:
    """Before the batch is asked for, the next engine sends it; after that, it looks for it first and finds it."""
    stuck, hold = threading.Event(), threading.Event()
    call = ("POST", "files" if reached == "upload" else "batches")

    def dies(method: str, path: str) -> Reply | None:
        if (method, path) == call and not stuck.is_set():
            stuck.set()
            # It takes effect, but nobody lives to hear so.
            return Reply(status=0, delay_s=0)
        if stuck.is_set() and not hold.is_set():
            return Reply.error(503, "later")
        return None

    with BatchFront(upstream.base_url, intercept=dies) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(5))
        engine.gathered()
        assert stuck.wait(20)
        engine.leave()
        engine._loop.call_soon_threadsafe(lambda: [task.cancel() for task in engine._tasks])
        engine.close()
        assert len(at.journal.names()) == 1
        hold.set()
        engine = at.open()
        engine.submit(asks(5, times=2))
        assert classes(at.work(engine)) == {"ok": 5}
        assert len(front.batches) == 1
        assert len(front.served) == 5


def test_a_batch_that_never_came_to_be_is_sent_by_who_finds_it_missing(
    upstream: EndpointDouble, desk: Callable[..., Desk]
) -> None:
    """It was about to be created, and the provider knows nothing of it: what is asked for goes in a new one."""
    with BatchFront(upstream.base_url) as front:
        at = desk(front)
        engine = at.open()
        rows = pa.Table.from_batches([asks(6)])
        names = pa.array([custom_id(key, SEED, 0) for key in rows.column("key").to_pylist()])
        columns = [names, *(rows.column(f.name).cast(f.type) for f in INTENT_ROWS if f.name != "custom_id")]
        now = engine._now()
        intent = Intent("slow-gone", "slow", "tiny", True, now, pa.Table.from_arrays(columns, schema=INTENT_ROWS))
        at.journal.intend(intent)
        at.journal.note_creating("slow-gone", now)
        engine = at.open()
        engine.submit(asks(4, times=2))
        assert classes(at.work(engine)) == {"ok": 4}
        assert [len(batch.rows) for batch in front.batches] == [4]
        assert not at.strays
        assert "slow-gone" not in at.journal.names()


def test_a_line_can_say_nothing_that_breaks_the_reading() -> None:
    """Whatever stands in a line, it is read as an outcome or as garbage."""
    lines: list[Any] = [
        b"",
        b"null",
        b'"text"',
        b"[" * 100_000,
        {"custom_id": 5},
        {"custom_id": "a"},
        {"custom_id": "a", "response": 7, "error": 8},
        {"custom_id": "a", "response": {"status_code": "x"}},
        {"custom_id": "a", "response": {"status_code": True, "body": {}}},
        {"custom_id": "a", "response": {"status_code": 200, "body": None}},
        {"custom_id": "a", "response": {"status_code": 200, "body": {"choices": [{"message": {"content": 5}}]}}},
        {"custom_id": "a", "error": {"code": ["deep"]}},
        {"custom_id": "a", "error": "text"},
    ]
    from bidbeam.connectors.batch_engine import _now
    from bidbeam.connectors.batch_lines import Asked

    for raw in lines:
        line = read_line(
            raw if isinstance(raw, bytes) else json.dumps(raw).encode(),
            profile(None),
            chat=True,
            find=lambda name: Asked(1, lambda: None) if name == "a" else None,
            secrets=(),
            now=_now,
        )
        assert line is None or line.outcome.status == "failed"


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_model_that_a_row_names_is_compared(wrapped: bool) -> None:
    """In both shapes of a row, as in a single answer; a promised name is held to."""
    from bidbeam.connectors.batch_engine import _now
    from bidbeam.connectors.batch_lines import Asked
    from bidbeam.connectors.model_echo import Echo

    body = {"model": "other-7b", "choices": [{"message": {"content": "hi"}}]}
    raw = json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": body} if wrapped else body}).encode()
    told = []
    for echo in (Echo(("tiny",)), Echo(("tiny",), "tiny"), Echo()):
        line = read_line(
            raw, profile(None), chat=True, find=lambda _: Asked(1, lambda: None), secrets=(), now=_now, echo=echo
        )
        assert line is not None
        told.append((line.outcome.status, line.outcome.model_returned, line.outcome.other_model))
    assert told == [("ok", "other-7b", True), ("failed", "other-7b", True), ("ok", "other-7b", None)]


# -- a bucket in between --


def bucketed(front: VertexBatchFront, home: Path) -> dict[str, Any]:
    options = {"staging": str(home / "bucket"), "project": "shop", "location": "europe-west4"}
    return {"options": options, "keys": {"profile": "vertex"}, "login": StaticKey(Auth(), KEY), "model": "meta/tiny"}


def test_rows_reach_vertex_through_a_bucket(
    upstream: EndpointDouble, desk: Callable[..., Desk], tmp_path: Path
) -> None:
    """Uploaded as objects, run as one job of the publisher's model, and read back from where the job left them."""
    with VertexBatchFront(upstream.base_url, key=KEY, models={"meta/tiny": "tiny"}) as front:
        at = desk(front, **bucketed(front, tmp_path))
        engine = at.open()
        engine.submit(asks(12))
        found = at.work(engine)
        assert classes(found) == {"ok": 12}
        assert len(front.batches) == 1
        assert sum(row["output_tokens"] for row in found.values()) == sum(
            ran.completion_tokens or 0 for ran in front.served
        )


def test_a_vertex_job_is_taken_over_by_its_name(
    upstream: EndpointDouble, desk: Callable[..., Desk], tmp_path: Path
) -> None:
    """The answer to its creation was lost with the engine: the next one finds the job and makes no other."""
    made = threading.Event()

    def breaks(method: str, path: str) -> Reply | None:
        if method == "POST" and path.endswith("batchPredictionJobs") and not made.is_set():
            made.set()
            return Reply(status=0)
        return Reply.error(503, "later") if made.is_set() and not back.is_set() else None

    back = threading.Event()
    with VertexBatchFront(upstream.base_url, models={"meta/tiny": "tiny"}, intercept=breaks) as front:
        at = desk(front, **bucketed(front, tmp_path))
        engine = at.open()
        engine.submit(asks(5))
        engine.gathered()
        assert made.wait(20)
        engine.leave()
        engine._loop.call_soon_threadsafe(lambda: [task.cancel() for task in engine._tasks])
        engine.close()
        back.set()
        engine = at.open()
        engine.submit(asks(5, times=2))
        assert classes(at.work(engine)) == {"ok": 5}
        assert len(front.batches) == 1


def test_a_cancelled_or_failed_vertex_job_keeps_what_it_wrote(
    upstream: EndpointDouble, desk: Callable[..., Desk], tmp_path: Path
) -> None:
    """What stands in the bucket counts, whatever the job says of itself; a quota is told as a want of room."""
    fates = [Fate("cancelled", run=3), Fate("failed")]
    with VertexBatchFront(upstream.base_url, models={"meta/tiny": "tiny"}, fates=fates) as front:
        at = desk(front, **bucketed(front, tmp_path))
        engine = at.open()
        engine.submit(asks(5))
        assert classes(at.work(engine)) == {"ok": 3, "server": 2}
        engine.submit(asks(4, start=5))
        assert classes(at.work(engine)) == {"capacity": 4}


def test_azure_takes_the_same_files_under_its_own_key_and_paths(
    upstream: EndpointDouble, desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key goes in a header of its own, and rows name no version in their url."""
    monkeypatch.setenv("AZURE_KEY", KEY)
    with BatchFront(upstream.base_url, key=KEY, key_header="api-key") as front:
        options = {"resource": "shop", "deployment": "DataZoneBatch", "region": "swedencentral"}
        at = desk(front, options=options, keys={"profile": "azure", "api_key_env": "AZURE_KEY"})
        engine = at.open()
        engine.submit(asks(4))
        assert classes(at.work(engine)) == {"ok": 4}
        assert front.batches[0].endpoint == "/chat/completions"


def test_strays_of_a_lost_batch_are_booked_at_their_worst_case(
    upstream: EndpointDouble, desk: Callable[..., Desk]
) -> None:
    """Nobody asks for them and nothing is known of them: all of their input, and answers at full length."""
    with BatchFront(upstream.base_url) as front:
        at = desk(front)
        leave(at, asks(3))
        front.batches.clear()
        engine = at.open()
        strays = None
        while engine.in_flight:
            engine.gathered()
            assert not engine.poll()
            strays = settle_strays(engine, Terms("slow", "tiny", at.price), {})[0] or strays
            at.wake.wait(0.05)
        assert strays is not None
        assert strays.column("status").to_pylist() == ["lost"] * 3
        assert strays.column("tag").null_count == 3
        assert sum(strays.column("cost").to_pylist()) == 3 * ((4 * 9 + 64) * Decimal("1E-7") + 8 * Decimal("4E-7"))


def test_strays_from_elsewhere_are_failures_that_are_paid_for(
    upstream: EndpointDouble, desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that was taken over is held to its pool's country too, where a line says where it was run."""
    told = replace(PROFILES["openai-compatible"], told_region=ToldRegion("/region", {"eastus": "US"}))
    monkeypatch.setattr("bidbeam.connectors.profiles.PROFILES", {**PROFILES, "openai-compatible": told})

    def moved(lines: list[bytes]) -> list[bytes]:
        return [line.replace(b'"body": {', b'"body": {"region": "East US", ', 1) for line in lines]

    with BatchFront(upstream.base_url, fates=[Fate(lines=moved)]) as front:
        at = desk(front)
        leave(at, asks(3))
        lane = Lane(
            "slow",
            "tiny",
            at.open(),
            Terms("slow", "tiny", at.price),
            meter=None,
            admit=lambda _: True,
            open_lot=lambda *_: Future(),
            announce=None,
            overhead_id=lambda _: bytes(16),
            round=1,
            labels={"jurisdiction": "DE"},
        )
        found = []
        while lane.engine.in_flight:
            lane.engine.gathered()
            assert not lane.engine.poll()
            found += [] if (rows := lane.settle_unasked()) is None else rows.to_pylist()
            at.wake.wait(0.05)
    assert lane.strayed
    assert not lane.open
    assert [(row["status"], row["error_class"], row["jurisdiction"]) for row in found] == [
        ("failed", "policy", "US")
    ] * 3
    assert all(row["cost"] > 0 for row in found)


ENDS = st.sampled_from(["completed", "completed", "expired", "cancelled", "failed"])
FATES = st.lists(st.builds(Fate, ends=ENDS, run=st.none() | st.integers(0, 12), tells=st.booleans()), max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 30), most=st.integers(4, 40), fates=FATES, leaves_after=st.none() | st.integers(0, 20))
def test_every_request_comes_back_once_and_is_run_once(
    upstream: EndpointDouble,
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    most: int,
    fates: list[Fate],
    leaves_after: int | None,
) -> None:
    """However batches end, and wherever an engine is left for the next: no request is run twice, each is answered or
    failed exactly once, and the tokens that came back are the provider's own count."""
    with BatchFront(upstream.base_url, fates=fates) as front:
        at = Desk(front, tmp_path_factory.mktemp("desk"), options={"max_rows": str(most)})
        requests = asks(count)
        found: dict[int, dict[str, Any]] = {}
        engine = at.open()
        engine.submit(requests)
        if leaves_after is not None:
            while engine.in_flight and len(found) < leaves_after:
                engine.gathered()
                found |= {row["tag"]: row for results in engine.poll() for row in results.to_pylist()}
                at.wake.wait(0.01)
                at.wake.clear()
            engine.leave()
            engine.close()
            keys = {requests.column("key")[tag].as_py() for tag in found}
            at.booked = lambda intent: np.array([key in keys for key in intent.rows.column("key").to_pylist()])
            engine = at.open()
            engine.submit(requests.filter(pa.array([tag not in found for tag in range(count)])))
        rest = at.work(engine)
        at.close()
        assert not rest.keys() & found.keys()
        found |= rest
        assert sorted(found) == list(range(count))
        assert not at.strays
        answered = [row for row in found.values() if row["status"] == "ok"]
        assert len({ran.custom_id for ran in front.served}) == len(front.served) == len(answered)
        assert sum(row["input_tokens"] for row in answered) == sum(ran.prompt_tokens or 0 for ran in front.served)
        assert sum(row["output_tokens"] for row in answered) == sum(ran.completion_tokens or 0 for ran in front.served)


def test_an_answer_file_beyond_belief_is_not_taken(
    upstream: EndpointDouble, desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was served, perhaps, but cannot be read: its rows come back as unknown, and the disk is spared."""
    monkeypatch.setattr(batch_client, "MAX_FILE_BYTES", 1_000)
    with BatchFront(upstream.base_url) as front:
        at = desk(front)
        engine = at.open()
        engine.submit(asks(20))
        assert classes(at.work(engine)) == {"cancelled": 20}
        assert len(front.batches) == 1


def test_a_line_beyond_belief_is_skipped_whole(tmp_path: Path) -> None:
    """Lines are read one at a time, each up to a limit; what is longer counts as one that says nothing."""
    path = tmp_path / "answers"
    path.write_bytes(b"short\n" + b"x" * 5_000 + b"\n\n  \nlast")
    assert list(lines_of(path, longest=100)) == [b"short\n", None, b"last"]
    path.write_bytes(b"x" * 101)
    assert list(lines_of(path, longest=100)) == [None]
