"""Hostile bytes: what others wrote ends as it is documented to, never in a crash, a hang or a leak.

``BIDBEAM_FUZZ_CASES`` says how many cases each target gets; ``tests/fuzz.py`` runs the same targets for as long as one
likes, guided by coverage.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_targets import KEY, NOON, SPEC, TARGETS, mutated, settled
from small_jobs import DAY, prompts, remote, write_job
from small_ledger import DAY_A, A, attempt, request, run_row, write_run
from test_http_engine import answer, spec

from bidbeam.connectors import json_schemas, vllm_engine
from bidbeam.connectors.batch_client import LONGEST_FILE_S, LONGEST_WAIT_S, BatchCallError, Wire
from bidbeam.connectors.batch_lines import Asked, read_line
from bidbeam.connectors.credentials import credentials_for
from bidbeam.connectors.errors import ConfigError, InputError, StoreError
from bidbeam.connectors.fetch import FeedError, fetch_json
from bidbeam.connectors.http_transport import LOOP, endpoint, open_session
from bidbeam.connectors.inputs import plan_input, read_split
from bidbeam.connectors.json_call import NoAnswer, call_json
from bidbeam.connectors.json_schemas import Checker
from bidbeam.connectors.lease_terms import LeaseTerms
from bidbeam.connectors.ledger_manifest import Manifest
from bidbeam.connectors.price_feeds import money_of
from bidbeam.connectors.profiles import PROFILES
from bidbeam.connectors.store import Store
from bidbeam.pipelines.begin import model_facts
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.job import Job
from bidbeam.transforms import engines
from bidbeam.transforms.rendering import render

CASES = int(os.environ.get("BIDBEAM_FUZZ_CASES", "100"))


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_end_as_documented(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Valid cases and changed ones, the same at each run, raise nothing undocumented and tell no key."""
    target = TARGETS[name]
    cases = [*target.seeds, *(mutated(target.seeds, seed) for seed in range(CASES))]
    for place, case in enumerate(cases):
        try:
            target.run(case)
        except Exception as error:
            error.add_note(f"in case {place} of {name}: {case[:200]!r}")
            raise
    with capsys.disabled():
        print(f"\n{name}: {len(cases)} cases", end="")


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that says whatever ``talk`` does on its one connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                with suppress(OSError):  # the other end has had enough
                    talk(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def test_a_body_that_unpacks_to_more_than_is_taken_is_cut_off() -> None:
    """A little gzip is given up at the limit of what they unpack to, and never held whole."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(b"0" * (1 << 20)) for _ in range(40)) + packer.flush()
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    with (
        serving(lambda connection: connection.sendall(head.encode() + bomb)) as address,
        pytest.raises(FeedError, match="sends more than"),
    ):
        fetch_json(address)


@pytest.mark.parametrize("first", [b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"])
def test_an_answer_that_never_ends_ends_in_time(first: bytes) -> None:
    """One byte after the other is no way around the limit of the whole, in headers or in a body."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.05)

    for ask in (
        lambda address: call_json("GET", address, timeout_s=0.2),
        lambda address: fetch_json(address, timeout_s=0.2),
    ):
        with serving(drip) as address, pytest.raises((NoAnswer, FeedError), match="no answer within"):
            ask(address)


def test_a_large_answer_is_read_to_its_end() -> None:
    """What comes in time comes whole, in one piece or in chunks."""
    body = b"[" + b"1," * 500_000 + b"1]"
    heads = (f"Content-Length: {len(body)}\r\n\r\n".encode() + body,
             f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")  # fmt: skip
    for head in heads:
        with serving(lambda connection, head=head: connection.sendall(b"HTTP/1.1 200 OK\r\n" + head)) as address:  # type: ignore[misc]
            assert len(call_json("GET", address).document) == 500_001


def test_a_finish_reason_and_a_code_can_be_a_key() -> None:
    """Words of an answer that go to outputs and ledger are no way out for a key either."""
    key = "plain_planted_key_0123456789"
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": key}]}
    assert answer(body, secrets=(key,)).finish_reason is None
    assert answer(body | {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).finish_reason == "stop"


def test_messages_nested_ever_deeper_are_compared_all_the_same() -> None:
    """A prompt that nests as deep as JSON is read is still not quoted, and the answer is an outcome."""
    for depth in (900, 950, 975, 990):
        prompt = "[" * depth + '"a prompt that nobody may quote"' + "]" * depth
        outcome = answer({"error": {"message": "a prompt that nobody may quote"}}, status=400, prompt_text=prompt)
        assert "quote" not in (outcome.error_message or "")


def line_of(line: Any) -> Any:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    find = {"r": Asked(1, lambda: "")}.get
    return read_line(raw, PROFILES["openai"], chat=True, find=find, secrets=(KEY,), now=lambda: NOON)


def test_lines_of_a_batch_are_read_exactly() -> None:
    """A cost keeps every digit, and what nests too deep or is no error's text ends as an outcome."""
    cost = "0.123456789012345678"
    body = f'{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {{"cost": {cost}}}}}'
    raw = f'{{"custom_id": "r", "response": {{"status_code": 200, "body": {body}}}}}'.encode()
    profile = PROFILES["openrouter"]
    line = read_line(raw, profile, chat=True, find={"r": Asked(1, str)}.get, secrets=(), now=lambda: NOON)
    assert line is not None
    assert line.outcome.provider_cost == Decimal(cost)
    for depth in (400, 900, 960, 985):
        nested = b'{"custom_id": "r", "error": ' + b"[" * depth + b"]" * depth + b"}"
        found = line_of(nested)
        if found is not None:
            settled(found.outcome)


def test_a_batch_endpoint_has_no_say_in_how_long_we_wait() -> None:
    """A time to wait is heeded up to a limit, a file may take long but not for ever, and a status line's own words are
    one line without keys.
    """

    async def ask(where: Any, pool: Any) -> BatchCallError:
        credentials = credentials_for(pool, where.profile.auth)
        async with open_session(where, pool, None, 1) as session:
            wire = Wire(session, where, where.base_url, "run", timeout_s=5, credentials=credentials, now=lambda: NOON)
            assert wire.long.total == LONGEST_FILE_S
            with pytest.raises(BatchCallError) as caught:
                await wire.call("GET", "batches")
            return caught.value

    def talk(connection: socket.socket) -> None:
        head = f"HTTP/1.1 429 \x1b[31m{KEY}\xff\r\nRetry-After: 1e300\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode("latin-1"))

    os.environ["HOSTILE_BYTES_KEY"] = KEY
    with serving(talk) as address:
        pool = spec(address, api_key_env="HOSTILE_BYTES_KEY")
        error = LOOP.run(ask(endpoint(pool), pool), 10)
    assert error.after_s == LONGEST_WAIT_S
    assert KEY not in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "told",
    ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "localhost", "2130706433", "0x7f000001",  # noqa: S104
     "127.1", "a..b", "host:1", "-x.example"],
)  # fmt: skip
def test_a_node_that_points_back_at_us_gets_no_prompts(told: str) -> None:
    """An address that is ours, the network's own, or none, is refused before anything is sent there."""
    terms = LeaseTerms("tier", "image")
    with pytest.raises(ValueError, match="address"):
        terms.address_of({"public_ip": told, "node_id": "n"})


def test_a_node_is_reached_where_it_says() -> None:
    """Public addresses of either family, private networks and names are fine."""
    terms = LeaseTerms("tier", "image")
    found = [
        terms.address_of({"public_ip": told, "node_id": "n"})
        for told in ("203.0.113.9", "10.1.2.3", "2001:db8::1", "n-1.nodes.example")
    ]
    hosts = ("203.0.113.9", "10.1.2.3", "[2001:db8::1]", "n-1.nodes.example")
    assert found == [f"https://{host}:8000/v1" for host in hosts]


@pytest.mark.parametrize("figure", ["1" * 300, Decimal("0." + "1" * 300), 10**300, "1e999999", "NaN", True, [1]])
def test_a_figure_is_short_or_none(figure: Any) -> None:
    """What a feed tells has no more digits than a price can have."""
    assert money_of(figure) is None


@pytest.mark.parametrize("depth", [65, 900, 100_000])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_a_line_that_nests_too_deep_is_a_bad_row(tmp_path: Path, depth: int, begin: str, end: str) -> None:
    """It exhausts nobody's stack, and the rows beside it are read."""
    lines = ['{"p": "a [[[[ {{{{ text"}', f'{{"p": {begin * depth}1{end * depth}}}', '{"p": "b"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    plan = plan_input([str(tmp_path / "in.jsonl")])
    table = read_split(plan.splits[0], plan.schema)
    assert table.column("p").to_pylist() == ["a [[[[ {{{{ text", None, "b"]
    assert "nested too deep" in table.column("_bidbeam_bad")[1].as_py()


def test_brackets_in_texts_are_no_depth(tmp_path: Path) -> None:
    """Text full of brackets, more of one kind than of the other, is read as text."""
    texts = ["[" * 500, "}" * 500, '\\" [' * 100, "[{" * 40]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"p": text, "x": [[1]]}) for text in texts))
    plan = plan_input([str(tmp_path / "in.jsonl")])
    assert read_split(plan.splits[0], plan.schema).column("p").to_pylist() == texts


