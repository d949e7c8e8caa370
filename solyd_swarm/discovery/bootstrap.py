"""Bootstrap addresses as a source: the user knows where a member, or any node, can be reached."""

import asyncio
import logging
from collections.abc import Iterable
from typing import ClassVar

from solyd_swarm.discovery.given_hosts import GivenHosts
from solyd_swarm.discovery.source import Address, Candidate, Endpoint, Found, Source

log = logging.getLogger("solyd_swarm.discovery.bootstrap")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0
"""Seconds between tries of one contact: often at first, for programs are started together, then seldom."""


class BootstrapSource(Source):
    """Reports each contact under every topic joined, again and again; whoever has it already ignores that.

    Args:
        contacts: (addresses, instance key or empty) of each; host names are looked up anew at each try.
        hosts: looks names up.
    """

    name: ClassVar[str] = "bootstrap"

    def __init__(self, contacts: Iterable[tuple[tuple[tuple[str, int], ...], bytes]], hosts: GivenHosts) -> None:
        self._contacts = tuple(contacts)
        self._hosts = hosts
        self._found: Found = lambda topic_key, candidate: None
        self._topics: dict[bytes, None] = {}
        self._wake: dict[int, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, endpoint: Endpoint, found: Found) -> None:
        self._found = found
        for index, (addresses, instance) in enumerate(self._contacts):
            self._wake[index] = asyncio.Event()
            task = asyncio.get_running_loop().create_task(self._follow(index, addresses, instance), name="solyd_swarm bootstrap")
            self._tasks.append(task)

    def join(self, topic_key: bytes) -> None:
        self._topics[topic_key] = None
        self.refresh(topic_key)

    def leave(self, topic_key: bytes) -> None:
        self._topics.pop(topic_key, None)

    def refresh(self, topic_key: bytes) -> None:
        for wake in self._wake.values():
            wake.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._topics.clear()

    async def _follow(self, index: int, addresses: tuple[tuple[str, int], ...], instance: bytes) -> None:
        pause = FIRST_PAUSE
        wake = self._wake[index]
        while True:
            while not self._topics:
                wake.clear()
                await wake.wait()
            try:
                await self._report(addresses, instance)
            except Exception:
                log.exception("a bootstrap address could not be reported")
            wake.clear()
            # Asked to look again, we still leave a pause: refresh() must be cheap to call often.
            await asyncio.sleep(FIRST_PAUSE / 2)
            try:
                async with asyncio.timeout(pause):
                    await wake.wait()
                pause = FIRST_PAUSE
            except TimeoutError:
                pause = min(pause * 2, LONGEST_PAUSE)

    async def _report(self, addresses: tuple[tuple[str, int], ...], instance: bytes) -> None:
        resolved = [Address(*each) for host, port in addresses for each in await self._hosts.addresses(host, port)]
        if resolved:
            for topic_key in list(self._topics):
                self._found(topic_key, Candidate(tuple(dict.fromkeys(resolved)), self.name, instance or None))
