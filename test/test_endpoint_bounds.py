"""What strangers, floods and broken peers can do to an endpoint: nothing much."""

import asyncio
import contextlib
import random
import secrets
from dataclasses import replace

import msgspec
import pytest
from endpoints import HALL, PATIENT, QUICK, ROOM, Host, hosts, stranger, until
from nacl.signing import SigningKey

from solyd_swarm.core.keys import topic_tag
from solyd_swarm.core.overlay import Overlay
from solyd_swarm.core.wire import make_peer_info
from solyd_swarm.net.bounds import STRANGER_FRAME
from solyd_swarm.net.connection import GREETING, USE, Hello
from solyd_swarm.net.driver import Driver
from solyd_swarm.net.matching import OFFER, TOPIC
from solyd_swarm.net.places import MAX_PEERS, MAX_PLACES, Places

FLOOD = "127.0.0.2"
"""An address of loopback to flood from, so that others come from elsewhere."""


@pytest.fixture
async def raw():
    """Makes plain connections that say nothing."""
    made = []

    async def connect(host: Host, source: str = FLOOD):
        made.append(await asyncio.open_connection(*host.at[0], local_addr=(source, 0)))
        return made[-1][0]

    yield connect
    for _, writer in made:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_half_open_connections_are_bounded_and_the_flooders_go(raw):
    async with hosts(Host(replace(PATIENT, strangers=8)), Host()) as (one, other):
        a, b = one.join(), other.join()
        honest = await raw(one, "127.0.0.1")
        flood = [await raw(one) for _ in range(40)]
        await until(lambda: len(one.endpoint._strangers) == 8)
        other.dial(one.at)
        await until(lambda: a.ups and b.ups)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(flood[0].read(), 5) == b""
        assert not honest.at_eof()
        assert one.endpoint.traffic()[0] > 0


async def test_a_flood_does_not_push_out_our_own_dials(raw):
    async with hosts(Host(replace(PATIENT, strangers=2)), Host()) as (one, other):
        a = one.join()
        other.join()
        one.dial(other.at)
        for _ in range(10):
            await raw(one)
        await until(lambda: a.ups)


async def test_who_says_nothing_is_cut_off(raw):
    async with hosts(Host(QUICK)) as (one,):
        reader = await raw(one)
        assert await asyncio.wait_for(reader.read(), QUICK.channel.handshake + 2) == b""
        await until(lambda: not one.endpoint._strangers)


async def test_who_says_nonsense_is_cut_off(raw, seed):
    rng = random.Random(seed)
    async with hosts(Host(QUICK)) as (one,):
        for _ in range(20):
            reader, writer = await asyncio.open_connection(*one.at[0])
            writer.write(rng.randbytes(rng.randrange(1, 400)))
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), QUICK.channel.handshake + 2)
            writer.transport.abort()
        await until(lambda: not one.endpoint._strangers)


async def test_a_channel_not_taken_into_use_is_closed_and_its_frames_do_not_count():
    async with hosts(Host(QUICK)) as (one,):
        a = one.join()
        async with stranger(one) as other:
            tag = topic_tag(ROOM, other.channel.handshake_hash, b"initiator")
            other.channel.send(bytes([OFFER]) + msgspec.msgpack.encode([[(1, tag)]]))
            other.channel.send(bytes([GREETING]) + msgspec.msgpack.encode([1, 2, 3]))
            await until(lambda: other.reason)
            assert other.frames == []
            assert (a.events, one.met) == ([], [])


@pytest.mark.parametrize("body", [b"", b"\xc0", b"\x91\xff", b"\x91\xa1x", b"\x91" * 50_000])
async def test_malformed_frames_of_an_endpoint_close_the_channel(body):
    async with hosts(Host()) as (one,):
        for kind in (USE, GREETING):
            async with stranger(one) as other:
                if kind == GREETING:
                    other.use()
                other.channel.send(bytes([kind]) + body)
                await until(lambda other=other: other.reason)
        await until(lambda: not (one.endpoint._strangers or one.endpoint._connections))


async def test_use_said_twice_closes_the_channel():
    async with hosts(Host()) as (one,), stranger(one) as other:
        other.use(1)
        other.use(2)
        await until(lambda: other.reason)


@pytest.mark.parametrize("greeting", [b"", b"\xc0", msgspec.msgpack.encode([1, 70_000, 0]), msgspec.msgpack.encode(["1"])])
async def test_a_malformed_greeting_closes_the_channel(greeting):
    async with hosts(Host()) as (one,), stranger(one, payload=greeting) as other:
        await until(lambda: other.reason)
        await until(lambda: not one.endpoint._strangers)


async def test_the_greeting_of_a_later_version_is_understood():
    async with hosts(Host()) as (one,), stranger(one, payload=msgspec.msgpack.encode([2, 7000, 7001, {"new": True}])) as other:
        other.use()
        await until(lambda: other.frames)
        assert other.frames[0][0] == USE
        assert one.met == [("127.0.0.1", 7001)]
        other.channel.send(b"\x7ffrom a later version")
        other.channel.send(bytes([GREETING]) + msgspec.msgpack.encode([2, 7000, 7002, "more"]))
        await until(lambda: len(one.met) == 2)
        assert msgspec.msgpack.decode(other.channel.remote_payload, type=Hello).port == one.port


