"""Ports of home routers: real ones in namespaces, and false ones that answer anything."""

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hosts import Lab, require
from hypothesis import given
from hypothesis import strategies as st
from processes import Process
from routers import OUTSIDE, Home, home

from solyd_swarm.discovery import portmap, portmap_http, portmap_natpmp, portmap_pcp, portmap_upnp
from solyd_swarm.discovery.command import output_of
from solyd_swarm.discovery.gateway import Gateway, find_gateway, gateway_at, parse_linux_routes, parse_route_command
from solyd_swarm.discovery.portmap import PortMapper
from solyd_swarm.discovery.portmap_client import Refusals, RouterClock, RouterError
from solyd_swarm.discovery.portmap_http import Url, exchange, parse_xml, router_url
from solyd_swarm.discovery.portmap_natpmp import NatPmp
from solyd_swarm.discovery.portmap_pcp import Pcp
from solyd_swarm.discovery.portmap_upnp import Upnp
from solyd_swarm.discovery.source import Address
from solyd_swarm.errors import RemoteProtocolError

PATIENCE = 10.0
LOCAL = "127.0.0.1"
PUBLIC = "11.0.0.1"

INSIDE = """
import asyncio, logging, sys
from solyd_swarm.discovery import portmap

class Lines(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)

log = logging.getLogger("solyd_swarm.discovery.portmap")
log.addHandler(Lines())
log.setLevel(logging.DEBUG)
portmap.SHORTEST_RENEWAL = 0.5
portmap.FIRST_RETRY = 0.5

async def greet(reader, writer):
    writer.write(b"hello from inside")
    writer.close()

async def main(port=0, **options):
    server = await asyncio.start_server(greet, "0.0.0.0", port)
    port = server.sockets[0].getsockname()[1]
    mapper = portmap.PortMapper(port, changed=lambda address: print("changed:", address, flush=True), **options)
    await mapper.start()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        if line == b"state\\n":
            print("state:", mapper.state, mapper.external, flush=True)
        else:
            break
    began = asyncio.get_running_loop().time()
    await mapper.close()
    print(f"closed after {asyncio.get_running_loop().time() - began:.2f}", flush=True)
    server.close()
    await server.wait_closed()
"""


@pytest.fixture
def a_home(tmp_path: Path) -> Iterator[Home]:
    require("nft", "miniupnpd")
    with home(tmp_path) as made:
        yield made


def inside(where: Home, options: str = "") -> Process:
    return where.inner.script(f"{INSIDE}\nasyncio.run(main({options}))")


def greeting(where: Home, port: int, host: str = OUTSIDE) -> str:
    """What the stranger outside hears."""
    program = f"""
        import socket
        try:
            with socket.create_connection(({host!r}, {port}), timeout=1) as there:
                print(there.recv(100).decode())
        except OSError as error:
            print("nothing")
        """
    with where.stranger.script(program) as process:
        return process.expect(".+")[0]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("protocol", ["PCP", "NAT-PMP", "UPnP-IGD"])
def test_a_real_router_maps_renews_and_forgets_at_the_end(a_home: Home, protocol: str) -> None:
    a_home.only(protocol)
    with a_home.daemon(), inside(a_home, "lifetime=3") as process:
        port = int(process.expect(r"changed: 11\.0\.0\.1:(\d+)")[1])
        assert greeting(a_home, port) == "hello from inside"
        assert len(a_home.mappings()) == 1
        for _ in range(3):  # at half of the lifetime, so that the first one would be over
            process.expect(f"{protocol} maps tcp .* for 3 s")
        assert greeting(a_home, port) == "hello from inside"
        process.say("state")
        process.expect(rf"state: mapped 11\.0\.0\.1:{port} by {protocol} for 3 s 11\.0\.0\.1:{port}")
        process.say("leave")
        assert float(process.expect(r"closed after ([\d.]+)")[1]) < 0.5
        assert process.end() == (0, "")
        assert greeting(a_home, port) == "nothing"
        assert a_home.mappings() == []


def test_of_all_that_answer_one_maps(a_home: Home) -> None:
    with a_home.daemon(), inside(a_home) as process:
        port = int(process.expect(r"changed: 11\.0\.0\.1:(\d+)")[1])
        process.say("state")
        process.expect(r"state: mapped .* by (PCP|NAT-PMP|UPnP-IGD) for 2 h .*")
        assert len(a_home.mappings()) == 1
        process.say("leave")
        process.expect("closed .*")
        assert a_home.mappings() == []
        assert greeting(a_home, port) == "nothing"


