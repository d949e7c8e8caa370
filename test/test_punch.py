"""Being tried, and meeting with a neighbour's help: on loopback, where nothing translates; then in network namespaces, where routers
translate and firewalls are silent. And two dials that end in one connection.
"""

import asyncio
import json
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import msgspec
import pytest
from endpoints import HALL, QUICK, ROOM, Host, Recorder, Stranger, hosts, stranger, until
from hosts import Bridge, Lab, require
from hosts import Host as Machine
from processes import Process

from solyd_swarm.core.events import DialFailed
from solyd_swarm.errors import RemoteProtocolError
from solyd_swarm.net import dial_back, outside, punch, reach_frames
from solyd_swarm.net.channel import Channel
from solyd_swarm.net.dialler import connect
from solyd_swarm.net.limits import Limits
from solyd_swarm.net.listen import bind
from solyd_swarm.net.listening_port import ListeningPort
from solyd_swarm.net.noise import NoiseSession
from solyd_swarm.net.reach_frames import ANSWER, ASK, DECLINE, FAILED, GO, REACHED, REFUSED, Punch, Punched, Seen, Tried, Try

IP = bytes([127, 0, 0, 1])


@pytest.fixture
def dead() -> Iterator[tuple[tuple[str, int], ...]]:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield (bound.getsockname(),)


async def link(one: Host, other: Host, topic_key: bytes = ROOM) -> tuple[Recorder, Recorder]:
    """Both are in a topic, one dials the other, and each knows where the other sees it."""
    a, b = (host.endpoint._drivers.get(topic_key) or host.join(topic_key) for host in (one, other))
    one.dial(other.at, other.instance, topic_key)
    await until(lambda: any(up.peer == other.instance for up in a.ups) and any(up.peer == one.instance for up in b.ups))
    await until(lambda: one.endpoint.outside.observed.host_by(other.instance) and other.endpoint.outside.observed.host_by(one.instance))
    return a, b


def say(one: Host, other: Host, frame: reach_frames.ReachFrame) -> None:
    channel = one.channel(other)
    assert channel is not None
    channel.send(reach_frames.encode(frame))


def number_of(one: Host, other: Host, topic_key: bytes = ROOM) -> int:
    return one.endpoint._connections[other.instance].matcher.numbers[topic_key]


def overhear(host: Host, kind: type[Any]) -> list[Any]:
    """The frames of this kind that it gets from now on; nothing comes of them."""
    heard: list[Any] = []
    handle = host.endpoint.outside.handle

    def listen(connection: Any, data: bytes) -> None:
        frame = reach_frames.decode(data)
        if isinstance(frame, kind):
            heard.append(frame)
        else:
            handle(connection, data)

    host.endpoint.outside.handle = listen  # type: ignore[method-assign]
    return heard


# -- where we are seen ---------------------------------------------------------------------------------------------


async def test_members_tell_one_another_where_they_see_them():
    async with hosts(Host(), Host()) as (one, other):
        seen = overhear(one, Seen), overhear(other, Seen)
        a, b = one.join(), other.join()
        one.dial(other.at)
        await until(lambda: all(seen) and a.ups and b.ups)
        assert [frame.address for frame in seen[1]] == list(other.at)  # where it was dialled
        assert [frame.address for frame in seen[0]] == [one.channel(other).local_address]
        hall = one.join(HALL), other.join(HALL)
        await until(lambda: all(driver.ups for driver in hall))
        assert (len(seen[0]), len(seen[1])) == (1, 1)


async def test_strangers_are_not_believed_nor_served():
    async with hosts(Host()) as (one,), stranger(one) as other:
        one.join()
        other.use()
        for frame in (
            Seen(IP, 1),
            Seen(bytes(4), 1),
            Try(IP, one.port),
            Punch(1, one.instance, ASK, (1,)),
            Punched(1, bytes(32), ASK, (1,), IP),
        ):
            other.channel.send(reach_frames.encode(frame))
        other.channel.send(bytes([0x06]) + msgspec.msgpack.encode([1, 2, 3]))
        await until(lambda: one.met)  # what came before has been dealt with
        assert not one.endpoint.outside.refused
        assert len(other.frames) == 1  # USE


