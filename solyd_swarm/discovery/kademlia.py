"""Discovery by an embedded Kademlia DHT over UDP: members announce where they listen and look one another up.

There is no fixed entry point: a node learns of its first DHT node by `KademliaSource.contact`, from whoever it has a channel with,
and from then on through the DHT itself. A first pair finds out about one another because each keeps its own announcement too.
"""

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from kademlia.node import Node

from solyd_swarm.discovery.dht import DhtServer, Holder
from solyd_swarm.discovery.dht_addresses import announced_addresses, furthest_reaching
from solyd_swarm.discovery.dht_cache import CandidateCache
from solyd_swarm.discovery.dht_protocol import MAX_GREETINGS, Host
from solyd_swarm.discovery.dht_wire import REPLICAS
from solyd_swarm.discovery.records import MAX_ADDRESSES, MAX_LIFE, DayKeys, SignedRecord, day_of, open_record, seal, withdraw
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address, Candidate, Endpoint, Found, Source
from solyd_swarm.errors import DiscoveryError, RemoteProtocolError

log = logging.getLogger("solyd_swarm.discovery.kademlia")

MAX_CONTACTS = 32
MAX_KNOWN = 64
RECALLED_AT_ONCE = 16
GREETINGS = 3
SLOWEST_LOOKUP = 300.0
ROUND_GAP = 1.0
REFRESH_GAP = 5.0
TABLE_REFRESH = 900.0
GOODBYE_SECONDS = 0.3


@dataclass(eq=False)
class _Topic:
    """What the source knows of one topic it has joined."""

    key: bytes
    delay: float
    days: dict[int, DayKeys] = field(default_factory=dict)
    records: dict[int, SignedRecord] = field(default_factory=dict)
    addresses: list[Address] = field(default_factory=list)
    signed_at: float = float("-inf")
    holders: dict[int, list[Holder]] = field(default_factory=dict)
    accepted: dict[int, frozenset[tuple[bytes, int]]] = field(default_factory=dict)
    cache: CandidateCache = field(default_factory=CandidateCache)
    repeated: float = float("-inf")
    due: float = 0.0
    last: float = float("-inf")
    asked: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def hasten(self, at: float) -> None:
        """Look no later than ``at``, by the loop's clock."""
        self.due = min(self.due, at)
        self.wake.set()


