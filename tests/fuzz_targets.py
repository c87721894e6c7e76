"""What is thrown at everything that reads what others wrote: bytes in, and an exception where a promise is broken.

Each target takes any bytes. It may end in the error that its reader documents and in no other, and no message may hold
the planted key.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from small_jobs import DAY, by_the_hour, remote

from bidbeam.connectors import prime_gpus, targon
from bidbeam.connectors.batch_lines import Asked, overall_message, read_line
from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import BidbeamError, ConfigError, InputError, StoreError
from bidbeam.connectors.fetch import FeedError
from bidbeam.connectors.front_prime import listing
from bidbeam.connectors.fx_feeds import _coingecko, _kraken
from bidbeam.connectors.http_wire import Outcome, read_answer
from bidbeam.connectors.inputs import plan_input, read_split
from bidbeam.connectors.leases import _node
from bidbeam.connectors.ledger_manifest import Manifest
from bidbeam.connectors.pools import PoolSpec, PriceSchedule
from bidbeam.connectors.price_feeds import SHAPES, check_plausible, read_prices
from bidbeam.connectors.profiles import PROFILES
from bidbeam.connectors.secrets import known_secrets, mask, read_key
from bidbeam.connectors.wire_json import pointer, read_json
from bidbeam.pipelines.job import Job
from bidbeam.transforms.output_checks import check_answers
from bidbeam.transforms.rendering import PromptSpec, RenderSpec, check_columns, render

KEY = "sk-planted-0123456789abcdef"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
os.environ["FUZZ_TARGETS_KEY"] = KEY
read_key(PoolSpec("far", "openai", {}, PriceSchedule("p", "far", {}), api_key_env="FUZZ_TARGETS_KEY"))
_NAMES = sorted(PROFILES)
_MEMORY = Path("/dev/shm")  # noqa: S108 # a directory of our own in it
_HOME = tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None)
HOME = Path(_HOME.name)
"""Where the files of this process's cases stand, one after the other."""


@dataclass(frozen=True)
class Target:
    """``run`` takes a case; ``seeds`` are valid ones to begin from."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


def no_key(*texts: str | None) -> None:
    """No text holds the key, or much of it."""
    for text in texts:
        assert text is None or KEY[4:18] not in text


def told(error: Exception, *kinds: type[Exception]) -> None:
    """An error of these kinds, with a message of bounded length and without the key."""
    assert not kinds or isinstance(error, kinds), type(error)
    assert len(str(error)) < 20_000
    no_key(str(error))


def settled(outcome: Outcome) -> None:
    """An outcome that every column it goes to can hold, and no message that holds more than it may."""
    assert outcome.status in ("ok", "failed", "cancelled")
    assert (outcome.status == "ok") == (outcome.output is not None)
    for text in (outcome.error_message, outcome.provider_request_id, outcome.finish_reason):
        no_key(text)
        assert text is None or (len(text) <= 200 and text.isprintable())
    for name in Outcome.__dataclass_fields__:
        pa.array([getattr(outcome, name)], RESULT_SCHEMA.field(name).type)


def answer(data: bytes) -> None:
    """A profile, a status, headers and a body, as an endpoint sends them."""
    head, body = data[:4].ljust(4, b"\0"), data[4:]
    headers = {}
    if head[3] & 1:
        cut = body.find(b"\n")
        line, body = (body[:cut], body[cut + 1 :]) if cut >= 0 else (b"", body)
        names = ("retry-after", "x-request-id", "content-type", "retry-after-ms", "x-amzn-requestid")
        headers[names[(head[3] >> 1) % len(names)]] = line.decode("utf-8", "surrogateescape")
    outcome = read_answer(
        PROFILES[_NAMES[head[0] % len(_NAMES)]],
        (200, 400, 401, 429, 500, 503, 424, 301)[head[1] % 8],
        headers,
        body,
        chat=bool(head[2] & 1),
        n=1 + (head[2] >> 1) % 3,
        prompt_text="the prompt of this request",
        secrets=(KEY,),
        now=lambda: NOON,
    )
    settled(outcome)
    if outcome.status == "ok":
        _check_form(outcome)


_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(x+)+$"}}, "uniqueItems": True}
_FORM = json.dumps({"response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}})


def _check_form(outcome: Outcome) -> None:
    columns = {name: [getattr(outcome, name, None)] for name in RESULT_SCHEMA.names}
    columns |= {"tag": [0], "started_at": [NOON], "finished_at": [NOON], "endpoint_host": ["h"]}
    columns = {name: columns[name] for name in RESULT_SCHEMA.names}
    check_answers(pa.array([_FORM]), pa.RecordBatch.from_pydict(columns, schema=RESULT_SCHEMA))


def batch_line(data: bytes) -> None:
    """A line of a batch's answer file, and what a batch says of itself."""
    for name in ("openai", "vertex", "azure"):
        line = read_line(
            data,
            PROFILES[name],
            chat=True,
            find=lambda name: Asked(1, lambda: "the prompt of this request") if name == "row-0" else None,
            secrets=(KEY,),
            now=lambda: NOON,
        )
        if line is not None:
            assert line.custom_id == "row-0"
            settled(line.outcome)
    no_key(overall_message(pointer(read_json(data), "/error"), (KEY,)))
    node = _node(read_json(data))
    assert node is None or not {*node.node_id} & {*"/?#@ %\\"}


