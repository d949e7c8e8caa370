"""Runs one overlay on an event loop: hands events in, carries out what comes back. The whole of production's IO for a topic."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from solyd_swarm.core.events import (
    Action,
    Addresses,
    Close,
    Congested,
    Deliver,
    Dial,
    Drained,
    Equivocated,
    Event,
    NeighborDown,
    NeighborUp,
    Progress,
    Schedule,
    Send,
    Tick,
)
from solyd_swarm.core.overlay import Overlay
from solyd_swarm.net.limits import HIGH_MARK

log = logging.getLogger("solyd_swarm.net.driver")

LAG_TIMEOUT = 1.0
"""Seconds that a neighbour's queue may stay long, while others drain, before the neighbour gets announcements only."""
LAG_BYTES = 16 * 1024 * 1024
"""Bytes in a neighbour's queue above which it gets announcements only, without waiting for the time to pass: well below what the
channel itself refuses (64 MiB), so that a burst makes a slow neighbour lag and does not cost us the neighbour."""
LAG_CHECKS = 10
"""Looks at a long queue within `LAG_TIMEOUT`."""


class Transport(Protocol):
    """What a driver needs of the network."""

    def send(self, peer: bytes, topic_key: bytes, data: bytes) -> None:
        """Queues a frame of a topic."""

    def dial(self, topic_key: bytes, instance: bytes, addresses: Addresses, via: bytes) -> None:
        """Connects; a `LinkUp` or a `DialFailed` follows."""

    def close(self, peer: bytes, reason: str) -> None:
        """Closes the channel of a peer."""

    def backlog(self, peer: bytes) -> int:
        """Bytes in the peer's queue."""


class Sink(Protocol):
    """Who hears of what the overlay has for the application; called on the loop."""

    def deliver(self, delivery: Deliver) -> None: ...

    def neighbor_up(self, peer: bytes, author: bytes) -> None: ...

    def neighbor_down(self, peer: bytes, author: bytes, reason: str) -> None: ...

    def progress(self, by_any: int, by_all: int, lost: int) -> None: ...

    def equivocated(self, event: Equivocated) -> None: ...


class Driver:
    """One overlay on one loop; ends with `close`.

    Args:
        topic_key: names the topic to the transport.
        asleep: seconds that the machine has slept, which the loop's clock does not count and the age of a message does.
        lag_timeout, lag_bytes: other values than `LAG_TIMEOUT` and `LAG_BYTES`, for tests.
    """

    def __init__(
        self,
        overlay: Overlay,
        topic_key: bytes,
        transport: Transport,
        sink: Sink,
        loop: asyncio.AbstractEventLoop,
        *,
        asleep: Callable[[], float] = lambda: 0.0,
        lag_timeout: float = LAG_TIMEOUT,
        lag_bytes: int = LAG_BYTES,
    ) -> None:
        self.overlay = overlay
        self.topic_key = topic_key
        self._transport = transport
        self._sink = sink
        self._loop = loop
        self._asleep = asleep
        self._lag_timeout = lag_timeout
        self._lag_bytes = lag_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._lagging: dict[bytes, asyncio.TimerHandle] = {}
        self._congested: set[bytes] = set()
        self._events: deque[Event] = deque()
        self._busy = False
        self._closed = False
        self._carry_out: dict[type[Action], Callable[..., None]] = {
            Send: lambda action: transport.send(action.peer, topic_key, action.data),
            Deliver: sink.deliver,
            Schedule: lambda action: self._schedule(action.at),
            Dial: lambda action: transport.dial(topic_key, action.instance, action.addresses, action.via),
            Close: self._close_peer,
            NeighborUp: self._neighbor_up,
            NeighborDown: self._neighbor_down,
            Progress: lambda action: sink.progress(action.by_any, action.by_all, action.lost),
            Equivocated: sink.equivocated,
        }

    def feed(self, event: Event) -> None:
        """Hands an event in. What the outcome itself causes is handed in afterwards, so that actions keep their order."""
        if self._closed:
            return
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                for action in self.overlay.handle(self._events.popleft(), self._loop.time() + self._asleep()):
                    self._perform(action)
        finally:
            self._busy = False

    def _perform(self, action: Action) -> None:
        if not self._closed:  # by what an earlier action has set off
            self._carry_out[type(action)](action)

    def close(self) -> None:
        """No timer fires any more, and no event is taken."""
        self._closed = True
        self._events.clear()
        for timer in (self._timer, *self._lagging.values()):
            if timer is not None:
                timer.cancel()
        self._lagging.clear()

    def backlog(self, peer: bytes, size: int, low: bool) -> None:
        """A channel's queue has grown long, or short again (`low`)."""
        if self._closed or peer not in self.overlay.neighbors:
            return
        if low:
            self._forget_lag(peer)
            if peer in self._congested:
                self._congested.discard(peer)
                self.feed(Drained(peer))
        elif peer not in self._lagging and peer not in self._congested:
            self._watch(peer, self._loop.time())

    def _watch(self, peer: bytes, since: float) -> None:
        """The queue is long: it is looked at until it is short again, or the neighbour is demoted."""
        if self._transport.backlog(peer) > self._lag_bytes or (self._loop.time() - since >= self._lag_timeout and self._others_drain(peer)):
            self._demote(peer)
        if peer in self.overlay.neighbors and peer not in self._congested:
            self._lagging[peer] = self._loop.call_later(self._lag_timeout / LAG_CHECKS, self._watch, peer, since)

    def _others_drain(self, peer: bytes) -> bool:
        """Where nobody else drains it is our own line that is slow, and demoting would not help."""
        return any(other not in (*self._lagging, *self._congested, peer) for other in self.overlay.neighbors)

    def _forget_lag(self, peer: bytes) -> None:
        timer = self._lagging.pop(peer, None)
        if timer is not None:
            timer.cancel()

    def _demote(self, peer: bytes) -> None:
        if len(self.overlay.neighbors) > 1:
            log.debug("a neighbour lags behind others: announcements only")
            self._forget_lag(peer)
            self._congested.add(peer)
            self.feed(Congested(peer))

    def _schedule(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._closed:
            self._timer = self._loop.call_at(at - self._asleep(), self.feed, Tick())

    def _neighbor_up(self, action: NeighborUp) -> None:
        self._sink.neighbor_up(action.peer, action.author)
        size = self._transport.backlog(action.peer)
        if size > HIGH_MARK:  # it was a neighbour of this topic before, or is one of another topic
            self.backlog(action.peer, size, False)

    def _neighbor_down(self, action: NeighborDown) -> None:
        self._congested.discard(action.peer)
        self._forget_lag(action.peer)
        self._sink.neighbor_down(action.peer, action.author, action.reason)

    def _close_peer(self, action: Close) -> None:
        log.warning("a peer broke the protocol and is dropped: %s", action.reason)
        self._transport.close(action.peer, action.reason)
