"""Peers found by multicast DNS. Real sockets, on 127.0.0.1 only."""

import asyncio
import logging
import secrets
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceInfo, ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

from solyd_swarm.core.keys import derive, derive_topic_key
from solyd_swarm.discovery import mdns, mdns_known, mdns_link
from solyd_swarm.discovery.interfaces import LocalAddress, usable_interfaces
from solyd_swarm.discovery.mdns import MdnsSource
from solyd_swarm.discovery.mdns_link import Link
from solyd_swarm.discovery.mdns_service import MAX_ADDRESSES, SERVICE_TYPE, RefusedError, announced_addresses, parse_txt
from solyd_swarm.discovery.mdns_welcome import ANSWERS, CROWD, MAX_WAITING, Welcome
from solyd_swarm.discovery.source import Address, Candidate, Endpoint
from solyd_swarm.errors import DiscoveryError, InterfaceError

LOOPBACK = ("127.0.0.1",)
TOPIC, OTHER = derive_topic_key("a topic of these tests"), derive_topic_key("another topic of these tests")
SECRET = derive_topic_key("a topic of these tests", b"secret")
TIMEOUT = 10.0


class Seen:
    """What a source has found."""

    def __init__(self) -> None:
        self.all: list[tuple[bytes, Candidate]] = []
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, topic_key: bytes, candidate: Candidate) -> None:
        self.all.append((topic_key, candidate))
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    def ports(self, topic_key: bytes = TOPIC) -> list[int]:
        return [address.port for key, candidate in self.all if key == topic_key for address in candidate.addresses[:1]]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT), self._news:
            await self._news.wait_for(condition)

    async def port(self, port: int, topic_key: bytes = TOPIC, times: int = 1) -> None:
        await self.until(lambda: self.ports(topic_key).count(port) >= times)


def port() -> int:
    """A number that tells sources apart; nobody listens there."""
    return 20000 + secrets.randbelow(40000)


def fresh() -> bytes:
    return secrets.token_bytes(32)


@asynccontextmanager
async def running(number: int, *topics: bytes) -> AsyncIterator[tuple[MdnsSource, Seen]]:
    source, seen = MdnsSource(), Seen()
    await source.start(Endpoint(number, secrets.token_bytes(32), LOOPBACK), seen)
    for topic_key in topics:
        source.join(topic_key)
    try:
        yield source, seen
    finally:
        await source.close()


@asynccontextmanager
async def raw() -> AsyncIterator[AsyncZeroconf]:
    zeroconf = AsyncZeroconf(interfaces=list(LOOPBACK))
    try:
        yield zeroconf
    finally:
        await zeroconf.async_close()


def service(
    topic_key: bytes,
    number: int,
    *,
    addresses: list[str] | None = None,
    name: str | None = None,
    properties: dict[bytes, bytes] | None = None,
) -> ServiceInfo:
    nonce = secrets.token_bytes(16)
    return ServiceInfo(
        SERVICE_TYPE,
        f"{name or secrets.token_hex(16)}.{SERVICE_TYPE}",
        port=number,
        properties={b"n": nonce, b"t": derive(topic_key, b"mdns", nonce, size=16)} if properties is None else properties,
        server=f"{secrets.token_hex(16)}.local.",
        parsed_addresses=["127.0.0.1"] if addresses is None else addresses,
    )


async def announce(zeroconf: AsyncZeroconf, info: ServiceInfo) -> None:
    await (await zeroconf.async_register_service(info, cooperating_responders=True))


def held() -> tuple[int, set[threading.Thread]]:
    process = psutil.Process()
    return process.num_fds(), set(threading.enumerate())


async def test_two_find_one_another() -> None:
    topic, a, b = fresh(), port(), port()
    async with running(a, topic) as (_, first), running(b, topic) as (_, second):
        await first.port(b, topic)
        await second.port(a, topic)
        for seen, number in ((first, b), (second, a)):
            assert seen.all[0] == (topic, Candidate((Address("127.0.0.1", number),), "mdns", None, "127.0.0.1"))
        assert a not in first.ports(topic)
        assert b not in second.ports(topic)


