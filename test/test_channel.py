"""Channels over real TCP on loopback, and over a transport made of memory where the bytes must be cut or damaged.

The real limits are 0.5 to 30 s; the tests hand over shorter ones, so that each waits for what it tests and for no more.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.limits import DEFAULT_LIMITS, Limits
from solyd_swarm.net.noise import KEEPALIVE, MAX_FRAME, MAX_PLAINTEXT, FrameReader, NoiseSession, public_key
from solyd_swarm.net.sockaddr import read_address

ALICE, BOB = bytes(range(32)), bytes(range(32, 64))
PATIENCE = 10.0


class Owner:
    """Records everything; `until` waits for what it records."""

    def __init__(self, on_ready: Callable[[Channel], None] | None = None, on_frames: Callable[[Channel, list[bytes]], None] | None = None):
        self.frames: list[bytes] = []
        self.batches = 0
        self.backlogs: list[int] = []
        self.ready: list[Channel] = []
        self.reasons: list[str] = []
        self.on_ready = on_ready
        self.on_frames = on_frames
        self.changed = asyncio.Event()

    def channel_ready(self, channel: Channel) -> None:
        assert not self.ready
        self.ready.append(channel)
        self.changed.set()
        if self.on_ready:
            self.on_ready(channel)

    def channel_frames(self, channel: Channel, frames: list[bytes]) -> None:
        assert frames
        assert not self.reasons
        assert self.ready
        self.frames += frames
        self.batches += 1
        self.changed.set()
        if self.on_frames:
            self.on_frames(channel, frames)

    def channel_backlog(self, channel: Channel, size: int) -> None:
        self.backlogs.append(size)
        self.changed.set()

    def channel_closed(self, channel: Channel, reason: str) -> None:
        self.reasons.append(reason)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def closed(self) -> str:
        await self.until(lambda: bool(self.reasons))
        assert len(self.reasons) == 1
        return self.reasons[0]


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Tasks, timers and sockets are as before."""
    loop = asyncio.get_running_loop()

    def count() -> tuple[int, int, int]:
        timers = [handle for handle in loop._scheduled if not handle.cancelled()]
        return len(asyncio.all_tasks()), len(timers), len(loop._selector.get_map())

    before = count()
    yield
    await asyncio.sleep(0)  # a server takes one turn to let go of its socket
    await asyncio.sleep(0)
    assert count() == before


@asynccontextmanager
async def listening(owner: Owner, channels: list[Channel], limits: Limits = DEFAULT_LIMITS, **options) -> AsyncIterator[int]:
    """A server on loopback that makes responders; yields its port."""

    def make() -> Channel:
        channels.append(Channel(owner, False, BOB, limits=limits, **options))
        return channels[-1]

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for channel in channels:
            channel.abort("test ended")
            async with asyncio.timeout(PATIENCE):
                await channel.wait_closed()


@asynccontextmanager
async def connected(
    alice: Owner, bob: Owner, *, alice_limits: Limits = DEFAULT_LIMITS, bob_limits: Limits = DEFAULT_LIMITS
) -> AsyncIterator[tuple[Channel, Channel]]:
    """A channel of each owner, both open; Alice dialled."""
    channels: list[Channel] = []
    async with nothing_left(), listening(bob, channels, bob_limits, payload=b"bob's") as port:
        make = lambda: Channel(alice, True, ALICE, limits=alice_limits, payload=b"alice's")  # noqa: E731
        _, dialled = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", port)
        channels.append(dialled)
        await alice.until(lambda: bool(alice.ready))
        await bob.until(lambda: bool(bob.ready))
        yield dialled, channels[0]


