"""Whoever records all traffic of a swarm learns neither topic, nor authors, nor messages, nor that it is the same swarm as days ago.

Whole processes on hosts of their own: one by which the others get into the DHT, nodes of the BitTorrent DHT, and two members of three
topics: found by mDNS, by our own DHT, and by the BitTorrent DHT alone.
"""

import importlib.util
import json
import re
import secrets
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from captured import FIXED, Traffic, found, of_text, peculiar, read, runs, spellings, without_transactions
from hosts import Host, Lab, require
from processes import Process

from solyd_swarm.core.keys import derive, derive_topic_id, derive_topic_key, parse_author
from solyd_swarm.discovery.mainline_rules import days_looked_up, infohash_of
from solyd_swarm.discovery.records import DAY_SECONDS, DayKeys, day_of

DAYS = 4
LAN, FAR, WORLD = "confidential-lan-topic", "confidential-dht-topic", "confidential-mainline-topic"
SECRET = b"a secret that is long enough"
HOST_NAME, USER_NAME = "hostname-of-a-member", "username-of-a-member"

PROLOGUE = """
import os, socket, sys, time
socket.sethostname(os.environ["NAME"])
shift, clock, clock_ns = int(os.environ["SHIFT"]), time.time, time.time_ns
time.time, time.time_ns = lambda: clock() + shift, lambda: clock_ns() + shift * 10**9
import hashlib, json
from solyd_swarm import Node, pubsub
def say(*words):
    print(*words, flush=True)
"""

ENTRY = """
with Node(mdns=False) as node:
    say(node.ticket)
    sys.stdin.read()
"""

MAINLINE = """
import sys
import libtorrent
quiet = dict.fromkeys(("enable_lsd", "enable_upnp", "enable_natpmp", "dht_restrict_routing_ips", "dht_restrict_search_ips"), False)
sessions = []
for number in range(101, 111):
    routers = "44.0.0.101:6881" if sessions else ""
    settings = {**quiet, "listen_interfaces": f"44.0.0.{number}:6881", "dht_bootstrap_nodes": routers, "dht_block_ratelimit": 10_000}
    sessions.append(libtorrent.session(settings))
print("ready", flush=True)
sys.stdin.read()
"""

MEMBER = """
lan, far, world, ticket, identity = json.loads(sys.stdin.readline())
swarms = {
    "lan": pubsub(lan, dht=False, identity=identity + "-lan"),
    "far": pubsub(far, mdns=False, mainline=False, bootstrap=ticket, secret=b"a secret that is long enough", identity=identity + "-far"),
}
if world:
    swarms["world"] = pubsub(world, mdns=False, mainline=["44.0.0.101:6881", "44.0.0.102:6881"], identity=identity + "-world")
for name, swarm in swarms.items():
    swarm.on("message", lambda obj, name=name: say("got", name, hashlib.sha256(obj["data"]).hexdigest()))
    say("id", name, swarm.id)
for name, swarm in swarms.items():
    swarm.joined().result(14)
    say("joined", name)
for line in sys.stdin:
    name, text = line.split()
    swarms[name].publish({"data": bytes.fromhex(text), "text": text[:64]})
for leaving in [swarm.leave() for swarm in swarms.values()]:
    leaving.result(5)
"""


@dataclass
class Session:
    """What was sent, and what nobody is to learn from it."""

    topics: dict[str, bytes | None]
    day: int
    traffic: Traffic = field(default_factory=Traffic)
    authors: set[str] = field(default_factory=set)
    messages: list[bytes] = field(default_factory=list)


def start(host: Host, script: str, days: int) -> Process:
    """A script on a machine with names of its own, whose clock goes ahead by so many days."""
    environment = {"NAME": HOST_NAME, "USER": USER_NAME, "LOGNAME": USER_NAME, "SHIFT": str(days * DAY_SECONDS)}
    return host.process(["unshare", "--uts", sys.executable, "-u", "-c", PROLOGUE + script], **environment)


