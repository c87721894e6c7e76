"""A secret scan: whole runs with planted keys, and every byte that they leave looked at for any of them."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import DAY, check_conserved, prompts, remote, write_job, written
from test_resume import fail_at

from bidbeam.connectors.doubles import OK, RESET, TRUNCATED, EndpointDouble, Reply, Seen
from bidbeam.connectors.errors import BidbeamError
from bidbeam.connectors.secrets import known_secrets, mask
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.job import Job
from bidbeam.transforms import shift, write_outputs

pytestmark = pytest.mark.timeout(120)

# Without the shape of any provider's keys: what has one is masked by its shape alone.
KEYS = {
    "NEAR_KEY": "near/planted+one==Qz7Jw2Xc9Vb4",
    "FAR_KEY_IN_A_FILE": "far~planted~two~Lm5Np8Rt3Yk6",
    "DEAD_KEY": "dead.planted.three.Hs4Df7Gj1Wq",
    "AWS_SECRET_ACCESS_KEY": "storage/planted/four/Tb6Vn9Mx2Zc5Ka8",
}
ROWS = 48


def spellings(key: str) -> Iterator[bytes]:
    """A key as it is, escaped for URLs and for JSON, in base64 wherever it may begin, and as a JSON pickle of both."""
    yield key.encode()
    yield quote(key, safe="").encode()
    yield json.dumps(key)[1:-1].replace("/", "\\/").encode()
    for before in range(3):
        core = base64.b64encode(b"\0" * before + key.encode())[(0, 2, 3)[before] : -4]
        yield core
        yield core.replace(b"+", b"-").replace(b"/", b"_")
    yield key.encode("utf-16-le")


def found_in(data: bytes) -> set[str]:
    """The names of the keys that stand in it."""
    return {name for name, key in KEYS.items() for text in spellings(key) if text in data}


def pieces_of(file: Path) -> Iterator[bytes]:
    """A file's bytes, and of Parquet and Arrow also what they hold once it is unpacked."""
    data = file.read_bytes()
    yield data
    if data[:4] == b"PAR1":
        tables = [pq.read_table(file)]
    elif data[:6] == b"ARROW1":
        with pa.ipc.open_file(data) as reader:
            tables = [reader.read_all()]
    else:
        try:
            tables = [pa.ipc.open_stream(data).read_all()]
        except (pa.ArrowInvalid, OSError):
            return
    for table in tables:
        yield repr(table.schema.metadata).encode()
        for name, column in zip(table.column_names, table.columns, strict=True):
            if name not in ("output", "samples", "prompt", "messages"):
                yield repr(column.to_pylist()).encode()


def scan(place: Path) -> dict[str, set[str]]:
    """File -> the keys in it, over every file below ``place`` but those that are meant to hold one."""
    found = {}
    for file in place.rglob("*"):
        if file.is_file() and file.name != "far.key":
            names = set().union(*(found_in(piece) for piece in pieces_of(file)))
            if names:
                found[str(file.relative_to(place))] = names
    return found


def test_the_scan_finds_what_is_there(tmp_path: Path) -> None:
    """A key in plain bytes, packed into Parquet or Arrow, escaped or in base64 is found: a scan that finds none can."""
    key = KEYS["NEAR_KEY"]
    (tmp_path / "log").write_bytes(b"at " + quote(key, safe="").encode())
    (tmp_path / "b64").write_bytes(base64.b64encode(b"user:" + key.encode() + b" and more"))
    (tmp_path / "pickle").write_bytes(pickle.dumps({"error": ValueError(key)}))
    table = pa.table({"error_message": [f"bad key {key}"] * 1000})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd")
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
        file.write_table(table)
    assert scan(tmp_path) == {name: {"NEAR_KEY"} for name in ("log", "b64", "pickle", "x.parquet", "x.arrow")}


