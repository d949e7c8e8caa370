"""One instance on the network: its listening sockets and its channels, at most one per other instance.

Topics attach drivers; the endpoint matches topics on each channel and passes frames between channels and drivers.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from solyd_swarm.core.events import Addresses, DialFailed, LinkDown, LinkUp, Received
from solyd_swarm.net.channel import LOW_MARK, Channel
from solyd_swarm.net.dialler import Attempt, Dialler, Goal
from solyd_swarm.net.driver import Driver
from solyd_swarm.net.matching import TOPIC, Change, Matcher
from solyd_swarm.net.noise import public_key

log = logging.getLogger("solyd_swarm.net.endpoint")

PROTOCOL_VERSION = 1
STRANGER_FRAME = 64 * 1024
"""Longest frame of a peer with which no topic is shared: bounds what a stranger can make us buffer."""
MAX_CHANNELS = 256
"""Channels in all: bounds a flood of connections. One that no topic uses goes first; without one the newcomer is refused."""
MAX_STRANGERS = 128
"""Connections that have not completed a handshake: bounds a flood of half-open ones. The oldest goes."""
IDLE_TIMEOUT = 10.0
"""Seconds that a channel which no topic uses stays open."""
SWEEP_INTERVAL = 1.0
CROSSING_WINDOW = 5.0
"""Two channels of one pair that come up within so many seconds are one meeting; later the newer one replaces a dead one."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """What the handshake payload carries: protocol version, and the TCP and DHT (UDP) ports listened on (0: none)."""

    version: int = PROTOCOL_VERSION
    port: int = 0
    dht_port: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """Our author key as the endpoint needs it."""

    author: bytes
    sign: Callable[[bytes], bytes]


class _Connection:
    """A channel, what is agreed on it, and why it was dialled. The channel's owner."""

    def __init__(self, endpoint: "Endpoint", goal: Goal | None) -> None:
        self.endpoint = endpoint
        self.goal = goal
        self.channel: Channel
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.matcher: Matcher | None = None
        self.hello = Hello()
        self.links: dict[bytes, Driver] = {}
        self.idle_since: float | None = None
        self.detached = False

    @property
    def instance(self) -> bytes:
        return self.channel.remote_instance

    def channel_ready(self, channel: Channel) -> None:
        if not self.ready.done():
            self.ready.set_result(True)
        self.endpoint._ready(self)

    def channel_frames(self, channel: Channel, frames: list[bytes]) -> None:
        if self.matcher is None or self.detached:
            return
        batch: list[bytes] = []
        number = -1
        for frame in frames:
            if frame[0] == TOPIC and len(frame) > 3:
                if (of := frame[1] << 8 | frame[2]) != number:
                    self._pass_on(number, batch)
                    batch, number = [], of
                batch.append(frame[3:])
            else:
                self._pass_on(number, batch)
                batch, number = [], -1
                self.endpoint._changed(self, self.matcher.handle(frame))
        self._pass_on(number, batch)

    def _pass_on(self, number: int, batch: list[bytes]) -> None:
        # Frames of a number that is not agreed are those of a topic that was left: they are dropped.
        if batch and self.matcher is not None and not self.detached:
            driver = self.links.get(self.matcher.topics.get(number, b""))
            if driver is not None:
                driver.feed(Received(self.instance, batch))

    def channel_backlog(self, channel: Channel, size: int) -> None:
        for driver in list(self.links.values()):
            driver.backlog(self.instance, size, size <= LOW_MARK)

    def channel_closed(self, channel: Channel, reason: str) -> None:
        if not self.ready.done():
            self.ready.set_result(False)
        self.endpoint._closed(self, reason)