async def test_two_find_one_another_quickly() -> None:
    topic = fresh()
    loop = asyncio.get_running_loop()
    took = []
    for _ in range(5):
        a, b = port(), port()
        async with running(a, topic) as (_, first):
            started = loop.time()
            async with running(b, topic) as (_, second):
                await first.port(b, topic)
                await second.port(a, topic)
                took.append(loop.time() - started)
    assert sorted(took)[2] < 0.25


SCRIPT = """
import asyncio, sys
from solyd_swarm.discovery.mdns import MdnsSource
from solyd_swarm.discovery.source import Endpoint

async def main():
    own, other, topic = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
    done = asyncio.Event()
    ports = []
    def found(key, candidate):
        assert key == topic
        ports.extend(address.port for address in candidate.addresses)
        if other in ports:
            done.set()
    source = MdnsSource()
    await source.start(Endpoint(own, bytes(32), ("127.0.0.1",)), found)
    source.join(topic)
    async with asyncio.timeout(20):
        await done.wait()
    print("found", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    assert own not in ports
    await source.close()

asyncio.run(main())
"""


def test_two_processes_find_one_another() -> None:
    topic, numbers = fresh(), [port(), port()]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, str(own), str(other), topic.hex()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own, other in (numbers, reversed(numbers))
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "found\n"
        for process in processes:
            assert process.communicate("\n", timeout=TIMEOUT) == ("", "")
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()


async def test_other_topics_and_secrets_are_not_found_until_joined() -> None:
    numbers = [port() for _ in range(4)]
    async with running(numbers[0], TOPIC) as (source, seen), AsyncExitStack() as others:
        for number, topic_key in zip(numbers[1:], (OTHER, SECRET, TOPIC), strict=True):
            await others.enter_async_context(running(number, topic_key))
        await seen.port(numbers[3])
        await seen.until(lambda: set(numbers[1:3]) <= {one.addresses[0].port for one in source._known.unmatched.values()} or _poke(source))
        assert set(seen.ports()) & set(numbers) == {numbers[3]}
        assert not seen.ports(OTHER)
        source.join(OTHER)
        await seen.port(numbers[1], OTHER)
        assert numbers[2] not in {address.port for _, candidate in seen.all for address in candidate.addresses}


def _poke(source: MdnsSource) -> bool:
    """Have the condition looked at again once there is news."""
    source._topics[TOPIC].refreshed_at = -1e9
    asyncio.get_running_loop().call_later(0.05, source.refresh, TOPIC)
    return False


async def test_joined_before_start() -> None:
    topic, a, b = fresh(), port(), port()
    source, seen = MdnsSource(), Seen()
    source.join(topic)
    source.refresh(topic)
    await source.start(Endpoint(a, bytes(32), LOOPBACK), seen)
    try:
        async with running(b, topic) as (_, second):
            await second.port(a, topic)
            await seen.port(b, topic)
    finally:
        await source.close()


async def test_what_is_announced_says_nothing() -> None:
    names: asyncio.Queue[str] = asyncio.Queue()

    def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
        if state_change is ServiceStateChange.Added:
            names.put_nowait(name)

    number = port()
    infos = []
    async with raw() as zeroconf, running(number) as (source, _):
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[changed])
        for _ in range(2):
            source.join(TOPIC)
            async with asyncio.timeout(TIMEOUT):
                while True:
                    name = await names.get()
                    info = await zeroconf.async_get_service_info(SERVICE_TYPE, name)
                    if info is not None and info.port == number:
                        break
            infos.append(info)
            source.leave(TOPIC)
        await browser.async_cancel()
    first, second = infos
    assert first.name != second.name
    assert first.server != second.server
    assert first.properties[b"n"] != second.properties[b"n"]
    for info in infos:
        assert info.server is not None
        assert set(info.properties) == {b"n", b"t"}
        assert info.properties[b"t"] == derive(TOPIC, b"mdns", info.properties[b"n"] or b"", size=16)
        assert info.parsed_addresses() == ["127.0.0.1"]
        assert not {info.name.partition(".")[0], info.server.partition(".")[0]} & {socket.gethostname(), TOPIC.hex()}


