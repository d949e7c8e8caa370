"""One identity, one listening socket, one discovery, many topics."""

import asyncio
import logging
import os
import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from solyd_swarm.core.events import Addresses, Discovered
from solyd_swarm.core.keys import derive_topic_id
from solyd_swarm.core.ledger import Ledger
from solyd_swarm.core.overlay import Overlay, OverlayConfig
from solyd_swarm.core.wire import PeerInfo
from solyd_swarm.discovery.bootstrap import BootstrapSource
from solyd_swarm.discovery.interfaces import usable_interfaces
from solyd_swarm.discovery.scope import may_dial, scope_of
from solyd_swarm.discovery.source import Candidate, Source
from solyd_swarm.discovery.source import Endpoint as Announced
from solyd_swarm.errors import DiscoveryError, IdentityError, InterfaceError, OptionTypeError
from solyd_swarm.home import Home, find_home
from solyd_swarm.net import listen as listening
from solyd_swarm.net.dialler import Goal
from solyd_swarm.net.driver import Driver, Sink
from solyd_swarm.net.endpoint import Endpoint
from solyd_swarm.net.endpoint import Identity as Author
from solyd_swarm.net.resolve import resolve
from solyd_swarm.store.identity import Identity
from solyd_swarm.ticket import make_ticket, parse_bootstrap

if TYPE_CHECKING:
    from solyd_swarm.discovery.kademlia import KademliaSource

log = logging.getLogger("solyd_swarm.node")

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
    interfaces: str | Sequence[str] | None = None

    def check(self) -> None:
        """Raises `OptionTypeError`, `OptionError` or `TicketError` for what cannot work."""
        for name in ("mdns", "dht"):
            if not isinstance(getattr(self, name), bool):
                raise OptionTypeError(f"{name} takes True or False, not {getattr(self, name)!r}")
        if self.identity is not None and not isinstance(self.identity, str | os.PathLike):
            raise OptionTypeError(f"identity takes a path, not {type(self.identity).__name__}")
        listening.check_listen(self.listen)
        if self.interfaces is not None and not (
            isinstance(self.interfaces, str | Sequence) and all(isinstance(each, str) for each in self.interfaces)
        ):
            raise OptionTypeError(f"interfaces takes addresses or names of network interfaces, as strings, not {self.interfaces!r}")

    def allowed_interfaces(self) -> tuple[str, ...]:
        """What the user named, or the environment; empty: all."""
        named = self.interfaces if self.interfaces is not None else os.environ.get("SOLYD_SWARM_INTERFACES", "")
        parts = named.split(",") if isinstance(named, str) else named
        return tuple(part.strip() for part in parts if part.strip())


