"""The child process of one vLLM engine: ``python -m bidbeam.connectors.vllm_worker CHANNEL_FD LIFELINE_FD``.

One thread reads the channel, the main thread steps the engine, and between steps takes what came without waiting. A
third thread watches the lifeline, a pipe whose other end only the parent holds: when the parent dies, however it dies,
the pipe ends and the whole process group goes with it.

Frames on the channel are a kind and a body: requests and results as Arrow IPC streams, control messages as a JSON
object with an ``op``. The parent sends ``config`` first, then requests, ``cancel``, ``stats`` and ``close``; the
child answers ``ready`` or ``failed``, then results, ``stats``, and ``fatal`` when the engine broke.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pyarrow as pa

from bidbeam.connectors.engine import RESULT_SCHEMA

# Eight bytes each, so that the Arrow buffers behind them stay aligned.
REQUESTS, RESULTS, CONTROL = b"requests", b"results_", b"control_"

_COUNTERS = ("requests", "finished", "failed", "cancelled", "steps", "input_tokens", "cached_tokens", "output_tokens")
ALIVE_S = 5.0
"""Seconds between two signs of life of an engine at work."""
_MESSAGE_LIMIT = 500
_NOT_SAMPLING = frozenset({"output_kind", "skip_clone", "output_text_buffer_length", "detokenize", "stream_interval"})


def encode_batch(kind: bytes, batch: pa.RecordBatch) -> bytes:
    """One frame holding ``batch`` as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    sink.write(kind)
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def decode_batch(frame: bytes) -> pa.RecordBatch:
    """The batch of a frame made by ``encode_batch``."""
    with pa.ipc.open_stream(pa.py_buffer(frame).slice(len(REQUESTS))) as reader:
        return reader.read_next_batch()


def encode_control(op: str, **values: Any) -> bytes:
    """One frame holding a control message."""
    return CONTROL + json.dumps({"op": op, **values}).encode()


def decode_control(frame: bytes) -> dict[str, Any]:
    """The object of a frame made by ``encode_control``."""
    message: dict[str, Any] = json.loads(frame[len(CONTROL) :])
    return message


def result_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows as a batch of RESULT_SCHEMA; what a row leaves out is NULL."""
    return pa.RecordBatch.from_pylist(list(rows), schema=RESULT_SCHEMA)


def sampling_params(text: str, max_tokens: int | None) -> Any:
    """vLLM's SamplingParams for a canonical JSON sampling object.

    ``max_tokens`` is taken where the object has none. Raises ValueError or TypeError, with a message that names the
    key, for what vLLM does not know or does not take.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    values: dict[str, Any] = json.loads(text)
    if max_tokens is not None:
        values.setdefault("max_tokens", max_tokens)
    response_format = values.pop("response_format", None)
    known = [k for k in SamplingParams.__struct_fields__ if not k.startswith("_") and k not in _NOT_SAMPLING]
    for key in values:
        if key not in known:
            raise ValueError(f"sampling key {key!r} is not one that vLLM takes{_nearest(key, known)}")
    if isinstance(values.get("structured_outputs"), dict):
        values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
    if response_format is not None:
        constraint = _constraint(response_format)
        if constraint is not None:
            values["structured_outputs"] = StructuredOutputsParams(**constraint)
    if isinstance(values.get("logit_bias"), dict):
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    return SamplingParams(**values, output_kind=RequestOutputKind.FINAL_ONLY)


def _constraint(response_format: Any) -> dict[str, Any] | None:
    """OpenAI's ``response_format`` as arguments of StructuredOutputsParams; None for plain text."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
        if isinstance(schema, dict):
            return {"json": schema}
        raise ValueError("sampling key 'response_format' of type json_schema needs json_schema.schema, an object")
    raise ValueError("sampling key 'response_format' needs a type of text, json_object or json_schema")


class _Entry(NamedTuple):
    """A request that vLLM has: the caller's tag, when it was handed over, its prompt's length, vLLM's own id."""

    tag: int
    started: datetime
    length: int
    internal: str


