"""The embedded DHT over real UDP sockets on loopback: finding, merging, refusing, expiring, and ending without remains."""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import time

import msgspec
import pytest
from kademlia.node import Node

from solyd_swarm.core.keys import derive_topic_key
from solyd_swarm.discovery import dht_wire as wire
from solyd_swarm.discovery.dht import DhtServer, LookUp
from solyd_swarm.discovery.dht_protocol import MAX_GREETINGS, MAX_WAITING
from solyd_swarm.discovery.dht_storage import Caps
from solyd_swarm.discovery.kademlia import KademliaSource
from solyd_swarm.discovery.records import MAX_LIFE, DayKeys, day_of, open_record, seal, verify, withdraw
from solyd_swarm.discovery.source import Address, Endpoint
from solyd_swarm.errors import DiscoveryError, InterfaceError

TOPIC = derive_topic_key("a topic")
NOON = 20_000 * 86_400 + 43_200.0
KEYS = DayKeys(TOPIC, 20_000)
LOCAL = "127.0.0.1"


@pytest.fixture(autouse=True)
def quiet(caplog):
    """No failed task, and nothing a user would see on the console."""
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.records:
        assert record.levelno < logging.WARNING, record.getMessage()
        assert record.exc_info is None, record.getMessage()


class Member:
    """A source with a made-up node around it."""

    def __init__(self, clock=lambda: NOON, interfaces=(LOCAL,), **options):
        self.source = KademliaSource(clock=clock, **options)
        self.endpoint = Endpoint(port=secrets.randbelow(60_000) + 1024, instance=secrets.token_bytes(32), interfaces=interfaces)
        self.found = []
        self._changed = asyncio.Event()

    def _on_found(self, topic_key, candidate):
        self.found.append((topic_key, candidate))
        self._changed.set()

    async def start(self):
        await self.source.start(self.endpoint, self._on_found)
        return self

    def meet(self, other):
        self.source.contact(LOCAL, other.source.port)

    def knows(self, other, topic=TOPIC):
        return any(key == topic and candidate.instance == other.endpoint.instance for key, candidate in self.found)

    async def until_knows(self, *others, topic=TOPIC, seconds=5):
        async with asyncio.timeout(seconds):
            while not all(self.knows(other, topic) for other in others):
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def start():
    """``await start(...)`` makes a started Member, closed at the end."""
    members = []

    async def start_one(**options):
        members.append(Member(**options))
        return await members[-1].start()

    yield start_one
    await asyncio.gather(*[member.source.close() for member in members])


@pytest.fixture
async def serve():
    """``await serve(...)`` makes a bare DHT node, closed at the end."""
    servers = []

    async def serve_one(**options):
        server = DhtServer(stored=lambda *_: None, met=lambda _: None, **options)
        servers.append(server)
        await server.listen(0, LOCAL)
        return server

    yield serve_one
    await asyncio.gather(*[server.close() for server in servers])


