"""Disjoint CPU cores for the engines of one machine, across processes.

Two CPU engines that share cores are several times slower than two that do not. A ``CoreLease`` holds an advisory lock
file for each of its cores, so that engines in different worker processes avoid each other too; the kernel drops the
locks when the holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from bidbeam.connectors.errors import ConfigError


def available_cores() -> tuple[int, ...]:
    """The cores this process may run on, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def plan(cores: Sequence[int], engines: int) -> list[tuple[int, ...]]:
    """Splits ``cores`` among ``engines``: contiguous blocks, as even as they come; round-robin when cores are too few.

    >>> plan([0, 1], 1), plan([0, 1], 2), plan([0, 1], 3)
    ([(0, 1)], [(0,), (1,)], [(0,), (1,), (0,)])
    """
    if engines < 1 or not cores:
        raise ValueError("plan needs at least one core and one engine")
    if engines >= len(cores):
        return [(cores[i % len(cores)],) for i in range(engines)]
    size, extra = divmod(len(cores), engines)
    blocks, start = [], 0
    for i in range(engines):
        end = start + size + (i < extra)
        blocks.append(tuple(cores[start:end]))
        start = end
    return blocks


class CoreLease:
    """Cores held until ``release`` (idempotent) or the end of this process."""

    def __init__(self, cores: tuple[int, ...], files: Sequence[int] = ()) -> None:
        self.cores = cores
        self._files = list(files)
        _leases.add(self)

    def release(self) -> None:
        """Gives the cores back."""
        while self._files:
            os.close(self._files.pop())


_leases: weakref.WeakSet[CoreLease] = weakref.WeakSet()


def _after_fork() -> None:
    # A forked child shares the parent's locks; closing its copies leaves the parent's hold as it is.
    for lease in list(_leases):
        lease.release()


os.register_at_fork(after_in_child=_after_fork)


def lease(share: int = 1, *, cores: Sequence[int] | None = None, directory: Path | None = None) -> CoreLease:
    """Leases the first free one of the ``share`` blocks that ``plan`` cuts the machine's cores into.

    ``share`` is how many CPU engines are to run on this machine at once. ``cores`` takes exactly these instead, as an
    explicit key in the pools file asks, and raises ConfigError where this process may not run on them. When every
    block is held, blocks are shared, the least crowded first.
    """
    if cores is not None:
        missing = set(cores) - set(available_cores())
        if missing:
            raise ConfigError(
                f"cores {sorted(missing)} are not to be had on this machine",
                key="engine.cores",
                expected=f"some of {list(available_cores())}",
            )
        return CoreLease(tuple(cores))
    folder = directory or Path(tempfile.gettempdir()) / f"bidbeam-cores-{os.getuid()}"
    blocks = plan(available_cores(), share)
    distinct = list(dict.fromkeys(blocks))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A layer is one engine per core; the second layer shares what the first has taken, and so on.
        for layer in range(64):
            for block in distinct:
                files = _lock(folder, block, layer)
                if files is not None:
                    return CoreLease(block, files)
    except OSError:
        # No place for lock files: the engines of this process still get a plan, only unguarded against others.
        return CoreLease(blocks[0])
    return CoreLease(blocks[0])


def _lock(folder: Path, block: tuple[int, ...], layer: int) -> list[int] | None:
    """Locks every core of ``block``; None, with nothing held, when one is taken."""
    files: list[int] = []
    try:
        for core in block:
            files.append(os.open(folder / f"core-{core}.{layer}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for file in files:
            os.close(file)
        return None
    except OSError:
        for file in files:
            with contextlib.suppress(OSError):
                os.close(file)
        raise
    return files
