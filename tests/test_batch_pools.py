"""Pools of ``kind: batch``: rows go to a provider's batch API, come back in hours, and are paid for once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import DAY, Written, check_conserved, make_job, prompts, remote, total, write_job, written

from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.front_batch import BatchFront, Fate
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms import generate, shift

pytestmark = pytest.mark.timeout(60)

HALF = {"input": "0.05", "cached_input": "0.005", "output": "0.20"}


@pytest.fixture
def upstream() -> Iterator[EndpointDouble]:
    with EndpointDouble(["tiny"]) as double:
        yield double


def batch(front: BatchFront, name: str = "slow", **keys: Any) -> dict[str, Any]:
    """A batch pool at half the price of an endpoint."""
    options = {"poll": "10ms", "window": "1h", **keys.pop("options", {})}
    return remote(name, front.base_url, **{"kind": "batch", "price": HALF, "options": options, **keys})


def check(job: Job, rows: int) -> Written:
    found = written(job)
    check_conserved(found, rows)
    return found


def bill(front: BatchFront) -> Decimal:
    """What the front's books come to at ``HALF``, in USD."""
    rates = {name: Decimal(price) / 1_000_000 for name, price in HALF.items()}
    return sum(
        (
            (ran.prompt_tokens - (ran.cached_tokens or 0)) * rates["input"]
            + (ran.cached_tokens or 0) * rates["cached_input"]
            + (ran.completion_tokens or 0) * rates["output"]
            for ran in front.served
            if ran.prompt_tokens is not None
        ),
        Decimal(0),
    )


def test_a_run_on_a_batch_pool_is_one_file_and_its_ledger_is_the_provider_s_bill(
    tmp_path: Path, upstream: EndpointDouble
) -> None:
    """All prompts go into one batch, named by nothing that says what they ask; tokens and cost agree to the last digit,
    and neither prompts nor answers stay behind at the provider."""
    with BatchFront(upstream.base_url) as front:
        job = make_job(tmp_path, prompts(300), [batch(front)])
        summary = run(job)
        assert (summary.status, summary.served) == ("complete", 300)
        assert len(front.batches) == 1
    found = check(job, 300)
    assert total(found.rows("charges")) == bill(front)
    assert len(front.served) == len(found.attempts) == 300
    assert not front.files
    assert all(set(row) == {"custom_id", "method", "url", "body"} for row in front.batches[0].rows)
    assert sum("item 17 of the list" in str(row["body"]) for row in front.batches[0].rows) == 1
    assert front.batches[0].metadata["bidbeam_run"] == job.run_id
    assert not list((found.run_dir / "_journal").rglob("*.intent.arrow"))


def started(path: Path) -> subprocess.Popen[bytes]:
    """The run as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(path), "--run-date", str(DAY), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 40
    while not true():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def away(home: Path) -> list[Path]:
    """The notes of batches that are at the provider."""
    try:
        return list(home.rglob("*.batch.json"))
    except FileNotFoundError:  # the run is clearing something up at this moment
        return []


def test_a_killed_run_s_batch_is_collected_and_not_sent_again(
    tmp_path: Path, upstream: EndpointDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL after submission; meanwhile two rows leave the input and three come. The provider's own books show each
    request once, the ledger agrees with them to the last digit, and books the answers that nobody asks for any more."""
    with BatchFront(upstream.base_url, held=True) as front:
        path = write_job(tmp_path, prompts(40), [batch(front)], budget={"max_cost": "0.02"})
        process = started(path)
        try:
            until(lambda: away(tmp_path))
        finally:
            process.kill()
            process.communicate()
        assert (len(front.batches), len(front.served)) == (1, 0)
        pq.write_table(prompts(41, start=2), tmp_path / "in" / "a.parquet")
        front.release()
        job = Job.from_yaml(path, run_date=DAY)
        summary = run(job)
        assert (summary.status, summary.served) == ("complete", 41)
        assert [len(sent.rows) for sent in front.batches] == [40, 3]
        assert max(Counter(row.custom_id for row in front.served).values()) == 1
        # A third start has nothing to do.
        assert run(job).status == "nothing_to_do"
        assert len(front.batches) == 2
    found = written(job)
    assert total(found.rows("charges")) == bill(front) == Decimal(found.manifest["cost"])
    assert len(found.attempts) == 43
    stray = {row["request_id"] for row in found.attempts} - set(found.outputs.column("request_id").to_pylist())
    assert stray == {"q0", "q1"}
    assert not list(found.run_dir.rglob("*.intent.arrow"))
    assert not list(tmp_path.rglob("sending-*")), "prompts are left behind"
    ledger = str(tmp_path / "ledger")
    capsys.readouterr()
    assert invoke(["ledger", "verify", ledger]) == 0
    assert invoke(["explain", ledger, "q5"]) == 0
    assert "no auction was held" in capsys.readouterr().out


