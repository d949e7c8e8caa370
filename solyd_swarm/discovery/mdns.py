"""Peers on the same machine and the same link, by multicast DNS (RFC 6762) and DNS service discovery (RFC 6763).

One service type for everybody. For each joined topic one service is announced, under an instance and a host name that
are random and fresh with each announcement; its TXT record holds a 16-byte nonce and a keyed tag of it. Whoever knows
the topic key recognises the tag; to others it says that somebody here runs a swarm, nothing more.

How it is quick. Names of 128 random bits need no probing (RFC 6762, section 8.1 wants 0.75 s of it). A newcomer
announces itself as soon as its sockets are open, and a member that recognises it announces itself once more, at once;
in a crowd only some of them do, by chance. A question comes where that finds nobody: its answers are held back for
20-120 ms by RFC 6762, or for a second after a multicast of the same records, and everybody has to give one. Questions
ask for multicast answers ("QM"): processes of one machine share port 5353, where a unicast answer reaches any one of them.

What is announced: the addresses of the allowed interfaces. zeroconf says the same on all its interfaces, so loopback
addresses are named only if there are no others; a peer on the same machine dials the machine's LAN address. Packets
travel over loopback too, so that two processes of one machine meet even where the LAN filters multicast.

The system tells when interfaces come, go or change: then all begins anew on what is there. When a cable is put in, which changes
no address, the topics are announced once more, and who is known is reported again.

Whoever hears an announcement can replay nonce and tag with addresses of its own: members then dial those in vain.
"""

import asyncio
import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from zeroconf import (  # type: ignore[attr-defined]  # the DNS classes are offered, though not in __all__
    DNSAddress,
    DNSPointer,
    DNSService,
    DNSText,
    RecordUpdate,
    current_time_millis,
)

from solyd_swarm.discovery.interfaces import InterfaceWatch, usable_interfaces
from solyd_swarm.discovery.mdns_announcement import Announcement
from solyd_swarm.discovery.mdns_known import MAX_SERVICES, Known
from solyd_swarm.discovery.mdns_link import Link, multicast_choices
from solyd_swarm.discovery.mdns_service import SERVICE_TYPE, RefusedError, Service, read_service
from solyd_swarm.discovery.mdns_welcome import Welcome
from solyd_swarm.discovery.source import Candidate, Endpoint, Found, Source
from solyd_swarm.errors import DiscoveryError

MAX_OWN_NAMES = 1024
"""Names of our own that are recognised as such; more only after as many joins."""

ASK_INTERVALS = (0.15, 1.0, 2.0, 6.0, 15.0, 20.0)
"""Seconds between questions; the last one repeats. While each topic has somebody only the last two count: whoever has just come is
answered without a question, and all hosts of a crowd that answer one make a storm."""

KNOWN_FOR, FORGET_AFTER = 45.0, 180.0
"""Seconds after which a service is to answer again, and after which it is dead if it has not: the records' own lifetime,
75 minutes by RFC 6762, is too long for a peer that crashed."""

ASK_LIMIT, REFRESH_LIMIT, CHECK_LIMIT = 1.0, 1.0, 1.0
"""Seconds between two questions, two refreshes of one topic, two looks at the interfaces."""

REPORT_INTERVAL = 20.0
"""Seconds after which a service that is heard again is reported again: whoever could not be reached then, perhaps can be now."""

AGAIN = 8
"""Members reported once more, some seconds after joining: more than there is room for, and no storm in a crowd."""

MAX_HEARD = 2000
"""New records after which zeroconf's cache is emptied: a flood."""

CLOSE_LIMIT = 0.4
"""Seconds that goodbyes may take."""

log = logging.getLogger("solyd_swarm.discovery.mdns")


@dataclass(slots=True)
class _Topic:
    """A topic we are in, and how it is announced now."""

    announcement: Announcement | None = None
    refreshed_at: float = -1e9

    def stop(self) -> None:
        if self.announcement is not None:
            self.announcement.stop()


