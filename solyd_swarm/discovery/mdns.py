"""Peers on the same machine and the same link, by multicast DNS (RFC 6762) and DNS service discovery (RFC 6763).

One service type for everybody. For each joined topic one service is announced, under an instance and a host name that
are random and fresh with each announcement; its TXT record holds a 16-byte nonce and a keyed tag of it. Whoever knows
the topic key recognises the tag; to others it says that somebody here runs a swarm, nothing more.

How it is quick. Names of 128 random bits need no probing (RFC 6762, section 8.1 wants 0.75 s of it). A newcomer
announces itself and asks as soon as its sockets are open. The answers of RFC 6762 are held back for 20-120 ms, and for
a second after a multicast of the same records; so a member that recognises a newcomer of its topic also announces
itself once more, at once. Questions ask for multicast answers ("QM"): processes of one machine share port 5353, where a
unicast answer reaches any one of them.

What is announced: the addresses of the allowed interfaces. zeroconf says the same on all its interfaces, so loopback
addresses are named only if there are no others; a peer on the same machine dials the machine's LAN address. Packets
travel over loopback too, so that two processes of one machine meet even where the LAN filters multicast.

Whoever hears an announcement can replay nonce and tag with addresses of its own: members then dial those in vain.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from zeroconf import (  # type: ignore[attr-defined]  # the DNS classes are offered, though not in __all__
    DNSAddress,
    DNSPointer,
    DNSService,
    DNSText,
    RecordUpdate,
    ServiceInfo,
    current_time_millis,
)

from solyd_swarm.discovery.interfaces import usable_interfaces
from solyd_swarm.discovery.mdns_link import Link
from solyd_swarm.discovery.mdns_service import SERVICE_TYPE, RefusedError, Service, make_service, read_service
from solyd_swarm.discovery.source import Candidate, Endpoint, Found, Source
from solyd_swarm.errors import DiscoveryError

MAX_SERVICES = 512
"""Services remembered of our topics, and as many of others: floods of made-up services would fill the memory. The
one not heard for longest goes. Only who knows a topic, or replays an announcement of it, gets into the first table, so that a flood cannot
push out those we need."""

MAX_OWN_NAMES = 1024
"""Names of our own that are recognised as such; more only after as many joins."""

ASK_INTERVALS = (1.0, 2.0, 6.0, 20.0, 60.0)
"""Seconds between questions nobody prompted; the last one repeats."""

KNOWN_FOR, FORGET_AFTER = 45.0, 180.0
"""Seconds after which a service is to answer again, and after which it is dead if it has not: the records' own lifetime,
75 minutes by RFC 6762, is too long for a peer that crashed."""

ASK_LIMIT, REFRESH_LIMIT, CHECK_LIMIT = 1.0, 1.0, 5.0
"""Seconds between two questions, two refreshes of one topic, two looks at the interfaces."""

ANSWER_LIMIT = 0.1
"""Seconds between two announcements of a topic that newcomers cause: a flood of replays costs no more than this."""

ANSWER_CROWD = 16
"""With more known members than this a newcomer finds enough of them anyway; all of them answering would be a storm."""

CLOSE_LIMIT = 0.4
"""Seconds that goodbyes may take."""

log = logging.getLogger("solyd_swarm.discovery.mdns")


@dataclass(slots=True)
class _Topic:
    """A topic we are in, and how it is announced now."""

    info: ServiceInfo | None = None
    announcing: asyncio.Task[None] | None = None
    answering: asyncio.TimerHandle | None = None
    answered_at: float = -1e9
    refreshed_at: float = -1e9


class MdnsSource(Source):
    """Finds peers on this machine and its links.

    Attributes:
        refused: how many records were refused: malformed, or naming ports and addresses nobody listens on.
    """

    name = "mdns"

    def __init__(self) -> None:
        self.refused = 0
        self._closed = True
        self._link: Link | None = None
        self._topics: dict[bytes, _Topic] = {}
        self._ours: OrderedDict[str, None] = OrderedDict()
        self._matched: OrderedDict[str, tuple[bytes, Service]] = OrderedDict()
        self._unmatched: OrderedDict[str, Service] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._withdrawing: set[asyncio.Task[None]] = set()
        self._reopening: asyncio.Task[None] | None = None
        self._asked_at = self._checked_at = -1e9
        self._warned = False

    async def start(self, endpoint: Endpoint, found: Found) -> None:
        """Open the sockets and look around. Topics may be joined before or after.

        Raises:
            InterfaceError: something in ``endpoint.interfaces`` does not exist, or there is no network address at all.
            DiscoveryError: port 5353 cannot be bound, or no interface can do multicast.
        """
        self._endpoint, self._found = endpoint, found
        self._closed = False
        try:
            await self._open()
        except BaseException:
            self._closed = True
            raise
        if not self._closed:
            self._spawn(self._keep_asking())

    def join(self, topic_key: bytes) -> None:
        """Announce under a topic from now on; what was already seen of it is reported on the next turn of the loop."""
        if topic_key in self._topics:
            return
        self._topics[topic_key] = _Topic()
        if self._link is None:
            return
        self._announce(topic_key)
        for name, service in list(self._unmatched.items()):
            if service.belongs_to(topic_key):
                self._remember(name, topic_key, service)
                asyncio.get_running_loop().call_soon(self._report, topic_key, service)
        self._ask()

    def leave(self, topic_key: bytes) -> None:
        """Withdraw a topic. Its members stay remembered, for a later join."""
        topic = self._topics.pop(topic_key, None)
        if topic is None:
            return
        for name, (key, service) in list(self._matched.items()):
            if key == topic_key:
                self._remember(name, None, service)
        self._silence(topic)
        if self._link is not None:
            task = self._spawn(self._withdraw(self._link, topic))
            self._withdrawing.add(task)
            task.add_done_callback(self._withdrawing.discard)

    def refresh(self, topic_key: bytes) -> None:
        """Report a topic's known members again and ask for others; also starts anew where the interfaces changed."""
        topic = self._topics.get(topic_key)
        if topic is None or self._closed:
            return
        loop = asyncio.get_running_loop()
        if loop.time() - topic.refreshed_at < REFRESH_LIMIT:
            return
        topic.refreshed_at = loop.time()
        for key, service in self._matched.values():
            if key == topic_key:
                loop.call_soon(self._report, topic_key, service)
        self._ask()
        self._check_interfaces()

    async def close(self) -> None:
        """Say goodbye for every topic and end; about a quarter of a second if something was announced."""
        self._closed = True
        link, self._link = self._link, None
        for topic in self._topics.values():
            self._silence(topic)
        self._topics.clear()
        self._matched.clear()
        self._unmatched.clear()
        for task in self._tasks - self._withdrawing:
            task.cancel()
        try:
            if link is not None:
                self._withdrawing.add(self._spawn(link.say_goodbye()))
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLOSE_LIMIT)
        finally:
            for task in self._tasks:
                task.cancel()
            if link is not None:
                await link.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLOSE_LIMIT)

    # The link

    async def _open(self) -> None:
        link = Link(usable_interfaces(self._endpoint.interfaces), self._changed)
        await link.open()
        if self._closed:
            await link.close()
            return
        self._link = link
        self._checked_at = asyncio.get_running_loop().time()
        for topic_key in self._topics:
            self._announce(topic_key)
        self._ask()

    def _check_interfaces(self) -> None:
        """Networks come and go: a link opened for other addresses announces what cannot be dialled."""
        now = asyncio.get_running_loop().time()
        if now - self._checked_at < CHECK_LIMIT or (self._reopening is not None and not self._reopening.done()):
            return
        self._checked_at = now
        try:
            present = usable_interfaces(self._endpoint.interfaces)
        except DiscoveryError:
            present = []
        if self._link is None or present != self._link.local:
            self._reopening = self._spawn(self._reopen())

    async def _reopen(self) -> None:
        link, self._link = self._link, None
        self._matched.clear()
        self._unmatched.clear()
        for topic in self._topics.values():
            self._silence(topic)
        if link is not None:
            log.debug("the network interfaces have changed: mDNS starts anew")
            await link.close()
        try:
            await self._open()
        except DiscoveryError as error:
            log.log(logging.DEBUG if self._warned else logging.WARNING, "mDNS finds nobody until the network is back: %s", error)
            self._warned = True
        else:
            self._warned = False

    async def _keep_asking(self) -> None:
        """Ask from time to time: packets get lost, and nobody needs to announce itself twice (RFC 6762, section 5.2)."""
        for interval in ASK_INTERVALS:
            await asyncio.sleep(interval)
            self._ask()
        while True:
            await asyncio.sleep(ASK_INTERVALS[-1])
            self._ask()

    def _ask(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._link is None or now - self._asked_at < ASK_LIMIT:
            return
        self._asked_at = now
        heard = [(name, service.heard_at) for name, (_, service) in self._matched.items()]
        heard += [(name, service.heard_at) for name, service in self._unmatched.items()]
        for name, at in heard:
            if now - at > FORGET_AFTER:
                self._forget(name)
        self._link.ask(SERVICE_TYPE, [name for name, at in heard if now - at < KNOWN_FOR])

    # Announcing

    def _announce(self, topic_key: bytes) -> None:
        assert self._link is not None
        topic = self._topics[topic_key]
        topic.info = make_service(topic_key, self._endpoint.port, self._link.local)
        self._ours[topic.info.name] = None
        while len(self._ours) > MAX_OWN_NAMES:
            self._ours.popitem(last=False)
        topic.announcing = self._spawn(self._link.announce(topic.info))

    def _answer(self, topic_key: bytes) -> None:
        """Announce a topic once more, for somebody who has just come."""
        topic = self._topics.get(topic_key)
        if topic is None or topic.answering is not None or sum(key == topic_key for key, _ in self._matched.values()) > ANSWER_CROWD:
            return
        loop = asyncio.get_running_loop()
        topic.answering = loop.call_at(max(loop.time(), topic.answered_at + ANSWER_LIMIT), self._announce_again, topic)

    def _announce_again(self, topic: _Topic) -> None:
        topic.answering = None
        topic.answered_at = asyncio.get_running_loop().time()
        if self._link is not None and topic.info is not None:
            self._link.announce_again(topic.info)

    def _silence(self, topic: _Topic) -> None:
        """Stop announcing, without a goodbye yet."""
        if topic.answering is not None:
            topic.answering.cancel()
            topic.answering = None
        if topic.announcing is not None:
            topic.announcing.cancel()

    async def _withdraw(self, link: Link, topic: _Topic) -> None:
        if topic.announcing is not None:
            await asyncio.wait([topic.announcing])
        if topic.info is not None and link.is_announced(topic.info):
            await link.withdraw(topic.info)

    # Hearing

    def _changed(self, updates: list[RecordUpdate]) -> None:
        """Records changed in zeroconf's cache: look at the services they belong to."""
        if self._link is None:
            return
        cache, now = self._link.zeroconf.cache, current_time_millis()
        names: dict[str, None] = {}
        hosts: dict[str, None] = {}
        for update in updates:
            record = update.new
            if isinstance(record, DNSPointer):
                if record.name.lower() != SERVICE_TYPE:
                    continue
                if record.is_expired(now):
                    self._forget(record.alias)
                else:
                    names[record.alias] = None
            elif update.old is None and isinstance(record, DNSService | DNSText):
                names[record.name] = None
            elif update.old is None and isinstance(record, DNSAddress):
                hosts[record.name] = None
        for host in hosts:
            names.update((service.name, None) for service in cache.async_entries_with_server(host))
        for name in names:
            if name.endswith(SERVICE_TYPE) and name not in self._ours and self._link.sender is not None:
                self._look(name, self._link, self._link.sender)

    def _look(self, name: str, link: Link, sender: str) -> None:
        try:
            service = read_service(link.zeroconf, name, sender, asyncio.get_running_loop().time())
        except RefusedError as refused:
            self.refused += 1
            log.debug("refused a service announced by %s: %s", sender, refused)
            return
        if service is None:
            return
        topic_key, known = self._matched.get(name) or (None, self._unmatched.get(name))
        if service == known:
            self._remember(name, topic_key, service)
            return
        self.refused += service.refused
        new = topic_key is None
        topic_key = next((key for key in self._topics if service.belongs_to(key)), None)
        self._remember(name, topic_key, service)
        if topic_key is not None:
            self._report(topic_key, service)
            if new:
                self._answer(topic_key)

    def _remember(self, name: str, topic_key: bytes | None, service: Service) -> None:
        self._forget(name)
        if topic_key is not None:
            self._matched[name] = (topic_key, service)
        else:
            self._unmatched[name] = service
        for table in (self._matched, self._unmatched):
            while len(table) > MAX_SERVICES:
                table.popitem(last=False)

    def _forget(self, name: str) -> None:
        self._matched.pop(name, None)
        self._unmatched.pop(name, None)

    def _report(self, topic_key: bytes, service: Service) -> None:
        if topic_key in self._topics:
            log.debug("found %s, announced by %s", ", ".join(map(str, service.addresses)), service.sender)
            self._found(topic_key, Candidate(service.addresses, self.name, learned_from=service.sender))

    # Tasks

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name="solyd-swarm mdns")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("mDNS: a task failed", exc_info=error)
