"""Prefixes: what neighbours in sorted order share, and what a cache without bounds would have of it."""

from __future__ import annotations

from itertools import pairwise, takewhile
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.transforms import prefix
from bidbeam.transforms.prefix import cacheable_tokens, common_prefix_bytes

KEY_TYPES = [pa.binary(), pa.large_binary(), pa.string(), pa.large_string()]
pieces = st.lists(
    st.sampled_from([b"", b"\0", b"a", b"ab", b"\x80\xc3" * 4, b"\xff" * 9, b"shared prefix "]), max_size=5
)
keys_of_bytes = st.lists(pieces.map(b"".join), max_size=12)
keys_of_text = st.lists(st.text("ab\0éΩ😀", max_size=24), max_size=12)


def common(a: bytes, b: bytes) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def naive(keys: list[bytes]) -> list[int]:
    return [0] * bool(keys) + [common(a, b) for a, b in pairwise(keys)]


def trie_hits(requests: list[list[int]], block: int) -> int:
    """Tokens that a block cache without bounds hits, request after request: whole blocks, never the last token."""
    cached: set[tuple[int, ...]] = set()
    hits = 0
    for tokens in requests:
        for end in range(block, (len(tokens) - 1) // block * block + 1, block):
            if tuple(tokens[:end]) not in cached:
                break
            hits += block
        cached.update(tuple(tokens[:end]) for end in range(block, len(tokens) + 1, block))
    return hits


@given(keys_of_bytes, st.sampled_from([pa.binary(), pa.large_binary()]))
def test_common_prefixes_of_bytes_are_those_of_a_naive_count(keys: list[bytes], type_: pa.DataType) -> None:
    """Empty keys, null bytes and keys longer than a machine word count byte by byte, in small and large arrays."""
    assert common_prefix_bytes(pa.array(keys, type_)).tolist() == naive(keys)


@given(keys_of_text, st.sampled_from([pa.string(), pa.large_string()]))
def test_common_prefixes_of_text_are_counted_in_bytes(keys: list[str], type_: pa.DataType) -> None:
    """Text counts by its UTF-8 bytes, characters of several bytes included."""
    assert common_prefix_bytes(pa.array(keys, type_)).tolist() == naive([key.encode() for key in keys])


@given(st.lists(st.tuples(st.integers(0, 2), pieces.map(b"".join)), max_size=40), st.sampled_from([1, 2, 3, 7, 64]))
def test_what_the_ends_of_a_sorted_block_share_need_not_be_compared(rows: list[tuple[int, bytes]], block: int) -> None:
    """Keys that are known to be sorted within their groups count as any others do, however many stand in a block."""
    rows = sorted(rows)
    keys = pa.array([key for _, key in rows], pa.binary())
    groups = np.array([group for group, _ in rows], np.int64)
    with mock.patch.object(prefix, "_BLOCK", block):
        found = common_prefix_bytes(keys, np.arange(len(rows)), groups)
    assert found.tolist() == naive([key for _, key in rows])


@given(keys_of_bytes, st.data(), st.sampled_from(KEY_TYPES[:2]))
def test_a_slice_counts_as_if_it_stood_alone(keys: list[bytes], data: st.DataObject, type_: pa.DataType) -> None:
    """The first key of a slice shares nothing, whatever stands before it in the buffers."""
    start = data.draw(st.integers(0, len(keys)))
    length = data.draw(st.integers(0, len(keys) - start))
    found = common_prefix_bytes(pa.array(keys, type_).slice(start, length))
    assert found.tolist() == naive(keys[start : start + length])


@pytest.mark.parametrize("type_", KEY_TYPES)
def test_no_keys_and_one_key_share_nothing(type_: pa.DataType) -> None:
    """Nothing is shared where there is no key before."""
    assert common_prefix_bytes(pa.array([], type_)).tolist() == []
    assert common_prefix_bytes(pa.array(["x"]).cast(type_)).tolist() == [0]


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), max_size=14),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([2, 4]),
    st.randoms(use_true_random=False),
)
def test_the_ideal_is_what_an_unbounded_trie_hits_in_the_best_order(
    requests: list[list[int]], block: int, width: int, random: object
) -> None:
    """Sorted neighbours alone give the hits of a trie over all earlier requests, and no order has more."""
    keys = pa.array([b"".join(token.to_bytes(width, "big") for token in tokens) for tokens in requests], pa.binary())
    order = pc.array_sort_indices(keys)
    ordered = [requests[i] for i in order.to_pylist()]
    shared = common_prefix_bytes(keys.take(order)) // width
    lengths = np.array([len(tokens) for tokens in ordered], np.int64)
    ideal = int(cacheable_tokens(shared, lengths, block).sum())
    assert ideal == trie_hits(ordered, block)
    shuffled = list(requests)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert ideal >= trie_hits(shuffled, block)
