"""Everything that `Swarm` and `Node` promise, inside a running event loop, with real sockets on loopback."""

import asyncio
import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from textwrap import dedent
from typing import Any

import pytest
from processes import LOOPBACK, member, neighbour

from solyd_swarm import (
    Message,
    MessageTooLarge,
    Node,
    OptionError,
    OptionTypeError,
    PayloadError,
    Peer,
    Pending,
    Swarm,
    SwarmLeft,
    TopicError,
    UnpublishableType,
    pubsub,
)
from solyd_swarm.core.events import Publish
from solyd_swarm.pubsub import _defaults

PATIENCE = 10.0

Make = Callable[..., Swarm]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes swarms on one topic that know of the first of them; all leave at the end."""
    made: list[Swarm] = []

    def make_one(topic: str = "room", **options: Any) -> Swarm:
        options = {"listen": ("127.0.0.1", 0), "mdns": False, "dht": False, **options}
        if made and "bootstrap" not in options:
            options["bootstrap"] = made[0].ticket
        swarm = pubsub(topic, **options)
        made.append(swarm)
        return swarm

    yield make_one
    for swarm in made:
        await within(swarm.leave())


async def within(waiting: Awaitable[Any], seconds: float = PATIENCE) -> Any:
    async with asyncio.timeout(seconds):
        return await waiting


class Collector:
    """A handler that keeps what it was called with, and can be waited for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.threads: set[int] = set()
        self._more = asyncio.Event()

    def __call__(self, *args: Any) -> None:
        self.calls.append(args[0] if len(args) == 1 else args)
        self.threads.add(threading.get_ident())
        self._more.set()

    async def wait(self, count: int = 1) -> list[Any]:
        async with asyncio.timeout(PATIENCE):
            while len(self.calls) < count:
                self._more.clear()
                await self._more.wait()
        return self.calls


def ours(loop: asyncio.AbstractEventLoop) -> list[str]:
    """Tasks and timers on the loop that are none of the test's."""
    tasks = [repr(task) for task in asyncio.all_tasks(loop) if task is not asyncio.current_task() and "solyd" in repr(task)]
    timers = [repr(handle) for handle in getattr(loop, "_scheduled", ()) if not handle.cancelled() and "solyd" in repr(handle)]
    return tasks + timers


def library_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("solyd_swarm")]


# ---- where it runs


async def test_lives_in_the_running_loop(make: Make) -> None:
    swarm, other = make(), make()
    received = Collector()
    swarm.on("message", received)
    other.publish("hello")
    await received.wait()
    assert received.threads == {threading.get_ident()}
    assert library_threads() == []


async def test_nothing_is_left_after_leave(make: Make) -> None:
    loop = asyncio.get_running_loop()
    swarm, other = make(mdns=True, dht=True), make(mdns=True, dht=True)
    swarm.publish("x")
    await within(swarm.flush())
    assert ours(loop)
    await within(swarm.leave())
    await within(other.leave())
    assert ours(loop) == []
    assert _defaults.get(loop) is None


async def test_leaving_at_once(make: Make) -> None:
    """While discovery is still starting."""
    for options in ({"mdns": True, "dht": True}, {"mdns": False, "dht": True}, {}):
        swarm = make(**options)
        await within(swarm.leave())
        later = make(**options)
        await asyncio.sleep(0)
        await within(later.leave())
    assert ours(asyncio.get_running_loop()) == []


async def test_default_node_is_shared_per_loop() -> None:
    first, second = pubsub("one"), pubsub("two")
    rival = pubsub("one")
    assert first.id == second.id
    assert rival.id != first.id
    joined = [swarm.joined() for swarm in (first, rival)]
    for pending in joined:
        await within(pending)
    assert {peer.id for peer in first.peers} == {rival.id}
    await within(asyncio.gather(*map(_settled, (first.leave(), second.leave(), rival.leave()))))
    assert _defaults.get(asyncio.get_running_loop()) is None


async def _settled(pending: Pending[None]) -> None:
    await pending