@pytest.mark.parametrize("how", ["leave", "close", "cancelled"])
async def test_goodbye(how: str) -> None:
    topic, a, b = fresh(), port(), port()
    gone = asyncio.Event()
    async with raw() as zeroconf, running(b, topic) as (source, seen):
        ours = next(iter(source._ours))

        def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
            if name == ours and state_change is ServiceStateChange.Removed:
                gone.set()

        async with running(a, topic) as (_, other):
            browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[changed])
            await other.port(b, topic)
            await seen.port(a, topic)
            async with asyncio.timeout(TIMEOUT):
                while ours not in {record.alias for record in zeroconf.zeroconf.cache.entries_with_name(SERVICE_TYPE)}:
                    await zeroconf.zeroconf.async_wait(100)
            if how == "leave":
                source.leave(topic)
                source.leave(topic)
            elif how == "close":
                await source.close()
            else:
                closing = asyncio.create_task(source.close())
                asyncio.get_running_loop().call_soon(closing.cancel)
                await asyncio.wait([closing])
                assert closing.cancelled()
            async with asyncio.timeout(TIMEOUT):
                await gone.wait()
            await browser.async_cancel()
        async with running(port(), topic) as (_, late), running(a, topic):
            await late.port(a, topic)
            assert b not in late.ports(topic)


async def test_rejoined() -> None:
    topic, a, b = fresh(), port(), port()
    async with running(a, topic) as (source, seen), running(b, topic) as (_, other):
        await seen.port(b, topic)
        await other.port(a, topic)
        source.leave(topic)
        source.join(topic)
        source.join(topic)
        await seen.port(b, topic, times=2)
        await other.port(a, topic, times=2)


async def test_refresh_reports_again_but_not_too_often() -> None:
    topic, a, b = fresh(), port(), port()
    async with running(a, topic) as (source, seen), running(b, topic):
        await seen.port(b, topic)
        for _ in range(10):
            source.refresh(topic)
        source.refresh(OTHER)
        await seen.port(b, topic, times=2)
        assert seen.ports(topic).count(b) == 2


async def test_addresses_change() -> None:
    topic, number = fresh(), port()
    async with raw() as zeroconf, running(port(), topic) as (_, seen):
        info = service(topic, number)
        await announce(zeroconf, info)
        await seen.port(number, topic)
        info.addresses = [ip_address("127.0.0.1").packed, ip_address("192.0.2.77").packed]
        await (await zeroconf.async_update_service(info))
        await seen.until(lambda: Address("192.0.2.77", number) in seen.all[-1][1].addresses)


MALFORMED = {
    "no properties": {"properties": {}},
    "short nonce": {"properties": {b"n": b"1", b"t": bytes(16)}},
    "long tag": {"properties": {b"n": bytes(16), b"t": bytes(17)}},
    "no tag": {"properties": {b"n": bytes(16)}},
    "long text": {"properties": {b"n": bytes(16), b"t": bytes(16), b"a": bytes(240)}},
    "port 0": {"number": 0},
    "unspecified": {"addresses": ["0.0.0.0"]},
    "multicast": {"addresses": ["224.0.0.1"]},
    "broadcast": {"addresses": ["255.255.255.255"]},
    "IPv6 multicast": {"addresses": ["ff02::1", "::"]},
    "a name that is none of ours": {"name": "printer"},
    "a name in capitals": {"name": "AB" * 16},
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_malformed_services_are_refused(what: str) -> None:
    topic, good, bad = fresh(), port(), port()
    async with raw() as zeroconf, running(port(), topic) as (source, seen):
        broken = service(topic, **{"number": bad, **MALFORMED[what]})  # type: ignore[arg-type]
        first = asyncio.create_task(announce(zeroconf, broken))
        await announce(zeroconf, service(topic, good))
        await first
        await seen.port(good, topic)
        assert source.refused.total() > 0
        assert set(seen.ports(topic)) == {good}


async def test_addresses_of_one_service_are_capped() -> None:
    topic, number = fresh(), port()
    async with raw() as zeroconf, running(port(), topic) as (source, seen):
        await announce(zeroconf, service(topic, number, addresses=[f"192.0.2.{host}" for host in range(100)]))
        await seen.port(number, topic)
        assert len(seen.all[-1][1].addresses) == MAX_ADDRESSES
        assert source.refused.total() >= 100 - MAX_ADDRESSES


async def test_some_bad_addresses_leave_the_good_ones() -> None:
    topic, number = fresh(), port()
    async with raw() as zeroconf, running(port(), topic) as (source, seen):
        await announce(zeroconf, service(topic, number, addresses=["0.0.0.0", "127.0.0.1", "::ffff:224.0.0.1"]))
        await seen.port(number, topic)
        assert seen.all[-1][1].addresses == (Address("127.0.0.1", number),)
        assert source.refused.total() >= 2


async def test_a_flood_is_bounded_and_keeps_our_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns_known, "MAX_SERVICES", 4)
    topic, first, last = fresh(), port(), port()
    async with raw() as zeroconf, running(port(), topic) as (source, seen):
        await announce(zeroconf, service(topic, first))
        await asyncio.gather(*(announce(zeroconf, service(fresh(), port())) for _ in range(12)))
        await announce(zeroconf, service(topic, last))
        await seen.port(last, topic)
        assert len(source._known.unmatched) <= 4
        assert {item.addresses[0].port for _, item in source._known.matched.values()} == {first, last}