@pytest.mark.parametrize(
    ("frame", "reason"),
    [(Seen(IP, 0), "port"), (Seen(bytes([224, 0, 0, 1]), 1), "invalid"), (Seen(bytes(16), 1), "invalid"), (Seen(bytes(4), 1), "invalid")],
)
async def test_impossible_addresses_told_by_a_member_are_counted(frame, reason):
    async with hosts(Host(), Host()) as (one, other):
        await link(one, other)
        say(one, other, frame)
        await until(lambda: other.endpoint.outside.refused)
        assert other.endpoint.outside.refused == {reason: 1}
        assert other.endpoint.outside.observed.host_by(one.instance) == "127.0.0.1"  # what it said before


@pytest.mark.parametrize("kind", sorted(reach_frames.TYPES))
async def test_a_malformed_frame_closes_the_channel(kind):
    async with hosts(Host(), Host()) as (one, other):
        _, b = await link(one, other)
        one.channel(other).send(bytes([kind, 0xC0]))
        await until(lambda: b.downs)
        assert "malformed" in b.downs[0].reason


# -- being tried ---------------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch):
    """Loopback counts as the internet."""
    for module in (outside, dial_back):
        monkeypatch.setattr(module, "scope_of", lambda host: "global")
    monkeypatch.setattr(outside, "is_near", lambda host, other: False)
    monkeypatch.setattr(outside, "SETTLE", 0.0)


async def test_an_address_that_a_neighbour_reaches_is_published(everywhere):
    changes = []
    async with hosts(Host(QUICK, changed=lambda: changes.append(1)), Host()) as (one, other):
        mapped = (("127.0.0.1", one.port),)
        one.endpoint.outside.set_mapped(mapped)
        assert one.endpoint.outside.published(()) == ()
        await link(one, other)
        await until(lambda: one.endpoint.outside.published(()))
        assert one.endpoint.outside.published(()) == mapped
        assert changes
        assert len(one.endpoint._connections) == len(other.endpoint._connections) == 1
        await until(lambda: not (one.endpoint._strangers or one.endpoint._others))


async def test_an_address_where_nobody_answers_is_not_published(everywhere, dead):
    async with hosts(Host(QUICK), Host()) as (one, other):
        one.endpoint.outside.set_mapped(dead)
        await link(one, other)
        await until(lambda: one.endpoint.outside.reachable.doubters(dead[0]))
        assert one.endpoint.outside.published(()) == ()


async def test_an_address_where_another_answers_is_not_published(everywhere):
    async with hosts(Host(QUICK), Host(), Host()) as (one, other, third):
        one.endpoint.outside.set_mapped(third.at)
        await link(one, other)
        await until(lambda: one.endpoint.outside.reachable.doubters(third.at[0]))
        assert one.endpoint.outside.published(()) == ()


async def test_a_neighbour_that_says_so_without_having_come_is_not_believed(everywhere, dead):
    async with hosts(Host(QUICK), Host()) as (one, other):
        asked = overhear(other, Try)
        one.endpoint.outside.set_mapped(dead)
        await link(one, other)
        await until(lambda: asked)
        say(other, one, Tried(IP, dead[0][1], REACHED))
        say(other, one, Tried(IP, 1, REACHED))  # of which nobody spoke
        say(other, one, Seen(IP, 7))
        await until(lambda: one.endpoint.outside.observed._words[other.instance].port == 7)
        assert one.endpoint.outside.published(()) == ()


async def test_only_the_asker_itself_is_dialled_and_not_too_often():
    """Its own host, of the internet, and a few times a minute."""
    async with hosts(Host(), Host(may_go=lambda host: False)) as (one, other):
        answers = overhear(one, Tried)
        await link(one, other)
        for ip in (IP, bytes([8, 8, 8, 8]), bytes([10, 0, 0, 1])):
            say(one, other, Try(ip, one.port))
        await until(lambda: len(answers) == 3)
        assert {answer.outcome for answer in answers} == {REFUSED}


async def test_tries_for_one_host_are_bounded(everywhere):
    async with hosts(Host(), Host()) as (one, other):
        answers = overhear(one, Tried)
        await link(one, other)
        for _ in range(20):
            say(one, other, Try(IP, one.port))
        say(one, other, Try(bytes([8, 8, 8, 8]), one.port))
        await until(lambda: len(answers) == 21)
        outcomes = [answer.outcome for answer in answers]
        assert outcomes.count(REACHED) == 4
        assert outcomes.count(REFUSED) == 17
        assert not outcomes.count(FAILED)


