"""Connects to candidates: all of them at the same time, the addresses of each a moment after one another.

Happy Eyeballs (RFC 8305): a dead address costs the delay, or nothing if it is refused; the first that completes the handshake wins.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from itertools import zip_longest

from solyd_swarm.core.events import Addresses
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.goals import Goal
from solyd_swarm.net.listening_port import ListeningPort
from solyd_swarm.net.sockaddr import socket_address

log = logging.getLogger("solyd_swarm.net.dialler")

CONNECT_TIMEOUT = 5.0
ATTEMPT_DELAY = 0.05
"""Seconds from one address of a candidate to the next. RFC 8305 (section 5) allows 0.01 to 2 and has 0.25 for web servers, which mind
twice the connections; a peer has many dead addresses (private networks, virtual interfaces), and each would cost as much."""
MAX_DIALS = 64
"""Candidates being dialled at once: bounds a source or peer that floods us with addresses. Beyond it a dial fails at once."""
MAX_ATTEMPTS = 128
"""Addresses being tried at once, over all dials: bounds the sockets that candidates with many addresses take. Others wait."""


Attempt = tuple[Channel, "asyncio.Future[bool]"]


class Dialler:
    """The dials on their way, each a task; ends with `close`.

    Args:
        make: makes a channel for the goals of a dial (more may be appended while it is on its way), and a future of whether its
            handshake completes.
        failed: told of a goal that nobody answered for.
        timeout: seconds for one address.
        port: opens the sockets.
    """

    def __init__(
        self,
        make: Callable[[list[Goal]], Attempt],
        failed: Callable[[Goal], None],
        *,
        timeout: float = CONNECT_TIMEOUT,
        port: ListeningPort | None = None,
    ) -> None:
        self._port = port or ListeningPort()
        self._make = make
        self._failed = failed
        self._timeout = timeout
        self._dials: dict[tuple[bytes, Addresses], list[Goal]] = {}
        self._tasks: set[asyncio.Task[bool]] = set()
        self._slots = asyncio.Semaphore(MAX_ATTEMPTS)
        self._closed = False

    def dial(self, goal: Goal) -> None:
        """Begins; where the same peer is being dialled already the goal shares that dial. `failed` is never called from inside."""
        if self._closed:
            return
        key = (goal.instance, goal.addresses)
        goals = self._dials.get(key)
        if goals is not None:
            if goal not in goals:
                goals.append(goal)
        elif len(self._tasks) >= MAX_DIALS or not goal.addresses:
            asyncio.get_running_loop().call_soon(self._failed, goal)
        else:
            self._dials[key] = goals = [goal]
            task = asyncio.get_running_loop().create_task(self._run(goals), name="solyd_swarm dial")
            self._tasks.add(task)
            task.add_done_callback(lambda _: self._ended(task, key))

    async def close(self) -> None:
        """Gives up all dials."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[bool], key: tuple[bytes, Addresses]) -> None:
        self._tasks.discard(task)
        goals = self._dials.pop(key)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a dial failed unexpectedly", exc_info=error)
        if not self._closed and (task.cancelled() or task.exception() is not None or not task.result()):
            for goal in goals:
                self._failed(goal)

    async def _run(self, goals: list[Goal]) -> bool:
        waiting = interleave(goals[0].addresses)
        pending: set[asyncio.Task[bool]] = set()
        try:
            while waiting or pending:
                if waiting:
                    pending.add(asyncio.get_running_loop().create_task(self._attempt(goals, *waiting.pop(0)), name="solyd_swarm attempt"))
                delay = ATTEMPT_DELAY if waiting else None
                done, pending = await asyncio.wait(pending, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
                if sum(attempt.result() for attempt in done):  # looks at all, so that no error is lost
                    return True
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return False

    async def _attempt(self, goals: list[Goal], host: str, port: int) -> bool:
        """One address; True once the handshake is complete. A cancelled or failed attempt leaves no socket behind."""
        channel: Channel | None = None
        try:
            async with self._slots, asyncio.timeout(self._timeout):
                channel, ready = await self._connect(goals, host, port)
                if await ready:
                    channel = None  # it is the endpoint's from now on
                    return True
        except (OSError, ValueError, OverflowError) as error:  # also what a peer made up: a zone beyond all numbers, say
            log.debug("dialling %s port %d failed: %s", host, port, error or type(error).__name__)
        finally:
            if channel is not None:
                channel.abort("another address answered first")
        return False

    async def _connect(self, goals: list[Goal], host: str, port: int) -> Attempt:
        endpoint = await connect(self._port, host, port)
        try:
            channel, ready = self._make(goals)
            await asyncio.get_running_loop().create_connection(lambda: channel, sock=endpoint)
        except BaseException:
            with contextlib.suppress(OSError):
                endpoint.close()
            raise
        return channel, ready


def interleave(addresses: Addresses) -> list[tuple[str, int]]:
    """The addresses in the order in which they are dialled: as they come, but one family after the other (RFC 8305, section 4)."""
    families = {is_six: [address for address in addresses if (":" in address[0]) == is_six] for is_six in (False, True)}
    first = ":" in addresses[0][0] if addresses else False
    mixed = zip_longest(families[first], families[not first])
    return [address for pair in mixed for address in pair if address is not None]


async def connect(listening: ListeningPort, host: str, port: int, *, always: bool = False) -> socket.socket:
    """A TCP connection to an IP literal, from the port listened on where that is of use (see `ListeningPort.open`) and possible.

    Raises ``OSError``, ``ValueError`` or ``OverflowError``.
    """
    _, address = socket_address(host, port)
    endpoint, shares = listening.open(host, port, always=always)
    try:
        try:
            await asyncio.get_running_loop().sock_connect(endpoint, address)
        except OSError as error:
            if always or not shares or error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                raise
            # The two ports have a connection already, or had one a moment ago.
            endpoint.close()
            endpoint = ListeningPort().open(host, port)[0]
            await asyncio.get_running_loop().sock_connect(endpoint, address)
    except BaseException:
        with contextlib.suppress(OSError):
            endpoint.close()
        raise
    return endpoint
