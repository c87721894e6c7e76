"""The kill test: a run on two pools is killed again and again, and loses nothing, pays for nothing twice.

    python tests/kill.py --prompts 2000 --kills 20 --seed 1

The pools' endpoints stand in processes of their own and keep books. Each start is killed with SIGKILL at a random point
while it plans, generates or publishes, half of them with two worker processes, of which one or the driver dies. Then
the same command is given again. What is left at the end is held to the books and to a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import pyarrow as pa
from small_jobs import DAY, check_conserved, prompts, remote, write_job, written

from bidbeam.connectors.chaos import Books
from bidbeam.pipelines.job import Job

TWO_WORKERS = ("--", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
PRICES = {
    "near": {"input": "0.10", "output": "0.40"},
    "far": {"input": "0.12", "cached_input": "0.02", "output": "0.45"},
}
BUDGET = Decimal("5.00")
SAME = ("output", "finish_reason", "model", "input_tokens", "output_tokens")
ENDS_S = 20.0
"""How long what a killed process leaves behind may take to end."""
_LOOK_S = 0.005
_HOME = "KILL_TEST_HOME"
_WORKER = "apache_beam.runners.worker.sdk_worker_main"


@dataclass(slots=True)
class Endpoint:
    """An endpoint in a process of its own, which outlives every kill."""

    name: str
    base_url: str

    def books(self) -> Books:
        with urllib.request.urlopen(self.base_url.removesuffix("/v1") + "/books", timeout=10) as answer:  # noqa: S310
            return Books.from_json(json.load(answer))

    def count(self) -> int:
        """Requests that it has begun."""
        with urllib.request.urlopen(self.base_url.removesuffix("/v1") + "/count", timeout=10) as answer:  # noqa: S310
            return int(answer.read())


@contextmanager
def endpoint(name: str, answers_after_s: float) -> Iterator[Endpoint]:
    command = [
        sys.executable, "-m", "bidbeam.connectors.chaos", "--models", "tiny",
        "--answers-after", str(answers_after_s), "--prices", json.dumps(PRICES[name]),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Endpoint(name, process.stdout.readline().strip())
        finally:
            process.terminate()


@dataclass(slots=True)
class Kill:
    """One kill: when it came and whom, and what was in flight: dispatched, and not yet journalled."""

    phase: str
    victim: str
    in_flight: int = 0


@dataclass(slots=True)
class Report:
    prompts: int = 0
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    attempts: Counter[str] = field(default_factory=Counter)
    served: int = 0
    twice: int = 0
    in_flight: int = 0
    cost: Decimal = Decimal(0)
    billed: Decimal = Decimal(0)
    verified: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        phases = Counter(f"{kill.phase}/{kill.victim}" for kill in self.kills)
        return "\n".join(
            (
                f"{self.prompts} prompts, {len(self.kills)} kills, {self.starts} starts, {self.seconds:.0f} s",
                f"  kills: {', '.join(f'{name} {n}' for name, n in sorted(phases.items()))}",
                f"  outputs: one for every prompt, as in an undisturbed run; cost {self.cost:f} of {BUDGET} USD",
                f"  attempts in the ledger: {', '.join(f'{name} {n}' for name, n in sorted(self.attempts.items()))}",
                f"  endpoints served {self.served} answers and billed {self.billed:f} USD; each is in the ledger",
                f"  served twice: {self.twice}, in flight at the kills: {self.in_flight}",
                f"  ledger verify: {self.verified}",
            )
        )


class Run:
    """One job's files, its endpoints, and starts of it."""

    def __init__(self, home: Path, count: int, pools: Sequence[Endpoint], concurrency: int) -> None:
        specs = [
            remote(
                pool.name,
                pool.base_url,
                price=PRICES[pool.name],
                capacity={"concurrency": concurrency, "tokens_per_second": 50_000},
            )
            for pool in pools
        ]
        self.path = write_job(home, prompts(count), specs, budget={"max_cost": str(BUDGET)})
        self.job = Job.from_yaml(self.path, run_date=DAY)
        self.home, self.pools = home, list(pools)
        self.run_dir = home / "out" / f"run_date={DAY}" / f"run_id={self.job.run_id}"
        self.log = home / "log.txt"

    @contextmanager
    def start(self, options: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
        command = [
            sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(self.path), "--run-date", str(DAY), "--quiet",
        ]  # fmt: skip
        mine = {**os.environ, _HOME: str(self.home)}
        with (
            self.log.open("ab") as log,
            subprocess.Popen([*command, *options], stdout=log, stderr=log, env=mine) as process,
        ):
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def asked(self) -> int:
        return sum(pool.count() for pool in self.pools)

    def publishing(self) -> bool:
        return any(self.run_dir.glob("outputs/*")) or any(
            self.home.glob(f"ledger/attempts/*/run_id={self.job.run_id}/*")
        )

    def ended(self) -> bool:
        return (self.run_dir / "_SUCCESS").exists()

    def settled(self) -> int:
        """Attempts that the journal has."""
        return len(_ids((self.run_dir / "_journal").glob("start-*/segments/*.arrow")))

    def in_flight(self) -> set[bytes]:
        """Attempts that were dispatched and that no segment has, of all starts."""
        journal = self.run_dir / "_journal"
        dispatched = _ids(journal.glob("start-*/dispatched/*.arrow"))
        return dispatched - _ids(journal.glob("start-*/segments/*.arrow"))


def _ids(paths: Iterator[Path]) -> set[bytes]:
    found: set[bytes] = set()
    for path in paths:
        try:
            column = pa.ipc.open_file(str(path)).read_all().column("attempt_id")
        except pa.ArrowInvalid:
            continue
        found.update(column.cast(pa.binary(16)).to_pylist())
    return found


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits until something is so; False where the process ends first, or the time."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if ready():
            return True
        time.sleep(_LOOK_S)
    return False


def kill_once(
    run: Run, phase: str, chance: random.Random, options: Sequence[str], windows: dict[str, float], more: int
) -> Kill | None:
    """Starts the run and kills it in a phase: a generating one once at most so many ``more`` requests have come.

    None where it ended before it could be killed.
    """
    with run.start(options) as process:
        if phase == "planning":
            hit = _until(lambda: False, process, chance.uniform(0.2, windows["planning"])) or process.poll() is None
        elif phase == "generating":
            wanted = run.asked() + chance.randint(1, more)
            hit = _until(lambda: run.asked() >= wanted or run.publishing(), process, 120)
        else:
            before = set(run.run_dir.glob("_journal/start-*"))
            hit = _until(lambda: run.publishing() and (not before or _began(run, before)), process, 120)
            time.sleep(chance.uniform(0, windows["publishing"]))
            hit = hit and not run.ended()
        if not hit or process.poll() is not None:
            process.wait()
            return None
        workers, victim = workers_of(process.pid), "driver"
        if workers and chance.random() < 0.5:
            victim = "worker"
            chance.choice(workers).kill()
        else:
            process.kill()
        try:
            process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver still runs {ENDS_S:.0f} s after its worker was killed") from None
        alive = left_behind(run)
        assert not alive, f"left behind {ENDS_S:.0f} s after the {victim} was killed: {alive}"
    return Kill(phase, victim)


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a driver."""
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [one for one in family if _cmdline(one)[1:3] == ["-m", _WORKER]]


def left_behind(run: Run) -> list[list[str]]:
    """What a run has started and is still there after a while, by its working directory in the environment."""
    until = time.monotonic() + ENDS_S
    while found := [one for one in psutil.process_iter() if _of(run, one)]:
        if time.monotonic() > until:
            return [_cmdline(one) for one in found]
        time.sleep(0.05)
    return []


def _of(run: Run, process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_HOME) == str(run.home)
    except psutil.Error:
        return False


def _began(run: Run, before: set[Path]) -> bool:
    """Whether this start writes files of its own by now."""
    return any(
        (path / "progress").exists() or any(path.glob("*"))
        for path in set(run.run_dir.glob("_journal/start-*")) - before
    )


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def undisturbed(run: Run) -> tuple[dict[str, Any], dict[str, float]]:
    """A run that nobody disturbs: its outputs by id, and how long it plans and publishes, in seconds."""
    began = time.monotonic()
    with run.start() as process:
        _until(lambda: run.asked() > 0, process, 60)
        planned = time.monotonic()
        _until(run.publishing, process, 120)
        publishing = time.monotonic()
        _until(run.ended, process, 60)
        ended = time.monotonic()
        assert process.wait(60) == 0, run.log.read_text()
    windows = {"planning": planned - began, "publishing": 0.7 * (ended - publishing)}
    return outputs(run), windows


def outputs(run: Run) -> dict[str, Any]:
    rows = written(run.job).outputs.to_pylist()
    found = {row["request_id"]: [row[name] for name in SAME] for row in rows}
    assert len(found) == len(rows), "a prompt has two outputs"
    return found


def kill_test(
    home: Path, count: int, kills: int, seed: int, *, workers: bool = True, answers_after_s: float = 0.03
) -> Report:
    """Runs it all; raises AssertionError where a promise is broken."""
    chance = random.Random(seed)
    began, report = time.monotonic(), Report(prompts=count)
    with ExitStack() as open_:
        spare = [open_.enter_context(endpoint(name, answers_after_s)) for name in PRICES]
        expected, windows = undisturbed(Run(home / "undisturbed", count, spare, 8))
        pools = [open_.enter_context(endpoint(name, answers_after_s)) for name in PRICES]
        run = Run(home / "killed", count, pools, 8)
        late = max(1, kills // 5)
        phases = ["generating" if chance.random() < 0.75 else "planning" for _ in range(kills - late)]
        ever: set[bytes] = set()
        for number, phase in enumerate([*phases, *["publishing"] * late]):
            more = max(2 * (count - run.settled()) // (phases[number:].count("generating") + 1), 1)
            options = TWO_WORKERS if workers and chance.random() < 0.5 else ()
            kill = kill_once(run, phase, chance, options, windows, more)
            report.starts += 1
            if kill is not None:
                now = run.in_flight() - ever
                ever |= now
                kill.in_flight = len(now)
                report.kills.append(kill)
                print(f"  {len(report.kills)}: {kill.phase}, {kill.victim}; in flight {kill.in_flight}", flush=True)
        while not run.ended():
            with run.start() as process:
                report.starts += 1
                assert process.wait(120) == 0, run.log.read_text()[-4000:]
        with run.start() as process:
            assert process.wait(60) == 0, "a run that has ended has nothing to do"
        hold_to_books(run, report, ever, expected)
    report.seconds = time.monotonic() - began
    return report


def hold_to_books(run: Run, report: Report, in_flight: set[bytes], expected: dict[str, Any]) -> None:
    """What the run left, against the endpoints' books and the undisturbed run."""
    found = written(run.job)
    check_conserved(found, report.prompts)
    assert outputs(run) == expected, "the outputs differ from an undisturbed run's"
    attempts = {row["attempt_id"].hex: row for row in found.attempts}
    report.attempts = Counter(row["status"] for row in found.attempts)
    entries = [entry for pool in run.pools for entry in pool.books().entries]
    served = [entry for entry in entries if entry.outcome == "served"]
    report.served = len(served)
    for entry in served:
        row = attempts.get(entry.request)
        assert row is not None, f"attempt {entry.request} was served and is not in the ledger"
        assert row["status"] in ("ok", "lost"), f"attempt {entry.request} was served and is {row['status']}"
        if row["status"] == "ok":
            tokens = [row[name] for name in ("input_tokens", "cached_tokens", "output_tokens")]
            assert tokens == [entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens]
    known = {entry.request for entry in entries}
    assert {key for key, row in attempts.items() if row["status"] == "ok"} <= known, "an answer that nobody gave"
    lost = {key for key, row in attempts.items() if row["status"] == "lost"}
    assert lost <= {each.hex() for each in in_flight}, "booked as lost, but not in flight at any kill"

    times = Counter(entry.text for entry in served)
    report.twice = sum(n - 1 for n in times.values())
    report.in_flight = len(in_flight)
    assert report.twice <= report.in_flight
    lost_texts = {entry.text for entry in served if entry.request in lost}
    assert {text for text, n in times.items() if n > 1} <= lost_texts, "served twice, but not in flight at any kill"

    report.cost = Decimal(found.manifest["cost"])
    report.billed = sum((entry.cost for entry in served), Decimal(0))
    assert report.billed <= report.cost <= BUDGET
    exact = {key: row for key, row in attempts.items() if row["status"] == "ok"}
    costs: dict[str, Decimal] = {}
    for charge in found.rows("charges"):
        key = charge["attempt_id"].hex
        costs[key] = costs.get(key, Decimal(0)) + charge["cost"]
    assert all(costs[entry.request] == entry.cost for entry in served if entry.request in exact)
    report.verified = verify(run)


def verify(run: Run) -> str:
    """What ``bidbeam ledger verify`` says."""
    command = [sys.executable, "-m", "bidbeam.pipelines.cli", "ledger", "verify", str(run.home / "ledger")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answers-after", type=float, default=0.06, help="seconds that an answer takes")
    parser.add_argument("--home", type=Path, help="where to work; else a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = args.home or Path(temporary)
        print(kill_test(home, args.prompts, args.kills, args.seed, answers_after_s=args.answers_after))


if __name__ == "__main__":
    main()
