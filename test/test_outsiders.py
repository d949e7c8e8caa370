"""Whoever connects without knowing the topic learns that a node is there, and no more, and is sent away within ten seconds of it."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import pytest
from captured import Traffic, found, of_text, spellings
from endpoints import Stranger, until
from nacl.signing import SigningKey

from solyd_swarm import Swarm, pubsub
from solyd_swarm.core.keys import derive_topic_id, derive_topic_key, parse_author
from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.connection import GREETING, USE, encode_hello
from solyd_swarm.net.limits import HANDSHAKE_TIMEOUT
from solyd_swarm.net.matching import ACCEPT, AUTHOR, OFFER, TOPIC, Identity, Matcher
from solyd_swarm.net.noise import NoiseSession

TOPIC_NAME, SECRET = "outsiders-do-not-know-it", b"a secret that is long enough"
KEY = derive_topic_key(TOPIC_NAME, SECRET)
WITHIN = 10.0
"""Seconds from connecting in which an outsider is sent away."""
LATE = 0.9
"""Of each time limit that an outsider makes use of."""
LOOPBACK = ("127.0.0.1", 0)


class Outsider(Stranger):
    """Speaks the protocol of channels, and keeps all that it is told."""

    def __init__(self, dht_port: int = 0) -> None:
        super().__init__()
        self.begun = time.monotonic()
        self.ended = 0.0
        self.dht_port = dht_port
        self.identity = SigningKey.generate()
        self.matcher: Matcher | None = None
        self.sent: list[bytes] = []

    def make(self, initiator: bool) -> Channel:
        self.channel = Channel(self, initiator, secrets.token_bytes(32), payload=encode_hello(7, self.dht_port))
        return self.channel

    def channel_closed(self, channel: Channel, reason: str) -> None:
        super().channel_closed(channel, reason)
        self.ended = time.monotonic()

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)
        self.channel.send(frame)

    def knows(self, *topic_keys: bytes) -> None:
        """Behaves as a member of these topics from now on."""
        identity = Identity(bytes(self.identity.verify_key), lambda data: self.identity.sign(data).signature)
        self.matcher = Matcher(self.channel.initiator, self.channel.handshake_hash, self.send, identity, lambda: ())
        self.matcher.join(*topic_keys)

    def channel_frames(self, channel: Channel, frames: list[bytes]) -> None:
        super().channel_frames(channel, frames)
        for frame in frames:
            if self.matcher is not None and frame[0] not in (USE, GREETING, TOPIC):
                self.matcher.handle(frame)

    def kinds(self) -> set[int]:
        return {frame[0] for frame in self.frames}

    async def gone(self) -> float:
        """Seconds from connecting to the end."""
        await until(lambda: self.ended, WITHIN + 10)
        return self.ended - self.begun


class DhtNode(asyncio.DatagramProtocol):
    """A node of the DHT that knows nobody, takes whatever it is given, and keeps all that it is told."""

    def __init__(self) -> None:
        self.id = secrets.token_bytes(20)
        self.heard: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.heard.append(data)
        if data[0] == wire.REQUEST:
            name = wire.decode(data[21:], wire.Request).name
            reply = {"ping": [self.id], "store": [self.id, True]}.get(name, [self.id, b"token", []])
            self.transport.sendto(b"\x01" + data[1:21] + msgspec.msgpack.encode(reply), addr)  # type: ignore[attr-defined]


@dataclass
class Scene:
    """Two members who talk, what a session of a member with one of them looked like, and what outsiders must not hear of them."""

    one: Swarm
    other: Swarm
    needles: dict[str, bytes]
    genuine: Outsider
    port: int


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    options = {"listen": LOOPBACK, "mdns": False, "secret": SECRET}
    async with pubsub(TOPIC_NAME, **options) as one, pubsub(TOPIC_NAME, **options, bootstrap=one.ticket) as other:
        await one.joined()
        one.publish("a message that outsiders never see")
        other.publish("another message that they never see")
        await one.flush()
        await other.flush()
        port = one._node.port
        needles = of_text("topic", TOPIC_NAME) | of_text("secret", SECRET.decode())
        for key in (KEY, derive_topic_key(TOPIC_NAME)):
            needles |= spellings("topic key", key) | spellings("topic id", derive_topic_id(key))
        for swarm in (one, other):
            needles |= spellings("author", parse_author(swarm.id)) | of_text("author id", swarm.id)
        needles |= {"address": b"127.0.0.1", "message": b"message that"}
        needles |= spellings("instance of the other", other._node.endpoint.instance)
        genuine = await connect(port)
        genuine.use()
        genuine.knows(KEY)
        await until(lambda: {USE, ACCEPT, AUTHOR, TOPIC} <= genuine.kinds())
        genuine.channel.close("seen enough")
        await genuine.channel.wait_closed()
        yield Scene(one, other, needles, genuine, port)


async def connect(port: int, dht_port: int = 0) -> Outsider:
    made = Outsider(dht_port)
    await asyncio.get_running_loop().create_connection(lambda: made.make(True), "127.0.0.1", port)
    await until(lambda: made.ready or made.reason)
    return made


# -- outsiders that dial --------------------------------------------------------------------------------------


async def plainly(scene: Scene, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> tuple[float, bytes]:
    """Connects without a channel. Seconds until the other end ended, and all that it said."""
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", scene.port)
    talking = asyncio.ensure_future(talk(reader, writer))
    said = b""
    try:
        with suppress(ConnectionError):
            async with asyncio.timeout(WITHIN + 10):
                while data := await reader.read(65536):
                    said += data
        return time.monotonic() - begun, said
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        writer.transport.abort()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(secrets.token_bytes(500))


async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The first message of a handshake, a byte at a time."""
    for byte in NoiseSession(True, secrets.token_bytes(32)).start():
        writer.write(bytes([byte]))
        await asyncio.sleep(0.5)


