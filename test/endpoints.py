"""Endpoints over real TCP on loopback, with drivers that only record, a stranger who speaks the channel, and a proxy in between."""

import asyncio
import random
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from nacl.signing import SigningKey

from solyd_swarm.core.events import Addresses, DialFailed, Event, LinkDown, LinkUp, Received
from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.net.bounds import EndpointLimits
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.connection import USE, Hello
from solyd_swarm.net.endpoint import Endpoint
from solyd_swarm.net.goals import Goal
from solyd_swarm.net.limits import Limits
from solyd_swarm.net.listen import bind
from solyd_swarm.net.matching import Identity

PATIENCE = 10.0
ROOM, HALL = derive_topic_key("room"), derive_topic_key("hall")
PATIENT = EndpointLimits(sweep=0.05)
"""The real times, and goals looked at often."""
QUICK = EndpointLimits(idle=0.4, meeting=0.3, sweep=0.05, connect=2.0, channel=Limits(handshake=1.0))


async def until(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Waits for what happens on this loop: looks once a turn."""
    async with asyncio.timeout(patience):
        while not (value := condition()):
            await asyncio.sleep(0.001)
    return value


class Recorder:
    """A driver that records its events. ``useful`` says whether it uses its peers' channels."""

    def __init__(self, topic_key: bytes, *, useful: bool = True):
        self.topic_key = topic_key
        self.useful = useful
        self.events: list[Event] = []
        self.overlay = self

    def uses(self, peer: bytes) -> bool:
        return self.useful

    def feed(self, event: Event) -> None:
        self.events.append(event)

    def backlog(self, peer: bytes, size: int, low: bool) -> None:
        pass

    def all(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def ups(self) -> list[LinkUp]:
        return self.all(LinkUp)

    @property
    def downs(self) -> list[LinkDown]:
        return self.all(LinkDown)

    @property
    def failures(self) -> list[DialFailed]:
        return self.all(DialFailed)

    @property
    def frames(self) -> list[bytes]:
        return [frame for event in self.all(Received) for frame in event.frames]


class Host:
    """An endpoint that listens on loopback."""

    def __init__(self, limits: EndpointLimits = PATIENT, told: Addresses = (), private: bytes = b"", **options: Any):
        self.key = SigningKey.generate()
        self.met: list[tuple[str, int]] = []
        identity = Identity(bytes(self.key.verify_key), lambda data: self.key.sign(data).signature)
        self.endpoint = Endpoint(
            private or secrets.token_bytes(32),
            identity,
            addresses=lambda: told,
            met=lambda *where: self.met.append(where),
            limits=limits,
            **options,
        )
        self.sockets = bind(("127.0.0.1", 0), [])
        self.endpoint.port = self.port = self.sockets[0].getsockname()[1]
        self.instance = self.endpoint.instance
        self.at: Addresses = (("127.0.0.1", self.port),)

    def join(self, topic_key: bytes = ROOM, *, useful: bool = True) -> Recorder:
        driver = Recorder(topic_key, useful=useful)
        self.endpoint.attach(driver)  # type: ignore[arg-type]
        return driver

    def dial(self, at: Addresses, instance: bytes = b"", topic_key: bytes = ROOM) -> None:
        self.endpoint.dial(Goal(topic_key, instance, at))

    def channel(self, other: "Host") -> Channel | None:
        """The one in use."""
        connection = self.endpoint._connections.get(other.instance)
        return connection.channel if connection else None

    def send(self, other: "Host", data: bytes, topic_key: bytes = ROOM) -> None:
        self.endpoint.send(other.instance, topic_key, data)


@asynccontextmanager
async def hosts(*made: Host) -> AsyncIterator[tuple[Host, ...]]:
    for host in made:
        await host.endpoint.start(host.sockets)
    try:
        yield made
    finally:
        await asyncio.gather(*(host.endpoint.close() for host in made))


@dataclass
class Proxy:
    """Passes bytes on, after random delays if wanted, until it is frozen: then nothing passes and no end is told."""

    target: int
    delay: float = 0.0
    connections: int = 0
    frozen: bool = False
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def at(self) -> Addresses:
        return (("127.0.0.1", self.port),)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            onward = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        ways = [asyncio.ensure_future(self.pump(reader, onward[1])), asyncio.ensure_future(self.pump(onward[0], writer))]
        self._tasks |= set(ways)
        try:
            await asyncio.wait(ways)
        finally:
            writer.transport.abort()
            onward[1].transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(random.random() * self.delay)
                while self.frozen:
                    await asyncio.sleep(3600)
                writer.write(data)
                await writer.drain()
        while self.frozen:
            await asyncio.sleep(3600)
        with suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def proxy(target: int, delay: float = 0.0) -> AsyncIterator[Proxy]:
    made = Proxy(target, delay)
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(made.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in (*made._tasks, *serving):
            task.cancel()
        await asyncio.gather(*made._tasks, *serving, return_exceptions=True)


class Stranger:
    """A channel by itself: the other end of an endpoint that speaks it as it pleases."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.ready = False
        self.reason = ""
        self.channel: Channel

    def channel_ready(self, channel: Channel) -> None:
        self.ready = True

    def channel_frames(self, channel: Channel, frames: list[bytes]) -> None:
        self.frames += frames

    def channel_backlog(self, channel: Channel, size: int) -> None:
        pass

    def channel_closed(self, channel: Channel, reason: str) -> None:
        self.reason = reason

    def use(self, stamp: int = 1) -> None:
        self.channel.send(bytes([USE]) + msgspec.msgpack.encode([stamp]))


@asynccontextmanager
async def stranger(host: Host, source: str = "127.0.0.1", payload: bytes | None = None, private: bytes = b"") -> AsyncIterator[Stranger]:
    """One who has dialled and completed the handshake."""
    made = Stranger()
    greeting = msgspec.msgpack.encode(Hello()) if payload is None else payload

    def make() -> Channel:
        made.channel = Channel(made, True, private or secrets.token_bytes(32), payload=greeting)
        return made.channel

    await asyncio.get_running_loop().create_connection(make, *host.at[0], local_addr=(source, 0))
    try:
        await until(lambda: made.ready or made.reason)
        yield made
    finally:
        made.channel.abort("test ended")
        await made.channel.wait_closed()


def black_hole() -> tuple[socket.socket, list[socket.socket]]:
    """A listener whose queue is full, so that connecting to it never ends; and what fills it. All to be closed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    fill = []
    for _ in range(3):
        each = socket.socket()
        each.setblocking(False)
        each.connect_ex(listener.getsockname())
        fill.append(each)
    return listener, fill