async def test_garbage_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    topic, a, b = fresh(), port(), port()
    async with running(a, topic) as (_, seen):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            header = b"\0\0\x84\0\0\0\0\xff\0\0\0\0"
            for packet in (b"", b"\0", header, header + bytes(100), header + b"\xc0\x0c" * 50, secrets.token_bytes(500)):
                sender.sendto(packet, (mdns_link.GROUP_V4, mdns_link.PORT))
        async with running(b, topic):
            await seen.port(b, topic)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_silent_services_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    topic, a, b = fresh(), port(), port()
    async with running(a, topic) as (source, seen), running(b, topic):
        await seen.port(b, topic)
        monkeypatch.setattr(mdns, "FORGET_AFTER", -1.0)
        source._asked_at = -1e9
        source._ask()
        assert not source._known.matched


async def test_close_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    before, tasks = held(), asyncio.all_tasks()
    topic, a, b = fresh(), port(), port()
    async with running(a, topic, OTHER, SECRET) as (source, seen), running(b, topic) as (other, _):
        await seen.port(b, topic)
        source.leave(OTHER)
        other.refresh(topic)
        started = loop.time()
        await source.close()
        await source.close()
        assert loop.time() - started < 0.5
        count = len(seen.all)
        source.join(topic)
        source.refresh(topic)
        source.leave(topic)
    assert len(seen.all) == count
    assert held() == before
    assert asyncio.all_tasks() == tasks
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_closed_while_it_opens() -> None:
    before, tasks = held(), asyncio.all_tasks()
    for turns in range(6):
        source = MdnsSource()
        starting = asyncio.create_task(source.start(Endpoint(port(), bytes(32), LOOPBACK), Seen()))
        for _ in range(turns):
            await asyncio.sleep(0)
        if turns % 2:
            starting.cancel()
        await source.close()
        await asyncio.wait([starting])
        await source.close()
    assert held() == before
    assert asyncio.all_tasks() == tasks


async def test_unknown_interface() -> None:
    before = held()
    source = MdnsSource()
    with pytest.raises(InterfaceError, match=r"no network interface or address '192\.0\.2\.200'"):
        await source.start(Endpoint(port(), bytes(32), ("192.0.2.200",)), Seen())
    source.join(TOPIC)
    source.refresh(TOPIC)
    await source.close()
    assert held() == before


async def test_port_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(mdns_link, "PORT", taken.getsockname()[1])
        before = held()
        with pytest.raises(DiscoveryError, match=r"cannot be bound .* switch mdns off"):
            await MdnsSource().start(Endpoint(port(), bytes(32), LOOPBACK), Seen())
        assert held() == before


async def test_no_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns_link, "GROUP_V4", "192.0.2.1")
    before = held()
    with pytest.raises(DiscoveryError, match=r"no multicast on 127\.0\.0\.1"):
        await MdnsSource().start(Endpoint(port(), bytes(32), LOOPBACK), Seen())
    assert held() == before


async def test_zeroconf_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(105, "no buffer space")

    monkeypatch.setattr(mdns_link, "AsyncZeroconf", fail)
    with pytest.raises(DiscoveryError, match="no buffer space"):
        await MdnsSource().start(Endpoint(port(), bytes(32), LOOPBACK), Seen())


async def test_network_gone_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    topic, a, b = fresh(), port(), port()
    async with running(a, topic) as (source, seen), running(b, topic):
        assert source._link is not None
        for reader in source._link.zeroconf.engine.readers:
            for _ in range(3):
                reader.transport.get_protocol().error_received(OSError(101, "Network is unreachable"))
        await seen.port(b, topic)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["mDNS cannot reach the network now: [Errno 101] Network is unreachable"]


