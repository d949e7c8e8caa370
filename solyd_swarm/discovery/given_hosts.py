"""The hosts that the user named, looked up anew each time, for a name server may come back, and an address change."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("solyd_swarm.discovery.bootstrap")

TIMEOUT = 5.0

Resolve = Callable[[str, int], Awaitable[list[tuple[str, int]]]]
"""IP literals and ports of a host name; raises ``OSError``."""


class GivenHosts:
    """Looks names up, and warns once of each that cannot be, until it can again.

    Attributes:
        problems: host names that could not be looked up, with what the resolver said.
    """

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self.problems: dict[str, str] = {}

    async def addresses(self, host: str, port: int) -> list[tuple[str, int]]:
        """IP literals and ports; none if the host cannot be looked up within 5 s."""
        try:
            async with asyncio.timeout(TIMEOUT):
                addresses = await self._resolve(host, port)
        except OSError as error:
            reason = str(error) or type(error).__name__
            if host not in self.problems:
                log.warning("bootstrap host %r cannot be looked up (%s); it is tried again", host, reason)
            self.problems[host] = reason
            return []
        self.problems.pop(host, None)
        return addresses
