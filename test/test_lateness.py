"""When the tree is taken to have failed; pauses."""

import pytest

from solyd_swarm.core import lateness as module
from solyd_swarm.core.lateness import SOLO, Lateness, Pause

INITIAL = 0.1
LEAST = 0.025
AGE = 0.5
"""Of an envelope that comes as ever."""


def lateness() -> Lateness:
    return Lateness(INITIAL, LEAST, 1.0)


def chatter(late: Lateness, rounds: int = 3, lag: float = 0.0) -> None:
    """Two authors in turn, both by way of the neighbour `a`."""
    for _ in range(rounds):
        assert not late.has_jumped(b"one", b"a", lag, AGE)
        assert not late.has_jumped(b"two", b"a", lag, AGE)


def test_a_sudden_lag_by_way_of_another_neighbour_is_a_failure() -> None:
    late = lateness()
    chatter(late)
    assert late.has_jumped(b"one", b"b", INITIAL / 2 + 0.001, AGE)


def test_a_small_lag_is_none() -> None:
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"one", b"b", INITIAL / 2, AGE)


def test_among_several_authors_the_same_neighbour_tells_of_none() -> None:
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"one", b"a", 0.5, AGE)


def test_where_one_author_speaks_alone_any_neighbour_does() -> None:
    late = lateness()
    for _ in range(SOLO):
        assert not late.has_jumped(b"one", b"a", 0.0, AGE)
    assert not late.has_jumped(b"one", b"a", 0.0, AGE)
    assert late.has_jumped(b"one", b"a", 0.2, AGE)
    assert not late.has_jumped(b"two", b"a", 0.0, AGE)
    assert not late.has_jumped(b"one", b"a", 0.0, AGE)
    assert not late.has_jumped(b"one", b"a", 0.2, AGE)


@pytest.mark.parametrize(("growth", "jumps"), [(LEAST - 0.001, False), (LEAST + 0.001, True), (-0.3, False)])
def test_where_one_author_speaks_alone_an_age_tells_too(growth: float, jumps: bool) -> None:
    """All neighbours had to wait, so that nobody announced it."""
    late = lateness()
    for _ in range(SOLO + 1):
        assert not late.has_jumped(b"one", b"a", 0.0, AGE)
    assert late.has_jumped(b"one", b"a", 0.0, AGE + growth) == jumps
    assert not late.has_jumped(b"one", b"a", 0.0, AGE + growth)  # the way is longer, from now on


def test_ages_that_go_up_and_down_tell_of_nothing() -> None:
    late = lateness()
    for _ in range(SOLO + 1):
        assert not late.has_jumped(b"one", b"a", 0.0, AGE)
    assert not late.has_jumped(b"one", b"a", 0.0, AGE + 0.024)
    for _ in range(10):
        assert not late.has_jumped(b"one", b"a", 0.0, AGE)
        assert not late.has_jumped(b"one", b"a", 0.0, AGE + 0.035)
    assert not late.has_jumped(b"one", b"a", 0.0, AGE)
    assert late.has_jumped(b"one", b"a", 0.0, AGE + 0.1)


@pytest.mark.parametrize("via", [b"a", b"b"])
def test_among_several_authors_no_age_tells_of_anything(via: bytes) -> None:
    """Where a swap for one of them has made the way of another longer, the tree is as it should be."""
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"one", via, 0.0, AGE + 0.5)
    for _ in range(SOLO):
        assert not late.has_jumped(b"two", b"a", 0.0, AGE)
    assert not late.has_jumped(b"one", via, 0.0, AGE + 0.9)


def test_an_author_of_whom_nothing_is_known_tells_of_none() -> None:
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"three", b"b", 0.9, AGE)


def test_what_has_lagged_before_must_lag_much_more() -> None:
    """Twice the last lag, and twice the longest of late."""
    for lag, jumps in ((0.4, False), (0.42, True)):
        late = lateness()
        chatter(late, lag=0.1, rounds=1)
        assert late.has_jumped(b"one", b"b", lag, AGE) == jumps


def test_a_lag_is_forgotten_after_a_hundred_envelopes() -> None:
    late = lateness()
    chatter(late)
    late.has_jumped(b"three", b"a", 0.2, AGE)
    chatter(late)
    assert not late.has_jumped(b"one", b"b", 0.3, AGE)
    late = lateness()
    late.has_jumped(b"three", b"a", 0.2, AGE)
    chatter(late, rounds=50)
    assert late.has_jumped(b"one", b"b", 0.3, AGE)


def test_a_lag_that_stays_is_no_failure_any_more() -> None:
    late = lateness()
    chatter(late)
    assert late.has_jumped(b"one", b"b", 0.3, AGE)
    assert not late.has_jumped(b"one", b"c", 0.3, AGE)


def test_fresh_authors_do_not_fill_memory() -> None:
    late = lateness()
    for number in range(3 * module.MAX_AUTHORS):
        late.has_jumped(b"%d" % number, b"a", 0.0, AGE)
    assert len(late._last) == module.MAX_AUTHORS
    assert late.has_jumped(b"%d" % (2 * module.MAX_AUTHORS), b"b", 0.2, AGE)  # the oldest that is kept
    assert not late.has_jumped(b"0", b"b", 0.2, AGE)


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
