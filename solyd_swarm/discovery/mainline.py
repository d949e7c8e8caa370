"""Discovery through the BitTorrent Mainline DHT (BEP 5), the internet's largest: a rendezvous that is always there.

Members announce the TCP port they listen on under an infohash that is derived from the topic key and the day, and look there for
others. Unlike our own DHT this one takes no signatures and hides nothing: whoever is close to the infohash sees addresses that come
together under a random number, and may name any others. Only the channel authenticates.
"""

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, ClassVar

from solyd_swarm.discovery.given_hosts import Resolve
from solyd_swarm.discovery.interfaces import usable_interfaces
from solyd_swarm.discovery.mainline_rules import ANYONE, days_looked_up, infohash_of, refusal
from solyd_swarm.discovery.mainline_session import DhtSession, Host
from solyd_swarm.discovery.records import day_of
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address, Candidate, Endpoint, Found, Source
from solyd_swarm.errors import InterfaceError

log = logging.getLogger("solyd_swarm.discovery.mainline")

PUBLIC_BOOTSTRAP: tuple[Host, ...] = (
    ("dht.libtorrent.org", 25401),
    ("router.bittorrent.com", 6881),
    ("dht.transmissionbt.com", 6881),
)
"""Names and UDP ports of public nodes that tell others; they store nothing."""

ANNOUNCE_INTERVAL = 900.0
EAGER_ANNOUNCEMENTS = 6
"""The first rounds of a topic all announce: what was announced while few nodes were known is at the wrong ones."""
FIRST_LOOKUP = 1.0
SLOWEST_LOOKUP = 300.0
REFRESH_GAP = 5.0
COUNT_INTERVAL = 60.0
BEGIN_SECONDS = 0.1
"""For libtorrent to start its DHT and ask the nodes it begins with; what is asked earlier it drops."""
RESOLVE_SECONDS = 5.0
MAX_CANDIDATES = 64
MAX_PER_REPLY = 16
MAX_CONTACTS = 32
MAX_ROUTERS = 16


@dataclass(eq=False)
class _Topic:
    """What the source knows of one topic it has joined."""

    key: bytes
    delay: float = FIRST_LOOKUP
    infohashes: dict[int, bytes] = field(default_factory=dict)
    reported: set[Address] = field(default_factory=set)
    announced_day: int | None = None
    announce_at: float = 0.0
    eager: int = EAGER_ANNOUNCEMENTS
    due: float = 0.0
    last: float = float("-inf")
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def hasten(self, at: float) -> None:
        """Look no later than ``at``, by the loop's clock."""
        self.due = min(self.due, at)
        self.wake.set()


