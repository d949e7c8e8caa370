"""Dials and their ends: many addresses, dead ones among them, and an endpoint that closes at any moment."""

import asyncio
import contextlib
import secrets
import socket
import time
from dataclasses import replace

import pytest
from endpoints import HALL, PATIENT, QUICK, ROOM, Host, black_hole, hosts, proxy, until

from solyd_swarm.core.events import DialFailed
from solyd_swarm.net import dialler
from solyd_swarm.net.dialler import MAX_DIALS, interleave
from solyd_swarm.net.sockaddr import socket_address


@pytest.fixture
def hole():
    """Where connecting hangs."""
    listener, fill = black_hole()
    yield (listener.getsockname(),)
    for each in (listener, *fill):
        each.close()


@pytest.fixture
def refused():
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield (bound.getsockname(),)


@pytest.fixture
async def mute():
    """Accepts and says nothing."""
    open_ones = []
    server = await asyncio.start_server(lambda reader, writer: open_ones.append(writer), "127.0.0.1", 0)
    yield (server.sockets[0].getsockname(),)
    server.close()
    for writer in open_ones:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


NONSENSE = (
    ("not an address", 1),
    ("", 1),
    ("fe80::1%no-such-interface", 1),
    ("fe80::1%99999999999999999999999", 1),
    ("fe80::1%\ud800", 1),
    ("fe80::1%lo\0", 1),
    ("1.2.3.4.5", 1),
)


def is_empty(host: Host) -> bool:
    return not (host.endpoint._strangers or host.endpoint._connections or host.endpoint._others)


async def test_dead_addresses_cost_nothing(hole, refused, mute):
    async with hosts(Host(), Host()) as (one, other):
        a = one.join()
        other.join()
        begun = time.monotonic()
        one.dial((*NONSENSE, *hole, *refused, *mute, *other.at))
        await until(lambda: a.ups)
        assert time.monotonic() - begun < 2
        await until(lambda: not one.endpoint._dialler._tasks)
        assert not a.failures
        await until(lambda: not one.endpoint._strangers)


async def test_addresses_come_one_after_another_until_one_answers(hole, refused, monkeypatch):
    """RFC 8305: the next begins when one fails, or after a while; what is left when one has answered is not dialled."""
    dialled = []
    attempt = dialler.Dialler._attempt

    def watch(self, goals, host, port):
        dialled.append((host, port))
        return attempt(self, goals, host, port)

    monkeypatch.setattr(dialler.Dialler, "_attempt", watch)
    monkeypatch.setattr(dialler, "ATTEMPT_DELAY", 3600.0)
    async with hosts(Host(), Host()) as (one, other):
        a = one.join()
        other.join()
        one.dial((*refused, *other.at, *hole))
        await until(lambda: a.ups)
        assert dialled == [*refused, *other.at]


async def test_an_address_that_hangs_holds_nothing_up(hole, monkeypatch):
    monkeypatch.setattr(dialler, "ATTEMPT_DELAY", 0.01)
    async with hosts(Host(replace(PATIENT, connect=3600.0)), Host()) as (one, other):
        a = one.join()
        other.join()
        one.dial((*hole * 5, *other.at))
        await until(lambda: a.ups)
        await until(lambda: not one.endpoint._dialler._tasks)


def test_families_take_turns():
    four = [("192.0.2.1", 1), ("192.0.2.2", 2), ("192.0.2.3", 3)]
    six = [("2001:db8::1", 1), ("fe80::1%lo", 2)]
    assert interleave((*four, *six)) == [four[0], six[0], four[1], six[1], four[2]]
    assert interleave((*six, *four)) == [six[0], four[0], six[1], four[1], four[2]]
    assert interleave(tuple(four)) == four
    assert interleave(()) == []


async def test_nobody_answers_anywhere(hole, refused, mute):
    async with hosts(Host(replace(QUICK, connect=0.3))) as (one,):
        a, wanted = one.join(), secrets.token_bytes(32)
        addresses = (*NONSENSE, *hole, *refused, *mute)
        one.dial(addresses, wanted)
        one.dial(addresses, wanted)
        one.dial((), wanted)
        await until(lambda: len(a.failures) == 2)
        assert a.failures == [DialFailed(wanted, ()), DialFailed(wanted, addresses)]
        await until(lambda: is_empty(one) and not one.endpoint._dialler._tasks)


async def test_dials_are_bounded(hole):
    async with hosts(Host()) as (one,):
        a = one.join()
        for number in range(MAX_DIALS + 10):
            one.dial(hole, number.to_bytes(32, "big"))
        await until(lambda: len(a.failures) == 10)
        assert len(one.endpoint._dialler._tasks) == MAX_DIALS