@pytest.mark.parametrize("protocol", ["PCP", "NAT-PMP", "UPnP-IGD"])
def test_a_router_that_restarts_is_asked_again(a_home: Home, protocol: str) -> None:
    a_home.only(protocol)
    with inside(a_home, "check_every=0.3") as process:
        with a_home.daemon():
            port = int(process.expect(r"changed: 11\.0\.0\.1:(\d+)")[1])
            time.sleep(4.5)  # its clock counts seconds and two are allowed for: it must have run some before it starts anew
        a_home.forget()
        assert greeting(a_home, port) == "nothing"
        with a_home.daemon():
            until(a_home.mappings)
            assert greeting(a_home, port) == "hello from inside"
            process.say("leave")
            process.expect("closed .*")
            assert a_home.mappings() == []


@pytest.mark.parametrize("protocol", ["PCP", "NAT-PMP", "UPnP-IGD"])
def test_two_hosts_with_one_port_get_two(a_home: Home, protocol: str) -> None:
    a_home.only(protocol)
    second = a_home.inner.lab.host()
    second.plug(a_home.lan, "192.168.1.3/24", gateway="192.168.1.1")
    with a_home.daemon(), inside(a_home, "port=5000") as one, second.script(f"{INSIDE}\nasyncio.run(main(port=5000))") as two:
        ports = {process.expect(r"changed: 11\.0\.0\.1:(\d+)")[1] for process in (one, two)}
        assert len(ports) == 2
        assert all(greeting(a_home, int(port)) == "hello from inside" for port in ports)
        for process in (one, two):
            process.say("leave")
            process.expect("closed .*")
        assert a_home.mappings() == []


def test_after_a_crash_the_port_is_had_again(a_home: Home) -> None:
    with a_home.daemon():
        with inside(a_home, "port=5000") as process:
            process.expect(r"changed: 11\.0\.0\.1:\d+")
            process.process.kill()
            process.end()
        with inside(a_home, "port=5000") as process:  # PCP refuses whoever does not know the nonce of the mapping that is left
            port = int(process.expect(r"changed: 11\.0\.0\.1:(\d+)")[1])
            assert greeting(a_home, port) == "hello from inside"


def test_another_address_of_ours_is_mapped_anew(a_home: Home) -> None:
    with a_home.daemon(), inside(a_home, "poll_every=0.1") as process:
        port = int(process.expect(r"changed: 11\.0\.0\.1:(\d+)")[1])
        interface = a_home.inner.interfaces[0]
        interface.remove("192.168.1.2/24").add("192.168.1.9/24")
        process.expect("changed: None")
        a_home.inner.route("default", "192.168.1.1")
        process.expect(rf"changed: 11\.0\.0\.1:{port}|changed: .*")
        assert any("192.168.1.9" in line for line in a_home.mappings())


def test_a_router_that_is_inside_itself_maps_nothing(tmp_path: Path) -> None:
    require("nft", "miniupnpd")
    with home(tmp_path, "10.7.7.7") as where, where.daemon(), inside(where) as process:
        process.expect("port mapping: the router at 192.168.1.1 maps no port for us .*")
        process.say("state")
        process.expect("state: the router at 192.168.1.1 maps no port for us .* None")
        assert where.mappings() == []


def test_without_a_router_nothing_is_sent(tmp_path: Path) -> None:
    require()
    with Lab() as lab:
        (host,) = lab.lan(1)
        with host.capture() as frames, host.script(f"{INSIDE}\nasyncio.run(main())") as process:
            process.expect("port mapping: no router: there is no IPv4 default gateway .*")
            process.say("leave")
            process.expect("closed .*")
        assert not [frame for _, frame in frames if frame[12:14] == b"\x08\x00"]


# What follows needs no namespaces: routers of our own on loopback.


class Port(asyncio.DatagramProtocol):
    """A UDP port that answers as it is told."""

    def __init__(self, answer: Callable[[bytes], list[bytes]]) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.transport: asyncio.DatagramTransport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> "Port":
        self.transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, local_addr=(LOCAL, 0))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.transport is not None
        self.transport.abort()
        await self.closed

    @property
    def number(self) -> int:
        assert self.transport is not None
        return self.transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple) -> None:
        assert self.transport is not None
        self.asked.append(data)
        for reply in self.answer(data):
            self.transport.sendto(reply, addr)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)


