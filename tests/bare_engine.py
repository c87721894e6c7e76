"""vLLM's own engine, fed by a plain loop: what Bidbeam's answers and times are held against.

It runs in a child process, with the arguments, the cores and the variables that Bidbeam gives an engine of its own. The
parent writes one JSON object a line to it and reads one back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bidbeam.connectors.vllm_engine import VllmConfig


@dataclass(frozen=True)
class BareResult:
    """What one call of ``run`` came to: ``seconds`` from the first request to the last answer; lists by prompt."""

    seconds: float
    outputs: list[str]
    cached_tokens: list[int]
    output_tokens: list[int]


class BareEngine:
    """Starts loading at once; the first ``run`` waits for it. Ends with ``close``, or with this process."""

    def __init__(self, model_dir: str, engine: Mapping[str, Any], *, cores: Sequence[int]) -> None:
        config = VllmConfig.of("bare", model_dir, engine)
        self._log = tempfile.TemporaryFile(prefix="bare-engine-")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ
            | {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "TOKENIZERS_PARALLELISM": "false",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                "OMP_NUM_THREADS": str(len(cores)),
            }
            | dict(config.env),
        )
        self._send({"engine_args": config.engine_args, "cores": list(cores)})
        self._loaded = False

    def ready(self) -> None:
        """Waits until the model is loaded."""
        if not self._loaded:
            self._receive()
            self._loaded = True

    def run(self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]) -> BareResult:
        """Generates for prompts of token ids, in their order, with an empty prefix cache at the start."""
        self.ready()
        self._send({"prompts": [*map(list, prompts)], "sampling": dict(sampling)})
        return BareResult(**self._receive())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the bare engine ended:\n{self._log.read().decode(errors='replace')[-3000:]}")
        message: dict[str, Any] = json.loads(line)
        return message


def _serve() -> None:
    """The child: the engine first, then one job a line, until the parent is gone."""
    # What vLLM prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, config["cores"])

    import gc

    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**config["engine_args"]))
    gc.collect()
    gc.freeze()
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_generate(engine, **json.loads(line))), file=answers, flush=True)


def _generate(engine: Any, prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
    done: dict[int, Any] = {}
    engine.reset_prefix_cache()
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = output
    seconds = time.perf_counter() - started
    ordered = [done[i] for i in range(len(prompts))]
    return {
        "seconds": seconds,
        "outputs": [output.outputs[0].text for output in ordered],
        "cached_tokens": [output.num_cached_tokens for output in ordered],
        "output_tokens": [sum(len(sample.token_ids) for sample in output.outputs) for output in ordered],
    }


if __name__ == "__main__":
    _serve()
