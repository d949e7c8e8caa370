"""A channel of an endpoint: its greeting, the topics agreed on it, and what it was dialled for.

Either end may dial, at the same time too, so two channels of one pair can come up. Who dialled decides whether to use a channel and
says so with its first frame (USE), or closes it where there is one already; the other end answers with USE once it uses it too. Each
USE carries a stamp that grows with every one its sender sends, so that both ends tell alike which of two the other wants.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
from msgspec import Meta

from solyd_swarm.core.events import Addresses, LinkUp, Received
from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net import reach_frames
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.goals import Goal, Goals
from solyd_swarm.net.limits import LOW_MARK
from solyd_swarm.net.matching import TOPIC, Change, Identity, Matcher

if TYPE_CHECKING:
    from solyd_swarm.net.driver import Driver

PROTOCOL_VERSION = 1
USE, GREETING = 0x05, 0x06
"""Frame types beside those of the matching: the channel is taken into use; what the handshake's payload said has changed."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """What the handshake payload carries: protocol version, and the TCP and DHT (UDP) ports listened on (0: none).

    Elements that a later version appends are ignored.
    """

    version: Annotated[int, Meta(ge=0)] = PROTOCOL_VERSION
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    dht_port: Annotated[int, Meta(ge=0, le=65535)] = 0


class _Use(msgspec.Struct, frozen=True, array_like=True):
    stamp: Annotated[int, Meta(ge=0, lt=2**53)]


_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_use = msgspec.msgpack.Decoder(_Use).decode


def encode_hello(port: int, dht_port: int) -> bytes:
    """The greeting of somebody who listens at these ports."""
    return _encode(Hello(PROTOCOL_VERSION, port, dht_port))


def decode_hello(data: bytes | memoryview) -> Hello:
    """What a greeting says. Raises `RemoteProtocolError`."""
    try:
        return _decode_hello(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"a malformed greeting: {error}") from None


class Handler(Protocol):
    """What a connection calls."""

    def handshaken(self, connection: "Connection") -> None:
        """The peer is known."""

    def used(self, connection: "Connection") -> None:
        """The peer uses this channel."""

    def greeted(self, connection: "Connection") -> None:
        """The peer's greeting has changed."""

    def told(self, connection: "Connection", frame: bytes) -> None:
        """A frame about where we, or others, can be reached. Raises `RemoteProtocolError`."""

    def matched(self, connection: "Connection", changes: list[Change]) -> None:
        """Topics were agreed, or withdrawn."""

    def ended(self, connection: "Connection", reason: str) -> None:
        """The channel is closed."""


class Connection:
    """The owner of a channel.

    Attributes:
        wanted: what it was dialled for; grows until the handshake is complete.
        goals: what may be reached over it and was not yet.
        ready: whether the handshake completes; done in any case.
        links: the drivers of the topics agreed.
        stamp: of the peer's USE; None until it came.
        since: loop time at which it was made.
        idle_since: loop time since which no topic has used it; None while one does, or before that was looked at.
        asked: for a channel of two that dialled each other at once, whether it was we who wanted it; else None.
        incidental: that it came about says nothing about whether we can be dialled.
        refused_until: the peer does not try our addresses for us before that, or not again.
        detached: out of service: no frame counts any more.
    """

    def __init__(self, handler: Handler, wanted: list[Goal], make: "Callable[[Connection], Channel]") -> None:
        loop = asyncio.get_running_loop()
        self.wanted = wanted
        self.goals = Goals()
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.matcher: Matcher | None = None
        self.hello = Hello()
        self.links: dict[bytes, Driver] = {}
        self.stamp: int | None = None
        self.since = loop.time()
        self.idle_since: float | None = None
        self.asked: bool | None = None
        self.incidental = False
        self.refused_until = 0.0
        self.detached = False
        self._handler = handler
        self.channel = make(self)

    @property
    def instance(self) -> bytes:
        """The peer's instance key; after the handshake."""
        return self.channel.remote_instance

    @property
    def host(self) -> str:
        """IP literal of the other end."""
        return self.channel.remote_address[0]

    @property
    def is_silent(self) -> bool:
        """Whether we use it and the peer, who did not dial, has not said so too: it may prefer a dial of its own."""
        return self.matcher is not None and self.stamp is None

    def link_up(self, dialled: Addresses, may_dial: Callable[[str, str], bool]) -> LinkUp:
        """A topic is agreed with a peer whose author we know. Where it can be dialled: as we see it, then as far as it may send us."""
        assert self.matcher is not None
        assert self.matcher.remote_author is not None
        seen = ((self.host, self.hello.port),) if self.hello.port else ()
        told = tuple(address for address in self.matcher.remote_addresses if may_dial(address[0], self.host))
        addresses = tuple(dict.fromkeys(seen + told))
        initiated = self.channel.initiator if self.asked is None else self.asked
        return LinkUp(self.instance, self.matcher.remote_author, addresses, initiated, dialled)

    def use(self, stamp: int, identity: Identity, addresses: Callable[[], Addresses], may_dial: Callable[[str, str], bool]) -> Matcher:
        """We use this channel from now on, and tell the peer. Addresses inside our network are told inside it only."""
        channel = self.channel

        def usable() -> Addresses:
            return tuple(address for address in addresses() if may_dial(address[0], self.host))

        channel.send(bytes([USE]) + _encode(_Use(stamp)))
        self.matcher = Matcher(channel.initiator, channel.handshake_hash, channel.send, identity, usable)
        return self.matcher

    def greet(self, port: int, dht_port: int) -> None:
        """Tells the peer where we listen now."""
        self.channel.send(bytes([GREETING]) + encode_hello(port, dht_port))

    # -- what the channel calls -------------------------------------------------------------------------------

    def channel_ready(self, channel: Channel) -> None:
        if not self.ready.done():
            self.ready.set_result(True)
        self.hello = decode_hello(channel.remote_payload)
        self._handler.handshaken(self)

    def channel_frames(self, channel: Channel, frames: list[bytes]) -> None:
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
                if self.detached:
                    return
                self._control(frame)
        self._pass_on(number, batch)

    def _pass_on(self, number: int, batch: list[bytes]) -> None:
        # Frames of a number that is not agreed are those of a topic that was left: they are dropped.
        if batch and self.matcher is not None and not self.detached:
            driver = self.links.get(self.matcher.topics.get(number, b""))
            if driver is not None:
                driver.feed(Received(self.instance, batch))

    def _control(self, frame: bytes) -> None:
        if frame[0] == USE:
            try:
                use = _decode_use(memoryview(frame)[1:])
            except (msgspec.DecodeError, RecursionError) as error:
                raise RemoteProtocolError(f"a malformed frame of type {USE:#04x}: {error}") from None
            if self.stamp is not None:
                raise RemoteProtocolError("a channel taken into use twice")
            self.stamp = use.stamp
            self._handler.used(self)
        elif self.matcher is None:
            return  # not in use: nothing counts before USE
        elif frame[0] in reach_frames.TYPES:
            self._handler.told(self, frame)
        elif frame[0] == GREETING:
            self.hello = decode_hello(memoryview(frame)[1:])
            self._handler.greeted(self)
        else:
            self._handler.matched(self, self.matcher.handle(frame))

    def channel_backlog(self, channel: Channel, size: int) -> None:
        for driver in list(self.links.values()):
            driver.backlog(self.instance, size, size <= LOW_MARK)

    def channel_closed(self, channel: Channel, reason: str) -> None:
        if not self.ready.done():
            self.ready.set_result(False)
        self._handler.ended(self, reason)
