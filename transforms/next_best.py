"""The pools that may take a lot over once its winner and its runner-up are gone, or have no room in the reserve."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bidbeam.transforms.clearing import Clearing

AT_MOST = 3
"""Pools that are named for each lot: beyond them a next round with bids of its own is the better judge."""


def next_best(cleared: Clearing) -> pa.Array:
    """For each lot the eligible pools besides its winner and its fallback, the lowest score first (list<string>).

    Nothing is reserved for them: who hands a lot to one sees to it that the reserve covers that.
    """
    bids = cleared.bids
    score = bids.score.copy()
    rows = np.arange(len(score))
    for taken in (cleared.pool_of, cleared.fallback):
        has = taken >= 0
        score[rows[has], taken[has]] = np.inf
    named = min(AT_MOST, score.shape[1])
    ranked = np.argsort(score, axis=1, kind="stable")[:, :named]
    there = np.isfinite(np.take_along_axis(score, ranked, axis=1))
    names = pa.array([pool.spec.name for pool in bids.pools], pa.string())
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.take(pa.array(ranked[there])))
