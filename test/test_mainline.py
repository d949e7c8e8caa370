"""The BitTorrent DHT as a source: a private DHT of plain libtorrent sessions on loopback, and sources that meet through it."""

import asyncio
import gc
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest

from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.discovery import mainline, mainline_rules, mainline_session
from solyd_swarm.discovery.mainline import MainlineSource
from solyd_swarm.discovery.mainline_rules import ANYONE, days_looked_up, infohash_of, refusal
from solyd_swarm.discovery.mainline_session import MAX_STATE, pack_nodes, unpack_nodes
from solyd_swarm.discovery.records import DAY_SECONDS
from solyd_swarm.discovery.scope import scope_of
from solyd_swarm.discovery.source import Address, Candidate, Endpoint
from solyd_swarm.errors import DiscoveryError, InterfaceError

try:
    import libtorrent as lt
except ImportError as missing:
    lt = None
    WHY = f"libtorrent cannot be imported here: {missing}"
else:
    WHY = ""
needs_libtorrent = pytest.mark.skipif(lt is None, reason=WHY)

TOPIC = derive_topic_key("mainline test")
NOON = 20_000 * DAY_SECONDS + 43_200.0
PATIENCE = 20
FOREIGN = {
    **dict.fromkeys(("enable_lsd", "enable_upnp", "enable_natpmp", "dht_restrict_routing_ips", "dht_restrict_search_ips"), False),
    "dht_bootstrap_nodes": "",
    "dht_block_ratelimit": 10_000,
    "alert_mask": 0 if lt is None else int(lt.alert.category_t.status_notification | lt.alert.category_t.dht_operation_notification),
}


