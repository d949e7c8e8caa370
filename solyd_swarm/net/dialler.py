"""Connects to candidates: all addresses of one at the same time, the first that completes the handshake wins."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from solyd_swarm.core.events import Addresses
from solyd_swarm.net.channel import Channel

log = logging.getLogger("solyd_swarm.net.dialler")

CONNECT_TIMEOUT = 5.0
MAX_DIALS = 64
"""Candidates being dialled at once: bounds a source or peer that floods us with addresses. Beyond it a dial fails at once."""


@dataclass(frozen=True, slots=True)
class Goal:
    """For what a candidate is dialled: the topic (empty: any), the instance expected (empty: any), its addresses."""

    topic_key: bytes
    instance: bytes
    addresses: Addresses


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """Family and socket address of an IP literal; an IPv6 zone becomes a scope id. Raises ``ValueError`` or ``OSError``."""
    address, _, zone = host.partition("%")
    if ipaddress.ip_address(address).version == 4:
        return socket.AF_INET, (address, port)
    scope = 0
    if zone:
        scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
    return socket.AF_INET6, (address, port, 0, scope)


Attempt = tuple[Channel, "asyncio.Future[bool]"]


class Dialler:
    """The dials on their way, each a task; ends with `close`.

    Args:
        make: makes a channel for a goal, and a future of whether its handshake completes.
        failed: told of a goal that nobody answered for.
    """

    def __init__(self, make: Callable[[Goal], Attempt], failed: Callable[[Goal], None]) -> None:
        self._make = make
        self._failed = failed
        self._tasks: dict[Goal, asyncio.Task[None]] = {}

    def dial(self, goal: Goal) -> None:
        """Begins; does nothing where the very same dial is on its way."""
        if goal in self._tasks:
            return
        if len(self._tasks) >= MAX_DIALS or not goal.addresses:
            asyncio.get_running_loop().call_soon(self._failed, goal)
            return
        task = asyncio.get_running_loop().create_task(self._run(goal), name="solyd_swarm dial")
        self._tasks[goal] = task
        task.add_done_callback(lambda _: self._tasks.pop(goal, None))

    async def close(self) -> None:
        """Gives up all dials."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, goal: Goal) -> None:
        attempts = [asyncio.ensure_future(self._attempt(goal, host, port)) for host, port in goal.addresses]
        won = False
        try:
            for attempt in asyncio.as_completed(attempts):
                if await attempt:
                    won = True
                    break
        finally:
            for task in attempts:
                task.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
        if not won:
            self._failed(goal)

    async def _attempt(self, goal: Goal, host: str, port: int) -> bool:
        """One address; True once the handshake is complete. A cancelled or failed attempt leaves no socket behind."""
        channel: Channel | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                channel, ready = await self._connect(goal, host, port)
                if await ready:
                    channel = None  # it is the endpoint's from now on
                    return True
        except (OSError, ValueError, TimeoutError) as error:
            log.debug("dialling %s port %d failed: %s", host, port, error or type(error).__name__)
        finally:
            if channel is not None:
                channel.abort("another address answered first")
        return False

    async def _connect(self, goal: Goal, host: str, port: int) -> Attempt:
        family, address = socket_address(host, port)
        endpoint = socket.socket(family, socket.SOCK_STREAM)
        try:
            endpoint.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(endpoint, address)
            channel, ready = self._make(goal)
            await loop.create_connection(lambda: channel, sock=endpoint)
        except BaseException:
            with contextlib.suppress(OSError):
                endpoint.close()
            raise
        return channel, ready
