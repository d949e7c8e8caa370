"""The ways in which a node finds peers, and is found: it starts them, ends them, and says how each of them does."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING

from solyd_swarm.discovery.addressbook import AddressBookSource
from solyd_swarm.discovery.bootstrap import BootstrapSource
from solyd_swarm.discovery.given_hosts import GivenHosts
from solyd_swarm.discovery.interfaces import usable_interfaces
from solyd_swarm.discovery.source import Address, Endpoint, Found, Source
from solyd_swarm.errors import DiscoveryError, InterfaceError
from solyd_swarm.net.resolve import resolve
from solyd_swarm.store.addresses import AddressBook
from solyd_swarm.ticket import Contact

if TYPE_CHECKING:
    from solyd_swarm.discovery.dht_entry import DhtEntry
    from solyd_swarm.discovery.kademlia import KademliaSource
    from solyd_swarm.discovery.mainline import MainlineSource
    from solyd_swarm.discovery.portmap import PortMapper

log = logging.getLogger("solyd_swarm.node")

MAX_EARLY = 32
"""DHT nodes remembered until our own is up: as many as it takes itself."""


class Finder:
    """All sources of a node.

    Args:
        contacts: where to begin, as the user said.
        mdns, dht: whether to use these.
        mainline: whether to use the internet's DHT, or the nodes (name or IP literal, UDP port) to enter one by.
        portmap: whether to ask the router to pass our port on.
        dht_host: IP literal that our own DHT node binds.
        book: where members and DHT nodes were reached before.
        is_reached: whether somebody that we have reached at this address has a channel with us.
        found: told of candidates.
        topics: the keys of the topics that the node is in.
        dht_is_up: told the UDP port of our own DHT node.
        mapped: told the addresses at which a router passes our port on.
    """

    def __init__(
        self,
        contacts: Sequence[Contact],
        *,
        mdns: bool,
        dht: bool,
        mainline: bool | Sequence[tuple[str, int]],
        portmap: bool,
        dht_host: str,
        book: AddressBook,
        is_reached: Callable[[str, int], bool],
        found: Found,
        topics: Callable[[], Iterable[bytes]],
        dht_is_up: Callable[[int], None],
        mapped: Callable[[Sequence[tuple[str, int]]], None],
    ) -> None:
        self._contacts = tuple((contact.addresses, contact.instance) for contact in contacts)
        self._wants = {"mdns": mdns, "dht": dht, "mainline": mainline is not False, "portmap": portmap}
        self._routers = None if isinstance(mainline, bool) else tuple(mainline)
        self._dht_host = dht_host
        self._found, self._topics, self._dht_is_up, self._mapped = found, topics, dht_is_up, mapped
        self.sources: dict[str, Source] = {}
        """Those that work, by name."""
        self.problems: dict[str, str] = {}
        """Sources that do not work here, with the reason."""
        self.unused: dict[str, str] = {}
        """Sources that would be of no use here, with the reason."""
        self.mapper: PortMapper | None = None
        self.dht: KademliaSource | None = None
        self.mainline: MainlineSource | None = None
        self._hosts = GivenHosts(resolve_host)
        self._entry: DhtEntry | None = None
        self._book = book
        self.addresses = AddressBookSource(book, is_reached, nodes=self._known_nodes, states=self._states)
        self._nodes, self._mainline_state = book.nodes(), book.state("mainline")
        self._failed: list[Source] = []
        self._met_early: dict[tuple[str, int], None] = {}  # DHT nodes we heard of before our own was up

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self, announced: Endpoint) -> None:
        """All at once, but for what takes the processor a while and helps with peers further away: that comes last."""
        starts = [self._start_source(self.addresses, announced)]
        if self._contacts:
            starts.append(self._start_source(BootstrapSource(self._contacts, self._hosts), announced))
        if self._wants["dht"]:
            from solyd_swarm.discovery.kademlia import KademliaSource

            self.dht = KademliaSource(host=self._dht_host, port=announced.port, nodes=self._nodes)
            starts.append(self._start_dht(self.dht, announced))
        if self._wants["mdns"]:
            from solyd_swarm.discovery.mdns import MdnsSource

            starts.append(self._start_source(MdnsSource(), announced))
        await asyncio.gather(*starts)
        await self._start_far(announced)

    async def _start_far(self, announced: Endpoint) -> None:
        """What finds those beyond the local network, and lets them in."""
        if _stays_on_this_machine(announced):
            self.unused = {name: "off: only loopback may be used" for name in ("mainline", "portmap") if self._wants[name]}
        if self._wants["portmap"] and "portmap" not in self.unused:
            from solyd_swarm.discovery.portmap import PortMapper

            self.mapper = PortMapper(announced.port, changed=self._remapped, interfaces=announced.interfaces)
            await self.mapper.start()
        if self._wants["mainline"] and ("mainline" not in self.unused or self._routers is not None):
            from solyd_swarm.discovery.mainline import PUBLIC_BOOTSTRAP, MainlineSource

            self.unused.pop("mainline", None)
            routers = PUBLIC_BOOTSTRAP if self._routers is None else self._routers
            self.mainline = MainlineSource(resolve_host, bootstrap=routers, state=self._mainline_state)
            await self._start_source(self.mainline, announced)

    async def _start_dht(self, dht: "KademliaSource", announced: Endpoint) -> None:
        await self._start_source(dht, announced)
        if dht.port:
            self._dht_is_up(dht.port)
            for host, port in self._met_early:
                dht.contact(host, port)
            if self._contacts:
                self._enter(dht)
        self._met_early.clear()

    def _enter(self, dht: "KademliaSource") -> None:
        from solyd_swarm.discovery.dht_entry import DhtEntry

        places = [address for addresses, _ in self._contacts for address in addresses]
        self._entry = DhtEntry(places, self._hosts, topics=self._topics, contact=dht.contact, nodes=lambda: dht.nodes)

    async def _start_source(self, source: Source, announced: Endpoint) -> None:
        try:
            await source.start(announced, self._found)
        except asyncio.CancelledError:
            self.sources[source.name] = source  # for `close`: it may have opened a socket already
            raise
        except Exception as error:  # one source that fails, in whatever way, takes nothing from the others
            self.problems[source.name] = str(error) or type(error).__name__
            unexpected = None if isinstance(error, DiscoveryError) else error
            log.warning("%s does not work here, the swarm goes on without: %s", source.name, error, exc_info=unexpected)
            self._failed.append(source)
            return
        self.sources[source.name] = source
        for topic_key in self._topics():
            source.join(topic_key)

    def closing(self) -> list[Coroutine[None, None, None]]:
        """What ends each of them; to be awaited."""
        others = [each for each in (self.mapper, self._entry) if each is not None]
        return [each.close() for each in (*self.sources.values(), *self._failed, *others)]

    # -- what happens -----------------------------------------------------------------------------------------

    def join(self, topic_key: bytes) -> None:
        for source in self.sources.values():
            source.join(topic_key)

    def leave(self, topic_key: bytes) -> None:
        for source in self.sources.values():
            source.leave(topic_key)

    def changed(self) -> None:
        """The network has changed, or the machine slept."""
        if self.mapper is not None:
            self.mapper.network_changed()
        for source in self.sources.values():
            source.changed()

    def refresh(self, topic_key: bytes) -> None:
        """Every source is to look now."""
        for source in self.sources.values():
            source.refresh(topic_key)

    def met(self, host: str, dht_port: int) -> None:
        """A peer at this IP literal has a node of our DHT."""
        if self.dht is not None and self.dht.port:
            self.dht.contact(host, dht_port)
        elif len(self._met_early) < MAX_EARLY:
            self._met_early[host, dht_port] = None

    def _known_nodes(self) -> list[tuple[str, int]]:
        return self.dht.known_nodes() if self.dht is not None else []

    def _states(self) -> dict[str, bytes]:
        return {"mainline": self.mainline.saved_state()} if self.mainline is not None else {}

    def _remapped(self, address: Address | None) -> None:
        self._mapped(() if address is None else ((address.host, address.port),))

    # -- how they do ------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """Each way of finding peers, and its state, in words."""
        states = {name: "starting" if wanted else "off" for name, wanted in self._wants.items()} | {"bootstrap": "off"}
        states |= self.unused | {name: "on" for name in self.sources if name != "addresses" or self._book.outlives}
        if "dht" in self.sources and self.dht is not None:
            states["dht"] = f"on, {self.dht.nodes} nodes known"
        if "mainline" in self.sources and self.mainline is not None:
            states["mainline"] = self.mainline.state
        if (local := self.sources.get("mdns")) is not None:
            states["mdns"] = local.describe()
        if self.mapper is not None:
            states["portmap"] = self.mapper.state
        if self._hosts.problems:
            unknown = "; ".join(f"{host!r} cannot be looked up: {reason}" for host, reason in self._hosts.problems.items())
            states["bootstrap"] = f"on, but {unknown}"
        return states | {name: f"failed: {reason}" for name, reason in self.problems.items()}


def _stays_on_this_machine(announced: Endpoint) -> bool:
    try:
        return all(address.ip.is_loopback for address in usable_interfaces(announced.interfaces))
    except InterfaceError:  # no network yet, or none of the interfaces named: they may come
        return False


async def resolve_host(host: str, port: int) -> list[tuple[str, int]]:
    """The IP literals of a host name, each with the port."""
    return [(ip, port) for _, ip, port in await resolve(host, port)]