def test_a_run_killed_while_its_batch_is_made_finds_it_by_its_metadata(
    tmp_path: Path, upstream: EndpointDouble
) -> None:
    """The batch came to be, its id was never written down: the next start finds it, and an endpoint beside it, cheaper
    by now, is not asked for what is in it."""
    made = threading.Event()
    go = threading.Event()
    with EndpointDouble(["tiny"]) as near, BatchFront(upstream.base_url, intercept=until_made(made, go)) as front:
        path = write_job(tmp_path, prompts(20), [batch(front)])
        process = started(path)
        try:
            assert made.wait(40)
        finally:
            process.kill()
            process.communicate()
        go.set()
        assert len(list(tmp_path.rglob("*.creating.json"))) == 1
        assert not away(tmp_path)
        cheap = {"input": "0.001", "output": "0.001"}
        write_job(tmp_path, prompts(25), [batch(front), remote("near", near.base_url, price=cheap)])
        job = Job.from_yaml(path, run_date=DAY)
        assert run(job).served == 25
        assert ([len(sent.rows) for sent in front.batches], len(near.requests)) == ([20], 5)
    found = check(job, 25)
    assert len(found.attempts) == 25


def until_made(made: threading.Event, go: threading.Event) -> Callable[[str, str], Reply | None]:
    """A provider that makes the first batch and then says nothing more until ``go``."""

    def intercept(method: str, path: str) -> Reply | None:
        if (method, path) == ("POST", "batches") and not made.is_set():
            made.set()
            return Reply(status=0)
        if made.is_set() and not go.is_set():
            return Reply.error(503, "later")
        return None

    return intercept


def test_ctrl_c_leaves_the_batch_to_the_next_start(tmp_path: Path, upstream: EndpointDouble) -> None:
    """Interrupted at once, with a message that says what collects it; nothing is cancelled, and nothing booked yet."""
    with BatchFront(upstream.base_url, held=True) as front:
        path = write_job(tmp_path, prompts(15), [batch(front)])
        process = started(path)
        until(lambda: away(tmp_path))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 4
        assert b"collects 1 batch that the provider goes on with" in said
        assert front.batches[0].state != "cancelling"
        front.release()
        job = Job.from_yaml(path, run_date=DAY)
        assert run(job).served == 15
        assert len(front.batches) == 1
    found = check(job, 15)
    assert total(found.rows("charges")) == bill(front)


def test_a_batch_that_is_taken_over_costs_what_was_agreed_when_it_was_sent(
    tmp_path: Path, upstream: EndpointDouble
) -> None:
    """The rate is frozen at the award, though the price is the same: what holds by the time of the collecting is for
    what is sent from then on, and both stand in the ledger with where they are from."""

    def asking(rate: str, rows: pa.Table, front: BatchFront) -> Path:
        path = write_job(tmp_path, rows, [batch(front, price={**HALF, "currency": "EUR"})])
        fx = {"EUR": {"rate": rate, "at": f"2026-01-0{rate[-1]}T00:00:00Z", "source": f"by hand {rate}"}}
        pools = json.loads((tmp_path / "pools.yaml").read_text())
        (tmp_path / "pools.yaml").write_text(json.dumps({**pools, "fx": fx}))
        return path

    with BatchFront(upstream.base_url, held=True) as front:
        process = started(asking("1.1", prompts(6, start=2), front))
        try:
            until(lambda: away(tmp_path))
        finally:
            process.kill()
            process.communicate()
        front.release()
        # Rows 2 to 7 were sent at the first rate; row 7 has gone, and is nobody's; rows 0 and 1 are new.
        job = Job.from_yaml(asking("1.2", prompts(7), front), run_date=DAY)
        assert run(job).served == 7
        assert [len(sent.rows) for sent in front.batches] == [6, 2]
    found = written(job)
    assert total(found.rows("charges")) == Decimal(found.manifest["cost"])
    agreed: dict[str, set[tuple[Decimal, str]]] = {}
    for charge in found.rows("charges"):
        agreed.setdefault(charge["request_id"], set()).add((charge["fx_rate"], charge["fx_source"]))
        assert charge["cost"] == charge["cost_native"] * charge["fx_rate"]
    first, second = {(Decimal("1.1"), "by hand 1.1")}, {(Decimal("1.2"), "by hand 1.2")}
    assert agreed == {f"q{n}": first if n >= 2 else second for n in range(8)}
    assert {charge["price_id"] for charge in found.rows("charges")} <= {row["price_id"] for row in found.rows("prices")}
    assert [check.name for check in verify_ledger(job.ledger).checks if check.failed] == []


