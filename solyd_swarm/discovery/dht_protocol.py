"""The datagrams of the DHT: the package's protocol and routing table with their holes closed.

The package handles each datagram in tasks that nobody keeps, calls whatever ``rpc_`` method a peer names with whatever arguments it
sends, adds every sender to the table unseen, and waits 5 s for the dead. Here a datagram is handled where it arrives, without a
task; only nodes that answered us get into the table; all that waits is one future and one timer per request, ended by ``stop()``.
None of the package's code that logs warnings for ordinary timeouts is left in use, so its loggers need no change.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from heapq import nsmallest
from ipaddress import ip_address
from typing import Any, TypeVar

from kademlia.node import Node
from kademlia.protocol import KademliaProtocol
from kademlia.routing import RoutingTable
from msgspec import Struct

from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.discovery.dht_storage import Entry, RateLimit, RecordStorage, network_of
from solyd_swarm.discovery.records import MAX_LIFE, SignedRecord, dht_key, verify
from solyd_swarm.discovery.scope import may_dial, scope_of
from solyd_swarm.errors import RemoteProtocolError

log = logging.getLogger("solyd_swarm.discovery.dht")

REPLY_SECONDS = 1.0
MAX_WAITING = 512
MAX_GREETINGS = 32
MAX_CONTACTS = 1_024
MAX_PER_NETWORK = 32
MAX_BUFFERED = 1 << 20
STRIKES = 2
T = TypeVar("T", wire.Pong, wire.Found, wire.Stored)
Host = tuple[str, int]
"""IP literal and UDP port."""


class Table(RoutingTable):  # type: ignore[misc]
    """The package's routing table; a full bucket's oldest node is checked without an orphaned task."""

    def get_bucket_for(self, node: Node) -> int:
        """Index of the bucket; ranges include both ends (the package leaves the upper one out, so such nodes were never removed)."""
        return next(index for index, bucket in enumerate(self.buckets) if node.long_id <= bucket.range[1])

    def add_contact(self, node: Node) -> None:
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                return
            if not bucket.has_in_range(self.node) and bucket.depth() % 5 == 0:  # section 4.2 of the Kademlia paper
                self.protocol.check(bucket.head())
                return
            self.split_bucket(index)

    def find_neighbors(self, node: Node, k: int | None = None, exclude: Node | None = None) -> list[Node]:
        """The closest nodes, exactly (the package takes the first ones that a walk over the buckets meets), closest first."""
        self.buckets[self.get_bucket_for(node)].touch_last_updated()
        others = (other for other in self.contacts() if other.id != node.id and not (exclude and other.same_home_as(exclude)))
        return nsmallest(k or self.ksize, others, key=node.distance_to)

    def contacts(self) -> list[Node]:
        """Every node in the table."""
        return [node for bucket in self.buckets for node in bucket.get_nodes()]

    def get(self, node_id: bytes) -> Node | None:
        """The node of that id."""
        return self.buckets[self.get_bucket_for(Node(node_id))][node_id]


class DhtProtocol(KademliaProtocol):  # type: ignore[misc]
    """One UDP socket's side of the DHT.

    Args:
        stored: called with (key, record, sender's IP) when a peer stored a record here that is new.
        met: called with a node that has just got into the table.
    """

    def __init__(
        self,
        node: Node,
        storage: RecordStorage,
        *,
        stored: Callable[[bytes, SignedRecord, str], None],
        met: Callable[[Node], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(node, storage, wire.REPLICAS)
        self.router = Table(self, wire.REPLICAS, node)
        self.lost = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._stored, self._met = stored, met
        self._waiting: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._greeting: dict[Host, asyncio.Future[bytes | None]] = {}
        self._strikes: dict[bytes, int] = {}
        self._tokens = _Tokens(monotonic)
        # Attack: a flood of requests, or forged ones whose larger replies hit a victim. What exceeds the share of the (forged) sender
        # is dropped unanswered; replies to us are never limited.
        self._limit = RateLimit(rate=50, burst=250, total=5_000, monotonic=monotonic)
        self._handlers: dict[str, tuple[type[Any], Callable[[Host, Any], Struct]]] = {
            "ping": (wire.Ping, self.rpc_ping),
            "find_node": (wire.Find, self.rpc_find_node),
            "find_value": (wire.Find, self.rpc_find_value),
            "store": (wire.Store, self.rpc_store),
        }

    # What the transport calls.

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop()
        if not self.lost.done():
            self.lost.set_result(None)

    def error_received(self, exc: OSError) -> None:
        log.debug("a DHT datagram could not be sent: %s", exc)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        host = _plain(addr)
        try:
            kind, message_id, body = wire.split(data)
            if kind == wire.REPLY:
                self._accept_reply(message_id, body)
            elif scope_of(host[0]) != "invalid" and host[1]:
                self._answer(host, message_id, body)
        except RemoteProtocolError as error:
            log.debug("dropped what %s:%d sent: %s", *host, error)

    def stop(self) -> None:
        """End every request that waits, with no reply, and its timer."""
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_result(None)

    # What peers ask of us.

    def _answer(self, host: Host, message_id: bytes, body: bytes) -> None:
        # Processes of this machine share one address and could be stopped by simpler means: only the common bound holds for them.
        source = None if scope_of(host[0]) == "loopback" else network_of(host[0])
        if not self._limit.allow(source):
            raise RemoteProtocolError("too many requests")
        request = wire.decode(body, wire.Request)
        if request.name not in self._handlers:
            raise RemoteProtocolError("an unknown request")
        kind, handler = self._handlers[request.name]
        arguments = wire.decode(request.arguments, kind)
        reply = handler(host, arguments)
        self._send(wire.frame(wire.REPLY, message_id, reply), host)
        self.welcome_if_new(Node(arguments.sender, *host))

    def rpc_ping(self, host: Host, ping: wire.Ping) -> wire.Pong:
        return wire.Pong(self.source_node.id)

    def rpc_find_node(self, host: Host, find: wire.Find) -> wire.Found:
        near = self.router.find_neighbors(Node(find.key), exclude=Node(find.sender, *host))
        nodes = [wire.Neighbour(node.id, ip_address(node.ip).packed, node.port) for node in near if may_dial(node.ip, host[0])]
        return wire.Found(self.source_node.id, self._tokens.make(host[0]), nodes)

    def rpc_find_value(self, host: Host, find: wire.Find) -> wire.Found:
        found = self.rpc_find_node(host, find)
        used = len(wire.frame(wire.REPLY, bytes(20), found)) + 16
        records, total = self.storage.sample(find.key, wire.MAX_DATAGRAM - used)
        return wire.Found(found.id, found.token, found.nodes, total, records)

    def rpc_store(self, host: Host, store: wire.Store) -> wire.Stored:
        # The token proves that the sender can be reached at its address: bounds per address would mean nothing otherwise.
        if not self._tokens.check(host[0], store.token):
            return wire.Stored(self.source_node.id, False)
        if dht_key(store.public) != store.key:
            raise RemoteProtocolError("a record under a key that is not its own")
        record = verify(store.public, store.record)
        if self.storage.put(store.key, Entry(record, host[0])):
            self._stored(store.key, record, host[0])
        return wire.Stored(self.source_node.id, self.storage.holds(store.key, record))

    # What we ask of peers.

    def call(self, host: Host, name: str, arguments: Struct) -> asyncio.Future[bytes | None]:
        """Send a request. The future ends with the reply's body, or with None after `REPLY_SECONDS` or when it could not be sent."""
        future: asyncio.Future[bytes | None] = self._loop.create_future()
        # Attack: whatever makes us ask, nothing makes us wait for more than this many at once.
        if self.transport is None or self.transport.is_closing() or len(self._waiting) >= MAX_WAITING:
            future.set_result(None)
            return future
        message_id = secrets.token_bytes(20)
        timer = self._loop.call_later(REPLY_SECONDS, _give_up, future)
        self._waiting[message_id] = future
        future.add_done_callback(partial(self._finish, message_id, timer))
        self._send(wire.request(message_id, name, arguments), host)
        return future

    def read(self, node: Node, body: bytes | None, kind: type[T]) -> T | None:
        """Judge what a node replied: decode it and keep the node, or strike it and return None.

        Args:
            kind: a struct with an ``id``. A node has the id that it says itself, whatever others told about its address.
        """
        reply = None
        if body is not None:
            try:
                reply = wire.decode(body, kind)
            except RemoteProtocolError as error:
                log.debug("dropped what %s replied: %s", node, error)
        if reply is None:
            self.strike(node)
            return None
        answered = Node(reply.id, node.ip, node.port)
        self._strikes.pop(answered.id, None)
        self._add(answered)
        return reply

    def strike(self, node: Node) -> None:
        """A node failed. One lost datagram is forgiven; after two in a row it leaves the table."""
        if self.router.get(node.id) is None:
            return
        self._strikes[node.id] = self._strikes.get(node.id, 0) + 1
        if self._strikes[node.id] >= STRIKES:
            del self._strikes[node.id]
            self.router.remove_contact(node)

    def welcome_if_new(self, node: Node) -> None:
        """Ask an unknown sender for its id; only if it answers it gets into the table. Nobody's records are handed on to it."""
        if self.router.get(node.id) is None and node.id != self.source_node.id:
            self.greet((node.ip, node.port))

    def greet(self, host: Host) -> asyncio.Future[bytes | None] | None:
        """Ask whoever is at an address for its id, and take it into the table when it answers. None if too many are asked already.

        The future is shared by all who greet that address: wait for it without cancelling it (``asyncio.wait``).
        """
        if host in self._greeting:
            return self._greeting[host]
        # Attack: forged senders make us ping their victims: one small datagram for one, and never more than these at once.
        if len(self._greeting) >= MAX_GREETINGS:
            return None
        future = self._greeting[host] = self.call(host, "ping", wire.Ping(self.source_node.id))
        future.add_done_callback(partial(self._greeted, host))
        return future

    def check(self, node: Node) -> None:
        """See whether a node still answers; it is struck if not."""
        future = self.call((node.ip, node.port), "ping", wire.Ping(self.source_node.id))
        future.add_done_callback(partial(self._checked, node))

    def _checked(self, node: Node, future: asyncio.Future[bytes | None]) -> None:
        if not future.cancelled():
            self.read(node, future.result(), wire.Pong)

    def _greeted(self, host: Host, future: asyncio.Future[bytes | None]) -> None:
        self._greeting.pop(host, None)
        if future.cancelled() or (body := future.result()) is None:
            return
        try:
            self._add(Node(wire.decode(body, wire.Pong).id, *host))
        except RemoteProtocolError as error:
            log.debug("dropped what %s:%d replied: %s", *host, error)

    def _add(self, node: Node) -> None:
        if node.id == self.source_node.id or self.router.get(node.id) is not None:
            return
        contacts = self.router.contacts()
        # Attack: one host plays many nodes to surround us. Its later ones are refused; nobody is evicted for them.
        network, local = network_of(node.ip), scope_of(node.ip) == "loopback"
        crowd = 0 if local else sum(network_of(other.ip) == network for other in contacts)
        if len(contacts) >= MAX_CONTACTS or crowd >= MAX_PER_NETWORK:
            return
        # A node that restarted at the same address has a new id; the old one is dead.
        for other in contacts:
            if other.same_home_as(node):
                self.router.remove_contact(other)
        self.router.add_contact(node)
        if self.router.get(node.id) is not None:
            log.debug("met DHT node %s", node)
            self._met(node)

    def _finish(self, message_id: bytes, timer: asyncio.TimerHandle, future: asyncio.Future[bytes | None]) -> None:
        timer.cancel()
        self._waiting.pop(message_id, None)

    def _accept_reply(self, message_id: bytes, body: bytes) -> None:
        # Twenty random bytes say who this is from; a host with several addresses may answer from another than it was asked at.
        future = self._waiting.get(message_id)
        if future is not None and not future.done():
            future.set_result(body)

    def _send(self, datagram: bytes, host: Host) -> None:
        if self.transport is None or self.transport.is_closing() or self.transport.get_write_buffer_size() > MAX_BUFFERED:
            return
        six = len(self.transport.get_extra_info("sockname")) == 4
        if six and ":" not in host[0]:
            host = (f"::ffff:{host[0]}", host[1])
        if six or ":" not in host[0]:
            self.transport.sendto(datagram, host)


class _Tokens:
    """Proof that somebody receives at its address: a keyed hash of it, good for one to two periods (BEP 5, "write tokens")."""

    PERIOD = MAX_LIFE / 2

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._key = secrets.token_bytes(32)

    def make(self, ip: str, back: int = 0) -> bytes:
        period = int(self._monotonic() // self.PERIOD) - back
        return blake2b(f"{period} {ip}".encode(), key=self._key, digest_size=8).digest()

    def check(self, ip: str, token: bytes) -> bool:
        return any(secrets.compare_digest(self.make(ip, back), token) for back in (0, 1))


def _give_up(future: asyncio.Future[bytes | None]) -> None:
    if not future.done():
        future.set_result(None)


def _plain(addr: tuple[Any, ...]) -> Host:
    """IP literal and port of a socket address; an IPv4 address that came in by an IPv6 socket as what it is."""
    ip = str(addr[0])
    return (ip.removeprefix("::ffff:") if "." in ip else ip), int(addr[1])