class Endpoint:
    """Sockets and channels of one instance; everything runs on one loop and ends with `close`.

    Args:
        static_private: 32-byte X25519 key of this instance.
        identity: our author key.
        met: told (IP literal, DHT port) of every instance that we shook hands with.
        addresses: where we listen, as told to members of a common topic.
    """

    def __init__(
        self,
        static_private: bytes,
        identity: Identity,
        *,
        addresses: Callable[[], Addresses],
        met: Callable[[str, int], None] = lambda host, port: None,
    ) -> None:
        self.instance = public_key(static_private)
        self.port = 0
        self.dht_port = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self._private = static_private
        self._identity = identity
        self._addresses = addresses
        self._met = met
        self._drivers: dict[bytes, Driver] = {}
        self._connections: dict[bytes, _Connection] = {}
        self._strangers: dict[_Connection, None] = {}
        self._others: dict[_Connection, None] = {}  # losing or leaving: nothing but their end is waited for
        self._instances: dict[tuple[str, int], bytes] = {}  # where instances with a channel are known to listen
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._dialler = Dialler(self._make_dialled, self._dial_failed)
        self._closing = False

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self, sockets: Iterable[socket.socket]) -> None:
        """Accepts on sockets that are bound already; owns them from now on."""
        loop = asyncio.get_running_loop()
        for bound in sockets:
            self._servers.append(await loop.create_server(self._make_accepted, sock=bound, backlog=128))
        self._sweep()

    async def close(self, reason: str = "left") -> None:
        """Says goodbye on every channel, drains, and ends everything, within a good half second."""
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for server in self._servers:
            server.close()
        await self._dialler.close()
        for connection in [*self._strangers]:
            connection.channel.abort(reason)
        everyone = [*self._strangers, *self._connections.values(), *self._others]
        for connection in everyone:
            connection.channel.close(reason)
        await asyncio.gather(*(connection.channel.wait_closed() for connection in everyone))

    # -- topics -----------------------------------------------------------------------------------------------

    def attach(self, driver: Driver) -> None:
        """A topic is joined: channels that are open learn of it."""
        self._drivers[driver.topic_key] = driver
        for connection in list(self._connections.values()):
            if connection.matcher is not None:
                self._changed(connection, connection.matcher.join(driver.topic_key))

    def detach(self, topic_key: bytes) -> None:
        """A topic is left; its goodbye has been queued."""
        self._drivers.pop(topic_key, None)
        for connection in self._connections.values():
            connection.links.pop(topic_key, None)
            if connection.matcher is not None:
                connection.matcher.leave(topic_key)

    def send(self, peer: bytes, topic_key: bytes, data: bytes) -> None:
        connection = self._connections.get(peer)
        if connection is not None and connection.matcher is not None:
            number = connection.matcher.numbers.get(topic_key)
            if number is not None:
                connection.channel.send(bytes((TOPIC, number >> 8, number & 255)) + data)

    def backlog(self, peer: bytes) -> int:
        connection = self._connections.get(peer)
        return connection.channel.backlog if connection is not None else 0

    def close_channel(self, peer: bytes, reason: str) -> None:
        connection = self._connections.get(peer)
        if connection is not None:
            self._retire(connection, reason)

    def address_of(self, peer: bytes) -> tuple[str, int] | None:
        """IP literal and port of the other end of a peer's channel."""
        connection = self._connections.get(peer)
        return connection.channel.remote_address if connection is not None else None

    def instance_at(self, addresses: Addresses) -> bytes:
        """The instance with a channel that listens at one of these addresses; empty if there is none."""
        return next((self._instances[address] for address in addresses if address in self._instances), b"")

    # -- dialling ---------------------------------------------------------------------------------------------

    def dial(self, goal: Goal) -> None:
        """Works towards a link for a goal: over a channel that is there, or over a new one."""
        instance = goal.instance or self.instance_at(goal.addresses)
        connection = self._connections.get(instance)
        if self._closing or instance == self.instance or connection is not None:
            # A channel on which the topic did not match will not do so by dialling again; one on which it did is linked, and a
            # candidate that turns out to be that very peer is no candidate.
            if not self._closing and not (goal.instance and connection is not None and goal.topic_key in connection.links):
                asyncio.get_running_loop().call_soon(self._dial_failed, goal)
            return
        self._dialler.dial(goal)

    def _dial_failed(self, goal: Goal) -> None:
        driver = self._drivers.get(goal.topic_key)
        if driver is not None:
            driver.feed(DialFailed(goal.instance, goal.addresses))

    def _make_dialled(self, goal: Goal) -> Attempt:
        connection = self._make(True, goal)
        return connection.channel, connection.ready

    def _make_accepted(self) -> Channel:
        while len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.channel.abort("too many strangers")
        return self._make(False, None).channel

    def _make(self, initiator: bool, goal: Goal | None) -> _Connection:
        connection = _Connection(self, goal)
        payload = msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, self.port, self.dht_port))
        connection.channel = Channel(connection, initiator, self._private, payload=payload)
        connection.channel.frame_limit = STRANGER_FRAME
        self._strangers[connection] = None
        return connection

    # -- channels come up -------------------------------------------------------------------------------------

    def _ready(self, connection: _Connection) -> None:
        """The handshake is complete: decide which channel of a pair stays, then show topics."""
        self._strangers.pop(connection, None)
        channel = connection.channel
        try:
            connection.hello = msgspec.msgpack.decode(channel.remote_payload, type=Hello)
        except (msgspec.DecodeError, RecursionError):
            self._retire(connection, "a malformed greeting")
            return
        host = channel.remote_address[0]
        if connection.instance == self.instance:
            self._retire(connection, "that was ourselves")
        elif self._closing:
            self._retire(connection, "leaving")
        elif self._claim(connection):
            self._connections[connection.instance] = connection
            log.debug("channel to %s port %d is up", *channel.remote_address)
            if 0 < connection.hello.port < 65536:
                self._instances[host, connection.hello.port] = connection.instance
            if connection.goal is not None and channel.initiator:
                self._instances[channel.remote_address] = connection.instance
            if 0 < connection.hello.dht_port < 65536:
                self._met(host, connection.hello.dht_port)
            connection.matcher = Matcher(
                channel.initiator, channel.handshake_hash, channel.send, self._identity.author, self._identity.sign, self._addresses
            )
            self._changed(connection, connection.matcher.join(*self._drivers))

    def _claim(self, connection: _Connection) -> bool:
        """Whether this channel becomes the one of its pair; the loser is closed."""
        rival = self._connections.get(connection.instance)
        if rival is not None:
            young = asyncio.get_running_loop().time() - rival.channel.opened_at < CROSSING_WINDOW
            crossing = rival.channel.initiator != connection.channel.initiator
            # Crossing dials: the one of the smaller instance key stays. Both ends decide alike.
            newcomer_wins = (connection.channel.initiator == (self.instance < connection.instance)) if crossing else False
            if young and rival.channel.is_open and not newcomer_wins:
                self._retire(connection, "there is a connection already")
                return False
            self._retire(rival, "replaced by a newer connection")
        if len(self._connections) >= MAX_CHANNELS:
            unused = next((other for other in self._connections.values() if other.idle_since is not None), None)
            self._retire(unused or connection, "too many connections")
            return unused is not None
        return True

    def _changed(self, connection: _Connection, changes: list[Change]) -> None:
        for change, topic_key in changes:
            driver = self._drivers.get(topic_key)
            if change == "down":
                driver = connection.links.pop(topic_key, None)
                if driver is not None:
                    driver.feed(LinkDown(connection.instance, "left"))
            elif driver is not None and connection.matcher is not None and connection.matcher.remote_author is not None:
                connection.links[topic_key] = driver
                connection.channel.frame_limit = 2**32  # as long as any
                goal = connection.goal
                if goal is not None and goal.topic_key == topic_key:
                    connection.goal = None  # reached
                driver.feed(
                    LinkUp(
                        connection.instance,
                        connection.matcher.remote_author,
                        self._listening_at(connection),
                        connection.channel.initiator,
                        goal.addresses if goal is not None else (),
                    )
                )

    def _listening_at(self, connection: _Connection) -> Addresses:
        """Where the peer can be dialled: as we see it, then as it says itself."""
        host = connection.channel.remote_address[0]
        seen = ((host, connection.hello.port),) if 0 < connection.hello.port < 65536 else ()
        told = connection.matcher.remote_addresses if connection.matcher is not None else ()
        for address in told:
            self._instances[address] = connection.instance
        return tuple(dict.fromkeys(seen + told))[:16]

    # -- channels go down -------------------------------------------------------------------------------------

    def _retire(self, connection: _Connection, reason: str) -> None:
        """Takes a channel out of service, and closes it."""
        self._unlink(connection, reason)
        self._others[connection] = None
        connection.channel.close(reason)

    def _closed(self, connection: _Connection, reason: str) -> None:
        self._strangers.pop(connection, None)
        self._others.pop(connection, None)
        self.bytes_in += connection.channel.bytes_in
        self.bytes_out += connection.channel.bytes_out
        log.debug("channel to %s port %d has ended: %s", *connection.channel.remote_address, reason)
        self._unlink(connection, reason)

    def _unlink(self, connection: _Connection, reason: str) -> None:
        if connection.detached:
            return
        connection.detached = True
        links, connection.links = dict(connection.links), {}
        if connection.matcher is not None and self._connections.get(connection.instance) is connection:
            del self._connections[connection.instance]
            self._instances = {address: instance for address, instance in self._instances.items() if instance != connection.instance}
        for driver in links.values():
            driver.feed(LinkDown(connection.instance, reason))
        goal = connection.goal
        if goal is not None and connection.matcher is not None and goal.topic_key not in links:
            self._dial_failed(goal)

    def _sweep(self) -> None:
        """Closes channels that no topic has used for a while."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._connections.values()):
            if any(driver.overlay.uses(connection.instance) for driver in connection.links.values()):
                connection.idle_since = None
            elif connection.idle_since is None:
                connection.idle_since = now
            elif now - connection.idle_since >= IDLE_TIMEOUT - SWEEP_INTERVAL:
                self._retire(connection, "no topic needs it")
        self._sweeper = loop.call_later(SWEEP_INTERVAL, self._sweep)

    def traffic(self) -> tuple[int, int]:
        """Bytes received and sent, over all channels, ended ones included."""
        live = [*self._strangers, *self._connections.values(), *self._others]
        return (
            self.bytes_in + sum(connection.channel.bytes_in for connection in live),
            self.bytes_out + sum(connection.channel.bytes_out for connection in live),
        )
