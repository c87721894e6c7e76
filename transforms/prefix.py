"""How much of each request the cache can reuse, from the sorted keys alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64s = npt.NDArray[np.int64]

_WORD = 8


def key_buffers(keys: pa.Array) -> tuple[npt.NDArray[np.uint8], Int64s]:
    """The bytes of a (large) binary or string array without nulls, padded by one word, and its n + 1 offsets."""
    large = pa.types.is_large_binary(keys.type) or pa.types.is_large_string(keys.type)
    _, offset_buffer, data_buffer = keys.buffers()
    width = np.int64 if large else np.int32
    if len(keys) == 0 or offset_buffer is None:
        return np.zeros(_WORD, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(offset_buffer, width)[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)
    data = np.zeros(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    first, last = int(offsets[0]), int(offsets[-1])
    # The padding lets a whole word be loaded at any offset.
    padded = np.zeros(last - first + _WORD, np.uint8)
    padded[: last - first] = data[first:last]
    return padded, offsets - first


def common_prefix_bytes(keys: pa.Array) -> Int64s:
    """For each key the length in bytes of the prefix it shares with the key before it; 0 for the first. Shape (n,).

    Compares eight bytes of all still-equal neighbours at a time, so that the work is the length of what is shared.
    """
    n = len(keys)
    shared = np.zeros(n, np.int64)
    if n < 2:
        return shared
    data, offsets = key_buffers(keys)
    words = np.ndarray(shape=(len(data) - _WORD + 1,), dtype="<u8", buffer=data.data, strides=(1,))
    lengths = np.diff(offsets)
    limit = np.minimum(lengths[1:], lengths[:-1])
    rows = np.flatnonzero(limit > 0)
    left, right = offsets[:-2][rows], offsets[1:-1][rows]
    most = limit[rows]
    at = 0
    while len(rows):
        difference = words[left + at] ^ words[right + at]
        equal = difference == 0
        stopped = ~equal
        if stopped.any():
            low = difference[stopped] & (~difference[stopped] + np.uint64(1))
            same_bytes = np.log2(low.astype(np.float64)).astype(np.int64) // 8
            shared[rows[stopped] + 1] = np.minimum(at + same_bytes, most[stopped])
        at += _WORD
        ended = equal & (most <= at)
        shared[rows[ended] + 1] = most[ended]
        going = equal & ~ended
        if not going.all():
            rows, left, right, most = rows[going], left[going], right[going], most[going]
    return shared


def cacheable_tokens(shared_tokens: Int64s, input_tokens: Int64s, block: int | Int64s) -> Int64s:
    """Ideal cached tokens per request: whole blocks of what it shares with an earlier one, never its last token.

    In sorted order the longest prefix shared with *any* earlier request is the one shared with the request just
    before, so the sum is the hit of an unbounded prefix trie. Shapes (n,); ``block`` in tokens.
    """
    most: Int64s = np.minimum(shared_tokens, input_tokens - 1) // block * block
    return np.maximum(most, 0)