async def until(condition, seconds=5):
    """For states that announce themselves to nobody."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def sign_for(number, sequence=1, life=600, keys=KEYS):
    return seal(keys, number.to_bytes(32, "big"), [Address(LOCAL, number)], sequence, life)


async def look(server, keys=KEYS):
    """Instances found under a key, with the highest sequence of each; withdrawn ones as None."""
    slots = {}
    await server.get(keys.key, keys.public, lambda record, _: slots.__setitem__(record.slot, record))
    return [open_record(keys, record) for record in slots.values()]


# Finding one another.


async def test_the_second_of_two_finds_the_first_and_is_found(start):
    first, second = await start(), await start()
    first.source.join(TOPIC)
    second.source.join(TOPIC)
    begun = time.monotonic()
    second.meet(first)
    await asyncio.gather(first.until_knows(second), second.until_knows(first))
    assert time.monotonic() - begun < 0.5
    [(_, candidate)] = [entry for entry in second.found if entry[1].instance == first.endpoint.instance]
    assert candidate.addresses == (Address(LOCAL, first.endpoint.port),)
    assert (candidate.source, candidate.learned_from) == ("dht", LOCAL)
    assert first.source.nodes == second.source.nodes == 1


async def test_contact_before_join_and_join_in_any_order(start):
    first, second = await start(), await start()
    second.source.join(TOPIC)
    first.meet(second)
    await until(lambda: first.source.nodes == second.source.nodes == 1)
    first.source.join(TOPIC)
    await asyncio.gather(first.until_knows(second, seconds=1), second.until_knows(first, seconds=1))


async def test_contact_while_the_first_datagram_is_lost(start):
    first, second = await start(), await start()
    first.source.join(TOPIC)
    second.source.join(TOPIC)
    protocol = second.source._server.protocol
    sent = []
    send = protocol._send
    protocol._send = lambda datagram, host: sent.append(datagram) if not sent else send(datagram, host)
    second.meet(first)
    await second.until_knows(first)
    assert len(sent) == 1


async def test_six_nodes_find_one_another(start):
    members = [await start() for _ in range(6)]
    for member in members[:5]:
        member.source.join(TOPIC)
    for member in members[1:5]:
        member.meet(members[0])
    for member in members[:5]:
        await member.until_knows(*[other for other in members[:5] if other is not member])
    last = members[5]
    last.source.join(TOPIC)
    last.meet(members[3])
    await last.until_knows(*members[:5], seconds=2)
    assert not last.knows(last)
    await until(lambda: last.source.nodes == 5)


async def test_those_who_start_together_do_not_miss_one_another(start):
    meeting_point = await start()
    members = [await start() for _ in range(4)]
    for number in range(5):
        topic = derive_topic_key(f"topic {number}")
        for member in members:
            member.source.join(topic)
    for member in members:
        member.meet(meeting_point)
    for number in range(5):
        topic = derive_topic_key(f"topic {number}")
        for index, member in enumerate(members):
            for other in members[:index]:
                async with asyncio.timeout(5):
                    while not (member.knows(other, topic) or other.knows(member, topic)):
                        await asyncio.sleep(0.01)


async def test_two_whose_look_ups_cross_find_one_another(start, serve):
    """Both ask before either has stored anything, at a node that is no member and does not know the other yet."""
    middle, first, second = await serve(), await start(), await start()
    answer = middle.protocol.rpc_find_value
    middle.protocol._handlers["find_value"] = (wire.Find, lambda host, find: forget_nodes(answer(host, find)))
    middle.protocol._handlers["find_node"] = (wire.Find, lambda host, find: forget_nodes(answer(host, find)))
    for member in (first, second):
        member.source.join(TOPIC)
    for member in (first, second):
        member.source.contact(*middle.host)
    async with asyncio.timeout(5):
        while not (first.knows(second) or second.knows(first)):
            await asyncio.sleep(0.01)


def forget_nodes(found):
    return msgspec.structs.replace(found, nodes=[])


async def test_each_record_is_reported_once(start):
    members = [await start(lookup_interval=0.05) for _ in range(4)]
    for member in members:
        member.source.join(TOPIC)
    for member in members[1:]:
        member.meet(members[0])
    for member in members:
        await member.until_knows(*[other for other in members if other is not member])
    for member in members:
        asked = member.source._topics[TOPIC].last
        await until(lambda: member.source._topics[TOPIC].last > asked)  # noqa: B023
    assert [len(member.found) for member in members] == [3] * 4


async def test_topics_do_not_mix(start):
    first, second, third = await start(), await start(), await start()
    other = derive_topic_key("a topic", b"secret")
    first.source.join(TOPIC)
    first.source.join(other)
    second.source.join(other)
    third.source.join(TOPIC)
    second.meet(first)
    third.meet(first)
    await asyncio.gather(second.until_knows(first, topic=other), third.until_knows(first))
    await asyncio.gather(first.until_knows(second, topic=other), first.until_knows(third))
    assert not first.knows(second)
    assert not second.knows(third, topic=other)


async def test_the_dead_are_found_at_the_living(start, serve):
    first, second, third = await start(), await start(), await start()
    first.source.join(TOPIC)
    second.meet(first)
    third.meet(second)
    for other in (second, third):
        storage = other.source._server.storage
        await until(lambda: storage.entries(KEYS.key))  # noqa: B023
    await first.source._server.close()  # as if it had crashed: nothing is withdrawn
    last = await start()
    last.source.join(TOPIC)
    begun = time.monotonic()
    last.meet(third)
    await last.until_knows(first)
    assert time.monotonic() - begun < 0.9  # without waiting for the dead one


async def test_several_nodes_in_another_process(start, tmp_path):
    script = (
        "import asyncio, sys\n"
        "from solyd_swarm.discovery.kademlia import KademliaSource\n"
        "from solyd_swarm.discovery.source import Endpoint\n"
        "async def main():\n"
        "    source = KademliaSource(clock=lambda: float(sys.argv[3]))\n"
        "    await source.start(Endpoint(7, b'i' * 32, ('127.0.0.1',)), lambda key, candidate: print(candidate.addresses[0], flush=True))\n"
        "    source.join(bytes.fromhex(sys.argv[2]))\n"
        "    source.contact('127.0.0.1', int(sys.argv[1]))\n"
        "    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)\n"
        "    await source.close()\n"
        "asyncio.run(main(), debug=True)\n"
    )
    here = await start()
    here.source.join(TOPIC)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", script, str(here.source.port), TOPIC.hex(), str(NOON)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=root,
    )
    line = await asyncio.wait_for(process.stdout.readline(), 15)
    assert line.decode().strip() == f"{LOCAL}:{here.endpoint.port}"
    _, errors = await asyncio.wait_for(process.communicate(b""), 15)
    assert (process.returncode, errors) == (0, b"")
    assert here.found[0][1].instance == b"i" * 32


# Records in the network.


async def test_concurrent_announcements_lose_none(serve):
    servers = [await serve() for _ in range(10)]
    for server in servers[1:]:
        await server.bootstrap([servers[0].host])
    assert all(await asyncio.gather(*[server.set(KEYS.key, sign_for(number + 1)) for number, server in enumerate(servers)]))
    looker = await serve()
    await looker.bootstrap([servers[5].host])
    assert {found.addresses[0].port for found in await look(looker)} == set(range(1, 11))


async def test_more_records_than_a_reply_carries(serve):
    holder, looker = await serve(), await serve()
    for number in range(1, 13):
        holder.keep(sign_for(number))
    await looker.bootstrap([holder.host])
    carried = len(holder.protocol.rpc_find_value(looker.host, wire.Find(looker.node.id, KEYS.key)).records)
    assert 4 <= carried <= 7
    assert max([len(await look(looker)) for _ in range(5)]) > carried + 2


async def test_a_withdrawn_record_is_not_reported(start):
    first, second, third = await start(), await start(), await start()
    first.source.join(TOPIC)
    third.source.join(TOPIC)
    second.meet(first)
    third.meet(first)
    await third.until_knows(first)
    storages = [member.source._server.storage for member in (first, second, third)]
    slot = KEYS.slot(first.endpoint.instance)
    held = [lambda storage=storage: {e.record.slot: e.record for e in storage.entries(KEYS.key)}.get(slot) for storage in storages]
    await until(lambda: all(get() is not None for get in held))
    first.source.leave(TOPIC)
    await until(lambda: all(get() is not None and not get().box for get in held), seconds=1)
    last = await start()
    last.source.join(TOPIC)
    last.meet(second)
    await last.until_knows(third)
    await until(lambda: last.source._topics[TOPIC].asked and last.source._topics[TOPIC].accepted)
    assert not last.knows(first)
    first.source.join(TOPIC)
    await last.until_knows(first)


async def test_close_withdraws_in_time(start):
    first, second = await start(), await start()
    first.source.join(TOPIC)
    second.meet(first)
    storage = second.source._server.storage
    await until(lambda: storage.entries(KEYS.key))
    begun = time.monotonic()
    await first.source.close()
    assert time.monotonic() - begun < 0.5
    assert [entry.record.box for entry in storage.entries(KEYS.key)] == [b""]


async def test_close_is_bounded_when_nobody_answers(start):
    first, second = await start(), await start()
    first.source.join(TOPIC)
    second.meet(first)
    await until(lambda: second.source._server.storage.entries(KEYS.key))
    await second.source.close()
    begun = time.monotonic()
    await first.source.close()
    assert time.monotonic() - begun < 0.5


async def test_expiry_by_the_storing_nodes_clock(serve):
    now = [0.0]
    holder, announcer = await serve(monotonic=lambda: now[0]), await serve()
    await announcer.bootstrap([holder.host])
    assert await announcer.set(KEYS.key, sign_for(1, life=MAX_LIFE))
    looker = await serve()
    await looker.bootstrap([holder.host])
    now[0] = MAX_LIFE - 1
    assert len(holder.storage.entries(KEYS.key)) == 1
    now[0] = MAX_LIFE
    assert holder.storage.entries(KEYS.key) == []


async def test_the_day_border(start):
    midnight = 20_001 * 86_400.0
    early, late = await start(clock=lambda: midnight - 20_000), await start(clock=lambda: midnight + 20_000)
    for member in (early, late):
        member.source.join(TOPIC)
    early.meet(late)
    await asyncio.gather(early.until_knows(late), late.until_knows(early))
    assert list(early.source._topics[TOPIC].records) == [20_000]
    near = await start(clock=lambda: midnight - 60)
    near.source.join(TOPIC)
    assert day_of(midnight) == 20_001
    near.meet(late)
    await near.until_knows(early, late)
    assert sorted(near.source._topics[TOPIC].records) == [20_000, 20_001]
    await early.until_knows(near)
    assert sum(candidate.instance == near.endpoint.instance for _, candidate in early.found) == 1


async def test_the_day_changes_while_joined(start):
    now = [NOON]
    first = await start(clock=lambda: now[0], lookup_interval=0.02)
    first.source.join(TOPIC)
    await until(lambda: first.source._topics[TOPIC].records)
    now[0] += 86_400
    await until(lambda: list(first.source._topics[TOPIC].records) == [20_001])
    now[0] += 2 * 86_400
    await until(lambda: list(first.source._topics[TOPIC].records) == [20_003])
    assert len(first.source._by_key) == 3


async def test_announcements_are_renewed(start):
    first, second = await start(announce_interval=0.2, lookup_interval=0.05), await start()
    first.source.join(TOPIC)
    second.meet(first)
    storage = second.source._server.storage
    sequences = set()

    def renewed():
        sequences.update(entry.record.sequence for entry in storage.entries(KEYS.key))
        return len(sequences) >= 3

    await until(renewed)
    assert len(storage.entries(KEYS.key)) == 1


async def test_refresh_is_limited(start):
    first = await start()
    first.source.join(TOPIC)
    topic = first.source._topics[TOPIC]
    await until(lambda: topic.last > 0)
    for _ in range(100):
        first.source.refresh(TOPIC)
    first.source.refresh(b"unknown" + bytes(25))
    assert topic.due - topic.last == pytest.approx(5)


# Outsiders.


async def store_raw(attacker, victim, key, public, raw, token=None):
    """The victim's answer to a store: True, False, or None for silence."""
    if token is None:
        body = await attacker.protocol.call(victim.host, "find_value", wire.Find(attacker.node.id, key))
        token = wire.decode(body, wire.Found).token
    body = await attacker.protocol.call(victim.host, "store", wire.Store(attacker.node.id, key, public, raw, token))
    return None if body is None else wire.decode(body, wire.Stored).accepted


