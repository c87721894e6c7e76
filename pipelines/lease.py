"""One start of a run at a time: a lease in the journal, renewed while its holder lives, lost when it does not.

No clock but our own decides: of a holder elsewhere whose renewals look old, or yet to come, it is watched whether one
comes while we wait. And who holds a lease looks at each renewal whether it still does: a machine that slept for long
has lost it, and must send nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bidbeam.connectors.errors import AlreadyExists, RunHeld, StoreError
from bidbeam.connectors.processes import born
from bidbeam.connectors.store import Store

RENEW_S = 10.0
EXPIRY = timedelta(seconds=60)
"""A lease whose renewals look no older than this is held."""
WATCH_S = 2.5 * RENEW_S
"""Of any other it is watched for this long whether it is renewed."""


class Lease:
    """Held from ``take`` to ``release``. The files are numbered: whoever creates the next number has the run."""

    def __init__(self, journal: Store, number: int, run_id: str) -> None:
        self._journal, self._number, self._run_id = journal, number, run_id
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._when_lost: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._keep, name="bidbeam-lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, journal: Store, run_id: str) -> Lease:
        """Takes the run's lease. Raises RunHeld, naming the holder, while another start is alive."""
        held = {entry.name: int(m[1]) for entry in journal.list("lease-") if (m := _LEASE.fullmatch(entry.name))}
        number = 0
        if held:
            latest = max(held, key=held.__getitem__)
            number = held[latest]
            holder = _read(journal, latest)
            if holder is not None and _alive(journal, latest, holder):
                raise RunHeld(
                    f"run {run_id} is held by another start ({holder['host']}, process {holder['pid']}, since "
                    f"{holder['since']}); wait for it, or stop it first"
                )
        try:
            journal.create(_name(number + 1), _state())
        except AlreadyExists as error:
            raise RunHeld(f"run {run_id} was taken by another start just now; wait for it") from error
        lease = cls(journal, number + 1, run_id)
        for name in held:
            journal.delete(name)
        return lease

    @property
    def lost(self) -> bool:
        """Whether another start has taken the run over, or its journal is gone."""
        return self._lost.is_set()

    def when_lost(self, do: Callable[[], None]) -> None:
        """What is done, in a thread of its own, should the lease be lost; from now on."""
        self._when_lost = do

    def release(self) -> None:
        """Gives the run free. Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            if not self.lost:
                with contextlib.suppress(StoreError, OSError):
                    self._journal.delete(_name(self._number))

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            # A store that stumbles is asked again next time.
            with contextlib.suppress(StoreError, OSError):
                if not self._held():
                    self._lost.set()
                    self._when_lost()
                    return
                self._journal.replace(_name(self._number), _state(self._since))

    def _held(self) -> bool:
        taken = self._journal.exists(_name(self._number + 1))
        return not taken and self._journal.exists(_name(self._number))


_LEASE = re.compile(r"lease-(\d{6,9})\.json")


def _name(number: int) -> str:
    return f"lease-{number:06d}.json"


def _state(since: str | None = None) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # The token tells two takers apart that look the same otherwise: one process, one second.
    state = {
        "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "born": born(os.getpid()),
        "space": _pid_space(),
        "since": since or now, "renewed": now, "token": uuid.uuid4().hex,
    }  # fmt: skip
    return json.dumps(state).encode()


def _read(journal: Store, name: str) -> dict[str, str] | None:
    """What the holder says; None where nothing, or nothing that a holder would say, is there."""
    try:
        state = json.loads(journal.read(name))
        found = {str(key): str(value) for key, value in state.items()}
        int(found["pid"])
        if datetime.fromisoformat(found["renewed"]).tzinfo is None or not {"host", "since", "token"} <= found.keys():
            return None
    except (StoreError, OSError, ValueError, AttributeError, KeyError, RecursionError):
        return None
    return found


def _alive(journal: Store, name: str, holder: dict[str, str]) -> bool:
    here = {"host": socket.gethostname(), "boot": _boot(), "space": _pid_space()}
    if all(holder.get(key, mine) == mine for key, mine in here.items()):
        # On this very machine there is no need to wait for a lease to run out.
        return born(int(holder["pid"])) == holder.get("born") if Path("/proc/self").exists() else True
    age = datetime.now(UTC) - datetime.fromisoformat(str(holder["renewed"]))
    if abs(age) < EXPIRY:
        return True
    until = time.monotonic() + WATCH_S
    while time.monotonic() < until:
        time.sleep(WATCH_S / 25)
        now = _read(journal, name)
        if now is not None and now.get("token") != holder.get("token"):
            return True
    return False


def _pid_space() -> str:
    """Containers of one machine may share its name, and yet see other processes under the same numbers."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
