"""`Pending`: what is under way, to be awaited on any event loop or waited for in any thread."""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

GLANCE = 0.2
"""Seconds that a thread waits at a stretch."""

OWN_THREAD = (
    "result() would block the swarm's own thread, which has to do the very work it waits for: "
    "`await` it in a coroutine handler, or call result() from another thread"
)


class Pending(Generic[T]):
    """An operation under way: ``await`` it on any event loop, or call `result` from any thread but the swarm's own.

    Any number may wait for it, in both ways at once. Whoever stops waiting (a timeout, a cancelled task, Ctrl-C)
    stops waiting and nothing else: the operation goes on. An exception that nobody fetches is dropped silently.

    The owner resolves it with `set_result` or `set_exception`, from any thread; the first call wins.

    Args:
        is_own_thread: tells whether the calling thread is one that the operation needs, where `result` must not block.
    """

    __slots__ = ("__weakref__", "_done", "_exception", "_is_own_thread", "_lock", "_traceback", "_value", "_waiters")

    def __init__(self, is_own_thread: Callable[[], bool]) -> None:
        self._is_own_thread = is_own_thread
        # Reentrant: a signal handler may resolve or ask while the main thread is inside one of our few locked lines.
        self._lock = threading.RLock()
        self._waiters: dict[object, Callable[[], object]] = {}
        self._done = False
        self._value: T | None = None
        self._exception: BaseException | None = None
        self._traceback: TracebackType | None = None

    def __repr__(self) -> str:
        if not self._done:
            return "<Pending>"
        return f"<Pending raised {self._exception!r}>" if self._exception is not None else f"<Pending result={self._value!r}>"

    def done(self) -> bool:
        """Whether it has ended, well or with an exception."""
        return self._done

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end and return the result.

        Args:
            timeout: seconds to wait at most; for ever if None.

        Raises:
            TimeoutError: not done in time. The operation goes on.
            RuntimeError: called on the swarm's own thread (also when it is done: whether this works must not depend on luck).
            BaseException: whatever the operation ended with, for instance `SwarmLeft`.
        """
        if self._is_own_thread():
            raise RuntimeError(OWN_THREAD)
        if not self._done:
            # A bare lock, since acquiring one is a single call that Ctrl-C interrupts and that leaves nothing half done. A Ctrl-C
            # that comes in the moment before does not end the wait, though, hence the glances.
            gate = threading.Lock()
            gate.acquire()
            key = object()
            try:
                if self._add_waiter(key, gate.release):
                    deadline = None if timeout is None else time.monotonic() + timeout
                    left = GLANCE if timeout is None else min(GLANCE, max(0.0, timeout))
                    while not gate.acquire(timeout=left) and left > 0:
                        left = GLANCE if deadline is None else min(GLANCE, max(0.0, deadline - time.monotonic()))
            finally:
                self._waiters.pop(key, None)
            if not self._done:
                raise TimeoutError(f"not done within {timeout} s; it goes on")
        return self._outcome()

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            loop = asyncio.get_running_loop()
            woken: asyncio.Future[None] = loop.create_future()
            key = object()

            def wake() -> None:
                if not woken.done():
                    woken.set_result(None)

            def wake_from_anywhere() -> None:
                loop.call_soon_threadsafe(wake)

            try:
                if self._add_waiter(key, wake_from_anywhere):
                    yield from woken
            finally:
                self._waiters.pop(key, None)
        return self._outcome()

    def set_result(self, value: T) -> None:
        """End it with a result. From any thread; does nothing if it has ended already."""
        self._resolve(value, None)

    def set_exception(self, exception: BaseException) -> None:
        """End it with an exception. From any thread; does nothing if it has ended already."""
        self._resolve(None, exception)

    def when_done(self, function: Callable[[], object]) -> None:
        """Have ``function()`` called at the end, by whoever ends it; at once if that has passed."""
        if not self._add_waiter(object(), function):
            function()

    def _add_waiter(self, key: object, wake: Callable[[], object]) -> bool:
        """Have ``wake`` called at the end; False if that has passed."""
        with self._lock:
            if not self._done:
                self._waiters[key] = wake
            return not self._done

    def _resolve(self, value: T | None, exception: BaseException | None) -> None:
        with self._lock:
            if self._done:
                return
            self._value = value
            self._exception = exception
            self._traceback = None if exception is None else exception.__traceback__
            self._done = True
            waiters = list(self._waiters.values())
            self._waiters.clear()
        for wake in waiters:
            try:
                wake()
            except RuntimeError:
                continue  # the loop of that awaiter has been closed: nobody waits there any more

    def _outcome(self) -> T:
        if self._exception is None:
            return cast(T, self._value)
        try:
            # The traceback is reset, or each raise would lengthen the one that all waiters share.
            raise self._exception.with_traceback(self._traceback)
        finally:
            del self  # or the traceback, the frame and this object would keep one another alive