class Raw:
    """A peer that does as it is told: a socket and a session, no channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.session = NoiseSession(True, ALICE)

    async def message(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readexactly(int.from_bytes(await self.reader.readexactly(2), "big"))

    async def handshake(self) -> None:
        self.writer.write(self.session.start())
        self.writer.write(self.session.read_handshake(await self.message()))

    def send(self, *frames: bytes) -> None:
        self.writer.write(self.seal(*frames))

    def seal(self, *frames: bytes) -> bytes:
        return self.session.seal(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))


@asynccontextmanager
async def raw_peer(owner: Owner, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[tuple[Raw, list[Channel]]]:
    channels: list[Channel] = []
    async with nothing_left(), listening(owner, channels, limits) as port:
        raw = Raw(*await asyncio.open_connection("127.0.0.1", port))
        try:
            yield raw, channels
        finally:
            raw.writer.transport.abort()
            with suppress(ConnectionError):  # the other side was first
                await raw.writer.wait_closed()


async def test_handshake_and_frames_both_ways() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, accepted):
        assert dialled.initiator
        assert not accepted.initiator
        assert dialled.is_open
        assert (dialled.remote_instance, accepted.remote_instance) == (public_key(BOB), public_key(ALICE))
        assert (dialled.remote_payload, accepted.remote_payload) == (b"bob's", b"alice's")
        assert dialled.handshake_hash == accepted.handshake_hash
        assert dialled.remote_address[0] == accepted.remote_address[0] == "127.0.0.1"
        assert dialled.opened_at > 0
        dialled.send(b"one")
        dialled.send_many([b"two", b"three"])
        accepted.send(b"four")
        await bob.until(lambda: len(bob.frames) == 3)
        await alice.until(lambda: len(alice.frames) == 1)
        assert bob.frames == [b"one", b"two", b"three"]
        assert bob.batches == 1
        assert alice.frames == [b"four"]
        assert dialled.bytes_out == accepted.bytes_in
        assert accepted.bytes_out == dialled.bytes_in
        assert dialled.backlog == 0


async def test_properties_before_the_handshake() -> None:
    channel = Channel(Owner(), True, ALICE)
    for read in (lambda: channel.remote_instance, lambda: channel.handshake_hash, lambda: channel.remote_payload):
        with pytest.raises(RuntimeError):
            read()
    assert channel.backlog == 0
    assert channel.progress_at == 0
    assert not channel.is_open


async def test_many_small_frames_share_a_message() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, _):
        before = dialled.bytes_out
        for number in range(1_000):
            dialled.send(number.to_bytes(50, "big"))
        await bob.until(lambda: len(bob.frames) == 1_000)
        assert bob.frames == [number.to_bytes(50, "big") for number in range(1_000)]
        assert dialled.bytes_out - before == 1_000 * 54 + 2 + 16


async def test_large_frames() -> None:
    alice, bob = Owner(), Owner()
    frames = [bytes([7]) * (8 * 1024 * 1024), b"small", bytes(MAX_FRAME), b"x" * MAX_PLAINTEXT]
    async with connected(alice, bob) as (dialled, _):
        dialled.send_many(frames)
        await bob.until(lambda: len(bob.frames) == len(frames))
        assert bob.frames == frames


async def test_frames_sent_before_the_channel_is_open_wait() -> None:
    alice, bob = Owner(on_ready=lambda channel: channel.send(b"second")), Owner()
    channels: list[Channel] = []
    async with listening(bob, channels) as port:
        channel = Channel(alice, True, ALICE)
        channel.send(b"first")
        await asyncio.get_running_loop().create_connection(lambda: channel, "127.0.0.1", port)
        channels.append(channel)
        await bob.until(lambda: len(bob.frames) == 2)
        assert bob.frames == [b"first", b"second"]


async def test_frames_that_cannot_be() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, _):
        for frame in (b"", bytes(MAX_FRAME + 1)):
            with pytest.raises(ValueError):
                dialled.send(frame)
            with pytest.raises(ValueError):
                dialled.send_many([b"good", frame])
        await bob.until(lambda: len(bob.frames) == 2)
        assert bob.frames == [b"good", b"good"]


async def test_close_drains_everything_and_loses_nothing_either_way() -> None:
    """Bob goes on sending, so unread input waits at Alice when she leaves: an ordinary close would reset the connection."""
    alice, bob = Owner(), Owner(on_frames=lambda channel, frames: channel.send(b"echo" * 1_000))
    frames = [number.to_bytes(1_000, "big") for number in range(5_000)]
    async with connected(alice, bob) as (dialled, accepted):
        accepted.send_many([b"b" * 1_000] * 1_000)
        dialled.send_many(frames)
        dialled.close("good night")
        dialled.close("again")
        dialled.send(b"too late")
        assert not dialled.is_open
        async with asyncio.timeout(PATIENCE):
            await dialled.wait_closed()
            await accepted.wait_closed()
        assert bob.frames == frames
        assert await alice.closed() == "good night"
        assert await bob.closed() == "closed by the peer"
        assert dialled.backlog == accepted.backlog == 0


async def test_close_without_drain_throws_the_queue_away() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, _):
        dialled.send(b"never")
        dialled.close("off", drain=False)
        assert await bob.closed() == "closed by the peer"
        assert await alice.closed() == "off"
        assert bob.frames == []


async def test_both_close_at_once() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, accepted):
        dialled.send(b"a")
        accepted.send(b"b")
        dialled.close("alice leaves")
        accepted.close("bob leaves")
        assert await alice.closed() == "alice leaves"
        assert await bob.closed() == "bob leaves"


async def test_close_gives_up_on_a_peer_that_never_ends() -> None:
    owner = Owner()
    async with raw_peer(owner, replace(DEFAULT_LIMITS, drain=0.1)) as (raw, channels):
        await raw.handshake()
        await owner.until(lambda: bool(owner.ready))
        began = asyncio.get_running_loop().time()
        channels[0].close("leaving")
        assert await owner.closed() == "leaving"
        assert 0.09 < asyncio.get_running_loop().time() - began < 1


async def test_close_while_paused_still_reads_to_the_end() -> None:
    alice, bob = Owner(), Owner(on_ready=lambda channel: channel.pause())
    async with connected(alice, bob) as (dialled, accepted):
        dialled.send_many([b"x" * 100_000] * 30)
        accepted.close("enough")
        assert await bob.closed() == "enough"
        assert await alice.closed() == "closed by the peer"
        assert bob.frames == []


async def test_abort() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, _):
        dialled.send(b"lost")
        dialled.abort("no more of this")
        dialled.abort("again")
        dialled.close("and again")
        assert alice.reasons == []  # told in a later turn, never from inside the call
        assert await alice.closed() == "no more of this"
        assert await bob.closed() in ("closed by the peer", "connection lost")
        dialled.send(b"ignored")
        dialled.pause()
        dialled.resume()
        assert dialled.backlog == 0


async def test_abort_before_there_is_a_connection() -> None:
    alice, bob, channels = Owner(), Owner(), []
    async with nothing_left(), listening(bob, channels) as port:
        channel = Channel(alice, True, ALICE)
        channel.close("changed my mind")
        async with asyncio.timeout(PATIENCE):
            await channel.wait_closed()
        assert alice.reasons == []
        await asyncio.get_running_loop().create_connection(lambda: channel, "127.0.0.1", port)
        assert await alice.closed() == "changed my mind"
        assert await bob.closed() == "closed during the handshake"


@pytest.mark.parametrize("how", ["ready", "frames"])
@pytest.mark.parametrize("what", ["raise", "abort", "close"])
async def test_owner_ends_it_from_inside_a_call(how: str, what: str) -> None:
    def end(channel: Channel, frames: object = None) -> None:
        if what == "raise":
            raise RemoteProtocolError("that was not nice")
        (channel.abort if what == "abort" else channel.close)("that was not nice")

    alice = Owner(on_ready=lambda channel: channel.send_many([b"x" * 200_000, b"y"]))
    bob = Owner(on_ready=end if how == "ready" else None, on_frames=end if how == "frames" else None)
    async with connected(alice, bob):
        assert await bob.closed() == "that was not nice"
        await alice.closed()
        assert bob.batches == (how == "frames")


async def test_owner_with_a_bug_is_reported_and_loses_the_channel() -> None:
    def stumble(channel: Channel, frames: list[bytes]) -> None:
        raise ZeroDivisionError("a bug")

    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    alice, bob = Owner(), Owner(on_frames=stumble)
    async with connected(alice, bob) as (dialled, _):
        dialled.send(b"x")
        assert await bob.closed() == "internal error"
        assert isinstance(reported[0]["exception"], ZeroDivisionError)


async def test_slow_reader_builds_a_backlog_and_catches_up() -> None:
    alice, bob = Owner(), Owner(on_ready=lambda channel: channel.pause())
    frames = [number.to_bytes(50_000, "big") for number in range(600)]
    async with connected(alice, bob) as (dialled, accepted):
        dialled.send_many(frames)
        await alice.until(lambda: bool(alice.backlogs))
        assert dialled.backlog > DEFAULT_LIMITS.high_mark
        assert dialled._transport.get_write_buffer_size() < 600_000  # what waits does so in our queue
        assert bob.frames == []
        accepted.resume()
        await bob.until(lambda: len(bob.frames) == len(frames))
        assert bob.frames == frames
        await alice.until(lambda: len(alice.backlogs) == 2)
        assert alice.backlogs[0] > DEFAULT_LIMITS.high_mark
        assert alice.backlogs[1] <= DEFAULT_LIMITS.low_mark
        assert dialled.progress_at >= dialled.opened_at


async def test_a_backlog_that_grows_little_by_little_is_told_of() -> None:
    """The transport has been full for long when our queue becomes so; and what comes after is no news."""
    alice, bob = Owner(), Owner(on_ready=lambda channel: channel.pause())
    async with connected(alice, bob) as (dialled, accepted):
        count = 0
        while dialled.backlog <= 2 * DEFAULT_LIMITS.high_mark and count < 2000:
            dialled.send(bytes(20_000))
            count += 1
            await asyncio.sleep(0)
        assert dialled.backlog > 2 * DEFAULT_LIMITS.high_mark
        assert len(alice.backlogs) == 1
        assert DEFAULT_LIMITS.high_mark < alice.backlogs[0] < DEFAULT_LIMITS.high_mark + 100_000
        accepted.resume()
        await bob.until(lambda: len(bob.frames) == count)
        await alice.until(lambda: len(alice.backlogs) == 2)


async def test_reader_without_progress_is_dropped() -> None:
    """Bob reads nothing, but is not silent: his keepalives arrive."""
    alice, bob = Owner(), Owner(on_ready=lambda channel: channel.pause())
    quick = Limits(keepalive=0.05, silence=0.3, stall=0.4)
    async with connected(alice, bob, alice_limits=quick, bob_limits=quick) as (dialled, _):
        dialled.send_many([bytes(50_000)] * 600)
        assert await alice.closed() == "no progress for 0.4 s"
        assert alice.backlogs
        assert bob.reasons == []  # paused, it neither hears nor misses anything


async def test_no_keepalive_gets_into_the_middle_of_a_frame() -> None:
    """While a frame is half sealed nothing may come between its halves, however long the peer takes."""
    alice, bob = Owner(), Owner(on_ready=lambda channel: channel.pause())
    frames = [bytes([number]) * 3_000_000 for number in range(10)]
    async with connected(alice, bob, alice_limits=Limits(keepalive=0.02)) as (dialled, accepted):
        dialled.send_many(frames)
        await alice.until(lambda: bool(alice.backlogs))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await dialled.wait_closed()
        accepted.resume()
        await bob.until(lambda: len(bob.frames) == len(frames))
        assert bob.frames == frames


async def test_nothing_is_sealed_while_the_transport_is_full() -> None:
    """What is sealed can no longer be counted, or thrown away, by us."""
    a, b, to_bob, _ = memory_pair(Owner(), Owner())
    a.pause_writing()
    a.send(bytes(1_000))
    a._flush()
    assert not to_bob.written
    assert a.backlog == 1_004
    a.resume_writing()
    await asyncio.sleep(0)
    assert len(to_bob.written) == 1_004 + 18
    assert a.backlog == 0
    a.abort("done")
    b.abort("done")


async def test_progress_is_seen_as_bytes_leave() -> None:
    a, b, to_bob, _ = memory_pair(Owner(), Owner())
    a.send(bytes(1_000))
    to_bob.waiting = 1_018
    a._flush()
    held_up = a.progress_at
    assert a.progress_at == held_up
    to_bob.waiting = 1_017
    moved = a.progress_at
    assert moved > held_up
    assert a.progress_at == moved
    to_bob.waiting = 0
    assert a.progress_at > moved
    a.abort("done")
    b.abort("done")


async def test_too_slow_a_reader_is_dropped_at_once() -> None:
    alice, bob = Owner(), Owner(on_ready=lambda channel: channel.pause())
    async with connected(alice, bob, alice_limits=Limits(backlog=20_000_000)) as (dialled, _):
        dialled.send_many([bytes(50_000)] * 399)
        assert dialled.is_open
        dialled.send_many([bytes(50_000)] * 399)
        assert not dialled.is_open
        assert await alice.closed() == "too slow"


async def test_pause_and_resume() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, accepted):
        accepted.pause()
        accepted.pause()
        dialled.send(b"wait")
        accepted.send(b"go")  # answered only after Alice's frame has been written
        await alice.until(lambda: alice.frames == [b"go"])
        assert bob.frames == []
        accepted.resume()
        accepted.resume()
        await bob.until(lambda: bob.frames == [b"wait"])


async def test_silent_peer_is_found_and_keepalives_are_sent() -> None:
    owner = Owner()
    async with raw_peer(owner, Limits(keepalive=0.05, silence=0.3)) as (raw, channels):
        await raw.handshake()
        for _ in range(3):
            assert raw.session.open(await raw.message()) == KEEPALIVE
        assert owner.reasons == []
        assert await owner.closed() == "silent for 0.3 s"
        assert owner.frames == []
        assert channels[0].bytes_in > 0


async def test_keepalives_keep_alive() -> None:
    owner = Owner()
    loop = asyncio.get_running_loop()
    async with raw_peer(owner, Limits(keepalive=0.05, silence=0.2)) as (raw, channels):
        await raw.handshake()
        end = loop.time() + 0.6
        while loop.time() < end:
            assert raw.session.open(await raw.message()) == KEEPALIVE
            raw.send(b"")
        assert channels[0].is_open
        assert owner.frames == []


async def test_two_channels_keep_one_another_alive() -> None:
    alice, bob = Owner(), Owner()
    quick = Limits(keepalive=0.05, silence=0.2)
    async with connected(alice, bob, alice_limits=quick, bob_limits=quick) as (dialled, accepted):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await dialled.wait_closed()
        assert dialled.is_open
        assert accepted.is_open
        assert alice.frames == bob.frames == []


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\x20" + bytes(31)])
async def test_handshake_must_finish(sent: bytes) -> None:
    owner = Owner()
    async with raw_peer(owner, Limits(handshake=0.1)) as (raw, _):
        raw.writer.write(sent)
        assert await owner.closed() == "handshake not finished after 0.1 s"
        assert owner.ready == []


async def test_second_half_of_the_handshake_must_come_too() -> None:
    owner = Owner()
    async with raw_peer(owner, Limits(handshake=0.1)) as (raw, _):
        raw.writer.write(raw.session.start())
        await raw.message()
        assert await owner.closed() == "handshake not finished after 0.1 s"


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\xff\xff", "handshake message too long"),  # not waited for
        (b"GET / HTTP/1.1\r\n\r\n", "handshake message too long"),
        (b"\0\0", "handshake failed"),
        (b"\0\x1f" + bytes(31), "handshake failed"),
        (b"\0\x20" + bytes(32), "handshake failed"),
    ],
)
async def test_strangers_are_shown_out(sent: bytes, reason: str) -> None:
    owner = Owner()
    async with raw_peer(owner) as (raw, channels):
        raw.writer.write(sent)
        assert await owner.closed() == reason
        assert len(channels[0]._input) < 2_048


@pytest.mark.parametrize(("sent", "reason"), [(b"", "closed during the handshake"), (b"\0\x20abc", "connection lost")])
async def test_end_during_the_handshake(sent: bytes, reason: str) -> None:
    owner = Owner()
    async with raw_peer(owner) as (raw, _):
        raw.writer.write(sent)
        raw.writer.write_eof()
        assert await owner.closed() == reason


async def test_left_at_once_with_a_full_buffer() -> None:
    """What follows the handshake fills the small buffer of that time; the owner leaves before it is looked at."""
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    owner = Owner(on_ready=lambda channel: channel.close("unwanted"))
    async with raw_peer(owner) as (raw, _):
        raw.writer.write(raw.session.start())
        raw.writer.write(raw.session.read_handshake(await raw.message()) + b"".join(raw.seal(bytes(9)) for _ in range(1_000)))
        raw.writer.write_eof()
        assert await owner.closed() == "unwanted"
        assert owner.frames == []
        assert await raw.reader.read() == b""  # ended, not reset
        assert reported == []


async def test_frames_in_the_same_read_as_the_end_arrive() -> None:
    owner = Owner(on_frames=lambda channel, frames: channel.send(b"answer"))
    async with raw_peer(owner) as (raw, _):
        raw.writer.write(raw.session.start())
        last = raw.session.read_handshake(await raw.message())
        raw.writer.write(last + raw.seal(b"one", b"two") + raw.seal(b"three"))
        raw.writer.write_eof()
        assert await owner.closed() == "closed by the peer"
        assert owner.frames == [b"one", b"two", b"three"]
        answers: list[bytes] = []
        FrameReader().feed(raw.session.open(await raw.message()), answers)
        assert answers[0] == b"answer"  # our own writing is finished first


@pytest.mark.parametrize("where", ["length", "message", "frame"])
async def test_end_in_the_middle_is_a_lost_connection(where: str) -> None:
    owner = Owner()
    async with raw_peer(owner) as (raw, _):
        await raw.handshake()
        raw.send(b"whole")
        if where == "frame":
            raw.writer.write(raw.session.seal(b"\0\0\0\x09half"))
        else:
            raw.writer.write(raw.seal(b"partial")[: 1 if where == "length" else 12])
        raw.writer.write_eof()
        assert await owner.closed() == "connection lost"
        assert owner.frames == [b"whole"]


async def test_reset_is_a_lost_connection() -> None:
    owner = Owner()
    async with raw_peer(owner) as (raw, channels):
        await raw.handshake()
        await owner.until(lambda: bool(owner.ready))
        channels[0].send(b"unread")
        await raw.reader.readexactly(1)
        raw.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.writer.transport.abort()
        assert await owner.closed() == "connection lost"


async def test_whole_frames_before_a_broken_message_arrive() -> None:
    owner = Owner()
    async with raw_peer(owner) as (raw, _):
        await raw.handshake()
        raw.writer.write(raw.seal(b"good") + b"\0\x20" + bytes(32))
        assert await owner.closed() == "message not authentic"
        assert owner.frames == [b"good"]


async def test_frame_limit() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, accepted):
        assert accepted.frame_limit == MAX_FRAME
        accepted.frame_limit = MAX_FRAME + 1
        assert accepted.frame_limit == MAX_FRAME
        accepted.frame_limit = 1_000
        dialled.send_many([bytes(1_000), bytes(1_001)])
        assert await bob.closed() == "frame too long"
        assert bob.frames == [bytes(1_000)]


async def test_too_long_a_frame_is_not_waited_for() -> None:
    owner = Owner()
    async with raw_peer(owner) as (raw, _):
        await raw.handshake()
        raw.writer.write(raw.session.seal((MAX_FRAME + 1).to_bytes(4, "big")))
        assert await owner.closed() == "frame too long"


async def test_used_up_nonces_end_the_channel() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob) as (dialled, _):
        dialled._session._send_nonce = 2**64 - 1
        dialled.send(b"x")
        assert await alice.closed() == "the nonces of this session are used up"


async def test_used_up_nonces_end_an_idle_channel_too() -> None:
    alice, bob = Owner(), Owner()
    async with connected(alice, bob, alice_limits=Limits(keepalive=0.05)) as (dialled, _):
        dialled._session._send_nonce = 2**64 - 1
        assert await alice.closed() == "the nonces of this session are used up"


async def test_failed_dial_leaves_nothing() -> None:
    owner = Owner()
    async with nothing_left():
        server = await asyncio.get_running_loop().create_server(lambda: Channel(owner, False, BOB), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        with pytest.raises(OSError):
            await asyncio.get_running_loop().create_connection(lambda: Channel(owner, True, ALICE), "127.0.0.1", port)
        assert owner.reasons == []


async def test_log_tells_the_life_of_a_channel_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "solyd_swarm.net.channel"):
        alice, bob = Owner(), Owner()
        async with connected(alice, bob) as (dialled, _):
            dialled.close("good night")
            await alice.closed()
            await bob.closed()
    for word in ("dialled", "accepted", "is open", "good night", "closed by the peer"):
        assert word in caplog.text
    assert ALICE.hex() not in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (("192.0.2.1", 80), ("192.0.2.1", 80)),
        (("::ffff:192.0.2.1", 80, 0, 0), ("192.0.2.1", 80)),
        (("2001:db8::1", 80, 0, 0), ("2001:db8::1", 80)),
        (("fe80::1%eth0", 80, 0, 2), ("fe80::1%eth0", 80)),
        (("fe80::1", 80, 0, 2), ("fe80::1%2", 80)),
        (None, ("", 0)),
        ("", ("", 0)),
    ],
)
def test_addresses(name: object, expected: tuple[str, int]) -> None:
    assert read_address(name) == expected


class Memory(asyncio.Transport):
    """A transport that keeps what is written, until a test passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False
        self.waiting = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    close = write_eof = abort


