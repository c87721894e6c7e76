"""A real vLLM server on loopback: ``python -m vllm.entrypoints.openai.api_server`` in a process of its own.

The process watches a pipe that only its starter holds, so that it ends with whoever started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_START_S = 240.0
_COUNTERS = {
    "input_tokens": "vllm:prompt_tokens_total",
    "output_tokens": "vllm:generation_tokens_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
    "queried_tokens": "vllm:prefix_cache_queries_total",
    "requests": "vllm:request_success_total",
}


@dataclass(frozen=True)
class VllmServer:
    """A server that is up. ``base_url`` ends in ``/v1``."""

    base_url: str

    def counters(self) -> dict[str, int]:
        """What the server itself has counted since it started, over all its models and engines."""
        status, text = _get(self.base_url, "/metrics")
        assert status == 200
        return {
            ours: sum(int(float(value)) for value in re.findall(rf"^{theirs}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
            for ours, theirs in _COUNTERS.items()
        }


class Starting:
    """A server on ``cores`` that is on its way; ``ready`` waits for it. Ends with ``stop``, or with this process.

    ``names`` are what the model is served as, ``engine`` further options of vLLM's server.
    """

    def __init__(
        self, model_dir: str, names: Sequence[str], engine: Mapping[str, Any], *, cores: Sequence[int]
    ) -> None:
        port = _free_port()
        self._server = VllmServer(f"http://127.0.0.1:{port}/v1")
        self._log = tempfile.TemporaryFile(prefix="vllm-server-")  # noqa: SIM115 - closed by stop
        arguments = ["--model", model_dir, "--served-model-name", *names, "--host", "127.0.0.1", "--port", str(port)]
        for key, value in {"enable_prompt_tokens_details": True, "enforce_eager": True, **engine}.items():
            option = f"--{key.replace('_', '-')}"
            arguments += [option] if value is True else [option, value if isinstance(value, str) else json.dumps(value)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, ",".join(map(str, cores)), *arguments],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=os.environ
            | {
                # One process comes up twice as fast as two, and counts the same.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                "OMP_NUM_THREADS": str(len(cores)),
            },
        )

    def ready(self) -> VllmServer:
        """Waits until the server answers."""
        deadline = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if _get(self._server.base_url, "/health")[0] == 200:
                    return self._server
            time.sleep(0.1)
        self._log.seek(0)
        raise RuntimeError(f"the vLLM server did not come up:\n{self._log.read().decode(errors='replace')[-3000:]}")

    def stop(self) -> None:
        """Ends the server and everything it started. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _get(base_url: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(base_url.removeprefix("http://").removesuffix("/v1"), timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _end_with_starter() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    os.sched_setaffinity(0, map(int, sys.argv.pop(1).split(",")))
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
