"""Trying for a neighbour whether it can be dialled, and having it tried for us (the idea: libp2p's AutoNAT).

What is dialled is only the host at which we see the asker ourselves, so that nobody can have us knock at a third one's door; from a
port of its own, which no translator in between has been taught by earlier packets to let in.
"""

import asyncio
import logging
from collections.abc import Callable

from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.net import reach_frames as frames
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.connection import Connection
from solyd_swarm.net.dialler import connect
from solyd_swarm.net.listening_port import ListeningPort
from solyd_swarm.net.rates import Rates

log = logging.getLogger("solyd_swarm.net.dial_back")

TRY_TIMEOUT = 4.0
"""Seconds for a dial, handshake included."""
MAX_TRIES = 8
"""Dials for others at once: bounds the sockets that they take."""


class _Visit:
    """The owner of a channel that is opened to see who answers, and closed."""

    def __init__(self) -> None:
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def channel_ready(self, channel: Channel) -> None:
        self._done(True)

    def channel_frames(self, channel: Channel, frames: list[bytes]) -> None:
        """Nothing is wanted."""

    def channel_backlog(self, channel: Channel, size: int) -> None:
        """Nothing is sent."""

    def channel_closed(self, channel: Channel, reason: str) -> None:
        self._done(False)

    def _done(self, outcome: bool) -> None:
        if not self.ready.done():
            self.ready.set_result(outcome)


class DialBack:
    """Serves TRY; ends with `close`.

    Args:
        make: makes a channel that dials, for an owner.
        may_go: whether packets may go to an IP literal.
    """

    def __init__(self, make: Callable[[_Visit], Channel], may_go: Callable[[str], bool]) -> None:
        self._make = make
        self._may_go = may_go
        # Bounds what neighbours can have us dial: a few at once each, then one in a quarter of a minute.
        self._rates = Rates(4, 15.0, 24, 1.0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def serve(self, asker: Connection, request: frames.Try) -> None:
        """Dials the asker, if that is no more than it may ask, and tells it."""
        host, port = request.address
        now = asyncio.get_running_loop().time()
        mine = host == asker.host and scope_of(host) == "global" and port > 0 and self._may_go(host)
        if self._closed or not mine or len(self._tasks) >= MAX_TRIES or not self._rates.take(host, now):
            log.debug("not dialling back %s port %d", host, port)
            asker.channel.send(frames.encode(frames.Tried(request.ip, port, frames.REFUSED)))
            return
        task = asyncio.get_running_loop().create_task(self._serve(asker, request), name="solyd_swarm dial back")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a dial for a neighbour failed unexpectedly", exc_info=error)

    async def _serve(self, asker: Connection, request: frames.Try) -> None:
        host, port = request.address
        reached = False
        try:
            async with asyncio.timeout(TRY_TIMEOUT):
                reached = await self._visit(host, port) == asker.instance
        except (OSError, ValueError, OverflowError) as error:
            log.debug("dialling back %s port %d failed: %s", host, port, error or type(error).__name__)
        asker.channel.send(frames.encode(frames.Tried(request.ip, port, frames.REACHED if reached else frames.FAILED)))

    async def _visit(self, host: str, port: int) -> bytes:
        """The instance that answers there; empty if none does."""
        endpoint = await connect(ListeningPort(), host, port)
        visit = _Visit()
        channel = self._make(visit)
        try:
            await asyncio.get_running_loop().create_connection(lambda: channel, sock=endpoint)
        except BaseException:
            endpoint.close()
            raise
        try:
            found = channel.remote_instance if await visit.ready else b""
            channel.close("it was only tried")  # drains: the asker is to read who came
            await channel.wait_closed()
            return found
        finally:
            channel.abort("it was only tried")

    async def close(self) -> None:
        """Gives up what is being tried."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
