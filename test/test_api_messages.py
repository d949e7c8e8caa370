"""What handlers of messages get, where and in which order they run, and what becomes of what goes wrong, in a script."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from script_kit import PATIENCE, Collector, Make, give_forged, meet, pair, party, publish_raw, until

from solyd_swarm import Message, PayloadError
from solyd_swarm.emitter import MANY_CALLS


@pytest.fixture
def make() -> Iterator[Make]:
    with party() as made:
        yield made


# -- messages -----------------------------------------------------------------------------------------------------


def test_message_and_received(make: Make) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    one, other = pair(make)
    plain, whole = Collector(), Collector()
    one.on("message", plain)
    one.on("received", whole)
    ids = [other.publish({"number": number}) for number in (1, 2)]
    messages = whole.wait(2)
    assert plain.calls == [{"number": 1}, {"number": 2}]
    for number, (message, id) in enumerate(zip(messages, ids, strict=True), 1):
        assert isinstance(message, Message)
        assert message.data == {"number": number}
        assert message.id == id
        assert message.source == message.propagation_source == other.id
        assert message.sequence == number
        assert message.id == f"{other.id}:{message.epoch}:{number}"
        assert before <= message.published_at <= datetime.now(UTC)
        assert message.late is False
        assert message.topic == "room"


def test_what_comes_after_those_that_follow_it_is_late(make: Make) -> None:
    one, other = pair(make)
    got = Collector()
    one.on("received", got)
    give_forged(other, one, first=3, payload=b"\x03")
    (message,) = got.wait()  # the gap before it has been waited for
    assert (message.sequence, message.late) == (3, False)
    give_forged(other, one, first=1, payload=b"\x01")
    assert [(message.sequence, message.data, message.late) for message in got.wait(2)[1:]] == [(1, 1, True)]
    until(lambda: one.stats.late == 1)


def test_who_passed_a_message_on(make: Make) -> None:
    """In a line of three: each end knows the one in the middle only."""
    one, middle = pair(make)
    last = make(bootstrap=middle.ticket)
    meet(last)
    got = Collector()
    last.on("received", got)
    one.publish("hello")
    (message,) = got.wait()
    assert message.source == one.id
    assert message.propagation_source in (one.id, middle.id)
    assert message.propagation_source in [peer.id for peer in last.peers]


def test_messages_wait_for_the_first_listener(make: Make) -> None:
    one, other = pair(make)
    for number in range(10):
        other.publish(number)
    other.flush().result(PATIENCE)
    got = Collector()
    one.once("message", got)
    assert got.wait() == [0]
    got = Collector()
    one.on("message", got)  # what came after `once` has waited too
    assert got.wait(9) == list(range(1, 10))


def test_handlers_run_one_at_a_time_in_order_on_the_dispatcher(make: Make) -> None:
    one, other = pair(make)
    got, at_work = Collector(), threading.Semaphore(1)

    def handler(obj: Any) -> None:
        assert at_work.acquire(blocking=False)
        if obj % 10 == 0:
            time.sleep(0.001)  # lets the others in, if they could
        got(obj)
        at_work.release()

    errors = Collector()
    one.on("message", handler)
    one.on("error", errors)
    for number in range(100):
        other.publish(number)
    assert got.wait(100) == list(range(100))
    assert errors.calls == []
    assert got.threads == {"solyd_swarm dispatcher"}


def test_a_handler_that_hangs_does_not_stop_the_protocol(make: Make) -> None:
    one, other = pair(make)
    begun, go_on, got = threading.Event(), threading.Event(), Collector()

    def handler(obj: Any) -> None:
        begun.set()
        go_on.wait(PATIENCE)
        got(obj)

    one.on("message", handler)
    other.publish("first")
    assert begun.wait(PATIENCE)
    other.publish("second")
    other.flush().result(PATIENCE)  # acknowledged all the same
    third = make()
    third.publish("third")
    third.flush().result(PATIENCE)
    one.publish("out")
    one.flush().result(PATIENCE)
    assert got.calls == []
    go_on.set()
    assert sorted(got.wait(3)) == ["first", "second", "third"]


def test_a_coroutine_handler_runs_one_call_at_a_time_in_order(make: Make) -> None:
    one, other = pair(make)
    got, events = Collector(), []

    async def handler(obj: int) -> None:
        events.append(("begin", obj))
        for _ in range(3):
            await asyncio.sleep(0)
        events.append(("end", obj))
        got(obj)

    one.on("message", handler)
    for number in range(50):
        other.publish(number)
        if number % 10 == 0:
            other.flush().result(PATIENCE)
    assert got.wait(50) == list(range(50))
    assert events == [(what, number) for number in range(50) for what in ("begin", "end")]
    assert got.threads == {"solyd_swarm loop"}


def test_a_coroutine_handler_of_connected(make: Make) -> None:
    """Whether it is the event or it was added late, it is one and the same handler: one call at a time."""
    one, other = pair(make)
    got, go_on = Collector(), threading.Event()

    async def handler() -> None:
        got("begin")
        while not go_on.is_set():
            await asyncio.sleep(0.001)
        got("end")

    one.on("connected", handler)
    got.wait()
    other.leave().result(PATIENCE)
    until(lambda: not one.peers)
    meet(make(bootstrap=one.ticket))
    done = Collector()
    one.on("connected", done)
    done.wait()
    assert got.calls == ["begin"]
    go_on.set()
    assert got.wait(4) == ["begin", "end", "begin", "end"]


def test_a_slow_coroutine_handler_lets_messages_wait_where_they_are_bounded(make: Make) -> None:
    one, other = make(retain_bytes=5_000), make()
    meet(one, other)
    got, begun, go_on, lagged = Collector(), threading.Event(), threading.Event(), Collector()

    async def handler(obj: list[Any]) -> None:
        begun.set()
        while not go_on.is_set():
            await asyncio.sleep(0.001)
        got(obj[0])

    one.on("message", handler)
    one.on("lagged", lagged)
    for number in range(100):
        other.publish([number, bytes(500)])
        other.flush().result(PATIENCE)
    assert begun.is_set()
    until(lambda: one.stats.lagged > 100 - 1 - 2 * MANY_CALLS - 10)
    go_on.set()
    until(lambda: got.calls and got.calls[-1] == 99)
    assert got.calls == sorted(got.calls)
    assert len(got.calls) + one.stats.lagged == 100
    until(lambda: sum(lagged.calls) == one.stats.lagged)


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_what_a_handler_raises_is_an_error_event(make: Make) -> None:
    one, other = pair(make)
    errors, got = Collector(), Collector()

    def bad(obj: Any) -> None:
        raise ValueError(obj)

    async def worse(obj: Any) -> None:
        raise KeyError(obj)

    one.on("message", bad)
    one.on("message", worse)
    one.on("message", got)
    one.on("error", errors)
    other.publish("x")
    assert {repr(error) for error in errors.wait(2)} == {"ValueError('x')", "KeyError('x')"}
    assert got.wait() == ["x"]
    assert errors.threads == {"solyd_swarm dispatcher"}


def test_what_a_handler_raises_is_logged_where_nobody_listens(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, other = pair(make)
    got = Collector()

    def bad(obj: Any) -> None:
        raise ValueError("a bad handler")

    one.on("message", bad)
    one.on("message", got)
    other.publish("x")
    got.wait()
    until(lambda: "ValueError: a bad handler" in caplog.text)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.levelno == logging.ERROR


def test_what_an_error_listener_raises_is_only_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, other = pair(make)
    calls, later = Collector(), Collector()

    def bad(_: Any) -> None:
        raise ValueError("a bad handler")

    def bad_listener(error: Exception) -> None:
        calls(error)
        raise KeyError("a bad listener")

    async def worse_listener(error: Exception) -> None:
        raise IndexError("a worse listener")

    one.on("message", bad)
    one.on("error", bad_listener)
    one.on("error", worse_listener)
    other.publish("x")
    calls.wait()
    one.on("connected", later)  # comes after whatever that could cause
    later.wait()
    until(lambda: "a worse listener" in caplog.text)
    assert "KeyError: 'a bad listener'" in caplog.text
    assert len(calls.calls) == 1


def test_a_payload_that_cannot_be_decoded(make: Make) -> None:
    one, other = pair(make)
    third = make(bootstrap=other.ticket)
    meet(third)
    errors, got, everywhere = Collector(), Collector(), Collector()
    one.on("error", errors)
    one.on("message", got)
    third.on("error", everywhere)
    third.on("message", lambda obj: None)
    other.publish("before")
    publish_raw(other, b"\xc1")
    other.publish("after")
    assert got.wait(2) == ["before", "after"]
    (error,) = errors.wait()
    assert isinstance(error, PayloadError)
    assert error.source == other.id
    assert error.message_id == f"{other.id}:{other._epoch}:2"
    assert error.message_id in str(error)
    assert isinstance(everywhere.wait()[0], PayloadError)  # relayed all the same
    assert (one.stats.undecodable, one.stats.neighbors > 0) == (1, True)


def test_a_payload_that_cannot_be_decoded_is_skipped_by_iterators(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, other = pair(make)
    publish_raw(other, b"\xc1")
    other.publish("after")
    assert next(iter(one)).data == "after"
    until(lambda: "cannot be decoded" in caplog.text or "MessagePack" in caplog.text)
    assert one.stats.undecodable == 1


def test_equivocation(make: Make) -> None:
    one, other = pair(make)
    third = make()
    meet(third)
    got, seen, elsewhere = Collector(), Collector(), Collector()
    one.on("message", got)
    one.on("equivocation", seen)
    third.on("equivocation", elsewhere)
    other.publish("one thing")
    other.flush().result(PATIENCE)
    got.wait()
    give_forged(other, one, first=1, payload=b"\x01")
    ((author, proof),) = seen.wait()
    assert author == other.id
    (body, signature), (other_body, other_signature) = proof
    assert body != other_body
    assert len(signature) == len(other_signature) == 64
    assert elsewhere.wait()[0][0] == other.id
    other.publish("is not accepted any more")
    third.publish("from somebody else")
    assert got.wait(2) == ["one thing", "from somebody else"]