def test_a_column_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    """Types nested deeper than Parquet reads again are named before anything is spent."""
    deep = pa.int32()
    for _ in range(100):
        deep = pa.struct([("a", deep)])
    empty = pa.schema([("prompt", pa.string()), ("deep", deep)]).empty_table()
    pq.write_table(empty, tmp_path / "in.parquet", store_schema=False)
    with pytest.raises(InputError, match=r"column 'deep' .* nests deeper"):
        plan_input([str(tmp_path / "in.parquet")])


DEEP = '{"a":' * 400 + "1" + "}" * 400


@pytest.mark.parametrize(
    "columns",
    [
        {"placement": DEEP}, {"placement": "[" * 5000}, {"response_format": DEEP}, {"stop": "[" * 5000},
        {"response_format": '{"type":"json_schema","json_schema":{"schema":{"pattern":"(?=a)"}}}'},
        {"response_format": '{"type":"json_schema","json_schema":{"schema":{"$schema":[1]}}}'},
    ],
)  # fmt: skip
def test_a_row_that_asks_for_too_much_is_a_bad_row(columns: Mapping[str, str]) -> None:
    """Constraints, sampling and schemas that nobody can read cost their row, and no other."""
    table = pa.table({"id": ["a", "b"], "prompt": ["x", "y"], **{name: [text, None] for name, text in columns.items()}})
    rows = render(table, SPEC, {"tiny": None}, file="f", row_start=0, seed=1).to_pylist()
    assert rows[0]["reason"] == "invalid" or columns.keys() == {"stop"}
    assert rows[1]["reason"] is None


