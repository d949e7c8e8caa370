"""Bounded queues between the loop, which must never wait, and those who consume messages at their own pace."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from solyd_swarm.errors import PayloadError
from solyd_swarm.message import Batch, Message

if TYPE_CHECKING:
    from collections.abc import Iterable


class Inbox:
    """Batches that wait for one consumer: bounded in bytes, the oldest go first. Thread-safe.

    Args:
        max_bytes: what may wait.
        on_lag: told how many messages had to go.
    """

    def __init__(self, max_bytes: int, on_lag: Callable[[int], None]) -> None:
        self._max_bytes = max_bytes
        self._on_lag = on_lag
        self._lock = threading.Lock()
        self._batches: deque[Batch] = deque()
        self._bytes = 0

    def put(self, batch: Batch) -> None:
        """Adds a batch; never waits."""
        lost = 0
        with self._lock:
            self._batches.append(batch)
            self._bytes += batch.size
            while self._bytes > self._max_bytes and len(self._batches) > 1:
                oldest = self._batches.popleft()
                self._bytes -= oldest.size
                lost += len(oldest)
        if lost:
            self._on_lag(lost)

    def take(self) -> Batch | None:
        """The oldest batch, or None."""
        with self._lock:
            if not self._batches:
                return None
            batch = self._batches.popleft()
            self._bytes -= batch.size
            return batch

    def take_all(self) -> list[Batch]:
        """Everything that waits."""
        with self._lock:
            batches, self._batches, self._bytes = list(self._batches), deque(), 0
            return batches

    def __len__(self) -> int:
        return len(self._batches)


class MessageIterator(Iterator[Message], AsyncIterator[Message]):
    """Yields messages, with ``for`` in a thread or ``async for`` on any loop; ends when the swarm has left.

    Each iterator has a bounded queue of its own. What cannot be decoded is skipped; it is an `error` event.

    Args:
        max_bytes, on_lag: as for `Inbox`.
        on_error: told of what cannot be decoded.
        on_close: told, with what was not consumed, that this iterator is not used any more.
        is_own_thread: tells whether a blocking ``for`` would block the swarm itself.
    """

    def __init__(
        self,
        max_bytes: int,
        on_lag: Callable[[int], None],
        on_error: Callable[[PayloadError], None],
        on_close: Callable[["MessageIterator", "Iterable[Batch]"], None],
        is_own_thread: Callable[[], bool],
    ) -> None:
        self._inbox = Inbox(max_bytes, on_lag)
        self._on_error = on_error
        self._on_close = on_close
        self._is_own_thread = is_own_thread
        self._current: Batch | None = None
        self._index = 0
        self._lock = threading.Lock()
        self._waiters: list[Callable[[], None]] = []
        self._ended = False
        self._closed = False

    def put(self, batch: Batch) -> None:
        """A batch has arrived."""
        self._inbox.put(batch)
        self._wake()

    def end(self) -> None:
        """The swarm has left: what waits is still yielded."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """Not used any more; what was not consumed goes back to the swarm."""
        if self._closed:
            return
        self._closed = True
        rest = self._inbox.take_all()
        if self._current is not None and self._index < len(self._current.envelope.payloads):
            current = self._current
            rest.insert(0, Batch(current.envelope, current.propagation_source, current.late, current.topic, self._index))
        self._on_close(self, rest)
        self._wake()

    def __del__(self) -> None:
        self.close()

    def __iter__(self) -> "MessageIterator":
        return self

    def __next__(self) -> Message:
        if self._is_own_thread():
            raise RuntimeError("`for message in swarm` would block the swarm's own thread: use `async for`, or another thread")
        while (message := self._next()) is None:
            gate = threading.Event()
            if self._wait(gate.set):
                gate.wait()
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
                await gate
            elif self._is_over():
                raise StopAsyncIteration
        return message

    def _next(self) -> Message | None:
        while True:
            if self._current is None or self._index >= len(self._current.envelope.payloads):
                self._current = self._inbox.take()
                if self._current is None:
                    return None
                self._index = self._current.start
            batch, index = self._current, self._index
            self._index += 1
            try:
                return batch.message(index, batch.decode(index))
            except PayloadError as error:
                self._on_error(error)

    def _is_over(self) -> bool:
        return (self._ended or self._closed) and not len(self._inbox)

    def _wait(self, wake: Callable[[], None]) -> bool:
        """Has `wake` called when there is something new; False where there is already, or never will be."""
        with self._lock:
            if len(self._inbox) or self._ended or self._closed:
                return False
            self._waiters.append(wake)
            return True

    def _wake(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for wake in waiters:
            try:
                wake()
            except RuntimeError:
                continue  # the loop of that consumer has been closed
