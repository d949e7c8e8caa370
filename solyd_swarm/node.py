"""One identity, one listening socket, one discovery, many topics."""

import asyncio
import functools
import logging
import os
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass

from solyd_swarm.core.events import Addresses, Discovered
from solyd_swarm.core.keys import derive_topic_id
from solyd_swarm.core.overlay import Overlay, OverlayConfig
from solyd_swarm.core.wire import MAX_ADDRESSES, PeerInfo, make_peer_info
from solyd_swarm.discovery.changes import Changes, present_hosts
from solyd_swarm.discovery.interfaces import usable_interfaces
from solyd_swarm.discovery.reach import Reach
from solyd_swarm.discovery.scope import may_dial, scope_of
from solyd_swarm.discovery.source import Candidate, Source
from solyd_swarm.discovery.source import Endpoint as Announced
from solyd_swarm.errors import OptionError, OptionTypeError
from solyd_swarm.finding import Finder
from solyd_swarm.home import Home, find_home
from solyd_swarm.net import listen as listening
from solyd_swarm.net.driver import Driver, Sink
from solyd_swarm.net.endpoint import Endpoint
from solyd_swarm.net.goals import Goal
from solyd_swarm.net.matching import Identity as Author
from solyd_swarm.store.addresses import AddressBook
from solyd_swarm.store.identity import Identity
from solyd_swarm.store.memory import TopicMemory, Unread
from solyd_swarm.ticket import make_ticket, parse_bootstrap

log = logging.getLogger("solyd_swarm.node")