class Host:
    """Drives one vLLM engine from the frames of a channel. Everything runs in the thread that calls ``run``."""

    def __init__(self, channel: Connection, inbox: queue.SimpleQueue[bytes | None]) -> None:
        self._channel, self._inbox = channel, inbox
        self._engine: Any = None
        self._in_flight: dict[str, _Entry] = {}  # by attempt id, in hex
        self._params: dict[tuple[str, int | None], Any] = {}
        self._finished: list[dict[str, Any]] = []
        self._closing = False
        self._said = 0.0
        self._counters = dict.fromkeys(_COUNTERS, 0)

    def load(self, config: Mapping[str, Any]) -> None:
        """Builds the engine and tells the parent its facts. Raises whatever vLLM raises."""
        started = time.monotonic()
        import vllm
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = config["engine_args"]
        known = [argument.name for argument in dataclasses.fields(EngineArgs)]
        for key in arguments:
            if key not in known:
                raise ValueError(f"vLLM has no engine argument {key!r}{_nearest(key, known)}")
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        # What loading made lives as long as the process: the collector need not look at it between steps.
        gc.collect()
        gc.freeze()
        settings = self._engine.vllm_config
        self._send(
            encode_control(
                "ready",
                max_model_len=settings.model_config.max_model_len,
                block_size=settings.cache_config.block_size,
                num_gpu_blocks=settings.cache_config.num_gpu_blocks,
                max_num_seqs=settings.scheduler_config.max_num_seqs,
                vocab_size=settings.model_config.get_vocab_size(),
                prefix_caching=bool(settings.cache_config.enable_prefix_caching),
                load_s=time.monotonic() - started,
                version=vllm.__version__,
            )
        )

    def run(self) -> None:
        """Steps the engine until the parent says ``close`` or its end of the channel is gone."""
        engine = self._engine
        while not self._closing:
            for frame in self._frames(block=not engine.has_unfinished_requests()):
                self._take(frame)
            if engine.has_unfinished_requests() and not self._closing:
                self._counters["steps"] += 1
                self._say_alive()
                for output in engine.step():
                    if output.finished:
                        self._settle(output)
            if self._finished:
                rows, self._finished = self._finished, []
                self._send(encode_batch(RESULTS, result_batch(rows)))

    def _say_alive(self) -> None:
        """Now and then, between steps: long answers come back late, and a step that hangs says nothing."""
        if time.monotonic() - self._said > ALIVE_S:
            self._said = time.monotonic()
            self._send(encode_control("alive"))

    def _frames(self, *, block: bool) -> Iterator[bytes | None]:
        """What came so far; with ``block``, waits for the first."""
        try:
            yield self._inbox.get(block)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _take(self, frame: bytes | None) -> None:
        if frame is None:
            self._closing = True
        elif frame.startswith(REQUESTS):
            self._add(decode_batch(frame))
        else:
            control = decode_control(frame)
            op = control["op"]
            if op == "cancel":
                self._cancel(control["tags"])
            elif op == "stats":
                self._send(encode_control("stats", **self._stats()))
            elif op == "close":
                self._closing = True

    def _add(self, batch: pa.RecordBatch) -> None:
        """Hands a batch to vLLM row by row; a row it does not take fails alone."""
        rows = zip(
            batch.column("tag").to_pylist(),
            batch.column("attempt_id").to_pylist(),
            batch.column("sampling").to_pylist(),
            batch.column("max_tokens").to_pylist(),
            batch.column("cache_salt").to_pylist(),
            _token_lists(batch.column("tokens")),
            strict=True,
        )
        for tag, attempt_id, sampling, max_tokens, salt, tokens in rows:
            started = datetime.now(UTC)
            self._counters["requests"] += 1
            try:
                internal = self._hand_over(attempt_id.hex(), tokens, sampling, max_tokens, salt)
            except Exception as error:  # whatever vLLM raises for one request concerns that request alone
                self._counters["failed"] += 1
                self._finished.append(
                    {
                        "tag": tag,
                        "status": "failed",
                        "error_class": "caller",
                        "error_message": _short(error),
                        # It was turned away at the door: nothing was computed, and that is known.
                        "input_tokens": 0,
                        "cached_tokens": 0,
                        "output_tokens": 0,
                        "usage_source": "reported",
                        "started_at": started,
                        "finished_at": datetime.now(UTC),
                    }
                )
            else:
                self._in_flight[attempt_id.hex()] = _Entry(tag, started, len(tokens or ()), internal)

    def _hand_over(
        self, attempt: str, tokens: list[int] | None, sampling: str, max_tokens: int | None, salt: str | None
    ) -> str:
        """Adds one request; returns vLLM's own id for it. Raises what vLLM raises for a request it does not take."""
        if attempt in self._in_flight:
            raise ValueError("an attempt with this id is in flight already")
        if tokens is None:
            raise ValueError("the request has no token ids")
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if salt is not None:
            prompt["cache_salt"] = salt
        internal: str = self._engine.add_request(attempt, prompt, self._sampling(sampling, max_tokens))
        return internal

    def _sampling(self, text: str, max_tokens: int | None) -> Any:
        """Parses each distinct sampling text once; vLLM clones what it is given."""
        key = (text, max_tokens)
        params = self._params.get(key)
        if params is None:
            if len(self._params) >= 4096:  # a seed per row would otherwise keep every text of the run
                self._params.clear()
            params = self._params[key] = sampling_params(text, max_tokens)
        return params

    def _settle(self, output: Any) -> None:
        """Notes a finished output as a result row."""
        entry = self._in_flight.pop(output.request_id, None)
        if entry is None:
            return
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        first = samples[0]
        broken = any(sample.finish_reason == "error" for sample in samples)
        row: dict[str, Any] = {
            "tag": entry.tag,
            "status": "failed" if broken else "ok",
            "output": first.text,
            "samples": [sample.text for sample in samples] if len(samples) > 1 else None,
            "finish_reason": "length" if any(s.finish_reason == "length" for s in samples) else first.finish_reason,
            "input_tokens": entry.length,
            "cached_tokens": output.num_cached_tokens,
            "output_tokens": sum(len(sample.token_ids) for sample in samples),
            "usage_source": "reported",
            "started_at": entry.started,
            "finished_at": datetime.now(UTC),
        }
        if broken:
            row |= {"error_class": "server", "error_message": "the engine gave the request up", "output": None}
        self._counters["failed" if broken else "finished"] += 1
        for name in ("input_tokens", "cached_tokens", "output_tokens"):
            self._counters[name] += row[name] or 0
        self._finished.append(row)

    def _cancel(self, tags: list[int] | None) -> None:
        """Aborts what is in flight under these tags, None: all; what each had computed by then is its usage."""
        given_up = {a: each for a, each in self._in_flight.items() if tags is None or each.tag in tags}
        for attempt, entry in given_up.items():
            self._finished.append(
                {
                    "tag": entry.tag,
                    "status": "cancelled",
                    "finish_reason": "abort",
                    **self._computed(entry.internal, entry.length),
                    "usage_source": "reported",
                    "started_at": entry.started,
                    "finished_at": datetime.now(UTC),
                }
            )
            self._counters["cancelled"] += 1
            self._engine.abort_request([attempt])
            del self._in_flight[attempt]

    def _computed(self, internal: str, length: int) -> dict[str, int | None]:
        """Usage of an unfinished request from vLLM's own books; NULL where they cannot tell (several samples)."""
        try:
            request = self._engine.engine_core.engine_core.scheduler.requests[internal]
            state = self._engine.output_processor.request_states[internal]
            output = request.num_output_tokens
            done = length if output else min(length, request.num_computed_tokens)
            cached = min(done, state.num_cached_tokens)
        except (KeyError, AttributeError):  # no public door leads there, and what is behind may move
            return {"input_tokens": None, "cached_tokens": None, "output_tokens": None}
        return {"input_tokens": done, "cached_tokens": cached, "output_tokens": output}

    def _stats(self) -> dict[str, float]:
        """Our counters and, where the engine keeps them (``disable_log_stats: false``), its own."""
        from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

        stats: dict[str, float] = dict(self._counters)
        for metric in get_metrics_snapshot():
            if isinstance(metric, Counter | Gauge):
                stats[metric.name] = stats.get(metric.name, 0) + metric.value
        return stats

    def _send(self, frame: bytes) -> None:
        self._channel.send_bytes(frame)


