"""The ledger against a model that keeps every number in a set, its bounds, and what it keeps over a restart."""

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from solyd_swarm.core import ledger as module
from solyd_swarm.core.ledger import MAX_EPOCHS, Ledger


def author(n: int) -> bytes:
    return n.to_bytes(32, "big")


A = author(1)
ranges = st.tuples(st.integers(1, 60), st.integers(1, 8)).map(lambda each: (each[0], each[0] + each[1] - 1))


class LedgerMachine(RuleBasedStateMachine):
    """Marks, silences, saves and loads; a few authors and epochs, so that they meet often."""

    @initialize()
    def start(self) -> None:
        self.ledger = Ledger()
        self.numbers: dict[tuple[bytes, int], set[int]] = {}
        self.silenced: set[tuple[bytes, int]] = set()

    @rule(who=st.integers(0, 2), epoch=st.integers(1, 4), interval=ranges)
    def accept(self, who: int, epoch: int, interval: tuple[int, int]) -> None:
        first, last = interval
        held = self.numbers.setdefault((author(who), epoch), set())
        refused = self.ledger.refuses(author(who), epoch, first, last)
        assert refused == (not held.isdisjoint(range(first, last + 1)))
        if not refused:
            self.ledger.mark(author(who), epoch, first, last)
            held.update(range(first, last + 1))

    @rule(who=st.integers(0, 2), epoch=st.integers(1, 4))
    def silence(self, who: int, epoch: int) -> None:
        self.ledger.silence(author(who), epoch)
        self.silenced.add((author(who), epoch))

    @precondition(lambda self: self.numbers)
    @rule()
    def restart(self) -> None:
        self.ledger = Ledger.load(self.ledger.dump())

    @invariant()
    def agrees(self) -> None:
        for who in range(3):
            for epoch in range(1, 5):
                key = (author(who), epoch)
                held = self.numbers.get(key) or set()
                assert self.ledger.expected(*key) == (max(held) + 1 if held else None)
                assert self.ledger.is_silenced(*key) == (key in self.silenced)
                for number in (1, 20, 68):
                    assert self.ledger.refuses(*key, number, number) == (number in held)


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLedger = LedgerMachine.TestCase


@given(st.lists(ranges, max_size=40))
def test_a_ledger_that_was_saved_and_loaded_is_the_same(intervals: list[tuple[int, int]]) -> None:
    ledger = Ledger()
    for first, last in intervals:
        if not ledger.refuses(A, 1, first, last):
            ledger.mark(A, 1, first, last)
    loaded = Ledger.load(ledger.dump())
    assert loaded.dump() == ledger.dump()
    assert all(loaded.refuses(A, 1, n, n) == ledger.refuses(A, 1, n, n) for n in range(70))


def test_dense_numbers_take_no_room() -> None:
    ledger = Ledger()
    for number in range(1, 10_001):
        ledger.mark(A, 1, number, number)
    assert len(ledger.dump()) < 100


def test_every_change_is_counted_for_who_saves_it() -> None:
    ledger = Ledger()
    seen = [ledger.version]
    ledger.mark(A, 1, 1, 1)
    seen.append(ledger.version)
    ledger.silence(A, 1)
    seen.append(ledger.version)
    assert seen == sorted(set(seen))


def test_the_oldest_gap_counts_as_lost_past_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HOLES", 4)
    ledger = Ledger()
    for number in range(2, 22, 2):
        ledger.mark(A, 1, number, number)
    assert ledger.refuses(A, 1, 3, 3)  # a gap that was closed
    assert not ledger.refuses(A, 1, 19, 19)
    assert not ledger.refuses(A, 1, 1, 1)
    assert ledger.expected(A, 1) == 21


def test_old_epochs_are_refused_altogether_past_the_cap() -> None:
    ledger = Ledger()
    for epoch in range(1, MAX_EPOCHS + 3):
        ledger.mark(A, epoch, 1, 1)
    assert ledger.refuses(A, 1, 99, 99)
    assert ledger.refuses(A, 2, 99, 99)
    assert not ledger.refuses(A, 3, 99, 99)
    ledger.mark(A, 1, 99, 99)  # and nothing about them is kept, or counted
    ledger.silence(A, 2)
    assert not ledger.is_silenced(A, 2)
    assert Ledger.load(ledger.dump()).refuses(A, 2, 99, 99)


def test_an_old_epoch_that_comes_last_is_the_one_to_go() -> None:
    ledger = Ledger()
    for epoch in range(10, 10 + MAX_EPOCHS):
        ledger.mark(A, epoch, 1, 1)
    ledger.mark(A, 5, 1, 1)
    assert ledger.refuses(A, 5, 1, 1)
    assert ledger.refuses(A, 5, 2, 2)
    assert not ledger.refuses(A, 10, 2, 2)


def test_the_author_unheard_of_for_longest_is_forgotten_past_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_AUTHORS", 3)
    ledger = Ledger()
    for n, number in ((1, 1), (2, 1), (3, 1), (1, 2), (4, 1)):
        ledger.mark(author(n), 1, number, number)
    assert ledger.refuses(author(1), 1, 1, 1)
    assert not ledger.refuses(author(2), 1, 1, 1)


def test_many_authors_that_skip_numbers_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 100)
    ledger = Ledger()
    for n in range(30):
        for number in range(1, 20, 2):
            ledger.mark(author(n), 1, number, number)
    assert not ledger.refuses(author(0), 1, 1, 1)
    assert ledger.refuses(author(29), 1, 1, 1)
    assert sum(len(row[3]) for _, _, rows in msgspec.msgpack.decode(ledger.dump()) for row in rows) <= 100


def test_of_very_many_authors_those_heard_last_are_saved() -> None:
    ledger = Ledger()
    for n in range(20):
        ledger.mark(author(n), 1, 1, 1)
    loaded = Ledger.load(ledger.dump(max_authors=5))
    assert [loaded.refuses(author(n), 1, 1, 1) for n in range(20)] == [False] * 15 + [True] * 5


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [1],
        [(A, 0, [(1, False, [5], [4])])],
        [(A, 0, [(1, False, [1, 2], [1, 2])])],
        [(A, 0, [(1, False, [5, 1], [6, 2])])],
        [(A, 0, [(1, False, [1, 4], [2])])],
        [(A, 0, [(1, False, [0], [2])])],
        [(A, 3, [(2, False, [1], [2])])],
        [(A, 0, [(1, False, [1], [2]), (1, False, [1], [2])])],
        [(A, 0, [(n, False, [1], [2]) for n in range(1, MAX_EPOCHS + 2)])],
        [(A[1:], 0, [])],
        [(A, 0, []), (A, 0, [])],
    ],
)
def test_what_is_no_ledger_is_refused(rows: object) -> None:
    with pytest.raises(ValueError):
        Ledger.load(msgspec.msgpack.encode(rows))


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_a_ledger_or_a_value_error(data: bytes) -> None:
    with suppress(ValueError):
        Ledger.load(data)
