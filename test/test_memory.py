"""What is remembered of a topic: what was received, except what nobody has read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from solyd_swarm.core.envelope import Envelope
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.errors import IdentityError
from solyd_swarm.store import memory as memory_module
from solyd_swarm.store.identity import Identity
from solyd_swarm.store.memory import TopicMemory

TOPIC = bytes(16)
ANNA, BERT = bytes([1]) * 32, bytes([2]) * 32


def envelope(author: bytes, first: int, last: int) -> Envelope:
    return Envelope(bytes(32), author, 7, first, 0, (b"",) * (last - first + 1), b"", b"")


def accepted(ledger: Ledger | None, author: bytes = ANNA) -> list[int]:
    assert ledger is not None
    return [number for number in range(1, 100) if ledger.refuses(author, 7, number, number)]


@pytest.fixture
def identity(tmp_path: Path) -> Iterator[Identity]:
    opened = Identity.open(tmp_path / "identity", now_us=lambda: 1)
    yield opened
    opened.close()


def test_nothing_yet(identity: Identity) -> None:
    memory = TopicMemory(identity, TOPIC)
    assert memory.ledger is None
    assert memory.partly_read == {}


def test_what_was_not_read_was_not_received(identity: Identity) -> None:
    ledger = Ledger()
    ledger.mark(ANNA, 7, 1, 20)
    ledger.mark(BERT, 7, 1, 5)
    unread = [(envelope(ANNA, 13, 16), 0), (envelope(ANNA, 5, 8), 2), (envelope(ANNA, 9, 12), 0), (envelope(BERT, 1, 5), 0)]
    TopicMemory(identity, TOPIC).save(ledger, unread, final=True)
    again = TopicMemory(identity, TOPIC)
    assert accepted(again.ledger) == [1, 2, 3, 4, 17, 18, 19, 20]
    assert accepted(again.ledger, BERT) == []
    assert again.partly_read == {(ANNA, 7): 7}
    assert accepted(ledger) == list(range(1, 21))  # this life goes on
    assert TopicMemory(identity, bytes(15) + b"\1").ledger is None
    # Read in the second life.
    del again.partly_read[ANNA, 7]
    again.save(ledger, [], final=True)
    last = TopicMemory(identity, TOPIC)
    assert accepted(last.ledger) == list(range(1, 21))
    assert last.partly_read == {}


def test_only_changes_are_saved(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[bytes] = []
    save = identity.save_ledger

    def record(topic_id: bytes, blob: bytes) -> None:
        saved.append(topic_id)
        save(topic_id, blob)

    monkeypatch.setattr(identity, "save_ledger", record)
    memory, ledger = TopicMemory(identity, TOPIC), Ledger()
    ledger.mark(ANNA, 7, 1, 2)
    for _ in range(3):
        memory.save(ledger, [(envelope(ANNA, 1, 2), 0)], final=False)
    assert saved == [TOPIC]
    memory.save(ledger, [(envelope(ANNA, 1, 2), 1)], final=False)  # read on, with nothing received
    assert len(saved) == 3
    memory.save(ledger, [], final=False)
    assert len(saved) == 5


def test_much_that_is_unread_is_saved_at_the_end(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "MANY_UNREAD", 2)
    memory, ledger = TopicMemory(identity, TOPIC), Ledger()
    ledger.mark(ANNA, 7, 1, 10)
    unread = [(envelope(ANNA, number, number), 0) for number in (1, 3, 5)]
    memory.save(ledger, unread, final=False)
    assert TopicMemory(identity, TOPIC).ledger is None
    memory.save(ledger, unread, final=True)
    assert accepted(TopicMemory(identity, TOPIC).ledger) == [2, 4, 6, 7, 8, 9, 10]


def test_more_holes_than_a_ledger_may_have(identity: Identity) -> None:
    ledger = Ledger()
    ledger.mark(ANNA, 7, 1, 5_000)
    unread = [(envelope(ANNA, number, number), 0) for number in range(2, 5_000, 2)]
    TopicMemory(identity, TOPIC).save(ledger, unread, final=True)
    again = TopicMemory(identity, TOPIC).ledger
    assert again is not None
    assert not again.refuses(ANNA, 7, 4_998, 4_998)
    assert again.refuses(ANNA, 7, 4_999, 5_000)


def test_garbage_and_a_disk_that_fails(identity: Identity, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    identity.save_ledger(TOPIC, b"garbage")
    memory = TopicMemory(identity, TOPIC)
    assert memory.ledger is None
    assert "cannot be read" in caplog.text

    def fail(topic_id: bytes, blob: bytes) -> None:
        raise IdentityError("the disk is full")

    monkeypatch.setattr(identity, "save_ledger", fail)
    memory.save(Ledger(), [], final=True)
    assert "the disk is full" in caplog.text
