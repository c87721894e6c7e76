"""Accelerator time: nothing is lost or counted twice, neither between attempts nor between segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.transforms.accelerator_time import AcceleratorMeter, share_milliseconds

weights = st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 2**62)), min_size=1, max_size=40)


@given(st.one_of(st.integers(0, 10**7), st.integers(0, 2**62)), weights)
def test_shares_sum_to_the_total(total: int, tokens: list[int]) -> None:
    """Shares are whole, never negative, sum to the total exactly, and are each within one millisecond of their due."""
    shares = share_milliseconds(total, np.array(tokens, np.int64)).tolist()
    assert sum(shares) == total
    assert min(shares) >= 0
    due = tokens if any(tokens) else [1] * len(tokens)
    assert all(abs(share * sum(due) - total * weight) <= sum(due) for share, weight in zip(shares, due, strict=True))


@given(st.integers(0, 10**9), st.lists(st.integers(1, 2**40), min_size=1, max_size=20))
def test_shares_follow_the_cumulative_floor(total: int, tokens: list[int]) -> None:
    """Each share is the step of the rounded-down running total, whatever the size of the numbers."""
    running = [sum(tokens[: i + 1]) * total // sum(tokens) for i in range(len(tokens))]
    expected = [b - a for a, b in zip([0, *running], running, strict=False)]
    assert share_milliseconds(total, np.array(tokens, np.int64)).tolist() == expected


def test_attempts_that_computed_nothing_share_equally() -> None:
    """Where no attempt computed a token, the time is split equally among them."""
    assert share_milliseconds(10, np.zeros(4, np.int64)).tolist() == [2, 3, 2, 3]


def test_time_without_attempts_is_refused() -> None:
    """Time that nobody bears is not dropped silently."""
    assert share_milliseconds(0, np.zeros(0, np.int64)).tolist() == []
    with pytest.raises(ValueError, match="no attempt"):
        share_milliseconds(1, np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="negative"):
        share_milliseconds(-1, np.ones(1, np.int64))
    with pytest.raises(ValueError, match="negative"):
        share_milliseconds(1, np.array([-1]))


@given(
    st.integers(0, 10**12), st.lists(st.tuples(st.sampled_from(["busy", "idle", "close"]), st.integers(-50, 10_000)))
)
def test_segments_cover_the_wall_time(start: int, steps: list[tuple[str, int]]) -> None:
    """However calls come and the clock steps, busy + idle over all segments is the time since the start."""
    now = start
    meter = AcceleratorMeter(lambda: now, start)
    closed: list[tuple[int, int]] = []
    latest = start
    for call, step in steps:
        now += step
        latest = max(latest, now)
        if call == "close":
            closed.append(meter.close())
        else:
            getattr(meter, call)()
    closed.append(meter.close())
    assert sum(busy + idle for busy, idle in closed) == latest - start
    assert all(busy >= 0 and idle >= 0 for busy, idle in closed)


def test_busy_is_while_something_is_in_flight() -> None:
    """Time is busy between ``busy`` and ``idle``; repeated calls change nothing, and the state outlives a close."""
    meter = AcceleratorMeter(lambda: 0, 1_000)
    meter.busy(1_100)
    meter.busy(1_150)
    assert meter.close(1_200) == (100, 100)
    meter.idle(1_250)
    meter.idle(1_300)
    assert meter.close(1_400) == (50, 150)
    assert meter.close(1_400) == (0, 0)


def test_setup_is_taken_once() -> None:
    """Loading time stands apart from the segments and is handed out only once."""
    meter = AcceleratorMeter(lambda: 0, 0, setup_ms=6_500)
    assert meter.close(10) == (0, 10)
    assert (meter.take_setup(), meter.take_setup()) == (6_500, 0)
