"""How a node that is in no topic gets into the DHT, and stays there: it asks the DHT nodes at the places it was given to begin at.

A node with a topic dials those places, and is told where their DHT nodes are. One without, such as ``solyd-swarm bootstrap``, has no use
for a channel; it tries the UDP port of the same number, which is where DHT nodes are unless something else was there first.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from solyd_swarm.discovery.given_hosts import GivenHosts

log = logging.getLogger("solyd_swarm.discovery.dht")

FIRST_PAUSE = 1.0
"""Seconds after the start: until then a node that will have topics has one."""
ALONE_PAUSE = 5.0
PAUSE = 300.0
"""Seconds between two times: what was split by an outage finds together again."""


class DhtEntry:
    """Owns one task; ends with `close`.

    Args:
        places: (host name or IP literal, port).
        hosts: looks names up.
        topics: the topics that there are now: while there are any, nothing is done.
        contact: told each IP literal and UDP port.
        nodes: how many DHT nodes are known.
    """

    def __init__(
        self,
        places: Iterable[tuple[str, int]],
        hosts: GivenHosts,
        *,
        topics: Callable[[], Iterable[bytes]],
        contact: Callable[[str, int], None],
        nodes: Callable[[], int],
    ) -> None:
        self._places: Sequence[tuple[str, int]] = tuple(dict.fromkeys(places))
        self._hosts, self._topics, self._contact, self._nodes = hosts, topics, contact, nodes
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
        for ip, number in await self._hosts.addresses(host, port):
            self._contact(ip, number)
