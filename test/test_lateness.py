"""When the tree is taken to have failed; pauses."""

from solyd_swarm.core import lateness as module
from solyd_swarm.core.lateness import SOLO, Lateness, Pause

INITIAL = 0.1


def lateness() -> Lateness:
    return Lateness(INITIAL, 0.025, 1.0)


def chatter(late: Lateness, rounds: int = 3, lag: float = 0.0) -> None:
    """Two authors in turn, both by way of the neighbour `a`."""
    for _ in range(rounds):
        assert not late.has_jumped(b"one", b"a", lag)
        assert not late.has_jumped(b"two", b"a", lag)


def test_a_sudden_lag_by_way_of_another_neighbour_is_a_failure() -> None:
    late = lateness()
    chatter(late)
    assert late.has_jumped(b"one", b"b", INITIAL / 2 + 0.001)


def test_a_small_lag_is_none() -> None:
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"one", b"b", INITIAL / 2)


def test_among_several_authors_the_same_neighbour_tells_of_none() -> None:
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"one", b"a", 0.5)


def test_where_one_author_speaks_alone_any_neighbour_does() -> None:
    late = lateness()
    for _ in range(SOLO):
        assert not late.has_jumped(b"one", b"a", 0.0)
    assert not late.has_jumped(b"one", b"a", 0.0)
    assert late.has_jumped(b"one", b"a", 0.2)
    assert not late.has_jumped(b"two", b"a", 0.0)
    assert not late.has_jumped(b"one", b"a", 0.0)
    assert not late.has_jumped(b"one", b"a", 0.2)


def test_an_author_of_whom_nothing_is_known_tells_of_none() -> None:
    late = lateness()
    chatter(late)
    assert not late.has_jumped(b"three", b"b", 0.9)


def test_what_has_lagged_before_must_lag_much_more() -> None:
    """Twice the last lag, and twice the longest of late."""
    for lag, jumps in ((0.4, False), (0.42, True)):
        late = lateness()
        chatter(late, lag=0.1, rounds=1)
        assert late.has_jumped(b"one", b"b", lag) == jumps


def test_a_lag_is_forgotten_after_a_hundred_envelopes() -> None:
    late = lateness()
    chatter(late)
    late.has_jumped(b"three", b"a", 0.2)
    chatter(late)
    assert not late.has_jumped(b"one", b"b", 0.3)
    late = lateness()
    late.has_jumped(b"three", b"a", 0.2)
    chatter(late, rounds=50)
    assert late.has_jumped(b"one", b"b", 0.3)


def test_a_lag_that_stays_is_no_failure_any_more() -> None:
    late = lateness()
    chatter(late)
    assert late.has_jumped(b"one", b"b", 0.3)
    assert not late.has_jumped(b"one", b"c", 0.3)


def test_fresh_authors_do_not_fill_memory() -> None:
    late = lateness()
    for number in range(3 * module.MAX_AUTHORS):
        late.has_jumped(b"%d" % number, b"a", 0.0)
    assert len(late._last) == module.MAX_AUTHORS
    assert late.has_jumped(b"%d" % (2 * module.MAX_AUTHORS), b"b", 0.2)  # the oldest that is kept
    assert not late.has_jumped(b"0", b"b", 0.2)


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
