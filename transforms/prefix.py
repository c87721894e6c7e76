"""How much of each request the cache can reuse, from the sorted keys alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64s = npt.NDArray[np.int64]

_WORD = 8


def _layout(keys: pa.Array) -> tuple[npt.NDArray[np.uint8], Int64s]:
    """The bytes behind a (large) binary or string array and its n + 1 offsets into them; nothing is copied."""
    large = pa.types.is_large_binary(keys.type) or pa.types.is_large_string(keys.type)
    _, offset_buffer, data_buffer = keys.buffers()
    if len(keys) == 0 or offset_buffer is None:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(offset_buffer, np.int64 if large else np.int32)
    data = np.zeros(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return data, offsets[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)


def common_prefix_bytes(keys: pa.Array, order: Int64s | None = None) -> Int64s:
    """For each key the length in bytes of the prefix it shares with the key before it; 0 for the first. Shape (n,).

    ``order`` says which key stands at each place (all of them in their own order by default), so that keys need not
    be moved to be compared. Keys are never null. Compares eight bytes of all still-equal neighbours at a time, so that
    the work is the length of what is shared.
    """
    n = len(keys)
    shared = np.zeros(n, np.int64)
    if n < 2:
        return shared
    data, offsets = _layout(keys)
    starts, lengths = offsets[:-1], np.diff(offsets)
    if order is not None:
        starts, lengths = starts[order], lengths[order]
    most = np.minimum(lengths[1:], lengths[:-1])
    rows = np.flatnonzero(most > 0)
    left, right, most = starts[:-1][rows], starts[1:][rows], most[rows]
    if len(data) >= _WORD:
        # One eight-byte word at every offset; unaligned loads are as good as any here.
        words = np.ndarray(shape=(len(data) - _WORD + 1,), dtype="<u8", buffer=data.data, strides=(1,))
        at = 0
        while len(rows):
            whole = most >= at + _WORD
            if not whole.all():
                # Less than a word is left to compare: finished byte by byte.
                _finish(data, shared, rows[~whole], left[~whole], right[~whole], most[~whole], at)
                rows, left, right, most = rows[whole], left[whole], right[whole], most[whole]
            difference = words[left + at] ^ words[right + at]
            equal = difference == 0
            if not equal.all():
                unequal = difference[~equal]
                # The lowest set bit lies in the first byte that differs.
                lowest = unequal & (~unequal + np.uint64(1))
                shared[rows[~equal] + 1] = at + np.log2(lowest.astype(np.float64)).astype(np.int64) // 8
                rows, left, right, most = rows[equal], left[equal], right[equal], most[equal]
            at += _WORD
    else:
        _finish(data, shared, rows, left, right, most, 0)
    return shared


def _finish(
    data: npt.NDArray[np.uint8], shared: Int64s, rows: Int64s, left: Int64s, right: Int64s, most: Int64s, at: int
) -> None:
    """Compares the less than eight bytes that are left of each pair, and writes down what is shared in all."""
    length = np.full(len(rows), at, np.int64)
    going = np.ones(len(rows), bool)
    for step in range(at, at + _WORD):
        going &= most > step
        if not going.any():
            break
        here = np.flatnonzero(going)
        same = data[left[here] + step] == data[right[here] + step]
        length[here[same]] += 1
        going[here[~same]] = False
    shared[rows + 1] = length


def cacheable_tokens(shared_tokens: Int64s, input_tokens: Int64s, block: int | Int64s) -> Int64s:
    """Ideal cached tokens per request: whole blocks of what it shares with an earlier one, never its last token.

    In sorted order the longest prefix shared with *any* earlier request is the one shared with the request just
    before, so the sum is the hit of an unbounded prefix trie. Shapes (n,); ``block`` in tokens.
    """
    most: Int64s = np.minimum(shared_tokens, input_tokens - 1) // block * block
    return np.maximum(most, 0)
