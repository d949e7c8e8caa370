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
from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from ipaddress import ip_address
from typing import Any, TypeVar

from kademlia.node import Node
from kademlia.protocol import KademliaProtocol
from msgspec import Struct

from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.discovery.dht_storage import Entry, RateLimit, RecordStorage, subscriber_of
from solyd_swarm.discovery.dht_table import MAX_CONTACTS, Table
from solyd_swarm.discovery.records import MAX_LIFE, SignedRecord, dht_key, verify
from solyd_swarm.discovery.scope import may_dial, scope_of
from solyd_swarm.errors import RemoteProtocolError

log = logging.getLogger("solyd_swarm.discovery.dht")

REPLY_SECONDS = 1.0
MAX_WAITING = 512
MAX_GREETINGS = 32
MAX_BUFFERED = 1 << 20
STRIKES = 2
MAX_AMPLIFICATION = 3
"""How many times larger than the request a reply may be (RFC 9000, section 8.1): requests that want much are padded."""
T = TypeVar("T", wire.Pong, wire.Found, wire.Stored)
Host = tuple[str, int]
"""IP literal and UDP port."""


class DhtProtocol(KademliaProtocol):  # type: ignore[misc]
    """One UDP socket's side of the DHT.

    Args:
        stored: called with (key, record, sender's IP) when a peer stored a record here that is new.
        met: called with a node that has just got into the table.

    Attributes:
        refused: how many datagrams were dropped, by reason: ``"size"``, ``"request"`` and ``"reply"`` (malformed), ``"flood"``,
            ``"amplified"`` (would have drawn a reply much larger than itself), ``"unasked"`` (a reply to nothing).
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
        self.refused: Counter[str] = Counter()
        self._monotonic = monotonic
        self._since: dict[bytes, float] = {}
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
        reason = "size"
        try:
            kind, message_id, body = wire.split(data)
            if kind == wire.REPLY:
                self._accept_reply(message_id, body)
            elif scope_of(host[0]) != "invalid" and host[1]:
                reason = "request"
                self._answer(host, message_id, body)
        except RemoteProtocolError as error:
            self.refused[reason] += 1
            log.debug("dropped what %s:%d sent: %s", *host, error)

    def stop(self) -> None:
        """End every request that waits, with no reply, and its timer."""
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_result(None)

    # What peers ask of us.

    def _answer(self, host: Host, message_id: bytes, body: bytes) -> None:
        # Processes of this machine share one address and could be stopped by simpler means: only the common bound holds for them.
        source = None if scope_of(host[0]) == "loopback" else subscriber_of(host[0])
        if not self._limit.allow(source):
            self.refused["flood"] += 1
            return
        request = wire.decode(body, wire.Request)
        if request.name not in self._handlers:
            raise RemoteProtocolError("an unknown request")
        kind, handler = self._handlers[request.name]
        arguments = wire.decode(request.arguments, kind)
        reply = wire.frame(wire.REPLY, message_id, handler(host, arguments))
        # Attack: small requests with a forged sender draw large replies to a victim. Who asks for much has to send something too.
        if len(reply) > MAX_AMPLIFICATION * (wire.HEAD_SIZE + len(body)):
            self.refused["amplified"] += 1
            return
        self._send(reply, host)
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
        records, total = self.storage.sample(find.key, wire.MAX_DATAGRAM - used, find.skips)
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
        if not self.reaches(host[0]) or len(self._waiting) >= MAX_WAITING:
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
                self.refused["reply"] += 1
                log.debug("dropped what %s replied: %s", node, error)
        if reply is None:
            self.strike(node)
            return None
        answered = Node(reply.id, node.ip, node.port)
        self._add(answered)
        return reply

    def strike(self, node: Node) -> None:
        """A node failed. One lost datagram is forgiven; after two in a row it leaves the table."""
        if self.router.get(node.id) is None:
            return
        self._strikes[node.id] = self._strikes.get(node.id, 0) + 1
        if self._strikes[node.id] >= STRIKES:
            self._remove(node)

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
            self.refused["reply"] += 1
            log.debug("dropped what %s:%d replied: %s", *host, error)

    def known_for(self, node: Node) -> float:
        """Seconds since a node of the table was met."""
        return self._monotonic() - self._since.get(node.id, self._monotonic())

    def is_struck(self, node: Node) -> bool:
        """Whether the last request to a node failed."""
        return node.id in self._strikes

    def reaches(self, ip: str) -> bool:
        """Whether our socket is open and can send to that family of addresses."""
        if self.transport is None or self.transport.is_closing():
            return False
        return ":" not in ip or len(self.transport.get_extra_info("sockname")) == 4

    def _add(self, node: Node) -> None:
        """A node has answered: it is the most recent of its bucket, or new in the table."""
        if node.id == self.source_node.id:
            return
        known = self.router.get(node.id)
        if known is not None:
            # Attack: somebody takes the id of another node. The table goes on with the address that had it first, until that is dead.
            if known.same_home_as(node):
                self._strikes.pop(node.id, None)
                self.router.add_contact(known)
            return
        if not self.router.has_room_for(node):
            return
        # A node that restarted at the same address has a new id; the old one is dead.
        for other in self.router.contacts():
            if other.same_home_as(node):
                self._remove(other)
        self.router.add_contact(node)
        if self.router.get(node.id) is not None:
            self._since[node.id] = self._monotonic()
            if len(self._since) > 2 * MAX_CONTACTS:  # some were displaced in full buckets
                present = {contact.id for contact in self.router.contacts()}
                self._since = {node_id: since for node_id, since in self._since.items() if node_id in present}
                self._strikes = {node_id: count for node_id, count in self._strikes.items() if node_id in present}
            log.debug("met DHT node %s", node)
            self._met(node)

    def _remove(self, node: Node) -> None:
        self.router.remove_contact(node)
        self._strikes.pop(node.id, None)
        self._since.pop(node.id, None)

    def _finish(self, message_id: bytes, timer: asyncio.TimerHandle, future: asyncio.Future[bytes | None]) -> None:
        timer.cancel()
        self._waiting.pop(message_id, None)

    def _accept_reply(self, message_id: bytes, body: bytes) -> None:
        # Twenty random bytes say who this is from; a host with several addresses may answer from another than it was asked at.
        future = self._waiting.get(message_id)
        if future is None:
            self.refused["unasked"] += 1
        elif not future.done():
            future.set_result(body)

    def _send(self, datagram: bytes, host: Host) -> None:
        if not self.reaches(host[0]) or self.transport.get_write_buffer_size() > MAX_BUFFERED:
            return
        if ":" not in host[0] and len(self.transport.get_extra_info("sockname")) == 4:
            host = (f"::ffff:{host[0]}", host[1])
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
