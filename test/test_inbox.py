"""Queues between the loop and consumers: bounded, in order, and nothing is lost when an iterator ends."""

import asyncio
import threading
from typing import Any

import pytest
from script_kit import PATIENCE, Collector, until

from solyd_swarm import inbox as inbox_module
from solyd_swarm import payload
from solyd_swarm.core.envelope import Envelope
from solyd_swarm.inbox import Inbox, MessageIterator, MessageRest
from solyd_swarm.message import Batch

AUTHOR = bytes(32)
BODY = 100


def batch(first: int, *objects: Any, size: int = BODY) -> Batch:
    payloads = tuple(payload.encode(obj) if not isinstance(obj, bytes) else obj for obj in objects or (first,))
    return Batch(Envelope(bytes(32), AUTHOR, 1, first, 0, payloads, bytes(size), b""), AUTHOR, False, "room")


def firsts(batches: list[Batch]) -> list[int]:
    return [each.envelope.first + each.start for each in batches]


class Consumer:
    """An iterator, and what it told its owner."""

    def __init__(self, max_bytes: int = 10_000, own: bool = False) -> None:
        self.errors: list[Exception] = []
        self.closed: list[MessageRest] = []
        self.iterator = MessageIterator(max_bytes, self.errors.append, self.closed.append, lambda: own)


# -- inbox --------------------------------------------------------------------------------------------------------


def test_first_in_first_out() -> None:
    inbox = Inbox(1_000)
    assert inbox.take() is None
    for first in (1, 2, 3):
        assert inbox.put(batch(first)) == 0
    assert len(inbox) == 3
    taken = inbox.take()
    assert taken is not None
    assert taken.envelope.first == 1
    assert firsts(inbox.waiting()) == firsts(inbox.take_all()) == [2, 3]
    assert len(inbox) == 0


def test_bounded_in_bytes_the_oldest_go_first() -> None:
    inbox = Inbox(3 * BODY)
    lost = [inbox.put(batch(first, "a", "b")) for first in range(1, 6)]
    assert lost == [0, 0, 0, 2, 2]
    assert firsts(inbox.take_all()) == [3, 4, 5]
    assert inbox.put(batch(6, size=3 * BODY)) == 0  # the bytes of what was taken are free again
    assert inbox.put(batch(7)) == 1


def test_one_that_is_too_large_by_itself_stays() -> None:
    inbox = Inbox(10)
    assert [inbox.put(batch(1)), inbox.put(batch(2))] == [0, 1]
    assert firsts(inbox.take_all()) == [2]


def test_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "MAX_BATCHES", 3)
    inbox = Inbox(10**9)
    assert sum(inbox.put(batch(first)) for first in range(10)) == 7
    assert len(inbox) == 3


def test_what_was_put_back_is_next() -> None:
    inbox = Inbox(1_000)
    for first in (1, 2, 3):
        inbox.put(batch(first))
    taken = [inbox.take(), inbox.take()]
    inbox.put_back([each for each in taken if each is not None])
    assert firsts(inbox.take_all()) == [1, 2, 3]


def test_age_and_what_iterators_have_got() -> None:
    inbox = Inbox(1_000)
    inbox.put(batch(1))
    inbox.put(batch(2).as_shared())
    inbox.drop_older(PATIENCE)
    assert len(inbox) == 2
    inbox.drop_shared()
    assert firsts(inbox.waiting()) == [1]
    inbox.drop_older(-1)
    assert len(inbox) == 0
    assert inbox.put(batch(3, size=1_000)) == 0


def test_promises() -> None:
    inbox = Inbox(1_000)
    for first in (1, 2):
        inbox.put(batch(first))
    assert (inbox.promise(), inbox.promise()) == (2, 0)
    inbox.put(batch(3))
    assert inbox.promise() == 1
    inbox.take_all()
    inbox.put(batch(4))
    assert inbox.promise() == 0  # three calls are on their way
    for _ in range(3):
        inbox.redeem()
    assert inbox.promise() == 1


# -- iterators ----------------------------------------------------------------------------------------------------


