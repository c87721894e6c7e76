"""The two linear programs of the auction, solved by HiGHS: the transportation program, and the least makespan."""

from __future__ import annotations

from typing import Any

import numpy as np

from bidbeam.transforms.market import Floats, Ints


def transport(
    rows: Ints,
    columns: Ints,
    cost: Floats,
    seconds: Floats,
    unserved: Floats,
    room: Floats,
) -> tuple[Floats, Floats]:
    """The transportation program over the given (row, pool) pairs: the share of its row that each pair gets, and the
    price of a second on each pool.

    A row may stay unserved at its cost.
    """
    # SciPy takes half a second to import, and a market that is not tight never asks for it.
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    bounded = np.flatnonzero(np.isfinite(room))
    count, pairs = len(unserved), len(rows)
    unit = float(np.mean(np.abs(cost))) if pairs else 0.0
    unit = unit or 1.0
    at = np.arange(pairs + count)
    fill = csr_array(
        (np.ones(pairs + count), (np.concatenate([rows, np.arange(count)]), at)), shape=(count, pairs + count)
    )
    # Each pool's row is scaled to 1, so that the solver's tolerance means the same for all.
    scale = np.where(room > 0, room, 1.0)
    pool_row = np.full(len(room), -1)
    pool_row[bounded] = np.arange(len(bounded))
    held = np.flatnonzero(pool_row[columns] >= 0)
    use = csr_array(
        (seconds[held] / scale[columns[held]], (pool_row[columns[held]], held)), shape=(len(bounded), pairs + count)
    )
    solved = linprog(
        np.concatenate([cost, unserved]) / unit,
        A_ub=use if len(bounded) else None,
        b_ub=(room[bounded] / scale[bounded]) if len(bounded) else None,
        A_eq=fill,
        b_eq=np.ones(count),
        method="highs",
    )
    _check(solved)
    prices = np.zeros(len(room))
    if len(bounded):
        prices[bounded] = np.maximum(-solved.ineqlin.marginals, 0.0) * unit / scale[bounded]
    return np.asarray(solved.x[:pairs]), prices


def least_makespan(rows: Ints, columns: Ints, seconds: Floats) -> float:
    """The least of the largest sum of seconds on any pool, each row shared out among its (row, pool) pairs.

    0 where there are no pairs.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    pairs = len(rows)
    unit = float(seconds.mean()) if pairs else 0.0
    if unit == 0:
        return 0.0
    pools, pool = np.unique(columns, return_inverse=True)
    each, row = np.unique(rows, return_inverse=True)
    at = np.arange(pairs)
    fill = csr_array((np.ones(pairs), (row, at)), shape=(len(each), pairs + 1))
    # Seconds on the pool less the makespan, which is the last variable.
    use = csr_array(
        (
            np.concatenate([seconds / unit, -np.ones(len(pools))]),
            (np.concatenate([pool, np.arange(len(pools))]), np.concatenate([at, np.full(len(pools), pairs)])),
        ),
        shape=(len(pools), pairs + 1),
    )
    solved = linprog(
        np.append(np.zeros(pairs), 1.0),
        A_ub=use,
        b_ub=np.zeros(len(pools)),
        A_eq=fill,
        b_eq=np.ones(len(each)),
        method="highs",
    )
    _check(solved)
    return float(solved.x[-1]) * unit


def _check(solved: Any) -> None:
    if solved.status != 0:
        raise RuntimeError(f"the linear program did not solve: {solved.message}")
