"""Members where they were reached before: the way back for a node whose bootstraps and DHT are gone."""

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from solyd_swarm.discovery.source import Address, Candidate, Endpoint, Found, Source
from solyd_swarm.store.addresses import MAX_STATE, AddressBook

BATCH = 6
"""Addresses reported at a time: a few more than the neighbours that one wants."""

PATIENCE = 8.0
"""Seconds after which an address that was reported and not reached counts as failed: a dial takes 5 at most, and its topic 3."""

CALM = 1.0
"""Seconds after the last member was lost: it may just be leaving, and is not to be dialled at its end. Whose channel failed is dialled
again by the overlay itself."""

REPORT_INTERVAL = 45.0
"""Seconds between batches later on: somebody may have come back, or belong to another half."""

GAP = 2.0
"""Seconds between batches while nobody was reached, and at least that, however often somebody asks for more."""

SAVE_INTERVAL = 10.0
"""Seconds between savings: what a crash may make us forget."""

KEEP_EVERY = 6
"""Savings after which the nodes of the DHT are saved too."""

LOAD_TIMEOUT = 10.0
"""Seconds for reading a topic; later it does without."""

CLOSE_LIMIT = 0.4
"""Seconds that the last saving may take."""

log = logging.getLogger("solyd_swarm.discovery.addressbook")


_Kept = tuple[list[tuple[str, int]], dict[str, bytes]]


@dataclass(slots=True)
class _Topic:
    wake: asyncio.Event
    task: "asyncio.Task[None] | None" = None
    refreshed: bool = False
    reached: bool = False
    """Somebody was, since the last look that found us alone."""