async def test_outsiders_records_are_refused(serve):
    victim, attacker = await serve(), await serve()
    honest = sign_for(1)
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, honest.raw) is True
    other = DayKeys(derive_topic_key("another"), 20_000)
    refused = {
        "unsigned": (KEYS.key, KEYS.public, bytes(64) + honest.raw[64:]),
        "signed by another key": (KEYS.key, KEYS.public, sign_for(2, keys=other).raw),
        "under a key that is not its own": (KEYS.key, other.public, sign_for(2, keys=other).raw),
        "too short": (KEYS.key, KEYS.public, b"x"),
        "too large": (KEYS.key, KEYS.public, honest.raw + bytes(500)),
        "changed": (KEYS.key, KEYS.public, honest.raw[:-1] + b"x"),
    }
    answers = await asyncio.gather(*[store_raw(attacker, victim, *what) for what in refused.values()])
    assert dict(zip(refused, answers, strict=True)) == dict.fromkeys(refused)
    assert [entry.record.raw for entry in victim.storage.entries(KEYS.key)] == [honest.raw]


async def test_a_store_without_token_is_refused(serve):
    now = [0.0]
    victim, attacker = await serve(monotonic=lambda: now[0]), await serve()
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(1).raw, token=bytes(8)) is False
    token = victim.protocol._tokens.make("10.0.0.1")
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(1).raw, token=token) is False
    token = victim.protocol._tokens.make(LOCAL)
    now[0] = MAX_LIFE / 2
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(1).raw, token=token) is True
    now[0] = MAX_LIFE
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(2).raw, token=token) is False


