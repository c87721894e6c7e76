"""The vLLM engine of a pool, as the worker's process sees it: a proxy for a child process that owns the engine.

A process of its own gives each engine its own cores and environment, keeps planning's Python away from the step loop,
and turns a crash of the engine into a ``PoolDown`` instead of a crash of the worker.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bidbeam.connectors import cores as cpu_cores
from bidbeam.connectors.errors import BidbeamError, ConfigError, ModelError, PoolDown
from bidbeam.connectors.secrets import looks_like_secret, mask
from bidbeam.connectors.vllm_worker import (
    REQUESTS,
    RESULTS,
    decode_batch,
    decode_control,
    encode_batch,
    encode_control,
    result_batch,
)

_SENT = ("tag", "attempt_id", "max_tokens", "sampling", "cache_salt", "tokens")
STALL_S = 600.0
"""Seconds without a step after which an engine that has work counts as hung, and is ended."""
_GRACE_S = 1.0
_LOG_TAIL = 1500
_KV_CACHE_BYTES = 1 << 30
"""KV cache of a CPU engine that says nothing of it. vLLM's own default is most of the machine's memory."""


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """What makes one vLLM engine, hashable: the registry's key. Build it with ``of``."""

    name: str
    """The pool's name, for messages."""
    model_dir: str
    engine_json: str
    """vLLM engine arguments as canonical JSON, without our own ``env`` and ``cores``."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables that only this engine's process gets."""
    cores: tuple[int, ...] | None = None
    """Cores that the pools file asks for; None: leased."""
    concurrency: int | None = None
    cpu: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        model_dir: str,
        engine: Mapping[str, Any],
        *,
        concurrency: int | None = None,
        cpu: bool = True,
    ) -> VllmConfig:
        """From a pool's ``engine`` mapping, whose keys ``env`` and ``cores`` are ours and whose others are vLLM's.

        Raises ConfigError where one of ours has the wrong shape.
        """
        arguments = dict(engine)
        env = arguments.pop("env", None) or {}
        cores = arguments.pop("cores", None)
        if not isinstance(env, Mapping):
            raise ConfigError("is not a mapping", key=f"pools.{name}.engine.env", expected="variable: value")
        if cores is not None and not (isinstance(cores, Sequence) and cores and all(type(c) is int for c in cores)):
            raise ConfigError("is not a list of cores", key=f"pools.{name}.engine.cores", expected="such as [0, 1]")
        return cls(
            name=name,
            model_dir=model_dir,
            engine_json=json.dumps(arguments, sort_keys=True, default=str),
            env=tuple(sorted((key, str(value)) for key, value in env.items())),
            cores=tuple(cores) if cores is not None else None,
            concurrency=concurrency,
            cpu=cpu,
        )

    @property
    def engine_args(self) -> dict[str, Any]:
        """The arguments that vLLM's EngineArgs get, defaults of ours included."""
        args: dict[str, Any] = {"enable_prefix_caching": True, "disable_log_stats": True}
        if self.concurrency is not None:
            args["max_num_seqs"] = self.concurrency
        if self.cpu:
            # Compiling takes minutes on a few cores, every time something changes, and the steps get no shorter by it.
            args["enforce_eager"] = True
        given = json.loads(self.engine_json)
        sized = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & given.keys()
        if self.cpu and not sized and "VLLM_CPU_KVCACHE_SPACE" not in {**os.environ, **dict(self.env)}:
            args["kv_cache_memory_bytes"] = _KV_CACHE_BYTES
        return {**args, **given, "model": self.model_dir}


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a loaded engine says of itself. Times are UTC, ``load_s`` seconds from process start to ready."""

    max_model_len: int
    block_size: int
    num_gpu_blocks: int
    max_num_seqs: int
    vocab_size: int
    prefix_caching: bool
    load_s: float
    load_started_at: datetime
    loaded_at: datetime
    version: str


class VllmEngine:
    """``bidbeam.connectors.engine.Engine`` over a vLLM engine in a child process, which starts loading at once.

    Requests may be submitted before it is ready; they wait on our side. ``dead`` tells the registry to replace it.
    """

    wants: frozenset[str] = frozenset({"tokens"})

    def __init__(
        self,
        config: VllmConfig,
        *,
        cores: Sequence[int] | None = None,
        lease: cpu_cores.CoreLease | None = None,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cores`` pins the process (None: wherever the scheduler puts it); ``lease`` is released on close."""
        self.config = config
        self._pid = os.getpid()
        self._lease = lease
        self._lock = threading.Lock()
        self._held: list[pa.RecordBatch] = []
        self._arrived: deque[pa.RecordBatch] = deque()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stats: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._wake: Callable[[], None] = _nothing
        self._in_flight = 0
        self._window = _window(config.engine_args.get("max_num_seqs") or 64)
        self._facts: EngineFacts | None = None
        self._failure: str | None = None
        self._closing = False
        self._stall_s, self._clock = stall_s, clock
        self._heard = clock()
        self._stalled = False
        self._settled = threading.Event()  # ready, or never going to be
        self._gone = threading.Event()  # the process has ended and is reaped
        self._load_started_at, self._load_clock = datetime.now(UTC), time.monotonic()
        self._spawn(cores)
        _engines.add(self)

    @classmethod
    def start(cls, config: VllmConfig, *, share: int = 1) -> VllmEngine:
        """An engine on cores of its own. ``share`` is how many CPU engines this machine is to run at once."""
        if not config.cpu:
            return cls(config, cores=config.cores)
        lease = cpu_cores.lease(share, cores=config.cores)
        try:
            return cls(config, cores=lease.cores, lease=lease)
        except BaseException:
            lease.release()
            raise

    # -- the child process ------------------------------------------------------------------------------------------

    def _spawn(self, cores: Sequence[int] | None) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ModelError(
                f"pool {self.config.name!r}: vLLM is not installed here; install bidbeam[vllm] for GPU workers or "
                "bidbeam[cpu] for the CPU build"
            )
        ours, theirs = socket.socketpair()
        lifeline_read, self._lifeline = os.pipe()
        # Without a name, so that nothing stays behind however this ends.
        self._log = tempfile.TemporaryFile(prefix="bidbeam-vllm-")  # noqa: SIM115 - read when the process has ended
        try:
            # -P: a directory of the user's that happens to be named vllm or torch must not shadow the real one.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "bidbeam.connectors.vllm_worker",
                    str(theirs.fileno()),
                    str(lifeline_read),
                ],
                env=self._environment(cores),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(), lifeline_read),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(self._lifeline)
            self._log.close()
            raise
        finally:
            theirs.close()
            os.close(lifeline_read)
        self._channel = Connection(ours.detach())
        self._outbox.put(
            encode_control("config", engine_args=self.config.engine_args, cores=list(cores) if cores else None)
        )
        for target in (self._write, self._read):
            threading.Thread(target=target, name=f"bidbeam-{self.config.name}-{target.__name__}", daemon=True).start()

    def _environment(self, cores: Sequence[int] | None) -> dict[str, str]:
        env = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if Path(self.config.model_dir).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
        if self.config.cpu and cores:
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
            env["OMP_NUM_THREADS"] = str(len(cores))
        return env | dict(self.config.env)

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._channel.send_bytes(frame)
            except OSError:
                return  # the reader sees the end too, and says why

    def _read(self) -> None:
        fatal: str | None = None
        try:
            while True:
                frame = self._channel.recv_bytes()
                self._heard = self._clock()
                if frame.startswith(RESULTS):
                    self._arrived.append(decode_batch(frame))
                    self._call_wake()
                    continue
                message = decode_control(frame)
                op = message.pop("op")
                if op == "ready":
                    self._become_ready(message)
                elif op == "stats":
                    self._stats.put(message)
                elif op == "alive":
                    continue
                else:
                    fatal = str(message.get("error"))
        except (EOFError, OSError):
            pass
        self._end(fatal)

    def _become_ready(self, message: Mapping[str, Any]) -> None:
        facts = EngineFacts(
            **{**message, "load_s": time.monotonic() - self._load_clock},
            load_started_at=self._load_started_at,
            loaded_at=datetime.now(UTC),
        )
        with self._lock:
            self._facts = facts
            self._window = _window(facts.max_num_seqs)
            held, self._held = self._held, []
            for batch in held:
                self._outbox.put(encode_batch(REQUESTS, batch))
        self._settled.set()
        self._call_wake()

    def _end(self, fatal: str | None) -> None:
        """The child's end of the channel is gone: reap it and everything it started, and say why."""
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and not _exited(self._process.pid):
            time.sleep(0.01)
        # Before the leader is reaped its number cannot name another group.
        self._kill_group()
        code = self._process.wait()
        spoken = fatal is not None
        if self._stalled:
            fatal = f"it made no step for {self._stall_s:.0f} s and was ended"
        elif fatal is None:
            fatal = (
                f"its process was killed by {signal.Signals(-code).name}"
                + (" (often: out of memory)" if code == -signal.SIGKILL else "")
                if code < 0
                else f"its process ended with status {code}"
            )
        with self._lock:
            self._failure = "it was closed" if self._closing else self._explain(fatal, spoken=spoken)
            self._held = []
        lifeline, self._lifeline = self._lifeline, -1
        os.close(lifeline)
        self._outbox.put(None)
        self._log.close()
        if self._lease is not None:
            self._lease.release()
        self._gone.set()
        self._settled.set()
        self._call_wake()

    def _call_wake(self) -> None:
        # A listener that is gone, such as a closed event loop, must not end the thread that the next one relies on.
        with contextlib.suppress(Exception):
            self._wake()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _explain(self, fatal: str, *, spoken: bool) -> str:
        """What ended it, masked; with the end of its log where the child could not say, or points there itself."""
        if not spoken or "root cause" in fatal:
            size = os.fstat(self._log.fileno()).st_size
            tail = os.pread(self._log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL)).decode(errors="replace")
            if size > _LOG_TAIL:
                tail = tail.partition("\n")[2]
            if tail.strip():
                fatal = f"{fatal}; the end of its log:\n{tail.strip()}"
        variables = {**os.environ, **dict(self.config.env)}
        return mask(fatal, [value for name, value in variables.items() if looks_like_secret(value, name)])

    # -- what the shift calls ---------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> bool:
        """Whether loading has ended, well or badly, at the latest in ``timeout_s``; ``ready`` then returns at once."""
        return self._settled.wait(timeout_s)

    def ready(self, timeout_s: float = 600.0) -> EngineFacts:
        """Waits until the model is loaded. Raises ModelError, with the reason, when it does not load in time."""
        if not self.wait(timeout_s):
            raise ModelError(
                f"pool {self.config.name!r}: {self.config.model_dir} did not load within {timeout_s:.0f} s"
            )
        if self._facts is None:
            raise ModelError(
                f"pool {self.config.name!r}: the model in {self.config.model_dir} did not load: {self._failure} "
                "(check the pool's engine arguments and the model's files)"
            )
        if self._failure is not None:
            raise self._down()
        return self._facts

    @property
    def dead(self) -> bool:
        """Whether it serves nothing any more: closed, crashed or never loaded."""
        return self._closing or self._failure is not None

    @property
    def room(self) -> int:
        """See Engine."""
        return max(0, self._window - self._in_flight)

    @property
    def in_flight(self) -> int:
        """See Engine."""
        return self._in_flight

    def listen(self, wake: Callable[[], None]) -> None:
        """See Engine."""
        self._wake = wake
        if self._arrived or self._failure is not None:
            wake()

    def submit(self, requests: pa.RecordBatch) -> None:
        """See Engine."""
        batch = _lean(requests)
        with self._lock:
            if self.dead:
                raise self._down()
            if self._facts is None:
                self._held.append(batch)
            else:
                if self._in_flight == 0:
                    self._heard = self._clock()
                self._outbox.put(encode_batch(REQUESTS, batch))
        self._in_flight += batch.num_rows

    def poll(self) -> list[pa.RecordBatch]:
        """See Engine."""
        self._end_if_hung()
        failed = self._failure is not None
        batches: list[pa.RecordBatch] = []
        while self._arrived:
            batches.append(self._arrived.popleft())
        self._in_flight -= sum(batch.num_rows for batch in batches)
        if failed and not batches:
            raise self._down()
        return batches

    def _end_if_hung(self) -> None:
        hung = self._in_flight and self._facts is not None and self._clock() - self._heard > self._stall_s
        if hung and not self._stalled and not self.dead:
            self._stalled = True
            self._kill_group()

    def cancel(self, tags: Collection[int] | None = None) -> None:
        """See Engine."""
        with self._lock:
            if self._facts is not None:
                self._outbox.put(encode_control("cancel", tags=None if tags is None else sorted(tags)))
                return
            held, self._held = _parted(self._held, tags)
        now = datetime.now(UTC)
        nothing = {"status": "cancelled", "input_tokens": 0, "cached_tokens": 0, "output_tokens": 0}
        stamps = {"usage_source": "reported", "started_at": now, "finished_at": now}
        for batch in held:
            self._arrived.append(
                result_batch([{"tag": tag, **nothing, **stamps} for tag in batch.column("tag").to_pylist()])
            )
        self._call_wake()

    def stats(self, timeout_s: float = 5.0) -> dict[str, float]:
        """Counters since loading: requests, steps, input, cached and output tokens; with ``disable_log_stats: false``
        among the engine arguments vLLM's own too. Answered between two steps. Raises PoolDown."""
        self._outbox.put(encode_control("stats"))
        try:
            return self._stats.get(timeout=timeout_s)
        except queue.Empty:
            raise self._down() from None

    def close(self) -> None:
        """Ends the process and everything it started. Idempotent, from any thread; a fork of ours leaves it alone."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closing = True
        self._outbox.put(encode_control("close"))
        # One that is still loading cannot listen yet, and has nothing to lose.
        if self._facts is None or not self._gone.wait(_GRACE_S):
            self._kill_group()
            self._gone.wait()

    def _down(self) -> BidbeamError:
        reason = self._failure or ("it was closed" if self._closing else "it does not answer")
        return PoolDown(f"pool {self.config.name!r}: the engine is gone: {reason}")


def _nothing() -> None:
    pass


def _window(max_num_seqs: int) -> int:
    """Requests in flight that keep vLLM's batch full and its queue, whose order is the cache policy, never empty.

    Answers of one length begin and end together: a whole batch more has to stand ready for the step after.
    """
    return 2 * max_num_seqs


def _exited(pid: int) -> bool:
    """Whether a child has ended, without reaping it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _parted(
    batches: Sequence[pa.RecordBatch], tags: Collection[int] | None
) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
    """The rows of batches that have one of these tags (None: all), and the others."""
    if tags is None:
        return list(batches), []
    wanted = pa.array(sorted(tags), pa.int64())
    of = [(batch, pc.is_in(batch.column("tag"), value_set=wanted)) for batch in batches]
    taken, left = [batch.filter(mine) for batch, mine in of], [batch.filter(pc.invert(mine)) for batch, mine in of]
    return [batch for batch in taken if batch.num_rows], [batch for batch in left if batch.num_rows]


def _lean(requests: pa.RecordBatch) -> pa.RecordBatch:
    """What the child needs of a batch; a dictionary larger than its batch is cut to what the batch uses."""
    columns = []
    for name in _SENT:
        column = requests.column(name)
        if isinstance(column, pa.DictionaryArray) and len(column.dictionary) > len(column):
            column = pc.dictionary_encode(column.dictionary_decode())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=list(_SENT))


_engines: weakref.WeakSet[VllmEngine] = weakref.WeakSet()


def _after_fork() -> None:
    # A fork that kept these open would keep the engine alive after we are gone.
    for engine in list(_engines):
        with contextlib.suppress(OSError):
            os.close(engine._lifeline)
        with contextlib.suppress(OSError):
            engine._channel.close()


os.register_at_fork(after_in_child=_after_fork)
