"""One instance on the network: its listening sockets and its channels, at most one in use per other instance.

Topics attach drivers; the endpoint matches topics on each channel and passes frames between channels and drivers.
"""

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Container, Iterable

from solyd_swarm.core.events import Addresses, DialFailed, LinkDown
from solyd_swarm.net.bounds import DEFAULT_BOUNDS, STRANGER_FRAME, EndpointLimits, oldest_of_busiest_host
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.connection import Connection, encode_hello
from solyd_swarm.net.dialler import Attempt, Dialler
from solyd_swarm.net.driver import Driver
from solyd_swarm.net.goals import Goal, Goals
from solyd_swarm.net.listening_port import ListeningPort
from solyd_swarm.net.matching import TOPIC, Change, Identity
from solyd_swarm.net.noise import MAX_FRAME, public_key
from solyd_swarm.net.outside import Outside
from solyd_swarm.net.places import Places

log = logging.getLogger("solyd_swarm.net.endpoint")


class Endpoint:
    """Sockets and channels of one instance; everything runs on one loop and ends with `close`.

    Args:
        static_private: 32-byte X25519 key of this instance.
        identity: our author key.
        met: told (IP literal, DHT port) of every instance that we have a channel with.
        linked: told (topic key, IP literal, TCP port, whether we dialled) of every member that we agree on a topic with: where we dialled
            it, or where it came from and says that it listens.
        addresses: where we listen, as told to members of a common topic.
        may_dial: whether an address that a peer told us may be dialled: (IP literal, IP literal of the peer).
        may_go: whether packets may go to an IP literal.
        changed: called when other addresses of ours than before may be told.
        limits: see `EndpointLimits`.
    """

    def __init__(
        self,
        static_private: bytes,
        identity: Identity,
        *,
        addresses: Callable[[], Addresses],
        met: Callable[[str, int], None] = lambda host, port: None,
        linked: Callable[[bytes, str, int, bool], None] = lambda topic_key, host, port, dialled: None,
        may_dial: Callable[[str, str], bool] = lambda address, teller: True,
        may_go: Callable[[str], bool] = lambda host: True,
        changed: Callable[[], None] = lambda: None,
        limits: EndpointLimits = DEFAULT_BOUNDS,
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
        self._linked = linked
        self._may_dial = may_dial
        self._limits = limits
        self._drivers: dict[bytes, Driver] = {}
        self._connections: dict[bytes, Connection] = {}  # in use, by instance
        self._strangers: dict[Connection, None] = {}  # not in use yet
        self._others: dict[Connection, None] = {}  # losing or leaving: nothing but their end is waited for
        self._orphans: dict[bytes, Goals] = {}  # goals whose channel went, by the instance that may still dial us
        self._places = Places()
        self._stamp = secrets.randbits(40)  # of our USE frames; the start says nothing of how many there were
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._listening = ListeningPort()
        self._dialler = Dialler(self._make_dialled, self._dial_failed, timeout=limits.connect, port=self._listening)
        self.outside = Outside(
            self._connections,
            self._listening,
            make=lambda: self._make_dialled([]),
            make_visit=lambda owner: Channel(owner, True, static_private, payload=encode_hello(0, 0), limits=limits.channel),
            failed=self._give_up,
            may_dial=may_dial,
            may_go=may_go,
            changed=changed,
        )
        self._closing = False

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self, sockets: Iterable[socket.socket]) -> None:
        """Accepts on sockets that are bound already; owns them from now on."""
        loop = asyncio.get_running_loop()
        self._sweep()
        sockets = list(sockets)
        self._listening.use(sockets)
        self.outside.port = self.port
        for bound in sockets:
            # In two steps, so that being cancelled in between leaves no server that nobody knows of.
            server = await loop.create_server(self._make_accepted, sock=bound, backlog=128, start_serving=False)
            self._servers.append(server)
            await server.start_serving()

    async def close(self, reason: str = "left") -> None:
        """Says goodbye on every channel, drains, and ends everything, within a good half second. Idempotent."""
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for server in self._servers:
            for bound in server.sockets:
                asyncio.get_running_loop().remove_reader(bound.fileno())
        # Closing a server makes asyncio (3.11) lose, unclosed, what it has accepted a moment ago and not handed over yet.
        await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        await asyncio.gather(self._dialler.close(), self.outside.close())
        for connection in [*self._strangers]:
            connection.channel.abort(reason)
        everyone = [*self._strangers, *self._connections.values(), *self._others]
        for connection in everyone:
            connection.channel.close(reason)
        await asyncio.gather(*(connection.channel.wait_closed() for connection in everyone))
        for _ in range(3):  # turns of the loop for what was being accepted: it is turned away
            await asyncio.sleep(0)

    def announce_dht(self, port: int) -> None:
        """The DHT has got a UDP port: peers with a channel learn of it too."""
        self.dht_port = port
        for connection in self._connections.values():
            connection.greet(self.port, port)

    # -- topics -----------------------------------------------------------------------------------------------

    def attach(self, driver: Driver) -> None:
        """A topic is joined: channels that are open learn of it."""
        self._drivers[driver.topic_key] = driver
        for connection in list(self._connections.values()):
            if connection.matcher is not None:
                self.matched(connection, connection.matcher.join(driver.topic_key))

    def detach(self, topic_key: bytes) -> None:
        """A topic is left; its goodbye has been queued."""
        self._drivers.pop(topic_key, None)
        for connection in self._connections.values():
            connection.links.pop(topic_key, None)
            connection.goals.take(lambda goal: goal.topic_key == topic_key)
            if connection.matcher is not None:
                connection.matcher.leave(topic_key)

    def send(self, peer: bytes, topic_key: bytes, data: bytes) -> None:
        """Queues a frame of a topic; thrown away where the topic is not agreed with the peer (any more)."""
        connection = self._connections.get(peer)
        if connection is not None and connection.matcher is not None:
            number = connection.matcher.numbers.get(topic_key)
            if number is not None:
                connection.channel.send(bytes((TOPIC, number >> 8, number & 255)) + data)

    def backlog(self, peer: bytes) -> int:
        """Bytes that wait for a peer."""
        connection = self._connections.get(peer)
        return connection.channel.backlog if connection is not None else 0

    def forsake(self, present: Container[str]) -> None:
        """Ends channels from addresses of ours that are not among these IP literals (without zones): nothing can arrive there any more."""
        for connection in [*self._strangers, *self._connections.values()]:
            host = connection.channel.local_address[0]
            if host and host.partition("%")[0] not in present:
                connection.channel.abort("our address has gone")

    def close_channel(self, peer: bytes, reason: str) -> None:
        """Closes the channel of a peer."""
        connection = self._connections.get(peer)
        if connection is not None:
            self._retire(connection, reason)

    def address_of(self, peer: bytes) -> tuple[str, int] | None:
        """IP literal and port of the other end of a peer's channel."""
        connection = self._connections.get(peer)
        return connection.channel.remote_address if connection is not None else None

    def host_of(self, peer: bytes) -> str | None:
        """IP literal of a member, also some time after its channel has ended: what it told us is still of use then."""
        connection = self._connections.get(peer)
        return connection.host if connection is not None else self._places.host_of(peer)

    def instance_at(self, addresses: Addresses) -> bytes:
        """The instance with a channel that we have reached at one of these addresses; empty if there is none."""
        return next((self._places.at(address) for address in addresses if self._is_taken(address, b"")), b"")

    # -- dialling ---------------------------------------------------------------------------------------------

    def dial(self, goal: Goal) -> None:
        """Works towards a link for a goal: over a channel that is there, or over a new one."""
        if self._closing:
            return
        holder = goal.instance
        if holder not in self._connections:
            taken = [self._is_taken(address, holder) for address in goal.addresses]
            # Whoever was reached there: the candidate itself where no instance is named, else another than is wanted.
            if any(taken) and (not holder or all(taken)):
                holder = self.instance_at(goal.addresses)
        connection = self._connections.get(holder)
        if connection is not None:
            self._pursue(connection, goal)
        elif holder == self.instance:
            self._fail_soon(goal)
        else:
            self._dialler.dial(goal)
            self.outside.puncher.dialling(goal, time.monotonic())

    def _is_taken(self, address: tuple[str, int], wanted: bytes) -> bool:
        """Whether we have reached another instance at this address and still have its channel, or it is ourselves."""
        found = self._places.at(address)
        return found not in (b"", wanted) and (found in self._connections or found == self.instance)

    def _pursue(self, connection: Connection, goal: Goal) -> None:
        """Whether a goal is reached over this channel turns out while topics are agreed on it; soon if they were."""
        if goal.instance not in (b"", connection.instance):
            self._fail_soon(goal)
        elif goal.topic_key not in connection.links:
            connection.goals.add(goal, self._meeting_ends())
        elif not goal.instance:
            self._fail_soon(goal)  # the candidate is a peer that the topic has: no candidate any more

    def _meeting_ends(self) -> float:
        return asyncio.get_running_loop().time() + self._limits.meeting

    def _fail_soon(self, goal: Goal) -> None:
        asyncio.get_running_loop().call_soon(self._give_up, goal)

    def _dial_failed(self, goal: Goal) -> None:
        """Nobody answered; neighbours may help."""
        if self._closing or goal.topic_key not in self._drivers or not self.outside.puncher.take(goal, time.monotonic()):
            self._give_up(goal)

    def _give_up(self, goal: Goal) -> None:
        driver = self._drivers.get(goal.topic_key)
        if driver is not None:
            driver.feed(DialFailed(goal.instance, goal.addresses))

    # -- channels come up -------------------------------------------------------------------------------------

    def _make_dialled(self, goals: list[Goal]) -> Attempt:
        connection = self._make(goals)
        return connection.channel, connection.ready

    def _make_accepted(self) -> Channel:
        accepted = [connection for connection in self._strangers if not connection.channel.initiator]
        if len(accepted) >= self._limits.strangers:
            victim = oldest_of_busiest_host(accepted)
            del self._strangers[victim]
            self._others[victim] = None
            victim.channel.abort("too many strangers")
        return self._make(None).channel

    def _make(self, goals: list[Goal] | None) -> Connection:
        def make_channel(connection: Connection) -> Channel:
            payload = encode_hello(self.port, self.dht_port)
            dials = goals is not None
            return Channel(connection, dials, self._private, payload=payload, limits=self._limits.channel, may_cross=dials)

        connection = Connection(self, goals or [], make_channel)
        connection.channel.frame_limit = STRANGER_FRAME
        if self._closing:
            connection.channel.abort("leaving")
        else:
            self._strangers[connection] = None
        return connection

    def handshaken(self, connection: Connection) -> None:
        """We know who it is. Who dialled decides whether the channel is used: not where there is one already."""
        for goal in connection.wanted:
            connection.goals.add(goal, self._meeting_ends())
        if connection.channel.initiator:
            self._places.reached(connection.channel.remote_address, connection.instance)
        self.outside.handshaken(connection)
        current = self._connections.get(connection.instance)
        if connection.instance == self.instance:
            self._retire(connection, "that was ourselves")
        elif self._closing:
            self._retire(connection, "leaving")
        elif connection.channel.initiator and current is not None:
            self._replace(connection, current, "there is a connection already")
        elif connection.channel.initiator:
            self._use(connection)

    def used(self, connection: Connection) -> None:
        """The peer uses this channel. Where we have another, both ends come to the same decision."""
        current = self._connections.get(connection.instance)
        if current is connection:
            return
        if current is None:
            self._use(connection)
        elif current.stamp is not None:
            # The peer has used the other one too: it wants the one that it used last, having lost the other perhaps.
            self._settle(connection, current, (connection.stamp or 0) > current.stamp)
        else:
            # Crossing dials: the one of the smaller instance key stays.
            self._settle(connection, current, connection.instance < self.instance)

    def _settle(self, connection: Connection, current: Connection, newcomer_stays: bool) -> None:
        if newcomer_stays:
            self._use(connection)
        else:
            self._replace(connection, current, "there is a connection already")

    def _use(self, connection: Connection) -> None:
        """This is the channel of its pair from now on; an older one is closed."""
        current = self._connections.get(connection.instance)
        if current is None and not self._make_room():
            self._retire(connection, "too many connections")
            return
        self._strangers.pop(connection, None)
        self._connections[connection.instance] = connection  # before the other one goes: the core may dial this peer then
        self._stamp += 1
        matcher = connection.use(self._stamp, self._identity, self._addresses, self._may_dial)
        log.debug("channel to %s port %d is up", *connection.channel.remote_address)
        if current is not None:
            self._replace(current, connection, "replaced by a newer connection")
        self._orphans.pop(connection.instance, Goals()).move_to(connection.goals)
        self._fail(connection.goals.take(lambda goal: goal.instance not in (b"", connection.instance)))
        self.greeted(connection)
        for goal in self.outside.up(connection):
            connection.goals.add(goal, self._meeting_ends())
        if not connection.detached:
            self.matched(connection, matcher.join(*self._drivers))

    def _replace(self, old: Connection, new: Connection, reason: str) -> None:
        """Closes a channel in favour of another of the same pair, which takes over what it was wanted for."""
        goals = old.goals.take()
        self._retire(old, reason)
        for goal in goals:
            self._pursue(new, goal)

    def told(self, connection: Connection, frame: bytes) -> None:
        self.outside.handle(connection, frame)

    def greeted(self, connection: Connection) -> None:
        if connection.hello.dht_port:
            self._met(connection.host, connection.hello.dht_port)

    def _make_room(self) -> bool:
        """Whether one more channel may be used; one that no topic uses goes for it."""
        if len(self._connections) < self._limits.channels:
            return True
        unused = [connection for connection in self._connections.values() if not self._is_used(connection)]
        if unused:
            self._retire(oldest_of_busiest_host(unused), "too many connections")
        return bool(unused)

    def _is_used(self, connection: Connection) -> bool:
        return any(driver.overlay.uses(connection.instance) for driver in connection.links.values())

    # -- topics are agreed ------------------------------------------------------------------------------------

    def matched(self, connection: Connection, changes: list[Change]) -> None:
        matcher = connection.matcher
        if matcher is not None and matcher.topics:
            # No stranger any more. It stays so when the topics end: a long frame of one may be on its way.
            connection.channel.frame_limit = MAX_FRAME
        for change, topic_key in changes:
            if change == "down":
                driver = connection.links.pop(topic_key, None)
                if driver is not None:
                    driver.feed(LinkDown(connection.instance, "left"))
            else:
                self._link(connection, topic_key)

    def _link(self, connection: Connection, topic_key: bytes) -> None:
        driver, matcher = self._drivers.get(topic_key), connection.matcher
        if driver is None or matcher is None or matcher.remote_author is None or connection.detached:
            return
        if not connection.links:
            self.outside.linked(connection)
        connection.links[topic_key] = driver
        self._places.met(connection.instance, connection.host)
        host, port = connection.channel.remote_address
        is_ours = connection.channel.initiator
        self._linked(topic_key, host, port if is_ours else connection.hello.port, is_ours)
        goals = connection.goals.take(lambda goal: goal.topic_key == topic_key)
        dialled, *same = [goal.addresses for goal in goals if not goal.instance] or [()]
        driver.feed(connection.link_up(dialled, self._may_dial))
        for other in same:
            driver.feed(DialFailed(b"", other))  # another name of the very peer: no candidate any more

    # -- channels go down -------------------------------------------------------------------------------------

    def _retire(self, connection: Connection, reason: str) -> None:
        """Takes a channel out of service, and closes it."""
        self._strangers.pop(connection, None)
        self._unlink(connection, reason)
        self._others[connection] = None
        connection.channel.close(reason)

    def ended(self, connection: Connection, reason: str) -> None:
        self._strangers.pop(connection, None)
        self._others.pop(connection, None)
        self.bytes_in += connection.channel.bytes_in
        self.bytes_out += connection.channel.bytes_out
        log.debug("channel to %s port %d has ended: %s", *connection.channel.remote_address, reason)
        self._unlink(connection, reason)

    def _unlink(self, connection: Connection, reason: str) -> None:
        if connection.detached:
            return
        connection.detached = True
        links, connection.links = dict(connection.links), {}
        if connection.matcher is not None and self._connections.get(connection.instance) is connection:
            del self._connections[connection.instance]
            self._places.lost(connection.instance)
        for driver in links.values():
            driver.feed(LinkDown(connection.instance, reason))
        if connection.is_silent and not self._closing:
            # The peer may have closed it in favour of its own dial, of which we have not heard yet.
            connection.goals.move_to(self._orphans.setdefault(connection.instance, Goals()))
        else:
            self._fail(connection.goals.take())

    def _fail(self, goals: Iterable[Goal]) -> None:
        for goal in goals:
            self._dial_failed(goal)

    def _sweep(self) -> None:
        """Closes channels that nobody took into use, or that no topic has used for a while; gives up on goals."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._strangers):
            if connection.channel.is_open and now - connection.channel.opened_at >= self._limits.meeting:
                self._retire(connection, "not taken into use")
        for goals in list(self._orphans.values()):
            self._fail(goals.take_due(now))
        self._orphans = {instance: goals for instance, goals in self._orphans.items() if goals}
        for connection in list(self._connections.values()):
            self._fail(connection.goals.take_due(now))
            if connection.channel.frame_limit == STRANGER_FRAME and now - connection.since >= self._limits.stranger:
                self._retire(connection, "no topic in common")
            elif self._is_used(connection):
                connection.idle_since = None
            elif connection.idle_since is None:
                connection.idle_since = now
            elif now - connection.idle_since >= self._limits.idle - self._limits.sweep:
                self._retire(connection, "no topic needs it")
        self.outside.tick()
        self._sweeper = loop.call_later(self._limits.sweep, self._sweep)

    def traffic(self) -> tuple[int, int]:
        """Bytes received and sent, over all channels, ended ones included."""
        live = [*self._strangers, *self._connections.values(), *self._others]
        return (
            self.bytes_in + sum(connection.channel.bytes_in for connection in live),
            self.bytes_out + sum(connection.channel.bytes_out for connection in live),
        )
