"""A node of the embedded DHT: the package's server with a look-up that merges, and a store that does not overwrite.

Kademlia (Maymounkov and Mazieres, IPTPS 2002) with the package's routing table and storage interface. Differences from the package: a
look-up asks all of the k closest nodes, not just the first that has something, and goes on until they are all heard; what they give is
verified here; storing needs a token from the look-up (BEP 5); nobody republishes what others announced.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import nsmallest
from ipaddress import ip_address
from typing import Any

from kademlia.network import Server
from kademlia.node import Node

from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.discovery.dht_protocol import DhtProtocol, Host
from solyd_swarm.discovery.dht_storage import Caps, Entry, RecordStorage
from solyd_swarm.discovery.records import SignedRecord, dht_key, verify
from solyd_swarm.discovery.scope import may_dial
from solyd_swarm.errors import RemoteProtocolError

log = logging.getLogger("solyd_swarm.discovery.dht")

ALPHA = 4
"""Requests of one look-up that are under way at once: one dead node holds up only its own place."""
MAX_ASKED = 64
MAX_REPEATS = 3
Report = Callable[[SignedRecord, str], None]
"""Called with a verified record and the IP literal of the node that gave it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A node close to a key that answered, and the token it wants to see in a store."""

    node: Any
    token: bytes


class LookUp:
    """One look-up of a key.

    Args:
        public: the key that signs the records; None: look for nodes only.
        report: called at once with each record that is new to this look-up or newer than what it gave before.
    """

    def __init__(self, protocol: DhtProtocol, key: bytes, public: bytes | None = None, report: Report | None = None) -> None:
        self._protocol = protocol
        self._target = Node(key)
        self._public, self._report = public, report
        self._known: dict[bytes, Any] = {}
        self._hosts: set[Host] = set()
        self._asked: set[bytes] = set()
        self._holders: dict[bytes, Holder] = {}
        self._best: dict[bytes, int] = {}
        self._repeats: dict[bytes, int] = {}
        self._requests = 0

    async def run(self) -> list[Holder]:
        """Ask until the closest nodes have all answered or failed. Returns those that answered, closest first, at most k."""
        for node in self._protocol.router.find_neighbors(self._target):
            self._learn(node)
        pending: dict[asyncio.Future[bytes | None], Any] = {}
        try:
            while True:
                for node in self._next(ALPHA - len(pending)):
                    pending[self._ask(node)] = node
                if not pending:
                    return sorted(self._holders.values(), key=lambda holder: self._distance(holder.node))[: wire.REPLICAS]
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    node = pending.pop(future)
                    if self._take(node, future.result()):
                        pending[self._ask(node)] = node
        finally:
            for future in pending:
                future.cancel()

    def _next(self, room: int) -> list[Any]:
        """Up to ``room`` of the closest nodes that were not asked; they count as asked now."""
        chosen: list[Any] = []
        # Attack: made-up nodes, each closer than the last, keep a look-up going for ever. It ends after this many requests.
        room = min(room, MAX_ASKED - self._requests)
        for node in sorted(self._known.values(), key=self._distance):
            if len(chosen) >= room or self._distance(node) > self._horizon():
                break
            if node.id in self._asked:
                continue
            # Attack: made-up ids at addresses of honest nodes. Each address is asked once, and then counts under its own id.
            if (node.ip, node.port) in self._hosts:
                del self._known[node.id]
                continue
            self._asked.add(node.id)
            self._hosts.add((node.ip, node.port))
            chosen.append(node)
        return chosen

    def _horizon(self) -> int:
        """The distance of the k-th closest node known."""
        return nsmallest(wire.REPLICAS, map(self._distance, self._known.values()))[-1]

    def _ask(self, node: Any) -> asyncio.Future[bytes | None]:
        self._requests += 1
        name = "find_node" if self._public is None else "find_value"
        return self._protocol.call((node.ip, node.port), name, wire.Find(self._protocol.source_node.id, self._target.id))

    def _take(self, node: Any, body: bytes | None) -> bool:
        """Use a reply. Returns True if the node should be asked again: it holds more, and the last answer told something new."""
        found = self._protocol.read(node, body, wire.Found)
        if found is None or found.id == self._protocol.source_node.id:
            self._known.pop(node.id, None)
            return False
        if found.id != node.id:
            # Whoever told us had the id wrong (an old one, or a lie): the node counts under its own.
            self._known.pop(node.id, None)
            node = self._known[found.id] = Node(found.id, node.ip, node.port)
            self._asked.add(found.id)
        try:
            fresh = sum([self._merge(raw, node.ip) for raw in found.records])
        except RemoteProtocolError as error:
            log.debug("%s gave %s", node, error)
            self._protocol.strike(node)
            self._known.pop(node.id, None)
            self._holders.pop(node.id, None)
            return False
        self._holders[node.id] = Holder(node, found.token)
        for neighbour in found.nodes:
            if may_dial(neighbour.host, node.ip):
                self._learn(Node(neighbour.id, neighbour.host, neighbour.port))
        repeats = self._repeats[node.id] = self._repeats.get(node.id, -1) + 1
        return found.total > len(found.records) > 0 and fresh > 0 and repeats < MAX_REPEATS and self._requests < MAX_ASKED

    def _merge(self, raw: bytes, learned_from: str) -> bool:
        if self._public is None:
            return False
        record = verify(self._public, raw)
        if self._best.get(record.slot, -1) >= record.sequence:
            return False
        self._best[record.slot] = record.sequence
        if self._report is not None:
            self._report(record, learned_from)
        return True

    def _learn(self, node: Any) -> None:
        asked = node.id in self._asked or (node.ip, node.port) in self._hosts
        if asked or node.id in self._known or node.id == self._protocol.source_node.id:
            return
        self._known[node.id] = node
        # Attack: replies full of made-up nodes fill the memory of a look-up. The ones furthest from the key are forgotten.
        if len(self._known) > MAX_ASKED:
            furthest = max(self._known.values(), key=self._distance)
            del self._known[furthest.id]

    def _distance(self, node: Any) -> int:
        return int(node.distance_to(self._target))


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

    def _create_protocol(self) -> DhtProtocol:
        return DhtProtocol(self.node, self.storage, stored=self._stored, met=self._met, monotonic=self._monotonic)

    def refresh_table(self, interval: float = 3600) -> None:
        """Nothing: the package starts tasks here that nobody ends, and republishes others' values. See `refresh`."""

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

    async def refresh(self) -> None:
        """Look for our own id, and for a random one in each bucket that was not touched for an hour (section 2.3 of the paper)."""
        for node_id in [self.node.id, *self.protocol.get_refresh_ids()]:
            await self.get(node_id)

    async def get(self, key: bytes, public: bytes | None = None, report: Report | None = None) -> list[Holder]:
        """Look a key up, here and at the nodes closest to it; see `LookUp`. Returns those nodes."""
        if public is not None and report is not None:
            for entry in self.storage.entries(key):
                report(entry.record, entry.sender)
        return await LookUp(self.protocol, key, public, report).run()

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
        if self.protocol is not None and not self.protocol.lost.done():
            self.protocol.stop()
            self.transport.abort()
            await self.protocol.lost
            await asyncio.sleep(0)  # the callbacks of the ended requests cancel their timers
        self.stop()
