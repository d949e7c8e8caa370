"""When the tree is taken to have failed; pauses."""

import pytest

from solyd_swarm.core.lateness import SOLO, Lateness, Pause

INITIAL = 0.1
LEAST = 0.025
AGE = 0.5
"""Of an envelope that comes as ever."""


def lateness(author: bytes = b"one") -> Lateness:
    """Of a peer that hears one author alone, all as it should be."""
    late = Lateness(INITIAL, LEAST, 1.0)
    for _ in range(SOLO + 1):
        assert not late.has_jumped(author, 0.0, AGE)
    return late


@pytest.mark.parametrize(("lag", "jumps"), [(INITIAL / 2, False), (INITIAL / 2 + 0.001, True)])
def test_a_sudden_lag_is_a_failure(lag: float, jumps: bool) -> None:
    assert lateness().has_jumped(b"one", lag, AGE) == jumps


@pytest.mark.parametrize(("growth", "jumps"), [(LEAST - 0.001, False), (LEAST + 0.001, True), (-0.3, False)])
def test_a_sudden_age_is_one_too(growth: float, jumps: bool) -> None:
    """All neighbours had to wait, so that nobody announced it."""
    late = lateness()
    assert late.has_jumped(b"one", 0.0, AGE + growth) == jumps
    assert not late.has_jumped(b"one", 0.0, AGE + growth)  # the way is longer, from now on


def test_ages_that_go_up_and_down_tell_of_nothing() -> None:
    late = lateness()
    assert not late.has_jumped(b"one", 0.0, AGE + 0.024)
    for _ in range(10):
        assert not late.has_jumped(b"one", 0.0, AGE)
        assert not late.has_jumped(b"one", 0.0, AGE + 0.035)
    assert not late.has_jumped(b"one", 0.0, AGE)
    assert late.has_jumped(b"one", 0.0, AGE + 0.1)


@pytest.mark.parametrize(("age", "falls"), [(0.9 * AGE - 0.001, True), (0.9 * AGE + 0.001, False), (2 * AGE, False)])
def test_an_age_that_falls_tells_of_a_shorter_way(age: float, falls: bool) -> None:
    late = lateness()
    assert not late.has_fallen
    late.has_jumped(b"one", 0.0, age)
    assert late.has_fallen == falls
    late.has_jumped(b"one", 0.0, age)
    assert not late.has_fallen


def test_ages_of_a_few_milliseconds_tell_of_nothing() -> None:
    """They are rounded to whole ones on every hop."""
    late = Lateness(INITIAL, LEAST, 1.0)
    for number in range(100):
        late.has_jumped(b"one", 0.0, 0.001 * (1 + number % 3))
        assert not late.has_fallen


def test_no_age_falls_where_several_speak() -> None:
    late = lateness()
    late.has_jumped(b"two", 0.0, AGE / 2)
    assert not late.has_fallen
    late.has_jumped(b"one", 0.0, AGE / 4)
    assert not late.has_fallen


def test_nothing_tells_of_failures_where_several_speak() -> None:
    """What is a short way for one is a long one for another."""
    late = lateness()
    assert not late.has_jumped(b"two", 0.5, AGE + 0.5)
    late = lateness()
    assert not late.has_jumped(b"two", 0.0, AGE)
    for _ in range(SOLO):
        assert not late.has_jumped(b"one", 0.5, 2 * AGE)
        assert not late.has_jumped(b"one", 0.0, AGE)
        assert not late.has_jumped(b"two", 0.5, 2 * AGE)


def test_an_author_is_alone_after_sixteen_more() -> None:
    for count, jumps in ((SOLO - 1, False), (SOLO, True)):
        late = lateness()
        for _ in range(count):
            assert not late.has_jumped(b"two", 0.0, AGE)
        assert late.has_jumped(b"two", 0.5, AGE) == jumps


def test_what_has_lagged_before_must_lag_much_more() -> None:
    """Twice the last lag, and twice the longest of late."""
    for lag, jumps in ((0.12, False), (0.13, True)):
        late = lateness()
        assert not late.has_jumped(b"one", 0.03, AGE)
        assert late.has_jumped(b"one", lag, AGE) == jumps


def test_a_lag_is_forgotten_after_a_hundred_envelopes() -> None:
    """What lagged while several spoke, or while the swarm formed, hides no failure later."""
    for count, jumps in ((SOLO, False), (100, True)):
        late = lateness()
        assert not late.has_jumped(b"two", 0.2, AGE)
        for _ in range(count + 1):
            assert not late.has_jumped(b"one", 0.0, AGE)
        assert late.has_jumped(b"one", 0.23, AGE) == jumps


def test_a_lag_that_stays_is_no_failure_any_more() -> None:
    late = lateness()
    assert late.has_jumped(b"one", 0.3, AGE)
    assert not late.has_jumped(b"one", 0.3, AGE)


def test_pauses_double_up_to_a_bound_and_begin_anew_after_a_reset() -> None:
    pause = Pause(0.5, 3.0)
    assert pause.is_over(0.0)
    now = 10.0
    for seconds in (0.5, 1.0, 2.0, 3.0, 3.0):
        pause.begin(now)
        assert not pause.is_over(now + seconds - 0.01)
        assert pause.is_over(now + seconds)
        now += seconds
    pause.begin(now)
    pause.reset()
    assert not pause.is_over(now + 2.99)  # the present one goes on
    pause.begin(now + 3.0)
    assert pause.is_over(now + 3.5)