async def test_interfaces_change(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Gone at first, so that nothing can be opened; then back."""
    topic, a, b = fresh(), port(), port()
    monkeypatch.setattr(mdns, "CHECK_LIMIT", 0.0)
    monkeypatch.setattr(mdns, "REFRESH_LIMIT", 0.0)
    async with running(b, topic) as (_, other), running(a, topic) as (source, seen):
        await other.port(a, topic)
        await seen.port(b, topic)

        def gone(_: object) -> list[LocalAddress]:
            raise InterfaceError("nothing there")

        for lookup in (gone, gone, usable_interfaces):
            monkeypatch.setattr(mdns, "usable_interfaces", lookup)
            source.refresh(topic)
            source.refresh(topic)
            assert source._reopening is not None
            await source._reopening
        await other.port(a, topic, times=2)
        await seen.until(lambda: seen.ports(topic)[-1] == b)
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1


def local(host: str, prefix: int, index: int = 2) -> LocalAddress:
    return LocalAddress(f"eth{index}", index, ip_address(host), prefix)


@pytest.mark.parametrize(
    ("addresses", "sender", "zone", "allowed"),
    [
        ([local("127.0.0.1", 8)], "127.0.0.1", 0, True),
        ([local("127.0.0.1", 8)], "192.0.2.7", 0, False),
        ([local("192.0.2.7", 24)], "192.0.2.99", 0, True),
        ([local("192.0.2.7", 24)], "127.0.0.1", 0, False),
        ([local("192.0.2.7", 24)], "198.51.100.1", 0, False),
        ([local("192.0.2.7", 24)], "fe80::1%eth2", 2, False),
        ([local("fe80::7", 64)], "fe80::1%eth2", 2, True),
        ([local("fe80::7", 64)], "fe80::1%eth3", 3, False),
        ([local("2001:db8::7", 128)], "2001:db8::8", 2, True),
        ([local("2001:db8::7", 64)], "2001:db8:1::8", 2, False),
        ([local("::1", 128)], "::2", 1, False),
    ],
)
def test_only_allowed_links_are_heard(addresses: list[LocalAddress], sender: str, zone: int, allowed: bool) -> None:
    assert Link(addresses, lambda _: None, Counter()).is_allowed(sender, zone) is allowed


def test_loopback_is_announced_only_if_there_is_nothing_else() -> None:
    loopback = [local("127.0.0.1", 8, 1), local("::1", 128, 1)]
    lan = [local("fe80::7", 64), local("192.0.2.7", 24), local("2001:db8::7", 64)]
    assert announced_addresses(loopback) == ["127.0.0.1", "::1"]
    assert announced_addresses(loopback + lan) == ["192.0.2.7", "2001:db8::7", "fe80::7"]
    assert len(announced_addresses([local(f"192.0.2.{host}", 24) for host in range(50)])) == MAX_ADDRESSES


@given(st.binary(max_size=300))
def test_any_txt_record_is_read_or_refused(text: bytes) -> None:
    try:
        nonce, tag = parse_txt(text)
    except RefusedError:
        return
    assert len(nonce) == len(tag) == 16


def test_txt_record() -> None:
    good = b"\x12n=" + b"N" * 16 + b"\x12t=" + b"T" * 16
    assert parse_txt(good) == (b"N" * 16, b"T" * 16)
    assert parse_txt(b"\x00\x03new" + good + good.swapcase()) == (b"N" * 16, b"T" * 16)
    for bad in (b"", good[:-1], good + b"\x02x", good[:19]):
        with pytest.raises(RefusedError):
            parse_txt(bad)


async def test_of_a_crowd_some_answer_at_once_and_few_wait() -> None:
    late: asyncio.Queue[str] = asyncio.Queue()
    welcome = Welcome(late.put_nowait)
    assert all(welcome.at_once(str(number), CROWD) for number in range(100))
    answers = sum(welcome.at_once(str(number), 100) for number in range(5000))
    assert ANSWERS * 50 * 0.6 < answers < ANSWERS * 50 * 1.4
    assert len(welcome._waiting) == MAX_WAITING
    async with asyncio.timeout(TIMEOUT):
        await late.get()
    welcome.clear()
    assert not welcome._waiting
