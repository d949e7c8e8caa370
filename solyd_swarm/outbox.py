"""What a swarm publishes: numbered at the call, handed to the core once a turn, accounted for until others hold it."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from solyd_swarm.core.events import Publish
from solyd_swarm.errors import MessageTooLarge, SwarmBusy, SwarmLeft
from solyd_swarm.options import SwarmOptions
from solyd_swarm.pending import Pending

log = logging.getLogger("solyd_swarm.outbox")


class Outbox:
    """The messages of one swarm on their way to the core. `add` may be called from any thread, all else on the loop.

    Args:
        id_prefix: a message's id, but for its sequence number.
        has_peers: tells whether there is a neighbour.
        call: has a function called on the loop.
        feed: hands a batch to the core.

    Attributes:
        published: the last sequence number given.
        by_any, by_all, lost: as the core's `Progress` says.
    """

    def __init__(
        self,
        id_prefix: str,
        options: SwarmOptions,
        *,
        has_peers: Callable[[], bool],
        call: Callable[..., None],
        feed: Callable[[Publish], None],
    ) -> None:
        self.published = 0
        self.by_any = 0
        self.by_all = 0
        self.lost = 0
        self._id_prefix = id_prefix
        self._max_message_size = options.max_message_size
        self._publish_buffer = options.publish_buffer
        self._retain_bytes = options.retain_bytes
        self._has_peers = has_peers
        self._call = call
        self._feed = feed
        # Reentrant: a signal handler may publish while the main thread does.
        self._lock = threading.RLock()
        self._closed = False
        self._outgoing: list[bytes] = []  # the last messages published, up to `published`
        self._outgoing_bytes = 0
        self._drain_scheduled = False
        self._unaccepted: deque[tuple[int, int]] = deque()  # (last sequence, bytes) that no neighbour has acknowledged
        self._unaccepted_bytes = 0
        self._flushes: list[tuple[int, Pending[None]]] = []
        self._changed = asyncio.Event()

    # -- from any thread --------------------------------------------------------------------------------------

    def add(self, data: bytes) -> str:
        """Takes in an encoded message and returns its id. Raises `MessageTooLarge`, `SwarmBusy`, `SwarmLeft`."""
        size = len(data)
        if size > self._max_message_size:
            raise MessageTooLarge(
                f"the message is {size} bytes long when encoded, and max_message_size is {self._max_message_size}: "
                "publish it in parts, or give pubsub() a larger max_message_size"
            )
        with self._lock:
            if self._closed:
                raise SwarmLeft("the swarm has left: publish before leave(), or make a new one with pubsub()")
            if self._outgoing_bytes + self._unaccepted_bytes + size > self._publish_buffer:
                self._check_room(size)
            self.published = sequence = self.published + 1
            self._outgoing.append(data)  # right after it: a signal handler that publishes cannot come between
            self._outgoing_bytes += size
            schedule, self._drain_scheduled = not self._drain_scheduled, True
        if schedule:
            self._call(self.drain)
        return f"{self._id_prefix}{sequence}"

    def _check_room(self, size: int) -> None:
        """Raises `SwarmBusy`. Alone, the window is the buffer: what does not fit drops its oldest."""
        has_peers = self._has_peers()
        limit = self._publish_buffer if has_peers else max(self._publish_buffer, self._retain_bytes)
        waiting = self._outgoing_bytes + (self._unaccepted_bytes if has_peers else 0)
        if waiting and waiting + size > limit:
            raise SwarmBusy(
                f"{waiting} bytes published are not yet accepted by any neighbour, and the publish buffer holds {limit}: "
                "wait for swarm.flush(), then try again"
            )

    def close(self) -> bool:
        """Takes no more. False where that was said before."""
        with self._lock:
            was, self._closed = self._closed, True
            return not was

    # -- on the loop ------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Hands what was published since the last turn to the core, as one batch."""
        with self._lock:
            batch, self._outgoing = self._outgoing, []
            size, self._outgoing_bytes = self._outgoing_bytes, 0
            last = self.published
            self._drain_scheduled = False
            if batch:
                self._note_unaccepted(last, size)
        if batch:
            self._feed(Publish(last - len(batch) + 1, time.time_ns() // 1000, batch))

    def _note_unaccepted(self, last: int, size: int) -> None:
        """Keeps account of what no neighbour has; in a bounded number of entries, and no more of it than is kept."""
        entries = self._unaccepted
        self._unaccepted_bytes += size
        if entries and entries[-1][1] + size <= self._publish_buffer // 64:
            size += entries.pop()[1]
        entries.append((last, size))
        while len(entries) > 1 and self._unaccepted_bytes > max(self._publish_buffer, self._retain_bytes):
            self._unaccepted_bytes -= entries.popleft()[1]

    def progress(self, by_any: int, by_all: int, lost: int) -> None:
        """Others have acknowledged more."""
        self.by_any, self.by_all, self.lost = by_any, by_all, lost
        with self._lock:
            while self._unaccepted and self._unaccepted[0][0] <= by_any:
                self._unaccepted_bytes -= self._unaccepted.popleft()[1]
        self._changed.set()
        self.settle()

    def flush(self, sequence: int, pending: Pending[None]) -> None:
        """Resolves `pending` once everything up to this number is held by every present neighbour, and by one at least."""
        self._flushes.append((sequence, pending))
        self.settle()

    def settle(self) -> None:
        """Resolves the flushes that are done; to be called also when a neighbour has gone."""
        waiting = []
        for sequence, pending in self._flushes:
            if self.by_any >= sequence and (not self._has_peers() or self.by_all >= sequence):
                pending.set_result(None)
            else:
                waiting.append((sequence, pending))
        self._flushes = waiting

    def give_up(self, error: Exception) -> None:
        """No flush can be done any more."""
        flushes, self._flushes = self._flushes, []
        for _, pending in flushes:
            pending.set_exception(error)

    async def wait_for_acks(self, seconds: float) -> None:
        """Returns when some neighbour holds everything published, there is none any more, or the time is up."""
        try:
            async with asyncio.timeout(seconds):
                while self._has_peers() and self.by_any < self.published:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.debug("leaving before everything published was acknowledged")

    @property
    def acknowledged(self) -> int:
        """How many messages at least one neighbour holds, or held."""
        return max(0, self.by_any - self.lost)