async def test_caps_hold_over_the_wire(serve):
    victim, attacker = await serve(caps=Caps(per_key=5)), await serve()
    for number in range(1, 10):
        assert await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(number).raw) is True
    assert len(victim.storage.entries(KEYS.key)) == 5


async def test_an_older_record_or_a_replay_does_not_come_back(serve):
    victim, attacker = await serve(), await serve()
    await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(1, sequence=1).raw)
    tombstone = withdraw(KEYS, (1).to_bytes(32, "big"), 2, 600)
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, tombstone.raw) is True
    assert await store_raw(attacker, victim, KEYS.key, KEYS.public, sign_for(1, sequence=1).raw) is False
    assert await look(attacker) == [None]


HOSTILE = [
    b"",
    b"\x00",
    bytes(22),
    b"\x02" + bytes(40),
    b"\x00" + bytes(20) + b"\x91" * 1_170,
    b"\x00" + bytes(20) + b"\xdd\xff\xff\xff\xff",
    b"\x00" + bytes(20) + b"\xc1",
    b"\x00" + bytes(20) + b"\x92\xa4\xff\xff\xff\xff\x90",
    b"\x01" + bytes(20) + msgspec.msgpack.encode([bytes(20)]),
    *(
        b"\x00" + bytes(20) + msgspec.msgpack.encode(call)
        for call in (
            None,
            [],
            ["ping"],
            ["ping", []],
            ["ping", 5],
            ["ping", [bytes(19)]],
            ["ping", ["x" * 20]],
            ["ping", {"sender": bytes(20)}],
            ["stun", []],
            ["_class__", [bytes(20)]],
            ["__init__", [bytes(20)]],
            ["find_node", [bytes(20)]],
            ["find_value", [bytes(20), bytes(21)]],
            ["find_value", [bytes(20), 2**63]],
            ["store", [bytes(20), bytes(20), b"", b"", b""]],
            ["store", [bytes(20), bytes(20), bytes(32), bytes(900), bytes(8)]],
            ["store", [bytes(20), "key", "value"]],
            [{"a": 1}, [bytes(20)]],
        )
    ),
    os.urandom(1_200),
    b"\x00" + os.urandom(1_199),
    bytes(1_201),
    bytes(60_000),
]