class Router:
    """Answers PCP and NAT-PMP rightly, unless told otherwise."""

    def __init__(self, *, external: str = PUBLIC, lifetime: int = 7200) -> None:
        self.external = external
        self.lifetime = lifetime
        self.epoch = 1000
        self.mapped: set[int] = set()
        self.speaks = {0, 2}
        self.result = 0
        self.before: list[bytes] = []
        self.silent = False

    def __call__(self, data: bytes) -> list[bytes]:
        if self.silent or data[0] not in self.speaks:
            return []
        return [*self.before, self.pcp(data) if data[0] == 2 else self.natpmp(data)]

    def note(self, port: int, lifetime: int) -> None:
        (self.mapped.add if lifetime and not self.result else self.mapped.discard)(port)

    def pcp(self, data: bytes) -> bytes:
        opcode = data[1]
        wanted = int.from_bytes(data[4:8])
        lifetime = min(wanted, self.lifetime) if opcode else 0
        head = bytes([2, opcode | 0x80, 0, self.result if opcode else 0]) + lifetime.to_bytes(4) + self.epoch.to_bytes(4) + bytes(12)
        if not opcode:
            return head
        self.note(int.from_bytes(data[40:42]), wanted)
        return head + data[24:42] + data[42:44] + portmap_pcp.mapped(self.external)

    def natpmp(self, data: bytes) -> bytes:
        head = bytes([0, data[1] | 128]) + (self.result if data[1] else 0).to_bytes(2) + self.epoch.to_bytes(4)
        if not data[1]:
            return head + portmap_pcp.mapped(self.external)[12:]
        wanted = int.from_bytes(data[8:12])
        self.note(int.from_bytes(data[4:6]), wanted)
        return head + data[4:6] + data[4:6] + min(wanted, self.lifetime).to_bytes(4)