class MdnsSource(Source):
    """Finds peers on this machine and its links.

    Attributes:
        refused: how much was refused, by reason: whole packets, ``"packet"`` (malformed, cut off, too large) and ``"stranger"``
            (not from a link that may be used); services, ``"name"``, ``"port"``, ``"text"`` and ``"address"`` (none that
            anybody can be reached at); of services that were not, single addresses: ``"invalid"`` and ``"excess"``.
    """

    name = "mdns"

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self._closed = True
        self._link: Link | None = None
        self._topics: dict[bytes, _Topic] = {}
        self._ours: OrderedDict[str, None] = OrderedDict()
        self._known = Known()
        self._tasks: set[asyncio.Task[None]] = set()
        self._withdrawing: set[asyncio.Task[None]] = set()
        self._watch = InterfaceWatch(self._interfaces_changed)
        self._asking: asyncio.Task[None] | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._checking: asyncio.TimerHandle | None = None
        self._welcome = Welcome(self._report_late)
        self._asked_at = self._checked_at = -1e9
        self._new_records = 0
        self._problem = ""
        self._silent: list[str] = []
        self._told_silent = False

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
            self._watch.start()

    def describe(self) -> str:
        """In words, for people: ``"on"``, and what does not work or may not. From any thread."""
        link = self._link
        if link is None:
            return f"waits for a network: {self._problem}" if self._problem else "starts"
        if link.problem:
            return f"on, but cannot send: {link.problem}"
        if silent := link.silent():
            return f"on, but not even our own packets come back on {', '.join(silent)}: a firewall blocks UDP port 5353?"
        return "on" if self._known else "on, nobody heard"

    def join(self, topic_key: bytes) -> None:
        """Announce under a topic from now on; what was already seen of it is reported on the next turn of the loop."""
        if topic_key in self._topics:
            return
        self._topics[topic_key] = _Topic()
        if self._link is None:
            return
        self._announce(topic_key)
        for name, service in list(self._known.unmatched.items()):
            if service.belongs_to(topic_key):
                self._known.remember(name, topic_key, service)
                asyncio.get_running_loop().call_soon(self._report, topic_key, service)
        self._ask_anew()

    def leave(self, topic_key: bytes) -> None:
        """Withdraw a topic. Its members stay remembered, for a later join."""
        topic = self._topics.pop(topic_key, None)
        if topic is None:
            return
        self._known.release(topic_key)
        topic.stop()
        if self._link is not None and topic.announcement is not None:
            task = self._spawn(topic.announcement.withdraw())
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
        self._report_again(topic_key)
        self._ask()
        self._check_interfaces()

    async def close(self) -> None:
        """Say goodbye for every topic and end; about a quarter of a second if something was announced."""
        self._closed = True
        self._watch.close()
        if self._checking is not None:
            self._checking.cancel()
        link, self._link = self._link, None
        self._stop_all()
        self._topics.clear()
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
        link = Link(usable_interfaces(self._endpoint.interfaces), self._changed, self.refused)
        await link.open()
        if self._closed:
            await link.close()
            return
        self._link = link
        self._checked_at = asyncio.get_running_loop().time()
        for topic_key in self._topics:
            self._announce(topic_key)
        self._ask_anew()

    def _stop_all(self) -> None:
        """Nothing is announced, known or waited for any more."""
        for topic in self._topics.values():
            topic.stop()
        self._welcome.clear()
        self._known.clear()

    def _interfaces_changed(self, carrier: bool) -> None:
        self._check_interfaces()
        if carrier and self._link is not None:
            for topic_key, topic in self._topics.items():
                if topic.announcement is not None:
                    topic.announcement.say_again()
                self._report_again(topic_key)
            self._ask()

    def _check_interfaces(self) -> None:
        """Networks come and go: a link opened for other addresses announces what cannot be dialled, and hears nothing on new ones."""
        loop = asyncio.get_running_loop()
        if self._closed or self._checking is not None:
            return
        if loop.time() - self._checked_at < CHECK_LIMIT or (self._reopening is not None and not self._reopening.done()):
            self._checking = loop.call_later(CHECK_LIMIT, self._check_later)
            return
        self._checked_at = loop.time()
        choices: list[str | int] = []
        present = []
        try:
            present = usable_interfaces(self._endpoint.interfaces)
            choices = multicast_choices(present)  # an IPv6 address is there before it may be used
        except DiscoveryError as error:
            log.debug("nothing to run mDNS on: %s", error)
        if (self._link is None and choices) or (self._link is not None and (present, choices) != (self._link.local, self._link.choices)):
            self._reopening = self._spawn(self._reopen())

    def _check_later(self) -> None:
        self._checking = None
        self._check_interfaces()

    async def _reopen(self) -> None:
        link, self._link = self._link, None
        self._stop_all()
        if link is not None:
            log.debug("the network interfaces have changed: mDNS starts anew")
            await link.close()
        try:
            await self._open()
        except DiscoveryError as error:
            log.log(logging.DEBUG if self._problem else logging.WARNING, "mDNS finds nobody until the network is back: %s", error)
            self._problem = str(error)
        else:
            self._problem = ""

    def _ask_anew(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self._spawn(self._keep_asking())

    async def _keep_asking(self) -> None:
        """Ask from time to time: packets get lost, and nobody needs to announce itself twice (RFC 6762, section 5.2)."""
        *early, regular, last = ASK_INTERVALS
        for interval in early:
            await asyncio.sleep(interval)
            known = [self._known.of(topic_key) for topic_key in self._topics]
            if not all(known):
                self._ask()
            if interval > ASK_LIMIT:  # whoever was too busy to be reached gets another chance
                for topic_key in self._topics:
                    self._report_again(topic_key, AGAIN)
        await asyncio.sleep(regular)
        while True:
            self._ask()
            await asyncio.sleep(last)

    def _ask(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._link is None:
            self._check_interfaces()
        if self._link is None or now - self._asked_at < ASK_LIMIT:
            return
        self._warn_of_silence(self._link.silent())
        self._asked_at = now
        for name, service in list(self._known):
            if now - service.heard_at > FORGET_AFTER:
                self._known.forget(name)
        self._link.ask(SERVICE_TYPE, [name for name, service in self._known if now - service.heard_at < KNOWN_FOR])

    def _warn_of_silence(self, silent: list[str]) -> None:
        """Once, and not at the first sight: a machine that was busy has not read yet what did come back."""
        lasting = [way for way in silent if way in self._silent]
        self._silent = silent
        if lasting and not self._told_silent:
            self._told_silent = True
            log.warning(
                "mDNS: not even our own packets come back on %s: nobody is found by multicast there (see that no firewall here drops"
                " UDP port 5353)",
                ", ".join(lasting),
            )

    # Announcing

    def _announce(self, topic_key: bytes) -> None:
        assert self._link is not None
        announcement = Announcement(self._link, topic_key, self._endpoint.port, self._spawn)
        self._topics[topic_key].announcement = announcement
        self._ours[announcement.name] = None
        while len(self._ours) > MAX_OWN_NAMES:
            self._ours.popitem(last=False)

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
            self._new_records += update.old is None
            if isinstance(record, DNSPointer):
                if record.name.lower() != SERVICE_TYPE:
                    continue
                if record.is_expired(now):
                    self._known.forget(record.alias)
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
        if self._new_records > MAX_HEARD:
            self._new_records = 0
            self._link.forget({name for name, _ in self._known})

    def _look(self, name: str, link: Link, sender: str) -> None:
        try:
            service = read_service(link.zeroconf, name, sender, asyncio.get_running_loop().time())
        except RefusedError as refused:
            self.refused[refused.reason] += 1
            log.debug("refused a service announced by %s: %s", sender, refused)
            return
        if service is None:
            return
        topic_key, known = self._known.find(name)
        if known is not None and service == known:
            self._known.remember(name, topic_key, service)
            service.reported_at = known.reported_at
            if topic_key is not None and service.heard_at - known.reported_at > REPORT_INTERVAL:
                self._report(topic_key, service)
            return
        self.refused.update({reason: count for reason, count in (("invalid", service.invalid), ("excess", service.excess)) if count})
        new = topic_key is None
        topic_key = next((key for key in self._topics if service.belongs_to(key)), None)
        self._known.remember(name, topic_key, service)
        if topic_key is None:
            return
        if not new:
            self._report(topic_key, service)
        elif self._welcome.at_once(name, len(self._known.of(topic_key))):
            self._report(topic_key, service)
            if (announcement := self._topics[topic_key].announcement) is not None:
                announcement.say_again()

    def _report_again(self, topic_key: bytes, most: int = MAX_SERVICES) -> None:
        known = self._known.of(topic_key)
        for service in random.sample(known, min(most, len(known))):
            asyncio.get_running_loop().call_soon(self._report, topic_key, service)

    def _report(self, topic_key: bytes, service: Service) -> None:
        if topic_key in self._topics:
            service.reported_at = asyncio.get_running_loop().time()
            log.debug("found %s, announced by %s", ", ".join(map(str, service.addresses)), service.sender)
            self._found(topic_key, Candidate(service.addresses, self.name, learned_from=service.sender))

    def _report_late(self, name: str) -> None:
        if name in self._known.matched:
            self._report(*self._known.matched[name])

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
