"""How a swarm leaves: from any thread or handler, once, within bounds; also when the loop it lives on ends first."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from solyd_swarm import lifetime
from solyd_swarm.home import Executor, Home
from solyd_swarm.outbox import Outbox
from solyd_swarm.pending import Pending

log = logging.getLogger("solyd_swarm.swarm")

ACK_WAIT = 0.25
"""Seconds that leaving waits for what was just published to be acknowledged by somebody."""
HANDLER_WAIT = 0.5
"""Seconds that leaving waits for handlers to finish what is queued."""


class Leaver(lifetime.Owner, Protocol):
    """The swarm, as its departure sees it. All of it is called on the loop."""

    topic: str

    def say_goodbye(self) -> None:
        """Ends the topic, and all who wait for something in it. May be called twice."""

    async def close_node(self) -> None:
        """Closes the node, if it is the swarm's own. May be called twice."""

    def leave_loop(self) -> Pending[None] | None:
        """The last step; what it returns is done when our own loop has ended, None where it is the user's."""

    def running_handlers(self) -> "list[asyncio.Task[None]]":
        """Handlers that are at work."""

    def drop_waiting(self) -> None:
        """Handlers that have not begun never will."""


class Departure:
    """The way out of one swarm.

    Args:
        is_own_thread: whether the caller is on the loop or in a handler, and must not block.
    """

    def __init__(self, swarm: Leaver, home: Home, executor: Executor, outbox: Outbox, is_own_thread: Callable[[], bool]) -> None:
        self.begun = False
        """Whether anybody has asked for it: nothing can be published any more."""
        self.done: Pending[None] = Pending(is_own_thread)
        """Done when nothing is left behind."""
        self._done_for_handlers: Pending[None] = Pending(is_own_thread)
        self._swarm = swarm
        self._home = home
        self._executor = executor
        self._outbox = outbox
        self._is_own_thread = is_own_thread
        # Reentrant: collecting garbage may close an iterator anywhere.
        self._state = threading.RLock()
        self._bounds = (ACK_WAIT, HANDLER_WAIT)
        self._callers: set[asyncio.Task[Any]] = set()  # tasks that asked us to leave, on the loop
        self._task: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> bool:
        """Whether the first step has been taken, on the loop."""
        return self._task is not None

    def begin(self, within: float | None = None) -> None:
        """Begins; idempotent. `within`: seconds there are, when the process ends."""
        if within is not None:
            self._bounds = (min(ACK_WAIT, within / 6), min(HANDLER_WAIT, within / 6))
        with self._state:
            if self.begun:
                return
            self.begun = True
            self._outbox.close()
        self._home.call(self._start)

    def pending(self) -> Pending[None]:
        """What the caller may wait for: a handler cannot wait for its own end."""
        if not self._is_own_thread():
            return self.done
        if self._home.is_current() and (task := asyncio.current_task()) is not None:
            self._callers.add(task)
        return self._done_for_handlers

    async def end_with_loop(self) -> None:
        """The user's loop ends and has cancelled all tasks: leave all the same. Handlers end with the loop, as any task."""
        self._swarm.drop_waiting()
        self.begin()
        await self.done
        self._swarm.drop_waiting()
        handlers = self._swarm.running_handlers()
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

    def _start(self) -> None:
        self._task = self._home.loop.create_task(self._run(), name="solyd_swarm leave")
        self._task.add_done_callback(self._after)

    async def _run(self) -> None:
        """Every step may be taken twice: a loop that ends cancels this task too, and it begins again."""
        self._outbox.drain()
        await self._outbox.wait_for_acks(self._bounds[0])
        self._swarm.say_goodbye()
        closed = self._executor.close(self._bounds[1])
        await self._let_handlers_finish(closed)
        await self._swarm.close_node()
        self._done_for_handlers.set_result(None)
        self._swarm.drop_waiting()
        if self._home.keeps_alive and (callers := [task for task in self._callers if not task.done()]):
            # Our own loop ends with us, and cancels what runs.
            await asyncio.wait(callers, timeout=self._bounds[1])

    async def _let_handlers_finish(self, closed: Pending[int]) -> None:
        """Waits, within bounds, for handlers at work; not for one that may itself be waiting for us."""
        try:
            async with asyncio.timeout(self._bounds[1] + 0.1):
                await closed
                while handlers := [task for task in self._swarm.running_handlers() if task not in self._callers]:
                    await asyncio.wait(handlers)
        except TimeoutError:
            log.debug("a handler is still at work; it is left to itself")

    def _after(self, task: "asyncio.Task[None]") -> None:
        """The last step: what is left of us ends with the task that is done now."""
        if task.cancelled() and not self._done_for_handlers.done():
            self._start()
            return
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("leaving %r failed", self._swarm.topic, exc_info=error)
        self._done_for_handlers.set_result(None)
        gone = self._swarm.leave_loop()
        if gone is None:
            self._finish()
        else:
            gone.when_done(self._finish)

    def _finish(self) -> None:
        lifetime.unregister(self._swarm)
        self.done.set_result(None)