async def test_hostile_datagrams(start, caplog):
    loop = asyncio.get_running_loop()
    errors = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    victim = await start()
    tasks = asyncio.all_tasks()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
        attacker.setblocking(False)
        attacker.bind((LOCAL, 0))
        for datagram in HOSTILE:
            attacker.sendto(datagram, (LOCAL, victim.source.port))
        ping = wire.request(b"p" * 20, "ping", wire.Ping(b"a" * 20))
        attacker.sendto(ping, (LOCAL, victim.source.port))
        answers = [await asyncio.wait_for(loop.sock_recv(attacker, 2_000), 5)]
        assert answers[0][:21] == b"\x01" + b"p" * 20
        assert msgspec.msgpack.decode(answers[0][21:]) == [victim.source._server.node.id]
        # The victim pings back before it takes anybody in; a wrong answer leaves the table empty.
        pingback = await asyncio.wait_for(loop.sock_recv(attacker, 2_000), 5)
        for reply in (None, [], [5], [b"short"], "x", [[bytes(20)]]):
            attacker.sendto(b"\x01" + pingback[1:21] + msgspec.msgpack.encode(reply), (LOCAL, victim.source.port))
        await until(lambda: not victim.source._server.protocol._greeting)
    assert victim.source.nodes == 0
    assert errors == []
    assert asyncio.all_tasks() == tasks


