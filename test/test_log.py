"""The log: what becomes of an envelope, how long what is kept, and that the digest holds exactly what is known."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from solyd_swarm.core import log as module
from solyd_swarm.core.envelope import Envelope, envelope_id, equivocation_id
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.log import Log, Outcome
from solyd_swarm.core.ordered import fingerprint_of
from solyd_swarm.core.reconcile import ItemSet

A, B = b"a" * 32, b"b" * 32
WINDOW = 10.0


def make(first: int = 1, count: int = 1, *, author: bytes = A, epoch: int = 1, variant: int = 0, size: int = 100) -> Envelope:
    body = (b"%d %d %d %d " % (epoch, first, count, variant) + author).ljust(size, b".")
    return Envelope(envelope_id(body), author, epoch, first, 1, (b"",) * count, body, bytes(64))


def make_log(*, max_bytes: int = 10_000, ledger: Ledger | None = None, started: float = 0.0) -> Log:
    log = Log(window=WINDOW, max_bytes=max_bytes, ledger=ledger)
    log.started = started
    return log


def digest(log: Log) -> tuple[int, bytes]:
    return log.items.summary()


# -- outcomes -------------------------------------------------------------------------------------------------


def test_an_envelope_is_accepted_once() -> None:
    log = make_log()
    assert log.add(make(), 0.0, 3, 5.0) is Outcome.ACCEPTED
    assert log.add(make(), 0.0, 3, 5.0) is Outcome.DUPLICATE
    record = log.get(make().id)
    assert record is not None
    assert record.envelope is not None
    assert record.hops == 3
    assert len(log) == 1
    assert log.holds(make().id)
    assert log.witnessed(make().id)


def test_what_is_concealed_is_held_and_not_in_the_digest() -> None:
    log = make_log()
    empty = digest(log)
    log.add(make(), 0.0, 0, 5.0)
    listed = digest(log)
    for _ in range(2):
        log.conceal(make().id)
        assert digest(log) == empty
        assert log.holds(make().id)
    for _ in range(2):
        log.reveal(make().id)
        assert digest(log) == listed
    log.conceal(make().id)
    log.expire(5.0 + 2 * WINDOW)
    assert len(log) == 0
    assert digest(log) == empty
    log.reveal(make().id)
    log.conceal(b"unknown")
    assert digest(log) == empty


def test_an_envelope_said_to_be_older_than_the_window_is_not_taken_in() -> None:
    log = make_log()
    assert log.add(make(), WINDOW, 0, 50.0) is Outcome.STALE
    assert not log.holds(make().id)
    # That it was stale was only said: who says otherwise is believed as much.
    assert log.add(make(), 1.0, 0, 50.0) is Outcome.ACCEPTED


def test_an_envelope_said_to_be_older_than_two_windows_is_nothing_to_us() -> None:
    log = make_log()
    assert log.add(make(), 2 * WINDOW, 0, 50.0) is Outcome.EXPIRED
    assert not log.holds(make().id)
    assert log.add(make(), 1.0, 0, 50.0) is Outcome.ACCEPTED


def test_a_replay_is_refused_after_its_id_has_expired() -> None:
    log = make_log()
    log.add(make(), 0.0, 0, 0.0)
    log.expire(2 * WINDOW)
    assert len(log) == len(log.items) == 0
    assert log.add(make(), 0.0, 0, 2 * WINDOW) is Outcome.REFUSED
    log._dropped.clear()  # and long after, when even that is forgotten
    assert log.add(make(), 0.0, 0, 1000.0) is Outcome.REFUSED
    assert log.add(make(), 0.0, 0, 1000.0, pulled=True) is Outcome.REFUSED


def test_what_an_earlier_life_accepted_is_kept_for_others_if_pulled() -> None:
    ledger = Ledger()
    ledger.mark(A, 1, 1, 5)
    log = make_log(ledger=Ledger.load(ledger.dump()), started=100.0)
    assert log.add(make(1), 3.0, 0, 101.0) is Outcome.REFUSED
    assert log.add(make(2), 0.5, 0, 104.0, pulled=True) is Outcome.REFUSED  # younger than this life: a replay
    assert not log.holds(make(1).id)  # it may still be pulled
    assert log.holds(make(2).id)
    assert log.add(make(1), 3.0, 0, 101.0, pulled=True) is Outcome.KNOWN
    assert log.get(make(1).id) is not None
    assert (1, make(1).id) in log.items
    assert log.add(make(1), 3.0, 0, 101.0) is Outcome.DUPLICATE
    assert log.add(make(3), WINDOW, 0, 100.0 + WINDOW, pulled=True) is Outcome.REFUSED  # a window later there is no such thing
    assert log.add(make(6), 0.0, 0, 101.0) is Outcome.ACCEPTED


# -- ages -----------------------------------------------------------------------------------------------------


def test_ages_count_on_from_what_the_sender_said() -> None:
    log = make_log()
    log.add(make(), 4.0, 0, 100.0)
    record = log.get(make().id)
    assert record is not None
    assert log.age_ms(record, 100.0) == 4000
    assert log.age_ms(record, 101.5) == 5500
    assert log.next_expiry() == 106.0
    log.expire(105.9)
    assert record.envelope is not None
    log.expire(106.0)
    assert record.envelope is None
    assert log.bytes == 0
    assert log.holds(make().id)
    assert log.next_expiry() == 116.0
    log.expire(115.9)
    assert len(log) == 1
    log.expire(116.0)
    assert len(log) == 0
    assert log.holds(make().id)  # not to be fetched again from who has not dropped it yet
    assert log.next_expiry() is None


def test_a_copy_that_is_fetched_late_does_not_start_afresh() -> None:
    one, other = make_log(), make_log()
    one.add(make(), 0.0, 0, 0.0)
    record = one.get(make().id)
    assert record is not None
    other.add(make(), one.age_ms(record, 9.0) / 1000, 1, 500.0)  # a clock of its own
    other.expire(500.9)
    assert other.bytes
    other.expire(501.0)
    assert not other.bytes


def test_an_age_is_never_more_than_the_wire_takes() -> None:
    log = make_log()
    log.convict((make(1), make(1, variant=1)), 2.0**31, 0.0)
    record = log.get(equivocation_id(A, 1))
    assert record is not None
    assert 0 <= log.age_ms(record, 2.0**40) <= 2**40


# -- caps -----------------------------------------------------------------------------------------------------


def test_past_the_bytes_the_oldest_bodies_go_and_their_ids_stay() -> None:
    log = make_log(max_bytes=350)
    for first in range(1, 6):
        log.add(make(first), 5.0 - first, 0, 10.0)
    records = [log.get(make(first).id) for first in range(1, 6)]
    assert [record is not None and record.envelope is not None for record in records] == [False, False, True, True, True]
    assert log.bytes == 300
    assert len(log) == len(log.items) == 5


@pytest.mark.parametrize("max_bytes", [0, 250])
def test_what_has_just_come_keeps_its_body_until_the_next_though_it_be_the_oldest(max_bytes: int) -> None:
    """It is still to be delivered and relayed: a joiner may fetch a window that is larger than its own."""
    log = make_log(max_bytes=max_bytes)
    for first in range(1, 6):
        log.add(make(first), float(first), 0, 10.0)
        record = log.get(make(first).id)
        assert record is not None
        assert record.envelope is not None
        assert log.bytes <= max(max_bytes, 100)


def test_past_the_count_the_oldest_ids_go_and_a_floor_says_what_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDS", 4)
    log = make_log()
    assert log.max_age(10.0) == WINDOW
    for first in range(1, 7):
        assert log.add(make(first), 7.0 - first, 0, 10.0) is Outcome.ACCEPTED
    assert len(log) == len(log.items) == 4
    assert log.max_age(10.0) == 5.0
    assert log.add(make(9), 5.5, 0, 10.0) is Outcome.EXPIRED
    assert not log.add_gone(b"g" * 32, 1, 5.5, 10.0)
    assert log.add(make(1), 0.0, 0, 10.0) is Outcome.REFUSED
    assert log.bytes == 400


def test_what_is_older_than_all_there_is_room_for_is_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDS", 2)
    log = make_log()
    log.add(make(5, 2), 1.0, 0, 10.0)
    log.add(make(7), 1.0, 0, 10.0)
    assert log.add(make(4), 2.0, 0, 10.0) is Outcome.EXPIRED
    assert log.bytes == 200
    assert log.add(make(6), 0.0, 0, 10.0) is Outcome.EQUIVOCATION  # what is kept for that is not damaged


def test_proofs_count_as_bodies() -> None:
    log = make_log(max_bytes=500)
    for epoch in range(1, 50):
        log.convict((make(1, epoch=epoch), make(1, epoch=epoch, variant=1)), 0.0, float(epoch))
        assert log.bytes <= 500
    assert len(log) == 49


def test_an_author_that_convicts_itself_without_end_is_bounded() -> None:
    log = make_log(max_bytes=10**9)
    for epoch in range(1, 200):
        for first in range(1, 50):
            log.add(make(first, epoch=epoch), 0.0, 0, 1.0)
        log.add(make(1, epoch=epoch, variant=1), 0.0, 0, 1.0)
    assert len(log) == 199
    assert len(log._by_birth) < 2000
    assert len(log._bodies) < 2000


def test_what_is_remembered_of_dropped_ids_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DROPPED", 3)
    log = make_log()
    for first in range(5):
        log.refuse(make(first).id)
    assert [log.holds(make(first).id) for first in range(5)] == [False, False, True, True, True]


# -- hearsay --------------------------------------------------------------------------------------------------


def test_an_id_that_is_said_to_be_gone_enters_the_digest_and_gives_way_to_the_envelope() -> None:
    log = make_log()
    assert log.add_gone(make().id, 77, 1.0, 5.0)
    assert not log.add_gone(make().id, 77, 1.0, 5.0)
    assert list(log.items) == [(77, make().id)]
    assert log.holds(make().id)
    assert not log.witnessed(make().id)
    assert [(first, last) for first, last, _ in log.rows_of_hearsay()] == [((77, make().id), (77, make().id))]
    assert log.add(make(), 2.0, 0, 5.0) is Outcome.ACCEPTED
    assert list(log.items) == [(1, make().id)]
    assert list(log.rows_of_hearsay()) == []


def test_another_timestamp_takes_the_place_of_a_wrong_one() -> None:
    log = make_log()
    log.add_gone(make().id, 77, 1.0, 5.0)
    assert log.add_gone(make().id, 78, 1.0, 5.0)
    assert list(log.items) == [(78, make().id)]
    log.add(make(), 2.0, 0, 5.0)
    assert not log.add_gone(make().id, 79, 1.0, 5.0)
    assert list(log.items) == [(1, make().id)]


@given(st.lists(st.sampled_from(["gone", "here", "gone, then here"]), max_size=40), st.integers(1, 5))
def test_hearsay_is_sought_by_rows_of_nothing_else(kinds: list[str], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_ROW", most)
        log = make_log()
        for place, kind in enumerate(kinds, 1):
            if kind.startswith("gone"):
                log.add_gone(make(place).id, place, 1.0, 5.0)
        for place, kind in enumerate(kinds, 1):
            if kind.endswith("here"):
                log.add(replace(make(place), time=place), 1.0, 0, 5.0)
        found: list[int] = []
        for first, last, fingerprint in log.rows_of_hearsay():
            within = [(at, id) for at, id in log.items if first <= (at, id) <= last]
            assert len(within) <= most
            assert fingerprint == fingerprint_of([id for _, id in within])
            found += [at for at, _ in reversed(within)]
    assert found == [place for place in range(len(kinds), 0, -1) if kinds[place - 1] == "gone"]


def test_expired_hearsay_does_not_keep_the_envelope_out() -> None:
    log = make_log()
    log.add_gone(make().id, 1, 2 * WINDOW - 0.001, 5.0)
    log.expire(6.0)
    assert len(log) == 0
    assert log.add(make(), 0.0, 0, 6.0) is Outcome.ACCEPTED


# -- equivocation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "offered"),
    [(make(1, 3), make(3)), (make(3), make(1, 3)), (make(2), make(1, 4)), (make(2), make(2, variant=1))],
)
def test_overlapping_ranges_convict(held: Envelope, offered: Envelope) -> None:
    log = make_log()
    for filler in (make(20), make(30, author=B)):
        log.add(filler, 0.0, 0, 0.0)
    log.add(held, 0.0, 0, 0.0)
    assert log.add(offered, 0.0, 0, 0.0) is Outcome.EQUIVOCATION
    record = log.get(equivocation_id(A, 1))
    assert record is not None
    assert record.proof is not None
    assert [envelope.id for envelope in record.proof] == [held.id, offered.id]
    assert list(log.items) == sorted([(1, make(30, author=B).id), (1, equivocation_id(A, 1))])
    assert log.add(held, 0.0, 0, 0.0) is Outcome.REFUSED
    assert log.add(make(99), 0.0, 0, 0.0) is Outcome.REFUSED
    assert log.add(make(1, epoch=2), 0.0, 0, 0.0) is Outcome.ACCEPTED


def test_members_agree_whatever_they_saw_first() -> None:
    proof = make(1), make(1, variant=1)
    orders = [[make(1), make(1, variant=1), make(2)], [make(1, variant=1), make(2), make(1)], [make(2)], []]
    digests = []
    for seen in orders:
        log = make_log()
        for envelope in seen:
            log.add(envelope, 0.0, 0, 0.0)
        log.convict(proof, 0.0, 0.0)
        digests.append(digest(log))
    assert len(set(digests)) == 1


def test_an_equivocation_is_news_once() -> None:
    log = make_log()
    proof = make(1), make(1, variant=1)
    assert log.convict(proof, 0.0, 0.0)
    assert not log.convict(proof, 0.0, 0.0)
    log.expire(3 * WINDOW)
    assert len(log) == 0
    assert not log.convict(proof, 0.0, 3 * WINDOW)
    assert len(log) == 0


def test_an_equivocation_known_from_an_earlier_life_enters_the_digest_without_being_news() -> None:
    ledger = Ledger()
    ledger.silence(A, 1)
    log = make_log(ledger=ledger)
    assert not log.convict((make(1), make(1, variant=1)), 0.0, 0.0)
    assert (1, equivocation_id(A, 1)) in log.items
    assert log.add(make(5), 0.0, 0, 0.0) is Outcome.REFUSED


def test_an_equivocation_in_an_epoch_too_old_to_remember_is_news_once_too() -> None:
    """Else two members would tell each other for ever."""
    log = make_log()
    for epoch in range(10, 40):
        log.ledger.mark(A, epoch, 1, 1)
    assert log.convict((make(1), make(1, variant=1)), 0.0, 0.0)
    assert not log.convict((make(1), make(1, variant=1)), 0.0, 0.0)


def test_an_equivocation_known_by_hearsay_gives_way_to_its_proof() -> None:
    log = make_log()
    log.add_gone(equivocation_id(A, 1), 1, 0.0, 0.0)
    assert log.convict((make(1), make(1, variant=1)), 0.0, 0.0)
    record = log.get(equivocation_id(A, 1))
    assert record is not None
    assert record.proof is not None


# -- a model --------------------------------------------------------------------------------------------------


class LogMachine(RuleBasedStateMachine):
    """Against plain dictionaries that are searched from end to end. Few ids, so that everything happens to all of them."""

    @initialize()
    def start(self) -> None:
        self.log = make_log(max_bytes=10**9)
        self.now = 1000.0
        self.born: dict[bytes, tuple[float, int]] = {}  # what the digest holds
        self.bodies: dict[bytes, Envelope] = {}
        self.verified: dict[bytes, tuple[bytes, int]] = {}
        self.accepted: dict[tuple[bytes, int], set[int]] = {}
        self.silenced: set[tuple[bytes, int]] = set()
        self.dropped: set[bytes] = set()

    @rule(
        first=st.integers(1, 6),
        count=st.integers(1, 2),
        author=st.sampled_from([A, B]),
        variant=st.integers(0, 5).map(lambda n: n == 5),
        age=st.sampled_from([0.0, 0.5, 3.0, 9.0, WINDOW, 15.0, 2 * WINDOW]),
    )
    def add(self, first: int, count: int, author: bytes, variant: bool, age: float) -> None:
        envelope = make(first, count, author=author, variant=variant)
        stream = (author, 1)
        wanted = self.expected(envelope, stream, age)
        assert self.log.add(envelope, age, 0, self.now) is wanted
        if wanted is Outcome.ACCEPTED:
            self.born[envelope.id] = (self.now - age, envelope.time)
            self.bodies[envelope.id] = envelope
            self.verified[envelope.id] = stream
            self.accepted.setdefault(stream, set()).update(range(first, first + count))
        elif wanted is Outcome.REFUSED:
            self.dropped.add(envelope.id)
        elif wanted is Outcome.EQUIVOCATION:
            self.convicted(stream, age)

    def expected(self, envelope: Envelope, stream: tuple[bytes, int], age: float) -> Outcome:
        numbers = set(range(envelope.first, envelope.last + 1))
        if envelope.id in self.verified:
            return Outcome.DUPLICATE
        if envelope.id in self.born and envelope.id in self.dropped:
            return Outcome.REFUSED
        if envelope.id in self.dropped or stream in self.silenced:
            return Outcome.REFUSED
        if age >= 2 * WINDOW:
            return Outcome.EXPIRED
        others = [each for each in self.bodies.values() if each.author == envelope.author]
        if any(numbers & set(range(other.first, other.last + 1)) for other in others):
            return Outcome.EQUIVOCATION
        if numbers & self.accepted.get(stream, set()):
            return Outcome.REFUSED
        return Outcome.STALE if age >= WINDOW else Outcome.ACCEPTED

    def convicted(self, stream: tuple[bytes, int], age: float) -> None:
        self.silenced.add(stream)
        gone = [id for id, owner in self.verified.items() if owner == stream]
        for id in gone:
            del self.verified[id], self.born[id]
            self.bodies.pop(id, None)
            self.dropped.add(id)
        self.born[equivocation_id(*stream)] = (self.now - age, stream[1])

    @rule(author=st.sampled_from([A, B]), age=st.sampled_from([0.0, 9.0]))
    def convict(self, author: bytes, age: float) -> None:
        proof = make(50, author=author), make(50, author=author, variant=1)
        known = (author, 1) in self.silenced
        assert self.log.convict(proof, age, self.now) is not known
        if not known:
            self.convicted((author, 1), age)

    @rule(first=st.integers(1, 6), author=st.sampled_from([A, B]), age=st.sampled_from([0.0, 12.0, 25.0]))
    def gone(self, first: int, author: bytes, age: float) -> None:
        id = make(first, author=author).id
        wanted = id not in self.born and id not in self.dropped and age < 2 * WINDOW
        assert self.log.add_gone(id, 1, age, self.now) is wanted
        if wanted:
            self.born[id] = (self.now - age, 1)

    @rule(seconds=st.sampled_from([0.5, 3.0, 7.5]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.log.expire(self.now)
        for id, (born, _) in list(self.born.items()):
            if born + WINDOW <= self.now:
                self.bodies.pop(id, None)
            if born + 2 * WINDOW <= self.now:
                del self.born[id]
                if self.verified.pop(id, None) is not None or id in (equivocation_id(A, 1), equivocation_id(B, 1)):
                    self.dropped.add(id)

    @invariant()
    def agrees(self) -> None:
        items = [(time, id) for id, (_, time) in self.born.items()]
        assert list(self.log.items) == sorted(items)
        assert self.log.items.summary() == ItemSet(items).summary()
        assert len(self.log) == len(self.born)
        for id, (born, _) in self.born.items():
            record = self.log.get(id)
            assert record is not None
            assert record.born == born
            assert (record.envelope is not None) == (id in self.bodies)
        proofs = sum(record.bodies_size for id in self.born if (record := self.log.get(id)) is not None and record.proof)
        assert self.log.bytes == sum(envelope.size for envelope in self.bodies.values()) + proofs
        assert all(self.log.holds(id) for id in self.dropped)


LogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestLog = LogMachine.TestCase


class CappedLogMachine(RuleBasedStateMachine):
    """With room for next to nothing: whatever comes, the caps hold and the parts agree."""

    @initialize()
    def start(self) -> None:
        self.caps = pytest.MonkeyPatch()
        self.caps.setattr(module, "MAX_IDS", 6)
        self.caps.setattr(module, "MAX_DROPPED", 5)
        self.log = make_log(max_bytes=350)
        self.now = 1000.0

    @rule(
        first=st.integers(1, 30),
        count=st.integers(1, 2),
        age=st.floats(0.0, 25.0),
        epoch=st.integers(1, 2),
        size=st.sampled_from([60, 100, 500]),
    )
    def add(self, first: int, count: int, age: float, epoch: int, size: int) -> None:
        envelope = make(first, count, epoch=epoch, size=size)
        if self.log.add(envelope, age, 0, self.now) is Outcome.ACCEPTED:
            record = self.log.get(envelope.id)
            assert record is not None
            assert record.envelope is not None
            assert (record.envelope.body, record.envelope.last) == (envelope.body, envelope.last)

    @rule(n=st.integers(1, 30), age=st.floats(0.0, 25.0))
    def gone(self, n: int, age: float) -> None:
        self.log.add_gone(make(n).id, 1, age, self.now)

    @rule(epoch=st.integers(1, 3), age=st.floats(0.0, 100.0))
    def convict(self, epoch: int, age: float) -> None:
        if self.log.convict((make(50, epoch=epoch), make(50, epoch=epoch, variant=1)), age, self.now):
            assert self.log.get(equivocation_id(A, epoch)) is not None

    @rule(seconds=st.floats(0.0, 10.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.log.expire(self.now)
        expiry = self.log.next_expiry()
        assert expiry is None or expiry > self.now

    @invariant()
    def holds_together(self) -> None:
        log = self.log
        assert len(log) == len(log.items) <= 6
        records = [log.get(id) for _, id in log.items]
        assert log.bytes == sum(record.bodies_size for record in records if record is not None)
        assert log.bytes <= 350 or sum(1 for record in records if record and record.bodies_size) == 1
        assert len(log._dropped) <= 5
        assert 0.0 <= log.max_age(self.now) <= WINDOW

    def teardown(self) -> None:
        if hasattr(self, "caps"):
            self.caps.undo()


CappedLogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestCappedLog = CappedLogMachine.TestCase