class Observer:
    """Collects what a mapper tells."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Address | None] = asyncio.Queue()

    async def next(self) -> Address | None:
        async with asyncio.timeout(PATIENCE):
            return await self.told.get()


@contextlib.asynccontextmanager
async def mapping(gateway: Gateway | str, **options: object) -> AsyncIterator[tuple[PortMapper, Observer]]:
    observer = Observer()
    mapper = PortMapper(5000, changed=observer.told.put_nowait, gateway=gateway, **options)  # type: ignore[arg-type]
    await mapper.start()
    try:
        yield mapper, observer
    finally:
        await mapper.close()


async def reached(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap_natpmp, "WAITS", (0.1, 0.1, 0.1))
    monkeypatch.setattr(portmap_pcp, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(portmap_upnp, "SEARCH_WAITS", (0.1, 0.1))
    monkeypatch.setattr(portmap, "SHORTEST_PAUSE", 0.01)


def at(port: Port, **options: object) -> Gateway:
    return Gateway(LOCAL, LOCAL, port.number, ((LOCAL, port.number),), **options)  # type: ignore[arg-type]


ONE = pytest.mark.parametrize("protocol", [Pcp, NatPmp])


@ONE
async def test_both_ports_are_mapped_and_withdrawn(protocol: type) -> None:
    router = Router()
    async with Port(router) as port:
        async with mapping(at(port), protocols=[protocol], udp_port=5001) as (mapper, observer):
            assert await observer.next() == Address(PUBLIC, 5000)
            assert mapper.external == Address(PUBLIC, 5000)
            assert mapper.external_udp == Address(PUBLIC, 5001)
            assert mapper.state == f"mapped {PUBLIC}:5000 by {protocol.name} for 2 h"
            assert router.mapped == {5000, 5001}
        assert router.mapped == set()
        assert mapper.state == "ended"
        assert mapper.external is None
        assert observer.told.empty()


@ONE
async def test_garbage_is_refused_counted_and_logged_and_the_right_answer_still_taken(
    protocol: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    router = Router()
    router.before = [b"", b"\0", bytes(1101), bytes(1099), bytes([2, 0x85]) + bytes(22), bytes([0, 133]) + bytes(14), b"\x07" * 40] * 5
    async with Port(router) as port, mapping(at(port), protocols=[protocol]) as (mapper, observer):
        assert await observer.next() == Address(PUBLIC, 5000)
        assert mapper.refused.total() >= 10
        assert mapper.refused[f"{protocol.name}: too long"] >= 5
        assert all(reason.startswith(f"{protocol.name}: ") for reason in mapper.refused)
        assert "refused by" in caplog.text


async def test_another_nonce_or_port_is_not_taken() -> None:
    router = Router()

    def forge(data: bytes) -> list[bytes]:
        if data[:2] != b"\x02\x01":
            return router(data)
        other_nonce, other_port = bytearray(router.pcp(data)), bytearray(router.pcp(data))
        other_nonce[24] ^= 1
        other_port[41] ^= 1
        return [bytes(other_nonce), bytes(other_port)]

    async with Port(forge) as port, mapping(at(port), protocols=[Pcp]) as (mapper, observer):
        await reached(lambda: "maps no port" in mapper.state)
        assert mapper.refused["PCP: with another nonce, or about another port"] >= 2
        assert observer.told.empty()


async def test_natpmp_about_another_port_is_not_taken() -> None:
    router = Router()

    def forge(data: bytes) -> list[bytes]:
        right = router.natpmp(data)
        return [right[:8] + bytes([0x13, 0x89, 0x13, 0x89]) + right[12:], right] if data[1] else [right]

    async with Port(forge) as port, mapping(at(port), protocols=[NatPmp]) as (mapper, observer):
        assert await observer.next() == Address(PUBLIC, 5000)
        assert mapper.refused["NAT-PMP: about another port"] == 1


@pytest.mark.parametrize(
    ("read", "data", "words"),
    [
        (lambda data: portmap_pcp.read_reply(data, 1), bytes([2, 0x80]) + bytes(22), "another request"),
        (lambda data: portmap_pcp.read_reply(data, 1), bytes([2, 1]) + bytes(22), "another request"),
        (lambda data: portmap_pcp.read_reply(data, 1), bytes([2, 0x81]) + bytes(23), "wrong length"),
        (lambda data: portmap_pcp.read_reply(data, 1), bytes([2, 0x81]) + bytes(1102), "wrong length"),
        (lambda data: portmap_pcp.read_reply(data, 1, b"nonce"), bytes([2, 0x81]) + bytes(22), "another nonce"),
        (lambda data: portmap_natpmp.read_reply(data, 2, 8), bytes([0, 130]) + bytes(13), "wrong length"),
        (lambda data: portmap_natpmp.read_reply(data, 2, 8), bytes([0, 130]) + bytes(15), "wrong length"),
        (lambda data: portmap_natpmp.read_reply(data, 2, 8), bytes([0, 129]) + bytes(14), "another request"),
        (lambda data: portmap_natpmp.read_reply(data, 2, 8), bytes([0, 2]) + bytes(10), "another request"),
    ],
)
def test_what_is_no_answer(read: Callable[[bytes], object], data: bytes, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        read(data)


@ONE
async def test_answers_of_somebody_else_are_not_taken(protocol: type) -> None:
    router = Router()
    async with Port(lambda _: []) as stranger:
        targets: list[tuple] = []

        class Silent(Port):
            def datagram_received(self, data: bytes, addr: tuple) -> None:
                targets.append(addr)
                assert stranger.transport is not None
                for reply in router(data):
                    stranger.transport.sendto(reply, addr)

        async with Silent(lambda _: []) as port, mapping(at(port), protocols=[protocol]) as (mapper, observer):
            await reached(lambda: mapper.state == f"no router answered ({protocol.name} was tried)")
            assert mapper.refused[f"{protocol.name}: a datagram of somebody else"] == len(targets)
            assert observer.told.empty()


async def test_a_flood_is_dropped_at_once_and_logged_seldom(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="solyd_swarm")
    router = Router()
    async with Port(router) as port, mapping(at(port), protocols=[NatPmp]) as (mapper, observer):
        await observer.next()
        router.before = [bytes(8)] * 200
        mapper.network_changed()
        await reached(lambda: mapper.refused.total() >= 100)
        assert len([record for record in caplog.records if "refused by" in record.message]) < 30


async def test_nobody_answers() -> None:
    async with Port(lambda _: []) as port, mapping(at(port)) as (mapper, observer):
        await reached(lambda: mapper.state == "no router answered (UPnP-IGD, NAT-PMP and PCP were tried)")
        assert observer.told.empty()
        assert {data[0] for data in port.asked} == {0, 2, ord("M")}


@pytest.mark.parametrize(
    ("protocol", "result", "words"), [(Pcp, 2, "not authorised"), (NatPmp, 3, "no public address"), (Pcp, 99, "code 99")]
)
async def test_a_refusal_is_told_in_words(protocol: type, result: int, words: str) -> None:
    router = Router()
    router.result = result
    async with Port(router) as port, mapping(at(port), protocols=[protocol]) as (mapper, _):
        await reached(lambda: words in mapper.state)


async def test_what_one_protocol_refuses_another_may_grant() -> None:
    router = Router()
    answers = {0: router, 2: Router()}
    answers[2].result = 2
    async with Port(lambda data: answers[data[0]](data) if data[0] in answers else []) as port, mapping(at(port)) as (mapper, observer):
        assert await observer.next() == Address(PUBLIC, 5000)
        assert "by NAT-PMP" in mapper.state


@ONE
@pytest.mark.parametrize("outer", ["100.64.0.7", "192.168.0.5", "0.0.0.0"])
async def test_a_private_outer_address_is_told_and_not_reported(protocol: type, outer: str) -> None:
    router = Router(external=outer)
    async with Port(router) as port, mapping(at(port), protocols=[protocol]) as (mapper, observer):
        await reached(lambda: "maps no port" in mapper.state)
        assert outer == "0.0.0.0" or f"{outer} is itself a private one" in mapper.state
        assert observer.told.empty()
        assert router.mapped == set()


async def test_the_policy_of_what_is_public_can_be_another() -> None:
    async with Port(Router(external="198.51.100.7")) as port:
        policy = {"is_public": lambda ip: ip.startswith("198.51.100.")}
        async with mapping(at(port), protocols=[Pcp], **policy) as (_, observer):
            assert await observer.next() == Address("198.51.100.7", 5000)


async def test_a_public_address_needs_no_mapping() -> None:
    async with Port(Router()) as port:
        gateway = Gateway(LOCAL, "11.0.0.9", port.number)
        async with mapping(gateway) as (mapper, _):
            await reached(lambda: mapper.state == "not needed: our own address 11.0.0.9 is a public one")
        assert port.asked == []


@ONE
async def test_a_router_that_lost_its_mappings_is_asked_again(protocol: type) -> None:
    router = Router()
    async with Port(router) as port, mapping(at(port), protocols=[protocol], check_every=0.05) as (_, observer):
        await observer.next()
        router.epoch, router.external = 0, "11.0.0.5"
        router.mapped.clear()
        assert await observer.next() == Address("11.0.0.5", 5000)
        assert router.mapped == {5000}


@ONE
async def test_short_lifetimes_do_not_make_us_send_without_pause(protocol: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap, "SHORTEST_RENEWAL", 1.0)
    router = Router(lifetime=1)
    async with Port(router) as port, mapping(at(port), protocols=[protocol]) as (_, observer):
        began = time.monotonic()
        await observer.next()
        opcode = {Pcp: b"\x02\x01", NatPmp: b"\x00\x02"}[protocol]
        await reached(lambda: len([data for data in port.asked if data.startswith(opcode)]) >= 3)
        assert time.monotonic() - began > 1.9  # and not two halves of a second


@ONE
async def test_a_router_that_falls_silent_is_given_up(protocol: type) -> None:
    router = Router()
    async with Port(router) as port, mapping(at(port), protocols=[protocol], check_every=0.02) as (mapper, observer):
        assert await observer.next()
        router.silent = True
        assert await observer.next() is None
        assert "answers no more" in mapper.state


@ONE
async def test_closing_does_not_wait_for_a_silent_router(protocol: type) -> None:
    router = Router()
    async with Port(router) as port, mapping(at(port), protocols=[protocol], udp_port=5001) as (mapper, observer):
        await observer.next()
        router.silent = True
        began = time.monotonic()
        await mapper.close()
        assert time.monotonic() - began < 0.6
        await mapper.close()


@ONE
async def test_what_was_asked_for_and_not_confirmed_is_withdrawn(protocol: type) -> None:
    router = Router()

    def deaf(data: bytes) -> list[bytes]:
        opcode = {Pcp: b"\x02\x01", NatPmp: b"\x00\x02"}[protocol]
        answers = router(data)
        return [] if data.startswith(opcode) and router.mapped else answers

    async with Port(deaf) as port, mapping(at(port), protocols=[protocol]) as (mapper, _):
        await reached(lambda: router.mapped)
        await mapper.close()
        assert router.mapped == set()


async def test_asked_to_look_again_it_looks_whether_the_router_still_knows() -> None:
    router = Router()
    async with Port(router) as port, mapping(at(port), protocols=[NatPmp]) as (mapper, observer):
        await observer.next()
        router.external = "11.0.0.6"
        for _ in range(50):
            mapper.network_changed()
        assert await observer.next() == Address("11.0.0.6", 5000)


def test_the_routers_clock() -> None:
    clock = RouterClock()
    assert not clock.lost(100, 50.0)
    assert not clock.lost(110, 60.0)
    assert not clock.lost(109, 60.5)  # a datagram overtaken by another
    assert not clock.lost(1109, 1060.0)  # its clock is a little fast
    assert clock.lost(5, 1061.0)
    assert clock.lost(500, 1062.0)
    assert clock.lost(501, 2000.0)


@pytest.mark.parametrize(
    "read", [lambda data: portmap_pcp.read_reply(data, 1, b"nonce"), lambda data: portmap_natpmp.read_reply(data, 2, 8), parse_xml]
)
@given(data=st.builds(bytes.__add__, st.sampled_from([b"", b"\x02\x81\0\0", b"\0\x82\0\0", b"<a>"]), st.binary(max_size=70)))
def test_bytes_of_a_router_raise_nothing_else(read: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError, RouterError):
        read(data)


@given(st.text(max_size=40), st.sampled_from(["", "http://", "http://127.0.0.1", "http://[", "//"]))
def test_a_url_leads_to_the_router_or_nowhere(text: str, start: str) -> None:
    for base in (None, Url(LOCAL, 80, "/x")):
        with contextlib.suppress(RemoteProtocolError):
            url = router_url(start + text, Gateway(LOCAL, LOCAL), base)
            assert url.host == LOCAL
            assert url.path.startswith("/")
            assert url.path.isprintable()
            assert " " not in url.path


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2:80/",
        "http://localhost/",
        "https://127.0.0.1/",
        "http://127.0.0.1@127.0.0.2/",
        "http://u:p@127.0.0.1/",
        "http://2130706433/",
        "http://127.1/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: y",
        "http://127.0.0.1/" + "a" * 600,
        "file:///etc/passwd",
        "",
    ],
)
def test_urls_that_lead_elsewhere(url: str) -> None:
    with pytest.raises(RemoteProtocolError):
        router_url(url, Gateway(LOCAL, LOCAL))


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        b'<!DOCTYPE a SYSTEM "http://127.0.0.2/"><a/>',
        b"<a>" * 40 + b"</a>" * 40,
        b"<a>" + b"<b/>" * 5000 + b"</a>",
        b"<a>&nothing;</a>",
        b"<a><b></a>",
        b'<?xml version="1.0" encoding="wonder"?><a/>',
        b"",
    ],
)
def test_xml_that_is_refused(document: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_xml(document)


# UPnP


DESCRIPTION = """<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">{base}<device><deviceList><device><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:{service}</serviceType><controlURL>{control}</controlURL></service></serviceList></device>
</deviceList></device></root>"""
ENVELOPE = '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>{}</s:Body></s:Envelope>'
FAULT = "<s:Fault><detail><UPnPError><errorCode>{}</errorCode></UPnPError></detail></s:Fault>"


class Igd:
    """A UPnP router on loopback."""

    def __init__(self) -> None:
        self.base = ""
        self.service = "WANIPConnection:1"
        self.control = "/control"
        self.location = ""
        self.external = PUBLIC
        self.faults: dict[str, list[int]] = {}
        self.entries: dict[str, str] = {}
        self.actions: list[str] = []
        self.leases: list[str] = []
        self.paths: list[str] = []
        self.raw: bytes | None = None
        self.number = 0

    async def __aenter__(self) -> "Igd":
        self.server = await asyncio.start_server(self.serve, LOCAL, 0)
        self.number = self.server.sockets[0].getsockname()[1]
        self.port = Port(self.search)
        await self.port.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.port.__aexit__()
        self.server.close()
        await self.server.wait_closed()

    @property
    def gateway(self) -> Gateway:
        return at(self.port)

    def search(self, data: bytes) -> list[bytes]:
        if not data.startswith(b"M-SEARCH"):
            return []
        location = self.location or f"http://{LOCAL}:{self.number}/description.xml"
        return [f"HTTP/1.1 200 OK\r\nST: x\r\nLocation: {location}\r\n\r\n".encode()]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:")), 0)
            body = (await reader.readexactly(length)).decode()
            self.paths.append(head.split()[1])
            writer.write(self.raw if self.raw is not None else self.answer(head, body))
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def answer(self, head: str, body: str) -> bytes:
        if head.startswith("GET"):
            text = DESCRIPTION.format(base=self.base, service=self.service, control=self.control)
            half = len(text) // 2
            chunks = "".join(f"{len(part):x}\r\n{part}\r\n" for part in (text[:half], text[half:], ""))
            return f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}".encode()
        action = head.split("#")[1].split('"')[0]
        self.actions.append(action)
        code = self.faults[action].pop(0) if self.faults.get(action) else self.act(action, body)
        if isinstance(code, int):
            content, status = FAULT.format(code), "500 Internal Server Error"
        else:
            content, status = f'<u:{action}Response xmlns:u="x">{code}</u:{action}Response>', "200 OK"
        text = ENVELOPE.format(content)
        return f"HTTP/1.0 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()

    def act(self, action: str, body: str) -> int | str:
        fields = {each.tag: each.text or "" for each in parse_xml(body.encode()).iter()}
        match action:
            case "GetExternalIPAddress":
                return f"<NewExternalIPAddress>{self.external}</NewExternalIPAddress>"
            case "AddPortMapping" | "AddAnyPortMapping":
                self.leases.append(fields["NewLeaseDuration"])
                self.entries[fields["NewExternalPort"]] = fields["NewInternalClient"]
                return "<NewReservedPort>" + fields["NewExternalPort"] + "</NewReservedPort>"
            case "GetSpecificPortMappingEntry":
                owner = self.entries.get(fields["NewExternalPort"])
                return 714 if owner is None else f"<NewInternalClient>{owner}</NewInternalClient>"
            case "DeletePortMapping":
                return "" if self.entries.pop(fields["NewExternalPort"], None) else 714
        return 401


@pytest.fixture
async def igd() -> AsyncIterator[Igd]:
    async with Igd() as made:
        yield made


def upnp(igd: Igd, **options: object) -> contextlib.AbstractAsyncContextManager[tuple[PortMapper, Observer]]:
    return mapping(igd.gateway, protocols=[Upnp], **options)


@pytest.mark.parametrize("service", ["WANIPConnection:1", "WANIPConnection:2", "WANPPPConnection:1"])
async def test_upnp_maps_and_withdraws_and_uses_no_thread_pool(igd: Igd, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Awaitable[object]:
        raise AssertionError("the loop's threads are used")

    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", refuse)
    igd.service = service
    async with upnp(igd, udp_port=5001) as (mapper, observer):
        assert await observer.next() == Address(PUBLIC, 5000)
        await reached(lambda: len(igd.entries) == 2)
        assert mapper.state == f"mapped {PUBLIC}:5000 by UPnP-IGD for 2 h"
        assert ("AddAnyPortMapping" in igd.actions) == (service == "WANIPConnection:2")
    assert igd.entries == {}


@pytest.mark.parametrize("faults", [[], [718], [718, 729]])
async def test_upnp_takes_no_port_from_another_host(igd: Igd, faults: list[int]) -> None:
    igd.entries["5000"] = "192.168.1.77"
    igd.faults["AddPortMapping"] = faults
    async with upnp(igd) as (_, observer):
        address = await observer.next()
        assert address is not None
        assert address.port >= 49152
    assert igd.entries == {"5000": "192.168.1.77"}


async def test_upnp_withdraws_nothing_of_another_host(igd: Igd) -> None:
    igd.entries["5000"] = "192.168.1.77"
    igd.faults["AddPortMapping"] = [606]
    async with upnp(igd) as (mapper, _):
        await reached(lambda: "not authorised" in mapper.state)
    assert igd.entries == {"5000": "192.168.1.77"}


async def test_upnp_without_leases(igd: Igd) -> None:
    igd.faults["AddPortMapping"] = [725]
    async with upnp(igd) as (_, observer):
        assert await observer.next()
        assert igd.leases == ["0"]
    assert igd.entries == {}


async def test_upnp_when_any_port_is_not_understood(igd: Igd) -> None:
    igd.service = "WANIPConnection:2"
    igd.faults["AddAnyPortMapping"] = [401]
    async with upnp(igd) as (_, observer):
        assert await observer.next() == Address(PUBLIC, 5000)


async def test_upnp_a_lost_mapping_is_made_again(igd: Igd) -> None:
    async with upnp(igd, check_every=0.05) as (_, observer):
        assert await observer.next()
        igd.entries.clear()
        await reached(lambda: igd.entries)


async def test_upnp_a_router_that_cannot_tell_is_believed(igd: Igd) -> None:
    igd.faults["GetSpecificPortMappingEntry"] = [401] * 1000
    async with upnp(igd, check_every=0.02) as (_, observer):
        assert await observer.next()
        await reached(lambda: igd.actions.count("GetSpecificPortMappingEntry") > 5)
        assert igd.actions.count("AddPortMapping") == 1


@pytest.mark.parametrize("where", ["location", "control", "base"])
async def test_upnp_follows_no_url_away_from_the_router(igd: Igd, where: str) -> None:
    contacts: list[object] = []
    server = await asyncio.start_server(lambda reader, writer: (contacts.append(reader), writer.close())[1], "127.0.0.2", 0)
    url = f"http://127.0.0.2:{server.sockets[0].getsockname()[1]}/"
    setattr(igd, where, f"<URLBase>{url}</URLBase>" if where == "base" else url)
    async with upnp(igd) as (mapper, observer):
        await reached(lambda: mapper.state.startswith(("no router answered", "the router at")))
        assert mapper.refused["UPnP-IGD: a URL that leads elsewhere than to the router"] >= 1
        assert observer.told.empty()
    assert contacts == []
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    "raw",
    [
        b"garbage",
        b"\0" * 20_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"<a>" + b" " * 200_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n<a/>",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n<a/>",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n<!DOCTYPE a [<!ENTITY b 'c'>]><root/>",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2/\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n<root/>",
        b"",
    ],
)
async def test_upnp_descriptions_that_are_refused(igd: Igd, raw: bytes) -> None:
    igd.raw = raw
    async with upnp(igd) as (mapper, observer):
        await reached(lambda: "maps no port" in mapper.state)
        assert observer.told.empty()


@pytest.mark.parametrize("raw", [b"HTTP/1.1 200 OK\r\n\r\n<a/>", b"HTTP/1.1 500 No\r\n\r\n<errorCode>x</errorCode>", b"garbage\r\n\r\n"])
async def test_upnp_answers_that_are_refused(igd: Igd, raw: bytes) -> None:
    async with upnp(igd, check_every=0.05) as (mapper, observer):
        assert await observer.next()
        igd.raw = raw
        assert await observer.next() is None
        assert "no good" in mapper.state
        assert mapper.refused.total() >= 1


@pytest.mark.parametrize(
    "head",
    [b"\r\n", b"Content-Length: 65537\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", b"X: "],
    ids=["end", "length", "chunk", "head"],
)
async def test_upnp_no_more_is_read_than_there_is_room_for(head: bytes) -> None:
    sent = 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + head)
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(1000))
                await writer.drain()
                sent += 1000
        writer.close()

    server = await asyncio.start_server(pour, LOCAL, 0)
    with pytest.raises(RemoteProtocolError, match="too large"):
        await exchange(Url(LOCAL, server.sockets[0].getsockname()[1], "/"), Gateway(LOCAL, LOCAL))
    assert sent < 16_000_000  # what the kernel's buffers swallow, and not what five seconds could bring
    server.close()
    await server.wait_closed()


async def test_upnp_a_router_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap_http, "HTTP_TIMEOUT", 0.2)

    async def trickle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"H")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()

    server = await asyncio.start_server(trickle, LOCAL, 0)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await exchange(Url(LOCAL, server.sockets[0].getsockname()[1], "/"), Gateway(LOCAL, LOCAL))
    assert time.monotonic() - began < 2
    server.close()
    await server.wait_closed()


async def test_upnp_forged_searches_make_few_requests(igd: Igd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap_upnp, "SEARCH_WAITS", (0.1,) * 10)
    igd.control = "http://127.0.0.2/"
    one = igd.search
    igd.port.answer = lambda data: [reply.replace(b"description", f"d{number}".encode()) for reply in one(data) for number in range(100)]
    async with upnp(igd) as (mapper, _):
        await reached(lambda: "maps no port" in mapper.state)
        assert len(igd.paths) <= portmap_upnp.MAX_DESCRIPTIONS


async def test_upnp_searches_hear_only_the_router() -> None:
    async with Igd() as igd:
        elsewhere = Gateway("127.0.0.3", LOCAL, igd.port.number, ((LOCAL, igd.port.number),))
        async with mapping(elsewhere, protocols=[Upnp]) as (mapper, _):
            await reached(lambda: mapper.state == "no router answered (UPnP-IGD was tried)")
            assert mapper.refused["UPnP-IGD: a datagram of somebody else"] >= 1
        assert igd.paths == []


# Gateways


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t{0}\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t{1}\t0003\t0\t0\t100\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
broken
eth0\tzz\t\t0003
"""


