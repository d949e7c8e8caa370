"""The driver of a core: order, timers, congestion and the end. With a scripted core, and a clock that only the loop moves."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from endpoints import until

from solyd_swarm.core.events import (
    Action,
    Close,
    Congested,
    Dial,
    Drained,
    Event,
    NeighborDown,
    NeighborUp,
    Progress,
    Publish,
    Schedule,
    Send,
    Tick,
)
from solyd_swarm.net.driver import Driver
from solyd_swarm.net.limits import HIGH_MARK, LOW_MARK

TOPIC = b"t" * 32
A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))
LAG = 0.1


class Core:
    """Does as it is told: ``answers`` gives the actions for a kind of event."""

    def __init__(self) -> None:
        self.handled: list[tuple[Event, float]] = []
        self.answers: dict[type[Event], Callable[[Any], list[Action]]] = {}
        self.neighbors: dict[bytes, None] = {}

    def handle(self, event: Event, now: float) -> list[Action]:
        self.handled.append((event, now))
        return self.answers.get(type(event), lambda event: [])(event)

    def events(self, *kinds: type[Event]) -> list[Event]:
        return [event for event, _ in self.handled if isinstance(event, kinds)]


class World:
    """Network and application in one; notes what it is asked for."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.queues: dict[bytes, int] = {}
        self.on: dict[str, Callable[..., None]] = {}
        self.core = Core()
        loop = asyncio.get_running_loop()
        self.driver = Driver(self.core, TOPIC, self, self, loop, lag_timeout=LAG, lag_bytes=16 * HIGH_MARK)  # type: ignore[arg-type]

    def note(self, *what: Any) -> None:
        self.log.append(what)
        self.on.get(what[0], lambda *rest: None)(*what[1:])

    def send(self, peer: bytes, topic_key: bytes, data: bytes) -> None:
        assert topic_key == TOPIC
        self.note("send", peer, data)

    def dial(self, topic_key: bytes, instance: bytes, addresses: Any, via: bytes) -> None:
        self.note("dial", instance, addresses, via)

    def close(self, peer: bytes, reason: str) -> None:
        self.note("close", peer, reason)

    def backlog(self, peer: bytes) -> int:
        return self.queues.get(peer, 0)

    def deliver(self, delivery: Any) -> None:
        self.note("deliver", delivery)

    def neighbor_up(self, peer: bytes, author: bytes) -> None:
        self.note("up", peer)

    def neighbor_down(self, peer: bytes, author: bytes, reason: str) -> None:
        self.note("down", peer, reason)

    def progress(self, by_any: int, by_all: int, lost: int) -> None:
        self.note("progress", by_any, by_all)

    def equivocated(self, event: Any) -> None:
        self.note("equivocated", event)

    def queue(self, peer: bytes, size: int) -> None:
        """A queue has that many bytes now; crossing a mark is told as a channel tells it."""
        before, self.queues[peer] = self.queues.get(peer, 0), size
        if before <= HIGH_MARK < size or before > LOW_MARK >= size:
            self.driver.backlog(peer, size, size <= LOW_MARK)

    def meet(self, *peers: bytes) -> None:
        for peer in peers:
            self.core.neighbors[peer] = None
            self.core.answers[Publish] = lambda event, peer=peer: [NeighborUp(peer, b"")]
            self.driver.feed(Publish(0, 0, []))

    def lose(self, peer: bytes) -> None:
        del self.core.neighbors[peer]
        self.core.answers[Publish] = lambda event: [NeighborDown(peer, b"", "gone")]
        self.driver.feed(Publish(0, 0, []))

    def verdicts(self) -> list[Event]:
        return self.core.events(Congested, Drained)


@pytest.fixture
async def world():
    made = World()
    yield made
    made.driver.close()
    assert not [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled() and "Driver" in repr(handle)]


async def test_every_action_is_carried_out_in_order(world):
    world.core.answers[Publish] = lambda event: [
        Send(A, b"1"),
        NeighborUp(A, b""),
        Send(B, b"2"),
        Dial(B, (("192.0.2.1", 1),), C),
        Progress(1, 0),
        NeighborDown(A, b"", "left"),
        Close(C, "broken"),
    ]
    world.driver.feed(Publish(1, 0, []))
    assert world.log == [
        ("send", A, b"1"),
        ("up", A),
        ("send", B, b"2"),
        ("dial", B, (("192.0.2.1", 1),), C),
        ("progress", 1, 0),
        ("down", A, "left"),
        ("close", C, "broken"),
    ]


async def test_an_event_that_an_action_causes_waits_for_the_other_actions(world):
    """A handler publishes; a dial fails at once; a closed channel reports its end."""
    world.core.answers[Publish] = lambda event: [Send(A, b"%d first" % event.first), Send(A, b"%d second" % event.first)]
    world.on["send"] = lambda peer, data: (
        world.driver.feed(Publish(int(data[:1]) + 1, 0, [])) if data in (b"1 first", b"2 second") else None
    )
    world.driver.feed(Publish(1, 0, []))
    assert [data for _, _, data in world.log] == [b"1 first", b"1 second", b"2 first", b"2 second", b"3 first", b"3 second"]