class MainlineSource(Source):
    """Announces and looks up peers in the BitTorrent DHT, by way of libtorrent, which is imported by `start` only.

    BEP 5 knows no withdrawal: after `leave` and `close` nothing is announced any more, but nodes name us for up to 30 minutes.
    Strangers' queries are answered, within bounds, as a member of the DHT should: libtorrent's nodes take whoever announces into their
    tables even if it says that it is read-only (BEP 43), and wait 15 s for a silent one near an infohash before they announce there.

    Args:
        resolve: looks up the names among the bootstrap nodes. Where only loopback may be used no name is looked up.
        bootstrap: (name or IP literal, UDP port) of nodes to begin with.
        interfaces: IP literals or names of interfaces to use, instead of those that the endpoint names.
        port: UDP port wanted (a TCP listener that accepts nobody takes the same one); 0: ephemeral.
        teller: IP literal that stands for whoever is in this DHT, and decides which peers' addresses are believed, see `refusal`. By
            default `ANYONE`, or 127.0.0.1 where only loopback is used. For a DHT that is closed to outsiders, such as a company's:
            an address inside that network.
        state: what `saved_state` gave in an earlier run; a malformed one is ignored.
        clock: Unix time in seconds; decides the day whose infohash is used.
    """

    name: ClassVar[str] = "mainline"

    def __init__(
        self,
        resolve: Resolve,
        *,
        bootstrap: Sequence[Host] = PUBLIC_BOOTSTRAP,
        interfaces: Sequence[str] = (),
        port: int = 0,
        teller: str | None = None,
        state: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._resolve, self._bootstrap, self._interfaces = resolve, tuple(bootstrap), tuple(interfaces)
        self._wanted_port, self._teller, self._saved, self._clock = port, teller, state, clock
        self._topics: dict[bytes, _Topic] = {}
        self._by_infohash: dict[bytes, _Topic] = {}
        self._contacts: OrderedDict[Host, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: DhtSession | None = None
        self._closed = self._begun = False
        self._nodes = 0
        self._own: frozenset[str] = frozenset()
        self.refused: Counter[str] = Counter()
        """How many addresses were not reported, by the reason in words."""

    @property
    def port(self) -> int:
        """The UDP port really bound; 0 before `start` and after `close`."""
        return 0 if self._session is None else next(iter(self._session.bound.values()), 0)

    @property
    def nodes(self) -> int:
        """Nodes in the routing tables, when last counted: about once a minute, more often while there are none."""
        return self._nodes

    @property
    def state(self) -> str:
        """How it goes, for people."""
        if self._session is None:
            return "closed" if self._closed else "not started"
        if not self._begun:
            return "looking up the bootstrap nodes"
        return f"{self._nodes} DHT nodes known" if self._nodes else "no DHT node has answered"

    def saved_state(self) -> bytes:
        """Nodes to begin with next time: at most 128 of them and 2,449 bytes. The given state again while none are known.

        Asks libtorrent's thread and waits for it: a fraction of a millisecond.
        """
        return (self._session.saved_state() if self._session is not None else b"") or self._saved or b""

    # The interface of sources.

    async def start(self, endpoint: Endpoint, found: Found) -> None:
        """Bind sockets. Raises `DiscoveryError` without libtorrent, without a socket, or for an interface that does not exist."""
        self._endpoint, self._found = endpoint, found
        hosts = _hosts(self._interfaces or endpoint.interfaces)
        self._confined = all(scope_of(host) == "loopback" for host in hosts)
        self._learned_from = self._teller or ("127.0.0.1" if self._confined else ANYONE)
        session = DhtSession(self, hosts, self._wanted_port, narrow=scope_of(self._learned_from) != "global")
        await session.open(self._saved)
        self._session = session
        self._spawn(self._keep(session), "table")
        for topic in self._topics.values():
            self._follow_in_task(session, topic)

    def join(self, topic_key: bytes) -> None:
        if topic_key in self._topics or self._closed:
            return
        topic = self._topics[topic_key] = _Topic(topic_key)
        if self._session is not None:
            self._follow_in_task(self._session, topic)

    def leave(self, topic_key: bytes) -> None:
        topic = self._topics.pop(topic_key, None)
        if topic is None:
            return
        if topic.task is not None:
            topic.task.cancel()
        for infohash in topic.infohashes.values():
            self._by_infohash.pop(infohash, None)

    def refresh(self, topic_key: bytes) -> None:
        topic = self._topics.get(topic_key)
        if topic is not None:
            topic.delay = FIRST_LOOKUP
            topic.hasten(topic.last + REFRESH_GAP)

    def contact(self, host: str, port: int) -> None:
        """We learned that a node of this DHT is at an IP literal and UDP port. Returns at once; a known one costs nothing."""
        if scope_of(host) == "invalid" or not 0 < port < 65_536 or self._closed or (host, port) in self._contacts:
            return
        # Attack: peers name more and more nodes. Each costs one datagram and the one named longest ago is forgotten.
        self._contacts[host, port] = None
        while len(self._contacts) > MAX_CONTACTS:
            self._contacts.popitem(last=False)
        if self._session is not None and self._begun:
            self._session.add_node(host, port)

    async def close(self) -> None:
        """End every task, thread, timer and socket. Nothing can be withdrawn; that takes care of itself within 30 minutes."""
        self._closed = True
        for topic_key in list(self._topics):
            self.leave(topic_key)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        session, self._session = self._session, None
        if session is not None:
            with suppress(RuntimeError):  # libtorrent's errors: closing goes on
                self._saved = session.saved_state() or self._saved
            session.close()
        self._nodes = 0

    # What the DHT reports.

    def on_nodes(self, count: int) -> None:
        """Nodes are known now: the rounds before had nobody to ask, or only the few to begin with."""
        woken = count > 0 and self._nodes == 0
        self._nodes = count
        if woken:
            log.debug("%d nodes of the BitTorrent DHT are known", count)
            self._hurry(0.0)

    def on_peers(self, infohash: bytes, peers: Sequence[Host]) -> None:
        """A node named peers: report those that may be dialled and were not reported in this round."""
        topic = self._by_infohash.get(infohash)
        if topic is None:
            return
        fresh: dict[Address, None] = {}
        for host, port in peers:
            reason = refusal(host, port, self._learned_from, self._own, self._endpoint.port)
            if reason is not None:
                self.refused[reason] += 1
            elif (address := Address(host, port)) not in topic.reported:
                fresh[address] = None
        # Attack: a node close to the infohash names thousands of addresses, ours to dial and others' to suffer, or to drown the true
        # ones. So many are taken of one answer and of one round, at random: whoever fills the list does not choose who is left.
        room = min(MAX_PER_REPLY, MAX_CANDIDATES - len(topic.reported))
        if len(fresh) > room:
            self.refused["more than are taken of one look-up"] += len(fresh) - room
        for address in random.sample(list(fresh), min(room, len(fresh))):
            topic.reported.add(address)
            self._found(topic.key, Candidate((address,), self.name, learned_from=self._learned_from))

    # Announcing and looking.

    def _follow_in_task(self, session: DhtSession, topic: _Topic) -> None:
        topic.task = self._spawn(self._follow(session, topic), "topic")

    async def _follow(self, session: DhtSession, topic: _Topic) -> None:
        """Rounds of one topic, until it is left."""
        loop = asyncio.get_running_loop()
        while True:
            topic.last = loop.time()
            topic.due = topic.last + topic.delay * random.uniform(0.9, 1.1)
            topic.delay = min(topic.delay * 1.5, SLOWEST_LOOKUP)
            self._round(session, topic, topic.last)
            topic.due = min(topic.due, max(topic.announce_at, topic.last + FIRST_LOOKUP))
            while (wait := topic.due - loop.time()) > 0:
                topic.wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await topic.wake.wait()

    def _round(self, session: DhtSession, topic: _Topic, moment: float) -> None:
        """Look up, once, and announce where that is due; answers come through `on_peers`."""
        self._own = frozenset(_own_hosts(session))
        now = self._clock()
        today = day_of(now)
        for infohash in topic.infohashes.values():
            self._by_infohash.pop(infohash, None)
        topic.infohashes = {day: infohash_of(topic.key, day) for day in days_looked_up(now)}
        self._by_infohash.update(dict.fromkeys(topic.infohashes.values(), topic))
        topic.reported.clear()
        due = topic.eager > 0 or moment >= topic.announce_at or topic.announced_day != today
        for day, infohash in topic.infohashes.items():
            if day == today and due:
                session.announce(infohash, self._endpoint.port)
            else:
                session.look_up(infohash)
        if due:
            topic.announced_day, topic.announce_at = today, moment + ANNOUNCE_INTERVAL * random.uniform(0.85, 1.0)
            topic.eager -= topic.eager > 0 and self._nodes > 0

    def _hurry(self, pause: float) -> None:
        """Start over with every topic after so many seconds: whoever was asked before knew nothing."""
        for topic in self._topics.values():
            topic.eager, topic.delay = EAGER_ANNOUNCEMENTS, FIRST_LOOKUP
            topic.hasten(asyncio.get_running_loop().time() + pause)

    async def _keep(self, session: DhtSession) -> None:
        """Begin with the bootstrap nodes, count nodes now and then, and begin again where there are none."""
        while True:
            routers = await self._routers()
            session.begin(routers)
            self._begun = True
            for host, port in self._contacts:
                session.add_node(host, port)
            self._hurry(BEGIN_SECONDS)
            pause = BEGIN_SECONDS
            while self._nodes or pause < 30:
                session.count_nodes()
                await asyncio.sleep(COUNT_INTERVAL if self._nodes else pause)
                pause = BEGIN_SECONDS if self._nodes else pause * 1.5

    async def _routers(self) -> list[Host]:
        """The bootstrap nodes as IP literals, as far as they can be looked up in time and be reached."""
        answers = await asyncio.gather(*[self._look_up(host, port) for host, port in self._bootstrap])
        found = [each for answer in answers for each in answer if scope_of(each[0]) != "invalid"]
        return [each for each in found if not self._confined or scope_of(each[0]) == "loopback"][:MAX_ROUTERS]

    async def _look_up(self, host: str, port: int) -> list[Host]:
        with suppress(ValueError):
            ip_address(host)
            return [(host, port)]
        if self._confined:
            return []
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await self._resolve(host, port)
        except OSError as error:  # TimeoutError is one
            log.debug("bootstrap node %r of the BitTorrent DHT cannot be looked up (%s)", host, error or type(error).__name__)
            return []

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=f"mainline {what}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)


def _hosts(interfaces: Sequence[str]) -> list[str]:
    """IP literals to bind to. Link-local ones are left out: nothing of a DHT is there. Raises `InterfaceError`."""
    if not interfaces:
        return ["0.0.0.0", "::"]
    hosts = [address.host for address in usable_interfaces(interfaces) if scope_of(address.host) != "link"]
    if not hosts:
        raise InterfaceError(f"no address for the BitTorrent DHT at {', '.join(interfaces)}: name one that is not link-local")
    return hosts


def _own_hosts(session: DhtSession) -> set[str]:
    own = {*session.bound, *session.external}
    with suppress(InterfaceError):
        own |= {str(address.ip) for address in usable_interfaces(())}
    return own