# -- meeting with the help of a neighbour --------------------------------------------------------------------------


async def test_a_peer_that_cannot_be_dialled_is_met_with_the_help_of_a_neighbour(dead):
    async with hosts(Host(), Host(), Host()) as (one, other, relay):
        a, _ = await link(one, relay)
        b, _ = await link(other, relay)
        one.dial(dead, other.instance)
        await until(lambda: len(a.ups) == len(b.ups) == 2)
        assert not a.failures + b.failures
        assert (a.ups[1].peer, a.ups[1].initiated) == (other.instance, True)  # who wanted it asks for a place
        assert (b.ups[1].peer, b.ups[1].initiated) == (one.instance, False)
        one.send(other, b"hello")
        await until(lambda: b.frames)
        await until(lambda: not (one.endpoint.outside.puncher._tasks or other.endpoint.outside.puncher._tasks))
        assert one.endpoint.outside.puncher._wanted == other.endpoint.outside.puncher._expected == {}


async def test_nobody_knows_it_and_the_goal_fails_at_once(dead):
    async with hosts(Host(), Host(), Host()) as (one, relay, stranger_):
        a, _ = await link(one, relay)
        wanted = secrets.token_bytes(32)
        one.dial(dead, wanted)
        await until(lambda: a.failures, punch.ANSWER_TIMEOUT - 1)
        assert a.failures == [DialFailed(wanted, dead)]
        one.dial(dead, wanted)  # and is not asked for again and again
        heard = overhear(relay, Punch)
        await until(lambda: len(a.failures) == 2)
        assert not heard
        await link(stranger_, relay, HALL)  # of another topic: not passed on
        one.dial(dead, stranger_.instance)
        await until(lambda: len(a.failures) == 3)


async def test_a_neighbour_that_says_nothing_costs_a_few_seconds(dead, monkeypatch):
    monkeypatch.setattr(punch, "ANSWER_TIMEOUT", 0.2)
    async with hosts(Host(QUICK), Host()) as (one, relay):
        a, _ = await link(one, relay)
        overhear(relay, Punch)
        one.dial(dead, bytes(32))
        await until(lambda: a.failures)


async def test_whoever_answers_and_never_comes_costs_a_few_seconds(dead, monkeypatch):
    monkeypatch.setattr(punch, "MEET_TIMEOUT", 0.3)
    async with hosts(Host(QUICK), Host()) as (one, relay):
        a, _ = await link(one, relay)
        asked, wanted = overhear(relay, Punch), secrets.token_bytes(32)
        one.dial(dead, wanted)
        await until(lambda: asked)
        assert (asked[0].step, asked[0].instance, one.port in asked[0].ports) == (ASK, wanted, True)
        say(relay, one, Punched(number_of(relay, one), wanted, ANSWER, (dead[0][1],), IP))
        say(relay, one, Punched(number_of(relay, one), wanted, ANSWER, (dead[0][1],), IP))
        await until(lambda: a.failures)
        assert [frame.step for frame in asked] == [ASK, GO]


async def test_a_slow_dial_gets_help_meanwhile(monkeypatch):
    monkeypatch.setattr(punch, "EARLY", 0.0)
    async with hosts(Host(QUICK), Host(), Host()) as (one, other, relay):
        a, _ = await link(one, relay)
        await link(other, relay)
        with socket.create_server(("127.0.0.1", 0)) as mute:
            one.dial((mute.getsockname(),), other.instance)
            await until(lambda: len(a.ups) == 2, QUICK.connect - 0.5)
            assert a.ups[1].initiated


async def test_what_may_not_be_dialled_is_declined():
    async with hosts(Host(), Host(may_dial=lambda address, teller: False), Host()) as (one, other, relay):
        await link(one, relay)
        await link(other, relay)
        heard = overhear(one, Punched)
        say(one, relay, Punch(number_of(one, relay), other.instance, ASK, (one.port,)))
        await until(lambda: heard)
        assert (heard[0].step, heard[0].instance) == (DECLINE, other.instance)
        assert not other.endpoint.outside.puncher._expected