async def test_two_loops_in_two_threads(make: Make) -> None:
    swarm = make()
    heard = Collector()
    swarm.on("message", heard)

    async def elsewhere() -> tuple[str, int]:
        async with pubsub("room", bootstrap=swarm.ticket, listen=("127.0.0.1", 0), mdns=False, dht=False) as other:
            await within(other.joined())
            seen = Collector()
            other.on("message", seen)
            other.publish("from there")
            await within(other.flush())
            await seen.wait()
            return other.id, threading.get_ident() - min(seen.threads)

    swarm.publish("from here")
    other_id, difference = await within(asyncio.to_thread(asyncio.run, elsewhere()))
    assert await heard.wait() == ["from there"]
    assert difference == 0  # its handlers ran on its loop
    assert other_id != swarm.id


def test_loops_one_after_the_other_are_not_kept() -> None:
    ids = set()
    loops = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        swarm = pubsub("room")
        ids.add(swarm.id)
        await within(swarm.leave())

    for _ in range(2):
        asyncio.run(main())
    gc.collect()
    assert len(ids) == 2
    assert [loop() for loop in loops] == [None, None]


# ---- publish, joined, flush, leave


async def test_publish_from_everywhere(make: Make) -> None:
    swarm, other = make(), make()
    received = Collector()
    other.on("received", received)
    ids = [swarm.publish({"n": 0})]
    await within(swarm.joined())
    ids.append(await asyncio.to_thread(swarm.publish, {"n": 1}))

    async def elsewhere() -> str:
        return swarm.publish({"n": 2})

    ids.append(await asyncio.to_thread(asyncio.run, elsewhere()))
    messages: list[Message] = await received.wait(3)
    assert [message.data["n"] for message in messages] == [0, 1, 2]
    assert [message.id for message in messages] == ids
    assert {message.source for message in messages} == {swarm.id}
    assert {message.propagation_source for message in messages} == {swarm.id}
    assert [message.sequence for message in messages] == [1, 2, 3]
    assert len({message.epoch for message in messages}) == 1
    assert all(abs((datetime.now(UTC) - message.published_at).total_seconds()) < PATIENCE for message in messages)
    assert {(message.topic, message.late) for message in messages} == {("room", False)}


async def test_many_threads_publish(make: Make) -> None:
    swarm, other = make(), make()
    received = Collector()
    other.on("message", received)
    await within(swarm.joined())

    def publish(worker: int) -> None:
        for number in range(200):
            swarm.publish([worker, number])

    await within(asyncio.gather(*(asyncio.to_thread(publish, worker) for worker in range(3))))
    calls = await received.wait(600)
    for worker in range(3):
        assert [number for who, number in calls if who == worker] == list(range(200))


async def test_publish_refuses(make: Make) -> None:
    swarm = make(max_message_size=1000)
    with pytest.raises(UnpublishableType, match=r"object"):
        swarm.publish({"a": [object()]})
    with pytest.raises(MessageTooLarge):
        swarm.publish("x" * 1001)
    await within(swarm.leave())
    with pytest.raises(SwarmLeft):
        swarm.publish("x")


async def test_topics_and_options_are_checked() -> None:
    with pytest.raises(TypeError):
        pubsub(7)  # type: ignore[arg-type]
    with pytest.raises(TopicError):
        pubsub("")
    with pytest.raises(TypeError):
        pubsub("x", mdns="yes")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"1\.2\.3\.4|listen|bind"):
        pubsub("x", listen=("1.2.3.4", 1))
    async with Node(mdns=False, dht=False) as node:
        with pytest.raises(OptionTypeError):
            pubsub("x", node=node, mdns=False)
    assert ours(asyncio.get_running_loop()) == []


async def test_joined_flush_leave(make: Make) -> None:
    swarm = make()
    joined = swarm.joined()
    swarm.publish(1)
    flushed = swarm.flush()
    await asyncio.sleep(0)
    assert not joined.done()
    assert not flushed.done()
    other = make()
    await within(joined)
    await within(swarm.joined())
    await within(flushed)
    assert swarm.stats.acknowledged == swarm.stats.published == 1
    assert [peer.id for peer in swarm.peers] == [other.id]
    assert isinstance(swarm.peers[0], Peer)
    await within(swarm.leave())
    await within(swarm.leave())
    assert swarm.peers == ()
    for refused in (swarm.joined, swarm.flush):
        with pytest.raises(SwarmLeft):
            refused()