def feed(data: bytes) -> None:
    """A document of a price feed, a ticker or an inventory."""
    document = read_json(data)
    for name, shape in SHAPES.items():
        unit = PROFILES[name].price_unit
        for served_by in (None, "maker"):
            for currency in ("USD", *shape.native):
                try:
                    assert unit is not None
                    prices, _ = read_prices(document, shape, unit, "small", currency=currency, served_by=served_by)
                    check_plausible(prices, Decimal(1))
                    pa.array(list(prices.values()), pa.decimal128(20, 15))
                except FeedError as error:
                    told(error)
    for read in (lambda: _kraken(document, "TAOUSD"), lambda: _coingecko(document, "bittensor", NOON)):
        try:
            read()
        except FeedError as error:
            told(error)
    items = document if isinstance(document, list) else pointer(document, "/items")
    for each in items if isinstance(items, list) else ():
        for offer in (targon._offer(each), prime_gpus._offer(each)):
            assert offer is None or offer.told.isprintable()


SPEC = RenderSpec(
    prompt=PromptSpec(id="id", column="prompt"), model="tiny", sampling={"max_tokens": 8}, placement={},
    longest_context={"tiny": 4096},
)  # fmt: skip
TEMPLATE = RenderSpec(
    prompt=PromptSpec(template="{{ prompt | trim }}{% for x in prompt %}{{ x }}{% endfor %}"), model="tiny",
    sampling={}, placement={}, longest_context={},
)  # fmt: skip


def jsonl(data: bytes) -> None:
    """A JSON Lines file: planned, read and rendered; every line that is not blank is one row."""
    file = HOME / "in.jsonl"
    file.write_bytes(data)
    try:
        plan = plan_input([str(file)], target_bytes=1 << 16)
    except InputError as error:
        told(error)
        return
    for split in plan.splits:
        _rendered(read_split(split, plan.schema), plan.schema)


def _rendered(table: pa.Table, schema: pa.Schema) -> None:
    for spec in (SPEC, TEMPLATE):
        try:
            check_columns(spec, schema)
        except (InputError, ConfigError):
            continue
        rows = render(table, spec, {"tiny": None}, file="f", row_start=0, seed=1)
        assert rows.num_rows == table.num_rows
        rows.validate(full=True)


def columns(data: bytes) -> None:
    """Sampling and placement that rows bring along, as text and as JSON."""
    text = data.decode("utf-8", "replace").replace("\0", "")
    names = ("response_format", "stop", "placement", "temperature", "max_tokens", "n", "seed", "prompt")
    _rendered(*_with_schema(pa.table({"id": ["a", "b"], "prompt": ["x", "y"], "placement": [text, None]})))
    parts = text.split("\n")
    line = "{" + ",".join(f'"{name}":{part}' for name, part in zip(names, parts, strict=False) if part.strip()) + "}"
    jsonl(f'{{"id":"a","prompt":"x"}}\n{line}\n'.encode())


def _with_schema(table: pa.Table) -> tuple[pa.Table, pa.Schema]:
    return table, table.schema