class AddressBookSource(Source):
    """Reports the addresses of a book, a few at a time and the best first: all of them in quick succession while nobody is reached, then
    some now and then. Its owner tells it whom the node has met.

    The disk is used on threads of its own, which hold nothing up at exit.

    Args:
        book: ours from now on, until `close`.
        is_reached: whether we have a channel with an instance that we have reached at this address (IP literal, port).
        nodes: tells the DHT nodes to keep in the book, best first; asked now and then and when closing.
        states: likewise, what else is to be kept there, by name.
    """

    name: ClassVar[str] = "addresses"

    def __init__(
        self,
        book: AddressBook,
        is_reached: Callable[[str, int], bool] = lambda host, port: False,
        *,
        nodes: Callable[[], list[tuple[str, int]]] = list,
        states: Callable[[], dict[str, bytes]] = dict,
    ) -> None:
        self._book = book
        self._is_reached = is_reached
        self._nodes = nodes
        self._states = states
        self._kept: _Kept = ([], {})
        self._found: Found = lambda topic_key, candidate: None
        self._started = False
        self._topics: dict[bytes, _Topic] = {}
        self._saver: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._judging: dict[tuple[bytes, str, int], asyncio.TimerHandle] = {}

    # -- what the node tells ----------------------------------------------------------------------------------

    def met(self, topic_key: bytes, host: str, port: int, dialled: bool) -> None:
        """A member of the topic has an authenticated channel with us.

        Args:
            host, port: where we have dialled it; or, if it dialled us, the host that it came from and the port that it says it listens at
                (0: none).
            dialled: whether we did.
        """
        topic = self._topics.get(topic_key)
        if topic is None:
            return
        topic.reached = True
        if dialled:
            self._book.succeeded(topic_key, host, port)
            judge = self._judging.pop((topic_key, host, port), None)
            if judge is not None:
                judge.cancel()
        elif port:
            self._book.heard(topic_key, host, port)

    # -- the interface of sources -----------------------------------------------------------------------------

    async def start(self, endpoint: Endpoint, found: Found) -> None:
        """Begins; cannot fail: a book that cannot be read is empty."""
        self._found = found
        self._started = True
        self._saver = asyncio.get_running_loop().create_task(self._save_regularly(), name="solyd_swarm address book")
        for topic_key in self._topics:
            self._follow_in_task(topic_key)

    def join(self, topic_key: bytes) -> None:
        if topic_key not in self._topics:
            self._topics[topic_key] = _Topic(asyncio.Event())
            if self._started:
                self._follow_in_task(topic_key)

    def leave(self, topic_key: bytes) -> None:
        topic = self._topics.pop(topic_key, None)
        if topic is not None and topic.task is not None:
            topic.task.cancel()
        for key in [key for key in self._judging if key[0] == topic_key]:
            self._judging.pop(key).cancel()

    def refresh(self, topic_key: bytes) -> None:
        topic = self._topics.get(topic_key)
        if topic is not None:
            topic.refreshed = topic.refreshed or topic.reached  # else it is at that already, and goes on to those not tried yet
            topic.reached = False
            topic.wake.set()

    async def close(self) -> None:
        """Saves a last time, and ends."""
        kept = self._changes()  # before its neighbours close
        for topic_key in list(self._topics):
            self.leave(topic_key)
        tasks = [*self._tasks] if self._saver is None else [*self._tasks, self._saver]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._started and (self._book.is_changed or kept is not None):
            self._started = False
            try:
                async with asyncio.timeout(CLOSE_LIMIT):
                    await in_thread(self._save, kept)
            except TimeoutError:
                log.warning("the disk is too slow: where members were met lately may not be remembered")

    # -- reporting --------------------------------------------------------------------------------------------

    def _follow_in_task(self, topic_key: bytes) -> None:
        topic = self._topics[topic_key]
        topic.task = asyncio.get_running_loop().create_task(self._follow(topic_key, topic), name="solyd_swarm addresses")
        self._tasks.add(topic.task)
        topic.task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("addresses met before are not reported any more", exc_info=error)

    async def _follow(self, topic_key: bytes, topic: _Topic) -> None:
        if self._book.outlives:
            try:
                async with asyncio.timeout(LOAD_TIMEOUT):
                    await in_thread(self._book.load, topic_key)
            except TimeoutError:
                log.warning("the disk is too slow: the swarm goes on without the addresses of members met before")
        while True:
            if topic.refreshed:
                await asyncio.sleep(CALM)
            topic.refreshed = False
            addresses = self._book.best(topic_key)
            for start in range(0, len(addresses), BATCH):
                for host, port in addresses[start : start + BATCH]:
                    self._report(topic_key, host, port)
                await asyncio.sleep(GAP)
                if topic.reached:
                    await self._rest(topic)
                if topic.refreshed:
                    break  # alone again: from the best on
            else:
                await self._rest(topic)

    async def _rest(self, topic: _Topic) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_INTERVAL * random.uniform(0.75, 1.25)):
                await topic.wake.wait()
        topic.wake.clear()

    def _report(self, topic_key: bytes, host: str, port: int) -> None:
        key = (topic_key, host, port)
        if self._is_reached(host, port):
            return
        if key not in self._judging:
            self._judging[key] = asyncio.get_running_loop().call_later(PATIENCE, self._judge, *key)
        self._found(topic_key, Candidate((Address(host, port),), self.name))

    def _judge(self, topic_key: bytes, host: str, port: int) -> None:
        """There was time to reach it."""
        del self._judging[topic_key, host, port]
        if not self._is_reached(host, port):
            self._book.failed(topic_key, host, port)

    # -- saving -----------------------------------------------------------------------------------------------

    async def _save_regularly(self) -> None:
        while True:
            for rest in range(KEEP_EVERY, 0, -1):
                await asyncio.sleep(SAVE_INTERVAL)
                kept = self._changes() if rest == 1 else None
                if self._book.is_changed or kept is not None:
                    await in_thread(self._save, kept)

    def _changes(self) -> _Kept | None:
        """What there is to keep and was not kept yet."""
        if not self._book.outlives:
            return None
        nodes, states = self._nodes(), {name: data for name, data in self._states().items() if 0 < len(data) <= MAX_STATE}
        kept = (nodes or self._kept[0], self._kept[1] | states)
        if kept == self._kept:
            return None
        self._kept = kept
        return kept

    def _save(self, kept: _Kept | None) -> None:
        self._book.save()
        if kept is not None:
            nodes, states = kept
            if nodes:
                self._book.save_nodes(nodes)
            for name, data in states.items():
                self._book.save_state(name, data)


async def in_thread(work: Callable[..., None], *arguments: object) -> None:
    """Runs what blocks, and does not raise, in a daemon thread of its own: asyncio's pool ends before a script's swarm does.

    Cancelling does not stop it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        try:
            work(*arguments)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name="solyd_swarm address book", daemon=True).start()
    await done
