"""How much of each request the cache can reuse, from the sorted keys alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64s = npt.NDArray[np.int64]

_WORD = 8
_STRIDE = 32
_BLOCK = 64


def _layout(keys: pa.Array) -> tuple[npt.NDArray[np.uint8], Int64s]:
    """The bytes behind a (large) binary or string array and its n + 1 offsets into them; nothing is copied."""
    large = pa.types.is_large_binary(keys.type) or pa.types.is_large_string(keys.type)
    _, offset_buffer, data_buffer = keys.buffers()
    if len(keys) == 0 or offset_buffer is None:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(offset_buffer, np.int64 if large else np.int32)
    data = np.zeros(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return data, offsets[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)


def common_prefix_bytes(keys: pa.Array, order: Int64s | None = None, sorted_within: Int64s | None = None) -> Int64s:
    """For each key the length in bytes of the prefix it shares with the key before it; 0 for the first. Shape (n,).

    ``order`` says which key stands at each place (all of them in their own order by default), so that keys need not
    be moved to be compared. Keys are never null. ``sorted_within`` (n,) ascends with the places, and says that keys of
    equal code ascend too: what the ends of a block share, all within it share, and only the rest is compared.
    """
    n = len(keys)
    if n < 2:
        return np.zeros(n, np.int64)
    data, offsets = _layout(keys)
    starts, lengths = offsets[:-1], np.diff(offsets)
    if order is not None:
        starts, lengths = starts[order], lengths[order]
    known = np.zeros(n - 1, np.int64)
    if sorted_within is not None:
        first = np.arange(0, n - 1, _BLOCK)
        last = np.minimum(first + _BLOCK, n - 1)
        alike = sorted_within[first] == sorted_within[last]
        ends = np.zeros(len(first), np.int64)
        one, other = first[alike], last[alike]
        ends[alike] = _shared(data, starts[one], starts[other], np.minimum(lengths[one], lengths[other]))
        known = np.repeat(ends, last - first)
    most = np.minimum(lengths[1:], lengths[:-1]) - known
    return np.concatenate([[0], known + _shared(data, starts[:-1] + known, starts[1:] + known, most)])


def _shared(data: npt.NDArray[np.uint8], left: Int64s, right: Int64s, most: Int64s) -> Int64s:
    """How many of at most ``most`` bytes are equal from ``left`` and ``right`` on. Shape (pairs,).

    Compares 32 bytes of all still-equal pairs at a time, so that the work is the length of what is shared.
    """
    shared = np.zeros(len(left), np.int64)
    rows = np.flatnonzero(most > 0)
    left, right, most = left[rows], right[rows], most[rows]
    for width in (_STRIDE, _WORD):
        # Words at every offset, ``width`` bytes of them a load; unaligned loads are as good as any here.
        if len(data) < width:
            continue
        words = np.ndarray((len(data) - width + 1, width // _WORD), "<u8", data.data, strides=(1, _WORD))
        rows, left, right, most = _compare(words, shared, rows, left, right, most)
    _finish(data, shared, rows, left, right, most)
    return shared


def _compare(
    words: npt.NDArray[np.uint64], shared: Int64s, rows: Int64s, left: Int64s, right: Int64s, most: Int64s
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Compares whole loads and adds what is equal to ``shared``.

    Returns the pairs that are equal as far as whole loads reach: their rows, where each side goes on, and how many
    bytes are left to compare.
    """
    width = words.shape[1] * _WORD
    ended: list[tuple[Int64s, Int64s, Int64s, Int64s]] = []
    while len(rows):
        whole = most >= width
        if not whole.all():
            short = ~whole
            ended.append((rows[short], left[short], right[short], most[short]))
            rows, left, right, most = rows[whole], left[whole], right[whole], most[whole]
        difference = words[left] ^ words[right]
        different = difference.any(axis=1)
        if different.any():
            unlike = difference[different]
            first = (unlike != 0).argmax(axis=1)
            word = unlike[np.arange(len(unlike)), first]
            # The lowest set bit lies in the first byte that differs.
            lowest = word & (~word + np.uint64(1))
            shared[rows[different]] += first * _WORD + np.log2(lowest.astype(np.float64)).astype(np.int64) // 8
            equal = ~different
            rows, left, right, most = rows[equal], left[equal], right[equal], most[equal]
        shared[rows] += width
        left, right, most = left + width, right + width, most - width
    if not ended:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty, empty
    parts = [np.concatenate(column) for column in zip(*ended, strict=True)]
    return parts[0], parts[1], parts[2], parts[3]


def _finish(
    data: npt.NDArray[np.uint8], shared: Int64s, rows: Int64s, left: Int64s, right: Int64s, most: Int64s
) -> None:
    """Compares the few bytes that are left of each pair one by one."""
    for step in range(_WORD):
        going = most > step
        rows, left, right, most = rows[going], left[going], right[going], most[going]
        same = data[left + step] == data[right + step]
        rows, left, right, most = rows[same], left[same], right[same], most[same]
        if not len(rows):
            return
        shared[rows] += 1


def cacheable_tokens(shared_tokens: Int64s, input_tokens: Int64s, block: int | Int64s) -> Int64s:
    """Ideal cached tokens per request: whole blocks of what it shares with an earlier one, never its last token.

    In sorted order the longest prefix shared with *any* earlier request is the one shared with the request just
    before, so the sum is the hit of an unbounded prefix trie. Shapes (n,); ``block`` in tokens.
    """
    most = np.minimum(shared_tokens, input_tokens - 1)
    return np.maximum(most - most % block, 0).astype(np.int64)