class KademliaSource(Source):
    """Announces and looks up instances in a DHT that the peers themselves form.

    Args:
        host: IP literal to bind the UDP socket to. With the default, and interfaces named in the endpoint, the one of them that
            reaches furthest is bound instead, so that nothing leaves by others. ``"::"`` serves both families.
        port: UDP port wanted; an ephemeral one is taken if that is in use. 0: ephemeral.
        clock: Unix time in seconds; decides the day whose key is used, and orders own records.
        announce_interval: seconds between announcements; a record lives three times as long, at most 30 minutes.
        lookup_interval: seconds between look-ups at first; while nothing happens it grows to five minutes.
        nodes: DHT nodes of an earlier time, as `known_nodes` returned them, best first: contacted at the start, and whenever we know
            none. At most 64 are used; what is no IP literal and UDP port is left out.
    """

    name: ClassVar[str] = "dht"

    def __init__(
        self,
        *,
        host: str = "0.0.0.0",
        port: int = 0,
        clock: Callable[[], float] = time.time,
        announce_interval: float = 600,
        lookup_interval: float = 30,
        nodes: Iterable[tuple[str, int]] = (),
    ) -> None:
        self._host, self._wanted_port, self._clock = host, port, clock
        self._announce_interval, self._lookup_interval = announce_interval, lookup_interval
        self._life = max(1, min(MAX_LIFE, int(3 * announce_interval)))
        self._topics: dict[bytes, _Topic] = {}
        self._by_key: dict[bytes, tuple[_Topic, DayKeys]] = {}
        self._contacts: OrderedDict[Host, None] = OrderedDict()
        usable = [(node_host, number) for node_host, number in nodes if scope_of(node_host) != "invalid" and 0 < number < 65_536]
        self._recalled: list[Host] = list(dict.fromkeys(usable))[:MAX_KNOWN]
        self._greeted: set[Host] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: DhtServer | None = None
        self._closed = False
        self._sequence = 0

    @property
    def port(self) -> int:
        """The UDP port really bound; 0 before `start` and after `close`."""
        return 0 if self._server is None else self._server.host[1]

    @property
    def nodes(self) -> int:
        """Contacts in the routing table."""
        return 0 if self._server is None else self._server.nodes

    def known_nodes(self) -> list[tuple[str, int]]:
        """DHT nodes (IP literal, UDP port) that have answered, best first, at most 64: to be given as ``nodes`` another time.

        Without any now, those given to this source. Call it before `close`.
        """
        known = [] if self._server is None else self._server.known_nodes(MAX_KNOWN)
        return known or list(self._recalled)

    # The interface of sources.

    async def start(self, endpoint: Endpoint, found: Found) -> None:
        """Bind the socket. Raises `DiscoveryError` when none can be bound, or an interface that is named does not exist."""
        self._endpoint, self._found = endpoint, found
        host = self._host
        if endpoint.interfaces and host in ("0.0.0.0", "::"):
            host = furthest_reaching(endpoint.interfaces)
        server = DhtServer(stored=self._on_stored, met=self._on_met)
        try:
            await server.bind(host, self._wanted_port)
        except OSError as error:
            raise DiscoveryError(
                f"the DHT cannot bind a UDP socket at {host} ({error}): name an address of this machine, or switch the DHT off"
            ) from error
        self._server = server
        self._spawn(self._keep_table(server), "table")
        if self._recalled:
            self._spawn(self._recall(server), "recall")
        for topic in self._topics.values():
            self._follow_in_task(topic)

    def join(self, topic_key: bytes) -> None:
        if topic_key in self._topics or self._closed:
            return
        topic = self._topics[topic_key] = _Topic(topic_key, self._lookup_interval)
        if self._server is not None:
            self._follow_in_task(topic)

    def leave(self, topic_key: bytes) -> None:
        topic = self._topics.pop(topic_key, None)
        if topic is None or self._server is None:
            return
        if topic.task is not None:
            topic.task.cancel()
        self._spawn(self._place_all(self._server, self._withdraw(self._server, topic)), "withdraw")

    def refresh(self, topic_key: bytes) -> None:
        topic = self._topics.get(topic_key)
        if topic is None or self._server is None:
            return
        topic.delay = self._lookup_interval
        topic.hasten(topic.last + REFRESH_GAP)
        # Attack: nodes around a key hide its records. Whoever was found before is tried again, whatever they answer now.
        now = asyncio.get_running_loop().time()
        if now - topic.repeated >= REFRESH_GAP:
            topic.repeated = now
            for candidate in topic.cache.recent():
                self._found(topic_key, candidate)

    def contact(self, host: str, port: int) -> None:
        """We learned that a DHT node is at this IP literal and UDP port. Returns at once; a known one costs one datagram.

        When it answers and is new, its neighbourhood is looked up, and every topic is announced and looked up at once.
        """
        address = (host.removeprefix("::ffff:") if "." in host else host, port)
        if scope_of(host) == "invalid" or not 0 < port < 65_536 or self._server is None or self._closed:
            return
        # Attack: peers name more and more DHT nodes. The one not named for longest is forgotten.
        self._contacts[address] = None
        self._contacts.move_to_end(address)
        while len(self._contacts) > MAX_CONTACTS:
            self._contacts.popitem(last=False)
        self._greet(self._server, address)

    async def close(self) -> None:
        """Withdraw every announcement, as far as that can be done within 0.3 s, and end every task, timer and socket."""
        self._closed = True
        server = self._server
        if server is None:
            return
        for topic_key in list(self._topics):
            self.leave(topic_key)
        goodbyes = [task for task in self._tasks if task.get_name() == "dht withdraw"]
        if goodbyes:
            await asyncio.wait(goodbyes, timeout=GOODBYE_SECONDS)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server = None
        await server.close()

    # What the DHT reports.

    def _on_met(self, node: Any) -> None:
        """A node got into the routing table: whatever it is close to is announced to it, and looked up there, at once."""
        server = self._server
        if server is None or self._closed:
            return
        if server.nodes == 1 and not any(task.get_name() == "dht bootstrap" for task in self._tasks):
            self._spawn(self._settle(server), "bootstrap")
        now = asyncio.get_running_loop().time()
        for key, (topic, _) in self._by_key.items():
            if node.id in [near.id for near in server.protocol.router.find_neighbors(Node(key))]:
                # Attack: ever new nodes close to a key make us look again. At most once a second; the first one at once.
                topic.hasten(topic.last + ROUND_GAP if topic.asked else now)

    def _on_stored(self, key: bytes, record: SignedRecord, sender: str) -> None:
        topic, keys = self._by_key.get(key, (None, None))
        if topic is not None and keys is not None:
            self._hear(topic, keys, record, sender)

    def _hear(self, topic: _Topic, keys: DayKeys, record: SignedRecord, learned_from: str) -> None:
        """A verified record of a topic: report it, unless it is our own, withdrawn, or known."""
        if self._topics.get(topic.key) is not topic:
            return
        try:
            announcement = open_record(keys, record)
        except RemoteProtocolError as error:
            log.debug("%s has %s", learned_from, error)
            return
        if announcement is None:
            topic.cache.withdraw(record.slot, record.sequence)
            return
        instance = announcement.instance
        if instance == self._endpoint.instance or not announcement.addresses:
            return
        candidate = Candidate(announcement.addresses, self.name, instance, learned_from or None)
        if topic.cache.add(record.slot, record.sequence, instance, candidate):
            self._found(topic.key, candidate)

    # Announcing and looking.

    def _follow_in_task(self, topic: _Topic) -> None:
        topic.task = self._spawn(self._follow(topic), "topic")

    async def _follow(self, topic: _Topic) -> None:
        """Rounds of one topic, until it is left."""
        loop = asyncio.get_running_loop()
        while self._server is not None:
            topic.last = loop.time()
            topic.asked = self._server.nodes > 0
            topic.due = topic.last + topic.delay * random.uniform(0.9, 1.1)
            topic.delay = min(topic.delay * 1.5, max(SLOWEST_LOOKUP, self._lookup_interval), self._announce_interval)
            try:
                await self._round(self._server, topic)
            except Exception:
                log.debug("a round of the DHT failed", exc_info=True)
            while (wait := topic.due - loop.time()) > 0:
                topic.wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await topic.wake.wait()

    async def _round(self, server: DhtServer, topic: _Topic) -> None:
        """Announce and look up, once: the keys of today, yesterday and tomorrow side by side."""
        self._prepare(topic)
        for record in topic.records.values():
            server.keep(record)
        if not server.nodes:
            for address in self._contacts:
                self._greet(server, address)
            if self._recalled and not any(task.get_name() == "dht recall" for task in self._tasks):
                self._spawn(self._recall(server), "recall")
        async with asyncio.TaskGroup() as group:
            for keys in topic.days.values():
                group.create_task(self._visit(server, topic, keys))

    async def _visit(self, server: DhtServer, topic: _Topic, keys: DayKeys) -> None:
        """Look one day's key up, and give our record to those of its holders that lack it."""
        hear = partial(self._hear, topic, keys)
        holders = await server.get(keys.key, keys.public, hear)
        record = topic.records.get(keys.day)
        if record is None:
            return
        topic.holders[keys.day] = holders
        known = topic.accepted.get(keys.day, frozenset())
        kept = known & {(holder.node.id, record.sequence) for holder in holders}
        missing = [holder for holder in holders if (holder.node.id, record.sequence) not in kept]
        accepted = await server.place(record, missing)
        topic.accepted[keys.day] = kept | {(node_id, record.sequence) for node_id in accepted}
        if accepted:
            # Two who ask before either has stored would miss one another: of two who store and then ask, the later sees the earlier.
            await server.get(keys.key, keys.public, hear)

    def _prepare(self, topic: _Topic) -> None:
        """Bring keys and records up to date: keys when the day changes, records when they are due or the day changes."""
        now = self._clock()
        today = day_of(now)
        days = {day: topic.days.get(day) or DayKeys(topic.key, day) for day in (today, today - 1, today + 1)}
        for old in topic.days.keys() - days.keys():
            self._by_key.pop(topic.days[old].key, None)
        topic.days = days
        for keys in days.values():
            self._by_key[keys.key] = (topic, keys)
        announced = {today} | {day_of(now - self._life), day_of(now + self._life)} & days.keys()
        self._sign(topic, announced, self._next_sequence(now))

    def _sign(self, topic: _Topic, announced: set[int], sequence: int) -> None:
        """Sign the records of these days anew, unless the present ones still tell the truth and live long enough."""
        moment = asyncio.get_running_loop().time()
        addresses = self._addresses()
        # A little early, as rounds come when they come.
        due = moment - topic.signed_at >= 0.9 * self._announce_interval
        if not addresses or (not due and announced == topic.records.keys() and addresses == topic.addresses):
            return
        instance, life = self._endpoint.instance, self._life
        topic.records = {day: seal(topic.days[day], instance, addresses, sequence, life) for day in sorted(announced)}
        topic.signed_at, topic.addresses = moment, addresses
        topic.holders = {day: holders for day, holders in topic.holders.items() if day in announced}
        topic.accepted = {}

    def _next_sequence(self, now: float) -> int:
        self._sequence = max(self._sequence + 1, int(now * 1e6))
        return self._sequence

    def _addresses(self) -> list[Address]:
        return announced_addresses(self._endpoint)[:MAX_ADDRESSES]

    async def _place_all(self, server: DhtServer, placements: Iterable[tuple[SignedRecord, list[Holder]]]) -> None:
        async with asyncio.TaskGroup() as group:
            for record, holders in placements:
                group.create_task(server.place(record, holders))

    def _withdraw(self, server: DhtServer, topic: _Topic) -> list[tuple[SignedRecord, list[Holder]]]:
        """Replace the announcements of a topic by withdrawals here. Returns those, and the nodes that hold what they replace."""
        sequence = self._next_sequence(self._clock())
        placements = []
        for day, record in topic.records.items():
            tombstone = withdraw(DayKeys(topic.key, day), self._endpoint.instance, sequence, record.life)
            server.keep(tombstone)
            placements.append((tombstone, topic.holders.get(day, [])))
        for keys in topic.days.values():
            self._by_key.pop(keys.key, None)
        return placements

    # Tasks.

    async def _settle(self, server: DhtServer) -> None:
        """The first node was met. The others are met through it; then the topics are looked up once more, where they really belong."""
        await server.refresh()
        for topic in self._topics.values():
            topic.hasten(topic.last + ROUND_GAP)

    async def _recall(self, server: DhtServer) -> None:
        """Ask the nodes of an earlier time, until the table has a few."""
        for start in range(0, len(self._recalled), RECALLED_AT_ONCE):
            hosts = self._recalled[start : start + RECALLED_AT_ONCE]
            await asyncio.gather(*[server.bootstrap_node(host) for host in hosts])
            if server.nodes >= REPLICAS:
                return

    async def _keep_table(self, server: DhtServer) -> None:
        while True:
            await asyncio.sleep(TABLE_REFRESH * random.uniform(0.9, 1.1))
            await server.refresh()

    def _greet(self, server: DhtServer, address: Host) -> None:
        # Attack: a peer names many nodes. Of those not yet asked, the ones beyond this number are not asked.
        if address not in self._greeted and len(self._greeted) < MAX_GREETINGS:
            self._greeted.add(address)
            self._spawn(self._greet_until_heard(server, address), "greeting")

    async def _greet_until_heard(self, server: DhtServer, address: Host) -> None:
        """Ask a few times: a single lost datagram must not cost a discovery."""
        try:
            for _ in range(GREETINGS):
                if await server.bootstrap_node(address):
                    return
        finally:
            self._greeted.discard(address)

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=f"dht {what}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("%s failed", task.get_name(), exc_info=error)
