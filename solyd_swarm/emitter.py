"""pyee's emitter, with what a swarm promises on top: `emit` never raises, coroutine handlers run one call at a time.

A handler's exception becomes an `error` event, or is logged with its traceback where nobody listens; the other handlers
still run. An `error` handler's own exception is only logged.
"""

import asyncio
import difflib
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any

from pyee.base import EventEmitter

log = logging.getLogger("solyd_swarm.handlers")

EVENTS = ("message", "received", "connected", "disconnected", "neighbor_up", "neighbor_down", "lagged", "equivocation", "error", "left")
MAX_CALLS = 65_536
"""Calls that wait for one coroutine handler; beyond it the newest are dropped and counted as lag."""
MANY_CALLS = 16
"""Calls that wait for one coroutine handler, from which on messages wait where their bytes are bounded."""


Handlers = tuple[tuple[Any, Callable[..., Any]], ...]
"""What a user named as handler, and what is called for it (pyee wraps those of `once`)."""


class CoroutineWorker:
    """Runs the coroutines of one handler one at a time, in order, as a task of a loop that ends when it has nothing to do.

    Args:
        call: has a function called on the loop.
        report: told of the event and the exception where a call raised.
        on_drained: called on the loop when fewer than `MANY_CALLS` wait again.
    """

    def __init__(self, call: Callable[..., None], report: Callable[[str, BaseException], None], on_drained: Callable[[], None]) -> None:
        self._call = call
        self._report = report
        self._on_drained = on_drained
        self._queue: deque[tuple[str, Coroutine[Any, Any, Any]]] = deque()
        self.task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, event: str, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Queues a call, from any thread; False where too many wait."""
        if len(self._queue) >= MAX_CALLS:
            coroutine.close()
            return False
        self._queue.append((event, coroutine))
        if len(self._queue) == 1 or self.task is None:
            self._call(self._start)
        return True

    def drop(self) -> None:
        """Forgets the calls that wait; the one that runs is left alone."""
        while self._queue:
            self._queue.popleft()[1].close()

    def _start(self) -> None:
        if self.task is None and self._queue:
            self.task = asyncio.get_running_loop().create_task(self._work(), name="solyd_swarm handler")

    async def _work(self) -> None:
        try:
            while self._queue:
                event, coroutine = self._queue.popleft()
                if len(self._queue) == MANY_CALLS - 1:
                    self._on_drained()
                try:
                    await coroutine
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    self._report(event, error)  # not ours: of something that the handler waited for
                except Exception as error:  # noqa: BLE001  # a handler's: reported to the swarm
                    self._report(event, error)
        finally:
            self.task = None
            if self._queue:
                self._start()


class SwarmEmitter(EventEmitter, ABC):
    """The emitter of a swarm. Handlers are called by `emit`, on the thread that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: dict[Any, CoroutineWorker] = {}  # replaced, never changed in place while somebody may go through it
        self._workers_lock = threading.RLock()
        self._ungreeted: dict[Callable[..., Any], None] = {}  # `connected` handlers that may have missed the event
        # Handlers by event, as of the last look: thousands of messages come between two changes.
        self._current: dict[str, Handlers] = {}

    # What a swarm provides.

    @abstractmethod
    def _call_on_loop(self, function: Callable[..., object], *args: Any) -> None:
        """Has a function called on the loop, from any thread."""

    @abstractmethod
    def _report_error(self, error: BaseException) -> None:
        """A handler raised."""

    @abstractmethod
    def _lagged(self, count: int) -> None:
        """Calls of a coroutine handler were dropped."""

    @abstractmethod
    def _listener_added(self, event: str) -> None:
        """An event has one handler more."""

    @abstractmethod
    def _drained(self) -> None:
        """On the loop: a coroutine handler is not behind any more."""

    # What pyee calls.

    def emit(self, event: str, *args: Any, **kwargs: Any) -> bool:
        """Calls the event's handlers with the arguments; whether there were any. Never raises because of a handler."""
        handlers = self.handlers_of(event)
        self.run(event, handlers, args, kwargs)
        return bool(handlers)

    def handlers_of(self, event: str) -> Handlers:
        """The event's handlers now."""
        handlers = self._current.get(event)
        if handlers is None:
            with self._lock:
                handlers = self._current[event] = tuple(self._events.get(event, {}).items())
        return handlers

    def run(self, event: str, handlers: Handlers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Calls these handlers; see `emit`."""
        for key, handler in handlers:
            try:
                result = handler(*args, **kwargs)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # the handler's: reported, the others still run
                self._failed(event, error)
                continue
            if result is not None and inspect.iscoroutine(result):
                self._queue(event, key, result)

    def _queue(self, event: str, key: Any, coroutine: Coroutine[Any, Any, Any]) -> None:
        with self._workers_lock:
            worker = self._workers.get(key)
            if worker is None:
                worker = CoroutineWorker(self._call_on_loop, self._failed, self._drained)
                idle_gone = {known: other for known, other in self._workers.items() if other or other.task is not None}
                self._workers = {**idle_gone, key: worker}
            has_room = worker.add(event, coroutine)
        if not has_room:
            self._lagged(1)

    def _failed(self, event: str, error: BaseException) -> None:
        if event == "error":
            log.error("a handler of the error event raised", exc_info=error)
        else:
            self._report_error(error)

    def _add_event_handler(self, event: str, k: Callable[..., Any], v: Callable[..., Any]) -> None:
        if not callable(k):
            raise TypeError(f"a handler is something callable, not {type(k).__name__}: {k!r}")
        if event not in EVENTS and event != "new_listener":
            close = difflib.get_close_matches(str(event), EVENTS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(EVENTS)}"
            log.warning("no swarm ever emits an event named %r%s", event, hint)
        self.emit("new_listener", event, k)
        with self._lock:
            handlers = self._events.setdefault(event, OrderedDict())
            if event == "connected" and k not in handlers:
                self._ungreeted[k] = None
            handlers[k] = v
            self._current.pop(event, None)
        self._listener_added(event)

    def emit_connected(self) -> None:
        """Emits `connected`, also to handlers added just now, which `greet` then passes over."""
        with self._lock:
            self._ungreeted.clear()
            handlers = tuple(self._events.get("connected", {}).items())
        self.run("connected", handlers, (), {})

    def greet(self, *, connected: bool) -> None:
        """Calls the `connected` handlers that were added while connected, each once."""
        with self._lock:
            present: dict[Callable[..., Any], Callable[..., Any]] = self._events.get("connected", {})
            handlers = tuple((key, present[key]) for key in self._ungreeted if key in present) if connected else ()
            self._ungreeted.clear()
        self.run("connected", handlers, (), {})

    def _remove_listener(self, event: str, f: Callable[..., Any]) -> None:
        """Called by pyee with the lock held."""
        super()._remove_listener(event, f)
        self._current.pop(event, None)

    def remove_all_listeners(self, event: str | None = None) -> None:
        """Removes the handlers of an event, or of all."""
        super().remove_all_listeners(event)
        with self._lock:
            self._current.clear()

    def handles(self, event: str) -> bool:
        """Whether the event has a handler."""
        return bool(self.handlers_of(event))

    def is_behind(self) -> bool:
        """Whether many calls wait for some coroutine handler."""
        return any(len(worker) >= MANY_CALLS for worker in self._workers.values())

    def running_handlers(self) -> "list[asyncio.Task[None]]":
        """Tasks of the coroutine handlers that are at work."""
        return [worker.task for worker in list(self._workers.values()) if worker.task is not None]

    def drop_waiting(self) -> None:
        """Forgets the calls that wait for coroutine handlers."""
        for worker in list(self._workers.values()):
            worker.drop()