async def test_steps_out_of_place_are_ignored():
    async with hosts(Host(), Host()) as (one, other):
        _, b = await link(one, other)
        number = number_of(one, other)
        for step in (ANSWER, GO, DECLINE, 77):
            say(one, other, Punched(number, bytes(32), step, (1,), IP))
        for frame in (
            Punched(number, one.instance, ASK, (1,), IP),  # nobody passes on its own
            Punched(number + 1, bytes(32), ASK, (1,), IP),
            Punch(number, one.instance, GO),
            Punch(number, bytes(32), GO),
            Punch(number + 1, bytes(32), 77),
        ):
            say(one, other, frame)
        one.send(other, b"after that")
        await until(lambda: b.frames)
        assert not other.endpoint.outside.puncher._tasks
        assert not other.endpoint.outside.puncher._expected


async def test_what_one_host_can_have_passed_on_and_dialled_is_bounded():
    async with hosts(Host(), Host(), Host()) as (one, other, relay):
        await link(one, relay)
        await link(other, relay)
        heard, passed = overhear(one, Punched), overhear(other, Punched)
        for _ in range(60):
            say(one, relay, Punch(number_of(one, relay), other.instance, ASK, (1,)))
        await until(lambda: len(heard) + len(passed) == 60)
        assert len(passed) in range(24, 28)
        assert {frame.step for frame in heard} == {DECLINE}


async def test_those_who_ask_for_us_are_bounded():
    async with hosts(Host(), Host()) as (one, other):
        await link(one, other)
        answers = overhear(one, Punch)
        for index in range(40):
            say(one, other, Punched(number_of(one, other), index.to_bytes(32, "big"), ASK, (1,), IP))
        await until(lambda: len(answers) == 40)
        steps = [frame.step for frame in answers]
        assert steps[:6] == [ANSWER] * 6
        assert set(steps[7:]) == {DECLINE}


# -- two dials, one connection -------------------------------------------------------------------------------------


def both() -> tuple[NoiseSession, NoiseSession, bytes, bytes]:
    one, other = (NoiseSession(True, secrets.token_bytes(32), payload=name, may_cross=True) for name in (b"one", b"other"))
    return one, other, one.start()[2:], other.start()[2:]


def test_of_two_initiators_one_gives_way() -> None:
    for _ in range(20):
        one, other, from_one, from_other = both()
        replies = one.read_handshake(from_other), other.read_handshake(from_one)
        assert {one.initiator, other.initiator} == {True, False}
        assert one.crossed
        assert other.crossed
        first, second = (one, other) if one.initiator else (other, one)
        assert first is (one if from_one < from_other else other)
        reply = replies[second is other]
        assert replies[first is other] == b""
        assert second.read_handshake(first.read_handshake(reply[2:])[2:]) == b""
        assert one.handshake_hash == other.handshake_hash
        assert second.open(first.seal(b"hello")[2:]) == b"hello"


def test_an_initiator_gives_way_once_and_never_to_itself() -> None:
    one, other, from_one, from_other = both()
    for session, own, foreign in ((one, from_one, from_other), (other, from_other, from_one)):
        with pytest.raises(RemoteProtocolError):
            both()[0].read_handshake(bytes(32))  # gives way to a key of low order, or finds it out
        session.read_handshake(foreign)
        if session.initiator:
            with pytest.raises(RemoteProtocolError):
                session.read_handshake(foreign)
        del own
    one, _, from_one, _ = both()
    with pytest.raises(RemoteProtocolError):
        one.read_handshake(from_one)
    plain = NoiseSession(True, secrets.token_bytes(32))
    plain.start()
    with pytest.raises(RemoteProtocolError):
        plain.read_handshake(from_one)