async def test_leaving_ends_what_waits(make: Make) -> None:
    swarm = make()
    joined = swarm.joined()
    swarm.publish(1)
    flushed = swarm.flush()
    await within(swarm.leave())
    for pending in (joined, flushed):
        with pytest.raises(SwarmLeft):
            await within(pending)


async def test_result_on_the_loop_and_elsewhere(make: Make) -> None:
    swarm = make()
    joined = swarm.joined()
    with pytest.raises(RuntimeError, match="own thread"):
        joined.result()
    with pytest.raises(RuntimeError, match="own thread"):
        swarm.wait(0)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(joined.result, 0.01)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(swarm.wait, 0.01)
    make()
    await within(asyncio.to_thread(joined.result, PATIENCE))
    swarm.publish(1)
    await within(asyncio.to_thread(lambda: swarm.flush().result(PATIENCE)))
    await within(asyncio.to_thread(lambda: swarm.leave().result(PATIENCE)))
    await within(asyncio.to_thread(swarm.wait, PATIENCE))


async def test_result_elsewhere_while_a_handler_runs(make: Make) -> None:
    """The thread counts, not what the loop happens to do."""
    swarm, other = make(), make()
    await within(swarm.joined())
    outcome: list[object] = []

    def handler(_: Any) -> None:
        def elsewhere() -> None:
            try:
                outcome.append(swarm.joined().result(0.05))
            except (RuntimeError, TimeoutError) as error:
                outcome.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    swarm.on("message", handler)
    other.publish(1)
    async with asyncio.timeout(PATIENCE):
        while not outcome:
            await asyncio.sleep(0.01)
    assert isinstance(outcome[0], TimeoutError)  # the loop was kept from its work, but nobody was refused


async def test_pending_on_another_loop(make: Make) -> None:
    swarm = make()
    joined = swarm.joined()

    async def elsewhere() -> None:
        await within(joined)

    waiting = asyncio.ensure_future(asyncio.to_thread(asyncio.run, elsewhere()))
    make()
    await within(waiting)


async def test_stopping_to_wait_stops_nothing_else(make: Make) -> None:
    swarm = make()
    joined = swarm.joined()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(joined, 0.01)
    waiter = asyncio.ensure_future(_settled(joined))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not joined.done()
    make()
    await within(joined)
    leaving = swarm.leave()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(leaving, 0)
    await within(leaving)


# ---- context managers and nodes


async def test_async_with(make: Make) -> None:
    first = make()
    async with make() as swarm:
        await within(swarm.joined())
        told = Collector()
        first.on("neighbor_down", told)
    with pytest.raises(SwarmLeft):
        swarm.publish(1)
    peer, reason = (await told.wait())[0]
    assert (peer.id, reason) == (swarm.id, "left")
    await within(first.leave())
    assert ours(asyncio.get_running_loop()) == []


async def test_sync_with_on_the_loop_begins_to_leave(make: Make) -> None:
    with make() as swarm:
        pass
    with pytest.raises(SwarmLeft):
        swarm.publish(1)
    await within(swarm.leave())


async def test_with_in_a_thread_is_a_script(make: Make) -> None:
    """No loop runs there, so the swarm has threads of its own."""
    here = make()
    received = Collector()
    here.on("message", received)

    def script() -> list[str]:
        with pubsub("room", bootstrap=here.ticket, listen=("127.0.0.1", 0), mdns=False, dht=False) as swarm:
            swarm.publish("from a thread")
            swarm.flush().result(PATIENCE)
            return library_threads()

    assert "solyd_swarm loop" in await within(asyncio.to_thread(script))
    assert await received.wait() == ["from a thread"]


async def test_node() -> None:
    async with Node(listen=("127.0.0.1", 0), mdns=False, dht=False) as node:
        one, two = node.pubsub("one"), pubsub("two", node=node)
        assert one.id == two.id == node.id
        with pytest.raises(OptionError):
            node.pubsub("one")
        with pytest.raises(TypeError):
            node.pubsub("three", mdns=False)
        async with Node(listen=("127.0.0.1", 0), mdns=False, dht=False, bootstrap=node.ticket) as other:
            assert other.port != node.port
            mine = other.pubsub("two")
            await within(mine.joined())
            assert [peer.id for peer in two.peers] == [other.id]
            assert one.peers == ()
            await within(two.leave())
            again = node.pubsub("two")
            await within(again.joined())
    for swarm in (one, two, again, mine):
        with pytest.raises(SwarmLeft):
            swarm.publish(1)
    with pytest.raises(SwarmLeft):
        node.pubsub("late")
    await within(node.close())
    assert ours(asyncio.get_running_loop()) == []