def test_routes_of_linux() -> None:
    words = [f"{int.from_bytes(IPv4Address(host).packed, sys.byteorder):08X}" for host in ("10.0.0.1", "192.168.1.1")]
    assert parse_linux_routes(ROUTES.format(*words)) == [("eth0", "192.168.1.1"), ("wlan0", "10.0.0.1")]
    assert parse_linux_routes("") == []


def test_routes_of_macos() -> None:
    text = "   route to: default\n       mask: default\n    gateway: 192.168.1.1\n  interface: en0\n      flags: <UP,GATEWAY>\n"
    assert parse_route_command(text) == [("en0", "192.168.1.1")]
    assert parse_route_command(text.replace("192.168.1.1", "link#14")) == []
    assert parse_route_command("route: writing to routing socket: not in table\n") == []


def running(program: str) -> list[str]:
    """The command lines of all processes that name it."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().decode(errors="replace"))
    return [line for line in lines if program in line]


async def test_what_a_program_says_and_what_it_does_not(tmp_path: Path) -> None:
    path = tmp_path / "route"
    assert await output_of(str(path), seconds=10) == ""
    path.write_text('#!/bin/sh\n[ "$*" = "-n get default" ] && echo gateway: 192.0.2.1\n')
    assert await output_of(str(path), seconds=10) == ""  # it may not be run
    path.chmod(0o755)
    assert await output_of(str(path), "-n", "get", "default", seconds=10) == "gateway: 192.0.2.1\n"
    assert await output_of(str(path), "-n", seconds=10) == ""  # it failed
    path.write_text("#!/bin/sh\nwhile :; do :; done\n")
    assert await output_of(str(path), seconds=0.1) == ""
    assert not running(str(path))


async def test_loopback_alone_has_no_gateway() -> None:
    assert await find_gateway([LOCAL]) is None
    assert await find_gateway(["no such interface"]) is None
    async with mapping("127.0.0.1", interfaces=["no such interface"]) as (mapper, _):
        await reached(lambda: mapper.state.startswith("no router: "))


def test_a_gateway_that_is_named() -> None:
    assert gateway_at("localhost") is None
    assert gateway_at("::1") is None
    assert gateway_at(LOCAL) == Gateway(LOCAL, LOCAL)


def test_refusals_are_logged_at_powers_of_two(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="solyd_swarm")
    refusals = Refusals(Counter())
    for _ in range(100):
        refusals.add("PCP", "too long")
    assert len(caplog.records) == 7
    assert refusals.counter == {"PCP: too long": 100}