def run(lab_hosts: list[Host], lan: str, far: str, world: str, days: int, identities: Path) -> Session:
    """Two members meet in each topic, tell one another something in it, and leave."""
    session = Session({lan: None, far: SECRET, **({world: None} if world else {})}, day_of(time.time()) + days)
    names = ("lan", "far", "world") if world else ("lan", "far")
    recorded: list[list[tuple[float, bytes]]] = []
    with ExitStack() as stack:
        recorded += [stack.enter_context(host.capture()) for host in lab_hosts]
        entry = stack.enter_context(start(lab_hosts[0], ENTRY, days))
        if world:
            stack.enter_context(lab_hosts[0].script(MAINLINE)).expect("ready")
        members = [stack.enter_context(start(host, MEMBER, days)) for host in lab_hosts[1:]]
        (ticket,) = entry.expect("(solyd1.*)").groups()
        for number, member in enumerate(members):
            member.say(json.dumps([lan, far, world, ticket, str(identities / f"member-{number}")]))
        for member in members:
            session.authors |= {member.expect("id .* (.*)")[1] for _ in names}
            member.expect(f"joined {names[-1]}")
        for name in names:
            for sender, receiver in (members, members[::-1]):
                for size in (40, 20_000):  # one within a segment, one over many
                    session.messages.append(secrets.token_bytes(size))
                    sender.say(f"{name} {session.messages[-1].hex()}")
                    receiver.expect(f"got {name} .*")
        for process in (*members, entry):
            assert process.process.stdin is not None
            process.process.stdin.close()
        for process in (*members, entry):
            assert process.end() == (0, "")
    session.traffic = read(frame for frames in recorded for _, frame in frames)
    return session


@dataclass
class Sessions:
    one: Session
    same_day: Session
    later: Session
    unrelated: Session

    def all(self) -> list[Session]:
        return [self.one, self.same_day, self.later, self.unrelated]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    """The same two members and topics: twice on one day, and days later; and others, in other topics, on yet another day."""
    require("unshare")
    kept, others = tmp_path_factory.mktemp("directory-of-a-member"), tmp_path_factory.mktemp("others")
    world, another = (WORLD, "another-topic-of-mainline") if importlib.util.find_spec("libtorrent") else ("", "")
    with Lab() as lab:
        # Addresses of the internet: the BitTorrent DHT does without others.
        three = lab.lan(3, "44.0.0.{}/24")
        for number in range(101, 111) if world else ():
            three[0].interfaces[0].add(f"44.0.0.{number}/24")
        yield Sessions(
            run(three, LAN, FAR, world, 0, kept),
            run(three, LAN, FAR, world, 0, kept),
            run(three, LAN, FAR, world, DAYS, kept),
            run(three, "another-topic-of-lan", "another-topic-of-dht", another, 2 * DAYS + 1, others),
        )


def test_the_search_finds_what_is_there() -> None:
    """A needle in a plain datagram, in each spelling; one that a TCP stream carries in two pieces; and base64 amid a longer text."""
    require()
    needles = of_text("topic", LAN) | spellings("author", bytes(range(32)))
    with Lab() as lab:
        one, two = lab.lan(2)
        program = """
            import socket
            udp, tcp = socket.socket(type=socket.SOCK_DGRAM), socket.create_server(("10.0.0.2", 7000))
            udp.bind(("10.0.0.2", 7000))
            print("ready", flush=True)
            peer, _ = tcp.accept()
            while peer.recv(1000):
                pass
            peer.close()
            """
        sender = """
            import socket, sys
            needles = [bytes.fromhex(line) for line in sys.stdin.readline().split()]
            udp, tcp = socket.socket(type=socket.SOCK_DGRAM), socket.create_connection(("10.0.0.2", 7000))
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for needle in needles:
                udp.sendto(b"x" + needle, ("10.0.0.2", 7000))
            for piece in (b"first of two, ", b"second of two"):
                tcp.send(piece)
            tcp.shutdown(socket.SHUT_WR)
            while tcp.recv(1000):
                pass
            """
        with one.capture() as frames, two.script(program) as receiving, one.script(sender) as sending:
            receiving.expect("ready")
            sending.say(" ".join(needle.hex() for needle in needles.values()))
            assert (sending.end()[0], receiving.end()[0]) == (0, 0)
        traffic = read(frame for _, frame in frames)
    assert found(needles, traffic) == needles.keys()
    assert b"first of two, second of two" in traffic.streams
    assert found({"split": b"two, second"}, Traffic(traffic.frames)) == set()
    assert found({"split": b"two, second"}, traffic) == {"split"}
    embedded = spellings("value", b"some value in a text")
    for before in (b"", b"a", b"ab"):
        shift = len(before)
        assert embedded[f"value, b64encode {shift}"] in b64encode(before + b"some value in a text" + b"after")