async def test_node_used_from_another_thread() -> None:
    async with Node(listen=("127.0.0.1", 0), mdns=False, dht=False) as node, Node(mdns=False, dht=False, bootstrap=node.ticket) as other:
        swarm = await asyncio.to_thread(node.pubsub, "room")
        received = Collector()
        await asyncio.to_thread(swarm.on, "message", received)
        peer = other.pubsub("room")
        peer.publish("hello")
        assert await received.wait() == ["hello"]
        assert received.threads == {threading.get_ident()}
        with pytest.raises(RuntimeError):
            node.close().result()
        await within(asyncio.to_thread(lambda: node.close().result(PATIENCE)))


# ---- handlers


async def test_every_event(make: Make) -> None:
    swarm = make()
    events = Collector()
    for name in ("connected", "disconnected", "neighbor_up", "neighbor_down", "message", "left"):
        swarm.on(name, lambda *args, name=name: events((name, *args)))
    other = make()
    other.publish(7)
    await events.wait(3)
    assert [name for name, *_ in events.calls] == ["connected", "neighbor_up", "message"]
    assert events.calls[1][1].id == other.id
    assert events.calls[2] == ("message", 7)
    late = Collector()
    swarm.on("connected", lambda: late("late"))
    await late.wait()
    await within(other.leave())
    await events.wait(5)
    assert [name for name, *_ in events.calls[3:]] == ["neighbor_down", "disconnected"]
    assert events.calls[3][2] == "left"
    third = make()
    await events.wait(7)
    await within(swarm.leave())
    assert [name for name, *_ in events.calls[5:]] == ["connected", "neighbor_up", "disconnected", "left"]
    assert late.calls == ["late", "late"]
    assert third.id == events.calls[6][1].id


async def test_once_decorator_and_remove(make: Make) -> None:
    swarm, other = make(), make()
    first, every = Collector(), Collector()
    swarm.once("message", first)

    @swarm.on("message")
    def on_message(obj: Any) -> None:
        every(obj)

    other.publish(1)
    other.publish(2)
    await every.wait(2)
    swarm.remove_listener("message", on_message)
    rest = Collector()
    swarm.on("message", rest)
    other.publish(3)
    await rest.wait()
    assert (first.calls, every.calls, rest.calls) == ([1], [1, 2], [3])


async def test_nothing_is_lost_before_the_first_listener(make: Make) -> None:
    swarm, other = make(), make()
    for number in range(100):
        other.publish(number)
    await within(other.flush())
    received = Collector()
    swarm.on("message", received)
    assert await received.wait(100) == list(range(100))