async def half_a_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(NoiseSession(True, secrets.token_bytes(32)).start())


async def broken_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(NoiseSession(True, secrets.token_bytes(32)).start() + b"\x00\x40" + secrets.token_bytes(64))


async def another_protocol(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    session = NoiseSession(True, secrets.token_bytes(32), prologue=b"solyd_swarm/0")
    writer.write(session.start())
    while True:
        writer.write(secrets.token_bytes(10))
        await asyncio.sleep(0.5)


PLAIN = [silence, garbage, web, trickle, half_a_handshake, broken_handshake, another_protocol]


async def unused(outsider: Outsider, genuine: Outsider) -> None:
    """Not even USE."""


async def quiet(outsider: Outsider, genuine: Outsider) -> None:
    outsider.use()


async def late(outsider: Outsider, genuine: Outsider) -> None:
    """As slow as may be, and never at rest."""
    await asyncio.sleep(3 * LATE)
    outsider.use()
    while True:
        outsider.channel.send(bytes([GREETING]) + encode_hello(7, 0))
        outsider.channel.send(b"\x7f of a later version")
        await asyncio.sleep(0.5)


async def wrong_topic(outsider: Outsider, genuine: Outsider) -> None:
    outsider.use()
    outsider.knows(derive_topic_key("another topic", SECRET))


async def wrong_secret(outsider: Outsider, genuine: Outsider) -> None:
    outsider.use()
    outsider.knows(derive_topic_key(TOPIC_NAME), derive_topic_key(TOPIC_NAME, b"a guess"), derive_topic_key(TOPIC_NAME, b""))


async def many_guesses(outsider: Outsider, genuine: Outsider) -> None:
    outsider.use()
    outsider.knows(*(derive_topic_key(f"guess {number}") for number in range(1024)))


async def replayed_tags(outsider: Outsider, genuine: Outsider) -> None:
    """Those that a genuine member has shown."""
    outsider.use()
    for frame in genuine.sent:
        if frame[0] == OFFER:
            outsider.channel.send(frame)


async def asking(outsider: Outsider, genuine: Outsider) -> None:
    """Asks where it is seen, to be dialled, and to be passed on."""
    outsider.use()
    outsider.channel.send(b"\x07" + msgspec.msgpack.encode([b"\x7f\0\0\1", 7]))
    outsider.channel.send(b"\x08" + msgspec.msgpack.encode([b"\x7f\0\0\1", 7]))
    outsider.channel.send(b"\x09" + msgspec.msgpack.encode([b"\x7f\0\0\1", 7, 1]))
    outsider.channel.send(b"\x0a" + msgspec.msgpack.encode([1, bytes(32), 0, [7]]))
    outsider.channel.send(b"\x0b" + msgspec.msgpack.encode([1, bytes(32), 0, [7], b"\x7f\0\0\1"]))
    for kind in (0x20, 0x22, 0x40, 0x45):  # Join, Neighbor, Summary, Pull: of a topic that is not agreed
        outsider.channel.send(bytes([TOPIC, 0, 1, kind, 0x90]))


async def replay(outsider: Outsider, genuine: Outsider) -> None:
    """All that a genuine member sent once, and nearly all that it was answered."""
    outsider.use()
    for frame in (*genuine.sent, *(frame for frame in genuine.frames if frame[0] not in (USE, ACCEPT))):
        outsider.channel.send(frame)


async def out_of_turn(outsider: Outsider, genuine: Outsider) -> None:
    """The answers of a responder."""
    outsider.use()
    for frame in genuine.frames:
        if frame[0] == ACCEPT:
            outsider.channel.send(frame)


DIALLERS = [unused, quiet, late, wrong_topic, wrong_secret, many_guesses, replayed_tags, asking, replay, out_of_turn]


async def test_outsiders_who_connect(scene: Scene, record_property: Callable[[str, object], None]) -> None:
    """All at once, so that it takes ten seconds."""
    loop = asyncio.get_running_loop()
    transport, node = await loop.create_datagram_endpoint(DhtNode, local_addr=LOOPBACK)
    dht_port = transport.get_extra_info("sockname")[1]
    outsiders: dict[str, Outsider] = {}

    async def dialling(behave: Callable[[Outsider, Outsider], Awaitable[None]]) -> float:
        outsider = outsiders[behave.__name__] = await connect(scene.port, dht_port)
        acting = asyncio.ensure_future(behave(outsider, scene.genuine))
        try:
            return await outsider.gone()
        finally:
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
            outsider.channel.abort("test ended")

    async def slow_handshake() -> float:
        """Completes it just in time, then behaves as `late`."""
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.port)
        session = NoiseSession(True, secrets.token_bytes(32), payload=encode_hello(7, 0))
        try:
            with suppress(ConnectionError):
                await asyncio.sleep(HANDSHAKE_TIMEOUT * LATE)
                writer.write(session.start())
                size = int.from_bytes(await reader.readexactly(2), "big")
                writer.write(session.read_handshake(await reader.readexactly(size)))
                await asyncio.sleep(3 * LATE)
                frame = bytes([USE]) + msgspec.msgpack.encode([1])
                while not reader.at_eof() and time.monotonic() < begun + WITHIN + 10:
                    writer.write(session.seal(len(frame).to_bytes(4, "big") + frame))
                    frame = b"\x7f of a later version"
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(65536), 0.5)
        finally:
            writer.transport.abort()
        return time.monotonic() - begun

    try:
        plain, dialled, slow = await asyncio.gather(
            asyncio.gather(*(plainly(scene, talk) for talk in PLAIN)),
            asyncio.gather(*(dialling(behave) for behave in DIALLERS)),
            slow_handshake(),
        )
    finally:
        transport.abort()
        await asyncio.sleep(0)
    took = {behave.__name__: seconds for behave, seconds in zip(DIALLERS, dialled, strict=True)}
    took |= {talk.__name__: seconds for talk, (seconds, _) in zip(PLAIN, plain, strict=True)} | {"slow_handshake": slow}
    print({name: round(seconds, 2) for name, seconds in sorted(took.items())})
    for outsider in outsiders.values():
        # Version, where it listens (where they dialled it), its part in the DHT: of the node. USE: of the channel.
        assert outsider.channel.remote_payload == encode_hello(scene.port, scene.one._node.endpoint.dht_port)
        assert outsider.kinds() <= {USE}
        assert [len(frame) for frame in outsider.frames] in ([], [11])  # a stamp begins at random
        assert found(scene.needles, Traffic(other=outsider.frames)) == set()
    said = [data for _, data in plain]
    assert all(len(data) in (0, 2 + 32 + 48 + 16 + len(encode_hello(scene.port, 65535))) for data in said)  # message 2 of the handshake
    assert found(scene.needles, Traffic(other=said)) == set()
    # The DHT takes them in as any node. It is told of records for a day, which are sealed.
    assert node.heard
    asked = [wire.decode(data[21:], wire.Request) for data in node.heard if data[0] == wire.REQUEST]
    print({request.name: sum(other.name == request.name for other in asked) for request in asked})
    assert found(scene.needles, Traffic(other=node.heard)) == set()
    assert {name: seconds for name, seconds in took.items() if seconds > WITHIN} == {}


