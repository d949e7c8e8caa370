"""A node of the embedded DHT: the package's server with a look-up that merges, and a store that does not overwrite.

Kademlia (Maymounkov and Mazieres, IPTPS 2002) with the package's routing table and storage interface. Differences from the package:
look-ups (`solyd_swarm.discovery.dht_lookup`) hear all of the closest nodes, not just the first that has something; storing needs a
token from the look-up (BEP 5); nobody republishes what others announced; nothing is pickled.
"""

import asyncio
import errno
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from statistics import median_low
from typing import Any, NoReturn

from kademlia.network import Server

from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.discovery.dht_lookup import ALPHA, CROWDED, SURVEY_SECONDS, Holder, LookUp, Report, wide_look_up
from solyd_swarm.discovery.dht_protocol import DhtProtocol, Host
from solyd_swarm.discovery.dht_storage import Caps, Entry, RecordStorage
from solyd_swarm.discovery.records import SignedRecord, dht_key
from solyd_swarm.discovery.scope import scope_of

__all__ = ["DhtServer", "Holder", "LookUp"]

log = logging.getLogger("solyd_swarm.discovery.dht")

MEASURES = 9
"""Measures of the DHT's density that are kept: the median tells, whatever a few of them saw."""
SURVEY_LASTS = 20.0
"""Seconds for which a measure is good enough to call a key crowded."""
RANDOM_IDS = 2
"""Random ids looked up beside our own when the table is refreshed: they fill it (section 2.3 of the paper) and tell the DHT's density."""


