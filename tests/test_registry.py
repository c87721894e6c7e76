"""The process registry of engines, and the cores they run on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors import cores, registry
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.registry import Registry


class Fake:
    """An engine that only counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0
        self.dead = False

    def close(self) -> None:
        self.closed += 1


class Stubborn(Fake):
    def close(self) -> None:
        super().close()
        raise RuntimeError("will not")


def test_one_key_is_made_once_and_shared() -> None:
    """Two acquisitions of a key give the same engine; another key gives another."""
    engines = Registry()
    first = engines.acquire("a", Fake)
    assert engines.acquire("a", Fake) is first
    assert engines.acquire("b", Fake) is not first


def test_a_warmed_engine_is_the_one_acquired() -> None:
    """What ``warm`` started is what ``acquire`` hands out."""
    engines, made = Registry(), Fake()
    engines.warm("a", lambda: made)
    assert engines.acquire("a", Fake) is made


def test_many_threads_make_one_engine() -> None:
    """Threads that race for a key get one engine between them."""
    engines, made = Registry(), []
    barrier = threading.Barrier(8)

    def make() -> Fake:
        made.append(Fake())
        return made[-1]

    def race() -> None:
        barrier.wait()
        engines.acquire("a", make)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_keys_load_at_the_same_time() -> None:
    """A slow load of one key does not hold up another's."""
    engines, started, release = Registry(), threading.Event(), threading.Event()

    def slow() -> Fake:
        started.set()
        release.wait(10)
        return Fake()

    thread = threading.Thread(target=engines.acquire, args=("slow", slow))
    thread.start()
    assert started.wait(10)
    assert engines.acquire("quick", Fake)
    release.set()
    thread.join()


def test_a_dead_engine_is_closed_and_replaced() -> None:
    """An engine that died is closed and made anew on the next acquire."""
    engines = Registry()
    first = engines.acquire("a", Fake)
    first.dead = True
    assert engines.acquire("a", Fake) is not first
    assert first.closed == 1


def test_a_failed_load_leaves_nothing_behind() -> None:
    """A factory that raises raises to its caller, and the next acquire tries again."""
    engines = Registry()

    def broken() -> Fake:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        engines.acquire("a", broken)
    assert engines.acquire("a", Fake)


def test_close_all_closes_each_once_whatever_one_of_them_does() -> None:
    """Closing ends every engine once, also after one that fails to, and a second call finds nothing."""
    engines = Registry()
    all_ = [engines.acquire("a", Stubborn), engines.acquire("b", Fake), engines.acquire("c", Stubborn)]
    engines.close_all()
    engines.close_all()
    assert [engine.closed for engine in all_] == [1, 1, 1]


def test_a_forked_child_neither_has_nor_closes_the_engines_of_its_parent() -> None:
    """After a fork the child's registry is empty, and its end closes nothing of the parent's."""
    made = registry.acquire("fork", Fake)
    child = os.fork()
    if child == 0:
        registry.close_all()
        other = registry.acquire("fork", Fake)
        os._exit(0 if made.closed == 0 and other is not made else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert registry.acquire("fork", Fake) is made
    registry.close_all()
    assert made.closed == 1


def test_interpreter_exit_closes_what_is_left() -> None:
    """A process that ends without closing its engines closes them at exit."""
    script = (
        "from bidbeam.connectors import registry\n"
        "class Loud:\n"
        "    def close(self): print('closed', flush=True)\n"
        "registry.acquire('a', Loud)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "closed\n"


def test_plans_of_the_machines_people_have() -> None:
    """One engine gets all cores, two get halves, more than there are cores share round-robin."""
    assert cores.plan([0, 1], 1) == [(0, 1)]
    assert cores.plan([0, 1], 2) == [(0,), (1,)]
    assert cores.plan([0, 1], 3) == [(0,), (1,), (0,)]
    assert cores.plan([2, 3, 4], 2) == [(2, 3), (4,)]


@given(st.sets(st.integers(0, 255), min_size=1, max_size=64), st.integers(1, 80))
def test_a_plan_is_fair_and_disjoint(machine: set[int], engines: int) -> None:
    """Every engine gets a core; with cores enough none is shared, none is idle and sizes differ by one at most."""
    blocks = cores.plan(sorted(machine), engines)
    assert len(blocks) == engines
    assert all(blocks)
    if engines <= len(machine):
        assert sorted(core for block in blocks for core in block) == sorted(machine)
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda: (0, 1))


@pytest.mark.usefixtures("two_cores")
def test_leases_are_disjoint_until_they_must_share(tmp_path: Path) -> None:
    """Leases take free blocks first, share the least crowded after, and take back what was released."""
    first, second = (cores.lease(2, directory=tmp_path) for _ in range(2))
    assert {first.cores, second.cores} == {(0,), (1,)}
    third, fourth = (cores.lease(2, directory=tmp_path) for _ in range(2))
    assert {third.cores, fourth.cores} == {(0,), (1,)}
    second.release()
    second.release()
    assert cores.lease(2, directory=tmp_path).cores == second.cores


@pytest.mark.usefixtures("two_cores")
def test_explicit_cores_are_taken_as_they_are(tmp_path: Path) -> None:
    """Cores that the pools file names are used, held by others or not."""
    held = cores.lease(1, directory=tmp_path)
    assert held.cores == (0, 1)
    assert cores.lease(1, cores=[1], directory=tmp_path).cores == (1,)
    with pytest.raises(ConfigError, match="7"):
        cores.lease(1, cores=[1, 7], directory=tmp_path)


@pytest.mark.usefixtures("two_cores")
def test_a_dead_process_gives_its_cores_back(tmp_path: Path) -> None:
    """Another process's lease is respected while it lives and free once it was killed."""
    script = (
        "import sys, pathlib\n"
        "from bidbeam.connectors import cores\n"
        "cores.available_cores = lambda: (0, 1)\n"
        f"held = cores.lease(2, directory=pathlib.Path({str(tmp_path)!r}))\n"
        "print(held.cores, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "(0,)\n"
        ours = cores.lease(2, directory=tmp_path)
        assert ours.cores == (1,)
        other.kill()
        other.wait()
    assert cores.lease(2, directory=tmp_path).cores == (0,)
    ours.release()


@pytest.mark.usefixtures("two_cores")
def test_a_fork_neither_keeps_nor_frees_its_parents_cores(tmp_path: Path) -> None:
    """A forked child that lives on does not hold the parent's cores once the parent released them."""
    held = cores.lease(1, directory=tmp_path)
    ready_read, ready_write = os.pipe()
    end_read, end_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end_write)
        os.write(ready_write, b"x")
        os.read(end_read, 1)
        os._exit(0)
    os.read(ready_read, 1)
    again = cores.lease(1, directory=tmp_path)
    held.release()
    third = cores.lease(1, directory=tmp_path)
    locks = sorted(path.name for path in tmp_path.iterdir())
    os.close(end_write)
    os.waitpid(child, 0)
    for file in (ready_read, ready_write, end_read):
        os.close(file)
    for lease in (again, third):
        lease.release()
    assert locks == ["core-0.0", "core-0.1", "core-1.0", "core-1.1"]  # `third` found the first layer free again


def test_no_place_for_locks_still_gives_cores(tmp_path: Path) -> None:
    """Where lock files cannot be made a lease is a plan without a guard, not an error."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert cores.lease(1, directory=blocker / "below").cores == cores.available_cores()
