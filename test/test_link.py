"""One link: an acknowledgement never claims what is not held, and neither does what we conclude from it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from solyd_swarm.core import link as module
from solyd_swarm.core.link import Link
from solyd_swarm.core.wire import PeerInfo


def make_link() -> Link:
    return Link(PeerInfo(b"p" * 32), b"a" * 32, initiated=True)


def anything(id: bytes) -> bool:
    return True


def id_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


class LinkMachine(RuleBasedStateMachine):
    """Both ends of one link, and what the far one holds; ids cross it at once, acknowledgements when they like."""

    @initialize(base=st.integers(0, 3))
    def start(self, base: int) -> None:
        self.near, self.far = make_link(), make_link()
        self.held: set[bytes] = set()  # at the far end
        self.sent: list[bytes] = []
        self.published = base  # our envelopes hold one message each: number n is the envelope id_of(n)
        self.foreign = 1000
        self.acks: list[int] = []
        self.near.covers_from(base)

    @rule()
    def publish(self) -> None:
        self.published += 1
        self.near.note_own(self.published)

    def cross(self, number: int, *, owed: bool = False) -> None:
        self.near.note_sent(number if number <= self.published else 0, owed=owed)
        self.sent.append(id_of(number))
        self.far.note_received(id_of(number), id_of(number) in self.held, matters=number <= self.published)

    @rule(data=st.data(), with_body=st.booleans(), owed=st.booleans())
    def send(self, data: st.DataObject, with_body: bool, owed: bool) -> None:
        """Pushes or announces something of our own, or of others, in any order and any number of times."""
        number = data.draw(st.integers(1, self.published)) if self.published and data.draw(st.booleans()) else self.foreign
        self.foreign += number == self.foreign
        if with_body:
            self.held.add(id_of(number))
        self.cross(number, owed=owed and not with_body)

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        """The far end gets something by another way."""
        if self.published:
            self.held.add(id_of(data.draw(st.integers(1, self.published))))

    @rule()
    def acknowledge(self) -> None:
        count = self.far.acknowledge(self.held.__contains__, lambda id: id in map(id_of, range(1, self.published + 1)))
        if count is not None:
            assert all(id in self.held for id in self.sent[:count])
            self.acks.append(count)

    @rule()
    def hear(self) -> None:
        for count in self.acks:
            assert self.near.acked(count)
        self.acks.clear()

    @rule()
    def digest(self) -> None:
        """A round: what the far end lacks is announced, all else it holds."""
        lacking = [number for number in range(1, self.published + 1) if id_of(number) not in self.held]
        for number in lacking:
            self.cross(number, owed=True)
        equal = self.held.issuperset(self.sent)
        if equal:
            self.far.caught_up()
        self.near.synced(self.published, equal=equal)

    @invariant()
    def claims_are_true(self) -> None:
        through = self.near.holds_through(self.published)
        assert all(id_of(number) in self.held for number in range(1, through + 1))

    def teardown(self) -> None:
        if not hasattr(self, "near"):
            return
        self.held.update(self.sent)
        self.held.update(map(id_of, range(1, self.published + 1)))
        self.digest()
        self.acknowledge()
        self.hear()
        assert self.near.holds_through(self.published) == self.published


LinkMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestLink = LinkMachine.TestCase


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 2**32))
def test_the_longest_run_held_from_the_start_is_acknowledged(held: list[bool], seed: int) -> None:
    link = make_link()
    holds = {id_of(n) for n, is_held in enumerate(held) if is_held}
    for n, is_held in enumerate(held):
        link.note_received(id_of(n), is_held)
    run = held.index(False) if False in held else len(held)
    assert link.acknowledge(holds.__contains__, anything) == (run or None)
    assert link.acknowledge(holds.__contains__, anything) is None
    missing = [id_of(n) for n, is_held in enumerate(held) if not is_held]
    random.Random(seed).shuffle(missing)
    counts = []
    for id in missing:
        holds.add(id)
        counts.append(link.acknowledge(holds.__contains__, anything))
    grown = [count for count in counts if count is not None]
    assert grown == sorted(set(grown))
    assert not missing or grown[-1] == len(held)


def test_an_acknowledgement_of_more_than_was_sent_is_refused() -> None:
    link = make_link()
    link.note_sent()
    assert link.acked(1)
    assert not link.acked(2)


def test_own_messages_that_are_merely_to_be_announced_are_not_held_yet() -> None:
    link = make_link()
    link.covers_from(0)
    link.note_own(1)
    assert link.holds_through(1) == 0
    link.note_sent(1)
    assert link.holds_through(1) == 0
    link.acked(1)
    assert link.holds_through(1) == 1


def test_what_was_published_before_the_link_was_a_neighbours_needs_a_round() -> None:
    link = make_link()
    link.synced(3)
    link.covers_from(5)
    assert link.lacks_round
    assert link.holds_through(7) == 3
    link.synced(5)
    assert link.holds_through(7) == 7


def test_a_peer_that_announces_without_end_is_bounded_and_acknowledged_by_the_next_equal_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 10)
    link = make_link()
    for n in range(100):
        link.note_received(id_of(n), False)
    assert link.overflow
    assert link.acknowledge(anything, anything) is None  # not even the first ten, as the rest is unknown
    link.caught_up()
    assert link.acknowledge(anything, anything) == 100


def test_a_peer_that_never_acknowledges_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNHELD", 10)
    link = make_link()
    link.covers_from(0)
    for number in range(1, 101):
        link.note_own(number)
        link.note_sent(number)
    assert link.holds_through(100) == 0
    link.acked(100)
    assert link.holds_through(100) == 0  # which of them it acknowledged is not known any more
    link.synced(100)
    assert link.holds_through(100) == 0
    link.synced(100, equal=True)
    assert link.holds_through(100) == 100
    link.note_own(101)
    assert link.holds_through(101) == 100
