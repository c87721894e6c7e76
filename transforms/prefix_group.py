"""Prefix groups: which neighbours in a lot have a long beginning in common, and a name for each such beginning.

A provider that runs several machines behind one address can send requests of one name to the machine that holds their
prefix. The name is a keyed digest of the beginning: the same in every lot, round and start of a run, and without the
run's seed it says nothing of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bidbeam.transforms.prefix import Int64s, common_prefix_bytes

SHORTEST = 256
"""Bytes: a shorter beginning in common is not worth a machine of its own."""
_FAR = 2
"""A group ends where a request shares this many times more, or less, with one neighbour than with the other."""


def prefix_groups(shared: Int64s) -> tuple[Int64s, Int64s]:
    """From the bytes that each request shares with the one before (int64[n], the first 0): its group, numbered from 0,
    and per group the bytes that all of it shares, as a power of two; 0 where that is less than SHORTEST.
    """
    n = len(shared)
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    after = np.append(shared[1:], 0)
    before = np.insert(shared[:-1], 0, 0)
    begins = (shared < SHORTEST) | (after > _FAR * shared) | (before > _FAR * shared)
    begins[0] = True
    starts = np.flatnonzero(begins)
    group = np.cumsum(begins) - 1
    inside = np.where(begins, np.iinfo(np.int64).max, shared)
    depth = np.minimum.reduceat(inside, starts)
    # One that is alone belongs to whatever it shares with either neighbour.
    depth = np.where(depth == np.iinfo(np.int64).max, np.maximum(shared[starts], after[starts]), depth)
    power = np.int64(1) << np.floor(np.log2(np.maximum(depth, 1).astype(np.float64))).astype(np.int64)
    return group.astype(np.int64), np.where(power >= SHORTEST, power, 0)


def prefix_ids(keys: pa.Array, seed: int, parts: Sequence[str | None]) -> pa.Array:
    """A name per request (dictionary of text, 16 hex digits) from their rendered prompts in prefix order; null where a
    request shares too little with its neighbours. ``parts`` (model, tenant) keep apart what never shares a cache.
    """
    group, depth = prefix_groups(common_prefix_bytes(keys))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    names: dict[str, int] = {}
    code = np.full(len(starts), -1, np.int64)
    for at, (first, length) in enumerate(zip(starts.tolist(), depth.tolist(), strict=True)):
        if length:
            name = _name(keys[first].as_buffer().slice(0, length), seed, parts)
            code[at] = names.setdefault(name, len(names))
    codes: npt.NDArray[np.int64] = code[group] if len(keys) else np.zeros(0, np.int64)
    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string()))


def _name(beginning: pa.Buffer, seed: int, parts: Sequence[str | None]) -> str:
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(16, "little"), person=b"bidbeam-prefix")
    for part in parts:
        data = b"" if part is None else part.encode()
        digest.update(b"%d:" % (-1 if part is None else len(data)))
        digest.update(data)
    digest.update(beginning)
    return digest.hexdigest()
