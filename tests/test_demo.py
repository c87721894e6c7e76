"""The demo: its prompts, its pools, its server that must never be left behind, and the whole of it in rehearsal."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from bidbeam.pipelines.job import Job

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples/demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The demo's directory, its modules importable by their own names."""
    monkeypatch.syspath_prepend(str(DEMO))
    before = set(sys.modules)
    yield DEMO
    for name in {"make_prompts", "server"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def make_prompts(demo: Path) -> ModuleType:
    import make_prompts

    module: ModuleType = make_prompts
    return module


def test_prompts_are_many_real_and_share_long_instructions(make_prompts: ModuleType) -> None:
    """At least 300 rows with ids of their own, three tasks, each under an instruction of hundreds of words."""
    rows = make_prompts.rows()
    assert len(rows) >= 300
    assert len({row["request_id"] for row in rows}) == len(rows)
    instructions = {row["task"]: row["messages"][0]["content"] for row in rows}
    assert len(instructions) == 3
    assert min(len(text.split()) for text in instructions.values()) > 250
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows)
    tasks = [row["task"] for row in rows]
    assert sum(a != b for a, b in pairwise(tasks)) > len(tasks) / 3  # shuffled


def test_prompts_are_the_same_every_time(make_prompts: ModuleType) -> None:
    """Two demos ask the same."""
    assert make_prompts.rows() == make_prompts.rows()


def test_prompts_are_written_as_parquet_and_arrow(make_prompts: ModuleType, tmp_path: Path) -> None:
    """Half of the rows are in a Parquet file, half in an Arrow file, with the same columns."""
    count = make_prompts.write(tmp_path)
    parquet = pads.dataset(tmp_path / "first.parquet").to_table()
    with pa.ipc.open_file(tmp_path / "second.arrow") as reader:
        arrow = reader.read_all()
    assert parquet.num_rows + arrow.num_rows == count
    assert parquet.schema.names == arrow.schema.names == make_prompts.COLUMNS.names
    assert abs(parquet.num_rows - arrow.num_rows) <= 1


def test_pools_are_one_engine_of_ours_and_two_endpoints_at_different_prices() -> None:
    """Three pools for one model: an engine paid by the hour and two endpoints whose prices differ, keys by variable."""
    job = Job.from_yaml(DEMO / "job.yaml")
    own, *rented = sorted(job.pools, key=lambda pool: pool.kind != "vllm")
    assert own.kind == "vllm"
    assert own.price.by_time
    assert [pool.kind for pool in rented] == ["openai", "openai"]
    assert rented[0].price.unit_prices != rented[1].price.unit_prices
    assert {pool.api_key_env for pool in rented} == {"BIDBEAM_DEMO_KEY"}
    assert {tuple(pool.models) for pool in job.pools} == {(job.model,)}
    assert job.baseline


HOLD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(600)
"""
WITHIN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {demo!r})
from server import DemoServer
with DemoServer([sys.executable, "-c", {hold!r}], {{}}, port=9, log=Path({log!r})) as server:
    print("up", flush=True)
    {then}
"""


def descendants(process: psutil.Process, count: int) -> list[psutil.Process]:
    """The processes below this one, once there are so many."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = process.children(recursive=True)
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError("the server's processes did not start")


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_server_never_outlives_the_demo(tmp_path: Path, end: str) -> None:
    """Whether the demo ends as it should or is killed, the server and whatever it started are gone."""
    then = "sys.stdin.read()" if end == "leaves" else "time.sleep(600)"
    code = WITHIN.format(demo=str(DEMO), hold=HOLD, log=str(tmp_path / "log"), then=then)
    demo = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert demo.stdin is not None
    assert demo.stdout is not None
    assert demo.stdout.readline() == b"up\n"
    started = descendants(psutil.Process(demo.pid), 3)  # supervisor, server, and what the server started
    if end == "leaves":
        demo.stdin.close()
    else:
        demo.send_signal(signal.SIGKILL)
    demo.wait()
    demo.stdout.close()
    assert not psutil.wait_procs(started, timeout=20)[1]


def test_server_that_ends_early_is_reported_with_its_log(demo: Path, tmp_path: Path) -> None:
    """A server that dies while starting is an error that shows the end of its log."""
    from server import DemoServer, ServerError

    log = tmp_path / "log"
    with (
        DemoServer([sys.executable, "-c", "print('no such model')"], {}, port=9, log=log) as server,
        pytest.raises(ServerError, match="no such model"),
    ):
        server.wait_until_ready()


@pytest.mark.engine
def test_demo_rehearses_from_prompts_to_the_bill(tmp_path: Path) -> None:
    """The demo with stand-ins: every pool wins lots, all prompts are served, and the commands it ends with work."""
    command = [sys.executable, str(DEMO / "run.py"), "--rehearse", "--work", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = ended.stdout
    assert "420, of which 420 were served" in told
    bill = told[told.index("== the bill") : told.index("== everything paid")]
    assert [line.split()[0] for line in bill.splitlines() if line.startswith(("own", "rented"))] == [
        "own", "rented", "rented-plain",
    ]  # fmt: skip
    bidbeam = Path(sys.executable).parent / "bidbeam"
    typed = [shlex.split(line) for line in told.splitlines() if line.startswith(".venv/bin/bidbeam")]
    assert len(typed) >= 5
    for words in typed:
        if words[1] in {"explain", "ledger"}:
            done = subprocess.run([bidbeam, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stdout.count("\n") > 2