async def test_a_strangers_long_frame_closes_the_channel_and_a_members_does_not():
    async with hosts(Host(), Host()) as (one, other):
        async with stranger(one) as unknown:
            unknown.use()
            unknown.channel.send(b"\x7f" + bytes(STRANGER_FRAME - 1))
            unknown.channel.send(b"\x7f" + bytes(STRANGER_FRAME))
            await until(lambda: unknown.reason)
        a, b = one.join(), other.join()
        one.dial(other.at)
        await until(lambda: a.ups and b.ups)
        for sender, receiver, driver in ((one, other, b), (other, one, a)):
            sender.send(receiver, bytes(2**20))
            await until(lambda driver=driver: driver.frames == [bytes(2**20)])


async def test_a_channel_that_no_topic_uses_is_closed():
    async with hosts(Host(QUICK), Host(QUICK), Host(QUICK)) as (one, other, third):
        a, b, c = one.join(), other.join(), third.join()
        one.dial(other.at)
        third.dial(one.at)
        await until(lambda: len(a.ups) == 2 and b.ups and c.ups)
        a.uses = lambda peer: peer == other.instance
        c.useful = False
        await until(lambda: a.downs and c.downs)
        await asyncio.sleep(QUICK.idle)
        assert not b.downs
        b.useful = False  # one end has a use for it, but the other has not
        await until(lambda: b.downs and len(a.downs) == 2)


async def test_channels_are_bounded_and_those_in_use_stay():
    async with hosts(Host(replace(PATIENT, channels=4)), Host()) as (one, other), contextlib.AsyncExitStack() as stack:
        a, b = one.join(), other.join()
        other.dial(one.at)
        await until(lambda: a.ups and b.ups)
        honest = await stack.enter_async_context(stranger(one))
        honest.use()
        await until(lambda: honest.frames)
        flood = [await stack.enter_async_context(stranger(one, FLOOD)) for _ in range(10)]
        for each in flood:
            each.use()
        await until(lambda: sum(bool(each.reason) for each in flood) == 8)
        assert len(one.endpoint._connections) == 4
        assert not a.downs + b.downs
        assert not honest.reason


async def test_where_all_channels_are_used_the_newcomer_is_refused():
    async with hosts(Host(replace(PATIENT, channels=1)), Host(), Host(QUICK)) as (one, other, third):
        a, b = one.join(), other.join()
        other.dial(one.at)
        await until(lambda: a.ups and b.ups)
        c = third.join()
        third.dial(one.at)
        await until(lambda: c.failures)
        assert not a.downs + b.downs


async def test_a_stranger_learns_nothing_from_an_endpoint():
    async with hosts(Host()) as (one,), stranger(one) as other:
        one.join()
        other.use()
        tag = topic_tag(HALL, other.channel.handshake_hash, b"initiator")
        other.channel.send(bytes([OFFER]) + msgspec.msgpack.encode([[(1, tag)]]))
        other.channel.send(bytes([TOPIC, 0, 1]) + b"not agreed")
        other.channel.send(bytes([GREETING]) + msgspec.msgpack.encode([1, 2, 3]))
        await until(lambda: one.met)
        assert [frame[0] for frame in other.frames] == [USE]


async def test_a_broken_frame_of_a_topic_closes_the_channel(caplog):
    """With a real core behind it."""
    async with hosts(Host(), Host()) as (one, other):
        key = SigningKey.generate()
        overlay = Overlay(
            make_peer_info(one.instance, one.at),
            bytes(16),
            bytes(key.verify_key),
            1,
            lambda data: key.sign(data).signature,
            random.Random(1),
        )
        driver = Driver(overlay, ROOM, Network(one), Nobody(), asyncio.get_running_loop())
        one.endpoint.attach(driver)
        b = other.join()
        other.dial(one.at)
        await until(lambda: b.ups)
        other.send(one, b"\x20" + b"\xc1 no MessagePack")
        await until(lambda: b.downs)
        assert overlay.link(other.instance) is None
        assert "broke the protocol" in caplog.text
        driver.close()


class Network:
    def __init__(self, host: Host):
        self.send = host.endpoint.send
        self.close = host.endpoint.close_channel
        self.backlog = host.endpoint.backlog

    def dial(self, *_: object) -> None: ...


class Nobody:
    def __getattr__(self, name: str):
        return lambda *_: None


def test_places_are_bounded():
    places, mine = Places(), secrets.token_bytes(32)
    places.reached(("192.0.2.1", 1), mine)
    places.met(mine, "192.0.2.1")
    for number in range(MAX_PLACES + 5):
        places.reached(("127.0.0.1", number), b"flood")
    for number in range(MAX_PEERS):
        places.met(b"%d" % number, "127.0.0.1")
    assert places.at(("192.0.2.1", 1)) == b""
    assert places.host_of(mine) is None
    assert len(places._instances) == MAX_PLACES
    places.lost(b"flood")
    assert not places._instances