async def test_coroutine_handlers_run_one_call_at_a_time(make: Make) -> None:
    swarm, other = make(), make()
    running, most, seen = 0, 0, Collector()

    async def handler(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        seen(number)

    swarm.on("message", handler)
    for number in range(50):
        other.publish(number)
    assert await seen.wait(50) == list(range(50))
    assert most == 1


async def test_handlers_that_raise(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    swarm, other = make(), make()
    received = Collector()

    def plain(_: Any) -> None:
        raise KeyError("plain")

    def cancelled(_: Any) -> None:
        raise asyncio.CancelledError("plain")

    async def coroutine(number: int) -> None:
        if number == 2:
            raise asyncio.CancelledError("coroutine")
        raise KeyError("coroutine")

    for handler in (plain, cancelled, coroutine, received):
        swarm.on("message", handler)
    with caplog.at_level(logging.ERROR, "solyd_swarm"):
        other.publish(1)
        await received.wait()
        await _until(lambda: len(caplog.records) >= 3)
    assert sorted(str(record.exc_info[1]) for record in caplog.records if record.exc_info) == ["'coroutine'", "'plain'", "plain"]
    errors = Collector()
    swarm.on("error", errors)
    other.publish(2)
    await errors.wait(3)
    assert sorted(str(error) for error in errors.calls) == ["'plain'", "coroutine", "plain"]
    assert received.calls == [1, 2]


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def test_handler_that_awaits_leave_goes_on(make: Make) -> None:
    swarm, other = make(), make()
    steps = Collector()

    async def handler(_: Any) -> None:
        steps("called")
        await swarm.leave()
        steps("left")
        await asyncio.sleep(0.05)
        steps("went on")

    swarm.on("message", handler)
    other.publish(1)
    await steps.wait()
    begun = time.monotonic()
    await within(swarm.leave())
    assert time.monotonic() - begun < 1
    assert await steps.wait(3) == ["called", "left", "went on"]


async def test_leave_in_a_plain_handler(make: Make) -> None:
    swarm, other = make(), make()
    results: list[Pending[None]] = []
    left = Collector()
    swarm.on("left", lambda: left("left"))

    @swarm.on("message")
    def handler(_: Any) -> None:
        results.append(swarm.leave())

    other.publish(1)
    await left.wait()
    await within(results[0])
    with pytest.raises(RuntimeError):
        results[0].result()


async def test_coroutine_handler_of_left_runs(make: Make) -> None:
    swarm = make()
    done = Collector()

    async def on_left() -> None:
        await asyncio.sleep(0)
        done("left")

    swarm.on("left", on_left)
    await within(swarm.leave())
    await done.wait()


async def test_slow_coroutine_handler_does_not_hold_up_leaving(make: Make) -> None:
    swarm, other = make(), make()
    entered, release = asyncio.Event(), asyncio.Event()

    async def handler(_: Any) -> None:
        entered.set()
        await release.wait()

    swarm.on("message", handler)
    other.publish(1)
    await within(entered.wait())
    begun = time.monotonic()
    await within(swarm.leave())
    assert time.monotonic() - begun < 1
    release.set()


async def test_handlers_in_slices(make: Make) -> None:
    """Many quick calls do not keep the loop from everyone else."""
    swarm, other = make(), make()
    received = Collector()

    def handler(number: int) -> None:
        time.sleep(0.001)
        received(number)

    for number in range(300):
        other.publish(number)
        if number % 10 == 0:
            await asyncio.sleep(0)  # an envelope a turn
    await within(other.flush())
    longest, last = 0.0, time.monotonic()
    swarm.on("message", handler)
    while len(received.calls) < 300:
        await asyncio.sleep(0)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert longest < 0.2


async def test_listeners_added_by_other_threads(make: Make) -> None:
    swarm, other = make(), make()
    await within(swarm.joined())
    greeted = Collector()
    loop = asyncio.get_running_loop()

    def add(count: int) -> None:
        for _ in range(count):
            swarm.on("connected", lambda: loop.call_soon_threadsafe(greeted, 1))

    await within(asyncio.gather(*(asyncio.to_thread(add, 50) for _ in range(4))))
    await greeted.wait(200)
    received = Collector()
    swarm.on("message", received)
    other.publish("still served")
    await received.wait()
    assert len(greeted.calls) == 200


async def test_lagging(make: Make) -> None:
    """An iterator that nobody reads holds so many bytes, and what had to go is counted."""
    swarm, other = make(retain_bytes=20_000), make()
    lost = Collector()
    swarm.on("lagged", lost)
    iterator = aiter(swarm)
    await within(other.joined())
    for number in range(100):
        other.publish([number, b"x" * 1000])
        await within(other.flush())
    await lost.wait()
    await within(swarm.leave())
    kept = [message.data[0] async for message in iterator]
    assert kept == list(range(100 - len(kept), 100))
    assert sum(lost.calls) + len(kept) == 100
    assert swarm.stats.lagged == sum(lost.calls)


async def test_messages_that_cannot_be_decoded(make: Make) -> None:
    swarm, other = make(), make()
    errors, received = Collector(), Collector()
    swarm.on("error", errors)
    swarm.on("message", received)
    await within(other.joined())
    assert other._driver is not None
    other._driver.feed(Publish(1, time.time_ns() // 1000, [b"\xc1"]))
    other._outbox.published = 1
    other.publish("readable")
    assert await received.wait() == ["readable"]
    (error,) = await errors.wait()
    assert isinstance(error, PayloadError)
    assert error.source == other.id
    assert swarm.stats.undecodable == 1


async def test_warns_of_unknown_events(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    swarm = make()
    swarm.on("mesage", print)
    assert "did you mean 'message'" in caplog.text


# ---- iterators


async def test_async_for(make: Make) -> None:
    swarm, other = make(), make()
    for number in range(3):
        other.publish(number)
    seen = []
    async with asyncio.timeout(PATIENCE):
        async for message in swarm:
            assert isinstance(message, Message)
            seen.append(message.data)
            if len(seen) == 3:
                break
    assert seen == [0, 1, 2]


async def test_several_iterators_and_a_handler(make: Make) -> None:
    swarm, other = make(), make()
    received = Collector()
    swarm.on("message", received)

    async def consume() -> list[Any]:
        return [message.data async for message in swarm]

    consumers = [asyncio.ensure_future(consume()) for _ in range(2)]

    async def elsewhere() -> list[Any]:
        return await consume()

    threads = [asyncio.ensure_future(asyncio.to_thread(asyncio.run, elsewhere()))]
    threads.append(asyncio.ensure_future(asyncio.to_thread(lambda: [message.data for message in swarm])))
    await _until(lambda: len(swarm._delivery._living()) == 4)
    for number in range(20):
        other.publish(number)
    await received.wait(20)
    await within(swarm.leave())
    for consumer in (*consumers, *threads):
        assert await within(consumer) == list(range(20))


async def test_iterator_ends_with_the_swarm(make: Make) -> None:
    swarm = make()
    before = aiter(swarm)
    leaving = swarm.leave()
    during = aiter(swarm)
    await within(leaving)
    for iterator in (before, during, aiter(swarm)):
        with pytest.raises(StopAsyncIteration):
            await within(anext(iterator))


async def test_iterator_made_at_any_moment_of_leaving_ends(make: Make) -> None:
    swarm = make(mdns=True)
    leaving = swarm.leave()
    iterators = []
    while not leaving.done():
        iterators.append(aiter(swarm))
        await asyncio.sleep(0)
    for iterator in iterators:
        with pytest.raises(StopAsyncIteration):
            await within(anext(iterator))


async def test_what_was_not_consumed_goes_to_the_next(make: Make) -> None:
    swarm, other = make(), make()
    for number in range(6):
        other.publish(number)
    async for message in swarm:
        if message.data == 2:
            break
    received = Collector()
    swarm.on("message", received)
    assert await received.wait(3) == [3, 4, 5]


async def test_several_iterators_given_up_at_once(make: Make) -> None:
    """What the last of them left is there once, and what handlers have got is not handed to them again."""
    swarm, other = make(), make()
    iterators = [aiter(swarm), aiter(swarm)]
    for number in range(4):
        other.publish(number)
    for iterator in iterators:
        assert (await within(anext(iterator))).data == 0
    first, second = Collector(), Collector()
    del iterator, iterators
    swarm.on("message", first)
    assert await first.wait(3) == [1, 2, 3]
    iterator = aiter(swarm)
    other.publish(4)
    await first.wait(4)
    del iterator
    swarm.on("message", second)
    other.publish(5)
    assert await second.wait() == [5]
    assert first.calls == [1, 2, 3, 4, 5]


async def test_waiting_for_a_message_with_a_timeout(make: Make) -> None:
    swarm, other = make(), make()
    iterator = aiter(swarm)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(iterator), 0.001)
    assert len(iterator._waiters) == 0  # type: ignore[attr-defined]
    other.publish("after all")
    assert (await within(anext(iterator))).data == "after all"


async def test_sync_for_on_the_loop_is_refused(make: Make) -> None:
    swarm = make()
    with pytest.raises(RuntimeError, match="async for"):
        next(iter(swarm))


# ---- the loop itself


async def test_debug_mode_is_clean(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 1.0
    swarm, other = make(mdns=True, dht=True), make(mdns=True, dht=True)
    received = Collector()
    swarm.on("message", received)
    await asyncio.to_thread(swarm.on, "connected", Collector())
    await asyncio.to_thread(other.publish, "hello")
    await received.wait()
    await within(asyncio.to_thread(lambda: swarm.leave().result(PATIENCE)))
    await within(other.leave())
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_uvloop() -> None:
    """In a process of its own: once uvloop has looked something up, a child forked by a thread crashes at its end."""
    pytest.importorskip("uvloop", reason="the extra `fast` is not installed")
    text = """
        import uvloop

        async def main():
            assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
            swarm = pubsub("room", bootstrap=os.environ["TICKET"], listen=("127.0.0.1", 0), mdns=True, dht=True)
            async for message in swarm:
                swarm.publish(["echo", message.data])
                await swarm.flush()
                break
            await swarm.leave()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            abandoned = join()
            await abandoned.joined()
            abandoned.publish("last words")

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    """
    with neighbour() as other, member(text, other, "-X", "dev", "-W", "default") as process:
        other.swarm.publish("hello")
        assert other.message() == ["echo", "hello"]
        assert other.message() == "last words"
        assert [other.down()[0], other.down()[0]] == ["left", "left"]
        assert process.end() == (0, "")


# ---- the loop ends without leave()


ENDS = {
    "returns": """
        async def main():
            swarm = join()
            await swarm.joined()
            swarm.publish("last words")
    """,
    "returns from a node": """
        async def main():
            node = Node(bootstrap=os.environ["TICKET"], **LOOPBACK)
            swarm = node.pubsub("room")
            node.pubsub("another")
            await swarm.joined()
            swarm.publish("last words")
    """,
    "leaving": """
        async def main():
            swarm = join()
            await swarm.joined()
            swarm.publish("last words")
            swarm.leave()
    """,
    "halfway through leaving": """
        async def main():
            swarm = join()
            await swarm.joined()
            swarm.publish("last words")
            swarm.leave()
            await asyncio.sleep(0.002)
    """,
    "closing a node": """
        async def main():
            node = Node(bootstrap=os.environ["TICKET"], **LOOPBACK)
            swarm = node.pubsub("room")
            await swarm.joined()
            swarm.publish("last words")
            node.close()
            await asyncio.sleep(0)
    """,
    "with handlers at work": """
        async def main():
            swarm = join()
            await swarm.joined()
            entered = asyncio.Event()
            async def handler(obj):
                entered.set()
                await asyncio.sleep(100)
            swarm.on("message", handler)
            @swarm.on("left")
            async def left():
                say("left")
                await asyncio.sleep(100)
            await entered.wait()
            swarm.publish("last words")
    """,
    "with mdns and dht": """
        async def main():
            swarm = pubsub("room", bootstrap=os.environ["TICKET"], listen=("127.0.0.1", 0), mdns=True, dht=True)
            await swarm.joined()
            swarm.publish("last words")
    """,
}


@pytest.mark.parametrize("how", ENDS)
def test_loop_ends_without_leave(how: str) -> None:
    with neighbour() as other:
        other.swarm.publish(1)
        other.swarm.publish(2)
        with member(dedent(ENDS[how]) + "asyncio.run(main())\nsay('ran')\n", other, "-X", "dev", "-W", "default") as process:
            assert other.message() == "last words"
            reason, _ = other.down()
            process.expect("ran")
            assert process.end() == (0, "")
            assert process.lines in (["ran"], ["left", "ran"])
        assert reason == "left"


def test_loop_ends_by_an_interrupt() -> None:
    text = """
        async def main():
            swarm = join()
            await swarm.joined()
            say("joined")
            async for message in swarm:
                say(message)

        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            say("interrupted")
    """
    with neighbour() as other, member(text, other, "-X", "dev", "-W", "default") as process:
        process.expect("joined")
        at = process.interrupt()
        reason, told = other.down()
        assert (reason, told - at < 1) == ("left", True)
        process.expect("interrupted")
        assert process.end() == (0, "")
        assert time.monotonic() - at < 2


def test_loop_ends_by_an_exit_in_a_handler() -> None:
    text = """
        async def main():
            swarm = join()
            swarm.on("message", lambda obj: sys.exit(obj))
            await asyncio.sleep(100)

        asyncio.run(main())
    """
    with neighbour() as other, member(text, other) as process:
        other.swarm.publish(7)
        assert other.down()[0] == "left"
        assert process.end() == (7, "")


def test_cancelling_all_tasks_is_leaving() -> None:
    async def main() -> None:
        swarm = pubsub("room", **LOOPBACK)
        iterator = aiter(swarm)
        await asyncio.sleep(0.01)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        with pytest.raises(StopAsyncIteration):
            await within(anext(iterator))
        await within(swarm.leave())
        await _until(lambda: not ours(asyncio.get_running_loop()))

    asyncio.run(main())
