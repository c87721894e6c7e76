"""Processes of this machine: which is which although pids come again, and workers that end with their driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_NAME = "BIDBEAM_DRIVER"
"""Says to whom a process belongs: inherited by all that are started while a driver drives."""
_SWEEP_S = 3.0
_QUIET_S = 0.5
"""The keeper has swept clean once it has found nobody for so long; it looks for at most ``_SWEEP_S``."""
_BEAM_S = 5.0
"""How long the runner gets to notice by itself that a worker died."""
_BEAM_WORKER = "run_worker"
"""What Beam calls the threads that wait for its worker processes."""


def born(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot: pids come again. None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else fields[19]


@contextlib.contextmanager
def workers_end_with_us() -> Iterator[None]:
    """Whatever is started within ends when this process does, however that ends, SIGKILL included (on Linux).

    Beam's worker processes outlive a driver that was killed: some wait for it for ever, some go on to send what the
    next start sends too. A keeper process waits for our end and then ends them. Beam itself waits for ever for a worker
    that died early: raises BidbeamError within, in the main thread, where one did and the runner does not end.
    """
    token = f"{os.getpid()}-{uuid.uuid4().hex}"
    os.environ[_NAME] = token
    environment = {name: value for name, value in os.environ.items() if name != _NAME}
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    died = threading.Event()
    try:
        with _noticing(died):
            yield
    except Exception as error:
        if died.is_set():
            # Imported here: the keeper runs this file by itself, without the package.
            from bidbeam.connectors.errors import BidbeamError

            raise BidbeamError(
                "a worker process died; what was settled is kept. The same command resumes the run"
            ) from error
        raise
    finally:
        del os.environ[_NAME]
        keeper.communicate(b"done" if not died.is_set() else b"")


@contextlib.contextmanager
def _noticing(died: threading.Event) -> Iterator[None]:
    """Sets ``died`` once a worker of Beam's has died, and raises it in the main thread where nobody else does."""
    before, ended = threading.excepthook, threading.Event()
    main = threading.main_thread()
    ours = threading.current_thread() is main

    def stop(*_: object) -> None:
        raise RuntimeError("a worker process died")

    def tell() -> None:
        if not ended.wait(_BEAM_S) and ours:
            signal.pthread_kill(main.ident or 0, signal.SIGUSR1)

    def hook(failed: threading.ExceptHookArgs) -> None:
        if failed.thread is None or failed.thread.name != _BEAM_WORKER:
            before(failed)
        elif not died.is_set():
            died.set()
            threading.Thread(target=tell, daemon=True).start()

    handler = signal.signal(signal.SIGUSR1, stop) if ours else None
    threading.excepthook = hook
    try:
        yield
    finally:
        ended.set()
        threading.excepthook = before
        if ours:
            signal.signal(signal.SIGUSR1, handler)


def _keep(token: str) -> None:
    """The keeper: waits for the end of its input, and where nobody said that all is done, ends who has the token."""
    if sys.stdin.buffer.read():
        return
    until, quiet = time.monotonic() + _SWEEP_S, time.monotonic() + _QUIET_S
    mark = f"{_NAME}={token}".encode()
    # More than once: who is ended may just have started another.
    while time.monotonic() < min(until, quiet):
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    quiet = time.monotonic() + _QUIET_S
        time.sleep(0.1)


if __name__ == "__main__":
    _keep(sys.argv[1])