def _loads(where: Path) -> None:
    try:
        job = Job.from_yaml(where, run_date=DAY)
    except BidbeamError as error:
        assert isinstance(error, ConfigError | InputError), type(error)  # noqa: PT017 - which of ours it is
        # A text that is no key by its shape may be quoted; the command knows the keys that were read.
        no_key(mask(str(error), known_secrets(environment=False)))
    else:
        assert "/" not in job.run_id
        assert ".." not in job.run_id


def job_file(data: bytes) -> None:
    """The text of a job file."""
    (HOME / "pools.yaml").write_bytes(SEED_POOLS)
    (HOME / "job.yaml").write_bytes(data)
    _loads(HOME / "job.yaml")


def pools_file(data: bytes) -> None:
    """The text of a pools file."""
    (HOME / "job.yaml").write_bytes(SEED_JOB)
    (HOME / "pools.yaml").write_bytes(data)
    _loads(HOME / "job.yaml")


def manifest(data: bytes) -> None:
    """A manifest of the ledger: whatever it lists stays below the ledger."""
    try:
        found = Manifest.from_json(data, "m.json")
    except StoreError:
        return
    for part in found.parts:
        assert not part.path.startswith("/")
        assert ".." not in part.path.split("/")


_CHAT = {
    "id": "x-1",
    "choices": [{"index": 0, "message": {"content": '{"a": "xxxxxx"}'}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}, "cost": 0.1},
}
_ERROR = {"error": {"message": f"bad key {KEY}, try again in 6 s", "code": 429, "type": "rate"}}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


SEED_JOB = _json(
    {
        "name": "small", "input": "in/*.parquet", "output": "out", "ledger": "ledger", "model": "tiny",
        "prompt": {"id": "id", "template": "Say {{ x }}", "system": "Be brief"},
        "sampling": {"max_tokens": 8, "stop": ["a"]},
        "budget": {"max_cost": "25.00"}, "deadline": "6h", "timezone": "UTC", "tags": {"team": "a"},
        "placement": {"jurisdictions": ["EEA"], "operators": ["own"], "zdr": True}, "tolerate": {"dead": "0.1%"},
        "auction": {"payment": "pay_as_bid", "rounds": 2}, "pools": "pools.yaml", "storage": {"s3": {"anon": True}},
        "baseline": {"name": "list", "input": "0.5", "output": "1.5", "per": "1M tokens"},
    }
)  # fmt: skip
SEED_POOLS = _json(
    {
        "models": {"tiny": {"source": "models/tiny", "trust_remote_code": False}},
        "fx": {"TAO": {"rate": "401.5", "at": "2026-01-01T00:00:00Z", "max_age": "90d"}},
        "pools": [
            remote("far", "https://far.example/v1", api_key_env="FAR_KEY", timeout="30s", headers={"x-team": "a"}),
            remote("queue", "https://queue.example/v1", kind="batch", profile="openai"),
            by_the_hour("own", engine={"max_model_len": 512}, placement={"jurisdiction": "DE"}),
        ],
    }
)
_PRICES = {"prompt": "0.0000001", "completion": "0.0000004", "input_cache_read": "1e-8", "request": "0"}
_PART = {
    "table": "charges",
    "path": "charges/run_date=2026-01-02/run_id=a/part-0.parquet",
    "rows": 1,
    "size_bytes": 2,
    "sha256": "0",
}
_MANIFEST = {"run_id": "a", "run_date": "2026-01-02", "status": "complete", "sequence": 0, "parts": [_PART]}