async def test_only_nodes_that_answer_get_into_the_table(start):
    victim = await start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOCAL, 0))
        for _ in range(5):
            silent.sendto(wire.request(os.urandom(20), "ping", wire.Ping(os.urandom(20))), (LOCAL, victim.source.port))
        protocol = victim.source._server.protocol
        await until(lambda: protocol._greeting)
        assert len(protocol._waiting) == 1
        await until(lambda: not protocol._greeting)
    assert victim.source.nodes == 0


class Liar(asyncio.DatagramProtocol):
    """Answers every find with what it is told to."""

    def __init__(self, reply):
        self.reply = reply
        self.id = b"\xff" * 20
        self.asked = 0

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        if data[0] != wire.REQUEST:
            return
        name = wire.decode(data[21:], wire.Request).name
        self.asked += name == "find_value"
        reply = [self.id] if name == "ping" else self.reply(self)
        self.transport.sendto(b"\x01" + data[1:21] + msgspec.msgpack.encode(reply), addr)


@contextlib.asynccontextmanager
async def lying(reply):
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Liar(reply), local_addr=(LOCAL, 0))
    try:
        yield protocol, transport.get_extra_info("sockname")
    finally:
        transport.abort()


def neighbour(ip, port=9, node_id=None):
    return [node_id or os.urandom(20), socket.inet_aton(ip) if "." in ip else socket.inet_pton(socket.AF_INET6, ip), port]


