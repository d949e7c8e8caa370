"""pyee's emitter, with what a swarm promises on top: `emit` never raises, coroutine handlers run one call at a time.

A handler's exception becomes an `error` event, or is logged with its traceback where nobody listens; the other handlers
still run. An `error` handler's own exception is only logged.
"""

import asyncio
import difflib
import inspect
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from pyee.base import EventEmitter

log = logging.getLogger("solyd_swarm.handlers")

EVENTS = ("message", "received", "connected", "disconnected", "neighbor_up", "neighbor_down", "lagged", "equivocation", "error", "left")
MAX_CALLS = 65_536
"""Calls that wait for one coroutine handler; beyond it the newest are dropped and counted as lag."""


class CoroutineWorker:
    """Runs the coroutines of one handler one at a time, in order, as a task of a loop that ends when it has nothing to do."""

    def __init__(self, call: Callable[..., None], report: Callable[[BaseException], None]) -> None:
        self._call = call
        self._report = report
        self._queue: deque[Coroutine[Any, Any, Any]] = deque()
        self.task: asyncio.Task[None] | None = None

    def add(self, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Queues a call, from any thread; False where too many wait."""
        if len(self._queue) >= MAX_CALLS:
            coroutine.close()
            return False
        self._queue.append(coroutine)
        if len(self._queue) == 1 or self.task is None:
            self._call(self._start)
        return True

    def drop(self) -> None:
        """Forgets the calls that wait; the one that runs is left alone."""
        while self._queue:
            self._queue.popleft().close()

    def _start(self) -> None:
        if self.task is None and self._queue:
            self.task = asyncio.get_running_loop().create_task(self._work(), name="solyd_swarm handler")

    async def _work(self) -> None:
        try:
            while self._queue:
                coroutine = self._queue.popleft()
                try:
                    await coroutine
                except Exception as error:  # noqa: BLE001  # a handler's: reported to the swarm
                    self._report(error)
        finally:
            self.task = None
            if self._queue:
                self._start()


class SwarmEmitter(EventEmitter):
    """The emitter of a swarm. Handlers are called by `emit`, on the thread that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: dict[Any, CoroutineWorker] = {}

    # What a swarm provides.

    def _call_on_loop(self, function: Callable[..., object], *args: Any) -> None:
        raise NotImplementedError

    def _report_error(self, error: BaseException) -> None:
        raise NotImplementedError

    def _lagged(self, count: int) -> None:
        raise NotImplementedError

    def _listener_added(self, event: str, handler: Callable[..., Any]) -> None:
        raise NotImplementedError

    # What pyee calls.

    def emit(self, event: str, *args: Any, **kwargs: Any) -> bool:
        """Calls the event's handlers with the arguments; whether there were any. Never raises because of a handler."""
        with self._lock:
            handlers = list(self._events.get(event, {}).items())
        for key, handler in handlers:
            self._run(event, key, handler, args, kwargs)
        return bool(handlers)

    def _run(self, event: str, key: Any, handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            result = handler(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the handler's: reported, and the other handlers still run
            self._failed(event, error)
            return
        if inspect.iscoroutine(result):
            worker = self._workers.get(key)
            if worker is None:
                worker = self._workers[key] = CoroutineWorker(self._call_on_loop, lambda error: self._failed(event, error))
            if not worker.add(result):
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
        super()._add_event_handler(event, k, v)
        self._listener_added(event, v)

    def handles(self, event: str) -> bool:
        """Whether the event has a handler."""
        return bool(self._events.get(event))

    def running_handlers(self) -> "list[asyncio.Task[None]]":
        """Tasks of the coroutine handlers that are at work."""
        return [worker.task for worker in list(self._workers.values()) if worker.task is not None]

    def drop_waiting(self) -> None:
        """Forgets the calls that wait for coroutine handlers."""
        for worker in list(self._workers.values()):
            worker.drop()
