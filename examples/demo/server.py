"""A real vLLM server process on loopback for the demo's two endpoints, which never outlives the demo.

The server runs under a supervisor (this file as a script) that leads a process group of its own and holds one end of a
pipe. When the demo closes the other end, or dies in whatever way, the supervisor kills the whole group with itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

READY_TIMEOUT_S = 300.0


class ServerError(Exception):
    """The server has ended, or does not come up."""


def start_vllm(model_dir: str, served_name: str, *, key: str, cores: list[int], log: Path) -> DemoServer:
    """vLLM's own OpenAI-compatible server, to be used as a context manager."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", model_dir, "--served-model-name", served_name,
        "--host", "127.0.0.1", "--port", str(port),
        "--block-size", "32", "--max-model-len", "2048", "--max-num-seqs", "32", "--enforce-eager",
        "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    environment = {
        "VLLM_API_KEY": key,  # not an argument: those are seen by all users of the machine
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return DemoServer(command, environment, port=port, log=log)


class DemoServer:
    """A context manager around a server process. ``base_url`` is what pools of kind openai are given."""

    def __init__(self, command: list[str], environment: dict[str, str], *, port: int, log: Path) -> None:
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self._command, self._environment = command, os.environ | environment
        self._port, self._log = port, log
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    def __enter__(self) -> Self:
        theirs, self._lifeline = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs), *self._command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        os.close(theirs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lifeline)
        if self._process is not None:
            self._process.wait()

    def wait_until_ready(self) -> None:
        """Returns when the server answers. Raises ServerError when it has ended, or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"the server has ended; the end of {self._log}:\n{self._tail()}")
            try:
                self._get("/health")
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return
        raise ServerError(f"the server is not up after {READY_TIMEOUT_S:.0f} s; see {self._log}")

    def counters(self) -> dict[str, int]:
        """The server's own count of tokens since its start: input, cached, output."""
        names = {
            "vllm:prompt_tokens_total": "input",
            "vllm:prefix_cache_hits_total": "cached",
            "vllm:generation_tokens_total": "output",
        }
        counted = dict.fromkeys(names.values(), 0)
        for line in self._get("/metrics").splitlines():
            name = line.partition("{")[0]
            if name in names:
                counted[names[name]] += round(float(line.rsplit(" ", 1)[1]))
        return counted

    def _get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self._port}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def supervise(lifeline: int, command: list[str]) -> None:
    """Runs the command; ends with it, and ends it and all it started when the lifeline ends."""
    child = subprocess.Popen(command)

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    print(f"the server ended with status {status}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    supervise(int(sys.argv[1]), sys.argv[2:])