ADDRESS_INTERVAL = 15.0
"""Seconds between looks at our own addresses, which members hear from us and from one another."""
LOOK_INTERVAL = 5.0
"""Seconds between looks of all sources, while a topic has no neighbour."""
LEDGER_INTERVAL = 1.0
"""Seconds between savings of what was accepted, for an identity kept in a file: what a crash may make us deliver twice."""


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Options of a node, validated by `check`."""

    identity: str | os.PathLike[str] | None = None
    listen: tuple[str, int] | None = None
    bootstrap: str | Iterable[str] | None = None
    mdns: bool = True
    dht: bool = True
    mainline: bool | str | Iterable[str] = True
    portmap: bool = True
    interfaces: str | Sequence[str] | None = None

    def check(self) -> None:
        """Raises `OptionTypeError`, `OptionError` or `TicketError` for what cannot work."""
        for name in ("mdns", "dht", "portmap"):
            if not isinstance(getattr(self, name), bool):
                raise OptionTypeError(f"{name} takes True or False, not {getattr(self, name)!r}")
        self.mainline_routers()
        if self.identity is not None and not isinstance(self.identity, str | os.PathLike):
            raise OptionTypeError(f"identity takes a path, not {type(self.identity).__name__}")
        listening.check_listen(self.listen)
        if self.interfaces is not None and not (
            isinstance(self.interfaces, str | Sequence) and all(isinstance(each, str) for each in self.interfaces)
        ):
            raise OptionTypeError(f"interfaces takes addresses or names of network interfaces, as strings, not {self.interfaces!r}")

    def mainline_routers(self) -> bool | tuple[tuple[str, int], ...]:
        """Whether to use the mainline DHT, or by which nodes to enter it. Raises `OptionTypeError` or `OptionError`."""
        if isinstance(self.mainline, bool):
            return self.mainline
        try:
            contacts = parse_bootstrap(self.mainline)
        except TypeError as error:
            raise OptionTypeError(f'mainline takes True, False, or "host:port" of nodes of that DHT, not {self.mainline!r}') from error
        if any(contact.instance for contact in contacts):
            raise OptionError('mainline takes "host:port" of nodes of that DHT, and no tickets, which are for bootstrap')
        return tuple(address for contact in contacts for address in contact.addresses)

    def allowed_interfaces(self) -> tuple[str, ...]:
        """What the user named, or the environment; empty: all."""
        named = self.interfaces if self.interfaces is not None else os.environ.get("SOLYD_SWARM_INTERFACES", "")
        parts = named.split(",") if isinstance(named, str) else named
        return tuple(part.strip() for part in parts if part.strip())


class _Membership:
    """One topic of a node."""

    __slots__ = ("driver", "memory", "unread")

    def __init__(self, driver: Driver, memory: TopicMemory | None, unread: Callable[[], list[Unread]]) -> None:
        self.driver = driver
        self.memory = memory
        self.unread = unread

    def save(self, *, final: bool = False) -> None:
        """Remembers what was received, where it is to be remembered."""
        if self.memory is not None:
            overlay = self.driver.overlay
            unread = self.unread() + [(envelope, 0) for envelope in overlay.sequencer.waiting()]
            self.memory.save(overlay.log.ledger, unread, final=final)


class BaseNode:
    """The machinery of a node; `solyd_swarm.Node` adds `pubsub` to it.

    Its identity is opened and its socket bound before the constructor returns, so that their errors are raised there.
    Everything else happens on the loop of its home.
    """

    def __init__(self, options: NodeOptions) -> None:
        options.check()
        self._options = options
        self._contacts = parse_bootstrap(options.bootstrap)
        self._interfaces = options.allowed_interfaces()
        local = usable_interfaces(self._interfaces) if self._interfaces else []
        self.identity = Identity.open(options.identity, now_us=lambda: time.time_ns() // 1000)
        try:
            self._sockets = listening.bind(options.listen, [address.host for address in local])
        except Exception:
            self.identity.close()
            raise
        self.port: int = self._sockets[0].getsockname()[1]
        bound = [each.getsockname()[0] for each in self._sockets]
        self._bound_host: str = bound[0]
        self._reach = Reach(self._interfaces, bound, self.port)
        author = Author(self.identity.public_key, self.identity.sign)
        self.endpoint = Endpoint(
            secrets.token_bytes(32),
            author,
            addresses=self.addresses,
            met=lambda host, dht_port: self.finder.met(host, dht_port),
            linked=lambda topic_key, host, port, dialled: self.finder.addresses.met(topic_key, host, port, dialled),
            may_dial=may_dial,
            may_go=lambda host: self._reach.may_go_to(host),
            changed=self._tell_addresses,
        )
        self.endpoint.port = self.port
        self.finder = Finder(
            self._contacts,
            mdns=options.mdns,
            dht=options.dht,
            mainline=options.dht and options.mainline_routers(),
            portmap=options.portmap and scope_of(bound[0]) != "loopback",
            dht_host=self._bound_host if options.listen else "::",
            book=AddressBook(self.identity if options.identity is not None else None),
            is_reached=lambda host, port: bool(self.endpoint.instance_at(((host, port),))),
            found=self._found,
            topics=lambda: self._topics,
            dht_is_up=self.endpoint.announce_dht,
            mapped=self.set_mapped_addresses,
        )
        self._topics: dict[bytes, _Membership] = {}
        self._changes = Changes(self._changed)
        self._look_timer: asyncio.TimerHandle | None = None
        self._starting: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._ledger_timer: asyncio.TimerHandle | None = None
        self._address_timer: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self._closing = False
        self._loop_ends = False
        try:
            self.home: Home = find_home(self)
        except BaseException:
            self._release()
            raise
        self.on_loop_ending: list[Callable[[], Coroutine[None, None, None]]] = []
        """Run when the user's loop cancels everything: the swarms then leave."""
        self.home.call(self._begin)

    @property
    def sources(self) -> dict[str, Source]:
        """The ways of finding peers that work, by name."""
        return self.finder.sources

    @property
    def problems(self) -> dict[str, str]:
        """Sources that do not work here, with the reason."""
        return self.finder.problems

    # -- where we are -----------------------------------------------------------------------------------------

    def addresses(self) -> Addresses:
        """Where others may hear that we can be dialled, furthest reach first; loopback only where there is nothing else."""
        return self.endpoint.outside.published(self._reach.addresses())[:MAX_ADDRESSES]

    def set_mapped_addresses(self, addresses: Iterable[tuple[str, int]]) -> None:
        """A router passes these of its public addresses (IP literal, TCP port) on to us; told to others once one has come in by them.

        They replace those set before. On the loop.
        """
        self.endpoint.outside.set_mapped(addresses)

    def _renew_addresses(self) -> None:
        self._address_timer = self.home.loop.call_later(ADDRESS_INTERVAL, self._renew_addresses)
        self.endpoint.outside.look(self._reach.addresses())
        self._tell_addresses()

    def _tell_addresses(self) -> None:
        me = make_peer_info(self.endpoint.instance, self.addresses())
        for membership in self._topics.values():
            membership.driver.overlay.membership.views.me = me

    def _tell(self, info: PeerInfo, peer: bytes) -> PeerInfo:
        """A peer as another one may know it: addresses of a network only to whom we reach inside that network."""
        host = self.endpoint.host_of(peer)
        return make_peer_info(info.instance, tuple(each for each in info.addresses if host is not None and may_dial(each[0], host)))

    @property
    def ticket(self) -> str:
        """A short text for ``bootstrap=`` of others: instance key and addresses, no topic."""
        return make_ticket(self.endpoint.instance, self._reach.ticket_addresses(MAX_ADDRESSES, self.addresses()))

    # -- life -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._closing:
            return
        loop = self.home.loop
        self._renew_addresses()
        self._look_timer = loop.call_later(LOOK_INTERVAL, self._look_while_alone)
        self._changes.start()
        self._starting = loop.create_task(self._start(), name="solyd_swarm start")
        self._guard = loop.create_task(self._watch_loop(), name="solyd_swarm node")

    async def _start(self) -> None:
        """All at once: none waits for another. Until the sockets are listened to, whoever comes early waits in their backlog."""
        announced = Announced(self.port, self.endpoint.instance, self._interfaces, self.addresses)
        for outcome in await asyncio.gather(self.endpoint.start(self._sockets), self.finder.start(announced), return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("the node does not listen, or does not look for others", exc_info=outcome)
        log.debug("listening on port %d, sources: %s", self.port, ", ".join(self.sources) or "none")

    async def _watch_loop(self) -> None:
        """Ends with the node. Cancelled, because the user's loop ends: the swarms still say goodbye, and all is closed."""
        try:
            await self._closed.wait()
        except asyncio.CancelledError:
            self._loop_ends = True
            for outcome in await asyncio.gather(*(end() for end in self.on_loop_ending), return_exceptions=True):
                if outcome is not None:
                    log.error("a swarm did not leave as it should when its loop ended", exc_info=outcome)
            await self.close()
            raise

    async def close(self) -> None:
        """Ends everything of this node on its loop. Topics are to be left before. Idempotent."""
        self._closing = True
        while not self._closed.is_set():
            if self._closer is None or self._closer.cancelled():  # by a loop that ends: whoever still waits begins again
                self._closer = self.home.loop.create_task(self._close(), name="solyd_swarm close node")
                self._closer.add_done_callback(self._after_closing)
            await asyncio.wait([self._closer])
        if self._guard is not None and not self._loop_ends:
            await asyncio.gather(self._guard, return_exceptions=True)

    def _after_closing(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("closing the node failed", exc_info=error)
            self._closed.set()

    async def _close(self) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        self._save_ledgers()
        self._changes.close()
        for timer in (self._ledger_timer, self._address_timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        for outcome in await asyncio.gather(*self.finder.closing(), self.endpoint.close(), return_exceptions=True):
            if isinstance(outcome, asyncio.CancelledError):
                raise outcome  # begun again by whoever waits
            if isinstance(outcome, Exception):
                log.error("something of the node did not close as it should", exc_info=outcome)
        self._release()

    def _release(self) -> None:
        for bound in self._sockets:
            bound.close()
        self.identity.close()

    # -- topics -----------------------------------------------------------------------------------------------

    def open_topic(
        self, topic_key: bytes, epoch: int, config: OverlayConfig, sink: Sink, unread: Callable[[], list[Unread]]
    ) -> tuple[Driver, dict[tuple[bytes, int], int]]:
        """Joins a topic; on the loop.

        Args:
            unread: tells what was delivered to the sink and not read by anybody yet.

        Returns:
            The driver; and of what is delivered again because an earlier life has read it in part, by (author, epoch), the
            first number that it has not.
        """
        topic_id = derive_topic_id(topic_key)
        memory = TopicMemory(self.identity, topic_id) if self._options.identity is not None else None
        overlay = Overlay(
            make_peer_info(self.endpoint.instance, self.addresses()),
            topic_id,
            self.identity.public_key,
            epoch,
            self.identity.sign,
            random.Random(secrets.randbits(128)),
            config,
            ledger=memory.ledger if memory is not None else None,
        )
        driver = Driver(overlay, topic_key, _Transport(self), sink, self.home.loop, asleep=self._changes.asleep)
        overlay.membership.views.tells = self._tell
        self._topics[topic_key] = _Membership(driver, memory, unread)
        self.endpoint.attach(driver)
        for source in self.sources.values():
            source.join(topic_key)
        if self._options.identity is not None and self._ledger_timer is None:
            self._ledger_timer = self.home.loop.call_later(LEDGER_INTERVAL, self._save_regularly)
        return driver, memory.partly_read if memory is not None else {}

    def close_topic(self, topic_key: bytes) -> Callable[[], None]:
        """Leaves a topic; its goodbye has been fed to the driver. On the loop.

        Returns:
            To be called when the last message has been read, before the node is closed: remembers what was not.
        """
        membership = self._topics.pop(topic_key, None)
        if membership is None:
            return lambda: None
        membership.save()
        membership.driver.close()
        self.endpoint.detach(topic_key)
        self.finder.leave(topic_key)
        return functools.partial(membership.save, final=True)

    def look_again(self, topic_key: bytes) -> None:
        """The topic has no neighbour: every source is to look now."""
        if topic_key in self._topics:
            self.finder.refresh(topic_key)

    def _look_while_alone(self) -> None:
        self._look_timer = self.home.loop.call_later(LOOK_INTERVAL, self._look_while_alone)
        for topic_key, membership in self._topics.items():
            if not membership.driver.overlay.neighbors:
                self.look_again(topic_key)

    def _changed(self, what: str) -> None:
        """The network may be another one, or back: whatever is known of it is looked up again."""
        if self._address_timer is not None:
            self._address_timer.cancel()
        self._renew_addresses()
        present = present_hosts()
        if any(scope_of(host) in ("private", "global") for host in present):  # else they may be back in a moment
            self.endpoint.forsake(present)
        self.finder.changed()
        for topic_key in self._topics:
            self.look_again(topic_key)

    def _save_regularly(self) -> None:
        self._ledger_timer = self.home.loop.call_later(LEDGER_INTERVAL, self._save_regularly)
        self._save_ledgers()

    def _save_ledgers(self) -> None:
        for membership in self._topics.values():
            membership.save()

    # -- finding and dialling ---------------------------------------------------------------------------------

    def _found(self, topic_key: bytes, candidate: Candidate) -> None:
        membership = self._topics.get(topic_key)
        if membership is None or candidate.instance == self.endpoint.instance:
            return
        addresses = tuple((address.host, address.port) for address in candidate.addresses if may_dial(address.host, candidate.learned_from))
        if addresses:
            log.debug("%s found a candidate at %s", candidate.source, ", ".join(map(str, candidate.addresses)))
            instance = candidate.instance or self.endpoint.instance_at(addresses)
            membership.driver.feed(Discovered(instance, addresses))

    def dial(self, topic_key: bytes, instance: bytes, addresses: Addresses, via: bytes) -> None:
        """Dials for a driver. What a peer told us is dialled only as far as that peer's own address reaches."""
        teller = self.endpoint.host_of(via) if via else None
        if via:
            addresses = tuple(address for address in addresses if teller is not None and may_dial(address[0], teller))
        allowed = tuple(address for address in addresses if self._reach.may_go_to(address[0]))
        if addresses and not allowed:
            log.debug("no allowed interface leads to %s", ", ".join(host for host, _ in addresses))
        addresses = allowed
        self.endpoint.dial(Goal(topic_key, instance, addresses, via))

    def describe_sources(self) -> dict[str, str]:
        """Each way of finding peers, and its state, in words."""
        return self.finder.describe()


class _Transport:
    """The node's network as a driver sees it."""

    def __init__(self, node: BaseNode) -> None:
        self._node = node
        self.send = node.endpoint.send
        self.dial = node.dial
        self.close = node.endpoint.close_channel
        self.backlog = node.endpoint.backlog