class Echo:
    """An endpoint that gives away the key wherever an answer has room for it, in one place after the other."""

    def __init__(self, key: str) -> None:
        self._key, self._count = key, 0

    def __call__(self, seen: Seen) -> Reply:
        assert self._key in seen.headers["authorization"], "the key was not sent"
        self._count += 1
        key, coded = self._key, base64.b64encode(f"api:{self._key}".encode()).decode()
        everywhere = {"X-Request-Id": key, "Retry-After": key, "Content-Type": key, f"X-{coded[:20]}": coded}
        replies = (
            Reply.error(500, f"bad key {key} of {seen.headers['authorization']}", code=key, headers=everywhere),
            Reply.error(400, f"https://host/v1?auth={quote(key, safe='')} is no place", headers={"X-Request-Id": key}),
            Reply.error_inside(503, f"Basic {coded}"),
            Reply(500, json.dumps({"detail": [key], "error": {"code": key, "type": key}}).encode()),
            Reply.garbage(f"<html>{key}</html>".encode(), content_type=f"text/{key}"),
            Reply(merge={"id": key, "model": key, "system_fingerprint": key, "object": key}, headers=everywhere),
            Reply(merge={"error": {"message": f"{key[:14]}****{key[-9:]}"}}),
            Reply(merge={"usage": {"prompt_tokens": key, "completion_tokens": 3, "cost": key}}),
            Reply(302, b"{}", {"Location": f"https://elsewhere.example/{key}"}),
            Reply(body=json.dumps({"id": f"{key}", "choices": [
                {"message": {"content": "fine"}, "finish_reason": key.replace("/", "_").replace("+", "-")},
            ]}).encode()),
            TRUNCATED, RESET, OK, OK, OK,
        )  # fmt: skip
        return replies[self._count % len(replies)]


