"""The two threads a script's swarm runs on: one turns the event loop, the other calls plain handlers.

Both are daemon threads, since a script ends when `solyd_swarm.lifetime` says so. Neither ends because of what a handler
does: exceptions are reported, and ``sys.exit`` in a handler ends the process by way of `lifetime.exit_from_handler`.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from solyd_swarm import lifetime
from solyd_swarm.pending import Pending

log = logging.getLogger("solyd_swarm.runtime")

T = TypeVar("T")
Call = tuple[Callable[..., object], tuple[Any, ...]]
OnExit = Callable[[SystemExit | KeyboardInterrupt], None]

CANCEL_TIMEOUT = 0.5
"""Seconds that tasks have to end once the loop stops and they are cancelled."""


class LoopThread:
    """One event loop in a daemon thread, started on first need.

    Args:
        loop_factory: makes the event loop, for instance ``uvloop.new_event_loop``; asyncio's own by default.
        on_exit: called with the ``SystemExit`` or ``KeyboardInterrupt`` that a callback or task on the loop let out.
        name: of the thread.
    """

    def __init__(
        self,
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        on_exit: OnExit = lifetime.exit_from_handler,
        name: str = "solyd_swarm loop",
    ) -> None:
        self._loop_factory = loop_factory or asyncio.new_event_loop
        self._on_exit = on_exit
        self._name = name
        self._birth = lifetime.birth()
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: dict[asyncio.Task[None], Pending[Any]] = {}
        self._stopped: Pending[None] = Pending(self.is_current)
        self._stopping = False
        _alive.add(self)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; starts the thread. Raises ``RuntimeError`` after `stop` and in a forked child."""
        with self._lock:
            if self._stopping or lifetime.forked(self._birth):
                raise RuntimeError("this loop has been stopped" if self._stopping else "this loop belongs to the parent process")
            if self._loop is None:
                loop = self._loop_factory()
                loop.set_exception_handler(_report)
                thread = threading.Thread(target=self._turn, args=(loop,), name=self._name, daemon=True)
                self._loop, self._thread = loop, thread
                try:
                    thread.start()
                except RuntimeError:  # at the very end of the process no thread can be started
                    self._loop = self._thread = None
                    loop.close()
                    raise
            return self._loop

    def is_current(self) -> bool:
        """Whether the calling thread is the one that turns the loop."""
        return self._thread is threading.current_thread()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have ``function(*args)`` called on the loop, soon and in order. From any thread; errors as for `loop`."""
        self.loop.call_soon_threadsafe(function, *args)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Pending[T]:
        """Run a coroutine as a task of the loop, from any thread; the task is cancelled by `stop`. Errors as for `loop`."""
        pending: Pending[T] = Pending(self.is_current)
        try:
            self.call(self._spawn, coroutine, pending)
        except RuntimeError:
            coroutine.close()
            raise
        return pending

    def stop(self) -> Pending[None]:
        """Cancel what runs, end the loop and its thread, for good. Returns at once; from any thread, any number of times.

        The result is done when the loop is closed. Tasks that resist being cancelled are abandoned after `CANCEL_TIMEOUT`.
        """
        with self._lock:
            if not self._stopping:
                self._stopping = True
                if self._loop is None or lifetime.forked(self._birth):
                    self._stopped.set_result(None)
                else:
                    self._loop.call_soon_threadsafe(self._loop.stop)
        return self._stopped

    def _spawn(self, coroutine: Coroutine[Any, Any, T], pending: Pending[T]) -> None:
        task = asyncio.get_running_loop().create_task(self._settle(coroutine, pending))
        self._tasks[task] = pending  # the loop itself holds tasks weakly

        def settled(done: asyncio.Task[None]) -> None:
            self._tasks.pop(done, None)
            if done.cancelled():  # before its first step, so that the coroutine never ran
                coroutine.close()
                pending.set_exception(asyncio.CancelledError())

        task.add_done_callback(settled)

    async def _settle(self, coroutine: Coroutine[Any, Any, T], pending: Pending[T]) -> None:
        try:
            pending.set_result(await coroutine)
        except (SystemExit, KeyboardInterrupt) as reason:
            pending.set_exception(reason)
            self._on_exit(reason)
        except asyncio.CancelledError as error:
            pending.set_exception(error)
            raise
        except Exception as error:  # noqa: BLE001  # it is handed to whoever asked
            pending.set_exception(error)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while True:
                try:
                    loop.run_forever()
                    break
                except (SystemExit, KeyboardInterrupt) as reason:
                    self._on_exit(reason)  # saying goodbye needs the loop: it goes on
            if not lifetime.forked(self._birth):
                loop.run_until_complete(_wind_up(loop))
        finally:
            # A forked child must not close it: that would take file descriptors out of the epoll set it shares with its parent.
            if not lifetime.forked(self._birth):
                asyncio.set_event_loop(None)
                loop.close()
                for abandoned in self._tasks.values():
                    abandoned.set_exception(asyncio.CancelledError())
                self._tasks.clear()
                self._stopped.set_result(None)

    def _after_fork_in_child(self) -> None:
        """If the child was forked by a handler on this very loop: let go of it as soon as the handler returns."""
        self._lock = threading.RLock()  # another thread may have held it
        if self.is_current() and self._loop is not None:
            self._loop.stop()
            # What is left of this turn would read from the pipe, shared with the parent, that wakes the parent's loop.
            for handle in getattr(self._loop, "_ready", ()):
                handle.cancel()


class Dispatcher:
    """A daemon thread that runs callables one at a time, in order; started on first need.

    The queue is bounded by its owner, who sees its length by ``len()``.

    Args:
        on_error: called on the dispatcher's thread with whatever a callable raised.
        on_exit: called with the ``SystemExit`` or ``KeyboardInterrupt`` of a callable. The dispatcher then ends: no handler
            runs after one that said ``sys.exit``.
        name: of the thread.
    """

    def __init__(
        self,
        on_error: Callable[[BaseException], object],
        *,
        on_exit: OnExit = lifetime.exit_from_handler,
        name: str = "solyd_swarm dispatcher",
    ) -> None:
        self._on_error = on_error
        self._on_exit = on_exit
        self._name = name
        self._birth = lifetime.birth()
        # Reentrant, so that a signal handler that posts cannot lock the main thread out of its own post.
        self._lock = threading.RLock()
        self._queue: deque[Call] = deque()
        self._batch: deque[Call] = deque()
        self._wake = threading.Lock()  # held while there is nothing to wake up for
        self._wake.acquire()
        self._idle = False
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None  # of time.monotonic(), once closing
        self._ended = False
        self._closed: Pending[int] = Pending(self.is_current)
        _alive.add(self)

    def __len__(self) -> int:
        """How many callables wait, without the one that runs."""
        return len(self._queue) + len(self._batch)

    def is_current(self) -> bool:
        """Whether the calling thread is the dispatcher's."""
        return self._thread is threading.current_thread()

    def post(self, function: Callable[..., object], *args: Any) -> bool:
        """Have ``function(*args)`` called, from any thread, without ever blocking. False (and nothing is done) once closing."""
        with self._lock:
            if self._deadline is not None or self._ended:
                return False
            self._queue.append((function, args))
            if self._idle or self._thread is None:
                self._rouse()
            return True

    def post_many(self, calls: Iterable[Call]) -> bool:
        """As `post`, for many ``(function, args)`` at once and for the price of one."""
        with self._lock:
            if self._deadline is not None or self._ended:
                return False
            self._queue.extend(calls)
            if self._queue and (self._idle or self._thread is None):
                self._rouse()
            return True

    def close(self, timeout: float) -> Pending[int]:
        """Take no more, finish what is queued within ``timeout`` seconds, then end. Returns at once, from any thread.

        Closing again can only shorten the time. The result is done when the thread is about to end, which a callable that
        hangs can put off for ever; it is the number of callables that were dropped.
        """
        with self._lock:
            deadline = time.monotonic() + timeout
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            if self._thread is None or lifetime.forked(self._birth):
                self._ended = True
                self._closed.set_result(0)
            elif self._idle:
                self._rouse()
        return self._closed

    def _rouse(self) -> None:
        """Wake or start the thread. Called with the lock held."""
        if self._idle:
            self._idle = False
            self._wake.release()
        elif self._thread is None and not lifetime.forked(self._birth):
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread = thread
            try:
                thread.start()
            except RuntimeError:  # at the very end of the process no thread can be started
                self._thread = None
                self._queue.clear()
                raise

    def _work(self) -> None:
        try:
            while self._take():
                self._run_batch()
        finally:
            if not lifetime.forked(self._birth):
                self._end()

    def _take(self) -> bool:
        """Wait for callables and make them the batch; False when it is time to end."""
        while not self._ended:
            with self._lock:
                if self._queue:
                    self._queue, self._batch = self._batch, self._queue  # the batch is empty here: the deques take turns
                    return True
                if self._deadline is not None:
                    return False
                self._idle = True
            self._wake.acquire()
        return False

    def _run_batch(self) -> None:
        take = self._batch.popleft
        batch = self._batch
        while batch:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._ended = True
            if self._ended:
                return
            function, args = take()
            try:
                function(*args)
            except (SystemExit, KeyboardInterrupt) as reason:
                self._ended = True
                self._on_exit(reason)
            except BaseException as error:  # noqa: BLE001  # a handler's CancelledError must not end the thread either
                self._hand_over(error)

    def _hand_over(self, error: BaseException) -> None:
        try:
            self._on_error(error)
        except (SystemExit, KeyboardInterrupt) as reason:
            self._ended = True
            self._on_exit(reason)
        except BaseException:
            log.exception("reporting a handler's exception failed")

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            dropped = len(self)
            self._queue.clear()
            self._batch.clear()
        if dropped:
            log.debug("dispatcher ends, %d calls dropped", dropped)
        self._closed.set_result(dropped)

    def _after_fork_in_child(self) -> None:
        """The child has no such thread, or is that thread, having been forked by a handler: it ends when the handler returns."""
        self._lock = threading.RLock()  # another thread may have held it
        self._ended = True


async def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel every task but this one and give them a moment to end."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        _, resisting = await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT)
        for task in resisting:
            log.warning("abandoned, since it resists being cancelled: %s", repr(task))  # a kept record must not keep the task
    await loop.shutdown_asyncgens()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what asyncio could not hand to anybody; sys.exit in a task is no error."""
    error = context.get("exception")
    if not isinstance(error, SystemExit | KeyboardInterrupt):
        log.error("%s", context.get("message", "error on the loop"), exc_info=error)


_alive: "weakref.WeakSet[LoopThread | Dispatcher]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for each in list(_alive):
        each._after_fork_in_child()


lifetime.call_in_child(_after_fork_in_child)
