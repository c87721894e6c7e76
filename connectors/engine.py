"""The engine seam: record batches of requests in, record batches of settled requests out.

Nothing on our side of this door makes a Python object per prompt. An engine that needs objects (vLLM, HTTP) makes
them behind it, a few at a time; an engine that does not (the stand-in of a rehearsal) stays columnar throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Protocol, runtime_checkable

import pyarrow as pa

SAMPLING_TYPE = pa.dictionary(pa.int32(), pa.string())

REQUEST_FIELDS: dict[str, pa.DataType] = {
    # Always there.
    "tag": pa.int64(),  # the caller's handle, unique among what is in flight; comes back with the result
    "attempt_id": pa.binary(16),  # what the engine's log and the provider see
    "input_tokens": pa.int32(),  # exact where the model's tokenizer is known, else an estimate
    "max_tokens": pa.int32(),
    "sampling": SAMPLING_TYPE,  # canonical JSON object: max_tokens, temperature, seed, top_p, stop, n, ...
    "cache_salt": pa.dictionary(pa.int32(), pa.string()),  # null: prefixes may be shared with any request
    # There where the engine's ``wants`` names it.
    "tokens": pa.list_(pa.int32()),  # prompt token ids, chat template applied
    "messages": pa.large_string(),  # chat: JSON list of {role, content}; null where the request is raw
    "prompt": pa.large_string(),  # raw: the text as it is; null where the request is a chat
    "key": pa.binary(16),  # the request's content key; and so all else that the request's books know of it
    "prefix_id": pa.dictionary(pa.int32(), pa.string()),  # names the prefix that neighbours share; null: none
}

RESULT_SCHEMA = pa.schema(
    [
        pa.field("tag", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # ok | failed | cancelled
        pa.field("error_class", pa.string()),  # caller auth_funds rate capacity server timeout bad_output policy
        pa.field("error_message", pa.string()),  # ours or the provider's, cut short; never a prompt, an answer, a key
        pa.field("http_status", pa.int16()),
        pa.field("output", pa.large_string()),  # the first sample
        pa.field("samples", pa.list_(pa.large_string())),  # all samples, where n > 1; else null
        pa.field("finish_reason", pa.string()),  # "length": some sample was cut off at max_tokens
        pa.field("model_returned", pa.string()),  # the model that the answer names
        pa.field("other_model", pa.bool_()),  # whether that is plainly another one than was asked; null: not compared
        pa.field("input_tokens", pa.int64()),  # includes cached ones; null: not reported
        pa.field("cached_tokens", pa.int64()),  # null: not reported
        pa.field("cache_write_tokens", pa.int64()),  # input tokens written to a cache, none of the cached ones
        pa.field("output_tokens", pa.int64()),  # of all samples; null: not reported
        pa.field("usage_source", pa.string()),  # reported (the provider says so) | recount | estimate
        pa.field("provider_request_id", pa.string()),
        pa.field("provider_cost", pa.decimal128(38, 18)),
        pa.field("endpoint_host", pa.string()),
        pa.field("jurisdiction", pa.string()),  # the country where the answer says that it was processed
        pa.field("started_at", pa.timestamp("us", "UTC"), nullable=False),  # handed to the engine
        pa.field("finished_at", pa.timestamp("us", "UTC"), nullable=False),  # its last token or its error came back
        pa.field("retry_after_s", pa.float64()),
    ]
)


@runtime_checkable
class Engine(Protocol):
    """One model on one pool, as a shift drives it. All methods are called from the shift's thread; none blocks long."""

    wants: frozenset[str]
    """Which optional request columns ``submit`` needs: of ``tokens``, ``messages``, ``prompt``, ``prefix_id``."""

    @property
    def room(self) -> int:
        """How many more requests it takes now and still keeps itself full in order; 0 when its window is full."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet returned by ``poll``."""
        ...

    def listen(self, wake: Callable[[], None]) -> None:
        """Calls ``wake`` (from any thread) whenever ``poll`` has something new, or the engine died."""
        ...

    def submit(self, requests: pa.RecordBatch) -> None:
        """Takes a batch of at most ``room`` rows, to be begun in row order. Raises PoolDown when the engine is gone."""
        ...

    def poll(self) -> list[pa.RecordBatch]:
        """What finished since the last call, each batch of RESULT_SCHEMA. Raises PoolDown when the engine is gone;
        results that came before its end are handed out first."""
        ...

    def cancel(self, tags: Collection[int] | None = None) -> None:
        """Gives up what is in flight under these tags, None: everything. Each comes back from ``poll`` as
        ``cancelled``, its usage as far as known; what is not in flight any more comes back as it ended."""
        ...

    def close(self) -> None:
        """Frees everything, processes included. Idempotent."""
        ...


@runtime_checkable
class Queueing(Engine, Protocol):
    """An engine with a queue of its own: of what is in flight some may still be here. Read from any thread."""

    @property
    def sent(self) -> int:
        """Requests that are at the pool now."""
        ...

    @property
    def pause_s(self) -> float:
        """Seconds for which nothing more is sent, as the pool asked or because it pushed back; 0 where it may be."""
        ...


@runtime_checkable
class Lasting(Engine, Protocol):
    """An engine whose work outlives this process: what it sent goes on, and whoever comes next takes it over.

    ``in_flight`` counts, beside requests, what was taken over and nobody asks for, until ``strays`` has given it.
    """

    earlier: Mapping[datetime, str]
    """The terms under which what was taken over had been sent, by the ``started_at`` of its results."""

    def gathered(self) -> None:
        """Says that no more requests come for now: what was gathered is sent. Called often."""
        ...

    def strays(self) -> list[tuple[pa.RecordBatch, pa.RecordBatch]]:
        """What came back of rows that nobody asks for any more, to be booked all the same: requests as settling takes
        them (with the identity of the attempt that sent them, and no tag), and their results row by row."""
        ...

    def booked(self) -> None:
        """Says that everything handed out so far is in the journal for good."""
        ...

    def leave(self) -> None:
        """Forgets everything in flight without cancelling it: it goes on, and is not returned any more."""
        ...