async def test_channels_of_two_that_dialled_are_one():
    ends = [Stranger(), Stranger()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        sides = [socket.create_connection(server.getsockname()), server.accept()[0]]
    for end, side in zip(ends, sides, strict=True):
        side.setblocking(False)
        end.channel = Channel(end, True, secrets.token_bytes(32), limits=Limits(), may_cross=True)
        await asyncio.get_running_loop().create_connection(lambda end=end: end.channel, sock=side)
    await until(lambda: all(end.ready for end in ends))
    one, other = (end.channel for end in ends)
    assert one.crossed
    assert other.crossed
    assert one.initiator != other.initiator
    for end in ends:
        end.channel.send(b"hello")
    await until(lambda: all(end.frames == [b"hello"] for end in ends))
    for end in ends:
        end.channel.abort("test ended")
        await end.channel.wait_closed()


# -- the port listened on ------------------------------------------------------------------------------------------


async def test_dials_from_the_port_listened_on_and_from_another_where_that_is_taken(monkeypatch):
    listening, target = ListeningPort(), bind(("127.0.0.1", 0), [])
    sockets = bind(("127.0.0.1", 0), [])
    listening.use(sockets)
    port = sockets[0].getsockname()[1]
    made = []
    try:
        made.append(await connect(listening, *target[0].getsockname()))
        assert made[0].getsockname()[1] != port  # nothing translates here
        made.append(await connect(listening, *target[0].getsockname(), always=True))
        assert made[1].getsockname()[1] == port
        with pytest.raises(OSError):
            await connect(listening, *target[0].getsockname(), always=True)
        monkeypatch.setattr("solyd_swarm.net.listening_port.scope_of", lambda host: "global")
        made.append(await connect(listening, *target[0].getsockname()))
        assert made[2].getsockname()[1] != port
    finally:
        for each in (*made, *sockets, *target):
            each.close()
    with pytest.raises(OSError):
        await connect(listening, *made[0].getsockname(), always=True)


@pytest.mark.parametrize("where", [("127.0.0.1", 0), ("", 0), ("::1", 0)])
def test_the_port_is_still_ours_alone(where):
    """A second program that listens there is refused, before and after."""
    listening, sockets = ListeningPort(), bind(where, [])
    port = sockets[0].getsockname()[1]
    listening.use(sockets)
    try:
        for host in ("127.0.0.1", "::1"):
            opened, shares = listening.open(host, 1, always=True)
            with opened:
                assert shares == (host == where[0] or not where[0])
                assert not shares or opened.getsockname()[1] == port
                with pytest.raises(OSError):
                    bind((where[0], port), [])
        assert all(not each.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for each in sockets)
    finally:
        for each in sockets:
            each.close()
    opened, shares = listening.open("127.0.0.1", 1, always=True)
    opened.close()
    assert not shares


# -- real routers and firewalls -------------------------------------------------------------------------------------

PATIENCE = 40.0

PROGRAM = """
import asyncio, json, logging, sys
from solyd_swarm import pubsub

def say(*words):
    print(json.dumps(words), flush=True)

class Told(logging.Handler):
    def emit(self, record):
        say("log", record.getMessage())

async def main():
    options = json.loads(sys.argv[1])
    log = logging.getLogger("solyd_swarm.net")
    log.setLevel(logging.DEBUG)
    log.addHandler(Told())
    swarm = pubsub("room", mdns=False, dht=False, **options)
    swarm.on("message", lambda data: say("got", data))
    say("ticket", swarm.ticket)
    endpoint, node = swarm._node.endpoint, swarm._node
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command, *rest = json.loads(line)
        if command == "publish":
            swarm.publish(rest[0])
        elif command == "addresses":
            say("addresses", node.addresses())
        elif command == "mapped":
            node.set_mapped_addresses([tuple(address) for address in rest])
        elif command == "ticket":
            say("ticket", swarm.ticket)
        elif command == "reached":
            candidates = endpoint.outside.reachable._candidates
            say("reached", [address for address, candidate in candidates.items() if candidate.reached])
        elif command == "look":
            endpoint.outside.look(node._reach.addresses())
        elif command == "channels":
            say("channels", [
                [connection.host, connection.channel.remote_address[1], connection.channel.crossed, len(connection.links)]
                for connection in endpoint._connections.values()
            ])
        elif command == "known":
            passive = swarm._driver.overlay.membership.passive
            say("known", [info.addresses for info, via in passive.values()])
    await swarm.leave()

asyncio.run(main())
"""


class Outsider(Process):
    """A member of one topic, with neither mDNS nor a DHT."""

    def __init__(self, host: Machine, *, port: int = 7000, bootstrap: tuple[str, ...] = ()) -> None:
        options = {"listen": ["", port], "bootstrap": list(bootstrap)}
        super().__init__(
            ["nsenter", f"--net={host.namespace}", sys.executable, "-c", PROGRAM, json.dumps(options)], SOLYD_SWARM_INTERFACES=""
        )

    def __enter__(self) -> Self:
        self.ticket = self.hear("ticket")[0]
        return self

    def hear(self, kind: str) -> list[Any]:
        """What follows this word in the next line that begins with it."""
        return json.loads(self.expect(rf'\["{re.escape(kind)}".*').group())[1:]

    def expect_log(self, text: str) -> None:
        """Waits until it has logged this, from the last line read on."""
        self.expect(rf'\["log", ".*{re.escape(text)}.*')

    def tell(self, *command: Any) -> None:
        self.say(json.dumps(command))

    def ask(self, kind: str) -> Any:
        self.tell(kind)
        return self.hear(kind)[0]

    def until(self, kind: str, condition: Callable[[Any], Any], patience: float = PATIENCE) -> Any:
        """Asks until the answer is as wanted."""
        deadline = time.monotonic() + patience
        while not condition(answer := self.ask(kind)):
            assert time.monotonic() < deadline, answer
            time.sleep(0.1)
        return answer

    def heard(self, data: Any) -> None:
        """Waits for this message."""
        while self.hear("got") != [data]:
            pass


def behind_router(
    lab: Lab, internet: Bridge, outside: str, inside: str, *, random: bool = False, port: int = 7000, forwards: int = 0
) -> Machine:
    """A host in a home network of its own.

    Args:
        outside: the router's address, with its prefix length.
        inside: the host's.
        random: every flow gets a port of its own.
        port: what the router makes of the host's port 7000.
        forwards: a port of the router from which it lets everybody in to the host's port 7000.
    """
    lan, router, host = lab.bridge(), lab.host(), lab.host()
    inner = inside.rpartition(".")[0]
    out = router.plug(internet, outside)
    home = router.plug(lan, f"{inner}.1/24")
    router.masquerade(home, out, random=random)
    if port != 7000:
        router.nft(
            f"""
            table ip lab_port {{
                chain out {{ type nat hook postrouting priority 90;
                    oifname "{out.name}" tcp sport 7000 snat to {outside.partition("/")[0]}:{port}; }}
            }}
            """
        )
    if forwards:
        router.nft(
            f"""
            table ip lab_forward {{
                chain in {{ type nat hook prerouting priority -100;
                    iifname "{out.name}" tcp dport {forwards} dnat to {inside}:7000; }}
            }}
            """
        )
    host.plug(lan, f"{inside}/24", gateway=f"{inner}.1")
    return host


ONE, OTHER = "60.2.0.2", "60.3.0.3"


@pytest.fixture
def lab() -> Iterator[Lab]:
    require("nft")
    with Lab() as made:
        yield made


def public(lab: Lab, internet: Bridge, address: str) -> Machine:
    host = lab.host()
    host.plug(internet, f"{address}/8")
    return host


def meets(channels: list[tuple[str, int, bool, int]], host: str) -> bool:
    """Whether there is a channel with this host, by a dial of both, and a topic on it."""
    return any(remote == host and crossed and topics for remote, _, crossed, topics in channels)


def all_hear_all(*members: Outsider) -> None:
    for index, member in enumerate(members):
        member.tell("publish", index)
        for other in members:
            if other is not member:
                other.heard(index)


def knows_inside(member: Outsider) -> list[str]:
    """Addresses inside networks that it has heard of from others."""
    return [host for addresses in member.ask("known") for host, _ in addresses if host.startswith("192.168.")]


@pytest.mark.parametrize("port", [7000, 41000], ids=["as inside", "another"])
def test_two_behind_routers_meet_by_dialling_at_once(lab: Lab, port: int) -> None:
    """One public member brings them together. The routers keep the port, or have one outside that is always the same."""
    internet = lab.bridge()
    homes = [behind_router(lab, internet, f"{ONE}/8", "192.168.1.5", port=port), behind_router(lab, internet, f"{OTHER}/8", "192.168.2.5")]
    with (
        Outsider(public(lab, internet, "60.1.0.1")) as hub,
        Outsider(homes[0], bootstrap=(hub.ticket,)) as one,
        Outsider(homes[1], bootstrap=(hub.ticket,)) as other,
    ):
        one.until("channels", lambda channels: meets(channels, OTHER))
        other.until("channels", lambda channels: meets(channels, ONE))
        all_hear_all(hub, one, other)
        if port != 7000:  # which only the neighbour can have told
            assert any(f"dialling {ONE} port {port}" in line and "at the same time" in line for line in other.lines)
        assert one.ask("addresses") == [["192.168.1.5", 7000]]  # nobody could come in unasked
        assert other.ask("addresses") == [["192.168.2.5", 7000]]
        assert not knows_inside(hub)
        hub.process.kill()  # they need it no more
        one.tell("publish", "still here")
        other.heard("still here")


def test_behind_routers_with_a_port_for_each_flow_messages_are_relayed(lab: Lab) -> None:
    internet = lab.bridge()
    homes = [
        behind_router(lab, internet, f"{ONE}/8", "192.168.1.5", random=True),
        behind_router(lab, internet, f"{OTHER}/8", "192.168.2.5", random=True),
    ]
    with (
        Outsider(public(lab, internet, "60.1.0.1")) as hub,
        Outsider(homes[0], bootstrap=(hub.ticket,)) as one,
        Outsider(homes[1], bootstrap=(hub.ticket,)) as other,
    ):
        for member in (one, other):
            member.until("channels", lambda channels: channels)
        all_hear_all(hub, one, other)
        one.expect_log("was not met")
        all_hear_all(hub, one, other)
        for member in (one, other):
            assert [host for host, *_ in member.ask("channels")] == ["60.1.0.1"]
            assert all(host.startswith("192.168.") for host, _ in member.ask("addresses"))


def test_a_public_address_is_published_until_its_firewall_is_found(lab: Lab) -> None:
    """Three public members, one of which lets nobody in."""
    internet = lab.bridge()
    hosts = [public(lab, internet, f"60.{number}.0.1") for number in range(1, 4)]
    hosts[2].nft(
        """
        table inet lab_closed {
            chain incoming { type filter hook input priority 0; policy accept;
                ct state established,related accept
                tcp dport 7000 drop; }
        }
        """
    )
    with (
        Outsider(hosts[0]) as one,
        Outsider(hosts[1], bootstrap=(one.ticket,)) as two,
        Outsider(hosts[2], bootstrap=(one.ticket, two.ticket)) as closed,
    ):
        assert closed.ask("addresses") == [["60.3.0.1", 7000]]
        closed.until("addresses", lambda addresses: not addresses)
        for number, member in enumerate((one, two), 1):
            assert member.ask("addresses") == [[f"60.{number}.0.1", 7000]]
        all_hear_all(one, two, closed)


def test_a_routers_own_mapping_is_published_once_somebody_came_in_by_it(lab: Lab) -> None:
    internet = lab.bridge()
    home = behind_router(lab, internet, f"{ONE}/8", "192.168.1.5", random=True, forwards=5000)
    with Outsider(public(lab, internet, "60.1.0.1")) as hub, Outsider(home, bootstrap=(hub.ticket,)) as one:
        one.tell("mapped", [ONE, 5000], [ONE, 5001], ["192.168.1.1", 5000], [ONE, 0])
        assert one.until("addresses", lambda addresses: len(addresses) == 2) == [[ONE, 5000], ["192.168.1.5", 7000]]
        with Outsider(public(lab, internet, "60.4.0.1"), bootstrap=(one.ask("ticket"),)) as late:
            late.until("channels", lambda channels: any(host == ONE and topics for host, _, _, topics in channels))
            all_hear_all(hub, one, late)
        one.tell("mapped")
        one.until("addresses", lambda addresses: addresses == [["192.168.1.5", 7000]])


def test_after_a_move_the_new_address_is_published_and_tried_afresh(lab: Lab) -> None:
    internet = lab.bridge()
    mover = lab.host()
    cable = mover.plug(internet, "60.2.0.2/8")
    with Outsider(public(lab, internet, "60.1.0.1")) as hub, Outsider(mover, bootstrap=(hub.ticket,)) as one:
        one.until("reached", lambda reached: reached == [["60.2.0.2", 7000]])
        cable.remove("60.2.0.2/8").add("60.5.0.5/8")
        one.tell("look")
        one.until("addresses", lambda addresses: addresses == [["60.5.0.5", 7000]])
        one.until("reached", lambda reached: reached == [["60.5.0.5", 7000]])
        all_hear_all(hub, one)