class DhtServer(Server):  # type: ignore[misc]
    """A node of the DHT. Owns its socket, and through its protocol every timer.

    Args:
        stored: called with (key, record, sender's IP) when a peer stored a record here that is new.
        met: called with a node that has just got into the routing table.
        caps: bounds of what is stored for others.
        monotonic: the clock, in seconds, that records expire by.
    """

    def __init__(
        self,
        *,
        stored: Callable[[bytes, SignedRecord, str], None],
        met: Callable[[Any], None],
        caps: Caps | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        storage = RecordStorage(caps, monotonic)
        super().__init__(ksize=wire.REPLICAS, alpha=ALPHA, node_id=secrets.token_bytes(20), storage=storage)
        self._stored, self._met, self._monotonic = stored, met, monotonic
        self._radii: deque[int] = deque(maxlen=MEASURES)
        self._survey: asyncio.Task[None] | None = None
        self._surveyed = float("-inf")

    def _create_protocol(self) -> DhtProtocol:
        return DhtProtocol(self.node, self.storage, stored=self._stored, met=self._met, monotonic=self._monotonic)

    def refresh_table(self, interval: float = 3600) -> None:
        """Nothing: the package starts tasks here that nobody ends, and republishes others' values. See `refresh`."""

    def save_state(self, fname: str) -> NoReturn:
        """Never: the package pickles, and whoever can write such a file runs code here. See `known_nodes`."""
        raise NotImplementedError("the state of this DHT is what known_nodes() returns")

    def save_state_regularly(self, fname: str, frequency: int = 600) -> NoReturn:
        self.save_state(fname)

    @classmethod
    async def load_state(cls, fname: str, port: int, interface: str = "0.0.0.0") -> NoReturn:
        raise NotImplementedError("the state of this DHT is what known_nodes() returns; see bootstrap()")

    async def bind(self, host: str, port: int) -> None:
        """Listen; at another port where that is taken, and for IPv4 alone where there is no IPv6. Raises ``OSError``."""
        try:
            await self.listen(port, host)
        except OSError as error:
            if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                log.debug("there is no IPv6 here")
                await self.bind("0.0.0.0", port)
            elif port:
                log.debug("UDP port %d is taken; using another", port)
                await self.bind(host, 0)
            else:
                raise

    async def listen(self, port: int, interface: str = "::") -> None:
        """Bind a UDP socket to an IP literal: ``"::"`` for both families, also where the system has them apart. Raises ``OSError``."""
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        endpoint = socket.socket(family, socket.SOCK_DGRAM)
        try:
            endpoint.setblocking(False)
            if family == socket.AF_INET6:
                endpoint.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, interface != "::")
            address = await asyncio.get_running_loop().getaddrinfo(interface, port, family=family, flags=socket.AI_NUMERICHOST)
            endpoint.bind(address[0][4])
            create = asyncio.get_running_loop().create_datagram_endpoint(self._create_protocol, sock=endpoint)
            self.transport, self.protocol = await create
        except BaseException:
            endpoint.close()
            raise

    @property
    def host(self) -> Host:
        """Where the socket is bound."""
        name = self.transport.get_extra_info("sockname")
        return str(name[0]), int(name[1])

    @property
    def nodes(self) -> int:
        """Contacts in the routing table."""
        return 0 if self.protocol is None else len(self.protocol.router.contacts())

    async def bootstrap(self, addrs: Iterable[Host]) -> list[Holder]:
        """Meet the nodes at these addresses (IP literals), and through them the neighbourhood of our own id."""
        await asyncio.gather(*[self.bootstrap_node(addr) for addr in addrs])
        return await self.get(self.node.id)

    async def bootstrap_node(self, addr: Host) -> bool:
        """Ask for the id of whoever is at an address. True if it answered, and is thus in the table unless that is full."""
        ip_address(addr[0])  # a name would be looked up by the socket, and block
        future = self.protocol.greet(addr)
        if future is None:
            return False
        await asyncio.wait([future])
        return future.result() is not None

    def known_nodes(self, most: int = 64) -> list[Host]:
        """Nodes to begin with another time, best first: those that answered last time, of wide reach, known longest."""
        reach = {"global": 0, "private": 1, "link": 2}
        protocol = self.protocol

        def worth(node: Any) -> tuple[bool, int, float]:
            return protocol.is_struck(node), reach.get(scope_of(node.ip), 3), -protocol.known_for(node)

        return [(node.ip, node.port) for node in sorted(protocol.router.contacts(), key=worth)[:most]]

    async def refresh(self) -> None:
        """Look for our own id, for random ones, and for one in each bucket not touched for an hour (section 2.3 of the paper)."""
        await asyncio.wait([self._look_around()])
        for node_id in self.protocol.get_refresh_ids():
            await LookUp(self.protocol, node_id).run()

    def _look_around(self) -> "asyncio.Task[None]":
        """Look for our own id and random ones; whoever asks meanwhile waits for the same."""
        if self._survey is None or self._survey.done():
            self._survey = asyncio.get_running_loop().create_task(self._measure(), name="dht survey")
            self._survey.add_done_callback(_report)
        return self._survey

    async def _measure(self) -> None:
        ids = [self.node.id, *[secrets.token_bytes(20) for _ in range(RANDOM_IDS)]]
        look_ups = [LookUp(self.protocol, node_id, seconds=SURVEY_SECONDS) for node_id in ids]
        found = await asyncio.gather(*[look_up.run() for look_up in look_ups])
        self._surveyed = self._monotonic()
        for node_id, look_up, holders in zip(ids, look_ups, found, strict=True):
            if len(holders) == wire.REPLICAS and not look_up.cut_short:
                self._radii.append(_distance(holders[-1], node_id))

    async def get(self, key: bytes, public: bytes | None = None, report: Report | None = None) -> list[Holder]:
        """Look a key up, here and at the nodes closest to it; see `LookUp`. Returns those nodes: k, or more where the key is crowded."""
        if public is not None and report is not None:
            for entry in self.storage.entries(key):
                report(entry.record, entry.sender)
        # Attack: nodes with ids chosen next to a key swallow what is stored there. It is stored around them, too. The median holds
        # while they are at fewer than half of the ids looked up, which are random and our own.
        crowded = median_low(self._radii) // CROWDED if self._radii and public is not None else 0
        survey = self._look_around() if public is not None and not self._radii and self.nodes >= wire.REPLICAS else None
        first = LookUp(self.protocol, key, public, report, crowded=crowded)
        holders = await first.run()
        if public is None or first.asked() < wire.REPLICAS:
            return holders
        if not self._radii:
            await asyncio.wait([survey or self._look_around()])
            if not self._radii:
                return holders
        radius = median_low(self._radii)
        if first.asked(within=radius // CROWDED) < wire.REPLICAS and not first.cut_short:
            return holders
        if self._monotonic() - self._surveyed > SURVEY_LASTS:
            await asyncio.wait([self._look_around()])  # a DHT that grows crowds every key, measured by what it was
            radius = median_low(self._radii)
            if first.asked(within=radius // CROWDED) < wire.REPLICAS and not first.cut_short:
                return await LookUp(self.protocol, key, public, report, earlier=first).run()
        return holders + await wide_look_up(self.protocol, first, key, public, report, radius)

    async def set(self, key: bytes, value: SignedRecord) -> bool:
        """Store a record here and at the nodes closest to its key. True if one of those accepted it."""
        return await self.set_digest(key, value)

    async def set_digest(self, dkey: bytes, value: SignedRecord) -> bool:
        self.keep(value)
        return bool(await self.place(value, await self.get(dkey)))

    def keep(self, record: SignedRecord) -> None:
        """Store an own record here, so that whoever comes first through us finds it."""
        key = dht_key(record.public)
        self.storage[key] = Entry(record, "")

    async def place(self, record: SignedRecord, holders: Iterable[Holder]) -> frozenset[bytes]:
        """Store a record at nodes that a look-up found, all at once. Returns the ids of those that hold it now."""
        key = dht_key(record.public)
        asked = []
        for holder in holders:
            store = wire.Store(self.node.id, key, record.public, record.raw, holder.token)
            asked.append((holder.node, self.protocol.call((holder.node.ip, holder.node.port), "store", store)))
        replies = [self.protocol.read(node, await future, wire.Stored) for node, future in asked]
        return frozenset(stored.id for stored in replies if stored is not None and stored.accepted)

    async def close(self) -> None:
        """Close the socket and wait until it is closed; requests that wait end without a reply."""
        if self._survey is not None:
            self._survey.cancel()
        if self.protocol is not None and not self.protocol.lost.done():
            self.protocol.stop()
            self.transport.abort()
            await self.protocol.lost
            await asyncio.sleep(0)  # the callbacks of the ended requests cancel their timers
        self.stop()
        if self._survey is not None:
            await asyncio.wait([self._survey])


def _report(survey: "asyncio.Task[None]") -> None:
    if not survey.cancelled() and (error := survey.exception()) is not None:
        log.error("a survey of the DHT failed", exc_info=error)


def _distance(holder: Holder, key: bytes) -> int:
    return int.from_bytes(holder.node.id, "big") ^ int.from_bytes(key, "big")