@pytest.fixture
def logs() -> Iterator[list[str]]:
    """Every record that anything logs, down to DEBUG, with its traceback."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record) + repr(record.__dict__))

    handler, root = Keep(), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.setLevel(before)
    root.removeHandler(handler)


def test_no_key_is_left_by_runs_that_fail_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], logs: list[str]
) -> None:
    """A run that crashes, its resumption to the end, and every command over what it left, against endpoints that echo
    the keys in messages, codes, ids, names, headers and encodings: no file, log, message or pickle holds one.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("NEAR_KEY", "DEAD_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEYS[name])
    monkeypatch.setattr(shift, "_SEGMENT_S", 0.0)
    (tmp_path / "far.key").write_text(KEYS["FAR_KEY_IN_A_FILE"])
    refusal = Reply.error(401, f"no such key: {KEYS['DEAD_KEY']}", headers={"X-Request-Id": KEYS["DEAD_KEY"]})
    said: list[Any] = []
    with (
        EndpointDouble(["tiny"], Echo(KEYS["NEAR_KEY"])) as near,
        EndpointDouble(["tiny"], Echo(KEYS["FAR_KEY_IN_A_FILE"])) as far,
        EndpointDouble(["tiny"], refusal) as dead,
    ):
        pools = [
            remote("near", near.base_url, api_key_env="NEAR_KEY"),
            remote("far", far.base_url, api_key_file="far.key", price={"input": "0.11", "output": "0.41"}),
            remote("dead", dead.base_url, api_key_env="DEAD_KEY", price={"input": "0.01", "output": "0.02"}),
        ]
        file = write_job(tmp_path, prompts(ROWS), pools, tolerate={"dead": "100%"}, tags={"team": "a"},
                         storage={"s3": {"endpoint_url": "http://127.0.0.1:9"}})  # fmt: skip
        command = ["run", str(file), "--run-date", DAY.isoformat()]
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        assert invoke([*command, "--traceback"]) == 1
        undo()
        assert list(tmp_path.rglob("_journal/**/*.arrow")), "the crash left no journal to look into"
        assert scan(tmp_path) == {}
        assert invoke([*command, "--json"]) == 0
        assert near.requests
        assert far.requests
        assert dead.requests
        assert invoke(["pools", str(file)]) in (0, 1, 2, 3)
        job = Job.from_yaml(file, run_date=DAY)
        done = written(job)
        check_conserved(done, ROWS)
        ledger = str(tmp_path / "ledger")
        failed = [row for row in done.attempts if row["status"] == "failed"]
        assert len({row["error_class"] for row in failed}) >= 4
        for words in (
            ["ledger", "query", ledger, "FROM attempts"], ["ledger", "query", ledger, "FROM runs", "--json"],
            ["explain", ledger, str(failed[0]["request_id"])], ["ledger", "verify", ledger],
            ["ledger", "report", ledger, "--output", "page.html"], ["quote", str(file)],
        ):  # fmt: skip
            assert invoke(words) == 0, words
        wrong = ("pools.near.api_key_env=" + KEYS["NEAR_KEY"], "pools.near.api_key=" + KEYS["NEAR_KEY"])
        for setting in wrong:
            with pytest.raises(BidbeamError) as refused:
                Job.from_yaml(file, run_date=DAY, set=[setting])
            said += [refused.value, traceback.format_exception(refused.value)]
        said += [job, repr(job), job.pools]
    out, err = capfd.readouterr()
    assert "CrashError" in err
    assert found_in(out.encode() + err.encode()) == set()
    assert found_in("\n".join(logs).encode()) == set()
    assert found_in(b"".join(pickle.dumps(each) for each in said)) == set()
    assert scan(tmp_path) == {}


def test_an_answer_is_the_users_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says a key says it in the output, which is the user's and is changed by nobody, and nowhere else."""
    key = KEYS["NEAR_KEY"]
    monkeypatch.setenv("NEAR_KEY", key)
    reply = Reply(merge={"choices": [{"index": 0, "message": {"content": f"it is {key}"}, "finish_reason": "stop"}]})
    with EndpointDouble(["tiny"], lambda _: reply) as near:
        file = write_job(tmp_path, prompts(2), [remote("near", near.base_url, api_key_env="NEAR_KEY")])
        assert invoke(["run", str(file), "--run-date", DAY.isoformat(), "--quiet"]) == 0
    outputs = written(Job.from_yaml(file, run_date=DAY)).outputs
    assert outputs.column("output").to_pylist() == [f"it is {key}"] * 2
    assert {Path(name).parent.name for name in scan(tmp_path)} <= {"outputs"}


@pytest.mark.parametrize("kind", [RuntimeError, BidbeamError])
def test_a_failure_that_nobody_foresaw_tells_no_key(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is raised, the command masks the keys it has read, and in what is not ours the environment's too."""
    monkeypatch.setenv("NEAR_KEY", KEYS["NEAR_KEY"])
    file = write_job(tmp_path, prompts(1), [remote("near", api_key_env="NEAR_KEY")])

    def failing(*_: Any, **__: Any) -> Any:
        from bidbeam.connectors.secrets import read_key

        read_key(Job.from_yaml(file, run_date=DAY).pools[0])
        raise kind(f"header Bearer {KEYS['NEAR_KEY']} is \x1b[31mwrong")

    monkeypatch.setattr("bidbeam.pipelines.run.run_job", failing)
    for more in ([], ["--json"], ["--traceback"]):
        assert invoke(["run", str(file), *more]) == 1
        out, err = capsys.readouterr()
        assert found_in(out.encode() + err.encode()) == set()
        assert "\x1b[31m" not in err or "--traceback" in more


def test_keys_are_masked_in_every_spelling() -> None:
    """As they are, escaped for URLs, in base64 at any place; and text that holds none of one stays as it is."""
    for key in KEYS.values():
        for text in spellings(key):
            if b"\0" not in text and b"\\" not in text:
                assert found_in(mask(f"a {text.decode()} b", [key]).encode()) == set()
    assert mask("The model is overloaded", tuple(KEYS.values())) == "The model is overloaded"
    assert isinstance(known_secrets(environment=True), tuple)