LIES = {
    "no reply of ours": lambda liar: 5,
    "the package's own format": lambda liar: [[os.urandom(20), LOCAL, 9]],
    "a port of 0": lambda liar: [liar.id, b"", [neighbour(LOCAL, 0)]],
    "a port too large": lambda liar: [liar.id, b"", [neighbour(LOCAL, 65_536)]],
    "a short id": lambda liar: [liar.id, b"", [neighbour(LOCAL, 9, b"short")]],
    "an address of six bytes": lambda liar: [liar.id, b"", [[os.urandom(20), b"sixbyt", 9]]],
    "too many nodes": lambda liar: [liar.id, b"", [neighbour(LOCAL)] * 9],
    "multicast and nothing": lambda liar: [liar.id, b"", [neighbour("224.0.0.1"), neighbour("0.0.0.0"), neighbour("ff02::1")]],
    "broadcast": lambda liar: [liar.id, b"", [neighbour("255.255.255.255")]],
    "forged records": lambda liar: [liar.id, b"", [], 9, [bytes(64) + sign_for(1).raw[64:]]],
    "records of another topic": lambda liar: [liar.id, b"", [], 9, [sign_for(1, keys=DayKeys(bytes(32), 1)).raw]],
    "a token too long": lambda liar: [liar.id, bytes(500), []],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_lies_are_refused(serve, lie):
    looker = await serve()
    async with lying(lie) as (liar, host):
        await looker.bootstrap_node(host)
        assert looker.nodes == 1
        sent = []
        send = looker.protocol._send
        looker.protocol._send = lambda datagram, to: (sent.append(to), send(datagram, to))
        assert await look(looker) == []
        assert set(sent) == {host}
        assert 0 < liar.asked <= 2


async def test_a_look_up_ends_whatever_it_is_told(serve):
    looker = await serve()
    async with lying(lambda liar: [liar.id, b"", [neighbour("127.0.0.2", number + 1) for number in range(8)], 1000, []]) as (liar, host):
        await looker.bootstrap_node(host)
        looker.protocol._send = keep_off(looker.protocol._send, host)
        looked = LookUp(looker.protocol, KEYS.key, KEYS.public)
        await asyncio.wait_for(looked.run(), 8)
        assert looked._requests <= 9
        assert liar.asked == 1


def keep_off(send, host):
    """A _send that reaches one host only: the made-up ones are silent."""
    return lambda datagram, to: send(datagram, to) if to == host else None


async def test_wrong_ids_do_not_hide_honest_nodes(serve):
    honest, looker = await serve(), await serve()
    honest.keep(sign_for(1))
    lie = [neighbour(LOCAL, honest.host[1], bytes([near]) + KEYS.key[1:]) for near in range(5)]
    async with lying(lambda liar: [liar.id, b"", lie, 0, []]) as (_, host):
        await looker.bootstrap_node(host)
        sent = []
        send = looker.protocol._send
        looker.protocol._send = lambda datagram, to: (sent.append((to, b"find_value" in datagram)), send(datagram, to))
        assert len(await look(looker)) == 1
        assert sent.count((honest.host, True)) == 1
    assert looker.protocol.router.get(honest.node.id) is not None
    assert looker.nodes == 2


async def test_what_waits_is_bounded(serve):
    server = await serve()
    futures = [server.protocol.call((LOCAL, 9), "ping", wire.Ping(server.node.id)) for _ in range(MAX_WAITING + 10)]
    assert [future.done() for future in futures] == [False] * MAX_WAITING + [True] * 10
    server.protocol.stop()
    assert await asyncio.gather(*futures) == [None] * len(futures)
    greeted = [server.protocol.greet((LOCAL, port)) for port in range(1, MAX_GREETINGS + 5)]
    assert greeted.count(None) == 4


async def test_a_flood_of_contacts_is_bounded(start):
    member = await start()
    for port in range(1, 500):
        member.source.contact("127.0.0.2", port)
    assert len(member.source._tasks) < 40
    assert len(member.source._contacts) == 32
    for host, port in (("224.0.0.1", 5), ("0.0.0.0", 5), ("example.org", 5), (LOCAL, 0), (LOCAL, 65_536), ("", 1)):
        member.source.contact(host, port)
    assert len(member.source._contacts) == 32


async def test_the_table_splits_and_is_bounded_per_network(serve):
    server = await serve()
    protocol = server.protocol
    for number in range(500):
        protocol._add(Node(os.urandom(20), f"10.0.{number % 250}.{number // 250}", 9))
    assert 8 < server.nodes <= 500
    target = Node(os.urandom(20))
    exact = sorted(protocol.router.contacts(), key=target.distance_to)[:8]
    assert protocol.router.find_neighbors(target) == exact
    before = server.nodes
    own = server.node.id
    for number in range(100):
        protocol._add(Node(own[:-2] + number.to_bytes(2, "big"), "8.8.8.8", number + 1))
    assert server.nodes - before <= 32


async def test_a_node_at_the_edge_of_a_bucket_can_be_removed(serve):
    router = (await serve()).protocol.router
    edge = (1 << 159).to_bytes(20, "big")
    router.add_contact(Node(edge, "9.9.9.9", 9))
    while len(router.buckets) == 1:
        router.add_contact(Node(os.urandom(20), "9.9.9.9", 9))
    assert router.get(edge) is not None
    router.remove_contact(Node(edge))
    assert edge not in [node.id for node in router.contacts()]


async def test_a_flood_of_requests_is_dropped(serve):
    server = await serve(monotonic=lambda: 0.0)
    answered = []
    server.protocol._send = lambda datagram, host: answered.append(host[0])
    for source, times in (("10.0.0.1", 1_000), ("10.0.0.2", 10)):
        for _ in range(times):
            server.protocol.datagram_received(wire.request(bytes(20), "ping", wire.Ping(server.node.id)), (source, 9))
    assert (answered.count("10.0.0.1"), answered.count("10.0.0.2")) == (250, 10)


async def test_a_lost_datagram_is_forgiven_and_the_dead_are_dropped(serve):
    first, second = await serve(), await serve()
    await first.bootstrap([second.host])
    node = first.protocol.router.contacts()[0]
    await second.close()
    first.protocol.strike(node)
    assert first.nodes == 1
    assert first.protocol.read(node, None, wire.Found) is None
    assert first.nodes == 0
    assert first.protocol._strikes == {}


async def test_private_neighbours_are_not_told_to_or_taken_from_the_wide_world(serve):
    server = await serve()
    server.protocol._add(Node(b"a" * 20, "192.168.1.2", 9))
    server.protocol._add(Node(b"b" * 20, "9.9.9.9", 9))
    server.protocol._add(Node(b"c" * 20, LOCAL, 9))
    tell = server.protocol.rpc_find_node
    hosts = {ip: {n.host for n in tell((ip, 7), wire.Find(b"x" * 20, bytes(20))).nodes} for ip in (LOCAL, "192.168.1.9", "8.8.8.8")}
    assert hosts == {
        LOCAL: {"192.168.1.2", "9.9.9.9", LOCAL},
        "192.168.1.9": {"192.168.1.2", "9.9.9.9"},
        "8.8.8.8": {"9.9.9.9"},
    }


async def test_replies_fit_a_datagram(serve):
    server = await serve()
    addresses = [Address(f"2a00::{number}", 65_535) for number in range(1, 9)]
    for number in range(1, 50):
        server.keep(seal(KEYS, number.to_bytes(32, "big"), addresses[: number % 9], 1, 600))
        server.protocol._add(Node(os.urandom(20), f"2a00:{number:x}::1", 65_535))
    for _ in range(50):
        found = server.protocol.rpc_find_value(("2a00::1", 9), wire.Find(bytes(20), KEYS.key))
        assert len(found.nodes) == 8
        assert found.total == 49
        assert found.records
        assert all(verify(KEYS.public, raw) for raw in found.records)
        assert len(wire.frame(wire.REPLY, bytes(20), found)) <= wire.MAX_DATAGRAM
        wire.decode(msgspec.msgpack.encode(found), wire.Found)


# Beginning and end.


async def test_nothing_is_left_after_close():
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks()
    members = [await Member().start() for _ in range(3)]
    for member in members:
        member.source.join(TOPIC)
        member.source.contact("127.0.0.2", 9)
        member.meet(members[0])
    await members[1].until_knows(members[0])
    servers = [member.source._server for member in members]
    for member in members:
        await member.source.close()
        await member.source.close()
        assert member.source.port == member.source.nodes == 0
        for call in (member.source.join, member.source.leave, member.source.refresh):
            call(TOPIC)
        member.source.contact(LOCAL, 9)
    assert asyncio.all_tasks() == tasks
    assert [server.protocol._waiting for server in servers] == [{}, {}, {}]
    assert [server.transport.get_extra_info("socket").fileno() for server in servers] == [-1] * 3
    assert [timer for timer in loop._scheduled if not timer.cancelled() and "give_up" in repr(timer)] == []


async def test_close_without_start():
    source = KademliaSource()
    source.join(TOPIC)
    source.leave(TOPIC)
    await source.close()
    assert (source.port, source.nodes) == (0, 0)


async def test_join_before_start(start):
    early, other = Member(), await start()
    early.source.join(TOPIC)
    other.source.join(TOPIC)
    await early.start()
    try:
        early.meet(other)
        await early.until_knows(other)
    finally:
        await early.source.close()


async def test_a_taken_port_is_replaced(start):
    first = await start()
    second = await start(port=first.source.port)
    assert second.source.port not in (0, first.source.port)


async def test_a_wanted_port_is_taken(start):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((LOCAL, 0))
        port = probe.getsockname()[1]
    assert (await start(port=port)).source.port == port


async def test_no_socket_to_bind():
    tasks = asyncio.all_tasks()
    with pytest.raises(DiscoveryError, match="switch the DHT off"):
        await Member(host="192.0.2.1").start()
    with pytest.raises(InterfaceError):
        await Member(interfaces=("192.0.2.1",)).start()
    assert asyncio.all_tasks() == tasks


async def test_the_socket_keeps_to_the_interfaces_named(start):
    member = await start()
    assert member.source._server.host[0] == LOCAL
    assert [address.host for address in member.source._addresses()] == [LOCAL]


async def test_both_families_on_one_socket(start):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        both = await start(host="::", interfaces=())
    except DiscoveryError:
        pytest.skip("no IPv6 here")
    old = await start()
    both.source.join(TOPIC)
    old.source.join(TOPIC)
    both.meet(old)
    await until(lambda: both.source.nodes == old.source.nodes == 1)
    assert both.source._server.protocol.router.contacts()[0].ip == LOCAL
    await both.until_knows(old)