def test_the_deadline_cancels_a_batch_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the batch had not run by then ends for want of time; what it had is served, and paid for."""
    with EndpointDouble(["tiny"], Reply.slow(0.02)) as double, BatchFront(double.base_url) as front:

        def now() -> datetime:
            return datetime.now(UTC) + timedelta(days=2 * (len(front.served) >= 5))

        monkeypatch.setattr(generate, "Shift", partial(shift.Shift, now=now))
        job = make_job(tmp_path, prompts(400), [batch(front)], deadline="30h")
        summary = run(job)
        assert summary.status == "incomplete"
        assert front.batches[0].state == "cancelled"
        assert 0 < summary.served == len(front.served) < 400
        assert summary.dead == {"deadline": 400 - summary.served}
    found = check(job, 400)
    assert total(found.rows("charges")) == bill(front)


@pytest.mark.parametrize(("deadline", "winner"), [("30h", "slow"), ("2h", "near")], ids=["generous", "tight"])
def test_the_auction_takes_the_cheap_batch_only_where_the_deadline_allows(
    tmp_path: Path, upstream: EndpointDouble, capsys: pytest.CaptureFixture[str], deadline: str, winner: str
) -> None:
    """At half the price and a day's turnaround: it wins what can wait, and loses what cannot, through the command."""
    with EndpointDouble(["tiny"]) as near, BatchFront(upstream.base_url) as front:
        pools = [remote("near", near.base_url), batch(front, options={"window": "24h"})]
        path = write_job(tmp_path, prompts(12), pools, deadline=deadline)
        assert invoke(["run", str(path), "--run-date", str(DAY), "--quiet"]) == 0
        assert (len(front.batches), len(near.requests)) == ((1, 0) if winner == "slow" else (0, 12))
    capsys.readouterr()
    found = check(Job.from_yaml(path, run_date=DAY), 12)
    assert {row["pool"] for row in found.rows("awards")} == {winner}
    reasons = {row["reject_reason"] for row in found.rows("bids") if row["pool"] == "slow"}
    assert reasons == ({None} if winner == "slow" else {"deadline"})
    (started_at,) = (row["started_at"] for row in found.rows("runs"))
    bids = [row for row in found.rows("bids") if row["pool"] == "slow" and row["eligible"]]
    assert all(0 <= (row["finish_at"] - started_at).total_seconds() - 86_400 < 300 for row in bids)


def test_what_an_expired_batch_did_not_run_is_bought_elsewhere(tmp_path: Path, upstream: EndpointDouble) -> None:
    """Its answers are kept; the rest goes to the next round, where the pool that failed it stands back."""
    with EndpointDouble(["tiny"]) as near, BatchFront(upstream.base_url, fates=[Fate("expired", run=7)]) as front:
        job = make_job(tmp_path, prompts(12), [remote("near", near.base_url), batch(front)])
        assert run(job).served == 12
        assert (len(front.served), len(near.requests)) == (7, 5)
    found = check(job, 12)
    assert Counter(row["error_class"] for row in found.attempts) == {None: 12, "timeout": 5}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": "soon"}, "a duration such as"),
        ({"max_rows": "60000"}, "a whole number from 1 to 50000"),
        ({"route": "v1/"}, "a path such as /v1"),
        ({"windw": "24h"}, "did you mean 'window'"),
        ({"staging": "gs://bucket/place"}, "has no use for options.staging"),
    ],
)
def test_wrong_options_are_told_with_their_line(tmp_path: Path, options: dict[str, str], said: str) -> None:
    """A batch pool's options are checked before anything is sent, like every other key."""
    pool = remote("slow", "http://127.0.0.1:9/v1", kind="batch", price=HALF, options=options)
    with pytest.raises(ConfigError, match=said):
        Job.from_yaml(write_job(tmp_path, prompts(1), [pool]), run_date=DAY)


def test_a_crash_between_segments_books_no_answer_twice(
    tmp_path: Path, upstream: EndpointDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four batches one is in the journal when the run dies: the next start collects them all again, and books the
    other three."""
    real, calls = shift.write_segment, [0]

    def dies(*args: Any, **keys: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("the worker died")
        return real(*args, **keys)

    monkeypatch.setattr(shift, "_SEGMENT_S", 0.0)
    monkeypatch.setattr(shift, "write_segment", dies)
    go = threading.Event()

    def one_by_one(method: str, path: str) -> Reply | None:
        # The first batch ends at once, the others once its answers are written down.
        waits = path.startswith("batches/") and path != "batches/batch_000001" and calls[0] == 0 and not go.is_set()
        return Reply.error(503, "later") if waits else None

    with BatchFront(upstream.base_url, intercept=one_by_one) as front:
        job = make_job(tmp_path, prompts(40), [batch(front, options={"max_rows": "10"})])
        with pytest.raises(Exception, match="the worker died"):
            run(job)
        go.set()
        assert len(front.batches) == 4
        assert run(job).served == 40
        assert len(front.batches) == 4
    found = check(job, 40)
    assert len(found.attempts) == 40
    assert total(found.rows("charges")) == bill(front)