async def test_a_failing_application_does_not_end_the_driver(world):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    world.core.answers[Publish] = lambda event: [Progress(1, 1)]
    world.on["progress"] = fail
    with pytest.raises(ZeroDivisionError):
        world.driver.feed(Publish(1, 0, []))
    world.on.clear()
    world.driver.feed(Publish(2, 0, []))
    assert len(world.log) == 2


async def test_timers_fire_once_the_last_one_asked_for_counts(world):
    loop = asyncio.get_running_loop()
    begun = loop.time()
    world.core.answers[Publish] = lambda event: [Schedule(begun + 60), Schedule(begun + 0.01), Schedule(begun + 0.05)]
    world.driver.feed(Publish(1, 0, []))
    await until(lambda: world.core.events(Tick))
    assert world.core.handled[-1][1] >= begun + 0.049
    await asyncio.sleep(0.02)
    assert len(world.core.events(Tick)) == 1


async def test_a_timer_in_the_past_fires_at_once_and_can_ask_for_the_next(world):
    world.core.answers[Publish] = world.core.answers[Tick] = lambda event: [Schedule(0.0)] if len(world.core.handled) < 5 else []
    world.driver.feed(Publish(1, 0, []))
    await until(lambda: len(world.core.events(Tick)) == 4)


async def test_closing_cancels_what_is_due_and_takes_no_more(world):
    world.meet(A, B)
    world.queue(A, 2 * HIGH_MARK)
    world.core.answers[Publish] = lambda event: [Schedule(asyncio.get_running_loop().time() + 0.01)]
    world.driver.feed(Publish(1, 0, []))
    world.driver.close()
    count = len(world.core.handled)
    world.driver.feed(Publish(2, 0, []))
    world.driver.backlog(B, 2 * HIGH_MARK, False)
    await asyncio.sleep(2 * LAG)
    assert len(world.core.handled) == count


async def test_closing_in_the_middle_ends_what_is_left(world):
    world.core.answers[Publish] = lambda event: [Progress(1, 1), Send(A, b"too late"), Schedule(0.0)]

    def close(*_: Any) -> None:
        world.driver.feed(Publish(2, 0, []))
        world.driver.close()

    world.on["progress"] = close
    world.driver.feed(Publish(1, 0, []))
    assert world.log == [("progress", 1, 1)]
    assert len(world.core.handled) == 1


# Congestion.


async def test_who_lags_while_others_drain_is_demoted_after_a_while_and_restored(world):
    loop = asyncio.get_running_loop()
    world.meet(A, B)
    begun = loop.time()
    world.queue(A, 2 * HIGH_MARK)
    await until(lambda: world.verdicts())
    assert LAG <= loop.time() - begun < LAG + 1
    world.queue(A, HIGH_MARK)  # shorter, but not short
    assert world.verdicts() == [Congested(A)]
    world.queue(A, 0)
    assert world.verdicts() == [Congested(A), Drained(A)]
    world.queue(A, 2 * HIGH_MARK)
    await until(lambda: world.verdicts() == [Congested(A), Drained(A), Congested(A)])


async def test_who_drains_in_time_is_left_alone(world):
    world.meet(A, B)
    world.queue(A, 2 * HIGH_MARK)
    await asyncio.sleep(LAG / 2)
    world.queue(A, 0)
    await asyncio.sleep(LAG)
    assert not world.verdicts()


async def test_where_all_lag_it_is_our_own_line_that_is_slow(world):
    world.meet(A, B)
    world.queue(A, 2 * HIGH_MARK)
    world.queue(B, 2 * HIGH_MARK)
    await asyncio.sleep(2 * LAG)
    assert not world.verdicts()
    world.queue(B, 0)
    await until(lambda: world.verdicts() == [Congested(A)])


async def test_a_queue_far_too_long_does_not_wait(world):
    """So that a burst does not cost us the neighbour: its channel would close itself at 64 MiB."""
    world.meet(A, B)
    world.queue(A, 2 * HIGH_MARK)
    world.queue(B, 2 * HIGH_MARK)
    world.queue(A, 17 * HIGH_MARK)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await until(lambda: world.verdicts() == [Congested(A)])
    assert loop.time() - begun < LAG


async def test_an_only_neighbour_is_not_demoted(world):
    world.meet(A)
    world.queue(A, 20 * HIGH_MARK)
    await asyncio.sleep(2 * LAG)
    assert not world.verdicts()
    world.meet(B)
    await until(lambda: world.verdicts() == [Congested(A)])


async def test_a_neighbour_that_goes_takes_its_verdict_along(world):
    world.meet(A, B)
    world.queue(A, 2 * HIGH_MARK)
    world.lose(A)
    await asyncio.sleep(2 * LAG)
    assert not world.verdicts()
    world.queue(A, 0)
    world.meet(A)
    world.queue(A, 2 * HIGH_MARK)
    await until(lambda: world.verdicts() == [Congested(A)])


async def test_a_neighbour_whose_queue_is_long_when_it_comes_is_watched(world):
    world.meet(B)
    world.queue(A, 2 * HIGH_MARK)  # by another topic
    await asyncio.sleep(2 * LAG)
    assert not world.verdicts()
    world.meet(A)
    await until(lambda: world.verdicts() == [Congested(A)])
