"""A long-lived process for one side of a comparison: ``python side.py run|copy|encode``, a JSON object a line.

Each side is warm when it is timed, and its start-up is known apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_SAMPLE_S = 0.02


class Side:
    """The parent's end. ``start_s`` is from the start of the process to the end of its imports."""

    def __init__(self, kind: str) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._receive()
        self.start_s = time.perf_counter() - started
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def call(self, **arguments: Any) -> dict[str, Any]:
        """Runs the side once; its answer has ``seconds``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        self._ended.set()
        self._sampler.join()
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other side ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _sample(self) -> None:
        """Keeps the most memory that the process and its children had at any time."""
        process = psutil.Process(self._process.pid)
        while not self._ended.wait(_SAMPLE_S):
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(one.memory_info().rss for one in family))


def _run() -> Callable[..., dict[str, Any]]:
    import apache_beam  # noqa: F401 - start-up, not the run
    import pyarrow as pa

    from bidbeam.connectors.stand_in import StandIn
    from bidbeam.pipelines import batch  # noqa: F401
    from bidbeam.pipelines.job import Job
    from bidbeam.pipelines.progress import NullProgress
    from bidbeam.pipelines.run import run_job
    from bidbeam.transforms import write_outputs

    sent = 0
    submit, publish = StandIn.submit, write_outputs.publish_range

    def counted(engine: StandIn, requests: pa.RecordBatch) -> None:
        nonlocal sent
        sent += requests.num_rows
        submit(engine, requests)

    def crashing(*_: object) -> None:
        raise RuntimeError("the crash that was asked for")

    StandIn.submit = counted  # type: ignore[method-assign]

    def once(job: str, keep: bool = False, crash: bool = False) -> dict[str, Any]:
        nonlocal sent
        for left in () if keep else ("out", "ledger"):
            shutil.rmtree(Path(job).parent / left, ignore_errors=True)
        sent, summary = 0, None
        started = time.perf_counter()
        if crash:
            write_outputs.publish_range = crashing  # type: ignore[assignment]
        try:
            summary = run_job(Job.from_yaml(job), rehearse=True, beam_options=[], progress=NullProgress())
        except Exception:
            if not crash:
                raise
        finally:
            write_outputs.publish_range = publish
        seconds = time.perf_counter() - started
        if crash:
            segments = sorted(Path(job).parent.glob("out/**/segments/*.arrow"))
            for half in segments[max(len(segments) // 2, 1) :]:
                half.unlink()
            return {"seconds": seconds, "sent": sent}
        assert summary is not None
        assert summary.exit_code == 0
        return {
            "seconds": seconds,
            "requests": summary.requests,
            "tokens": summary.input_tokens,
            "sent": sent,
            "status": summary.status,
        }

    return once


def _copy() -> Callable[..., dict[str, Any]]:
    import duckdb

    connection = duckdb.connect()

    def once(source: str, target: str) -> dict[str, Any]:
        Path(target).unlink(missing_ok=True)
        query = f"COPY (SELECT * FROM '{source}' ORDER BY prompt) TO '{target}' (FORMAT parquet)"  # noqa: S608
        started = time.perf_counter()
        connection.execute(query)
        return {"seconds": time.perf_counter() - started}

    return once


def _encode() -> Callable[..., dict[str, Any]]:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    def once(source: str, model: str) -> dict[str, Any]:
        tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        texts = pq.read_table(source).column("prompt").to_pylist()
        tokens = 0
        started = time.perf_counter()
        for at in range(0, len(texts), 4096):
            tokens += sum(map(len, tokenizer.encode_batch_fast(texts[at : at + 4096])))
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    return once


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    once = {"run": _run, "copy": _copy, "encode": _encode}[sys.argv[1]]()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(once(**json.loads(line))), file=answers, flush=True)