def test_a_capture_holds_neither_topics_nor_authors_nor_messages_nor_names(sessions: Sessions) -> None:
    for session in sessions.all():
        needles: dict[str, bytes] = {}
        for topic, secret in session.topics.items():
            needles |= of_text(topic, topic)
            for known in {None, secret}:
                key = derive_topic_key(topic, known)
                needles |= spellings(f"key of {topic}", key) | spellings(f"id of {topic}", derive_topic_id(key))
        for author in session.authors:
            needles |= spellings("author", parse_author(author)) | of_text("author id", author)
            needles |= of_text("author in base64", author.partition(".")[0])
        for name in (HOST_NAME, USER_NAME, SECRET.decode(), "directory-of-a-member"):
            needles |= of_text(name, name)
        assert found(needles, session.traffic) == set()
        assert len(session.authors) == 2 * len(session.topics)
        told = runs([*session.messages, *(message.hex().encode()[:64] for message in session.messages)])
        assert not told & runs(session.traffic.payloads)


def announcements(session: Session) -> set[tuple[bytes, bytes]]:
    """Nonces and tags of 16 bytes each, alone in a TXT record."""
    pattern = re.compile(rb"\x00\x26\x12n=(.{16})\x12t=(.{16})", re.DOTALL)
    return {(nonce, tag) for data in session.traffic.mdns for nonce, tag in pattern.findall(data)}


def test_the_capture_was_of_what_it_should_be(sessions: Sessions) -> None:
    """Whoever knows the topics finds what is derived from them: tags over mDNS, keys in the DHT, and all messages' bytes."""
    for session in sessions.all():
        (lan, _), (far, secret), *world = session.topics.items()
        announced = announcements(session)
        assert len(announced) == 2
        assert all(tag == derive(derive_topic_key(lan), b"mdns", nonce, size=16) for nonce, tag in announced)
        keys = DayKeys(derive_topic_key(far, secret), session.day)
        assert found({"key": keys.key, "public": keys.public}, session.traffic) == {"key", "public"}
        infohashes = {topic: infohash_of(derive_topic_key(topic), session.day) for topic, _ in world}
        assert found(infohashes, session.traffic) == infohashes.keys()
        assert sum(map(len, session.traffic.streams)) > sum(map(len, session.messages))


def test_days_cannot_be_linked(sessions: Sessions) -> None:
    """What two captures of the same topics and authors, days apart, have in common is what any two captures have in common."""
    usual = runs(sessions.unrelated.traffic.mdns + sessions.unrelated.traffic.other, FIXED)
    captures = (without_transactions(session.traffic.payloads) for session in (sessions.one, sessions.same_day, sessions.later))
    one, same_day, later = (peculiar(payloads, usual) for payloads in captures)
    assert sessions.one.authors == sessions.same_day.authors == sessions.later.authors  # their identities are kept
    (_, (far, secret), *world) = sessions.one.topics.items()
    keys = DayKeys(derive_topic_key(far, secret), sessions.one.day)
    shared = one & same_day
    assert shared & runs([keys.key])  # of that day in the DHT: so the comparison sees what there is to see
    assert shared & runs([keys.public])
    assert all(shared & runs([infohash_of(derive_topic_key(topic), sessions.one.day)]) for topic, _ in world)
    assert one & later == set()
    assert same_day & later == set()


def test_announcements_over_mdns_and_channels_cannot_be_linked_even_on_one_day(sessions: Sessions) -> None:
    usual = runs(sessions.unrelated.traffic.mdns, FIXED)
    one, same_day, later = (
        peculiar(session.traffic.mdns + session.traffic.streams, usual) for session in (sessions.one, sessions.same_day, sessions.later)
    )
    for session, seen in ((sessions.one, one), (sessions.same_day, same_day), (sessions.later, later)):
        assert all(runs([nonce]) & seen and runs([tag]) & seen for nonce, tag in announcements(session))
    assert one & same_day == set()
    assert one & later == set()
    assert same_day & later == set()


def test_what_is_derived_for_days_four_apart_has_nothing_in_common() -> None:
    """Whatever a storing node sees, at any hour: each day's keys, those looked up around it included."""
    key, instance = derive_topic_key(FAR), bytes(range(32))

    def seen(now: float) -> set[bytes]:
        days = [DayKeys(key, day_of(now) + around) for around in (-1, 0, 1)]
        infohashes = [infohash_of(key, day) for day in days_looked_up(now)]
        return runs([*(part for keys in days for part in (keys.key, keys.public, keys.slot(instance))), *infohashes])

    for hour in range(25):
        now = 1_700_000_000.0 + 3600 * hour
        assert not seen(now) & seen(now + DAYS * DAY_SECONDS)
        assert seen(now) & seen(now + 3600)
        assert not seen(now) & runs(of_text(FAR, FAR).values())