# -- outsiders that are dialled -------------------------------------------------------------------------------


async def mirror(outsider: Outsider, genuine: Outsider) -> None:
    """Shows the tags back that it was shown, as its own."""
    await until(lambda: OFFER in outsider.kinds())
    outsider.use()
    (offer,) = (frame for frame in outsider.frames if frame[0] == OFFER)
    ((number, tag), *_) = msgspec.msgpack.decode(offer[1:])[0]
    outsider.channel.send(bytes([ACCEPT]) + msgspec.msgpack.encode([number, tag]))


async def old_answers(outsider: Outsider, genuine: Outsider) -> None:
    """Those of a genuine session."""
    outsider.use()
    for frame in genuine.frames:
        if frame[0] != USE:
            outsider.channel.send(frame)


async def made_up(outsider: Outsider, genuine: Outsider) -> None:
    outsider.use()
    outsider.channel.send(bytes([ACCEPT]) + msgspec.msgpack.encode([1, random.randbytes(32)]))


async def no_answer(outsider: Outsider, genuine: Outsider) -> None:
    """Tells who it is all the same."""
    outsider.use()
    key = outsider.identity
    signature = key.sign(b"solyd_swarm author v1\0" + outsider.channel.handshake_hash + b"responder").signature
    outsider.channel.send(bytes([AUTHOR]) + msgspec.msgpack.encode([bytes(key.verify_key), signature, [["127.0.0.1", 7]]]))
    outsider.channel.send(bytes([TOPIC, 0, 1, 0x20, 0x90]))


