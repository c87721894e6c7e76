"""The engines of this process, by configuration: loaded once, kept over rounds, closed at the end.

A DoFn acquires and never closes: Beam tears idle DoFns down between rounds, and the engine must outlive them. The
driver calls ``close_all`` in its ``finally``; interpreter exit calls it as well. A parent that dies without either
takes its engines with it, because each one watches a lifeline to this process. Signals are the driver's business:
it turns them into exceptions, which end in its ``finally``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar, cast


class Closable(Protocol):
    """What the registry needs of an engine. One whose ``dead`` attribute is true is replaced on the next acquire."""

    def close(self) -> None: ...


E = TypeVar("E", bound=Closable)


class Registry:
    """Engines by key. Thread-safe: different keys load at the same time, one key loads once."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._key_locks: dict[Hashable, threading.Lock] = {}
        self._engines: dict[Hashable, Closable] = {}

    def acquire(self, key: Hashable, factory: Callable[[], E]) -> E:
        """The engine of ``key``, made by ``factory`` when there is none or the one there is dead.

        What ``factory`` raises goes to the caller and nothing is kept.
        """
        with self._lock:
            key_lock = self._key_locks.setdefault(key, threading.Lock())
        with key_lock:
            with self._lock:
                engine = self._engines.get(key)
            if engine is not None and not getattr(engine, "dead", False):
                return cast("E", engine)
            if engine is not None:
                engine.close()
            made = factory()
            with self._lock:
                self._engines[key] = made
            return made

    def warm(self, key: Hashable, factory: Callable[[], Closable]) -> None:
        """Starts the engine of ``key`` now, so that it is loaded by the time ``acquire`` asks for it."""
        self.acquire(key, factory)

    def close_all(self) -> None:
        """Closes every engine, all at once, and forgets them. Idempotent; one that fails to close stops no other."""
        with self._lock:
            engines, self._engines = list(self._engines.values()), {}
        closers = [threading.Thread(target=_close_quietly, args=(engine,), daemon=True) for engine in engines]
        for closer in closers[1:]:
            closer.start()
        if closers:
            closers[0].run()
        for closer in closers[1:]:
            closer.join()

    def after_fork(self) -> None:
        """In a forked child: the engines are the parent's, forget them without closing."""
        self._clear()


def _close_quietly(engine: Closable) -> None:
    with contextlib.suppress(Exception):
        engine.close()


_registry = Registry()
acquire = _registry.acquire
warm = _registry.warm
close_all = _registry.close_all

atexit.register(close_all)
os.register_at_fork(after_in_child=_registry.after_fork)
