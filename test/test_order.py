"""From any order of arrival to the author's order: bases, gaps, what comes late, and nothing twice."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solyd_swarm.core import order as module
from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.order import Delivery, Sequencer

WAIT = 3.0
A, B = b"a" * 32, b"b" * 32
KEY = (A, 1)


def make(first: int, count: int = 1, *, author: bytes = A, epoch: int = 1, size: int = 10) -> Envelope:
    id = b"%d %d %d" % (epoch, first, count) + author
    return Envelope(id, author, epoch, first, 0, (b"",) * count, bytes(size), b"")


def sequencer(*, replay: bool = True, settled: bool = True, max_waiting: int = 10_000) -> Sequencer:
    made = Sequencer(replay=replay, gap_wait=WAIT, max_waiting=max_waiting)
    if settled:
        made.settle(0.0)
    return made


def numbers(deliveries: list[Delivery]) -> list[int]:
    return [each.envelope.first for each in deliveries]


def accept(into: Sequencer, *firsts: int, now: float = 0.0, expected: int | None = None) -> list[int]:
    return [number for first in firsts for number in numbers(into.accept(make(first), b"peer", expected, now))]


@given(st.permutations(range(1, 13)))
def test_any_order_of_arrival_gives_the_authors_order(arrivals: list[int]) -> None:
    order = sequencer()
    assert accept(order, *arrivals) == list(range(1, 13))
    assert not order.has_gap_in(KEY)
    assert order.deadline is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=10), st.randoms(use_true_random=False), st.booleans())
def test_envelopes_of_several_messages_and_authors_keep_to_it_too(counts: list[int], rng: random.Random, settled: bool) -> None:
    envelopes = []
    for author in (A, B):
        first = 1
        for count in counts:
            envelopes.append(make(first, count, author=author))
            first += count
    rng.shuffle(envelopes)
    order = sequencer(settled=settled)
    delivered = [each for envelope in envelopes for each in order.accept(envelope, b"peer", None, 0.0)] + order.settle(0.0)
    for author in (A, B):
        own = [each.envelope for each in delivered if each.envelope.author == author]
        assert [envelope.first for envelope in own] == sorted(envelope.first for envelope in own)
        assert len(own) == len(counts)
    assert not any(each.late for each in delivered)


@given(st.permutations(range(1, 9)), st.lists(st.floats(0.0, 5.0), min_size=8, max_size=8), st.booleans(), st.booleans())
def test_each_is_delivered_exactly_once_whatever_the_times(arrivals: list[int], pauses: list[float], replay: bool, settled: bool) -> None:
    order = sequencer(replay=replay, settled=settled)
    now, delivered = 0.0, []
    for number, pause in zip(arrivals, pauses, strict=True):
        now += pause
        delivered += order.expire(now)
        delivered += order.accept(make(number), b"peer", None, now)
    delivered += order.settle(now)
    delivered += order.expire(now + WAIT * 10)
    assert sorted(numbers(delivered)) == list(range(1, 9))
    in_time = [each.envelope.first for each in delivered if not each.late]
    assert in_time == sorted(in_time)


def test_a_joiner_begins_with_the_lowest_it_holds_after_its_first_round() -> None:
    order = sequencer(settled=False)
    assert accept(order, 7, 5, 6) == []
    assert numbers(order.settle(0.0)) == [5, 6, 7]
    assert accept(order, 8) == [8]
    assert order.settle(0.0) == []


def test_after_the_first_round_a_new_author_begins_with_one() -> None:
    order = sequencer()
    assert accept(order, 2) == []
    assert accept(order, 1) == [1, 2]


def test_a_gap_is_waited_for_then_given_up_and_what_it_hid_is_late() -> None:
    order = sequencer()
    assert accept(order, 1, 3, 4, now=10.0) == [1]
    assert order.has_gap_in(KEY)
    assert order.deadline == 10.0 + WAIT
    assert order.expire(10.0 + WAIT - 0.01) == []
    assert numbers(order.expire(10.0 + WAIT)) == [3, 4]
    assert not order.has_gap_in(KEY)
    late = order.accept(make(2), b"peer", None, 20.0)
    assert [(each.envelope.first, each.late) for each in late] == [(2, True)]
    assert accept(order, 5) == [5]


def test_a_second_gap_waits_its_own_time() -> None:
    order = sequencer()
    accept(order, 1, 3, now=0.0)
    accept(order, 5, now=2.0)
    assert numbers(order.expire(WAIT)) == [3]
    assert order.deadline == 2.0 + WAIT
    assert numbers(order.expire(2 * WAIT)) == [5]


def test_gaps_of_several_authors_end_each_in_its_time() -> None:
    order = sequencer()
    order.accept(make(2, author=A), b"", None, 0.0)
    order.accept(make(2, author=B), b"", None, 1.0)
    assert order.deadline == WAIT
    assert [each.envelope.author for each in order.expire(WAIT)] == [A]
    assert [each.envelope.author for each in order.expire(WAIT + 1)] == [B]


def test_epochs_are_streams_of_their_own() -> None:
    order = sequencer()
    assert numbers(order.accept(make(1, epoch=1), b"", None, 0.0)) == [1]
    assert numbers(order.accept(make(1, epoch=2), b"", None, 0.0)) == [1]
    assert numbers(order.accept(make(2, epoch=1), b"", None, 0.0)) == [2]


def test_past_the_bytes_that_may_wait_the_gap_is_given_up_at_once() -> None:
    order = sequencer(max_waiting=3 * (10 + module.OVERHEAD))
    assert accept(order, 2, 3, 4) == []
    assert accept(order, 5) == [2, 3, 4, 5]
    unsettled = sequencer(settled=False, max_waiting=3 * (10 + module.OVERHEAD))
    assert accept(unsettled, 2, 3, 4) == []
    assert accept(unsettled, 5) == [2, 3, 4, 5]
    assert unsettled.settled


def test_nothing_more_of_a_silenced_author_is_delivered() -> None:
    order = sequencer()
    accept(order, 2, 3)
    order.accept(make(2, author=B), b"", None, 0.0)
    order.silence(A, 1)
    assert [each.envelope.author for each in order.expire(100.0)] == [B]
    order.silence(A, 9)  # never heard of


def test_a_ledger_of_an_earlier_life_says_where_to_go_on() -> None:
    order = sequencer()
    assert accept(order, 8, expected=6) == []  # 6 and 7 were published while we were away
    assert accept(order, 7, 6) == [6, 7, 8]
    unsettled = sequencer(settled=False)
    accept(unsettled, 8, 3, expected=6)
    assert [(each.envelope.first, each.late) for each in unsettled.settle(0.0)] == [(3, True)]
    assert numbers(unsettled.expire(WAIT)) == [8]


def test_without_replay_the_first_one_heard_live_is_the_base() -> None:
    order = sequencer(replay=False, settled=False)
    assert order.settled
    assert accept(order, 17) == [17]
    assert accept(order, 19) == []
    assert accept(order, 18) == [18, 19]


def test_without_replay_what_was_missed_before_is_not_waited_for() -> None:
    order = sequencer(replay=False, settled=False)
    assert accept(order, 17, expected=4) == [17]
    order = sequencer(replay=False, settled=False)
    assert [each.late for each in order.accept(make(3), b"", 9, 0.0)] == [True]


def test_a_stream_that_is_forgotten_is_delivered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STREAMS", 2)
    order = sequencer()
    order.accept(make(2, author=A), b"", None, 0.0)
    order.accept(make(4, author=A), b"", None, 0.0)
    order.accept(make(1, author=B), b"", None, 0.0)
    delivered = order.accept(make(1, author=b"c" * 32), b"", None, 0.0)
    assert [(each.envelope.author[:1], each.envelope.first) for each in delivered] == [(b"a", 2), (b"a", 4), (b"c", 1)]
    assert not order.has_gap_in(KEY)
    assert order.deadline is None


def test_many_gaps_are_waited_for_together() -> None:
    order = sequencer()
    for number in range(1, 41, 2):
        accept(order, number, now=number / 40)
    assert numbers(order.expire(WAIT + 1.0)) == list(range(3, 41, 2))
    assert order.deadline is None


def test_what_is_missing_is_waited_for_as_long_as_more_of_it_comes() -> None:
    order = sequencer()
    accept(order, 1, 100, now=0.0)
    for number in range(2, 10):
        assert accept(order, number, now=float(number)) == [number]
        assert order.deadline == number + WAIT
        assert order.expire(float(number)) == []


def test_a_flood_of_numbers_with_gaps_costs_each_the_same() -> None:
    """Half a million small envelopes used to wait where bodies alone were counted, and each that came then looked at all of them."""
    order = sequencer(max_waiting=1_000_000)
    for number in range(1, 20_001, 2):
        order.accept(make(number), b"", None, 0.0)
    stream = order._streams[KEY]
    assert len(stream.waiting) <= 1_000_000 // module.OVERHEAD
    assert len(stream.firsts) <= 2 * len(stream.waiting)
    assert len(order._gaps) <= 2
