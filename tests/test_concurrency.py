"""How many requests at once: fewer when pushed back, more again with every window of answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.concurrency import LONGEST_PAUSE_S, Aimd


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_a_push_back_halves_the_window_once() -> None:
    """Requests that were under way together halve it once; one begun since halves it again; it never closes."""
    window = Aimd(16, Clock())
    together = [window.begin() for _ in range(16)]
    for each in together:
        window.pushed_back(each)
    assert window.limit == 8
    for expected in (4, 2, 1, 1, 1):
        window.pushed_back(window.begin())
        assert window.limit == expected


def test_a_window_of_answers_adds_one() -> None:
    """Answers open it again by one for each window of them, up to what the pool takes."""
    window = Aimd(16, Clock())
    for _ in range(2):
        window.pushed_back(window.begin())
    assert window.limit == 4
    for expected in (5, 6, 7):
        for _ in range(expected):
            window.answered(window.begin())
        assert window.limit == expected
    for _ in range(400):
        window.answered(window.begin())
    assert window.limit == 16


def test_pauses_double_while_nothing_is_answered() -> None:
    """Where no time is named, the pause is twice the last one, at most a minute, and short again after an answer."""
    clock = Clock()
    window = Aimd(16, clock, first_pause_s=1.0)
    seen = []
    for _ in range(9):
        window.pushed_back(window.begin())
        seen.append(window.pause_s)
        clock.at += window.pause_s
        assert window.pause_s == 0
    assert seen == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    window.answered(window.begin())
    window.pushed_back(window.begin())
    assert window.pause_s == 1


def test_an_endpoint_that_names_a_time_is_heeded() -> None:
    """Its own time counts instead, at most a minute of it; the longest of several holds."""
    clock = Clock()
    window = Aimd(8, clock)
    begun = [window.begin() for _ in range(3)]
    for each, wait_s in zip(begun, (5.0, 0.2, 7.0), strict=True):
        window.pushed_back(each, wait_s)
    assert (window.pause_s, window.limit) == (7.0, 4)
    window.wait(9_999.0)
    assert window.pause_s == LONGEST_PAUSE_S


def test_late_answers_of_a_wider_window_do_not_shorten_the_pause() -> None:
    """What was begun before the push-back tells nothing of the endpoint since."""
    clock = Clock()
    window = Aimd(8, clock, first_pause_s=1.0)
    early = window.begin()
    window.pushed_back(window.begin())
    window.answered(early)
    clock.at += 1
    window.pushed_back(window.begin())
    assert window.pause_s == 2


EVENTS = st.lists(st.tuples(st.sampled_from("abp"), st.none() | st.floats(0, 100), st.integers(0, 40)), max_size=60)


@given(st.integers(1, 64), EVENTS)
def test_the_window_stays_within_bounds(ceiling: int, events: list[tuple[str, float | None, int]]) -> None:
    """Whatever happens, at least one request and at most the pool's concurrency, and no pause beyond a minute."""
    clock = Clock()
    window = Aimd(ceiling, clock)
    under_way: list[int] = []
    for event, wait_s, index in events:
        clock.at += index
        if event == "b" or not under_way:
            under_way.append(window.begin())
        elif event == "a":
            window.answered(under_way.pop(index % len(under_way)))
        else:
            before = window.limit
            window.pushed_back(under_way.pop(index % len(under_way)), wait_s)
            assert window.limit <= before
        assert 1 <= window.limit <= ceiling
        assert 0 <= window.pause_s <= LONGEST_PAUSE_S