DIALLED = [unused, quiet, wrong_topic, wrong_secret, mirror, old_answers, made_up, no_answer]


async def test_outsiders_who_are_dialled(scene: Scene) -> None:
    """As who replays an announcement with an address of its own is."""
    loop = asyncio.get_running_loop()
    outsiders: dict[str, Outsider] = {}
    acting: list[asyncio.Future[float]] = []
    servers = []

    async def act(outsider: Outsider, behave: Callable[[Outsider, Outsider], Awaitable[None]]) -> float:
        outsider.begun = time.monotonic()
        await until(lambda: outsider.ready or outsider.reason)
        task = asyncio.ensure_future(behave(outsider, scene.genuine))
        try:
            return await outsider.gone()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    for behave in DIALLED:

        def accept(behave: Callable[[Outsider, Outsider], Awaitable[None]] = behave) -> Channel:
            outsider = Outsider()
            channel = outsider.make(False)
            if behave.__name__ in outsiders:
                channel.abort("once is enough")
            else:
                outsiders[behave.__name__] = outsider
                acting.append(asyncio.ensure_future(act(outsider, behave)))
            return channel

        servers.append(await loop.create_server(accept, *LOOPBACK))
    places = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    options = {"listen": LOOPBACK, "mdns": False, "dht": False, "secret": SECRET}
    try:
        async with pubsub(TOPIC_NAME, **options, bootstrap=places) as dialler:
            await until(lambda: len(acting) == len(DIALLED))
            took = dict(zip(outsiders, await asyncio.gather(*acting), strict=True))
            needles = scene.needles | spellings("author", parse_author(dialler.id))
    finally:
        for server in servers:
            server.close()
        for outsider in outsiders.values():
            outsider.channel.abort("test ended")
    print({name: round(seconds, 2) for name, seconds in sorted(took.items())})
    for outsider in outsiders.values():
        assert outsider.kinds() == {USE, OFFER}
        assert found(needles, Traffic(other=[*outsider.frames, outsider.channel.remote_payload])) == set()
    assert {name: seconds for name, seconds in took.items() if seconds > WITHIN} == {}