def feed(channel: Channel, data: bytes, cuts: list[int] | None = None) -> None:
    """Hand bytes over as a transport would, in reads no longer than ``cuts`` say, in turns; then one of 64 KiB, to get on."""
    cuts = cuts and [*cuts, 65_536]
    turn = 0
    while data and channel._state.name != "CLOSED":
        buffer = channel.get_buffer(-1)
        size = min(len(buffer), len(data), cuts[turn % len(cuts)] if cuts else len(data))
        turn += 1
        assert size > 0
        buffer[:size] = data[:size]
        channel.buffer_updated(size)
        data = data[size:]


def memory_pair(alice: Owner, bob: Owner, cuts: list[int] | None = None) -> tuple[Channel, Channel, Memory, Memory]:
    a, b, to_bob, to_alice = Channel(alice, True, ALICE), Channel(bob, False, BOB), Memory(), Memory()
    a.connection_made(to_bob)
    b.connection_made(to_alice)
    while to_bob.written or to_alice.written:
        for transport, channel in ((to_bob, b), (to_alice, a)):
            data = bytes(transport.written)
            transport.written.clear()
            feed(channel, data, cuts)
    return a, b, to_bob, to_alice


SIZES = st.one_of(st.integers(1, 40), st.integers(MAX_PLAINTEXT - 6, MAX_PLAINTEXT + 6), st.integers(1, 200 * 1024))


