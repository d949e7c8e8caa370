"""One topic as we announce it on one link: registered, said again for newcomers, withdrawn."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from solyd_swarm.discovery.mdns_link import Link
from solyd_swarm.discovery.mdns_service import make_service

ANSWER_LIMIT = 0.1
"""Seconds between two announcements of a topic that newcomers cause: a flood of replays costs no more than this."""

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Announcement:
    """Begins at once; its names, nonce and tag are its own, and serve no other one.

    Args:
        spawn: makes a task that its owner ends.
    """

    def __init__(self, link: Link, topic_key: bytes, port: int, spawn: Spawn) -> None:
        self._link = link
        self._info = make_service(topic_key, port, link.local)
        self._announcing = spawn(link.announce(self._info))
        self._saying: asyncio.TimerHandle | None = None
        self._said_at = -1e9

    @property
    def name(self) -> str:
        """Of the service."""
        return self._info.name

    def say_again(self) -> None:
        """Announces it once more, for somebody who has just come; soon, where that was done a moment ago."""
        if self._saying is None:
            loop = asyncio.get_running_loop()
            self._saying = loop.call_at(max(loop.time(), self._said_at + ANSWER_LIMIT), self._say)

    def _say(self) -> None:
        self._saying = None
        self._said_at = asyncio.get_running_loop().time()
        self._link.announce_again(self._info)

    def stop(self) -> None:
        """Says nothing more, without a goodbye yet."""
        if self._saying is not None:
            self._saying.cancel()
            self._saying = None
        self._announcing.cancel()

    async def withdraw(self) -> None:
        """Says goodbye, once `stop` was called."""
        await asyncio.wait([self._announcing])
        if self._link.is_announced(self._info):
            await self._link.withdraw(self._info)