def test_messages_of_several_batches() -> None:
    consumer = Consumer()
    consumer.iterator.put(batch(1, "a", "b"))
    consumer.iterator.put(batch(3, "c"))
    consumer.iterator.end()
    messages = list(consumer.iterator)
    assert [message.data for message in messages] == ["a", "b", "c"]
    assert [message.sequence for message in messages] == [1, 2, 3]
    assert list(consumer.iterator) == []


def test_what_was_not_consumed_goes_back() -> None:
    consumer = Consumer()
    consumer.iterator.put(batch(1, "a", "b", "c"))
    consumer.iterator.put(batch(4))
    assert next(consumer.iterator).data == "a"
    (rest,) = [consumer.iterator.rest]
    assert firsts(rest.waiting()) == [2, 4]
    consumer.iterator.close()
    consumer.iterator.close()
    assert consumer.closed == [rest]
    assert firsts(rest.take_all()) == [2, 4]
    assert rest.take_all() == []
    assert list(consumer.iterator) == []


def test_collected_it_is_closed() -> None:
    consumer = Consumer()
    rest = consumer.iterator.rest
    del consumer.iterator
    assert consumer.closed == [rest]


def test_a_batch_that_begins_later() -> None:
    consumer = Consumer()
    consumer.iterator.put(batch(1, "a", "b", "c").rest(2))
    assert next(consumer.iterator).sequence == 3


def test_what_cannot_be_decoded_is_skipped() -> None:
    consumer = Consumer()
    consumer.iterator.put(batch(1, b"\xc1", "b"))
    assert next(consumer.iterator).data == "b"
    (error,) = consumer.errors
    assert error.message_id.endswith(":1:1")  # type: ignore[attr-defined]


def test_it_says_how_many_had_to_go() -> None:
    consumer = Consumer(max_bytes=2 * BODY)
    assert [consumer.iterator.put(batch(first)) for first in (1, 2, 3)] == [0, 0, 1]


def test_a_thread_waits_until_something_comes() -> None:
    consumer = Consumer()
    got = Collector()

    def consume() -> None:
        for message in consumer.iterator:
            got(message.data)
        got("end")

    thread = threading.Thread(target=consume)
    thread.start()
    for number in range(100):
        consumer.iterator.put(batch(number))
        got.wait(number + 1)
    consumer.iterator.end()
    assert got.wait(101) == [*range(100), "end"]
    thread.join(PATIENCE)


def test_two_threads_share_an_iterator() -> None:
    consumer = Consumer(max_bytes=10**9)
    got = Collector()
    threads = [threading.Thread(target=lambda: [got(message.data) for message in consumer.iterator]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(500):
        consumer.iterator.put(batch(2 * number, 2 * number, 2 * number + 1))
    assert sorted(got.wait(1_000)) == list(range(1_000))
    consumer.iterator.end()
    for thread in threads:
        thread.join(PATIENCE)


def test_closing_wakes_whoever_waits() -> None:
    consumer = Consumer()
    done = threading.Event()
    thread = threading.Thread(target=lambda: (list(consumer.iterator), done.set()))
    thread.start()
    until(lambda: consumer.iterator._waiters)
    consumer.iterator.close()
    assert done.wait(PATIENCE)
    thread.join(PATIENCE)


def test_not_on_the_swarms_own_thread() -> None:
    with pytest.raises(RuntimeError, match="async for"):
        next(Consumer(own=True).iterator)


async def test_on_a_loop() -> None:
    consumer = Consumer()
    waiting = asyncio.ensure_future(anext(consumer.iterator))
    await asyncio.sleep(0)
    await asyncio.to_thread(consumer.iterator.put, batch(1, "a", "b"))
    assert (await waiting).data == "a"
    consumer.iterator.end()
    assert [message.data async for message in consumer.iterator] == ["b"]


async def test_who_stops_waiting_is_forgotten() -> None:
    consumer = Consumer()
    waiting = asyncio.ensure_future(anext(consumer.iterator))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not consumer.iterator._waiters
    consumer.iterator.put(batch(1))
    assert (await anext(consumer.iterator)).data == 1
