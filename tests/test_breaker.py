"""The breaker: when a pool is left alone, for how long, and how it is asked again."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from bidbeam.transforms.breaker import LONGEST_OPEN_S, UNLIMITED, Breaker


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock, first_s=1.0)
    breaker.note(0, 5)
    assert not breaker.closed
    return breaker


@given(st.lists(st.booleans(), max_size=40))
def test_it_opens_exactly_when_most_of_twenty_outcomes_or_all_of_five_are_failures(outcomes: list[bool]) -> None:
    """One by one, the first moment at which more than half of twenty or more failed, or all of five, is when."""
    breaker = Breaker(Clock())
    for number, answered in enumerate(outcomes, 1):
        breaker.note(int(answered), int(not answered))
        failed = outcomes[:number].count(False)
        assert breaker.closed is not ((number >= 5 and failed == number) or (number >= 20 and 2 * failed > number))
        if not breaker.closed:
            break


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("wait"), st.floats(0, 90)),
            st.tuples(st.just("note"), st.integers(0, 9), st.integers(0, 9)),
            st.tuples(st.just("spoil"), st.integers(0, 9)),
            st.tuples(st.just("send")),
            st.tuples(st.just("probed"), st.sampled_from([True, False, None])),
        ),
        max_size=60,
    )
)
def test_whatever_happens_at_most_one_probe_is_out_and_a_minute_is_the_longest_wait(
    events: list[tuple[object, ...]],
) -> None:
    """Closed it allows everything; open nothing; half-open one; and it never stays open longer than its cap."""
    clock = Clock()
    breaker = Breaker(clock, first_s=1.0)
    tag = 0
    for name, *given_ in events:
        was_closed, openings, out = breaker.closed, breaker.openings, breaker.probe
        if name == "wait":
            clock.now += float(str(given_[0]))
        elif name == "note":
            breaker.note(int(str(given_[0])), int(str(given_[1])))
        elif name == "spoil":
            breaker.spoil(int(str(given_[0])))
        elif name == "send" and breaker.allowance:
            tag += 1
            breaker.sent(tag)
            assert breaker.probe == (None if was_closed else tag)
        elif name == "probed":
            breaker.probed(given_[0] if isinstance(given_[0], bool) else None)
            assert breaker.probe is None
            assert was_closed or out is None or breaker.closed is (given_[0] is True)
        if not was_closed and name != "probed":
            assert not breaker.closed, "only a probe closes it"
        assert breaker.allowance in ((UNLIMITED,) if breaker.closed else (0, 1))
        assert breaker.probe is None or breaker.allowance == 0
        assert breaker.openings >= openings
    if not breaker.closed and breaker.probe is None:
        clock.now += LONGEST_OPEN_S
        assert breaker.allowance == 1


def test_it_stays_open_twice_as_long_each_time_and_gives_up_after_six_probes() -> None:
    """1, 2, 4, ... seconds, capped; a probe that says nothing may be followed by another at once."""
    clock = Clock()
    breaker = opened(clock)
    waits = []
    for probe in range(9):
        began = clock.now
        while not breaker.allowance:
            clock.now += 0.5
        waits.append(clock.now - began)
        breaker.sent(probe)
        assert breaker.allowance == 0
        breaker.probed(None)
        assert breaker.allowance == 1
        breaker.sent(probe)
        breaker.probed(False)
        assert breaker.gave_up is (probe >= 5)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_recovery_that_does_not_last_waits_longer_and_one_that_lasts_starts_afresh() -> None:
    """A pool that fails again right after its probe is left alone for longer; twenty good outcomes forgive it."""
    clock = Clock()
    breaker = opened(clock)
    for good, wait in ((0, 2.0), (20, 1.0)):
        clock.now += 60
        breaker.sent(1)
        breaker.probed(True)
        assert breaker.closed
        assert breaker.failed_probes == 0
        breaker.note(good, 0)
        breaker.note(0, good + 5)
        assert not breaker.closed
        clock.now += wait - 0.1
        assert breaker.allowance == 0
        clock.now += 0.2
        assert breaker.allowance == 1


def test_what_is_long_ago_counts_no_more_and_what_was_under_way_is_not_judged() -> None:
    """Four failures of an hour ago and one of now are no reason; answers to what was sent before it opened neither."""
    clock = Clock()
    breaker = Breaker(clock)
    breaker.note(0, 4)
    clock.now += 3600
    breaker.note(0, 1)
    assert breaker.closed
    breaker = opened(clock)
    breaker.note(50, 0)
    breaker.spoil(3)
    assert (breaker.closed, breaker.openings) == (False, 1)


def test_answers_that_turn_out_unusable_count_against_the_pool() -> None:
    """What was noted as answered, and failed its check, counts as failed and no longer as answered."""
    breaker = Breaker(Clock())
    breaker.note(6, 0)
    breaker.spoil(5)
    assert breaker.closed
    breaker.spoil(1)
    assert not breaker.closed