def test_a_value_that_is_no_json_for_us_is_a_bad_row(tmp_path: Path) -> None:
    """NaN, which JSON has not, and a number of thousands of digits, which Python has not, cost their rows."""
    lines = ('{"id": "a", "prompt": NaN}', '{"id": "b", "prompt": "x"}', '{"id": "c", "prompt": ["y"], "stop": NaN}')
    lines += ('{"id": "e", "prompt": "x", "seed": ' + "9" * 5000 + "}",)
    (tmp_path / "in.jsonl").write_text("\n".join((*lines, '{"id": "d", "prompt": "z", "stop": {"x": 1}}')))
    plan = plan_input([str(tmp_path / "in.jsonl")])
    table = read_split(plan.splits[0], plan.schema)
    rows = render(table, SPEC, {"tiny": None}, file="f", row_start=0, seed=1).to_pylist()
    assert [row["reason"] for row in rows] == ["invalid", None, "invalid", "invalid", "invalid"]


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        ({"pattern": "^(a+)+$"}, "a" * 50 + "b", "/pattern"),
        ({"patternProperties": {"^(a+)+$": False}}, {"a" * 50 + "b": 1}, None),
        ({"patternProperties": {"^a": False}}, {"ab": 1}, "/patternProperties"),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"b": 1}, "/additionalProperties"),
        ({"additionalProperties": {"type": "string"}}, {"b": 1}, "/additionalProperties/type"),
        ({"uniqueItems": True}, [{"a": n} for n in range(5000)], "its size"),
        ({"uniqueItems": True}, [1, 1], "/uniqueItems"),
        ({"$ref": "#/$defs/0", "$defs": {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)}
          | {"40": {}}}, 1, "its size"),
    ],
)  # fmt: skip
def test_no_schema_keeps_us_busy(
    schema: dict[str, Any], value: Any, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns that backtrack and references that multiply end, and other rules hold as they did."""
    monkeypatch.setattr(json_schemas, "MAX_RULES", 20_000)
    assert Checker(schema).problem(value) == problem


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('pools.one.api_key_file="a\\0b"', "NUL"), ('pools.one.headers={"a\\nb": "c"}', "not plain text"),
        ('pools.one.headers={"a b": "c"}', "no name of a header"),
        ('pools.one.headers={"a": "b\\r\\nc: d"}', "no header"),
        ('tags={"\\e[31m": "x"}', "not plain text"), ('name="a\\nb"', "name"),
        ("name=../x", "name"), ("name=/x", "name"),
    ],
)  # fmt: skip
def test_no_text_of_a_file_gets_where_it_does_not_belong(tmp_path: Path, setting: str, message: str) -> None:
    """Into a header, a path, a terminal or a name: it is a configuration error instead."""
    file = write_job(tmp_path, prompts(1), [remote("one")])
    with pytest.raises(ConfigError, match=message) as caught:
        Job.from_yaml(file, run_date=DAY, set=[setting])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.parquet", "charges/../../x", "a/../../../b"])
def test_a_manifest_lists_nothing_outside_its_ledger(path: str) -> None:
    """Readers trust what a manifest lists, so it is held to that."""
    part = {"table": "charges", "path": path, "rows": 1, "size_bytes": 1, "sha256": "0"}
    document = {"run_id": "a", "run_date": "2026-01-02", "status": "complete", "sequence": 0, "parts": [part]}
    with pytest.raises(StoreError, match="outside the ledger"):
        Manifest.from_json(json.dumps(document).encode(), "m")
    for wrong in (b"[" * 100_000, json.dumps(document | {"parts": ["x"]}).encode(),
                  json.dumps(document | {"sequence": float("inf")}).encode()):  # fmt: skip
        with pytest.raises(StoreError, match="not a ledger manifest"):
            Manifest.from_json(wrong, "m")
    with pytest.raises(StoreError, match="outside the ledger"):
        Manifest.from_json(json.dumps(document | {"parts": [part | {"path": 1}]}).encode(), "m")


def test_a_terminal_is_told_nothing_to_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids, messages and names with escapes and line ends are lines of plain text in every view of a ledger."""
    evil = "id\x1b[2J\x1b]0;x\x07\nAttempt 9 on own: ok\u202e"
    store = Store.at(str(tmp_path / "ledger"))
    tables = {
        "requests": [request(A, evil, 0, attempt_id=b"1" * 16, source_file=evil, tenant=evil,
                             tags=json.dumps({"a": evil}))],
        "attempts": [attempt(A, evil, "a1", evil, status="failed", error_class="server", error_message=evil, model=evil,
                             provider_request_id=evil, operator=evil)],
    }  # fmt: skip
    write_run(store, run_row(A, DAY_A, "complete", requests=1, served=0, dead=1), tables)
    for words in (
        ["explain", store.url, evil], ["ledger", "query", store.url, 'SELECT *, 1 AS "a\x1b[31m" FROM attempts'],
        ["ledger", "verify", store.url], ["ledger", "query", store.url, f"SELECT \x1b[31m{evil}"],
        ["explain", store.url, evil + "x"],
    ):  # fmt: skip
        invoke(words)
        out, err = capsys.readouterr()
        assert out + err
        assert all(char.isprintable() or char == "\n" for char in out + err), words
        assert "\nAttempt 9" not in out


def test_code_of_a_model_runs_only_where_the_pools_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is told so by the model's own key or the engine's arguments; without either it is told not to."""
    told: list[bool] = []

    def start(config: vllm_engine.VllmConfig, **_: Any) -> Any:
        told.append(config.engine_args["trust_remote_code"])
        return object()

    monkeypatch.setattr(vllm_engine.VllmEngine, "start", start)
    for trusted, arguments in ((False, {}), (True, {}), (False, {"trust_remote_code": True})):
        pool = {
            "name": "own",
            "kind": "vllm",
            "models": ["tiny"],
            "price": {"accelerator_hour": "1"},
            "engine": arguments,
        }
        models = {"tiny": {"source": str(tmp_path), "trust_remote_code": trusted}}
        job = Job.from_yaml(write_job(tmp_path, prompts(1), [pool], models=models), run_date=DAY)
        facts = model_facts(job, {"tiny": str(tmp_path)}, rehearse=False)
        context: Any = SimpleNamespace(pools=job.pools, models=facts, rehearse=False)
        engines._start(context, job.pools[0], "tiny")
    assert told == [False, True, True]
