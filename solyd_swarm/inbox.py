"""Bounded queues between the loop, which must never wait, and those who consume messages at their own pace."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from solyd_swarm.errors import PayloadError
from solyd_swarm.message import Batch, Message

MAX_BATCHES = 262_144
"""Bounds a flood of small envelopes, as the log does: the oldest go first."""


class Inbox:
    """Batches that wait for one consumer: bounded in bytes, the oldest go first. Thread-safe, and calls nobody.

    Args:
        max_bytes: what may wait.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # reentrant: collecting garbage may close an iterator anywhere
        self._batches: deque[tuple[float, Batch]] = deque()
        self._bytes = 0
        self._promised = 0

    def __len__(self) -> int:
        return len(self._batches)

    def put(self, batch: Batch) -> int:
        """Adds a batch; never waits. How many messages had to go for it."""
        lost = 0
        with self._lock:
            self._batches.append((time.monotonic(), batch))
            self._bytes += batch.size
            while len(self._batches) > 1 and (self._bytes > self._max_bytes or len(self._batches) > MAX_BATCHES):
                lost += len(self._pop())
        return lost

    def put_back(self, batches: Iterable[Batch]) -> None:
        """Batches that were taken but not consumed are the next ones again."""
        now = time.monotonic()
        with self._lock:
            for batch in reversed(list(batches)):
                self._batches.appendleft((now, batch))
                self._bytes += batch.size

    def take(self) -> Batch | None:
        """The oldest batch, or None."""
        with self._lock:
            return self._pop() if self._batches else None

    def take_all(self) -> list[Batch]:
        """Everything that waits."""
        with self._lock:
            batches, self._batches, self._bytes = [batch for _, batch in self._batches], deque(), 0
            return batches

    def waiting(self) -> list[Batch]:
        """What waits; it goes on waiting."""
        with self._lock:
            return [batch for _, batch in self._batches]

    def drop_older(self, seconds: float) -> None:
        """Forgets what has waited longer than so many seconds."""
        until = time.monotonic() - seconds
        with self._lock:
            while self._batches and self._batches[0][0] < until:
                self._pop()

    def drop_shared(self) -> None:
        """Forgets what iterators have got too."""
        with self._lock:
            self._batches = deque(entry for entry in self._batches if not entry[1].shared)
            self._bytes = sum(batch.size for _, batch in self._batches)

    def promise(self) -> int:
        """How many calls of a handler are to be scheduled, one for each batch that has none yet; `redeem` counts them off."""
        with self._lock:
            missing = max(0, len(self._batches) - self._promised)
            self._promised += missing
            return missing

    def redeem(self) -> None:
        """A call that was promised has come."""
        with self._lock:
            self._promised -= 1

    def _pop(self) -> Batch:
        batch = self._batches.popleft()[1]
        self._bytes -= batch.size
        return batch


class MessageIterator(Iterator[Message], AsyncIterator[Message]):
    """Yields messages, with ``for`` in a thread or ``async for`` on any loop; ends when the swarm has left.

    Each iterator has a bounded queue of its own. What cannot be decoded is skipped; it is an `error` event.

    Args:
        max_bytes: as for `Inbox`.
        on_error: told of what cannot be decoded.
        on_close: told that this iterator is not used any more, with a function that returns what was not consumed. Called from
            any thread, between any two lines, since garbage collection may close an iterator: it must not wait for a lock.
        is_own_thread: tells whether a blocking ``for`` would block the swarm itself.
    """

    def __init__(
        self,
        max_bytes: int,
        on_error: Callable[[PayloadError], None],
        on_close: Callable[["MessageRest"], None],
        is_own_thread: Callable[[], bool],
    ) -> None:
        self._rest = MessageRest(max_bytes)
        self._on_error = on_error
        self._on_close = on_close
        self._is_own_thread = is_own_thread
        self._lock = threading.RLock()
        self._waiters: dict[Callable[[], None], None] = {}
        self._ended = False
        self._closed = False

    @property
    def rest(self) -> "MessageRest":
        """What was not consumed."""
        return self._rest

    def put(self, batch: Batch) -> int:
        """A batch has arrived. How many messages had to go for it."""
        lost = self._rest.inbox.put(batch)
        self._wake()
        return lost

    def end(self) -> None:
        """The swarm has left: what waits is still yielded."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """Not used any more; what was not consumed goes back to the swarm. Whoever waits for a message is told the end."""
        if not self._closed:
            self._closed = True
            self._on_close(self._rest)
            self._wake()

    def __del__(self) -> None:
        if not self._closed:
            self._on_close(self._rest)

    def __iter__(self) -> "MessageIterator":
        return self

    def __next__(self) -> Message:
        if self._is_own_thread():
            raise RuntimeError("`for message in swarm` would block the swarm's own thread: use `async for`, or another thread")
        while (message := self._next()) is None:
            gate = threading.Event()
            wake_thread = gate.set
            if self._wait(wake_thread):
                try:
                    gate.wait()
                finally:
                    self._waiters.pop(wake_thread, None)
            elif self._is_over():
                raise StopIteration
        return message

    def __aiter__(self) -> "MessageIterator":
        return self

    async def __anext__(self) -> Message:
        while (message := self._next()) is None:
            loop = asyncio.get_running_loop()
            gate: asyncio.Future[None] = loop.create_future()

            def wake(loop: asyncio.AbstractEventLoop = loop, gate: "asyncio.Future[None]" = gate) -> None:
                loop.call_soon_threadsafe(lambda: None if gate.done() else gate.set_result(None))

            if self._wait(wake):
                try:
                    await gate
                finally:
                    self._waiters.pop(wake, None)
            elif self._is_over():
                raise StopAsyncIteration
        return message

    def _next(self) -> Message | None:
        while not self._closed and (place := self._rest.next()) is not None:
            batch, index = place
            try:
                return batch.message(index, batch.decode(index))
            except PayloadError as error:
                self._on_error(error)
        return None

    def _is_over(self) -> bool:
        return self._closed or (self._ended and not len(self._rest.inbox))

    def _wait(self, wake: Callable[[], None]) -> bool:
        """Has `wake` called when there is something new; False where there is already, or never will be."""
        with self._lock:
            if len(self._rest.inbox) or self._ended or self._closed:
                return False
            self._waiters[wake] = None
            return True

    def _wake(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, {}
        for wake in waiters:
            try:
                wake()
            except RuntimeError:
                continue  # the loop of that consumer has been closed


class MessageRest:
    """What one iterator has not consumed: the messages left of the batch at hand, and the batches that wait. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.inbox = Inbox(max_bytes)
        self._current: Batch | None = None
        self._index = 0
        self._lock = threading.RLock()

    def next(self) -> tuple[Batch, int] | None:
        """The place of the next message, which is consumed with that; None if there is none."""
        with self._lock:
            batch = self._current
            if batch is None:
                batch = self._current = self.inbox.take()
                if batch is None:
                    return None
                self._index = batch.start
            index = self._index
            self._index = index + 1
            if self._index >= batch.end:
                self._current = None
            return batch, index

    def take_all(self) -> list[Batch]:
        """All of it; nothing is left."""
        with self._lock:
            current, self._current = self._current, None
            return [*([current.rest(self._index)] if current is not None else []), *self.inbox.take_all()]

    def waiting(self) -> list[Batch]:
        """All of it; it goes on waiting."""
        with self._lock:
            return [*([self._current.rest(self._index)] if self._current is not None else []), *self.inbox.waiting()]
