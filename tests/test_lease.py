"""The lease: one start of a run at a time, and a dead holder's place is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small_jobs import make_job, prompts, remote

from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.connectors.errors import RunHeld
from bidbeam.connectors.store import Store
from bidbeam.pipelines import lease as leases
from bidbeam.pipelines.lease import Lease
from bidbeam.pipelines.run import run


@pytest.fixture(params=["local", "memory"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.at(str(tmp_path) if request.param == "local" else f"memory://leases{tmp_path}")


def held(journal: Store) -> list[str]:
    return [entry.name for entry in journal.list("lease-")]


def state_of(journal: Store) -> dict[str, str]:
    (name,) = held(journal)
    found: dict[str, str] = json.loads(journal.read(name))
    return found


def edit(journal: Store, **changed: str | int) -> None:
    (name,) = held(journal)
    journal.replace(name, json.dumps(state_of(journal) | changed).encode())


def test_a_held_run_is_refused_and_the_holder_named(journal: Store) -> None:
    """While a start is alive a second one is told who holds the run and since when; once released, it is free."""
    first = Lease.take(journal, "job-1")
    with pytest.raises(RunHeld, match=f"job-1 is held by another start .*process {os.getpid()}, since"):
        Lease.take(journal, "job-1")
    first.release()
    first.release()
    assert held(journal) == []
    Lease.take(journal, "job-1").release()


def test_of_many_at_once_exactly_one_gets_the_run(journal: Store) -> None:
    """Starts that race for a free run, in one process and within one second, never both get it."""
    gate = threading.Barrier(8)

    def take(_: int) -> Lease | None:
        gate.wait()
        try:
            return Lease.take(journal, "job-1")
        except RunHeld:
            return None

    with ThreadPoolExecutor(8) as pool:
        taken = [lease for lease in pool.map(take, range(8)) if lease is not None]
    assert len(taken) == 1
    assert len(held(journal)) == 1
    taken[0].release()


def test_a_dead_holder_is_replaced_at_once_on_its_own_machine(journal: Store) -> None:
    """A lease whose process is gone, a zombie, or another process under the same number holds nothing."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for changed in ({"pid": process.pid}, {"born": "1"}, {"pid": 2**22 + 5}):
        abandoned = Lease.take(journal, "job-1")
        edit(journal, **changed)
        after = Lease.take(journal, "job-1")
        abandoned._ended.set()
        assert state_of(journal)["pid"] == os.getpid()
        after.release()
    process.wait()