class ForeignDht:
    """Nodes of somebody else's program."""

    def __init__(self, size: int) -> None:
        self.sessions: list[Any] = []
        self.hosts: list[tuple[str, int]] = []
        for index in range(size):
            # Linux has all of 127.0.0.0/8; elsewhere one address must do.
            ip = f"127.0.0.{index + 2}" if sys.platform == "linux" else "127.0.0.1"
            session = lt.session({**FOREIGN, "listen_interfaces": f"{ip}:0"})
            self.sessions.append(session)
            self.hosts.append((ip, session.listen_port()))

    async def meet(self) -> None:
        """Until each knows most of the others."""
        for session in self.sessions:
            for host in self.hosts:
                session.add_dht_node(host)
        await until(lambda: all(self.known(session) >= len(self.sessions) // 2 for session in self.sessions))

    def known(self, session: Any) -> int:
        session.post_session_stats()
        session.wait_for_alert(100)
        return max([each.values["dht.dht_nodes"] for each in session.pop_alerts() if isinstance(each, lt.session_stats_alert)], default=0)

    async def peers(self, infohash: bytes) -> set[tuple[str, int]]:
        """Whom the DHT names for an infohash now, as one of its nodes sees it."""
        session = self.sessions[0]
        session.pop_alerts()
        found: set[tuple[str, int]] = set()
        session.dht_get_peers(lt.sha1_hash(infohash))
        for _ in range(20):
            await asyncio.to_thread(session.wait_for_alert, 50)
            for alert in session.pop_alerts():
                if isinstance(alert, lt.dht_get_peers_reply_alert):
                    found |= set(alert.peers())
        return found

    def close(self) -> None:
        self.sessions.clear()


class Finder:
    """Candidates that a source reported."""

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []
        self.changed = asyncio.Event()

    def __call__(self, topic_key: bytes, candidate: Candidate) -> None:
        assert topic_key == TOPIC
        self.candidates.append(candidate)
        self.changed.set()

    @property
    def addresses(self) -> set[Address]:
        return {address for candidate in self.candidates for address in candidate.addresses}

    async def until(self, address: Address) -> None:
        async with asyncio.timeout(PATIENCE):
            while address not in self.addresses:
                self.changed.clear()
                await self.changed.wait()


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


async def until(true: Callable[[], bool]) -> None:
    """What has no event is asked for, often."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.02)


async def no_names(host: str, port: int) -> list[tuple[str, int]]:
    raise AssertionError(f"{host} was looked up")


def endpoint(port: int) -> Endpoint:
    return Endpoint(port, port.to_bytes(32, "big"), ("127.0.0.1",))


@pytest.fixture
async def dht() -> AsyncIterator[ForeignDht]:
    foreign = ForeignDht(12)
    try:
        await foreign.meet()
        yield foreign
    finally:
        foreign.close()


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., MainlineSource]]:
    made: list[MainlineSource] = []

    def build(*bootstrap: tuple[str, int], **options: Any) -> MainlineSource:
        made.append(MainlineSource(no_names, bootstrap=bootstrap, **options))
        return made[-1]

    yield build
    for source in made:
        await source.close()


# What needs no libtorrent.


def test_nothing_imports_libtorrent_before_start() -> None:
    code = "import sys, solyd_swarm, solyd_swarm.discovery.mainline as m; m.MainlineSource(None); sys.exit('libtorrent' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


async def test_a_missing_libtorrent_says_what_to_install(monkeypatch: pytest.MonkeyPatch, make: Callable[..., MainlineSource]) -> None:
    monkeypatch.setitem(sys.modules, "libtorrent", None)
    source = make()
    with pytest.raises(DiscoveryError, match=r"pip install solyd-swarm\[mainline\].*CPython 3\.11 to 3\.13 on Linux"):
        await source.start(endpoint(1000), Finder())
    assert source.state == "not started"
    assert source.port == 0


async def test_an_old_libtorrent_says_which_is_needed(monkeypatch: pytest.MonkeyPatch, make: Callable[..., MainlineSource]) -> None:
    old = type(sys)("libtorrent")
    old.session, old.__version__ = object(), "1.2.19"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "libtorrent", old)
    with pytest.raises(DiscoveryError, match=r"1\.2\.19.*libtorrent>=2\.0\.11"):
        await make().start(endpoint(1000), Finder())


def test_days_looked_up_near_and_far_from_midnight() -> None:
    midnight = 20_001 * DAY_SECONDS
    assert days_looked_up(NOON) == (20_000,)
    assert days_looked_up(midnight - 1_801) == (20_000,)
    assert days_looked_up(midnight - 1_799) == (20_000, 20_001)
    assert days_looked_up(midnight + 1_799) == (20_001, 20_000)
    assert days_looked_up(midnight + 1_801) == (20_001,)
    for ahead in range(0, 1_800, 60):  # clocks that differ by less than half an hour: each looks where the other announces
        for now in range(midnight - 4_000, midnight + 4_000, 250):
            assert (now + ahead) // DAY_SECONDS in days_looked_up(now)
            assert now // DAY_SECONDS in days_looked_up(now + ahead)


def test_infohashes_are_of_a_topic_and_a_day() -> None:
    hashes = {infohash_of(derive_topic_key(name), day) for name in "ab" for day in (-1, 0, 20_000)}
    assert len(hashes) == 6
    assert {len(each) for each in hashes} == {20}


@pytest.mark.parametrize(
    ("host", "port", "teller", "reason"),
    [
        ("8.8.8.8", 5, ANYONE, None),
        ("2001:4860:4860::8888", 5, ANYONE, None),
        ("nonsense", 5, ANYONE, "malformed address"),
        ("8.8.8.8", 0, ANYONE, "port 0"),
        ("224.0.0.1", 5, ANYONE, "multicast address"),
        ("ff02::1", 5, ANYONE, "multicast address"),
        ("0.0.0.0", 5, ANYONE, "unspecified or reserved address"),
        ("255.255.255.255", 5, ANYONE, "unspecified or reserved address"),
        ("::", 5, ANYONE, "unspecified or reserved address"),
        ("8.8.4.4", 77, ANYONE, "our own address"),
        ("8.8.4.4", 78, ANYONE, None),
        *[
            (host, 5, ANYONE, "private or loopback address, told from outside")
            for host in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1", "::1", "fd00::1", "::ffff:10.0.0.1")
        ],
        ("10.0.0.1", 5, "192.168.1.5", None),
        ("127.0.0.1", 5, "192.168.1.5", "private or loopback address, told from outside"),
        ("127.0.0.1", 5, "127.0.0.1", None),
    ],
)
def test_which_addresses_are_believed(host: str, port: int, teller: str, reason: str | None) -> None:
    assert refusal(host, port, teller, {"8.8.4.4"}, 77) == reason


def test_whoever_stands_for_the_internet_is_global() -> None:
    assert scope_of(mainline_rules.ANYONE) == "global"


def test_saved_nodes_round_trip_and_are_bounded() -> None:
    nodes = [("192.0.2.1", 6881), ("2001:db8::1", 1)]
    assert unpack_nodes(pack_nodes(nodes)) == nodes
    assert pack_nodes([]) == b""
    assert unpack_nodes(None) == []
    assert len(pack_nodes([("2001:db8::1", 1)] * mainline_session.MAX_SAVED_NODES)) == MAX_STATE
    assert unpack_nodes(pack_nodes([("0.0.0.0", 5), ("192.0.2.1", 0), ("224.0.0.1", 5)])) == []


@pytest.mark.parametrize(
    "state", [b"x", *[b"solyd mainline 1\n" + rest for rest in (b"\x05", b"\x04\x01\x02", bytes([4, 1, 2, 3, 4, 5]), bytes(MAX_STATE))]]
)
def test_malformed_state_is_ignored_and_logged(state: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert unpack_nodes(state) == []
    assert "malformed" in caplog.text


# With the real thing.


@needs_libtorrent
async def test_two_sources_find_one_another_through_a_foreign_dht(dht: ForeignDht, make: Callable[..., MainlineSource]) -> None:
    sources = [make(dht.hosts[0]), make(dht.hosts[5])]
    finders = [Finder(), Finder()]
    for source, finder, port in zip(sources, finders, (1001, 1002), strict=True):
        source.join(TOPIC)  # before start: begins with it
        await source.start(endpoint(port), finder)
    await asyncio.gather(finders[0].until(Address("127.0.0.1", 1002)), finders[1].until(Address("127.0.0.1", 1001)))
    (candidate,) = {each for each in finders[0].candidates if each.addresses[0].port == 1002}
    assert candidate == Candidate((Address("127.0.0.1", 1002),), "mainline", None, "127.0.0.1")
    await until(lambda: all(source.nodes for source in sources))
    assert all(source.port and "DHT nodes known" in source.state for source in sources)
    assert finders[0].addresses == {Address("127.0.0.1", 1002)}  # and not ourselves, which is counted
    await until(lambda: sources[0].refused["our own address"] > 0)


@needs_libtorrent
async def test_nodes_are_added_and_saved_and_suffice_to_begin_with(dht: ForeignDht, make: Callable[..., MainlineSource]) -> None:
    first, finder = make(), Finder()
    first.contact(*dht.hosts[3])
    await first.start(endpoint(1001), finder)
    first.contact(*dht.hosts[4])
    first.contact("224.0.0.1", 5)
    first.join(TOPIC)
    await until(lambda: first.nodes >= 2)
    state = first.saved_state()
    await first.close()
    assert 0 < len(state) <= MAX_STATE
    assert set(unpack_nodes(state)) <= set(dht.hosts)
    assert first.saved_state()
    second, found = make(state=state), Finder()
    await second.start(endpoint(1002), found)
    second.join(TOPIC)
    await found.until(Address("127.0.0.1", 1001))  # closed, and named all the same: nothing can be withdrawn


@needs_libtorrent
async def test_the_infohash_changes_with_the_day(
    dht: ForeignDht, make: Callable[..., MainlineSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mainline, "REFRESH_GAP", 0.1)
    clock = Clock(20_001 * DAY_SECONDS - 60.0)
    early, finder = make(dht.hosts[0], clock=clock), Finder()
    await early.start(endpoint(1001), finder)
    early.join(TOPIC)
    late, late_finder = make(dht.hosts[1], clock=Clock(20_001 * DAY_SECONDS + 60.0)), Finder()  # past midnight already
    await late.start(endpoint(1002), late_finder)
    late.join(TOPIC)
    await asyncio.gather(finder.until(Address("127.0.0.1", 1002)), late_finder.until(Address("127.0.0.1", 1001)))
    assert {port for _, port in await dht.peers(infohash_of(TOPIC, 20_000))} == {1001}
    clock.now += 120
    early.refresh(TOPIC)
    async with asyncio.timeout(PATIENCE):
        while {port for _, port in await dht.peers(infohash_of(TOPIC, 20_001))} != {1001, 1002}:
            pass
    assert {port for _, port in await dht.peers(infohash_of(TOPIC, 20_000))} == {1001}


@needs_libtorrent
async def test_leaving_ends_announcing_and_looking(make: Callable[..., MainlineSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mainline, "REFRESH_GAP", 0.0)
    async with hostile_node([("127.0.0.1", 2_000)]) as node:
        source, finder = make(node.host), Finder()
        await source.start(endpoint(1001), finder)
        source.join(TOPIC)
        await finder.until(Address("127.0.0.1", 2_000))
        await until(lambda: node.queries.count("announce_peer") > 0)
        source.leave(TOPIC)
        source.leave(TOPIC)
        source.refresh(TOPIC)
        before = len(finder.candidates)
        source.on_peers(infohash_of(TOPIC, days_looked_up(source._clock())[0]), [("127.0.0.1", 2_001)])  # an answer on its way
        assert len(finder.candidates) == before
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "mainline topic" and not task.cancelling()]
        source.join(TOPIC)
        await until(lambda: len(finder.candidates) > before)


@needs_libtorrent
async def test_what_a_hostile_node_names_is_refused_and_counted(make: Callable[..., MainlineSource]) -> None:
    bad = [("8.8.8.8", 0), ("0.0.0.0", 5), ("224.0.0.5", 5), ("255.255.255.255", 5)]
    bad += [("127.0.0.1", 22), ("192.168.1.1", 80), ("10.0.0.1", 1)]
    async with hostile_node([*bad, ("127.0.0.1", 1001), ("9.9.9.9", 9)]) as node:
        source, finder = make(node.host, teller=ANYONE), Finder()
        await source.start(endpoint(1001), finder)
        source.join(TOPIC)
        await finder.until(Address("9.9.9.9", 9))
        assert finder.addresses == {Address("9.9.9.9", 9)}
        assert {candidate.learned_from for candidate in finder.candidates} == {ANYONE}
        assert set(source.refused) == {
            "port 0",
            "unspecified or reserved address",
            "multicast address",
            "private or loopback address, told from outside",
            "our own address",
        }
        assert source.refused["private or loopback address, told from outside"] % 3 == 0


@needs_libtorrent
async def test_a_flood_of_addresses_is_bounded_at_random(make: Callable[..., MainlineSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mainline, "FIRST_LOOKUP", 60.0)
    source, finder = make(), Finder()
    await source.start(endpoint(1001), finder)
    source.join(TOPIC)
    await until(lambda: source._by_infohash != {})
    (infohash,) = list(source._by_infohash)[:1]
    flood = [(f"127.1.{index >> 8}.{index & 255}", 5) for index in range(500)]
    source.on_peers(infohash, flood)
    assert len(finder.candidates) == mainline.MAX_PER_REPLY
    assert [candidate.addresses[0].host for candidate in finder.candidates] != [host for host, _ in flood[: mainline.MAX_PER_REPLY]]
    for _ in range(50):
        source.on_peers(infohash, random.sample(flood, 100))
    assert len(finder.candidates) == len(finder.addresses) == mainline.MAX_CANDIDATES
    assert source.refused["more than are taken of one look-up"] > 400


@needs_libtorrent
async def test_refresh_is_rate_limited(make: Callable[..., MainlineSource], monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[float] = []
    monkeypatch.setattr(MainlineSource, "_round", lambda self, session, topic, moment: rounds.append(moment))
    source = make()
    await source.start(endpoint(1001), Finder())
    source.join(TOPIC)
    await until(lambda: len(rounds) == 1)
    topic = source._topics[TOPIC]
    topic.delay = 300.0
    topic.due = topic.last + 300.0
    for _ in range(100):
        source.refresh(TOPIC)
        await asyncio.sleep(0)
    assert len(rounds) == 1
    assert topic.due == topic.last + mainline.REFRESH_GAP
    assert topic.delay == mainline.FIRST_LOOKUP


@needs_libtorrent
async def test_announcements_are_repeated_before_they_expire(make: Callable[..., MainlineSource], monkeypatch: pytest.MonkeyPatch) -> None:
    source = make()
    await source.start(endpoint(1001), Finder())
    session, calls = source._session, []
    assert session is not None
    monkeypatch.setattr(session, "announce", lambda infohash, port: calls.append("announce"))
    monkeypatch.setattr(session, "look_up", lambda infohash: calls.append("look up"))
    topic = mainline._Topic(TOPIC)
    source._nodes = 1
    source._clock = Clock(NOON)
    moment = 0.0
    for _ in range(mainline.EAGER_ANNOUNCEMENTS):
        source._round(session, topic, moment)
    assert calls == ["announce"] * mainline.EAGER_ANNOUNCEMENTS
    for _ in range(1_000):
        last, calls[:] = moment, []
        while "announce" not in calls:
            moment = min(moment + mainline.SLOWEST_LOOKUP, topic.announce_at)
            source._round(session, topic, moment)
        assert 760 <= moment - last <= 900


@needs_libtorrent
async def test_only_loopback_means_no_names_and_nobody_outside(make: Callable[..., MainlineSource]) -> None:
    source = MainlineSource(no_names)  # with the public nodes
    try:
        await source.start(endpoint(1001), Finder())
        await until(lambda: source._begun)
        assert await source._routers() == []
        assert source.state == "no DHT node has answered"
    finally:
        await source.close()
    assert source.state == "closed"


@needs_libtorrent
async def test_names_are_looked_up_by_us(dht: ForeignDht) -> None:
    asked = []

    async def resolve(host: str, port: int) -> list[tuple[str, int]]:
        asked.append((host, port))
        if host == "gone.example":
            raise OSError("no such name")
        return [dht.hosts[2]]

    source = MainlineSource(resolve, bootstrap=[("dht.example", 1), ("gone.example", 2), ("127.0.0.9", 3)])
    source._confined = False  # as on a machine with a network
    assert await source._routers() == [dht.hosts[2], ("127.0.0.9", 3)]
    assert asked == [("dht.example", 1), ("gone.example", 2)]


@needs_libtorrent
async def test_an_address_that_is_not_here(make: Callable[..., MainlineSource]) -> None:
    with pytest.raises(InterfaceError):
        await make(interfaces=["192.0.2.77"]).start(endpoint(1001), Finder())


@needs_libtorrent
async def test_a_port_that_is_taken_is_no_obstacle(make: Callable[..., MainlineSource]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        source = make(port=taken.getsockname()[1])
        await source.start(endpoint(1001), Finder())
        assert source.port not in (0, taken.getsockname()[1])


@needs_libtorrent
async def test_nothing_can_be_bound(monkeypatch: pytest.MonkeyPatch, make: Callable[..., MainlineSource]) -> None:
    monkeypatch.setattr(mainline, "_hosts", lambda interfaces: ["192.0.2.77"])
    before = left_over()
    with pytest.raises(DiscoveryError, match=r"192\.0\.2\.77.*switch this source off"):
        await make().start(endpoint(1001), Finder())
    assert left_over() == before


@needs_libtorrent
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads and sockets are listed by Linux only")
async def test_closing_is_quick_and_leaves_nothing(dht: ForeignDht) -> None:
    loop = asyncio.get_running_loop()
    before = left_over()
    for _ in range(3):
        source = MainlineSource(no_names, bootstrap=dht.hosts[:1])
        await source.start(endpoint(1001), Finder())
        source.join(TOPIC)
        await until(lambda source=source: source.nodes > 0)  # type: ignore[misc]
        assert left_over() != before
        begun = loop.time()
        await source.close()
        assert loop.time() - begun < 0.5
        assert left_over() == before
        await source.close()
        source.join(TOPIC)
        source.refresh(TOPIC)
        source.contact(*dht.hosts[0])
        assert (source.port, source.nodes, source.state) == (0, 0, "closed")


@needs_libtorrent
async def test_a_cancelled_start_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mainline_session.DhtSession, "_settle", lambda self, error=None: None)  # it would be too quick
    before = left_over()
    source = MainlineSource(no_names, bootstrap=())
    task = asyncio.create_task(source.start(endpoint(1001), Finder()))
    await asyncio.sleep(0)
    assert left_over() != before or not os.path.isdir("/proc/self/task")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_over() == before


@needs_libtorrent
async def test_the_tcp_listener_serves_nobody(make: Callable[..., MainlineSource]) -> None:
    source = make()
    await source.start(endpoint(1001), Finder())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", source.port)
    except OSError:
        return
    try:
        writer.write(b"\x13BitTorrent protocol" + bytes(48))
        with suppress(ConnectionError):  # closed, or reset
            assert await asyncio.wait_for(reader.read(100), PATIENCE) == b""
    finally:
        writer.close()


def left_over() -> tuple[int, set[str]]:
    """How many threads there are, those of C++ included, and the sockets."""
    gc.collect()
    if not os.path.isdir("/proc/self/task"):
        return 0, set()
    sockets = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith("socket:"):
            sockets.add(target)
    return len(os.listdir("/proc/self/task")), sockets


class HostileNode(asyncio.DatagramProtocol):
    """A node of the DHT (BEP 5) that names whom it likes for any infohash."""

    def __init__(self, values: list[tuple[str, int]]) -> None:
        self.values = [ip_address(host).packed + port.to_bytes(2, "big") for host, port in values]
        self.queries: list[str] = []
        self.id = random.randbytes(20)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    @property
    def host(self) -> tuple[str, int]:
        name = self.transport.get_extra_info("sockname")
        return name[0], name[1]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = lt.bdecode(data)
        if query.get(b"y") != b"q":
            return
        self.queries.append(query[b"q"].decode())
        answer: dict[bytes, Any] = {b"id": self.id}
        if query[b"q"] in (b"get_peers", b"find_node"):
            answer[b"nodes"] = b""
        if query[b"q"] == b"get_peers":
            answer |= {b"token": b"t", b"values": self.values}
        self.transport.sendto(lt.bencode({b"t": query[b"t"], b"y": b"r", b"r": answer}), addr)


class hostile_node:
    """Runs a `HostileNode` while the block lasts."""

    def __init__(self, values: list[tuple[str, int]]) -> None:
        self.values = values

    async def __aenter__(self) -> HostileNode:
        loop = asyncio.get_running_loop()
        self.transport, node = await loop.create_datagram_endpoint(lambda: HostileNode(self.values), local_addr=("127.0.0.1", 0))
        return node

    async def __aexit__(self, *reason: object) -> None:
        self.transport.close()