class _Membership:
    """One topic of a node."""

    __slots__ = ("driver", "ledger_saved", "topic_id")

    def __init__(self, driver: Driver, topic_id: bytes) -> None:
        self.driver = driver
        self.topic_id = topic_id
        self.ledger_saved = 0


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
        self._bound_host: str = self._sockets[0].getsockname()[0]
        private = secrets.token_bytes(32)
        self.endpoint = Endpoint(private, Author(self.identity.public_key, self.identity.sign), addresses=self.addresses, met=self._met)
        self.endpoint.port = self.port
        self.sources: dict[str, Source] = {}
        self.problems: dict[str, str] = {}
        """Sources that do not work here, with the reason."""
        self._topics: dict[bytes, _Membership] = {}
        self._dht: KademliaSource | None = None
        self._starting: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._ledger_timer: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self._closing = False
        self.home: Home = find_home(self)
        self.on_loop_ending: list[Callable[[], None]] = []
        """Called when the user's loop cancels everything: the swarms then begin to leave."""
        self.home.call(self._begin)

    # -- where we are -----------------------------------------------------------------------------------------

    def addresses(self) -> Addresses:
        """Where we can be dialled, furthest reach first; loopback only where there is nothing else."""
        try:
            local = [address.host for address in usable_interfaces(self._interfaces)]
        except InterfaceError:
            local = []
        if self._bound_host not in ("::", "0.0.0.0"):
            local = [sock.getsockname()[0] for sock in self._sockets if sock.fileno() >= 0] or [self._bound_host]
        elif self._bound_host == "0.0.0.0":
            local = [host for host in local if ":" not in host]
        order = {"global": 0, "private": 1, "link": 2, "loopback": 3}
        ranked = sorted((host for host in local if scope_of(host) in order), key=lambda host: order[scope_of(host)])
        outside = [host for host in ranked if scope_of(host) != "loopback"]
        return tuple((host, self.port) for host in (outside or ranked))

    @property
    def ticket(self) -> str:
        """A short text for ``bootstrap=`` of others: instance key and addresses, no topic."""
        loopback = (("127.0.0.1", self.port),) if self._bound_host in ("::", "0.0.0.0") and not self._interfaces else ()
        return make_ticket(self.endpoint.instance, tuple(dict.fromkeys(self.addresses() + loopback)))

    # -- life -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        loop = self.home.loop
        self._starting = loop.create_task(self._start(), name="solyd_swarm start")
        self._guard = loop.create_task(self._watch_loop(), name="solyd_swarm node")

    async def _start(self) -> None:
        """Discovery first: it takes the longest. The socket is bound, so whoever comes early waits in its backlog."""
        announced = Announced(self.port, self.endpoint.instance, self._interfaces)
        starts = []
        if self._contacts:
            await self._start_source(
                BootstrapSource(((contact.addresses, contact.instance) for contact in self._contacts), _resolve), announced
            )
        if self._options.dht:
            from solyd_swarm.discovery.kademlia import KademliaSource

            self._dht = KademliaSource(host=self._bound_host if self._options.listen else "0.0.0.0", port=self.port)
            await self._start_source(self._dht, announced)
            self.endpoint.dht_port = self._dht.port
        if self._options.mdns:
            from solyd_swarm.discovery.mdns import MdnsSource

            starts.append(self._start_source(MdnsSource(), announced))
        await asyncio.gather(self.endpoint.start(self._sockets), *starts)
        log.debug("listening on port %d, sources: %s", self.port, ", ".join(self.sources) or "none")

    async def _start_source(self, source: Source, announced: Announced) -> None:
        try:
            await source.start(announced, self._found)
        except DiscoveryError as error:
            self.problems[source.name] = str(error)
            log.warning("%s does not work here, the swarm goes on without: %s", source.name, error)
            return
        if self._closing:
            await source.close()
            return
        self.sources[source.name] = source
        for topic_key in self._topics:
            source.join(topic_key)

    async def _watch_loop(self) -> None:
        """Ends with the node. Cancelled, because the user's loop ends: the swarms still say goodbye, and all is closed."""
        try:
            await self._closed.wait()
        except asyncio.CancelledError:
            for leave in list(self.on_loop_ending):
                leave()
            await self.close()
            raise

    async def close(self) -> None:
        """Ends everything of this node on its loop. Topics are to be left before."""
        if self._closing:
            await self._closed.wait()
            return
        self._closing = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        self._save_ledgers()
        if self._ledger_timer is not None:
            self._ledger_timer.cancel()
        await asyncio.gather(*(source.close() for source in self.sources.values()), self.endpoint.close())
        for bound in self._sockets:
            bound.close()
        self.identity.close()
        self._closed.set()
        if self._guard is not None and self._guard is not asyncio.current_task():
            await asyncio.gather(self._guard, return_exceptions=True)

    # -- topics -----------------------------------------------------------------------------------------------

    def open_topic(self, topic_key: bytes, epoch: int, config: OverlayConfig, sink: Sink) -> Driver:
        """Joins a topic; on the loop."""
        topic_id = derive_topic_id(topic_key)
        overlay = Overlay(
            PeerInfo(self.endpoint.instance, self.addresses()[:16]),
            topic_id,
            self.identity.public_key,
            epoch,
            self.identity.sign,
            random.Random(secrets.randbits(128)),
            config,
            ledger=self._load_ledger(topic_id),
        )
        driver = Driver(overlay, topic_key, _Transport(self), sink, self.home.loop)
        self._topics[topic_key] = _Membership(driver, topic_id)
        self.endpoint.attach(driver)
        for source in self.sources.values():
            source.join(topic_key)
        if self._options.identity is not None and self._ledger_timer is None:
            self._ledger_timer = self.home.loop.call_later(LEDGER_INTERVAL, self._save_regularly)
        return driver

    def close_topic(self, topic_key: bytes) -> None:
        """Leaves a topic; its goodbye has been fed to the driver. On the loop."""
        membership = self._topics.get(topic_key)
        if membership is None:
            return
        self._save_ledger(membership)
        del self._topics[topic_key]
        membership.driver.close()
        self.endpoint.detach(topic_key)
        for source in self.sources.values():
            source.leave(topic_key)

    def look_again(self, topic_key: bytes) -> None:
        """The topic has no neighbour: every source is to look now."""
        if topic_key in self._topics:
            for source in self.sources.values():
                source.refresh(topic_key)

    def _load_ledger(self, topic_id: bytes) -> Ledger | None:
        blob = self.identity.load_ledger(topic_id)
        if blob is None:
            return None
        try:
            return Ledger.load(blob)
        except ValueError:
            log.warning("what was kept about a topic cannot be read; messages of the last minutes may be delivered again")
            return None

    def _save_regularly(self) -> None:
        self._ledger_timer = self.home.loop.call_later(LEDGER_INTERVAL, self._save_regularly)
        self._save_ledgers()

    def _save_ledgers(self) -> None:
        for membership in self._topics.values():
            self._save_ledger(membership)

    def _save_ledger(self, membership: _Membership) -> None:
        ledger = membership.driver.overlay.log.ledger
        if self._options.identity is None or ledger.version == membership.ledger_saved:
            return
        membership.ledger_saved = ledger.version
        try:
            self.identity.save_ledger(membership.topic_id, ledger.dump())
        except (IdentityError, ValueError) as error:
            log.warning("what was received cannot be remembered, a restart may deliver it again: %s", error)

    # -- finding and dialling ---------------------------------------------------------------------------------

    def _found(self, topic_key: bytes, candidate: Candidate) -> None:
        membership = self._topics.get(topic_key)
        if membership is None or candidate.instance == self.endpoint.instance:
            return
        addresses = tuple(
            (address.host, address.port) for address in candidate.addresses if may_dial(address.host, candidate.learned_from)
        )
        if addresses:
            log.debug("%s found a candidate at %s", candidate.source, ", ".join(map(str, candidate.addresses)))
            instance = candidate.instance or self.endpoint.instance_at(addresses)
            membership.driver.feed(Discovered(instance, addresses))

    def _met(self, host: str, dht_port: int) -> None:
        if self._dht is not None and "dht" in self.sources:
            self._dht.contact(host, dht_port)

    def dial(self, topic_key: bytes, instance: bytes, addresses: Addresses, via: bytes) -> None:
        """Dials for a driver. What a peer told us is dialled only as far as that peer's own address reaches."""
        teller = self.endpoint.address_of(via) if via else None
        if via:
            addresses = tuple(address for address in addresses if teller is not None and may_dial(address[0], teller[0]))
        self.endpoint.dial(Goal(topic_key, instance, addresses))

    def describe_sources(self) -> dict[str, str]:
        """Each way of finding peers, and its state, in words."""
        states = {"mdns": "off", "dht": "off", "bootstrap": "off"}
        states |= dict.fromkeys(self.sources, "on")
        if "dht" in self.sources and self._dht is not None:
            states["dht"] = f"on, {self._dht.nodes} nodes known"
        return states | {name: f"failed: {reason}" for name, reason in self.problems.items()}


class _Transport:
    """The node's network as a driver sees it."""

    def __init__(self, node: BaseNode) -> None:
        self._node = node
        self.send = node.endpoint.send
        self.dial = node.dial
        self.close = node.endpoint.close_channel
        self.backlog = node.endpoint.backlog


async def _resolve(host: str, port: int) -> list[tuple[str, int]]:
    return [(ip, port) for _, ip, port in await resolve(host, port)]