def _token_lists(column: pa.Array) -> Iterator[list[int] | None]:
    """Token ids of each row as a Python list, one row at a time; None for a null."""
    offsets = column.offsets.to_pylist()
    values = column.values.to_numpy(zero_copy_only=False)
    for i, valid in enumerate(column.is_valid().to_pylist()):
        yield values[offsets[i] : offsets[i + 1]].tolist() if valid else None


def _nearest(key: str, known: Sequence[str]) -> str:
    """A hint at the name that was meant, or nothing."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(error: BaseException) -> str:
    """An error as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LIMIT else text[: _MESSAGE_LIMIT - 1] + "…"


def _watch_lifeline(lifeline: int) -> None:
    """Blocks until the parent is gone, then kills this process and all that it started."""
    while os.read(lifeline, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _read_channel(channel: Connection, inbox: queue.SimpleQueue[bytes | None]) -> None:
    try:
        while True:
            inbox.put(channel.recv_bytes())
    except (EOFError, OSError):
        inbox.put(None)


def main(argv: Sequence[str]) -> None:
    """Loads the engine the parent describes and serves it until told to stop."""
    for fd in map(int, argv):
        # What vLLM starts must not hold our end open once we are gone.
        os.set_inheritable(fd, False)
    channel = Connection(int(argv[0]))
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_watch_lifeline, args=(int(argv[1]),), daemon=True).start()
    threading.Thread(target=_read_channel, args=(channel, inbox), daemon=True).start()
    first = inbox.get()
    if first is None:
        return
    config = decode_control(first)
    if config["cores"] and hasattr(os, "sched_setaffinity"):
        # Before torch starts its threads, which inherit it.
        os.sched_setaffinity(0, config["cores"])
    pa.set_cpu_count(1)
    host = Host(channel, inbox)
    try:
        host.load(config)
    except Exception as error:
        channel.send_bytes(encode_control("failed", error=f"{type(error).__name__}: {_short(error)}"))
        raise
    try:
        host.run()
    except Exception as error:
        channel.send_bytes(encode_control("fatal", error=f"{type(error).__name__}: {_short(error)}"))
        raise


if __name__ == "__main__":
    status = 0
    try:
        main(sys.argv[1:])
    except BaseException:  # the log gets it, whatever it is
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of torch and the channel may be anywhere; nothing is left that an orderly exit would do better.
    os._exit(status)