async def test_attempts_are_bounded_and_all_get_their_turn(hole, monkeypatch):
    monkeypatch.setattr(dialler, "MAX_ATTEMPTS", 3)
    async with hosts(Host(replace(PATIENT, connect=0.2)), Host()) as (one, other):
        a = one.join()
        other.join()
        one.dial((*hole * 6, *other.at))
        await until(lambda: a.ups)


async def test_both_families_and_zones():
    assert socket_address("192.0.2.1", 5) == (socket.AF_INET, ("192.0.2.1", 5))
    assert socket_address("2001:db8::1", 5) == (socket.AF_INET6, ("2001:db8::1", 5, 0, 0))
    assert socket_address("fe80::1%7", 5) == (socket.AF_INET6, ("fe80::1", 5, 0, 7))
    index = socket.if_nametoindex("lo")
    assert socket_address("fe80::1%lo", 5) == (socket.AF_INET6, ("fe80::1", 5, 0, index))


# Closing, at any moment.


async def test_closing_drains_what_was_sent():
    async with hosts(Host(), Host()) as (one, other):
        a, b = one.join(), other.join()
        one.dial(other.at)
        await until(lambda: a.ups and b.ups)
        for _ in range(50):
            one.send(other, bytes(10_000))
        begun = time.monotonic()
        await one.endpoint.close()
        assert time.monotonic() - begun < 1
        await until(lambda: b.downs)
        assert len(b.frames) == 50
        assert is_empty(one)


async def test_closing_while_dials_hang_and_handshakes_are_pending(hole, mute, refused):
    async with hosts(Host(), Host()) as (one, other):
        one.join()
        one.dial(hole)
        one.dial(mute)
        one.dial((*hole, *mute, *refused))
        half = await asyncio.open_connection(*one.at[0])
        await until(lambda: len(one.endpoint._strangers) >= 2)
        begun = time.monotonic()
        await asyncio.gather(one.endpoint.close(), one.endpoint.close())
        await one.endpoint.close()
        assert time.monotonic() - begun < 1
        one.dial(other.at)
        assert not one.endpoint._dialler._tasks
        half[1].transport.abort()


@pytest.mark.parametrize("turns", range(0, 24, 2))
async def test_closing_after_so_many_turns_of_the_loop(turns):
    """While dialling, accepting, shaking hands, matching; by either side or both."""
    for who in ("one", "other", "both"):
        async with hosts(Host(), Host()) as (one, other):
            for host in (one, other):
                host.join()
                host.join(HALL)
            one.dial(other.at)
            other.dial(one.at, topic_key=HALL)
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.gather(*(host.endpoint.close() for name, host in (("one", one), ("other", other)) if who in (name, "both")))


@pytest.mark.parametrize("turns", range(4))
async def test_closing_while_starting(turns):
    host = Host()
    descriptors = [each.fileno() for each in host.sockets]
    starting = asyncio.ensure_future(host.endpoint.start(host.sockets))
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await host.endpoint.close()
    for each in host.sockets:
        each.close()
    loop = asyncio.get_running_loop()
    assert not any(key.fd in descriptors for key in loop._selector.get_map().values())
    again = Host()  # gets the same descriptor, as likely as not
    async with hosts(again, Host()) as (one, other):
        a = one.join()
        other.join()
        one.dial(other.at)
        await until(lambda: a.ups)


async def test_closing_without_having_started():
    host = Host()
    await host.endpoint.close()
    for each in host.sockets:
        each.close()


async def test_who_comes_while_we_close_is_turned_away():
    async with hosts(Host(), Host()) as (one, other):
        one.join()
        b = other.join()
        for _ in range(20):
            other.dial(one.at, secrets.token_bytes(32))
        await until(lambda: one.endpoint._strangers)
        await one.endpoint.close()
        assert is_empty(one)
        one.endpoint._make_accepted()  # as the server's task may do that has the connection already
        assert is_empty(one)
        await until(lambda: b.failures)


async def test_a_dead_peer_is_noticed_and_reported():
    limits = replace(PATIENT, channel=replace(PATIENT.channel, keepalive=0.1, silence=0.4))
    async with hosts(Host(limits), Host(limits)) as (one, other), proxy(other.port) as between:
        a, b = one.join(), other.join()
        one.dial(between.at)
        await until(lambda: a.ups and b.ups)
        between.frozen = True
        await until(lambda: a.downs and b.downs)
        assert "silent" in a.downs[0].reason
        assert ROOM in one.endpoint._drivers