def test_a_holder_elsewhere_lives_as_long_as_it_renews(journal: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another machine only the renewals are seen: fresh ones hold the run, ones that stay away leave it."""
    monkeypatch.setattr(leases, "WATCH_S", 0.1)
    abandoned = Lease.take(journal, "job-1")
    edit(journal, host="elsewhere")
    with pytest.raises(RunHeld, match="elsewhere"):
        Lease.take(journal, "job-1")
    edit(journal, host="elsewhere", renewed=(datetime.now(UTC) - timedelta(minutes=2)).isoformat())
    after = Lease.take(journal, "job-1")
    abandoned._ended.set()
    after.release()


@pytest.mark.parametrize("off", [timedelta(hours=-3), timedelta(hours=3)], ids=["behind", "ahead"])
def test_a_holder_whose_clock_is_off_is_watched(
    journal: Store, monkeypatch: pytest.MonkeyPatch, off: timedelta
) -> None:
    """It holds the run while it renews, though its renewals look old; it loses it once it does not, though they look
    as if they were yet to come."""
    monkeypatch.setattr(leases, "RENEW_S", 60.0)
    monkeypatch.setattr(leases, "WATCH_S", 2.0)
    other = Lease.take(journal, "job-1")
    theirs = (datetime.now(UTC) + off).isoformat()
    edit(journal, host="elsewhere", renewed=theirs)
    renews = threading.Timer(0.2, lambda: edit(journal, token="another"))
    renews.start()
    with pytest.raises(RunHeld, match="elsewhere"):
        Lease.take(journal, "job-1")
    renews.join()
    monkeypatch.setattr(leases, "WATCH_S", 0.1)
    after = Lease.take(journal, "job-1")
    other._ended.set()
    after.release()


@pytest.mark.parametrize("gone", ["taken", "removed"])
def test_a_holder_finds_out_that_it_lost_the_run(journal: Store, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    """Who slept for so long that another start took over is told so, and neither renews nor releases what it lost."""
    monkeypatch.setattr(leases, "RENEW_S", 0.3)
    first, told = Lease.take(journal, "job-1"), threading.Event()
    first.when_lost(told.set)
    assert not first.lost
    (mine,) = held(journal)
    journal.delete(mine)
    if gone == "taken":
        journal.create("lease-000002.json", b"{}")
    assert told.wait(10)
    assert first.lost
    first.release()
    assert held(journal) == (["lease-000002.json"] if gone == "taken" else [])


@pytest.mark.timeout(60)
def test_a_start_that_lost_its_run_sends_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops as after a signal, and ends with 2: another start has the run now."""
    monkeypatch.setattr(leases, "RENEW_S", 0.05)

    def loses(seen: Seen) -> Reply:
        if seen.number == 5:
            (lease,) = tmp_path.rglob("lease-*.json")
            lease.with_name("lease-000099.json").write_text("{}")
            lease.unlink()
        return Reply.slow(0.05)

    with EndpointDouble(["tiny"], loses) as double:
        job = make_job(tmp_path, prompts(60), [remote("near", double.base_url, capacity={"concurrency": 2})])
        with pytest.raises(RunHeld, match="taken over by another start") as refused:
            run(job)
        assert refused.value.exit_code == 2
        assert len(double.requests) < 60
    assert [path.name for path in tmp_path.rglob("lease-*")] == ["lease-000099.json"]


def test_a_lease_is_renewed_while_it_is_held(journal: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder's file is written again and again, its beginning kept."""
    monkeypatch.setattr(leases, "RENEW_S", 0.01)
    lease = Lease.take(journal, "job-1")
    first = state_of(journal)
    renewed = threading.Event()
    for _ in range(200):
        if renewed.wait(0.01) or state_of(journal)["token"] != first["token"]:
            break
    assert state_of(journal)["token"] != first["token"]
    assert state_of(journal)["since"] == first["since"]
    lease.release()


@pytest.mark.parametrize(
    "content",
    [b'{"host": "here", "pi', b"", b"[]", b"null", b"[" * 100_000, b'{"host": "x", "pid": "y", "renewed": "z"}',
     b'{"host": "x", "since": "", "token": "", "pid": 1, "renewed": "2026-01-02"}'],
)  # fmt: skip
def test_a_file_that_is_no_lease_holds_nothing(journal: Store, content: bytes) -> None:
    """What is torn, or says what no holder would, belongs to nobody; what has another name is not looked at."""
    journal.create("lease-000007.json", content)
    journal.create("lease-copy.json", content)
    lease = Lease.take(journal, "job-1")
    assert held(journal) == ["lease-000008.json", "lease-copy.json"]
    lease.release()


@pytest.mark.timeout(60)
def test_a_second_start_of_a_living_run_exits_with_2(tmp_path: Path) -> None:
    """While one start works, another is refused before it sends anything, and the first is not disturbed."""
    working, go_on = threading.Event(), threading.Event()

    def holds(seen: Seen) -> Reply:
        working.set()
        go_on.wait(30)
        return Reply()

    with EndpointDouble(["tiny"], holds) as double, ThreadPoolExecutor(1) as pool:
        job = make_job(tmp_path, prompts(6), [remote("near", double.base_url)])
        first = pool.submit(run, job)
        try:
            assert working.wait(30)
            sent = len(double.requests)
            with pytest.raises(RunHeld, match=f"process {os.getpid()}") as refused:
                run(job)
            assert refused.value.exit_code == 2
            assert len(double.requests) <= max(sent, 4)
        finally:
            go_on.set()
        assert first.result(30).served == 6
        assert len(double.requests) == 6
    assert not list(tmp_path.rglob("lease-*"))


@pytest.mark.timeout(60)
def test_a_run_that_ends_while_another_start_waits_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier start left is looked at only once the lease is held: a run that just ended has nothing to do."""
    real = Lease.take
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(3), [remote("near", double.base_url)])

        def late(journal: Store, run_id: str) -> Lease:
            # Another start comes and goes between our first look and our lease.
            monkeypatch.setattr(Lease, "take", real)
            assert run(job).served == 3
            return real(journal, run_id)

        monkeypatch.setattr(Lease, "take", late)
        assert run(job).status == "nothing_to_do"
        assert len(double.requests) == 3