TARGETS: Mapping[str, Target] = {
    "answer": Target(answer, [bytes([n % 30, n % 8, n % 6, 0]) + _json(_CHAT if n % 2 else _ERROR) for n in range(12)]
                     + [b"\x01\x03\x01\x01" + KEY.encode() + b"\n" + _json(_ERROR)]),
    "batch_line": Target(batch_line, [
        _json({"custom_id": "row-0", "response": {"status_code": 200, "body": _CHAT}, "error": None}),
        _json({"custom_id": "row-0", "response": {"status_code": 429, "body": _ERROR}}),
        _json({"custom_id": "row-0", "error": {"code": KEY, "message": KEY}}),
        _json({"custom_id": "row-0", "error": KEY}),
        _json({"error": {"code": KEY}, "node": {"id": "n-1", "ip": "1.2.3.4"}}),
    ]),
    "feed": Target(feed, [
        _json({"data": [{"id": "small", "price": {"input": {"usd": "0.1", "tao": 0.01}, "output": {"usd": 1}}}]}),
        _json({"data": [{"id": "small", "pricing": {**_PRICES, "overrides": [_PRICES]}}]}),
        _json({"data": {"endpoints": [{"tag": "maker", "pricing": _PRICES}]}}),
        _json({"data": [{"id": "small", "pricing": {"input_usd_per_mtok": 0.1, "output_usd_per_mtok": 0.4}}]}),
        _json({"error": [], "result": {"TAOUSD": {"c": ["401.5", "1"], "a": ["402"], "b": ["401"]}}}),
        _json({"bittensor": {"usd": 401.5, "last_updated_at": 1767355200}}),
        _json({"items": [{"name": "h100", "spec": {"gpu_type": "h100", "gpu_count": 8}, "cost_per_hour": "8.1"}]}),
        _json({"items": [listing("de-8x", "H100", 8, 17.6, "DE")], "totalCount": 1}),
    ]),
    "jsonl": Target(jsonl, [
        b'{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two", "temperature": 0.5}\n',
        b'{"id": "a", "prompt": [{"role": "user", "content": "x"}]}\n{"id": 1, "prompt": "two", "x": {"y": [1, null]}}',
        b'{"custom_id":"a","method":"POST","url":"/v1","body":{"model":"tiny","messages":[{"role":"user","content":"x"}]}}',
        b'\xef\xbb\xbf{"prompt": "a", "placement": {"zdr": true}, "stop": ["x"]}\r\n\r\n{"prompt": null, "n": 2}',
    ]),
    "columns": Target(columns, [
        b'{"type":"json_schema","json_schema":{"schema":{"type":"object"}}}\n["a"]\n{"zdr":true}\n0.5\n8\n2\n1\n"x"',
        b'{"type":"json_schema","json_schema":{"schema":{"pattern":"^(a+)+$","$ref":"#/$defs/a","$defs":{"a":{}}}}}',
        b'{"jurisdictions": ["EEA", "NO"], "tee": ["gpu"], "max_retention_days": 30, "operators": ["own"]}',
        b'"text"\n"a"\n"{}"\nNaN\n1e9\n-1\n"x"\n[{"role":"user","content":"x"}]',
    ]),
    "job": Target(job_file, [SEED_JOB,
        b"name: a\ninput: [b]\noutput: &x out\nledger: *x\npools: pools.yaml\nmodel: tiny\n"]),
    "pools": Target(pools_file, [SEED_POOLS]),
    "manifest": Target(manifest, [_json(_MANIFEST)]),
}  # fmt: skip
"""By name."""

TOKENS = (
    b"null", b"true", b"NaN", b"-Infinity", b"1e999999", b"1e-999999999", b"9" * 400, b"9" * 5000, b"-1", b"0.1", b'""',
    b"[]", b"{}", b"[" * 70, b"]" * 70, b'{"a":' * 70, b"[" * 2000, b'{"a":' * 2000,
    b"\\ud800", b"\\u0000", b"\x00", b"\xff",
    b"\xed\xa0\x80", b"\x1b[31m", b"\r\n", b"\n", b"../", b"/etc/passwd", b"<script>", b"{{", b"{% for x in y %}",
    b"!!python/x", b"&a ", b"*a", b"<<: ", b"- ", b": ", b'"', b",", KEY.encode(),
    b"the prompt of this request", b"error", b"choices",
    b"$ref", "\u202e".encode(), b"[" * 100_000,
)  # fmt: skip
"""Pieces that are put into valid cases."""


def mutated(seeds: Sequence[bytes], seed: int) -> bytes:
    """A case made of a valid one by a few changes, the same for the same ``seed``."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 5, 9))):
        at = chance.randint(0, len(data))
        to = min(len(data), at + chance.choice((0, 0, 1, 1, 2, 5, 20)))
        how = chance.random()
        if how < 0.6:
            data[at:to] = chance.choice(TOKENS)
        elif how < 0.75:
            data[at:to] = chance.randbytes(chance.randint(0, 4))
        elif how < 0.9:
            other = chance.choice(seeds)
            start = chance.randint(0, len(other))
            data[at:to] = other[start : start + chance.randint(0, 60)]
        else:
            del data[at if chance.random() < 0.3 else to :]
    return bytes(data)