@settings(deadline=None, max_examples=50)
@given(st.lists(SIZES, max_size=10), st.lists(st.integers(1, 300_000), min_size=1, max_size=6), st.integers(0, 10))
def test_any_frames_over_any_reads(sizes: list[int], cuts: list[int], turns: int) -> None:
    """Frames of many sizes, flushed in groups, in reads cut anywhere: equal and in order."""

    async def run() -> None:
        alice, bob = Owner(), Owner()
        a, b, to_bob, _ = memory_pair(alice, bob, cuts)
        frames = [bytes([index]) * size for index, size in enumerate(sizes)]
        a.send_many(frames[:turns])
        a._flush()
        while a.backlog:
            a._flush()
        for frame in frames[turns:]:
            a.send(frame)
        while a.backlog:
            a._flush()
        feed(b, bytes(to_bob.written), cuts)
        assert bob.frames == frames
        assert not bob.reasons
        a.abort("done")
        b.abort("done")

    asyncio.run(run())


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=400), st.lists(st.integers(1, 50), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_garbage_never_raises_out_of_a_channel(garbage: bytes, cuts: list[int], role: bool, after: bool) -> None:
    async def run() -> None:
        alice, bob = Owner(), Owner()
        if after:
            channel, *others = memory_pair(alice, bob)[:2]
        else:
            channel, others = Channel(alice, role, ALICE), []
            channel.connection_made(Memory())
        feed(channel, garbage, cuts)
        assert alice.frames == []
        for one in (channel, *others):
            one.abort("done")

    asyncio.run(run())


async def test_every_corrupted_byte_of_a_transport_message_closes() -> None:
    """Its length included: a longer one leaves the channel waiting for the rest, which is then wrong."""
    length = 2 + 4 + 5 + 16
    for position in range(length):
        alice, bob = Owner(), Owner()
        a, b, to_bob, to_alice = memory_pair(alice, bob)
        a.send(b"frame")
        a._flush()
        assert len(to_bob.written) == length
        to_bob.written[position] ^= 1
        feed(b, bytes(to_bob.written) + bytes(300))
        assert to_alice.closing
        b.connection_lost(None)
        assert bob.reasons == ["message not authentic"]
        assert bob.frames == []
        a.abort("done")
