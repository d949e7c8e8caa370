"""How a node that is in no topic gets into the DHT, and stays there: it asks the DHT nodes at the places it was given to begin at.

A node with a topic dials those places, and is told where their DHT nodes are. One without, such as ``solyd-swarm bootstrap``, has no use
for a channel; it tries the UDP port of the same number, which is where DHT nodes are unless something else was there first.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

log = logging.getLogger("solyd_swarm.discovery.dht")

FIRST_PAUSE = 1.0
"""Seconds after the start: until then a node that will have topics has one."""
ALONE_PAUSE = 5.0
PAUSE = 300.0
"""Seconds between two times: what was split by an outage finds together again."""
RESOLVE_TIMEOUT = 5.0

Resolve = Callable[[str, int], Awaitable[list[tuple[str, int]]]]


class DhtEntry:
    """Owns one task; ends with `close`.

    Args:
        places: (host name or IP literal, port).
        topics: the topics that there are now: while there are any, nothing is done.
        contact: told each IP literal and UDP port.
        nodes: how many DHT nodes are known.
    """

    def __init__(
        self,
        places: Iterable[tuple[str, int]],
        resolve: Resolve,
        *,
        topics: Callable[[], Iterable[bytes]],
        contact: Callable[[str, int], None],
        nodes: Callable[[], int],
    ) -> None:
        self._places: Sequence[tuple[str, int]] = tuple(dict.fromkeys(places))
        self._resolve, self._topics, self._contact, self._nodes = resolve, topics, contact, nodes
        self._unknown: set[str] = set()  # hosts that could not be looked up, which has been told
        self._task = asyncio.get_running_loop().create_task(self._run(), name="solyd_swarm dht entry")

    async def close(self) -> None:
        """Ends the task."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await asyncio.sleep(FIRST_PAUSE)
            while True:
                if not any(True for _ in self._topics()):
                    await asyncio.gather(*[self._try(host, port) for host, port in self._places])
                await asyncio.sleep(PAUSE if self._nodes() else ALONE_PAUSE)
        except Exception:
            log.exception("the places to begin at are not asked any more")

    async def _try(self, host: str, port: int) -> None:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                addresses = await self._resolve(host, port)
        except OSError as error:
            if host not in self._unknown:
                log.warning("bootstrap host %r cannot be looked up (%s); it is tried again", host, error or type(error).__name__)
            self._unknown.add(host)
            return
        self._unknown.discard(host)
        for ip, number in addresses:
            self._contact(ip, number)
